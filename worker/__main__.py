"""`python -m worker SPEC.json`: one model in one process. Exit codes: `protocol.states.WorkerExit`."""

import sys

from worker import spare
from worker.loading import load_mlx
from worker.process import main

if __name__ == "__main__":
    if sys.argv[1:2] == ["--spare"]:
        spare.main(sys.argv, load_mlx)
    main(sys.argv, load_mlx)
