"""What tells one model from another without reading all of it: the hash that caches on disk are bound to."""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Final

#: Read from each weight file: its header is at the beginning.
_HEAD_BYTES: Final = 1024 * 1024
_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 4096
_SUFFIXES: Final = (".safetensors", ".json")


def fingerprint(folder: Path) -> bytes:
    """Return a hash of a model folder; raise `OSError`.

    It covers names, sizes and times of all files that make the model, their beginnings with the headers, samples
    spread over the weights, and the versions of what computes. A change that leaves all of that alone would have to
    be made on purpose.
    """
    found = hashlib.sha256()
    for name in ("mlx", "mlx-lm"):
        found.update(f"{name}={version(name)}\n".encode())
    for file in sorted(folder.iterdir()):
        if file.suffix not in _SUFFIXES or not file.is_file():
            continue
        status = file.stat()
        found.update(f"{file.name}:{status.st_size}:{status.st_mtime_ns}\n".encode())
        with file.open("rb") as stream:
            found.update(stream.read(_HEAD_BYTES))
            if file.suffix == ".safetensors":
                for number in range(1, _SAMPLES + 1):
                    stream.seek(status.st_size * number // (_SAMPLES + 1))
                    found.update(stream.read(_SAMPLE_BYTES))
    return found.digest()
