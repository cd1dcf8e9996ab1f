"""What the stages that learn from a file begin with: their data, opened and encoded, and the run's directory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from align_core.config import OfflineConfig
from align_core.data.dataset import Dataset, Order, each_encoded
from align_core.data.examples import Example
from align_core.data.files import DataFiles
from align_core.data.tally import Tally, tally
from align_core.stages.directory import Fingerprinted
from align_core.stages.run import Run

Record = TypeVar("Record")
Encoded = TypeVar("Encoded")


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineData(Generic[Record, Encoded]):
    """Training and held-out records, and what they are as tokens."""

    records: Dataset[Record]
    held_out: Dataset[Record] | None
    order: Order
    """Which records a step sees."""
    encode: Callable[[Record], Encoded]
    tally: Tally
    """What encoding `records` came to."""
    held_out_tally: Tally | None

    @property
    def data(self) -> dict[str, Fingerprinted]:
        """What a continued run must find again."""
        found: dict[str, Fingerprinted] = {"data": self.records}
        return found | ({"eval_data": self.held_out} if self.held_out else {})

    def run(self, config: OfflineConfig) -> Run:
        """The run's directory; raises what `Run` raises, for instance when the data is not what the run began with."""
        return Run(config, data=self.data)


def open_data(
    config: OfflineConfig,
    read: Callable[[DataFiles], Dataset[Record]],
    encode: Callable[[Record], Encoded],
    sequences: Callable[[Encoded], Sequence[Example]],
) -> OfflineData[Record, Encoded]:
    """Open `config.data` and `config.eval_data`, and encode their first records, before anything starts.

    Args:
        sequences: those of an encoded record, to be counted.

    Raises:
        DataError: a missing file, a bad line, a record that the template refuses, or fewer records than a batch.
    """
    records = read(config.data)
    held_out = read(config.eval_data) if config.eval_data else None
    order = records.order(batch_size=config.batch_size, seed=config.seed)

    def counted(part: Dataset[Record]) -> Tally:
        return tally(map(sequences, each_encoded(part, encode)), whole=len(part))

    return OfflineData(
        records=records,
        held_out=held_out,
        order=order,
        encode=encode,
        tally=counted(records),
        held_out_tally=counted(held_out) if held_out is not None else None,
    )
