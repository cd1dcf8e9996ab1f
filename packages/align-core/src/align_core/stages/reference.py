"""The untrained model's log-probs: computed once and kept in a file, or in each step by a second, frozen model.

A file says of which tokens it is: those of a record or step may be others than when it was written, by a version of
ours, of the tokenizer's library or of its files that encodes, cuts or pairs otherwise.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from align_core.config import ReferenceConfig, TrainerConfig
from align_core.errors import CheckpointError
from align_core.stages.world import Model, World
from align_core.types import Batch

logger = logging.getLogger(__name__)

_AT_ONCE = 128  # sequences scored in one call; bounds the driver's memory, changes no result

_LOOKED_AT = 32  # keys whose tokens are compared when a file is taken up; all the others are in their steps

MakeBatch = Callable[[int], Batch]
"""The sequences of a key: of a record, or of a step."""


class Reference(Protocol):
    """Log-probs of the untrained model."""

    def logprobs(self, keys: Sequence[int], batch: Batch) -> NDArray[np.float32]:
        """float32 [N] of `batch`, which consists of the sequences of `keys` in turn."""
        ...


class FrozenReference:
    """A second model beside the trained one."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def logprobs(self, keys: Sequence[int], batch: Batch) -> NDArray[np.float32]:
        """See `Reference`; the keys do not matter."""
        del keys
        return self._model.logprobs(batch)


class StoredReference:
    """A file of log-probs by key, mapped rather than read: it may be larger than memory."""

    def __init__(self, path: Path, keys: Sequence[int]) -> None:
        """Args: `path`: from `store_reference`, for the same keys."""
        ends_K, marks_K = np.load(_index(path), allow_pickle=False)
        starts_K = np.concatenate([[0], ends_K[:-1]])
        self._path = path
        self._places = {key: slice(int(a), int(b)) for key, a, b in zip(keys, starts_K, ends_K, strict=True)}
        self._marks = dict(zip(keys, marks_K.tolist(), strict=True))
        self._values: NDArray[np.float32] = np.memmap(path, dtype=np.float32, mode="r")

    def logprobs(self, keys: Sequence[int], batch: Batch) -> NDArray[np.float32]:
        """See `Reference`; raises CheckpointError where `batch` has other tokens than those that were scored."""
        ends = np.cumsum([self._places[key].stop - self._places[key].start for key in keys])
        for key, tokens in zip(keys, np.split(batch.tokens, ends[:-1])):
            if _mark(tokens) != self._marks[key]:
                raise CheckpointError(
                    f"the reference in {str(self._path)!r} is of other tokens than training sees now (number {key}): "
                    "they are encoded, cut or paired otherwise; remove that file and run the same command again, which "
                    "computes it anew"
                )
        return np.concatenate([self._values[self._places[key]] for key in keys])


class References:
    """The reference of each data set of a stage, as `config.reference` asks: a file for each, or one frozen model."""

    def __init__(self, config: ReferenceConfig, world: World, model: Model) -> None:
        """Args: `model`: the one to be trained, still untrained."""
        self._config, self._model = config, model
        self._frozen: Reference | None = None
        if config.reference == "step":
            self._frozen = FrozenReference(world.trainer(TrainerConfig.of_stage(config, trainable=False)))

    def of(self, name: str, keys: Sequence[int], make_batch: MakeBatch) -> Reference:
        """For the data set `name`, of which `keys` will be asked for."""
        if self._frozen is not None:
            return self._frozen
        path = self._config.out / "checkpoints" / f"reference_{name}.f32"
        return store_reference(path, keys, make_batch, self._model)


def with_reference(reference: Reference | None, keys: Sequence[int], batch: Batch) -> Batch:
    """The batch with the column `reference_logprobs`; as it is for a loss without a reference."""
    if reference is None:
        return batch
    return batch.with_columns(tokens={"reference_logprobs": reference.logprobs(keys, batch)})


def store_reference(path: Path, keys: Sequence[int], make_batch: MakeBatch, model: Model) -> StoredReference:
    """The log-probs of all `keys` under `model`, which is untrained; a file of the same tokens that is there is taken.

    It is written before the first update, so a continued run reads what the untrained model said.
    """
    if path.exists() and not _is_of(path, keys, make_batch):
        logger.warning(
            "the reference in %s is of other tokens than training sees now, as an earlier version encoded or paired "
            "them: it is computed anew",
            path,
        )
        path.unlink()  # before its index is written: a crash between leaves no file that the index does not describe
    if not path.exists():
        logger.info("scoring %d keys with the reference", len(keys))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name("." + path.name)
        lengths: list[int] = []
        marks: list[int] = []
        with temporary.open("wb") as file:
            for batches in _several(make_batch(key) for key in keys):
                lengths += [len(batch.tokens) for batch in batches]
                marks += [_mark(batch.tokens) for batch in batches]
                logprobs = model.logprobs(_joined(batches))
                file.write(np.ascontiguousarray(logprobs, dtype=np.float32).tobytes())
        np.save(_index(path), np.asarray([np.cumsum(lengths), marks], dtype=np.int64))
        temporary.replace(path)
    return StoredReference(path, keys)


def _is_of(path: Path, keys: Sequence[int], make_batch: MakeBatch) -> bool:
    """Whether the file is of these keys, as far as some of them, evenly spaced, say."""
    if not _index(path).exists():
        return False  # written before tokens were remembered
    ends_K, marks_K = np.load(_index(path), allow_pickle=False)
    if len(ends_K) != len(keys) or path.stat().st_size != 4 * ends_K[-1]:
        return False
    looked_at = np.unique(np.linspace(0, len(keys) - 1, num=_LOOKED_AT).astype(int)).tolist()
    return all(_mark(make_batch(keys[i]).tokens) == marks_K[i] for i in looked_at)


def _mark(tokens: NDArray[np.int32]) -> int:
    """64 bits that other tokens do not have."""
    digest = hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _several(batches: Iterator[Batch]) -> Iterator[list[Batch]]:
    """As many as make up `_AT_ONCE` sequences."""
    held: list[Batch] = []
    for batch in batches:
        held.append(batch)
        if sum(map(len, held)) >= _AT_ONCE:
            yield held
            held = []
    if held:
        yield held


def _joined(batches: Sequence[Batch]) -> Batch:
    """The tokens of all of them, without columns."""
    lengths = np.concatenate([batch.lengths for batch in batches])
    return Batch(
        tokens=np.concatenate([batch.tokens for batch in batches]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def _index(path: Path) -> Path:
    """int64 [2, K]: for each key where its log-probs end, and the mark of its tokens."""
    return path.with_name(path.name + ".index.npy")
