"""Weights between ranks over gloo: Megatron ranks of TP, PP to engine ranks of another TP, in small buckets.

Each rank is a thread with a process group of its own, as each would be a process; it makes its own tensors only, the
receivers empty ones. What arrives is compared with what was sent by checksums.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from align_convert.config import ModelConfig
from align_convert.fill import fill_shard, slices
from align_convert.layout import Layout
from align_convert.plan import Shard, rank_plan
from align_core.errors import SyncError
from align_core.megatron.weights import held_parts, weight_metas
from align_core.transfer.checksums import PartSums
from align_core.transfer.links import Link, routes
from align_core.transfer.rectangles import Part, Rows, check_sums
from align_core.transfer.rendezvous import close_meeting, open_meeting
from align_core.transfer.seats import Meeting

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 250,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The same values in every process, without the whole model in any."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))


def plans_of(layout: Layout) -> tuple[list[tuple[Shard, ...]], list[list[Part]]]:
    config = ModelConfig.from_hf(CONFIG)
    metas = weight_metas(config, "float32")
    plans = [rank_plan(config, layout, rank) for rank in layout.ranks()]
    return plans, [held_parts(plan, metas) for plan in plans]


def work(rank: int, meeting: Meeting, layouts: tuple[Layout, Layout], drop: str) -> dict[str, int]:
    """Sends a rank's shards, or receives into empty ones; returns its checksums."""
    shapes = ModelConfig.from_hf(CONFIG).tensors()
    sending = rank < meeting.senders
    plans, parts = plans_of(layouts[0] if sending else layouts[1])
    own = rank if sending else rank - meeting.senders
    tensors = {
        f"0.{shard.name}": fill_shard(shard, lambda name, at: weight(name, shapes[name])[slices(at)], torch.float32)
        if sending
        else torch.full(shard.shape, torch.nan)
        for shard in plans[own]
    }
    plan = routes(plans_of(layouts[0])[1], plans_of(layouts[1])[1])
    link = Link(meeting, rank)
    for _ in range(2):  # the second time over buffers that are there already
        if sending:
            link.send(tensors, plan, bucket_bytes=20_000)
        else:
            link.receive(tensors, plan, bucket_bytes=20_000)
    if drop and not sending:
        tensors[drop].fill_(torch.nan)  # as if its bucket had never come
    return PartSums([part for part in parts[own] if part.primary or not sending]).compute(tensors, Rows())


def transfer(
    senders: Layout, receivers: Layout, *, drop: str = "", host: str = ""
) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
    """The checksums of all ranks on both sides, after weights have moved."""
    counts = len(senders.ranks()), len(receivers.ranks())
    meeting = Meeting(place=open_meeting(host), senders=counts[0], receivers=counts[1], backend="gloo", timeout_s=60)
    with ThreadPoolExecutor(max_workers=sum(counts)) as pool:
        ranks = [pool.submit(work, rank, meeting, (senders, receivers), drop) for rank in range(sum(counts))]
        sums = [rank.result() for rank in ranks]
    close_meeting(meeting.place)
    return sums[: counts[0]], sums[counts[0] :]


@pytest.mark.parametrize(
    ("senders", "receivers"),
    [(Layout(tp=2, pp=2), Layout(tp=2)), (Layout(tp=2), Layout()), (Layout(pp=2), Layout(tp=2))],
    ids=["TP2 PP2 to TP2", "TP2 to TP1", "PP2 to TP2"],
)
def test_every_weight_arrives_in_another_layout(senders: Layout, receivers: Layout) -> None:
    sent, held = transfer(senders, receivers)
    check_sums(sent, held, plans_of(receivers)[1], version=1)


def test_ranks_meet_over_a_port_too() -> None:
    sent, held = transfer(Layout(tp=2), Layout(), host="127.0.0.1")
    check_sums(sent, held, plans_of(Layout())[1], version=1)


def test_a_bucket_that_is_not_sent_is_named_when_the_time_is_over() -> None:
    """The sender has met the receiver, for which there is as much time, and sends nothing."""
    held, wanted = plans_of(Layout())[1], plans_of(Layout())[1]
    tensors = {f"0.{shard.name}": torch.zeros(shard.shape) for shard in plans_of(Layout())[0][0]}
    meeting = Meeting(place=open_meeting(), senders=1, receivers=1, backend="gloo", timeout_s=5)
    with ThreadPoolExecutor(max_workers=2) as pool:
        sender = pool.submit(Link, meeting, 0)
        receiver = Link(meeting, 1)
        sender.result()
        with pytest.raises(SyncError, match=r"weights 'model\.embed_tokens\.weight'.* did not come from rank 0"):
            receiver.receive(tensors, routes(held, wanted))
        sender.result().close(), receiver.close()
    close_meeting(meeting.place)


def test_a_rank_that_does_not_come_is_an_error_and_no_hang() -> None:
    meeting = Meeting(place=open_meeting(), senders=1, receivers=1, backend="gloo", timeout_s=2)
    with pytest.raises(SyncError, match="1 trainer ranks and 1 engine ranks did not meet"):
        Link(meeting, 1)
    close_meeting(meeting.place)


def test_a_bucket_that_never_came_is_named() -> None:
    sent, held = transfer(Layout(tp=2), Layout(), drop="0.decoder.layers.1.mlp.linear_fc2.weight")
    with pytest.raises(SyncError, match=r"1 weights of version 1 .* 'model\.layers\.1\.mlp\.down_proj\.weight'"):
        check_sums(sent, held, plans_of(Layout())[1], version=1)


def test_no_rank_sends_what_it_does_not_hold_and_nothing_moves_twice() -> None:
    held, wanted = plans_of(Layout(tp=2, pp=2))[1], plans_of(Layout(tp=2))[1]
    plan = routes(held, wanted)
    for receiver, parts in enumerate(wanted):
        moved = sum(copy.elements for route in plan if route.receiver == receiver for copy in route.copies)
        sizes = [torch.Size(stop - start for start, stop in part.index).numel() for part in parts]
        assert moved == sum(sizes)
