"""Saving and continuing: bit for bit on the same layout, to rounding on another, and refusals."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron_llama import ragged_batch, without_rates
from megatron_world import run_ranks

from align_core.config import Dtype, OptimizerConfig, ParallelConfig, SftLoss, TrainerConfig, TrainingConfig
from align_core.conformance import check_trainer
from align_core.errors import CheckpointError, ConfigError
from align_core.megatron import MegatronTrainer, RankContext

STATE = {"step": "2", "stage": "sft"}
LAYOUTS = {
    "one": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2),
    "pp2": ParallelConfig(pipeline=2),
    "dp2": ParallelConfig(data=2),
    "cp2": ParallelConfig(context=2),
    "vpp2": ParallelConfig(pipeline=2, virtual=2),
}


def test_the_trainer_meets_its_contract(llama: Callable[..., Path], tmp_path: Path) -> None:
    directory = llama()
    check_trainer(
        lambda: MegatronTrainer(TrainerConfig(model=directory, steps=3, training=TrainingConfig(device="cpu"))),
        batch=ragged_batch(),
        loss=SftLoss(),
        folder=tmp_path,
        tolerance=0.0,
    )


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *(("one", "float32"), ("tp2", "float32"), ("pp2", "float32"), ("dp2", "float32")),
        *(("tp2", "bfloat16"), ("dp2", "bfloat16")),
    ],
)
def test_a_continued_run_equals_an_uninterrupted_one(
    llama: Callable[..., Path], tmp_path: Path, layout: str, dtype: Dtype
) -> None:
    directory, parallel = llama(), LAYOUTS[layout]
    uninterrupted = run_ranks(_train_save_train, parallel, directory, tmp_path / "saved", dtype)[0]
    state, continued = run_ranks(_load_train, parallel, directory, tmp_path / "saved", dtype)[0]
    assert state == STATE
    assert continued == uninterrupted


@pytest.mark.parametrize(
    ("saved", "loaded", "tied"),
    [
        *(("tp2", "pp2", False), ("tp2", "pp2", True), ("pp2", "tp2", True), ("dp2", "one", False)),
        *(("one", "tp2", False), ("cp2", "dp2", True)),
    ],
)
def test_a_run_continues_on_another_layout(
    llama: Callable[..., Path], tmp_path: Path, saved: str, loaded: str, tied: bool
) -> None:
    """301 tokens are padded to 320 rows on one rank and 384 on two; the padding is not part of the model."""
    directory = llama(tie_word_embeddings=tied)
    expected = run_ranks(_train_save_train, LAYOUTS[saved], directory, tmp_path / "saved", "float32")[0]
    _, found = run_ranks(_load_train, LAYOUTS[loaded], directory, tmp_path / "saved", "float32")[0]
    for step, reference in zip(found, expected, strict=True):
        assert step == pytest.approx(reference, rel=2e-5)


@pytest.mark.parametrize(("saved", "loaded"), [("vpp2", "vpp2"), ("vpp2", "one"), ("tp2", "vpp2")])
def test_a_run_continues_on_and_from_interleaved_stages(
    llama: Callable[..., Path], tmp_path: Path, saved: str, loaded: str
) -> None:
    directory = llama(num_hidden_layers=4)
    expected = run_ranks(_train_save_train, LAYOUTS[saved], directory, tmp_path / "saved", "bfloat16")[0]
    _, found = run_ranks(_load_train, LAYOUTS[loaded], directory, tmp_path / "saved", "bfloat16")[0]
    for step, reference in zip(found, expected, strict=True):
        assert step == (reference if saved == loaded else pytest.approx(reference, rel=0.02))


def test_loading_goes_back_in_the_same_trainer(llama: Callable[..., Path], tmp_path: Path) -> None:
    """Step count, schedule and optimizer return with the weights."""
    trainer = MegatronTrainer(_config(llama(), LAYOUTS["one"]))
    _steps(trainer, 0, 2)
    trainer.save(tmp_path / "saved", STATE)
    first = _steps(trainer, 2, 4)
    trainer.load(tmp_path / "saved")
    assert _steps(trainer, 2, 4) == first
    trainer.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_goes_back_to_before_the_first_step(llama: Callable[..., Path], tmp_path: Path, dtype: Dtype) -> None:
    trainer = MegatronTrainer(_config(llama(), LAYOUTS["one"], dtype=dtype))
    trainer.save(tmp_path / "saved", STATE)
    first = _steps(trainer, 0, 3)
    trainer.load(tmp_path / "saved")
    assert _steps(trainer, 0, 3) == first
    trainer.close()


@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_a_checkpoint_written_beside_training_holds_the_moment_of_its_save(
    llama: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    """Two saves, each followed by steps; the first is complete when the second begins."""
    complete, expected = run_ranks(_save_beside, LAYOUTS[layout], llama(), tmp_path)[0]
    assert complete == [False, True]
    for number in (0, 1):
        _, found = run_ranks(_load_train, LAYOUTS[layout], llama(), tmp_path / f"saved_{number}", "float32")[0]
        assert found == expected[number]


def test_an_error_of_writing_beside_training_is_raised_to_who_waits(llama: Callable[..., Path], tmp_path: Path) -> None:
    trainer = MegatronTrainer(_config(llama(), LAYOUTS["one"], async_save=True))
    started = threading.Event()
    trainer._saving.start(lambda: _fail(started))
    assert started.wait(10)
    with pytest.raises(OSError, match="no room"):
        trainer.save(tmp_path / "saved", STATE)
    trainer.close()


def test_saving_again_replaces_the_checkpoint(llama: Callable[..., Path], tmp_path: Path) -> None:
    trainer = MegatronTrainer(_config(llama(), LAYOUTS["one"]))
    trainer.save(tmp_path / "saved", {"step": "0"})
    trainer.save(tmp_path / "saved", {"step": "1"})
    assert trainer.load(tmp_path / "saved") == {"step": "1"}
    trainer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_what_is_no_checkpoint_of_this_model_is_refused(llama: Callable[..., Path], tmp_path: Path) -> None:
    trainer = MegatronTrainer(_config(llama(), LAYOUTS["one"]))
    with pytest.raises(CheckpointError, match=r"absent' is not a checkpoint of a training run: it has no align\.json"):
        trainer.load(tmp_path / "absent")
    trainer.save(tmp_path / "saved", STATE)
    trainer.close()
    other = MegatronTrainer(_config(llama(num_hidden_layers=4), LAYOUTS["one"]))
    with pytest.raises(CheckpointError, match=r"of another model: 'model\.layers\.2\.input_layernorm\.weight'"):
        other.load(tmp_path / "saved")
    record = json.loads((tmp_path / "saved" / "align.json").read_text())
    (tmp_path / "saved" / "align.json").write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99; this version reads 2"):
        other.load(tmp_path / "saved")
    other.close()


def test_an_incomplete_checkpoint_is_refused(llama: Callable[..., Path], tmp_path: Path) -> None:
    trainer = MegatronTrainer(_config(llama(), LAYOUTS["one"]))
    trainer.save(tmp_path / "saved", STATE)
    (tmp_path / "saved" / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        trainer.load(tmp_path / "saved")
    trainer.close()


def test_a_frozen_model_has_nothing_to_save(llama: Callable[..., Path], tmp_path: Path) -> None:
    trainer = MegatronTrainer(_config(llama(), LAYOUTS["one"], trainable=False))
    with pytest.raises(ConfigError, match="frozen"):
        trainer.save(tmp_path / "saved", STATE)
    trainer.close()


def _config(
    directory: Path,
    parallel: ParallelConfig,
    *,
    dtype: Dtype = "float32",
    trainable: bool = True,
    async_save: bool = False,
) -> TrainerConfig:
    return TrainerConfig(
        model=directory,
        parallel=parallel,
        steps=6,
        trainable=trainable,
        optimizer=OptimizerConfig(lr=2e-3, eps=1e-5, weight_decay=0.1, warmup_steps=1),
        training=TrainingConfig(micro_batch_tokens=48, dtype=dtype, device="cpu", async_save=async_save),
    )


def _steps(trainer: MegatronTrainer, first: int, last: int) -> list[dict[str, float]]:
    return [without_rates(trainer.step(ragged_batch(seed=step), SftLoss())) for step in range(first, last)]


def _train_save_train(context: RankContext, directory: Path, path: Path, dtype: Dtype) -> list[dict[str, float]]:
    trainer = MegatronTrainer(_config(directory, context.parallel, dtype=dtype), context)
    _steps(trainer, 0, 2)
    trainer.save(path, STATE)
    return _steps(trainer, 2, 5)


def _load_train(
    context: RankContext, directory: Path, path: Path, dtype: Dtype
) -> tuple[dict[str, str], list[dict[str, float]]]:
    trainer = MegatronTrainer(_config(directory, context.parallel, dtype=dtype), context)
    state = dict(trainer.load(path))
    return state, _steps(trainer, 2, 5)


def _save_beside(
    context: RankContext, directory: Path, folder: Path
) -> tuple[list[bool], list[list[dict[str, float]]]]:
    """Whether the first checkpoint was there before and after the second save; the steps that follow each."""
    trainer = MegatronTrainer(_config(directory, context.parallel, async_save=True), context)
    complete, following = [(folder / "saved_0").exists()], []
    for number in (0, 1):
        if number:
            trainer.load(folder / "saved_0")
            trainer.step(ragged_batch(seed=9), SftLoss())
        else:
            _steps(trainer, 0, 2)
        trainer.save(folder / f"saved_{number}", STATE)
        if number:
            complete.append((folder / "saved_0").exists())
        following.append(_steps(trainer, 2, 5))
    trainer.finish_saving()
    trainer.close()
    return complete, following


def _fail(started: threading.Event) -> None:
    started.set()
    raise OSError("no room")
