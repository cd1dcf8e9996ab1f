"""An engine fetches its weights from the tensors of Megatron ranks, cut in any way, and then equals Hugging Face."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from align_convert.config import ModelConfig
from align_convert.fill import fill_shard, slices
from align_convert.layout import Layout
from align_convert.plan import Index, rank_plan
from align_convert.source import load_any
from align_core.config import EngineConfig, SamplingConfig
from align_core.contracts import LinkedSink
from align_core.errors import SyncError
from align_core.megatron.weights import held_parts, weight_metas
from align_core.stages.sync import synchronise
from align_core.transfer.checksums import PartSums
from align_core.transfer.rectangles import Part, Rows
from align_core.transfer.seats import Meeting, Seat
from align_core.types import ParamMeta, Prompt, WeightTensor
from align_rollout.vllm import VllmEngine

pytestmark = pytest.mark.slow
_GREEDY = SamplingConfig(max_tokens=8, temperature=0)
_VERSIONS = itertools.count(1)


class RanksSource:
    """What the ranks of a Megatron layout would hold of a Hugging Face model's weights."""

    def __init__(self, model: LlamaForCausalLM, config: ModelConfig, layout: Layout) -> None:
        self._weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._metas = weight_metas(config, "float32")
        plans = [rank_plan(config, layout, rank) for rank in layout.ranks()]
        self._layout = [held_parts(plan, self._metas) for plan in plans]
        self.tensors = [
            {
                f"0.{shard.name}": fill_shard(shard, lambda name, at: self._weights[name][slices(at)], torch.float32)
                for shard in plan
            }
            for plan in plans
        ]
        self._sums = [[part for part in parts if part.primary] for parts in self._layout]

    def _read(self, name: str, at: Index) -> torch.Tensor:
        return self._weights[name][slices(at)]

    def metadata(self) -> Sequence[ParamMeta]:
        return self._metas

    def iterate(self) -> Iterator[WeightTensor]:
        raise AssertionError("the direct way asks for no copy on the host")

    def layout(self) -> Sequence[Sequence[Part]]:
        return self._layout

    def devices(self) -> frozenset[str]:
        return frozenset()

    def memory(self) -> Sequence[Mapping[str, object]]:
        return self.tensors

    def checksums(self, rows: Rows) -> Sequence[Mapping[str, int]]:
        return [PartSums(parts).compute(tensors, rows) for parts, tensors in zip(self._sums, self.tensors)]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    config = LlamaConfig(
        vocab_size=250,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=request.param,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    made = LlamaForCausalLM(config).float().eval()
    made.save_pretrained(path)
    return made, path


@pytest.fixture(scope="module")
def engine(model: tuple[LlamaForCausalLM, Path]) -> Iterator[VllmEngine]:
    engine = VllmEngine.from_model(model[1], EngineConfig(context=128, kv_cache_mib=32, device="cpu"))
    yield engine
    engine.close()


def randomise(model: LlamaForCausalLM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def source_of(model: tuple[LlamaForCausalLM, Path], layout: Layout, seed: int) -> RanksSource:
    randomise(model[0], seed)
    return RanksSource(model[0], load_any(model[1]).config, layout)


@pytest.mark.parametrize("verify", ["full", "sampled"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2), Layout(tp=4)], ids=str)
def test_weights_of_any_layout_reach_the_engine(
    model: tuple[LlamaForCausalLM, Path], engine: VllmEngine, layout: Layout, verify: str
) -> None:
    version = next(_VERSIONS)
    report = synchronise(source_of(model, layout, version), engine.weight_sink(), version=version, verify=verify)
    assert report.bytes == sum(p.numel() * 4 for p in model[0].parameters())
    prompts = [Prompt(id=i, tokens=np.random.default_rng(i).integers(3, 250, 5 + i).astype(np.int32)) for i in range(3)]
    for prompt, completion in zip(prompts, engine.generate(prompts, _GREEDY), strict=True):
        ids = torch.from_numpy(prompt.tokens.astype(np.int64))[None]
        found = model[0].generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, len(prompt.tokens) :]
        assert completion.tokens.tolist() == found.tolist()
        assert completion.version == version


def test_weights_of_another_dtype_are_refused_before_a_rank_sends(
    model: tuple[LlamaForCausalLM, Path], engine: VllmEngine
) -> None:
    """Over links, where bytes of another width would be read as something else; the engine goes on."""
    source, version = source_of(model, Layout(), 0), next(_VERSIONS)
    sink = engine.weight_sink()
    assert isinstance(sink, LinkedSink)
    sink.begin([dataclasses.replace(meta, dtype="bfloat16") for meta in source.metadata()], version)
    meeting = Meeting(place="file:///nowhere/store", senders=1, receivers=1, backend="gloo")
    seat = Seat(meeting=meeting, rank=1, held=source.layout(), wanted=sink.layouts()[0])
    with pytest.raises(SyncError, match="weights are bfloat16 in the trainer and float32 in the engine"):
        sink.expect(seat)
    assert engine.generate([Prompt(id=0, tokens=np.array([5], np.int32))], _GREEDY)[0].version == version - 1


def test_a_value_that_changed_on_the_way_is_named(model: tuple[LlamaForCausalLM, Path], engine: VllmEngine) -> None:
    """The trainer's checksum is of other values than those that the engine fetched. Last: the engine is lost by it."""
    version = next(_VERSIONS)
    source = source_of(model, Layout(tp=2), version)
    honest = source.checksums(Rows())
    source.tensors[1]["0.decoder.layers.2.mlp.linear_fc2.weight"][5, 7] += 1
    source.checksums = lambda rows: honest  # type: ignore[method-assign]
    with pytest.raises(SyncError, match=r"1 weights of version \d+ .* 'model\.layers\.2\.mlp\.down_proj\.weight'"):
        synchronise(source, engine.weight_sink(), version=version, verify="full")
    with pytest.raises(SyncError, match="interrupted"):
        engine.generate([Prompt(id=0, tokens=np.array([5], np.int32))], _GREEDY)
