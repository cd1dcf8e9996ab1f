"""Layers of Transformer Engine: when they are chosen, and that megatron-core's wrappers of them fit our models.

Transformer Engine cannot be installed where these tests run. Megatron-core's own wrapper classes run over a stand-in
package (`standin/`) that checks every argument and computes with torch; so names, shapes, the packed layout and
checkpoints are shown, and nothing about Transformer Engine's kernels.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron_llama import ragged_batch, reference_logprobs
from megatron_world import run_ranks
from transformers import AutoModelForCausalLM

from align_convert.cli import main as convert
from align_core.config import (
    LoraConfig,
    OptimizerConfig,
    ParallelConfig,
    SftLoss,
    TrainerConfig,
    TrainingConfig,
)
from align_core.errors import ConfigError
from align_core.megatron import MegatronTrainer, RankContext, transformer_engine

STANDIN = Path(__file__).parent / "standin"
STEPS = 3
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16}  # has norms that are not fused


def config(model: Path, parallel: ParallelConfig | None = None, **training: Any) -> TrainerConfig:
    return TrainerConfig(
        model=model,
        parallel=parallel or ParallelConfig(),
        steps=STEPS + 1,
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-5, schedule="constant"),
        training=TrainingConfig(device="cpu", micro_batch_tokens=48, **training),
    )


def test_torch_is_the_default(llama: Callable[..., Path]) -> None:
    assert TrainingConfig().layers == "torch"
    trainer = MegatronTrainer(config(llama()))
    assert type(trainer._chunks[0].decoder.layers[0].mlp.linear_fc1).__name__ == "ColumnParallelLinear"
    trainer.close()


def test_asked_for_and_absent_names_the_remedy(llama: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"not installed: pip install .*transformer_engine.*set training.layers to"):
        MegatronTrainer(config(llama(), layers="transformer_engine"))


def test_auto_falls_back_to_torch(llama: Callable[..., Path]) -> None:
    MegatronTrainer(config(llama(), layers="auto")).close()


@pytest.mark.parametrize(
    ("changes", "training", "obstacle"),
    [
        ({}, {}, "needs a CUDA device, and the model is on 'cpu'"),
        ({"lora": LoraConfig(rank=2)}, {}, "set lora.rank to 0"),
        ({}, {"recompute": "selective", "recompute_modules": ("norm", "mlp")}, "leave 'norm' out"),
    ],
)
def test_what_it_cannot_do_is_said(
    llama: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    training: dict[str, Any],
    obstacle: str,
) -> None:
    monkeypatch.setattr(transformer_engine, "_PACKAGE", "torch")  # one that is installed
    if changes or training:
        monkeypatch.setattr(transformer_engine, "_DEVICES", ("cpu",))
    wanted = config(llama(), layers="transformer_engine", **training)
    with pytest.raises(ConfigError, match=obstacle):
        MegatronTrainer(TrainerConfig(**{**vars(wanted), **changes}))


def test_weights_are_known_by_their_plain_names() -> None:
    fused = "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight"
    assert transformer_engine.plain_name(fused) == "decoder.layers.3.input_layernorm.weight"
    fused = "decoder.layers.3.mlp.linear_fc1.layer_norm_weight"
    assert transformer_engine.plain_name(fused) == "decoder.layers.3.pre_mlp_layernorm.weight"
    for plain in ("decoder.layers.3.mlp.linear_fc1.weight", "decoder.final_layernorm.weight"):
        assert transformer_engine.plain_name(plain) == plain


@pytest.mark.slow
def test_fused_layers_train_as_torch(llama: Callable[..., Path], tmp_path: Path) -> None:
    """Same log-probs, losses and norms; each continues from the other's checkpoint; the export is a model as ever."""
    model = llama(**QWEN3)
    parallel = ParallelConfig(tensor=2, sequence=True)
    training = {"recompute": "selective", "recompute_modules": ["mlp"]}
    plain = run_ranks(_train, parallel, model, tmp_path / "plain", None)[0]
    found = _fused(model, parallel, training, tmp_path / "fused", tmp_path / "plain")
    expected_layers = ["TELayerNormColumnParallelLinear", "TERowParallelLinear"] * 2 + ["TEDotProductAttention"]
    assert found["layers"].tolist() == expected_layers
    for name, tolerance in (("first", 1e-5), ("losses", 1e-5), ("last", 2e-5), ("next", 1e-5), ("again", 1e-5)):
        np.testing.assert_allclose(found[name], plain[name], atol=tolerance, rtol=0, err_msg=name)
    np.testing.assert_allclose(found["norms"], plain["norms"], rtol=1e-4)
    continued = run_ranks(_train, parallel, model, tmp_path / "plain2", tmp_path / "fused" / "saved")[0]
    assert continued["again"] == pytest.approx(float(found["next"]), abs=1e-5)
    assert convert(["to-hf", str(tmp_path / "fused" / "exported"), str(tmp_path / "hf")]) == 0
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
        scored = reference_logprobs(exported, ragged_batch()).numpy()
    np.testing.assert_allclose(scored, found["last"], atol=2e-5, rtol=0)


def _fused(model: Path, parallel: ParallelConfig, training: dict[str, Any], out: Path, continued: Path) -> Any:
    """What `standin/train.py` found; `continued` holds the checkpoint that it goes on from at the end."""
    out.mkdir()
    sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "sequence": parallel.sequence}
    settings = {"model": str(model), "out": str(out), "continued": str(continued / "saved")}
    file = out / "settings.json"
    file.write_text(json.dumps({**settings, "parallel": sizes, "training": training}))
    command = [sys.executable, "-W", "ignore", str(STANDIN / "train.py"), str(file)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank)],
            env={**os.environ, "PYTHONPATH": f"{STANDIN}{os.pathsep}{STANDIN.parent}"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(parallel.world_size)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
    return np.load(out / "found.npz")


def _train(context: RankContext, model: Path, out: Path, continued: Path | None) -> dict[str, Any]:
    """The same with torch's layers."""
    trainer = MegatronTrainer(config(model, context.parallel), context)
    found: dict[str, Any] = {"first": trainer.logprobs(ragged_batch())}
    steps = [trainer.step(ragged_batch(seed=step), SftLoss()) for step in range(STEPS)]
    found |= {"losses": [step["loss"] for step in steps], "norms": [step["grad_norm"] for step in steps]}
    found["last"] = trainer.logprobs(ragged_batch())
    trainer.save(out / "saved", {})
    found["next"] = trainer.step(ragged_batch(seed=STEPS), SftLoss())["loss"]
    trainer.load(continued or out / "saved")
    found["again"] = trainer.step(ragged_batch(seed=STEPS), SftLoss())["loss"]
    return found
