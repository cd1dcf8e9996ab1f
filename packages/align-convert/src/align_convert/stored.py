"""What every reader is once it has found its tensors: Hugging Face names, and where in files their values lie.

Knows nothing about formats.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from align_convert.arrays import Held, Maps, covered, cut, matrix, spans
from align_convert.config import ModelConfig
from align_convert.errors import FormatError, PlanError
from align_convert.plan import Index


class StoredSource:
    """The weights of one directory; readers fill in where everything is."""

    format_name: str
    """As `inspect` shows it."""

    def __init__(self, root: Path, config: ModelConfig) -> None:
        """Nothing is held yet."""
        self.root = root
        self.config = config
        self.warnings: list[str] = []
        """What a user should know about the directory, though it can be read."""
        self._shapes: Mapping[str, tuple[int, ...]] = {}
        self._held: Mapping[str, Sequence[Held]] = {}
        self._maps = Maps()

    def held(self) -> Mapping[str, Sequence[Held]]:
        """Where the values of each Hugging Face tensor lie, every element once."""
        return self._held

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every tensor that can be read."""
        return {name: (shape, self._dtype_of(name)) for name, shape in self._shapes.items()}

    def read_hf(self, name: str, index: Index | None = None) -> torch.Tensor:
        """The values of a Hugging Face tensor, or of a rectangle of it, as stored.

        Raises:
            FormatError: there is no such tensor, or its file is damaged. PlanError: the rectangle is outside of it.
        """
        shape = self._shapes.get(name)
        if shape is None:
            raise FormatError(f"{str(self.root)!r} has no tensor {name!r}")
        index = index if index is not None else tuple((0, size) for size in shape)
        if len(index) != len(shape) or any(not 0 <= a <= b <= n for (a, b), n in zip(index, shape)):
            raise PlanError(f"index {index} does not fit tensor {name!r} of shape {shape}")
        rows, columns = spans(index)
        parts = [part for held in self._held[name] if (part := cut(held, rows, columns)) is not None]
        sizes = [stop - start for start, stop in index]
        if len(parts) == 1 and (parts[0].rows, parts[0].columns) == (rows, columns):
            return self._maps.read(parts[0]).reshape(sizes)
        result = torch.empty(matrix(sizes), dtype=self._dtype_of(name))
        for part in parts:
            (top, bottom), (left, right) = part.rows, part.columns
            place = result[top - rows[0] : bottom - rows[0], left - columns[0] : right - columns[0]]
            place.copy_(self._maps.read(part))
        return result.reshape(sizes)

    def check(self) -> None:
        """Refuse a tensor that is not whole, or whose parts are of several types.

        Raises:
            PlanError: naming it.
        """
        for name, shape in self._shapes.items():
            self._dtype_of(name)
            rows, columns = matrix(shape)
            if covered(self._held[name]) != rows * columns:
                raise PlanError(f"tensor {name!r} is not whole in {str(self.root)!r}")

    def _dtype_of(self, name: str) -> torch.dtype:
        found = {held.array.dtype for held in self._held[name]}
        if len(found) != 1:
            kinds = ", ".join(sorted(map(str, found))) or "no type"
            raise PlanError(f"tensor {name!r} is stored as {kinds} in {str(self.root)!r}; it must have one type")
        return next(iter(found))
