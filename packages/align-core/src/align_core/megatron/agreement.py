"""What goes wrong on one rank in a pass over the model, kept until all ranks meet, and then raised by all of them.

A rank that stopped where its error is would leave the others in a collective call until that times out. So it goes on,
with NaN in the place of what it could not compute, and the others hear of it where results are exchanged anyway. Knows
nothing about models and batches.
"""

from collections.abc import Sequence

import torch.distributed as dist

from align_algos.errors import InputError
from align_core.errors import AlignError
from align_core.megatron.parallel import RankContext

Report = str | AlignError
"""What the others are told: why it cannot be computed, or an error that says all."""


class Agreement:
    """The outcome of one pass, on one rank."""

    def __init__(self, what: str, context: RankContext) -> None:
        """`what` is computed, in the words of an error: `log-probs`, `step 3: SftLoss`."""
        self._what, self._ranks = what, context.parallel.world_size
        self._own: Exception | None = None

    def keep(self, error: Exception) -> None:
        """Remember an error of this rank; the first one counts, as those after it may come of it."""
        if self._own is None:
            self._own = error

    @property
    def failed(self) -> bool:
        """Whether this rank has kept an error."""
        return self._own is not None

    def report(self) -> Report | None:
        """What to tell the other ranks; None if all went well here."""
        if self._own is None or isinstance(self._own, AlignError):
            return self._own
        return str(self._own) if isinstance(self._own, InputError) else f"{type(self._own).__name__}: {self._own}"

    def settle(self) -> None:
        """Raise what a rank kept; if there are several ranks, all call it, or none."""
        reports: list[Report | None] = [self.report()]
        if self._ranks > 1:
            reports = [None] * self._ranks
            dist.all_gather_object(reports, self.report())
        self.conclude(reports)

    def conclude(self, reports: Sequence[Report | None]) -> None:
        """As `settle`, from the reports of all ranks; without any it does nothing.

        Raises:
            AlignError: a value that a formula refuses, or an error of another rank; the same on every rank.
            Exception: this rank's own error, where that is neither, with its traceback.
        """
        failed = [(rank, report) for rank, report in enumerate(reports) if report is not None]
        if not failed:
            return
        if self._own is not None and not isinstance(self._own, InputError):
            raise self._own
        rank, first = failed[0]
        if isinstance(first, AlignError):
            raise first
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        where = f" (on rank {rank}{others})" if self._ranks > 1 else ""
        raise AlignError(f"{self._what} cannot be computed: {first}{where}") from self._own
