"""Adapters against Hugging Face's model with the same ones written out, under every layout; merged on the way out."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron_llama import hugging_face, ragged_batch, reference_logprobs, without_rates
from megatron_world import run_ranks

from align_convert import load_any
from align_core.config import (
    LoraConfig,
    OptimizerConfig,
    ParallelConfig,
    SftLoss,
    TrainerConfig,
    TrainingConfig,
)
from align_core.errors import CheckpointError
from align_core.megatron import MegatronTrainer, RankContext

STEPS = 8
LORA = LoraConfig(rank=4, alpha=8.0)
LR = 0.02
LAYOUTS: dict[str, tuple[ParallelConfig, str]] = {
    "one": (ParallelConfig(), "none"),
    "one-recompute": (ParallelConfig(), "full"),
    "tp2": (ParallelConfig(tensor=2), "none"),
    "tp2-sp": (ParallelConfig(tensor=2, sequence=True), "selective"),
    "pp2": (ParallelConfig(pipeline=2), "none"),
    "dp2": (ParallelConfig(data=2), "none"),
}
# One adapter for each product of megatron-core: query, key and value share A, gate and up share A.
PRODUCTS = {
    "self_attn": [("q_proj", "k_proj", "v_proj"), ("o_proj",)],
    "mlp": [("gate_proj", "up_proj"), ("down_proj",)],
}
NAMES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@pytest.fixture(scope="module")
def reference(llama: Callable[..., Path]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and the merged weights after the last step."""
    return _reference(llama())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_train_as_written_out(
    llama: Callable[..., Path], tmp_path: Path, reference: tuple[list[float], dict[str, torch.Tensor]], layout: str
) -> None:
    parallel, recompute = LAYOUTS[layout]
    losses = run_ranks(_train, parallel, llama(), recompute, tmp_path / "out")[0]
    expected, weights = reference
    np.testing.assert_allclose(losses, expected, atol=1e-5, rtol=0)
    exported = load_any(tmp_path / "out")
    assert set(exported.tensors()) == set(weights)
    for name, value in weights.items():
        torch.testing.assert_close(exported.read_hf(name), value, atol=5e-5, rtol=0, msg=name)


def test_a_score_head_learns_beside_the_adapters(llama: Callable[..., Path]) -> None:
    trainer = MegatronTrainer(_config(llama(), ParallelConfig(), "none", head="score"))
    learning = [name for name, p in trainer._chunks[0].named_parameters() if p.requires_grad]
    trainer.close()
    assert "output_layer.weight" in learning
    assert len(learning) == 1 + 2 * 4 * 2  # and A and B of four products in two layers


def test_weights_leave_merged_and_follow_each_step(llama: Callable[..., Path]) -> None:
    """What an engine is sent is what the trainer computes with."""
    trainer = MegatronTrainer(_config(llama(), ParallelConfig(), "none"))
    for step in range(2):
        trainer.step(ragged_batch(seed=step), SftLoss())
        sent = {
            w.meta.name: np.frombuffer(w.data, np.float32).reshape(w.meta.shape) for w in trainer.weights().iterate()
        }
        model = hugging_face(llama())
        model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in sent.items()})
        with torch.no_grad():
            expected = reference_logprobs(model, ragged_batch()).numpy()
        np.testing.assert_allclose(trainer.logprobs(ragged_batch()), expected, atol=2e-5, rtol=0)
    trainer.close()


def test_adapters_continue_on_another_layout(llama: Callable[..., Path], tmp_path: Path) -> None:
    expected = run_ranks(_save, ParallelConfig(tensor=2), llama(), tmp_path / "saved")[0]
    found = run_ranks(_load, ParallelConfig(pipeline=2), llama(), tmp_path / "saved")[0]
    assert found == pytest.approx(expected, rel=2e-5)
    whole = MegatronTrainer(TrainerConfig(model=llama(), training=TrainingConfig(device="cpu")))
    with pytest.raises(CheckpointError, match=r"trained with lora\.rank 4, and lora\.rank is 0 here"):
        whole.load(tmp_path / "saved")
    whole.close()


def _config(directory: Path, parallel: ParallelConfig, recompute: str, head: str = "lm") -> TrainerConfig:
    return TrainerConfig(
        model=directory,
        head=head,  # type: ignore[arg-type]
        parallel=parallel,
        steps=STEPS,
        lora=LORA,
        optimizer=OptimizerConfig(lr=LR, eps=1e-5, schedule="constant"),
        training=TrainingConfig(micro_batch_tokens=48, device="cpu", recompute=recompute),  # type: ignore[arg-type]
    )


def _train(context: RankContext, directory: Path, recompute: str, out: Path) -> list[float]:
    trainer = MegatronTrainer(_config(directory, context.parallel, recompute), context)
    losses = [trainer.step(ragged_batch(seed=step), SftLoss())["loss"] for step in range(STEPS)]
    trainer.export(out)
    return losses


def _save(context: RankContext, directory: Path, path: Path) -> dict[str, float]:
    trainer = MegatronTrainer(_config(directory, context.parallel, "none"), context)
    for step in range(3):
        trainer.step(ragged_batch(seed=step), SftLoss())
    trainer.save(path, {})
    return without_rates(trainer.step(ragged_batch(seed=3), SftLoss()))


def _load(context: RankContext, directory: Path, path: Path) -> dict[str, float]:
    trainer = MegatronTrainer(_config(directory, context.parallel, "none"), context)
    trainer.load(path)
    return without_rates(trainer.step(ragged_batch(seed=3), SftLoss()))


def _reference(directory: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = hugging_face(directory).requires_grad_(False)
    frozen = dict(model.named_parameters())
    adapters: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer in range(2):
        drawn = iter(_drawn(directory, layer))
        for block, products in PRODUCTS.items():
            for names in products:
                a = next(drawn).requires_grad_()
                for name in names:
                    full = f"model.layers.{layer}.{block}.{name}.weight"
                    adapters[full] = (a, torch.zeros(len(frozen[full]), LORA.rank, requires_grad=True))
    learned = list({id(t): t for pair in adapters.values() for t in pair}.values())
    optimizer = torch.optim.AdamW(learned, lr=LR, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)

    def merged() -> dict[str, torch.Tensor]:
        return {
            name: value + LORA.alpha / LORA.rank * adapters[name][1] @ adapters[name][0] if name in adapters else value
            for name, value in frozen.items()
        }

    losses = []
    for step in range(STEPS):
        batch = ragged_batch(seed=step)
        weights = merged()
        optimizer.zero_grad()
        found = reference_logprobs(lambda ids, w=weights: torch.func.functional_call(model, w, (ids,)), batch)
        loss = -found[torch.from_numpy(batch.mask)].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: value.detach() for name, value in merged().items()}


def _drawn(directory: Path, layer: int) -> list[torch.Tensor]:
    """Our A of each product, which is drawn at random."""
    trainer = MegatronTrainer(_config(directory, ParallelConfig(), "none"))
    found = [trainer._chunks[0].decoder.layers[layer].get_submodule(name).lora_a.detach().clone() for name in NAMES]
    trainer.close()
    return found
