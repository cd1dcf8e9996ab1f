"""Damaged and hostile files of every format: our errors and nothing else, and nothing executed."""

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align_convert import ConvertError, FormatError, Layout, ModelConfig, load_any
from align_convert.copy import to_megatron
from align_convert.formats.pickles import load_pickle, read_pickle

Make = Callable[..., ModelConfig]
MakeHf = Callable[..., Path]
_EXAMPLES = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _open(path: Path) -> None:
    """What a conversion does before it writes anything."""
    try:
        source = load_any(path)
        source.check()
        for name in source.tensors():
            source.read_hf(name)
    except ConvertError:
        pass


def _damage(data: bytes, places: list[tuple[float, int]], keep: float) -> bytes:
    """Some bytes changed, then cut off."""
    changed = bytearray(data)
    for place, value in places:
        changed[int(place * (len(data) - 1))] = value
    return bytes(changed[: int(keep * len(data))])


_PLACES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6)
_KEEP = st.one_of(st.just(1.0), st.floats(0, 1))


@pytest.fixture
def directories(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> dict[str, tuple[Path, Path, bytes]]:
    """Format -> (directory, the file to damage, its good bytes)."""
    source = make_hf(make_config(num_hidden_layers=1, vocab_size=8, hidden_size=8, head_dim=2, intermediate_size=8))
    made = {"hf": source / "model.safetensors", "config": source / "config.json"}
    for name, how in {"torch": {}, "legacy": {"naming": "legacy"}, "dist": {"file_format": "torch_dist"}}.items():
        root = tmp_path / name
        to_megatron(load_any(source), root, layout=Layout(vocab_divisor=8), **how)  # type: ignore[arg-type]
        folder = root / "iter_0000001"
        made[name] = folder / "mp_rank_00" / "model_optim_rng.pt" if name != "dist" else folder / "__0_0.distcp"
    made["metadata"] = made["dist"].with_name(".metadata")
    made["common"] = made["dist"].with_name("common.pt")
    roots = {"hf": source, "config": source, "metadata": tmp_path / "dist", "common": tmp_path / "dist"}
    return {name: (roots.get(name, tmp_path / name), file, file.read_bytes()) for name, file in made.items()}


@pytest.mark.parametrize("kind", ["hf", "config", "torch", "legacy", "dist", "metadata", "common"])
@_EXAMPLES
@given(places=_PLACES, keep=_KEEP)
def test_damaged_directories_raise_only_our_errors(
    directories: dict[str, tuple[Path, Path, bytes]], kind: str, places: list[tuple[float, int]], keep: float
) -> None:
    root, file, good = directories[kind]
    file.unlink()  # a new file: the old one may still be mapped
    file.write_bytes(_damage(good, places, keep))
    try:
        _open(root)
    finally:
        file.unlink()
        file.write_bytes(good)


_OPCODES = st.lists(
    st.sampled_from(
        [
            b"(", b")", b"]", b"}", b"t", b"l", b"d", b"0", b"1", b"2", b"R", b"b", b"s", b"u", b"a", b"e", b"o",
            b"\x81", b"\x85", b"\x86", b"\x87", b"\x8f", b"\x90", b"\x91", b"\x93", b"\x94", b"N", b"K\x01", b"Q",
            b"X\x01\0\0\0a", b"ccollections\nOrderedDict\n", b"cargparse\nNamespace\n", b"ctorch\nFloatStorage\n",
            b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nSize\n", b"cmegatron.x\nY\n", b"cos\nsystem\n",
            b"q\x01", b"h\x01", b"r\xff\xff\xff\x7f", b"\x82\x01", b"i", b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f", b".",
        ]
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(operations=_OPCODES)
def test_pickles_of_random_operations_raise_only_our_errors(operations: list[bytes]) -> None:
    try:
        read_pickle(b"\x80\x04" + b"".join(operations) + b".", Path("x.pt"))
    except FormatError as error:
        assert "x.pt" in str(error)


class _Call:
    """Pickles as a call of anything."""

    def __init__(self, function: object, *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self._call  # type: ignore[return-value]


@pytest.mark.parametrize(
    "function", [eval, exec, __import__, getattr, print, io.open, Path.touch], ids=lambda function: function.__name__
)
def test_calls_of_functions_are_refused_by_name(tmp_path: Path, function: object) -> None:
    torch.save({"model": _Call(function, "x")}, tmp_path / "x.pt")
    with pytest.raises(FormatError, match=r"x\.pt' is refused: it names '.+', which is code, not weights"):
        load_pickle(tmp_path / "x.pt")


def test_io_is_buffers_only() -> None:
    """Python 3.12 writes io.open as _io.open, beside the _io.BytesIO that Transformer Engine keeps its scales in."""
    with pytest.raises(FormatError, match=r"is refused: it names '_io.open', which is code"):
        read_pickle(b"\x80\x02c_io\nopen\nX\x01\0\0\0x\x85R.", Path("x.pt"))
    read_pickle(b"\x80\x02c_io\nBytesIO\n)R.", Path("x.pt"))


def test_classes_cannot_be_changed_from_a_file() -> None:
    """BUILD with a slot state would set an attribute of a class that everybody shares."""
    data = b"\x80\x02cargparse\nNamespace\nN}X\x01\0\0\0aK\x01s\x86b."
    with pytest.raises(FormatError, match=r"is refused: it changes a type"):
        read_pickle(data, Path("x.pt"))


def test_deep_keys_do_not_overflow_the_stack() -> None:
    """Hashing a tuple nested so deep would end the process."""
    data = b"\x80\x02}N" + b"\x85" * 200_000 + b"K\x01s."
    with pytest.raises(FormatError, match="a dictionary has a key of type tuple"):
        read_pickle(data, Path("x.pt"))


def test_compressed_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(OrderedDict(), protocol=2) * 1000)
    with pytest.raises(FormatError, match="is compressed"):
        load_pickle(tmp_path / "x.pt")


@pytest.mark.parametrize("owner", ["../model.safetensors", "/etc/passwd", "", "a\0b", 3])
def test_index_cannot_lead_out_of_the_directory(make_config: Make, make_hf: MakeHf, owner: object) -> None:
    source = make_hf(make_config())
    index = {"weight_map": {"lm_head.weight": owner}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"which is not a plain file name|lacks 1 file"):
        load_any(source)
