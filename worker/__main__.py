"""`python -m worker SPEC.json`: one model in one process. Exit codes: `protocol.states.WorkerExit`."""

import sys

from worker.loading import load_mlx
from worker.process import main

if __name__ == "__main__":
    main(sys.argv, load_mlx)
