"""What goes wrong on one rank in a pass over the model, kept until all ranks meet, and then raised by all of them.

A rank that stopped where its error is would leave the others in a collective call until that times out. So it goes on,
with NaN in the place of what it could not compute, and the others hear of it where results are exchanged anyway. Knows
nothing about models and batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from align_algos.errors import InputError, NonFiniteError
from align_core.errors import AlignError
from align_core.megatron.parallel import RankContext


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a rank tells the others of its error."""

    text: str
    """Why it cannot be computed."""
    whole: AlignError | None = None
    """The error itself, if it needs no more words."""
    may_follow: bool = False
    """A number was not finite, perhaps because another rank, whose error it was, went on with NaN."""


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
        own = self._own
        if own is None:
            return None
        return Report(
            text=str(own) if isinstance(own, InputError) else f"{type(own).__name__}: {own}",
            whole=own if isinstance(own, AlignError) else None,
            may_follow=isinstance(own, NonFiniteError),
        )

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
        failed = [each for each in failed if not each[1].may_follow] or failed
        rank, first = failed[0]
        if first.whole is not None:
            raise first.whole
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        where = f" (on rank {rank}{others})" if self._ranks > 1 else ""
        raise AlignError(f"{self._what} cannot be computed: {first.text}{where}") from self._own
