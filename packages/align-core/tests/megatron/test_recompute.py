"""Selective recompute: the numbers without it, and what is forgotten is really gone in between.

Bit for bit, but for norms: torch's RMSNorm on CPU is several operations, whose gradients are added up before the
residual's with recompute, and after it without. The first loss has seen no gradient: equal to the bit there too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from megatron_llama import ragged_batch
from megatron_world import run_ranks

from align_core.config import (
    LoraConfig,
    OptimizerConfig,
    ParallelConfig,
    RecomputeModule,
    SftLoss,
    TrainerConfig,
    TrainingConfig,
)
from align_core.megatron import MegatronTrainer, RankContext

MODULES: list[tuple[RecomputeModule, ...]] = [
    ("activation",),
    ("mlp",),
    ("norm",),
    ("attention",),
    ("mlp", "norm", "attention"),
]
READERS = {
    "norm": ("self_attention.linear_qkv", "mlp.linear_fc1"),
    "attention": ("self_attention.linear_proj",),
    "activation": ("mlp.linear_fc2",),
    "mlp": ("mlp.linear_fc2",),
}


def train(
    context: RankContext | None, directory: Path, modules: tuple[RecomputeModule, ...], lora: int = 0
) -> list[dict[str, float]]:
    training = (
        TrainingConfig(device="cpu", micro_batch_tokens=48, recompute="selective", recompute_modules=modules)
        if modules
        else TrainingConfig(device="cpu", micro_batch_tokens=48)
    )
    config = TrainerConfig(
        model=directory,
        parallel=context.parallel if context else ParallelConfig(),
        steps=3,
        optimizer=OptimizerConfig(lr=1e-3, schedule="constant", eps=1e-5),
        training=training,
        lora=LoraConfig(rank=lora),
    )
    trainer = MegatronTrainer(config, context)
    try:
        batch = ragged_batch(seed=0, lengths=(5, 17, 9, 20, 12, 6))
        found = [trainer.step(batch, SftLoss()) for _ in range(3)]
    finally:
        trainer.close()
    return [{name: step[name] for name in ("loss", "grad_norm")} for step in found]


def compare(found: list[dict[str, float]], expected: list[dict[str, float]], *, exact: bool) -> None:
    if exact:
        assert found == expected
    assert found[0]["loss"] == expected[0]["loss"]
    for step, other in zip(found, expected, strict=True):
        assert step == pytest.approx(other, rel=1e-5)


@pytest.fixture(scope="module")
def kept(llama: Callable[..., Path]) -> dict[int, list[dict[str, float]]]:
    """By rank of adapters, the steps without recompute."""
    return {lora: train(None, llama(), (), lora) for lora in (0, 2)}


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("modules", MODULES, ids="+".join)
def test_steps_equal_those_that_keep_everything(
    llama: Callable[..., Path], kept: dict[int, list[dict[str, float]]], modules: tuple[RecomputeModule, ...], lora: int
) -> None:
    compare(train(None, llama(), modules, lora), kept[lora], exact="norm" not in modules)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [ParallelConfig(tensor=2, sequence=True), ParallelConfig(pipeline=2)], ids=str)
def test_steps_are_equal_over_ranks(llama: Callable[..., Path], parallel: ParallelConfig) -> None:
    everything, nothing = run_ranks(_both, parallel, llama())[0]
    compare(everything, nothing, exact=False)


@pytest.mark.parametrize("module", list(READERS))
def test_outputs_are_gone_after_the_forward_pass(
    llama: Callable[..., Path], module: RecomputeModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes behind what the readers were given, looked at when the layer ends."""
    left: dict[str, list[int]] = {}
    monkeypatch.setattr(MegatronTrainer, "_read", _watched(MegatronTrainer._read, left))
    train(None, llama(), (module,))
    gone = {reader for reader, sizes in left.items() if set(sizes) == {0}}
    kept = {reader for reader, sizes in left.items() if 0 not in sizes}
    assert gone == set(READERS[module])
    assert gone | kept == {reader for readers in READERS.values() for reader in readers}


def _both(context: RankContext, directory: Path) -> tuple[Any, Any]:
    return train(context, directory, MODULES[-1]), train(context, directory, ())


def _watched(read: Any, left: dict[str, list[int]]) -> Any:
    """The trainer's method before its forward pass, which hangs the watchers up once."""

    def method(trainer: Any, *arguments: Any, **settings: Any) -> Any:
        if not left:
            for layer in trainer._chunks[0].decoder.layers:
                _watch(layer, left)
        return read(trainer, *arguments, **settings)

    return method


def _watch(layer: Any, left: dict[str, list[int]]) -> None:
    seen: dict[str, Any] = {}
    for name in {name for readers in READERS.values() for name in readers}:
        left.setdefault(name, [])

        def note(module: Any, inputs: Any, name: str = name) -> None:
            seen[name] = inputs[0]

        layer.get_submodule(name).register_forward_pre_hook(note)

    def look(*_: Any) -> None:
        for name, tensor in seen.items():
            left[name].append(tensor.untyped_storage().size())
        seen.clear()

    layer.register_forward_hook(look)
