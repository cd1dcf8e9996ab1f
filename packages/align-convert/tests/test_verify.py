"""`first_difference` finds the least change and says where it is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from align_convert import Layout, ModelConfig, PlanError, load_any
from align_convert.copy import to_megatron
from align_convert.verify import first_difference

Make = Callable[..., ModelConfig]
MakeHf = Callable[..., Path]
NORM = "model.norm.weight"


def _difference(a: Path, b: Path) -> str | None:
    return first_difference(load_any(a), load_any(b))


def test_same_weights_are_equal_across_formats(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    source = make_hf(make_config())
    to_megatron(load_any(source), tmp_path / "out", layout=Layout(tp=2))
    assert _difference(source, tmp_path / "out") is None


def test_one_element_is_named_with_its_place_and_values(make_config: Make, make_hf: MakeHf) -> None:
    ones, other = torch.ones(32), torch.ones(32)
    other[7] = 1.5
    a = make_hf(make_config(), "a", extra={NORM: ones})
    b = make_hf(make_config(), "b", extra={NORM: other})
    found = _difference(a, b)
    assert found is not None
    assert found.startswith(f"tensor '{NORM}' differs in 1 of 32 elements, first at (7,): 1.0 in")
    assert "1.5 in" in found


@pytest.mark.parametrize(("x", "y", "equal"), [(0.0, -0.0, False), (float("nan"), float("nan"), True)])
def test_bits_decide_not_values(make_config: Make, make_hf: MakeHf, x: float, y: float, equal: bool) -> None:
    a = make_hf(make_config(), "a", extra={NORM: torch.full((32,), x)})
    b = make_hf(make_config(), "b", extra={NORM: torch.full((32,), y)})
    assert (_difference(a, b) is None) is equal


def test_other_type_is_a_difference(make_config: Make, make_hf: MakeHf) -> None:
    a, b = make_hf(make_config(), "a"), make_hf(make_config(), "b", dtype=torch.float16)
    assert "is float32 [50, 32] in" in str(_difference(a, b))


def test_other_setting_is_a_difference(make_config: Make, make_hf: MakeHf) -> None:
    a, b = make_hf(make_config(), "a"), make_hf(make_config(rope_theta=5e5), "b")
    assert str(_difference(a, b)).startswith("setting 'rope_theta' is 10000.0 in")


def test_tensor_of_one_side_only_is_a_difference(make_config: Make, make_hf: MakeHf) -> None:
    a, b = make_hf(make_config(), "a"), make_hf(make_config(tie_word_embeddings=True), "b")
    assert str(_difference(a, b)) == f"tensor 'lm_head.weight' is only in '{a}'"


def test_incomplete_side_is_an_error(make_config: Make, make_hf: MakeHf) -> None:
    a, b = make_hf(make_config(), "a"), make_hf(make_config(), "b", without=NORM)
    with pytest.raises(PlanError, match="1 tensor is missing"):
        _difference(a, b)
