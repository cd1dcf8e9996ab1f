"""What the stages that learn from a file begin with: their data, opened and checked, and the run's directory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from align_core.config import OfflineConfig
from align_core.data.dataset import Dataset, Order, check_each
from align_core.data.files import DataFiles
from align_core.stages.run import Run

Record = TypeVar("Record")


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineData(Generic[Record]):
    """Training and held-out records."""

    records: Dataset[Record]
    held_out: Dataset[Record] | None
    order: Order
    """Which records a step sees."""

    def run(self, config: OfflineConfig) -> Run:
        """The run's directory; raises what `Run` raises, for instance when the data is not what the run began with."""
        return Run(config, data={"data": self.records} | ({"eval_data": self.held_out} if self.held_out else {}))


def open_data(
    config: OfflineConfig, read: Callable[[DataFiles], Dataset[Record]], encode: Callable[[Record], object]
) -> OfflineData[Record]:
    """Open `config.data` and `config.eval_data`, and encode their first records, before anything starts.

    Raises:
        DataError: a missing file, a bad line, a record that the template refuses, or fewer records than a batch.
    """
    records = read(config.data)
    held_out = read(config.eval_data) if config.eval_data else None
    order = records.order(batch_size=config.batch_size, seed=config.seed)
    for part in (records, held_out):
        if part is not None:
            check_each(part, encode)
    return OfflineData(records=records, held_out=held_out, order=order)
