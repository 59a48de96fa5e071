"""How bringing a model in can fail: typed, with a message for the operator."""


class ModelToolError(Exception):
    """A model could not be brought in; `message` says which file or name, and what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class ImportFailed(ModelToolError):  # noqa: N818 - what callers read: "the import failed"
    """Codes: missing, not_gguf, corrupt, unsupported, exists, busy, no_space, io."""


class FetchFailed(ModelToolError):  # noqa: N818
    """Codes: unknown, network, refused, corrupt, unsupported, exists, busy, no_space, io."""
