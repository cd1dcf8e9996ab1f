"""One weight update on its way in: what was announced, what has come, and whether every byte is what was sent.

Used by the sinks of all engines; knows neither torch nor vLLM. The checks are the whole point: a weight that is
missing, misnamed, misshapen or damaged is refused and named before any of it can answer a request.
"""

from collections.abc import Sequence

from align_core.errors import SyncError
from align_core.types import ITEM_BYTES, ParamMeta, WeightChunk, WeightTensor, checksum

_LISTED = 8  # names in one error; a wrong model has hundreds


class PendingUpdate:
    """The checks between `begin` and `commit` of one version."""

    def __init__(self, *, expected: Sequence[ParamMeta], announced: Sequence[ParamMeta], version: int) -> None:
        """Compares the announcement with the model's own weights; raises SyncError that names every difference.

        Args:
            expected: the weights of the engine's model. Their dtype may differ from the announced: engines convert.
            announced: what the sender is about to send.
        """
        self.version = version
        self._announced = {meta.name: meta for meta in announced}
        self._arrived: set[str] = set()
        _check_announcement({meta.name: meta for meta in expected}, announced)

    @property
    def dtypes(self) -> frozenset[str]:
        """In which the weights come."""
        return frozenset(meta.dtype for meta in self._announced.values())

    def check(self, chunk: WeightChunk) -> None:
        """Raises SyncError if a weight was not announced so, came before, or its checksum differs; records nothing."""
        names: set[str] = set()
        for weight in chunk:
            name = weight.meta.name
            if name in self._arrived or name in names:
                raise SyncError(f"weight {name!r} of version {self.version} came twice")
            names.add(name)
            self._check_weight(weight)

    def record(self, chunk: WeightChunk) -> None:
        """Counts `chunk` as here: after it was checked, and only when the engine has taken hold of it."""
        self._arrived.update(weight.meta.name for weight in chunk)

    def record_all(self) -> None:
        """Counts everything announced as here: what is fetched comes whole, or the fetching fails."""
        self._arrived.update(self._announced)

    def _check_weight(self, weight: WeightTensor) -> None:
        meta = weight.meta
        announced = self._announced.get(meta.name)
        if announced is None:
            raise SyncError(f"weight {meta.name!r} of version {self.version} was not announced")
        if announced != meta:
            raise SyncError(
                f"weight {meta.name!r} came as {meta.dtype} {list(meta.shape)}, "
                f"but was announced as {announced.dtype} {list(announced.shape)}"
            )
        data = weight.bytes()
        if data.nbytes != meta.nbytes:
            raise SyncError(f"weight {meta.name!r} came with {data.nbytes} bytes; its shape needs {meta.nbytes}")
        found = checksum(data, item_bytes=ITEM_BYTES[meta.dtype])
        if found != weight.checksum:
            raise SyncError(
                f"weight {meta.name!r} of version {self.version} was damaged on its way: checksum {found:#018x} here, "
                f"{weight.checksum:#018x} at the sender; the engine keeps its old weights"
            )

    def check_complete(self) -> None:
        """Raises SyncError naming the announced weights that never came."""
        missing = self._announced.keys() - self._arrived
        if missing:
            raise SyncError(
                f"{len(missing)} of {len(self._announced)} weights of version {self.version} never came: "
                f"{_some(missing)}; the engine keeps its old weights"
            )


def check_version(*, version: int, current: int) -> None:
    """Raises SyncError if `version` is older than the engine's; the same one may be sent again, after a retry."""
    if version < current:
        raise SyncError(f"weight version {version} is older than version {current}, which the engine holds")


def _check_announcement(expected: dict[str, ParamMeta], announced: Sequence[ParamMeta]) -> None:
    names = [meta.name for meta in announced]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise SyncError(f"weights announced twice: {_some(twice)}")
    problems = []
    if missing := expected.keys() - set(names):
        problems.append(f"{len(missing)} weights of the engine's model are not announced: {_some(missing)}")
    if unknown := set(names) - expected.keys():
        problems.append(f"{len(unknown)} announced weights are not in the engine's model: {_some(unknown)}")
    for meta in announced:
        if meta.name in expected and expected[meta.name].shape != meta.shape:
            problems.append(
                f"weight {meta.name!r} is announced as {list(meta.shape)}, but the engine's model has "
                f"{list(expected[meta.name].shape)}"
            )
    if problems:
        raise SyncError("; ".join(problems[:_LISTED]))


def _some(names: set[str]) -> str:
    listed = ", ".join(repr(name) for name in sorted(names)[:_LISTED])
    return listed if len(names) <= _LISTED else f"{listed} and {len(names) - _LISTED} more"
