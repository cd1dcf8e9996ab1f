"""Nothing in a checkpoint file is ever executed; whatever is wrong with it is our error, with its name."""

import os
import random
import sys
import types
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from align_convert import FormatError
from align_convert.formats.pickles import StoredTensor, load_pickle


class _Bomb:
    """Unpickled for real, it would make a directory."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._target),)


@pytest.fixture
def foreign_class() -> Iterator[type]:
    """A class of a module that exists while writing and no longer while reading, as Megatron does for us."""
    module = types.ModuleType("megatron.core.enums_of_a_test")
    made = type("ModelType", (), {"__module__": module.__name__})
    module.ModelType = made  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    yield made
    sys.modules.pop(module.__name__, None)


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"args": _Bomb(tmp_path / "boom")}, tmp_path / "x.pt")
    with pytest.raises(FormatError, match=r"is refused: it names 'posix.mkdir', which is code, not weights"):
        load_pickle(tmp_path / "x.pt")
    assert not (tmp_path / "boom").exists()


def test_megatrons_own_classes_become_inert(tmp_path: Path, foreign_class: type) -> None:
    args = Namespace(model_type=foreign_class(), tp=2)
    torch.save({"args": args, "model": {"w": torch.ones(2)}}, tmp_path / "x.pt")
    sys.modules.pop(foreign_class.__module__)
    loaded = load_pickle(tmp_path / "x.pt")
    found, model = loaded["args"], loaded["model"]
    assert isinstance(found, Namespace)
    assert isinstance(model, dict)
    assert (found.tp, type(found.model_type).__name__) == (2, "Inert")
    weight = model["w"]
    assert isinstance(weight, StoredTensor)
    with (tmp_path / "x.pt").open("rb") as file:
        file.seek(weight.offset)
        assert file.read(8) == torch.ones(2).numpy().tobytes()


def test_what_others_registered_with_torch_is_neither_used_nor_lost(tmp_path: Path) -> None:
    """megatron-core registers Namespace and more for its own loads, which must still work after ours."""
    torch.save({"args": Namespace()}, tmp_path / "good.pt")
    torch.save({"args": _Bomb(tmp_path / "boom")}, tmp_path / "bad.pt")
    before = torch.serialization.get_safe_globals()
    registered: list[Callable[..., object] | tuple[Callable[..., object], str]]
    registered = [Namespace, (os.getcwd, "posix.mkdir")]
    torch.serialization.add_safe_globals(registered)
    try:
        load_pickle(tmp_path / "good.pt")
        with pytest.raises(FormatError, match=r"names 'posix.mkdir'"):
            load_pickle(tmp_path / "bad.pt")
        assert set(registered) <= set(torch.serialization.get_safe_globals())
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_missing_file_and_other_contents_are_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"x\.pt' is missing"):
        load_pickle(tmp_path / "x.pt")
    torch.save([1], tmp_path / "x.pt")
    with pytest.raises(FormatError, match="holds a list, not a dictionary"):
        load_pickle(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(b"not a zip")
    with pytest.raises(FormatError, match=r"x\.pt' is not a whole torch\.save file"):
        load_pickle(tmp_path / "x.pt")


def test_damaged_file_never_raises_anything_else(tmp_path: Path) -> None:
    """Truncations must all be noticed; changed bytes may hit a weight, which looks like any other weight."""
    path = tmp_path / "x.pt"
    torch.save({"args": Namespace(a=1), "model": {"w": torch.ones(4, 4)}}, path)
    good, rng = path.read_bytes(), random.Random(0)
    for _ in range(40):
        path.write_bytes(good[: rng.randrange(len(good))])
        with pytest.raises(FormatError):
            load_pickle(path)
    for _ in range(150):
        changed = bytearray(good)
        changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(changed)
        try:
            load_pickle(path)
        except FormatError as error:
            assert "x.pt" in str(error)
