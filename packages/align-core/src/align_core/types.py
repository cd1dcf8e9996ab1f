"""Records that travel between stages, trainers and engines: ragged batches, prompts, completions, weights.

Everything here is numpy and plain Python, picklable, and never padded: a batch is flat tokens plus offsets.
Shape letters: B sequences, N flat tokens.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from align_core.errors import DataError

FinishReason = Literal["stop", "length", "abort"]
Head = Literal["lm", "score"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Sequences of different lengths laid end to end, with columns beside them.

    Column names that trainers and losses understand:
        per token    `mask` bool, True where the token is a target of the loss; `logprobs`, `old_logprobs`,
                     `reference_logprobs` float32, log p(token | the tokens before it in its sequence), nats, 0 for
                     the first token of a sequence; `advantages`, `returns`, `old_values` float32, PPO's;
                     `sft_weight` float32, above 0 where a token is imitated beside the loss.
        per sequence `group` int64, the prompt id; losses over pairs keep a group in one micro-batch;
                     `label` float32, the score a reward model learns to rank by; `reward` float32, what a policy's
                     completion earned (advantages are computed from `reward` and `group` over the whole batch).
    """

    tokens: NDArray[np.int32]
    """int32 [N], the token ids of all sequences, end to end."""
    offsets: NDArray[np.int64]
    """int64 [B+1], sequence i is tokens[offsets[i]:offsets[i+1]]."""
    token_columns: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    """Per-token columns, each [N]."""
    sequence_columns: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    """Per-sequence columns, each [B]."""

    def __post_init__(self) -> None:
        offsets, tokens = self.offsets, self.tokens
        if offsets.ndim != 1 or len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(tokens):
            raise DataError(
                f"offsets must run from 0 to the {len(tokens)} tokens of the batch, got {offsets.tolist()[:8]}"
            )
        if np.any(np.diff(offsets) <= 0):
            raise DataError(
                f"sequence {int(np.argmin(np.diff(offsets)))} of the batch is empty; drop it before batching"
            )
        for name, column in self.token_columns.items():
            if len(column) != len(tokens):
                raise DataError(f"per-token column {name!r} has {len(column)} values for {len(tokens)} tokens")
        for name, column in self.sequence_columns.items():
            if len(column) != len(self):
                raise DataError(f"per-sequence column {name!r} has {len(column)} values for {len(self)} sequences")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 [B], tokens of each sequence."""
        return np.diff(self.offsets)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """bool [N], the `mask` column."""
        return self.token_column("mask").astype(np.bool_, copy=False)

    def token_column(self, name: str) -> NDArray[np.generic]:
        """The per-token column `name`; raises DataError that lists the columns there are."""
        if name not in self.token_columns:
            raise DataError(f"the batch has no per-token column {name!r}, only {sorted(self.token_columns)}")
        return self.token_columns[name]

    def sequence_column(self, name: str) -> NDArray[np.generic]:
        """The per-sequence column `name`; raises DataError that lists the columns there are."""
        if name not in self.sequence_columns:
            raise DataError(f"the batch has no per-sequence column {name!r}, only {sorted(self.sequence_columns)}")
        return self.sequence_columns[name]

    def with_columns(
        self,
        *,
        tokens: Mapping[str, NDArray[np.generic]] | None = None,
        sequences: Mapping[str, NDArray[np.generic]] | None = None,
    ) -> "Batch":
        """The same sequences with more (or replaced) columns."""
        return Batch(
            tokens=self.tokens,
            offsets=self.offsets,
            token_columns={**self.token_columns, **(tokens or {})},
            sequence_columns={**self.sequence_columns, **(sequences or {})},
        )

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> "Batch":
        """The sequences `indices`, in that order, with their columns."""
        rows = np.asarray(indices, dtype=np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise DataError(f"sequences {rows.min()} to {rows.max()} are asked of a batch of {len(self)}, from 0")
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        flat = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Batch(
            tokens=self.tokens[flat],
            offsets=offsets,
            token_columns={name: column[flat] for name, column in self.token_columns.items()},
            sequence_columns={name: column[rows] for name, column in self.sequence_columns.items()},
        )

    @staticmethod
    def of(
        sequences: Sequence[Sequence[int] | NDArray[np.int32]],
        *,
        tokens: Mapping[str, Sequence[NDArray[np.generic]]] | None = None,
        columns: Mapping[str, NDArray[np.generic]] | None = None,
    ) -> "Batch":
        """A batch from lists: `tokens[name]` holds one array a sequence, `columns[name]` one value a sequence."""
        arrays = [np.asarray(sequence, dtype=np.int32) for sequence in sequences]
        lengths = [len(array) for array in arrays]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        for name, parts in (tokens or {}).items():
            if [len(part) for part in parts] != lengths:
                raise DataError(f"per-token column {name!r} does not have one value a token of each sequence")
        return Batch(
            tokens=np.concatenate(arrays) if arrays else np.zeros(0, np.int32),
            offsets=offsets,
            token_columns={name: np.concatenate(list(parts)) for name, parts in (tokens or {}).items()},
            sequence_columns=dict(columns or {}),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One prompt as the engine sees it. The id, not the tokens, says which completions belong together."""

    id: int
    tokens: NDArray[np.int32]
    """int32 [L], L >= 1."""
    max_tokens: int | None = None
    """Most new tokens of this prompt's completions; none leaves it to `SamplingConfig.max_tokens`."""
    seed_id: int | None = None
    """What `sampling.seed` is mixed with instead of `id`, for a caller whose ids do not repeat with its prompts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """The newest tokens of a completion that is being sampled."""

    prompt_id: int
    sample: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of these tokens, nats."""
    version: int
    """Of the weights that sampled them."""
    finish_reason: "FinishReason | None"
    """Why it ended with them; None while it goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What the engine sampled for one prompt. A truncated completion carries no invented end-of-sequence token."""

    prompt_id: int
    sample: int
    """0 .. n-1 among the completions of its prompt."""
    tokens: NDArray[np.int32]
    """int32 [L], exactly the sampled ids, the end-of-sequence token included when it was sampled."""
    logprobs: NDArray[np.float32]
    """float32 [L], log-prob of each sampled token at temperature 1, nats, as the engine computed it."""
    finish_reason: FinishReason
    """`stop`: an end-of-sequence token, a stop token or a stop string; `length`; `abort`: cut short on request."""
    version: int
    """Version of the weights that sampled its first token, and unless `versions` says otherwise all of them."""
    versions: NDArray[np.int32] | None = None
    """int32 [L], version that sampled each token, ascending; only where the weights changed on the way."""

    @property
    def token_versions(self) -> NDArray[np.int32]:
        """int32 [L], version of the weights that sampled each token."""
        return np.full(len(self.tokens), self.version, np.int32) if self.versions is None else self.versions


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A reward function's answer for one completion: a value, or the reason why there is none (never a silent 0)."""

    value: float | None
    error: str = ""
    """Why scoring failed; empty when `value` is set."""
    extracted: str = ""
    """What the function read out of the completion, for people who check it."""

    def __post_init__(self) -> None:
        if (self.value is None) == (not self.error):
            raise DataError(f"a score has either a value or an error, got value={self.value!r}, error={self.error!r}")
        if self.value is not None and not math.isfinite(self.value):
            raise DataError(f"a score must be finite, got {self.value!r}; give an error where there is no value")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRequest:
    """A conversation that waits for its next turn, and how that turn is to be sampled."""

    messages: tuple[Mapping[str, str], ...]
    """`{"role", "content"}`, the last of them the user's."""
    max_tokens: int
    """Most new tokens."""
    temperature: float | None
    """0 is greedy; None leaves it to the server (some models accept no other)."""
    seed: int = 0
    """For servers that honour it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatReply:
    """The turn that came back."""

    text: str
    finish_reason: FinishReason
    """`length` when it was cut off at `max_tokens`."""
    model: str
    """The model as the server names it, with its date or revision where it has one."""
    prompt_tokens: int | None = None
    """As the server counted; None when it does not say."""
    completion_tokens: int | None = None
    """As the server counted, thoughts that are not shown included; None when it does not say."""
    lost_attempts: int = 0
    """Attempts before this one that ended without a usable reply but may have been charged (a timeout, say)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParamMeta:
    """Name (Hugging Face's), shape and dtype of one weight."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32", "bfloat16", "float16"]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * ITEM_BYTES[self.dtype]


ITEM_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightTensor:
    """One weight on its way to an engine: raw little-endian bytes in this process, or in a file that both sides map."""

    meta: ParamMeta
    checksum: int
    """`checksum()` of the tensor as its sender holds it; the receiver computes it again."""
    data: NDArray[np.uint8] | None = None
    """uint8 [nbytes], when sender and receiver share a process."""
    file: Path | None = None
    """The file (usually in shared memory) that holds the bytes, when they do not."""
    offset: int = 0
    """Where in `file` they start, bytes."""

    def bytes(self) -> NDArray[np.uint8]:
        """uint8 [nbytes]; a read-only view where it is mapped from a file."""
        if self.data is not None:
            return self.data
        if self.file is None:
            raise DataError(f"weight {self.meta.name!r} carries neither data nor a file")
        return np.memmap(self.file, dtype=np.uint8, mode="r", offset=self.offset, shape=(self.meta.nbytes,))


WeightChunk = Sequence[WeightTensor]


def shared_memory() -> Path | None:
    """The directory of files that live in memory, where there is one."""
    directory = Path("/dev/shm")
    return directory if directory.is_dir() else None


# Odd weights make every bit of every element count (a bit flip changes the sum by an odd multiple of a power of two);
# weights that grow with the position make a swap of two elements visible.
POSITION_STEP = 0x9E3779B97F4A7C14
POSITION_START = 0xD1B54A32D192ED03
_CHECKSUM_ROW = 4096  # elements a row of the table whose row and column sums make the checksum


def checksum(data: NDArray[np.uint8], *, item_bytes: int, start: int = 0) -> int:
    """Position-sensitive sum of a tensor's elements modulo 2^64; sums of disjoint parts add up to the whole's.

    It is the sum of (e + 1)(STEP p + START) over the elements e, as signed integers, at flat positions p. Laid out in
    rows, p = start + row + column, so sums over rows and columns of (e + 1) are enough, which numpy does at memory
    speed. `align_core.transfer.checksums` computes the same on the device.

    Args:
        data: uint8 [n * item_bytes], contiguous elements.
        item_bytes: 2 or 4, bytes an element.
        start: flat index, in the whole tensor, of the first element of `data`.
    """
    elements = np.ascontiguousarray(data).view({2: np.int16, 4: np.int32}[item_bytes])
    whole = len(elements) - len(elements) % _CHECKSUM_ROW
    table = elements[:whole].reshape(-1, _CHECKSUM_ROW)
    total = _table_checksum(table, start=start) if whole else 0
    if whole < len(elements):
        total += _table_checksum(elements[None, whole:], start=start + whole)
    return total % 2**64


def _table_checksum(table: NDArray[np.signedinteger], *, start: int) -> int:
    rows, columns = table.shape
    row_sums = (np.sum(table, axis=1, dtype=np.int64) + columns).view(np.uint64)
    column_sums = (np.sum(table, axis=0, dtype=np.int64) + rows).view(np.uint64)
    row_starts = np.arange(start, start + rows * columns, columns, dtype=np.uint64)
    column_weights = np.arange(columns, dtype=np.uint64) * np.uint64(POSITION_STEP) + np.uint64(POSITION_START)
    return int(np.sum(row_starts * np.uint64(POSITION_STEP) * row_sums)) + int(np.sum(column_weights * column_sums))


def chunked(weights: Iterator[WeightTensor], *, chunk_bytes: int) -> Iterator[list[WeightTensor]]:
    """Cuts a stream of weights into lists of at most `chunk_bytes` (at least one weight each)."""
    chunk: list[WeightTensor] = []
    size = 0
    for weight in weights:
        if chunk and size + weight.meta.nbytes > chunk_bytes:
            yield chunk
            chunk, size = [], 0
        chunk.append(weight)
        size += weight.meta.nbytes
    if chunk:
        yield chunk
