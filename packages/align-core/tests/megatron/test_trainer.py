"""What the trainer refuses, and that a refused step leaves the weights alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron_llama import hugging_face_weights, ragged_batch
from safetensors.numpy import save_file

from align_core.config import (
    DpoLoss,
    GrpoLoss,
    OptimizerConfig,
    ParallelConfig,
    RewardLoss,
    SftLoss,
    TrainerConfig,
    TrainingConfig,
)
from align_core.contracts import SupportsOffload
from align_core.errors import AlignError, CheckpointError, ConfigError, DataError, LayoutError
from align_core.megatron import MegatronTrainer
from align_core.types import Batch, Head

CPU = TrainingConfig(device="cpu")


@pytest.fixture
def trainer(llama: Callable[..., Path]) -> MegatronTrainer:
    made = MegatronTrainer(TrainerConfig(model=llama(), steps=4, training=CPU))
    yield made
    made.close()


@pytest.mark.parametrize(
    ("parallel", "complaint"),
    [
        (ParallelConfig(tensor=3), "tensor parallel size 3 does not divide 4 attention heads; use 1, 2 or 4"),
        (ParallelConfig(pipeline=3), "pipeline parallel size 3 does not divide 2 layers; use 1 or 2"),
    ],
)
def test_an_impossible_layout_is_refused_with_the_possible_ones(
    llama: Callable[..., Path], parallel: ParallelConfig, complaint: str
) -> None:
    with pytest.raises(LayoutError, match=complaint):
        MegatronTrainer(TrainerConfig(model=llama(), parallel=parallel))


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent' is not a directory"):
        MegatronTrainer(TrainerConfig(model=tmp_path / "absent"))


def test_an_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="bert"):
        MegatronTrainer(TrainerConfig(model=tmp_path))


def test_a_damaged_model_is_refused_and_leaves_no_process_group(llama: Callable[..., Path], tmp_path: Path) -> None:
    weights = hugging_face_weights(llama())
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((llama() / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        MegatronTrainer(TrainerConfig(model=tmp_path, training=CPU))
    assert not torch.distributed.is_initialized()


def test_weights_that_are_not_finite_are_named_as_the_cause(llama: Callable[..., Path], tmp_path: Path) -> None:
    weights = hugging_face_weights(llama())
    weights["model.norm.weight"][0] = np.nan
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((llama() / "config.json").read_text())
    frozen = MegatronTrainer(TrainerConfig(model=tmp_path, trainable=False, training=CPU))
    with pytest.raises(AlignError, match=r"log-probs cannot be computed: .*finite"):
        frozen.logprobs(ragged_batch())
    frozen.close()


def test_a_warm_up_longer_than_the_stage_is_refused(llama: Callable[..., Path]) -> None:
    optimizer = OptimizerConfig(warmup_steps=10)
    with pytest.raises(ConfigError, match=r"warmup_steps 10 leaves none of the 10 steps .*; use at most 9"):
        MegatronTrainer(TrainerConfig(model=llama(), steps=10, optimizer=optimizer))


def test_a_sequence_longer_than_the_model_is_refused(trainer: MegatronTrainer) -> None:
    with pytest.raises(DataError, match="sequence 1 has 97 tokens; the model has 96 positions"):
        trainer.logprobs(Batch.of([[1, 2], np.zeros(97, np.int32)]))


def test_tokens_of_another_tokenizer_are_refused(trainer: MegatronTrainer) -> None:
    with pytest.raises(DataError, match="token ids reach from 5 to 301; the model knows 0 to 300"):
        trainer.logprobs(Batch.of([[5, 301]]))


def test_an_empty_batch_is_refused(trainer: MegatronTrainer) -> None:
    with pytest.raises(DataError, match="batch is empty"):
        trainer.logprobs(Batch.of([]))


def test_a_loss_for_another_head_is_refused(trainer: MegatronTrainer) -> None:
    with pytest.raises(ConfigError, match="RewardLoss needs a model with head 'score'"):
        trainer.step(ragged_batch(), RewardLoss())


def test_a_frozen_model_scores_but_does_not_step(llama: Callable[..., Path]) -> None:
    frozen = MegatronTrainer(TrainerConfig(model=llama(), trainable=False, training=CPU))
    assert frozen.logprobs(ragged_batch()).any()
    with pytest.raises(ConfigError, match="frozen"):
        frozen.step(ragged_batch(), SftLoss())
    frozen.close()


def test_steps_that_are_not_finite_are_skipped_until_they_are_too_many(trainer: MegatronTrainer) -> None:
    """Advantages of 1e30 are finite, and so is the loss; their squared gradient is not. A good step starts the count
    anew; three bad ones in a row leave the weights alone, the fourth ends the run."""
    before = trainer.logprobs(ragged_batch())
    huge = np.where(ragged_batch().mask, 1e30, 0).astype(np.float32)
    bad = ragged_batch().with_columns(tokens={"old_logprobs": before, "advantages": huge})
    first = trainer.step(bad, GrpoLoss())
    assert first["skipped"] == 1.0
    assert first["grad_norm"] == np.inf
    np.testing.assert_array_equal(trainer.logprobs(ragged_batch()), before)
    assert trainer.step(ragged_batch(), SftLoss())["skipped"] == 0.0
    after = trainer.logprobs(ragged_batch())
    assert (after != before).any()
    bad = bad.with_columns(tokens={"old_logprobs": after})
    assert [trainer.step(bad, GrpoLoss())["skipped"] for _ in range(3)] == [1.0, 1.0, 1.0]
    with pytest.raises(AlignError, match=r"gradient norm inf, after 3 skipped steps .*max_skipped is 3"):
        trainer.step(bad, GrpoLoss())
    np.testing.assert_array_equal(trainer.logprobs(ragged_batch()), after)


@pytest.mark.parametrize("head", ["lm", "score"])
def test_steps_whose_model_gives_nan_are_skipped_until_they_are_too_many(
    llama: Callable[..., Path], head: Head
) -> None:
    """One NaN in a norm's weight makes every log-prob and every score NaN."""
    model = llama(num_labels=1) if head == "score" else llama()
    trainer = MegatronTrainer(TrainerConfig(model=model, head=head, steps=5, training=CPU))
    batch, loss = ragged_batch(), RewardLoss() if head == "score" else SftLoss()
    labels = np.asarray([1.0, 0.0] * (len(batch) // 2) + [0.0] * (len(batch) % 2))
    batch = batch.with_columns(sequences={"label": labels, "group": np.arange(len(batch)) // 2})
    (norm,) = (weight for name, weight in trainer._chunks[0].named_parameters() if "final_layernorm" in name)
    norm.data[0] = torch.nan
    before = [weight.detach().clone() for weight in trainer._chunks[0].parameters()]
    steps = [trainer.step(batch, loss) for _ in range(3)]
    assert [step["skipped"] for step in steps] == [1.0, 1.0, 1.0]
    assert all(np.isnan(step["loss"]) for step in steps)
    with pytest.raises(AlignError, match=r"has loss nan .*after 3 skipped steps .*max_skipped is 3"):
        trainer.step(batch, loss)
    for weight, was in zip(trainer._chunks[0].parameters(), before):
        assert torch.equal(weight.nan_to_num(), was.nan_to_num())
    with pytest.raises(AlignError, match="cannot be computed"):
        trainer.evaluate(batch, loss)
    trainer.close()


def test_a_column_that_is_not_finite_stops_the_run_by_its_name(trainer: MegatronTrainer) -> None:
    before = trainer.logprobs(ragged_batch())
    old = before.copy()
    old[3] = np.nan
    batch = ragged_batch().with_columns(tokens={"old_logprobs": old, "advantages": np.ones_like(old)})
    with pytest.raises(AlignError, match="step 0: GrpoLoss cannot be computed: old_logprobs_N holds nan"):
        trainer.step(batch, GrpoLoss())
    np.testing.assert_array_equal(trainer.logprobs(ragged_batch()), before)


def test_the_first_dpo_loss_is_ln_2(trainer: MegatronTrainer) -> None:
    """Policy and reference are the same model, so chosen and rejected have the same reward, 0."""
    batch = ragged_batch()
    batch = batch.with_columns(tokens={"reference_logprobs": trainer.logprobs(batch)})
    metrics = trainer.step(batch, DpoLoss(beta=0.5))
    assert metrics["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert trainer.step(batch, DpoLoss(beta=0.5))["loss"] < np.log(2)


def test_the_first_grpo_update_has_ratio_1_and_raises_what_was_rewarded(trainer: MegatronTrainer) -> None:
    """Two groups of four; the even completions earn 1: their log-probs must rise against the odd ones'."""
    batch = ragged_batch(lengths=(9,) * 8)
    reward, group = np.asarray([1.0, 0.0] * 4), np.asarray([1] * 4 + [2] * 4)
    before = trainer.logprobs(batch)
    batch = batch.with_columns(
        tokens={"old_logprobs": before, "reference_logprobs": before}, sequences={"reward": reward, "group": group}
    )
    metrics = trainer.step(batch, GrpoLoss(kl_coef=0.1))
    assert metrics["kl"] == 0.0
    change = np.add.reduceat(np.where(batch.mask, trainer.logprobs(batch) - before, 0.0), batch.offsets[:-1])
    assert change[0::2].mean() > change[1::2].mean() + 1e-3


def test_closing_twice_does_nothing(llama: Callable[..., Path]) -> None:
    """Two models share a process; closing one leaves the other at work."""
    policy = MegatronTrainer(TrainerConfig(model=llama(), training=CPU))
    reference = MegatronTrainer(TrainerConfig(model=llama(), trainable=False, training=CPU))
    policy.close()
    policy.close()
    assert reference.logprobs(ragged_batch()).any()
    reference.close()


def test_offloading_changes_nothing(trainer: MegatronTrainer) -> None:
    """On CPU there is nowhere to go; test_gpu.py shows that a GPU is freed."""
    assert isinstance(trainer, SupportsOffload)
    first = trainer.logprobs(ragged_batch())
    trainer.offload()
    trainer.offload(False)
    np.testing.assert_array_equal(trainer.logprobs(ragged_batch()), first)
    trainer.step(ragged_batch(), SftLoss())
    trainer.reload()
    assert trainer.step(ragged_batch(), SftLoss())["grad_norm"] > 0
