"""Open a `torch.save` file of unknown origin without executing anything in it, and without reading its tensors.

The pickle inside is walked by the interpreter's own unpickler in Python, whose every way to a name goes through one
method: it gives out plain containers and inert stand-ins, never a function of a library. What a file names beyond
Megatron's and torch's own bookkeeping is refused by name. A tensor becomes a `StoredTensor`: where its bytes lie.
"""

import argparse
import io
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from align_convert.arrays import Array, matrix
from align_convert.errors import FormatError
from align_convert.formats.torch_zip import Directory

# Bookkeeping objects (enums, optimizer and RNG state, torch's descriptions of shards): shown, never run.
_INERT_MODULES = (
    "megatron.",
    "numpy.",
    "signal.",
    "transformer_engine.",
    "types.SimpleNamespace",
    "pathlib.",
    "_io.BytesIO",
    "_codecs.encode",
    "torch.distributed.checkpoint.",
    "torch.serialization._get_layout",
    "torch.device",
    "collections.defaultdict",
    "builtins.set",
    "builtins.dict",
    "builtins.list",
    "builtins.int",
)
_STORAGE_TYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# What unpickling raises on damaged files, depending on which byte is wrong.
_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    RecursionError,
    ImportError,
    struct.error,
)
_MAX_PICKLE = 1 << 30  # bytes; a checkpoint's own is a few MB, and a forged size must not be read into memory


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, not read."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements."""
    dtype: torch.dtype

    def array(self, name: str) -> Array:
        """As a matrix whose rows are whole in the file.

        Raises:
            FormatError: naming the tensor, if it is stored transposed.
        """
        rows, columns = matrix(self.shape)
        row_step = self.stride[0] if rows > 1 else columns
        column_step = self.stride[1] if len(self.shape) == 2 and columns > 1 else 1
        if column_step != 1 or row_step < columns:
            raise FormatError(
                f"tensor {name!r} in {str(self.path)!r} is stored with strides {self.stride}; save a contiguous copy"
            )
        return Array(self.path, self.offset, rows, columns, row_step * self.dtype.itemsize, self.dtype)


class Inert:
    """Stands for an object of a class that is not imported: keeps what it was given, does nothing with it."""

    qualified = ""
    """Module and name of the class."""
    arguments: tuple[object, ...]
    state: object

    def __new__(cls, *arguments: object) -> "Inert":
        """Keep the arguments."""
        self = super().__new__(cls)
        self.arguments = arguments
        self.state = None
        return self

    def __setitem__(self, key: object, value: object) -> None:
        """Forget an item."""

    def append(self, item: object) -> None:
        """Forget an item."""

    def field(self, name: str) -> object:
        """A value of the object's state, if that is a dictionary that has it."""
        return self.state.get(name) if isinstance(self.state, dict) else None


def load_pickle(path: Path) -> dict[str, object]:
    """The dictionary in a `torch.save` file, its tensors as `StoredTensor`.

    Raises:
        FormatError: the file is missing, damaged, too old, holds something other than a dictionary, or names code.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FormatError(f"{str(path)!r} is missing") from None
    except OSError as error:
        raise FormatError(f"{str(path)!r} cannot be opened: {error.strerror}") from error
    try:
        loaded = load_archive(path, descriptor)
    finally:
        os.close(descriptor)
    if not isinstance(loaded, dict):
        raise FormatError(f"{str(path)!r} holds a {type(loaded).__name__}, not a dictionary")
    return loaded


def load_archive(path: Path, descriptor: int, *, start: int = 0, length: int | None = None) -> object:
    """What an archive within an open file holds.

    Raises:
        FormatError: as `load_pickle`.
    """
    try:
        directory = Directory(descriptor, where=str(path), start=start, length=length)
        if directory.records.get("data.pkl") is None and "constants.pkl" in directory.records:
            raise FormatError(f"{str(path)!r} is a TorchScript program, not weights")
        if "byteorder" in directory.records and directory.read("byteorder") != b"little":
            raise FormatError(f"{str(path)!r} was written by a big-endian machine")
        _, size = directory.locate("data.pkl")
        if size > _MAX_PICKLE:
            raise FormatError(f"{str(path)!r} has a pickle of {size} bytes, which no checkpoint needs")
        return read_pickle(directory.read("data.pkl"), path, directory)
    except OSError as error:
        raise FormatError(f"{str(path)!r} cannot be read: {error}") from error
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def read_pickle(data: bytes, path: Path, directory: Directory | None = None) -> object:
    """Walk a pickle; `directory` says where its tensors are, if it may have any."""
    try:
        return _Walker(data, path, directory).load()
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: BaseException) -> FormatError:
    reason = str(error).strip().split("\n", maxsplit=1)[0] or type(error).__name__
    return FormatError(f"{str(path)!r} is not a whole torch.save file: {reason}")


@dataclass(frozen=True, slots=True)
class _Storage:
    offset: int
    numel: int
    dtype: torch.dtype


class _Walker(pickle._Unpickler):  # the one written in Python: its memo is a dictionary, which no index can blow up
    """Gives out containers and stand-ins only; changes nothing but what it has made itself."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def __init__(self, data: bytes, path: Path, directory: Directory | None) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._path = path
        self._directory = directory
        self._classes: dict[str, type[Inert]] = {}
        self._located: dict[str, tuple[int, int]] = {}

    def find_class(self, module: str, name: str) -> object:
        """The stand-in for a name; the only door to the outside."""
        qualified = f"{module}.{name}"
        known: dict[str, object] = {
            "collections.OrderedDict": OrderedDict,
            "argparse.Namespace": argparse.Namespace,
            "torch.Size": _size,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "torch.storage.UntypedStorage": torch.uint8,
        }
        if qualified in known:
            return known[qualified]
        if module in ("torch", "torch.storage") and name in _STORAGE_TYPES:
            return _STORAGE_TYPES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if not qualified.startswith(_INERT_MODULES):
            raise FormatError(f"{str(self._path)!r} is refused: it names {qualified!r}, which is code, not weights")
        if qualified not in self._classes:
            self._classes[qualified] = type("Inert", (Inert,), {"qualified": qualified})
        return self._classes[qualified]

    def persistent_load(self, reference: object) -> _Storage:
        """The record that a tensor's values are in."""
        if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] != "storage":
            raise ValueError("a tensor refers to something that is not a storage")
        _, dtype, key, _, numel = reference
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str) or not isinstance(numel, int) or numel < 0:
            raise ValueError("a tensor's storage is described wrongly")
        if self._directory is None:
            raise ValueError("a tensor where there can be none")
        if key not in self._located:
            self._located[key] = self._directory.locate(f"data/{key}")
        offset, size = self._located[key]
        if numel * dtype.itemsize > size:
            raise ValueError(f"storage {key!r} holds {size} bytes; its tensors need {numel * dtype.itemsize}")
        return _Storage(offset, numel, dtype)

    def _tensor(self, storage: object, start: object, shape: object, stride: object, *_: object) -> StoredTensor:
        if not isinstance(storage, _Storage) or not isinstance(start, int) or start < 0:
            raise ValueError("a tensor has no storage")
        sizes, steps = _whole_numbers(shape), _whole_numbers(stride)
        if len(sizes) != len(steps):
            raise ValueError(f"a tensor of shape {sizes} has strides {steps}")
        last = start + sum((size - 1) * step for size, step in zip(sizes, steps)) if all(sizes) else start - 1
        if last >= storage.numel:
            raise ValueError(f"a tensor of shape {sizes} reaches beyond its storage")
        offset = storage.offset + start * storage.dtype.itemsize
        return StoredTensor(self._path, offset, sizes, steps, storage.dtype)

    def _build(self) -> None:
        """The BUILD operation: gives a state to an object, and only to one that this walk has made."""
        state = self.stack.pop()
        instance = self.stack[-1]
        if isinstance(instance, argparse.Namespace) and isinstance(state, dict):
            vars(instance).update({str(key): value for key, value in state.items()})
        elif isinstance(instance, Inert):
            instance.state = state
        elif not isinstance(instance, OrderedDict):  # whose state is torch's `_metadata`, of no use here
            raise FormatError(f"{str(self._path)!r} is refused: it changes a {type(instance).__name__}")

    dispatch[pickle.BUILD[0]] = _build

    def _reduce(self) -> None:
        """The REDUCE operation: a call, and only of what `find_class` gave out."""
        arguments = self.stack.pop()
        function = self.stack[-1]
        allowed = function in (OrderedDict, argparse.Namespace, _size, _parameter, self._tensor)
        if not allowed and not (isinstance(function, type) and issubclass(function, Inert)):
            raise FormatError(f"{str(self._path)!r} is refused: it calls a {type(function).__name__}")
        self.stack[-1] = function(*arguments)

    dispatch[pickle.REDUCE[0]] = _reduce

    def _extension(self) -> None:
        """A name by number, from a registry that other libraries fill."""
        raise FormatError(f"{str(self._path)!r} is refused: it names code by a number of copyreg")

    dispatch[pickle.EXT1[0]] = dispatch[pickle.EXT2[0]] = dispatch[pickle.EXT4[0]] = _extension


def _checked(original: Callable[[Any], None], *, keys: Callable[[Any], list[object]]) -> Callable[[_Walker], None]:
    """An operation that hashes things: only things whose hash is quick and cannot run deep."""

    def operation(walker: _Walker) -> None:
        for key in keys(walker):
            _check_key(key)
        original(walker)

    return operation


def _check_key(key: object) -> None:
    parts = key if isinstance(key, tuple) else (key,)
    if any(not isinstance(part, str | int | float | bytes | Inert | torch.dtype | None) for part in parts):
        raise ValueError(f"a dictionary has a key of type {type(key).__name__}")


for _code, _keys in (
    (pickle.SETITEM, lambda walker: [walker.stack[-2]]),
    (pickle.SETITEMS, lambda walker: walker.stack[::2]),
    (pickle.DICT, lambda walker: walker.stack[::2]),
    (pickle.ADDITEMS, lambda walker: list(walker.stack)),
    (pickle.FROZENSET, lambda walker: list(walker.stack)),
):
    _Walker.dispatch[_code[0]] = _checked(_Walker.dispatch[_code[0]], keys=_keys)


def _size(numbers: object = ()) -> tuple[int, ...]:
    return _whole_numbers(numbers)


def _parameter(tensor: object, *_: object) -> object:
    return tensor


def _whole_numbers(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or any(not isinstance(n, int) or n < 0 for n in value):
        raise ValueError("a shape is not a row of whole numbers")
    return tuple(value)
