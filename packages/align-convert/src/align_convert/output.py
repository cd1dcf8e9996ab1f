"""What a copy will write, known to the byte before it begins: the files, and where each tensor goes in them.

Made by the formats' planners, carried out by `transfer.py`. Knows nothing about any format.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from align_convert.arrays import Held, Padding


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputFile:
    """One weight file."""

    path: Path
    """Relative to the new directory."""
    size: int
    literals: tuple[tuple[int, bytes], ...]
    """(offset, bytes) of everything that is not weights."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights in the file."""
        return self.size - sum(len(data) for _, data in self.literals)


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """A directory to be written; weights and literals fill its files without a gap."""

    files: tuple[OutputFile, ...]
    targets: Mapping[str, Sequence[Held]]
    """By Hugging Face name: every place that holds a part of the tensor, replicas included; paths are relative."""
    paddings: tuple[Padding, ...]
    dtype: torch.dtype
    finish: Callable[[Path], None]
    """Writes the small files around the weights into the new directory, the one that makes it readable last."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights in all files."""
        return sum(file.weight_bytes for file in self.files)

    def small_files(self, root: Path) -> Iterator[Path]:
        """Paths, relative to `root`, of what `finish` has written there."""
        weights = {file.path for file in self.files}
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.relative_to(root) not in weights:
                yield path.relative_to(root)
