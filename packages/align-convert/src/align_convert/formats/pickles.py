"""Open a `torch.save` file of unknown origin without executing anything in it.

torch's weights_only unpickler builds tensors and plain data only; Megatron's own classes, which its files mention but
weights do not need, become inert stand-ins; every other name in the pickle is refused before it is read.
"""

import argparse
import pickle
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from align_convert.errors import FormatError

# Bookkeeping objects of Megatron checkpoints (enums, optimizer and RNG state); a stand-in remembers nothing of them.
_INERT_MODULES = ("megatron.", "numpy.", "signal.", "transformer_engine.", "types.SimpleNamespace", "pathlib.", "_io.")

# What torch raises on damaged files, depending on which byte is wrong.
_DAMAGE = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
)


class Inert:
    """Stands for an object of a class that is not imported: takes any state and drops it."""

    def __init__(self, *arguments: object) -> None:
        """Accept and forget."""

    def __setstate__(self, state: object) -> None:
        """Accept and forget."""


def load_pickle(path: Path) -> dict[str, object]:
    """The dictionary in a `torch.save` file, its tensors mapped from disk rather than read.

    Raises:
        FormatError: the file is missing, damaged, too old, holds something other than a dictionary, or names code.
    """
    try:
        with _only([argparse.Namespace]):
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        refused = sorted(name for name in unknown if not name.startswith(_INERT_MODULES))
        if refused:
            raise FormatError(
                f"{str(path)!r} is refused: it names {', '.join(map(repr, refused[:4]))}, which is code, not weights"
            )
        with _only([argparse.Namespace, *((Inert, name) for name in unknown)]):
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise FormatError(f"{str(path)!r} is missing") from None
    except _DAMAGE as error:
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        raise FormatError(f"{str(path)!r} is not a whole torch.save file: {reason}") from error
    if not isinstance(loaded, dict):
        raise FormatError(f"{str(path)!r} holds a {type(loaded).__name__}, not a dictionary")
    return loaded


@contextmanager
def _only(allowed: list[Callable[..., object] | tuple[Callable[..., object], str]]) -> Iterator[None]:
    """Let torch unpickle these classes and nothing that other libraries have registered; then put theirs back.

    torch's own `safe_globals` would on leaving also remove a class that somebody had registered before, as
    megatron-core does with Namespace, and so break that library's next load.
    """
    registered = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(registered)
