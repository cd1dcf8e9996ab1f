"""Read a Hugging Face directory: config.json, and weights in safetensors or PyTorch .bin files, one or several.

Only headers are read here; nothing is unpickled into objects. Every error names the file and the tensor.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from align_convert.arrays import Array, Held, dense
from align_convert.config import ModelConfig
from align_convert.dtypes import SAFETENSORS_NAMES, from_safetensors_name
from align_convert.errors import FormatError, PlanError
from align_convert.formats.pickles import StoredTensor, load_pickle
from align_convert.stored import StoredSource

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_MAX_NAMES = 4  # of the offending tensors in one message


class HfReader(StoredSource):
    """The tensors of one Hugging Face directory."""

    format_name = "huggingface"

    def __init__(self, directory: str | Path) -> None:
        """Open the directory: reads its config, its index and the headers of its files.

        Raises:
            ConfigError: config.json is missing or unsupported.
            FormatError: a weight file is missing, damaged, or not what the index says.
        """
        root = Path(directory)
        super().__init__(root, ModelConfig.from_hf(root))
        index, file_of = _find_files(root)
        arrays: dict[str, Array] = {}
        self._shapes = {}
        for file in sorted(set(file_of.values())):
            found = _read_safetensors(root / file) if file.endswith(".safetensors") else _read_bin(root / file)
            if index is not None:
                _check_listed(index, file, set(found), {name for name, owner in file_of.items() if owner == file})
            for name, (shape, array) in found.items():
                self._shapes[name] = shape
                arrays[name] = array
        self._held = {name: (_whole(array),) for name, array in arrays.items() if len(self._shapes[name]) < 3}

    read = StoredSource.read_hf

    def check(self) -> None:
        """Refuse missing tensors, tensors without a rule, wrong shapes, and tied copies that are not copies.

        Raises:
            PlanError: naming the tensors.
        """
        wanted = self.config.tensors()
        found = self._shapes
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
            if found[name] != shape:
                raise PlanError(f"tensor {name!r} has shape {found[name]}; config.json makes it {shape}")
        self._shapes = {name: found[name] for name in wanted}
        super().check()

    def _is_tied_alias(self, name: str) -> bool:
        """Whether `name` is the stored second copy of a tied embedding; refuses one that differs from the first."""
        alias = self.config.table.tied_alias
        if alias is None or name != alias[0] or not self.config.tied_embeddings:
            return False
        if not torch.equal(self.read_hf(alias[0]), self.read_hf(alias[1])):
            raise PlanError(
                f"config.json ties {alias[0]!r} to {alias[1]!r}, but the two differ in {str(self.root)!r}; "
                "set tie_word_embeddings to false to keep both"
            )
        return True


def _whole(array: Array) -> Held:
    return Held((0, array.rows), (0, array.columns), array, 0, 0)


def _find_files(directory: Path) -> tuple[Path | None, dict[str, str]]:
    """(the index, tensor -> file); without an index, the one file under an empty name. Safetensors come first."""
    for single, index in (_SAFETENSORS, _PICKLED):
        if (directory / index).exists():
            return directory / index, _read_index(directory / index)
        if (directory / single).exists():
            return None, {"": single}
    names = f"{_SAFETENSORS[0]!r} nor {_SAFETENSORS[1]!r}"
    raise FormatError(f"{str(directory)!r} has neither {names}, nor {_PICKLED[0]!r} or its index")


def _read_index(file: Path) -> dict[str, str]:
    """Tensor name -> file name; the files are there."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{str(file)!r} cannot be read as JSON: {error}") from error
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{str(file)!r} has no 'weight_map' from tensor names to file names")
    for name, owner in weight_map.items():
        if not isinstance(owner, str) or Path(owner).name != owner or "\0" in owner:
            raise FormatError(f"{str(file)!r} puts tensor {name!r} into {owner!r}, which is not a plain file name")
    absent = sorted({owner for owner in weight_map.values() if not (file.parent / owner).is_file()})
    if absent:
        raise FormatError(f"{str(file.parent)!r} lacks {len(absent)} file(s) that its index names: {_quoted(absent)}")
    return weight_map


def _check_listed(index: Path, file: str, stored: set[str], listed: set[str]) -> None:
    """The index and a file's own header must name the same tensors."""
    if stored != listed:
        odd = sorted(stored ^ listed)
        raise FormatError(f"{str(index)!r} and {file!r} disagree about {_counted(odd)}: {_quoted(odd)}")


def _read_safetensors(path: Path) -> dict[str, tuple[tuple[int, ...], Array]]:
    """Name -> (shape, place). The library checks the header against the file; the offsets are then read from it."""
    try:
        with safe_open(str(path), framework="np"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        result = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            shape = tuple(int(size) for size in entry["shape"])
            dtype = from_safetensors_name(entry["dtype"], where=f"tensor {name!r} in {str(path)!r}")
            flat = shape if 0 < len(shape) < 3 else (0,)
            result[name] = (shape, dense(path, 8 + length + int(entry["data_offsets"][0]), flat, dtype))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(f"{str(path)!r} is not a whole safetensors file: {error}") from error
    return result


def _read_bin(path: Path) -> dict[str, tuple[tuple[int, ...], Array]]:
    result = {}
    for name, value in load_pickle(path).items():
        if not isinstance(value, StoredTensor):
            raise FormatError(f"{str(path)!r} holds {name!r}, which is not a tensor")
        if value.dtype not in SAFETENSORS_NAMES:
            raise FormatError(f"tensor {name!r} in {str(path)!r} is {value.dtype}; weights have 16 or 32 bits")
        result[str(name)] = (value.shape, value.array(str(name)))
    return result


def _counted(names: list[str]) -> str:
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}"


def _quoted(names: list[str]) -> str:
    """The first few names, quoted and sorted."""
    more = ", ..." if len(names) > _MAX_NAMES else ""
    return ", ".join(repr(name) for name in sorted(names)[:_MAX_NAMES]) + more
