"""Getting a repository from the Hugging Face hub: weights and text, never code and never pickle."""

from collections.abc import Callable
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import Any, Final

from huggingface_hub import HfApi, ModelInfo, constants, errors, snapshot_download
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

from worker.staging import check_space
from worker.tool_errors import FetchFailed

#: What a model folder is made of. Not *.py (code), not *.bin or *.pt (pickle), not *.gguf.
ALLOW_PATTERNS: Final = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken")
POOLING: Final = "*_Pooling/config.json"
#: How long the hub may take to answer before it counts as not there.
ANSWER_TIMEOUT_S: Final = 15
_WORKERS: Final = 4
_SPARE_BYTES: Final = 64_000_000


def fetch_repository(repo: str, folder: Path, progress: Callable[[int, int, str], None] | None) -> None:
    """Download `org/name` into an existing folder; the caller makes that atomic. Raises `FetchFailed`."""
    try:
        info = HfApi().model_info(repo, files_metadata=True, timeout=ANSWER_TIMEOUT_S)
        wanted = _wanted_files(repo, info)
        total = sum(file.size or 0 for file in wanted)
        check_space(folder, total + _SPARE_BYTES, FetchFailed)
        snapshot_download(
            repo,
            revision=info.sha,  # one commit, even if someone pushes meanwhile
            local_dir=folder,
            allow_patterns=[escape(file.rfilename) for file in wanted],
            etag_timeout=ANSWER_TIMEOUT_S,
            max_workers=_WORKERS,
            tqdm_class=_reporting_to(progress, total),
        )
    except FetchFailed:
        raise
    except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
        msg = f"the hub has no repository {repo}, or not for you (private and gated ones need HF_TOKEN)"
        raise FetchFailed("unknown", msg) from error
    except errors.HFValidationError as error:
        raise FetchFailed("unknown", f"{repo!r} is not the name of a repository: {error}") from error
    except errors.OfflineModeIsEnabled as error:
        raise FetchFailed("network", "HF_HUB_OFFLINE is set, so nothing is fetched from the hub") from error
    except errors.HfHubHTTPError as error:
        raise FetchFailed("network", f"the hub refused {repo}: {str(error).splitlines()[0][:300]}") from error
    except Exception as error:
        # The boundary to a client that has changed its HTTP library twice: whatever it raises ends the fetch.
        msg = f"the hub cannot be reached at {constants.ENDPOINT} ({type(error).__name__}: {str(error)[:300]})"
        raise FetchFailed("network", msg) from error


def _wanted_files(repo: str, info: ModelInfo) -> list[RepoSibling]:
    """Return what will be downloaded, having seen that there are weights in it.

    Of folders in the repository only what says how sentence-transformers pools.
    """
    wanted = [
        file
        for file in info.siblings or []
        if any(fnmatch(file.rfilename, pattern) for pattern in ALLOW_PATTERNS)
        and ("/" not in file.rfilename or fnmatch(file.rfilename, POOLING))
    ]
    if not any(file.rfilename.endswith(".safetensors") for file in wanted):
        msg = f"{repo} has no safetensors weights: choose another repository, such as one of mlx-community"
        raise FetchFailed("unsupported", msg)
    return wanted


def _reporting_to(progress: Callable[[int, int, str], None] | None, total: int) -> type[hub_tqdm]:
    """Return a progress bar for the hub's client that draws nothing and reports bytes."""

    class Reporter(hub_tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("unit") == "B" and "ransfer" not in str(kwargs.get("name"))
            self._done = 0
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts_bytes and progress:
                self._done += int(n or 0)
                progress(min(self._done, total), total, "download")
            return None

    return Reporter
