"""Read a Hugging Face directory: config.json and safetensors files, one or several under an index.

Slices are read without loading whole tensors; nothing is unpickled. Every error names the file and the tensor.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from align_convert.config import ModelConfig
from align_convert.dtypes import from_safetensors_name
from align_convert.errors import FormatError, PlanError
from align_convert.fill import slices
from align_convert.plan import Index

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_NAMES = 4  # of the offending tensors in one message


class HfReader:
    """The tensors of one Hugging Face directory."""

    def __init__(self, directory: str | Path) -> None:
        """Open the directory: reads its config, its index and the headers of its files.

        Raises:
            ConfigError: config.json is missing or unsupported.
            FormatError: a weight file is missing, damaged, or not what the index says.
        """
        self.root = Path(directory)
        self.config = ModelConfig.from_hf(self.root)
        self._file_of: dict[str, str] = _read_index(self.root)
        files = sorted(set(self._file_of.values())) or [_SINGLE]
        self._handles = {file: _open(self.root / file) for file in files}
        if self._file_of:
            self._check_index()
        else:
            self._file_of = dict.fromkeys(self._handles[_SINGLE].keys(), _SINGLE)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every stored tensor."""
        result = {}
        for name in self._file_of:
            view = self._slice(name)
            where = f"tensor {name!r} in {str(self.root / self._file_of[name])!r}"
            result[name] = (tuple(view.get_shape()), from_safetensors_name(view.get_dtype(), where=where))
        return result

    def read(self, name: str, index: Index | None = None) -> torch.Tensor:
        """The values of a tensor, or of a rectangle of it, as stored.

        Raises:
            FormatError: there is no such tensor, or its file is damaged.
        """
        view = self._slice(name)
        shape = tuple(view.get_shape())
        index = index if index is not None else tuple((0, size) for size in shape)
        if len(index) != len(shape) or any(not 0 <= a <= b <= n for (a, b), n in zip(index, shape)):
            raise PlanError(f"index {index} does not fit tensor {name!r} of shape {shape}")
        try:
            value: torch.Tensor = view[slices(index)]
        except SafetensorError as error:
            where = str(self.root / self._file_of[name])
            raise FormatError(f"tensor {name!r} in {where!r} cannot be read: {error}") from error
        return value

    read_hf = read

    def check(self) -> None:
        """Refuse missing tensors, tensors without a rule, wrong shapes, and tied copies that are not copies.

        Raises:
            PlanError: naming the tensors.
        """
        wanted = self.config.tensors()
        found = self.tensors()
        missing = [name for name in wanted if name not in found]
        if missing:
            hint = (
                "; if the embedding is the head, set tie_word_embeddings to true" if "lm_head.weight" in missing else ""
            )
            verb = "is" if len(missing) == 1 else "are"
            raise PlanError(f"{_counted(missing)} {verb} missing in {str(self.root)!r}: {_quoted(missing)}{hint}")
        derived = [re.compile(pattern) for pattern in self.config.table.derived]
        extra = [name for name in found if name not in wanted and not any(p.fullmatch(name) for p in derived)]
        extra = [name for name in extra if not self._is_tied_alias(name)]
        if extra:
            file = f"align_convert/families/{self.config.family}.py"
            verb = "has" if len(extra) == 1 else "have"
            raise PlanError(f"{_counted(extra)} of the checkpoint {verb} no rule: {_quoted(extra)} (add one in {file})")
        for name, shape in wanted.items():
            if found[name][0] != shape:
                raise PlanError(f"tensor {name!r} has shape {found[name][0]}; config.json makes it {shape}")

    def _is_tied_alias(self, name: str) -> bool:
        """Whether `name` is the stored second copy of a tied embedding; refuses one that differs from the first."""
        alias = self.config.table.tied_alias
        if alias is None or name != alias[0] or not self.config.tied_embeddings:
            return False
        if not torch.equal(self.read(alias[0]), self.read(alias[1])):
            raise PlanError(
                f"config.json ties {alias[0]!r} to {alias[1]!r}, but the two differ in {str(self.root)!r}; "
                "set tie_word_embeddings to false to keep both"
            )
        return True

    def _slice(self, name: str) -> Any:
        file = self._file_of.get(name)
        if file is None:
            raise FormatError(f"{str(self.root)!r} has no tensor {name!r}")
        return self._handles[file].get_slice(name)

    def _check_index(self) -> None:
        """The index and the files' own headers must name the same tensors."""
        for file, handle in self._handles.items():
            stored = set(handle.keys())
            listed = {name for name, owner in self._file_of.items() if owner == file}
            if stored != listed:
                odd = sorted(stored ^ listed)
                raise FormatError(
                    f"{str(self.root / _INDEX)!r} and {file!r} disagree about {_counted(odd)}: {_quoted(odd)}"
                )


def _read_index(directory: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index; empty where there is only `model.safetensors`."""
    file = directory / _INDEX
    if not file.exists():
        if (directory / _SINGLE).exists():
            return {}
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        remedy = f"; convert {pickled[0]!r} with transformers' save_pretrained first" if pickled else ""
        raise FormatError(f"{str(directory)!r} has neither {_SINGLE!r} nor {_INDEX!r}{remedy}")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{str(file)!r} cannot be read as JSON: {error}") from error
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{str(file)!r} has no 'weight_map' from tensor names to file names")
    for name, owner in weight_map.items():
        if not isinstance(owner, str) or Path(owner).name != owner:
            raise FormatError(f"{str(file)!r} puts tensor {name!r} into {owner!r}, which is not a plain file name")
    absent = sorted({owner for owner in weight_map.values() if not (directory / owner).is_file()})
    if absent:
        raise FormatError(f"{str(directory)!r} lacks {len(absent)} file(s) that its index names: {_quoted(absent)}")
    return weight_map


def _open(path: Path) -> Any:
    """Map a safetensors file; its header and length are checked here."""
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{str(path)!r} is not a whole safetensors file: {error}") from error


def _counted(names: list[str]) -> str:
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}"


def _quoted(names: list[str]) -> str:
    """The first few names, quoted and sorted."""
    more = ", ..." if len(names) > _MAX_NAMES else ""
    return ", ".join(repr(name) for name in sorted(names)[:_MAX_NAMES]) + more
