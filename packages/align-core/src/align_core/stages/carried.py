"""Completions as text, so that a checkpoint's record carries those that are sampled but not yet trained on."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from align_core.columns import from_columns, to_columns
from align_core.errors import CheckpointError
from align_core.types import Completion


def to_text(completions: Sequence[Completion]) -> str:
    """All of `completions`, exactly."""
    columns: dict[str, Any] = to_columns(completions)
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **columns)
    return base64.b64encode(file.getvalue()).decode("ascii")


def from_text(text: str) -> list[Completion]:
    """What `to_text` wrote; raises CheckpointError for anything else."""
    try:
        with np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False) as file:
            return from_columns({name: file[name] for name in file.files})
    except (ValueError, KeyError, OSError, IndexError) as error:
        raise CheckpointError(f"the completions in the checkpoint are damaged: {error}; remove it") from error
