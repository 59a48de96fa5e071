"""`python -m supervisor` is `lmx-supervisor`."""

from supervisor.cli import main

if __name__ == "__main__":
    main()
