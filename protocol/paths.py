"""Where things lie under `$LMX_HOME`, and the checks that make the folder safe to use."""

import hashlib
import os
import re
import stat
from pathlib import Path
from typing import Final

#: `sun_path` holds 104 bytes on macOS, one of them the final NUL.
MAX_SOCKET_PATH_BYTES: Final = 103
_PRIVATE: Final = 0o700
_SLUG_LENGTH: Final = 16
#: Hex digits of the id's hash. With 4, one pair of models in 65,536 would share a name, its files and its slot.
_HASH_LENGTH: Final = 8


class UnsafeHomeError(Exception):
    """`$LMX_HOME` cannot be used; the text says what to change."""


def default_home() -> Path:
    """Return `$LMX_HOME`, or `~/.lmx`; raise `UnsafeHomeError` if nobody has such a home."""
    return expanded(Path(os.environ.get("LMX_HOME") or "~/.lmx"))


def expanded(path: Path) -> Path:
    """Return the path with `~` or `~user` replaced; raise `UnsafeHomeError` if there is no such user."""
    try:
        return path.expanduser()
    except RuntimeError:
        msg = f"{path} names the home of nobody this machine knows: choose another LMX_HOME"
        raise UnsafeHomeError(msg) from None


def slot_name(model_id: str) -> str:
    """Return a short, unique, file-safe name for a model id (ids may hold slashes and be long)."""
    slug = re.sub(r"[^a-z0-9.]+", "-", model_id.lower()).strip("-.")[:_SLUG_LENGTH] or "model"
    digest = hashlib.sha256(model_id.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{slug}-{digest[:_HASH_LENGTH]}"


class Home:
    """The layout of one `$LMX_HOME`."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))  # noqa: PTH100 - resolve() would follow the links we must refuse
        self.run = self.root / "run"
        self.state = self.root / "state"
        self.models = self.root / "models"
        self.logs = self.root / "logs"
        self.crashes = self.root / "crashes"
        self.cache = self.root / "cache"
        self.config = self.root / "lmx.toml"
        self.control_socket = self.run / "supervisor.sock"
        self.lock = self.run / "supervisor.lock"
        self.admin_key = self.root / "admin.key"
        self.journal = self.state / "events.jsonl"
        self.audit = self.root / "audit.db"
        self.keys = self.state / "keys"

    def endpoint(self, slot: str, incarnation: int) -> Path:
        """Return the data socket of one incarnation: a path of its own, because binding a live path steals it."""
        return self.run / f"{slot}.{incarnation}.sock"

    def spec(self, slot: str, incarnation: int) -> Path:
        """Return the file a process is started from."""
        return self.run / f"{slot}.{incarnation}.json"

    def ensure(self) -> None:
        """Create what is missing, private to this user; raise `UnsafeHomeError` for what cannot be trusted."""
        longest = self.endpoint("x" * (_SLUG_LENGTH + 1 + _HASH_LENGTH), 10**8)
        if len(os.fsencode(longest)) > MAX_SOCKET_PATH_BYTES:
            msg = f"{self.root} is too long for unix sockets ({MAX_SOCKET_PATH_BYTES} bytes): choose a shorter LMX_HOME"
            raise UnsafeHomeError(msg)
        try:
            self.root.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
            for folder in (self.run, self.state, self.models, self.logs, self.crashes, self.cache):
                folder.mkdir(mode=_PRIVATE, exist_ok=True)
        except OSError as error:
            msg = f"cannot create {error.filename}: {error.strerror}"
            raise UnsafeHomeError(msg) from None
        _check_root(self.root)
        for folder in (self.run, self.state, self.logs, self.crashes, self.cache):
            _check_private(folder)


def _check_root(root: Path) -> None:
    """Refuse a home where somebody else could put a folder of theirs in the place of ours. It may be a link."""
    status = root.stat()
    if status.st_uid != os.geteuid():
        msg = f"{root} belongs to uid {status.st_uid}, not to uid {os.geteuid()}: choose another LMX_HOME"
        raise UnsafeHomeError(msg)
    if status.st_mode & stat.S_IWOTH:
        msg = f"{root} can be written by everybody: choose another LMX_HOME, or run chmod o-w on it"
        raise UnsafeHomeError(msg)


def _check_private(folder: Path) -> None:
    """Refuse a symlink, another owner's folder, and access for others (which is taken away if it is ours)."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        msg = f"{folder} is not a folder (a link is refused): remove it"
        raise UnsafeHomeError(msg)
    if status.st_uid != os.geteuid():
        msg = f"{folder} belongs to uid {status.st_uid}, not to uid {os.geteuid()}: remove it or change its owner"
        raise UnsafeHomeError(msg)
    if status.st_mode & 0o077:
        folder.chmod(_PRIVATE)
