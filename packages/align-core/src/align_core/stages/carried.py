"""Completions as text, so that a checkpoint's record carries those that are sampled but not yet trained on."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align_core.errors import CheckpointError
from align_core.types import Completion, FinishReason

_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort")


def to_text(completions: Sequence[Completion]) -> str:
    """All of `completions`, exactly."""
    columns: dict[str, Any] = {
        "prompt_id": np.asarray([c.prompt_id for c in completions], np.int64),
        "sample": np.asarray([c.sample for c in completions], np.int64),
        "finish_reason": np.asarray([_REASONS.index(c.finish_reason) for c in completions], np.int8),
        "length": np.asarray([len(c.tokens) for c in completions], np.int64),
        "tokens": _joined([c.tokens for c in completions], np.int32),
        "logprobs": _joined([c.logprobs for c in completions], np.float32),
        "versions": _joined([c.token_versions for c in completions], np.int32),
        "version": np.asarray([c.version for c in completions], np.int64),
        "mixed": np.asarray([c.versions is not None for c in completions], np.bool_),
    }
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **columns)
    return base64.b64encode(file.getvalue()).decode("ascii")


def from_text(text: str) -> list[Completion]:
    """What `to_text` wrote; raises CheckpointError for anything else."""
    try:
        with np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
        ends = np.cumsum(columns["length"])[:-1]
        parts = {name: np.split(columns[name], ends) for name in ("tokens", "logprobs", "versions")}
        return [
            Completion(
                prompt_id=int(columns["prompt_id"][i]),
                sample=int(columns["sample"][i]),
                tokens=parts["tokens"][i],
                logprobs=parts["logprobs"][i],
                finish_reason=_REASONS[columns["finish_reason"][i]],
                version=int(columns["version"][i]),
                versions=parts["versions"][i] if columns["mixed"][i] else None,
            )
            for i in range(len(columns["length"]))
        ]
    except (ValueError, KeyError, OSError, IndexError) as error:
        raise CheckpointError(f"the completions in the checkpoint are damaged: {error}; remove it") from error


def _joined(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    joined: NDArray[Any] = np.concatenate([np.zeros(0, dtype), *parts])
    return joined.astype(dtype)
