"""The environments of the clients: one per client, from its lock file, made once and kept until the lock changes.

Python clients get a virtual environment; those for Node get Node itself from a wheel, and their packages from npm.
"""

import hashlib
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
LOCKS: Final = HERE / "envs"
#: Outside of the tree that tests and linters walk through; ignored by git.
MADE: Final = HERE.parents[1] / ".clients"
NAMES: Final = tuple(sorted(folder.name for folder in LOCKS.iterdir() if folder.is_dir()))
_WITHIN_S: Final = 900


def make(name: str) -> Path:
    """Return the folder of an environment, made if there is none of this lock. Raises `CalledProcessError`."""
    locks, folder = LOCKS / name, MADE / name
    want = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(locks.iterdir()))).hexdigest() + str(folder)
    stamp = folder / ".made-from"
    if stamp.exists() and stamp.read_text() == want:
        return folder
    venv.create(folder, with_pip=True, clear=True)
    # The lock is complete. Without --no-deps pip wants a hash for each extra of a package as well.
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--no-deps", "--require-hashes", "--no-compile"]
    _run([*pip, "--disable-pip-version-check", "-r", str(locks / "requirements.lock")])
    if (locks / "package.json").exists():
        for file in ("package.json", "package-lock.json"):
            (folder / file).write_bytes((locks / file).read_bytes())
        npm = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        _run(["/usr/bin/env", f"PATH={folder / 'bin'}:/usr/bin:/bin", *npm], cwd=folder)
    stamp.write_text(want)
    return folder


def _run(command: list[str], cwd: Path | None = None) -> None:
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_WITHIN_S, check=False
    )
    if done.returncode:
        sys.stderr.write(done.stdout[-4000:])
        done.check_returncode()


def main() -> int:
    """Make all environments, some at a time: most of it is waiting for a registry."""
    with ThreadPoolExecutor(4) as pool:
        for name, made in zip(NAMES, pool.map(_try, NAMES), strict=True):
            sys.stdout.write(f"clients: {name}: {made}\n")
    return 0


def _try(name: str) -> str:
    try:
        make(name)
    except (subprocess.SubprocessError, OSError) as error:
        return f"could not be made ({type(error).__name__}): its tests are skipped"
    return "there"


if __name__ == "__main__":
    sys.exit(main())
