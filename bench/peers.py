"""What only a checkout has: a tiny random model, and an environment of vllm-mlx that `python -m bench.peers` makes."""

import hashlib
import importlib
import subprocess
import sys
import venv
from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).resolve().parents[1]
_LOCK: Final = _ROOT / "bench" / "envs" / "vllm-mlx" / "requirements.lock"
#: Ignored by git.
_MADE: Final = _ROOT / ".bench" / "vllm-mlx"
_WITHIN_S: Final = 900


def vllm_mlx() -> Path | None:
    """Return the interpreter of its environment, None if that was not made."""
    python = _MADE / "bin" / "python"
    return python if python.exists() else None


def tiny_model(folder: Path) -> Path:
    """Write the tiny random model, 2 layers of 64, and return its folder. Ends the program outside of a checkout."""
    try:
        kit = importlib.import_module("tests.modelkit")
    except ImportError:
        sys.exit("bench: name a model folder with --model; the tiny one is made by the tests of a checkout")
    made: Path = kit.make_tiny_model(folder)
    return made


def make() -> Path:
    """Make the environment if there is none of this lock; return its folder."""
    want = hashlib.sha256(_LOCK.read_bytes()).hexdigest() + str(_MADE)
    stamp = _MADE / ".made-from"
    if stamp.exists() and stamp.read_text() == want:
        return _MADE
    venv.create(_MADE, with_pip=True, clear=True)
    # The lock is complete: what it leaves out, torch above all, is not needed to serve.
    pip = [str(_MADE / "bin" / "pip"), "install", "--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    subprocess.run([*pip, "--disable-pip-version-check", "-r", str(_LOCK)], check=True, timeout=_WITHIN_S)
    stamp.write_text(want)
    return _MADE


if __name__ == "__main__":
    sys.stdout.write(f"bench: {make()}\n")
