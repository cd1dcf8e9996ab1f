"""One rank that trains on layers of (a stand-in for) Transformer Engine; run by test_transformer_engine.py.

    python train.py SETTINGS.json RANK

A process of its own, because megatron-core decides at import whether Transformer Engine is there.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from megatron_llama import ragged_batch

from align_core.config import OptimizerConfig, ParallelConfig, SftLoss, TrainerConfig, TrainingConfig
from align_core.megatron import MegatronTrainer, init_rank, transformer_engine

STEPS = 3


def main() -> None:
    """Score, train, save, export; rank 0 writes what it found to OUT/found.npz."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    parallel = ParallelConfig(**settings["parallel"])
    _accept_cpu()
    context = init_rank(
        parallel=parallel,
        rank=int(sys.argv[2]),
        rendezvous=f"file://{settings['out']}/store",
        device="cpu",
        seed=0,
        timeout_s=60,
    )
    config = TrainerConfig(
        model=Path(settings["model"]),
        parallel=parallel,
        steps=STEPS + 1,
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-5, schedule="constant"),
        training=TrainingConfig(
            device="cpu", micro_batch_tokens=48, layers="transformer_engine", **settings["training"]
        ),
    )
    trainer = MegatronTrainer(config, context)
    found: dict[str, Any] = {"layers": _layers(trainer)}
    found["first"] = trainer.logprobs(ragged_batch())
    steps = [trainer.step(ragged_batch(seed=step), SftLoss()) for step in range(STEPS)]
    found["losses"] = [step["loss"] for step in steps]
    found["norms"] = [step["grad_norm"] for step in steps]
    found["last"] = trainer.logprobs(ragged_batch())
    out = Path(settings["out"])
    trainer.save(out / "saved", {})
    trainer.export(out / "exported")
    found["next"] = trainer.step(ragged_batch(seed=STEPS), SftLoss())["loss"]
    trainer.load(Path(settings["continued"]) if settings["continued"] else out / "saved")
    found["again"] = trainer.step(ragged_batch(seed=STEPS), SftLoss())["loss"]
    if context.rank == 0:
        np.savez(out / "found.npz", **found)
    trainer.close()


def _accept_cpu() -> None:
    """Two places know that Transformer Engine is for CUDA: our check, and megatron-core's choice of a device."""
    from megatron.core.extensions import transformer_engine as wrappers

    transformer_engine._DEVICES = ("cuda", "cpu")
    wrappers._get_extra_te_kwargs = lambda config: {"params_dtype": config.params_dtype, "device": "cpu"}


def _layers(trainer: Any) -> list[str]:
    layer = trainer._chunks[0].decoder.layers[0]
    places = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    engine = layer.self_attention.core_attention.engine
    return [type(layer.get_submodule(place)).__name__ for place in places] + [type(engine).__name__]


if __name__ == "__main__":
    main()
