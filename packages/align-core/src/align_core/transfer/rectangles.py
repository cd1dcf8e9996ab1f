"""Who holds which part of which weight, as rectangles; and where two holders' parts meet. Pure Python, no torch.

Weights are named and shaped as Hugging Face does. An index is one (start, stop) pair a dimension.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from align_core.errors import LayoutError, SyncError

Index = tuple[tuple[int, int], ...]
_LISTED = 8  # names in one error; a wrong model has hundreds


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Rectangle `index` of the weight `name` is rectangle `local` of a process's own tensor `tensor`."""

    name: str
    shape: tuple[int, ...]
    """Of the whole weight."""
    index: Index
    tensor: str
    local: Index
    primary: bool = True
    """True with exactly one holder for every element; others hold copies of it."""


SAMPLED_ROWS = 16
"""Sampling reads one row in so many, another one each version; a weight with one dimension is read whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Which rows of each weight are summed: those with r % step == first."""

    first: int = 0
    step: int = 1

    @staticmethod
    def sampled(version: int) -> "Rows":
        """The sample of one weight version."""
        return Rows(first=version % SAMPLED_ROWS, step=SAMPLED_ROWS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulled:
    """What one engine says after it has fetched weights."""

    sums: Sequence[Mapping[str, int]]
    """Of each rank, the checksums of what it now holds of each weight; empty where none were asked for."""
    seconds: Mapping[str, float]
    """Of the slowest rank: `open` the trainer's memory, `copy`, `sum`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """`source` of the tensor `source_tensor` at holder `rank` goes to `target` of the tensor `target_tensor` here."""

    name: str
    rank: int
    source_tensor: str
    source: Index
    target_tensor: str
    target: Index

    @property
    def elements(self) -> int:
        """How many elements move."""
        return size_of(self.target)


def size_of(index: Index) -> int:
    """Elements in a rectangle."""
    count = 1
    for start, stop in index:
        count *= stop - start
    return count


def slices(index: Index) -> tuple[slice, ...]:
    """An index as tensors take it."""
    return tuple(slice(start, stop) for start, stop in index)


def whole(shape: Sequence[int]) -> Index:
    """The rectangle that is everything."""
    return tuple((0, size) for size in shape)


def intersection(one: Index, other: Index) -> Index | None:
    """What two rectangles share, or None."""
    shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return shared if all(start < stop for start, stop in shared) else None


def within(index: Index, part: Part) -> Index:
    """Where a sub-rectangle of `part.index` lies in the holder's tensor."""
    return tuple(
        (start - outer + inner, stop - outer + inner)
        for (start, stop), (outer, _), (inner, _) in zip(index, part.index, part.local, strict=True)
    )


def copies(held: Sequence[Sequence[Part]], wanted: Sequence[Part]) -> list[Copy]:
    """How one process fills its `wanted` parts from what each rank of the other side holds.

    Only primary parts are read, so every element comes once, from one rank.

    Args:
        held: the parts of each rank of the sender.
    Raises:
        LayoutError: names the weights of which some element has no holder.
    """
    by_name: Mapping[str, list[tuple[int, Part]]] = defaultdict(list)
    for rank, parts in enumerate(held):
        for part in parts:
            if part.primary:
                by_name[part.name].append((rank, part))
    found: list[Copy] = []
    for part in wanted:
        filled = 0
        for rank, source in by_name.get(part.name, ()):
            shared = intersection(source.index, part.index)
            if shared is None:
                continue
            copy = Copy(
                name=part.name,
                rank=rank,
                source_tensor=source.tensor,
                source=within(shared, source),
                target_tensor=part.tensor,
                target=within(shared, part),
            )
            found.append(copy)
            filled += copy.elements
        if filled != size_of(part.index):
            raise LayoutError(
                f"the sender holds {filled} of the {size_of(part.index)} elements of weight {part.name!r} at "
                f"{list(part.index)}; its layout and the engine's describe different models"
            )
    return found


def check_sums(
    sent: Sequence[Mapping[str, int]],
    held: Sequence[Mapping[str, int]],
    layout: Sequence[Sequence[Part]],
    *,
    version: int,
) -> None:
    """Compares what a trainer sent with what an engine now holds, weight by weight.

    Args:
        sent: of each rank of the trainer, the checksums of its primary parts.
        held: of each rank of the engine, the checksums of all its parts.
        layout: what each rank of the engine holds.
    Raises:
        SyncError: names the weights that differ, or of which two ranks of the engine hold different copies.
    """
    wrong: list[str] = []
    for name in sorted({name for sums in sent for name in sums}):
        copies_of: dict[tuple[Index, ...], set[int]] = defaultdict(set)
        for sums, parts in zip(held, layout, strict=True):
            indices = tuple(sorted(part.index for part in parts if part.name == name))
            if indices:
                copies_of[indices].add(sums[name])
        expected = sum(sums.get(name, 0) for sums in sent) % 2**64
        found = sum(next(iter(sums)) for sums in copies_of.values()) % 2**64
        if any(len(sums) > 1 for sums in copies_of.values()):
            wrong.append(f"{name!r} (ranks of the engine hold different copies)")
        elif found != expected:
            wrong.append(f"{name!r} (checksum {found:#018x} in the engine, {expected:#018x} in the trainer)")
    if wrong:
        raise SyncError(
            f"{len(wrong)} weights of version {version} are not in the engine what they are in the trainer: "
            f"{', '.join(wrong[:_LISTED])}{', ...' if len(wrong) > _LISTED else ''}; start a new engine"
        )
