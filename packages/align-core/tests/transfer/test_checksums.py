"""Checksums computed by rows of parts: equal to `align_core.types.checksum` of the whole, for every cut and dtype."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from align_core.transfer.checksums import PartSums, _as_integers
from align_core.transfer.rectangles import SAMPLED_ROWS, Part, Rows, slices, whole
from align_core.types import checksum

DTYPES = [torch.float32, torch.bfloat16]


def part(name: str, shape: tuple[int, ...], **changes: object) -> Part:
    everything = {"index": whole(shape), "tensor": name, "local": whole(shape), **changes}
    return Part(name=name, shape=shape, **everything)  # type: ignore[arg-type]


def bytes_of(tensor: "torch.Tensor") -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 24), (1, 7), (9,)])
def test_a_whole_weight_has_its_checksum(dtype: "torch.dtype", shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(dtype)
    sums = PartSums([part("w", shape)]).compute({"w": tensor}, Rows())
    assert sums == {"w": checksum(bytes_of(tensor), item_bytes=dtype.itemsize)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_two_holders_add_up_to_the_whole(dtype: "torch.dtype") -> None:
    """A matrix cut into columns for two holders, one of which has its rows in another order inside a larger tensor."""
    whole_tensor = torch.randn(12, 10).to(dtype)
    left = part("w", (12, 10), index=((0, 12), (0, 4)), local=((0, 12), (0, 4)))
    lower = part("w", (12, 10), index=((6, 12), (4, 10)), tensor="fused", local=((0, 6), (0, 6)))
    upper = part("w", (12, 10), index=((0, 6), (4, 10)), tensor="fused", local=((8, 14), (0, 6)))
    fused = torch.full((16, 6), 3.0).to(dtype)
    for piece in (lower, upper):
        fused[slices(piece.local)] = whole_tensor[slices(piece.index)]
    first = PartSums([left]).compute({"w": whole_tensor[:, :4].contiguous()}, Rows())["w"]
    second = PartSums([lower, upper]).compute({"fused": fused}, Rows())["w"]
    assert (first + second) % 2**64 == checksum(bytes_of(whole_tensor), item_bytes=dtype.itemsize)


def test_samples_of_consecutive_versions_cover_every_row_once() -> None:
    tensor = torch.randn(50, 8)
    total = sum(
        PartSums([part("w", (50, 8))]).compute({"w": tensor}, Rows.sampled(version))["w"]
        for version in range(7, 7 + SAMPLED_ROWS)
    )
    assert total % 2**64 == checksum(bytes_of(tensor), item_bytes=4)


def test_a_sample_does_not_depend_on_how_the_rows_are_cut() -> None:
    tensor, rows = torch.randn(50, 8), Rows.sampled(3)
    cut = [
        part("w", (50, 8), index=((a, b), (0, 8)), tensor=f"t{a}", local=((0, b - a), (0, 8)))
        for a, b in ((0, 19), (19, 50))
    ]
    pieces = {"t0": tensor[:19].clone(), "t19": tensor[19:].clone()}
    assert PartSums(cut).compute(pieces, rows) == PartSums([part("w", (50, 8))]).compute({"w": tensor}, rows)


@pytest.mark.parametrize("bit", range(32))
def test_every_bit_of_an_element_counts(bit: int) -> None:
    tensor = torch.randn(3, 5)
    sums = PartSums([part("w", (3, 5))])
    before = sums.compute({"w": tensor}, Rows())
    tensor.view(torch.int32)[1, 2] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
    assert sums.compute({"w": tensor}, Rows()) != before


def test_columns_inside_a_larger_tensor() -> None:
    whole_tensor = torch.randn(6, 8)
    right = part("w", (6, 8), index=((0, 6), (4, 8)), local=((0, 6), (4, 8)))
    alone = part("w", (6, 8), index=((0, 6), (4, 8)), local=((0, 6), (0, 4)))
    expected = PartSums([alone]).compute({"w": whole_tensor[:, 4:].contiguous()}, Rows())
    assert PartSums([right]).compute({"w": whole_tensor}, Rows()) == expected


def test_fused_vectors_have_the_checksums_of_each() -> None:
    first, second = torch.randn(5), torch.randn(3)
    parts = [part("a", (5,), tensor="f"), part("b", (3,), tensor="f", local=((5, 8),))]
    sums = PartSums(parts).compute({"f": torch.cat([first, second])}, Rows.sampled(4))
    assert sums == {"a": checksum(bytes_of(first), item_bytes=4), "b": checksum(bytes_of(second), item_bytes=4)}


def test_parts_of_one_tensor_may_have_columns_of_their_own() -> None:
    tensor = torch.randn(4, 5)
    cut = [part("w", (4, 5), index=((0, 4), at), local=((0, 4), at)) for at in ((0, 3), (3, 5))]
    assert PartSums(cut).compute({"w": tensor}, Rows()) == PartSums([part("w", (4, 5))]).compute({"w": tensor}, Rows())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [Rows(), *(Rows.sampled(version) for version in range(SAMPLED_ROWS))], ids=str)
def test_the_kernel_adds_what_the_host_adds(rows: Rows, dtype: "torch.dtype") -> None:
    """On a GPU; without one, only in Triton's interpreter, which the next test turns on."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU, or Triton's interpreter (see test_the_kernel_in_tritons_interpreter)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = [
        part("a", (40, 2000), tensor="f", local=((2, 42), (3, 2003))),
        part("b", (33, 8), index=((5, 30), (2, 6)), tensor="f", local=((45, 70), (0, 4))),
        part("c", (1500,), tensor="v", local=((0, 1500),)),
        part("d", (90,), index=((30, 60),), tensor="v", local=((1500, 1530),)),
    ]
    tensors = {"f": torch.randn(70, 2010).to(dtype), "v": torch.randn(1530).to(dtype)}
    sums = PartSums(parts)
    matrices = [_as_integers(tensors[name].to(device)) for name in ("f", "v")]
    for _ in range(2):  # the second time over tables that are there
        found = torch.zeros(4, dtype=torch.int64, device=device)
        sums._launch(matrices, rows, found)
        assert {name: value % 2**64 for name, value in zip("abcd", found.tolist())} == sums.compute(tensors, rows)


def test_the_kernel_in_tritons_interpreter() -> None:
    """Which is chosen when Triton is imported, so in a process of its own."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernel itself runs here")
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "the_kernel_adds", "-p", "no:cacheprovider"]
    found = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=120, check=False
    )
    if "only 0-dimensional arrays can be converted to Python scalars" in found.stdout:
        pytest.skip("NumPy since 2.4 refuses how the interpreter of Triton 3.6 makes the bounds of loops")
    assert found.returncode == 0, found.stdout
    assert "34 passed" in found.stdout
