"""Completions as a few arrays: to cross a process or a file, thousands of them cost what one costs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align_core.types import Completion, FinishReason

_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort")

Columns = Mapping[str, NDArray[Any]]
"""One row a completion, and the tokens of all end to end; see `to_columns`."""


def to_columns(completions: Sequence[Completion]) -> dict[str, NDArray[Any]]:
    """All of `completions`, exactly."""
    mixed = [c for c in completions if c.versions is not None]
    return {
        "prompt_id": np.asarray([c.prompt_id for c in completions], np.int64),
        "sample": np.asarray([c.sample for c in completions], np.int64),
        "finish_reason": np.asarray([_REASONS.index(c.finish_reason) for c in completions], np.int8),
        "length": np.asarray([len(c.tokens) for c in completions], np.int64),
        "tokens": _joined([c.tokens for c in completions], np.int32),
        "logprobs": _joined([c.logprobs for c in completions], np.float32),
        "version": np.asarray([c.version for c in completions], np.int64),
        "mixed": np.asarray([c.versions is not None for c in completions], np.bool_),
        "versions": _joined([c.token_versions for c in mixed], np.int32),
    }


def from_columns(columns: Columns) -> list[Completion]:
    """What `to_columns` took; tokens and log-probs are views.

    Raises:
        KeyError, IndexError, ValueError: for anything else.
    """
    lengths, mixed = columns["length"], columns["mixed"]
    tokens, logprobs = _parts(columns["tokens"], lengths), _parts(columns["logprobs"], lengths)
    versions = iter(_parts(columns["versions"], lengths[mixed]))
    names = ("prompt_id", "sample", "finish_reason", "version", "mixed")
    rows = zip(*(columns[name].tolist() for name in names), strict=True)
    return [
        Completion(
            prompt_id=prompt_id,
            sample=sample,
            tokens=tokens[i],
            logprobs=logprobs[i],
            finish_reason=_REASONS[reason],
            version=version,
            versions=next(versions) if has_versions else None,
        )
        for i, (prompt_id, sample, reason, version, has_versions) in enumerate(rows)
    ]


def _parts(array: NDArray[Any], lengths: NDArray[np.int64]) -> list[NDArray[Any]]:
    if int(lengths.sum()) != len(array):
        raise ValueError(f"{len(array)} values for {int(lengths.sum())} tokens")
    ends = np.cumsum(lengths).tolist()
    return [array[start:end] for start, end in zip([0, *ends], ends)]


def _joined(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    joined: NDArray[Any] = np.concatenate([np.zeros(0, dtype), *parts])
    return joined.astype(dtype, copy=False)
