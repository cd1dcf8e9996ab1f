"""The scalar head: against Hugging Face's sequence classification, and what a language model becomes under it."""

from collections.abc import Callable
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron_llama import LENGTHS, ragged_batch
from megatron_world import run_ranks
from numpy.typing import NDArray

from align_core.config import OptimizerConfig, ParallelConfig, RewardLoss, TrainerConfig, TrainingConfig
from align_core.errors import ConfigError
from align_core.megatron import MegatronTrainer, RankContext
from align_core.types import Batch

SCORE = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
GROUP = (1, 1, 1, 2, 2, 2, 3, 3)
LABEL = (0.0, 1.0, 0.5, 3.0, 3.0, 1.0, -1.0, 0.0)
STEPS = 3


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(tensor=2),
        ParallelConfig(tensor=2, sequence=True),
        ParallelConfig(pipeline=2),
        ParallelConfig(context=2),
        ParallelConfig(tensor=2, data=2),
    ],
    ids=["one", "tp2", "tp2-sp", "pp2", "cp2", "tp2-dp2"],
)
def test_a_reward_model_scores_and_trains_as_hugging_face(llama: Callable[..., Path], parallel: ParallelConfig) -> None:
    directory = llama(**SCORE)
    scores, losses, norms = run_ranks(_train_rank, parallel, directory)[0]
    expected_scores, expected_losses, expected_norms = _reference_run(directory)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5, rtol=0)
    np.testing.assert_allclose(losses, expected_losses, atol=1e-5, rtol=0)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_language_model_gets_a_head_of_zeros(llama: Callable[..., Path], tied: bool) -> None:
    """All scores are 0, so every pair costs -log sigmoid(0) = ln 2; one update of the head already lowers that."""
    trainer = MegatronTrainer(_config(llama(tie_word_embeddings=tied), ParallelConfig()))
    assert trainer.scores(_batch()).tolist() == [0.0] * len(LENGTHS)
    first = trainer.step(_batch(), RewardLoss())
    assert first["loss"] == pytest.approx(log(2), abs=1e-6)
    assert first["accuracy"] == 0.0
    assert trainer.step(_batch(), RewardLoss())["loss"] < log(2) - 0.005
    trainer.close()


def test_a_reward_model_continues_from_what_it_saved(llama: Callable[..., Path], tmp_path: Path) -> None:
    """The head has one row where a language model has its vocabulary."""
    directory, saved = llama(**SCORE), tmp_path / "saved"
    first = run_ranks(_save_rank, ParallelConfig(tensor=2), directory, saved)[0]
    again = run_ranks(_load_rank, ParallelConfig(), directory, saved)[0]
    np.testing.assert_allclose(again, first, atol=1e-5, rtol=0)


def _save_rank(context: RankContext, directory: Path, saved: Path) -> list[float]:
    trainer = MegatronTrainer(_config(directory, context.parallel), context)
    trainer.step(_batch(), RewardLoss())
    trainer.save(saved, {})
    return [trainer.step(_batch(), RewardLoss())["loss"] for _ in range(2)]


def _load_rank(context: RankContext, directory: Path, saved: Path) -> list[float]:
    trainer = MegatronTrainer(_config(directory, context.parallel), context)
    trainer.load(saved)
    return [trainer.step(_batch(), RewardLoss())["loss"] for _ in range(2)]


def test_heads_are_not_taken_for_each_other(llama: Callable[..., Path]) -> None:
    reward = llama(**SCORE)
    with pytest.raises(ConfigError, match="holds a reward model; load it with head 'score'"):
        MegatronTrainer(TrainerConfig(model=reward))
    trainer = MegatronTrainer(_config(reward, ParallelConfig()))
    with pytest.raises(ConfigError, match="log-probs need a model with head 'lm'; this one has 'score'"):
        trainer.logprobs(_batch())
    trainer.close()


def _batch() -> Batch:
    return ragged_batch().with_columns(sequences={"group": np.asarray(GROUP), "label": np.asarray(LABEL, np.float32)})


def _config(directory: Path, parallel: ParallelConfig) -> TrainerConfig:
    return TrainerConfig(
        model=directory,
        head="score",
        parallel=parallel,
        steps=STEPS,
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-5, schedule="constant"),
        training=TrainingConfig(micro_batch_tokens=48, device="cpu"),
    )


def _train_rank(context: RankContext, directory: Path) -> tuple[NDArray[np.float32], list[float], list[float]]:
    trainer = MegatronTrainer(_config(directory, context.parallel), context)
    scores = trainer.scores(_batch())
    steps = [trainer.step(_batch(), RewardLoss()) for _ in range(STEPS)]
    return scores, [step["loss"] for step in steps], [step["grad_norm"] for step in steps]


def _reference_run(directory: Path) -> tuple[NDArray[np.float32], list[float], list[float]]:
    """transformers, torch's AdamW, and -log sigmoid over the six pairs with different labels."""
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    pairs = [(1, 0), (1, 2), (2, 0), (3, 5), (4, 5), (7, 6)]
    sequences = np.split(_batch().tokens.astype(np.int64), _batch().offsets[1:-1])

    def scores() -> torch.Tensor:
        return torch.cat([model(torch.from_numpy(tokens)[None]).logits[0] for tokens in sequences])

    with torch.no_grad():
        first = scores().numpy()
    losses, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        found = scores()
        loss = torch.stack([-torch.nn.functional.logsigmoid(found[i] - found[j]) for i, j in pairs]).mean()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    return first, losses, norms
