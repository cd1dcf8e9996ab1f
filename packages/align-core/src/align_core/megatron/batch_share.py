"""A rank's part of a batch, and one result out of the parts of all ranks.

Every rank is handed the same whole batch and must return the same result; in between it computes its own micro-batches.
Knows nothing about models and losses.

Legend: B sequences, N tokens of the whole batch.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from align_convert.config import ModelConfig
from align_core.errors import DataError
from align_core.megatron.agreement import Agreement, Report
from align_core.megatron.microbatch import MicroBatch, pack
from align_core.megatron.packing import Unit, cut
from align_core.megatron.parallel import RankContext
from align_core.types import Batch


class BatchShare:
    """What this rank computes of a batch."""

    def __init__(self, model: ModelConfig, context: RankContext, *, budget: int) -> None:
        """`budget` is the most tokens in one micro-batch."""
        self._model, self._context, self._budget = model, context, budget

    def micros(self, batch: Batch, *, unit: Unit) -> list[MicroBatch]:
        """The micro-batches of this data-parallel rank.

        Raises:
            DataError: no sequence, or one that the model cannot take.
        """
        check_batch(batch, self._model)
        parallel = self._context.parallel
        interleaved = parallel.virtual > 1
        own = cut(
            batch,
            unit=unit,
            budget=self._budget,
            ranks=parallel.data,
            multiple=parallel.pipeline if interleaved else 1,
        )[self._context.data]
        # Interleaved stages do not tell each other lengths.
        least = max(int(batch.lengths[indices].sum()) for indices in own) if interleaved else 1
        return [
            pack(
                batch,
                indices,
                multiple=parallel.tensor * (2 * parallel.context if parallel.context > 1 else 1),
                least=least,
                device=self._context.device,
                share=(self._context.context, parallel.context),
            )
            for indices in own
        ]

    def tokens(
        self, batch: Batch, micros: Sequence[MicroBatch], found: Sequence[Tensor], agreement: Agreement
    ) -> NDArray[np.float32]:
        """float32 [N], what all ranks found at each token; `found` is this rank's, by micro-batch.

        Raises:
            AlignError: on every rank, if one has kept an error or found a value that is not finite.
        """
        result = np.zeros(len(batch.tokens), np.float32)
        for micro, values in zip(micros, (values.cpu() for values in found)):
            if error := micro.not_finite(values):
                agreement.keep(error)
            for row, part in zip(micro.indices.tolist(), np.split(values.numpy(), micro.batch.offsets[1:-1])):
                if len(part):
                    result[batch.offsets[row] : batch.offsets[row + 1]] = part
        joined, failed = self._joined(result, failed=agreement.failed)
        if failed:
            agreement.settle()
        return joined

    def sequences(self, batch: Batch, micros: Sequence[MicroBatch], found: Sequence[Tensor]) -> NDArray[np.float32]:
        """float32 [B], what all ranks found of each sequence, finite or not."""
        result = np.zeros(len(batch), np.float32)
        for micro, values in zip(micros, found):
            result[micro.indices] = values.cpu().numpy()
        return self._joined(result)[0]

    def summed(self, parts: list[dict[str, Tensor]], agreement: Agreement) -> dict[str, float]:
        """Metrics of all micro-batches and copies, key by key.

        Raises:
            AlignError: on every rank, if one has kept an error; see `Agreement.conclude`.
        """
        own = _totals(parts) if self._context.speaks else {}
        everyone: list[tuple[dict[str, float], Report | None]] = [(own, agreement.report())]
        if self._context.parallel.world_size > 1:
            everyone *= self._context.parallel.world_size
            dist.all_gather_object(everyone, (own, agreement.report()))
        agreement.conclude([report for _, report in everyone])
        totals: dict[str, float] = {}
        for each, _ in everyone:
            for name, number in each.items():
                totals[name] = totals.get(name, 0.0) + number
        return totals

    def _joined(self, part: NDArray[np.float32], *, failed: bool = False) -> tuple[NDArray[np.float32], bool]:
        """The sum over ranks of what each copy's speaker computed, zeros elsewhere, and whether any rank has failed."""
        if self._context.parallel.world_size == 1:
            return part, failed
        own = part if self._context.speaks else np.zeros_like(part)
        total = torch.from_numpy(np.append(own, np.float32(failed)))
        dist.all_reduce(total)
        return total[:-1].numpy(), bool(total[-1] > 0)


def check_batch(batch: Batch, model: ModelConfig) -> None:
    """Raises DataError if the batch is empty, or holds a sequence or token that the model does not know."""
    if len(batch) == 0:
        raise DataError("the batch is empty; give at least one sequence")
    longest, limit = int(batch.lengths.max()), model.max_positions
    if longest > limit:
        raise DataError(
            f"sequence {int(batch.lengths.argmax())} has {longest} tokens; the model has {limit} positions: "
            f"set max_length to at most {limit}"
        )
    low, high = int(batch.tokens.min()), int(batch.tokens.max())
    if low < 0 or high >= model.vocab_size:
        raise DataError(
            f"token ids reach from {low} to {high}; the model knows 0 to {model.vocab_size - 1}: "
            "use the tokenizer that belongs to the model"
        )


def _totals(parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """Sums over micro-batches, with one copy from the device."""
    values = [(name, value) for part in parts for name, value in part.items()]
    numbers = torch.stack([value.detach().double() for _, value in values]).tolist() if values else []
    totals: dict[str, float] = {}
    for (name, _), number in zip(values, numbers):
        totals[name] = totals.get(name, 0.0) + number
    return totals
