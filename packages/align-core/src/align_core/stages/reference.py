"""The untrained model's log-probs: computed once and kept in a file, or in each step by a second, frozen model."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from align_core.config import ReferenceConfig, TrainerConfig
from align_core.stages.world import Model, World
from align_core.types import Batch

logger = logging.getLogger(__name__)

_AT_ONCE = 128  # sequences scored in one call; bounds the driver's memory, changes no result

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
        ends = np.load(_ends(path), allow_pickle=False)
        starts = np.concatenate([[0], ends[:-1]])
        self._places = {key: slice(int(a), int(b)) for key, a, b in zip(keys, starts, ends, strict=True)}
        self._values: NDArray[np.float32] = np.memmap(path, dtype=np.float32, mode="r")

    def logprobs(self, keys: Sequence[int], batch: Batch) -> NDArray[np.float32]:
        """See `Reference`."""
        del batch
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
    """The log-probs of all `keys` under `model`, which is untrained; a file that is there already is taken.

    It is written before the first update, so a continued run reads what the untrained model said.
    """
    if not path.exists():
        logger.info("scoring %d keys with the reference", len(keys))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name("." + path.name)
        lengths: list[int] = []
        with temporary.open("wb") as file:
            for batches in _several(make_batch(key) for key in keys):
                lengths += [len(batch.tokens) for batch in batches]
                logprobs = model.logprobs(_joined(batches))
                file.write(np.ascontiguousarray(logprobs, dtype=np.float32).tobytes())
        np.save(_ends(path), np.cumsum(lengths))
        temporary.replace(path)
    return StoredReference(path, keys)


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


def _ends(path: Path) -> Path:
    return path.with_name(path.name + ".ends.npy")
