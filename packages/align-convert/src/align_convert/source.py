"""One way to read weights, whatever holds them: Hugging Face names and slices out of any supported directory.

`load_any` looks at what is in a directory and opens it; training uses it to load either format under any layout.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from align_convert.arrays import Held
from align_convert.config import ModelConfig
from align_convert.errors import FormatError
from align_convert.formats.dist_reader import DistReader
from align_convert.formats.hf_reader import HfReader
from align_convert.formats.megatron_files import is_dist_directory, is_megatron_directory
from align_convert.formats.megatron_reader import MegatronReader
from align_convert.plan import Index


class Source(Protocol):
    """A model's weights under their Hugging Face names."""

    @property
    def config(self) -> ModelConfig:
        """The model's description."""

    @property
    def root(self) -> Path:
        """The directory with the files that travel with the weights."""

    @property
    def format_name(self) -> str:
        """What the directory is, in a word or two."""

    @property
    def warnings(self) -> list[str]:
        """What a user should know about the directory, though it can be read."""

    def held(self) -> Mapping[str, Sequence[Held]]:
        """Where the values of each Hugging Face tensor lie, every element once."""

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every tensor, by Hugging Face name."""

    def check(self) -> None:
        """Refuse a source that does not hold exactly the tensors that its config calls for."""

    def read_hf(self, name: str, index: Index | None = None) -> torch.Tensor:
        """The values of a tensor, or of a rectangle of it."""


_hf_conforms: type[Source] = HfReader
_megatron_conforms: type[Source] = MegatronReader
_dist_conforms: type[Source] = DistReader


def load_any(directory: str | Path) -> Source:
    """Open a Hugging Face directory or a Megatron one (its root or one of its iterations).

    Raises:
        FormatError: it is neither.
    """
    path = Path(directory)
    if not path.is_dir():
        raise FormatError(f"{str(path)!r} is not a directory")
    if is_dist_directory(path):
        return DistReader(path)
    if is_megatron_directory(path):
        return MegatronReader(path)
    if (path / "config.json").exists():
        return HfReader(path)
    raise FormatError(
        f"{str(path)!r} is neither a Hugging Face directory (config.json and *.safetensors) "
        "nor a Megatron one (latest_checkpointed_iteration.txt, mp_rank_* folders or .metadata)"
    )
