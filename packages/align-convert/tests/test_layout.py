"""Which layouts a model can be cut into, and what the refusals say."""

from collections.abc import Callable

import pytest

from align_convert import Layout, LayoutError, ModelConfig, Rank, rank_plan
from align_convert.layout import layers_of, stages

Make = Callable[..., ModelConfig]


def test_vocabulary_is_padded_to_divisor_times_tensor_parallel() -> None:
    """Llama-2: 32000 = 250 x 128; TP 4 pads to 63 x 512 = 32256, TP 8 to 32 x 1024 = 32768."""
    assert [Layout(tp=tp).padded_vocab(32000) for tp in (1, 2, 4, 8)] == [32000, 32000, 32256, 32768]


def test_virtual_chunks_interleave_over_stages() -> None:
    """8 layers, 2 stages x 2 chunks: stage 0 holds {0,1} and {4,5}, stage 1 holds {2,3} and {6,7}."""
    layout = Layout(pp=2, vp=2)
    held = {(rank.pp, rank.vp): list(layers_of(8, layout, rank)) for rank in layout.ranks()}
    assert held == {(0, 0): [0, 1], (0, 1): [4, 5], (1, 0): [2, 3], (1, 1): [6, 7]}


def test_ends_of_the_pipeline_may_hold_other_numbers_of_layers() -> None:
    """14 layers as 2, 5, 5, 2; 20 layers in 2 rounds as 4, 6, 6, 4: chunks of 2, 3, 3, 2, twice."""
    assert stages(14, pp=4, first=2, last=2) == (2, 5, 5, 2)
    assert stages(11, pp=3, first=3) == (3, 4, 4)
    assert stages(20, pp=4, vp=2, first=4, last=4) == (2, 3, 3, 2, 2, 3, 3, 2)
    layout = Layout(pp=2, vp=2, chunk_layers=(1, 3, 2, 0))
    held = {(rank.pp, rank.vp): list(layers_of(6, layout, rank)) for rank in layout.ranks()}
    assert held == {(0, 0): [0], (0, 1): [4, 5], (1, 0): [1, 2, 3], (1, 1): []}


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"num_layers": 8, "pp": 4, "first": 1}, "less 1 at the ends cannot be spread evenly over the 3 other of 4"),
        ({"num_layers": 8, "pp": 2, "first": 3, "last": 4}, "cannot be spread evenly over the 0 other of 2 stages"),
        ({"num_layers": 8, "pp": 2, "vp": 2, "first": 3}, "does not divide the 3 layers of a stage"),
    ],
)
def test_stages_that_do_not_add_up_are_refused(numbers: dict[str, int], message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        stages(**numbers)
    assert message in str(caught.value)


def test_refusal_lists_the_sizes_that_work(make_config: Make) -> None:
    config = make_config(hidden_size=128, num_attention_heads=32, num_key_value_heads=32, intermediate_size=256)
    with pytest.raises(LayoutError) as caught:
        Layout(tp=3).check(config)
    assert str(caught.value) == ("tensor parallel size 3 does not divide 32 attention heads; use 1, 2, 4, 8, 16 or 32")


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (
            Layout(pp=3),
            {},
            "pipeline parallel size 3 does not divide 8 layers; use 1, 2, 4 or 8, or say how many layers",
        ),
        (Layout(pp=2, vp=3), {}, "virtual pipeline size 3 does not divide 4 layers a stage; use 1, 2 or 4"),
        (Layout(vp=2), {}, "virtual pipeline size 2 needs a pipeline of at least 2 stages; use pp >= 2 or vp 1"),
        (Layout(ep=2), {}, "expert parallel size 2 needs a mixture of experts; this model is dense: use 1"),
        (Layout(pp=2, chunk_layers=(3, 4)), {}, "the chunks hold 3 + 4 = 7 layers; the model has 8"),
        (Layout(tp=4), {"intermediate_size": 50}, "does not divide the MLP width 50; use 1 or 2"),
        (
            Layout(tp=2),
            {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48},
            "neither divides nor is a multiple of 3 KV groups; use 1, 3 or 6",
        ),
    ],
)
def test_impossible_layout_is_refused(
    make_config: Make, layout: Layout, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(LayoutError, match=r".") as caught:
        layout.check(make_config(**changes))
    assert message in str(caught.value)


@pytest.mark.parametrize("size", [0, -1, True, 2.0])
def test_sizes_must_be_positive_integers(size: int) -> None:
    with pytest.raises(LayoutError, match=r"tp is .*; it must be a positive integer"):
        Layout(tp=size)


def test_rank_outside_the_layout_is_refused(make_config: Make) -> None:
    with pytest.raises(LayoutError, match="rank pp=2 is outside the layout; with pp size 2 use 0 to 1"):
        rank_plan(make_config(), Layout(pp=2), Rank(pp=2))
