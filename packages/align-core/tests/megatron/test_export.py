"""Exported checkpoints, read back by align_convert."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron_llama import hugging_face_weights, ragged_batch
from megatron_world import run_ranks
from numpy.typing import NDArray

from align_convert import load_any
from align_convert.cli import main as convert
from align_core.config import ParallelConfig, SftLoss, TrainerConfig, TrainingConfig
from align_core.megatron import MegatronTrainer, RankContext
from align_core.types import Head

CPU = TrainingConfig(device="cpu")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(), ParallelConfig(tensor=2), ParallelConfig(pipeline=2), ParallelConfig(tensor=2, data=2)],
    ids=["one", "tp2", "pp2", "tp2-dp2"],
)
def test_an_exported_model_is_bit_equal_to_the_loaded_one(
    llama: Callable[..., Path], tmp_path: Path, parallel: ParallelConfig, tied: bool
) -> None:
    directory = llama(tie_word_embeddings=tied)
    run_ranks(_export_rank, parallel, directory, tmp_path / "out", "lm")
    exported = load_any(tmp_path / "out")
    exported.check()
    expected = hugging_face_weights(directory)
    assert set(exported.tensors()) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(exported.read_hf(name).numpy(), values)
    assert exported.config.head == "lm"
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"carried as it is"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_exported_reward_model_says_so_and_loads_again(llama: Callable[..., Path], tmp_path: Path) -> None:
    run_ranks(_export_rank, ParallelConfig(tensor=2), llama(), tmp_path / "out", "score")
    exported = load_any(tmp_path / "out")
    assert exported.config.head == "score"
    assert exported.config.hf["architectures"] == ["LlamaForSequenceClassification"]
    assert not exported.read_hf("score.weight").any()
    assert "lm_head.weight" not in exported.tensors()
    trainer = MegatronTrainer(TrainerConfig(model=tmp_path / "out", head="score", trainable=False, training=CPU))
    assert trainer.scores(ragged_batch()).shape == (8,)
    trainer.close()


@pytest.mark.parametrize(
    "options",
    [("--tp", "2", "--pp", "2"), ("--tp", "2", "--names", "te"), ("--format", "torch_dist")],
    ids=["mp_rank-tp2-pp2", "mp_rank-te-names", "torch_dist"],
)
def test_megatron_directories_are_loaded_as_they_are(
    llama: Callable[..., Path], tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Whatever their format and layout, under another layout here."""
    assert convert(["to-megatron", str(llama()), str(tmp_path / "megatron"), *options]) == 0
    found = run_ranks(_logprobs_rank, ParallelConfig(pipeline=2), tmp_path / "megatron")[0]
    np.testing.assert_array_equal(found, run_ranks(_logprobs_rank, ParallelConfig(pipeline=2), llama())[0])


def test_a_trained_model_scores_alike_after_export(llama: Callable[..., Path], tmp_path: Path) -> None:
    trainer = MegatronTrainer(TrainerConfig(model=llama(), steps=1, training=CPU))
    trainer.step(ragged_batch(), SftLoss())
    expected = trainer.logprobs(ragged_batch())
    trainer.export(tmp_path / "out")
    trainer.close()
    again = MegatronTrainer(TrainerConfig(model=tmp_path / "out", trainable=False, training=CPU))
    np.testing.assert_array_equal(again.logprobs(ragged_batch()), expected)
    again.close()


def _export_rank(context: RankContext, directory: Path, out: Path, head: Head) -> None:
    config = TrainerConfig(
        model=directory,
        head=head,
        parallel=context.parallel,
        trainable=False,
        training=CPU,
    )
    MegatronTrainer(config, context).export(out)


def _logprobs_rank(context: RankContext, directory: Path) -> NDArray[np.float32]:
    config = TrainerConfig(model=directory, parallel=context.parallel, trainable=False, training=CPU)
    return MegatronTrainer(config, context).logprobs(ragged_batch())
