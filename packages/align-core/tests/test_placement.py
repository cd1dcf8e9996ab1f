"""Which rank gets which GPU, on clusters that are only described."""

import pytest

from align_core.errors import ConfigError, LayoutError
from align_core.placement import Node, Placement, Slot, parse_cluster

EIGHT = Node(gpus=8, gpu_gib=80)


def slots(found: list[Slot]) -> list[tuple[int, int]]:
    return [(slot.node, slot.index) for slot in found]


def test_colocated_models_and_engines_begin_at_the_first_gpu() -> None:
    placement = Placement([EIGHT], "colocated")
    assert slots(placement.trainer(4)) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert slots(placement.trainer(2)) == [(0, 0), (0, 1)]
    assert [slots(part) for part in placement.engines(2, replicas=2)] == [[(0, 0), (0, 1)], [(0, 2), (0, 3)]]


def test_disaggregated_engines_take_the_last_gpus() -> None:
    placement = Placement([EIGHT], "disaggregated")
    assert slots(placement.trainer(4)) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert [slots(part) for part in placement.engines(1, replicas=2)] == [[(0, 6)], [(0, 7)]]


def test_nodes_are_filled_one_after_another() -> None:
    placement = Placement([Node(gpus=2), Node(gpus=2), Node(gpus=2)], "disaggregated")
    assert slots(placement.trainer(3)) == [(0, 0), (0, 1), (1, 0)]
    assert [slots(part) for part in placement.engines(2)] == [[(2, 0), (2, 1)]]


def test_nodes_without_gpus_are_left_out_of_a_cluster_that_has_some() -> None:
    placement = Placement([Node(gpus=0, cpus=64), Node(gpus=2)], "colocated")
    assert slots(placement.trainer(2)) == [(1, 0), (1, 1)]
    with pytest.raises(ConfigError, match="3 ranks need as many GPUs, the cluster has 2"):
        placement.trainer(3)


def test_disaggregated_sizes_must_fit_together_in_whatever_order_they_come() -> None:
    message = "disaggregated, 6 GPUs for training and 3 for engines are 9, the cluster has 8"
    one, other = Placement([EIGHT], "disaggregated"), Placement([EIGHT], "disaggregated")
    one.trainer(6)
    with pytest.raises(ConfigError, match=message):
        one.engines(1, replicas=3)
    other.engines(3)
    with pytest.raises(ConfigError, match=message):
        other.trainer(6)


def test_an_engine_lies_on_one_node() -> None:
    placement = Placement([Node(gpus=3), Node(gpus=3)], "colocated")
    with pytest.raises(LayoutError, match=r"engine\.tensor 2 would cut an engine over the nodes 0 and 1"):
        placement.engines(2, replicas=2)


def test_on_cpu_ranks_share_cores() -> None:
    placement = Placement([Node(gpus=0, cpus=2)], "disaggregated")
    assert slots(placement.trainer(3)) == [(0, 0), (0, 1), (0, 0)]
    assert [slots(part) for part in placement.engines(1)] == [[(0, 1)]]


@pytest.mark.parametrize("text", ["8", "1x8", "0x8x80", "1x8x80x2", "1x8xmany", "1x8x0", ""])
def test_a_description_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="NODESxGPUSxGIB"):
        parse_cluster(text)


def test_description_by_example() -> None:
    assert parse_cluster("2x8x80") == [EIGHT, EIGHT]
