"""The plan of a stage: right numbers, the errors of the stage itself, and nothing touched."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align_core.cli import main
from align_core.config import LoraConfig, ParallelConfig, TrainingConfig
from align_core.errors import AlignError
from align_core.memory import model_memory
from align_core.model_shape import ModelShape, read_model_shape
from align_core.stages.dry_run import plan_lines

LLAMA_2_7B = ModelShape(
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=32,
    head_dim=128,
    ffn=11008,
    vocab=32000,
    max_positions=4096,
    tied_embeddings=False,
)


# Peaks in GiB on an H200 (benchmarks/results/training.md): layers of the 7B shape, tokens a micro-batch, recompute.
MEASURED = [
    (8, 8192, "none", 40.9),
    (8, 16384, "none", 50.0),
    (8, 4096, "none", 36.3),
    (16, 8192, "none", 76.1),
    (16, 8192, "selective", 73.4),
    (16, 16384, "full", 63.6),
    (32, 4096, "selective", 127.1),
]


@pytest.mark.parametrize(("layers", "tokens", "recompute", "gib"), MEASURED)
def test_estimate_is_near_the_measured_peak(layers: int, tokens: int, recompute: Any, gib: float) -> None:
    training = TrainingConfig(dtype="bfloat16", micro_batch_tokens=tokens, recompute=recompute)
    shape = dataclasses.replace(LLAMA_2_7B, layers=layers)
    assert model_memory(shape, parallel=ParallelConfig(), training=training).total / 2**30 == pytest.approx(
        gib, rel=0.03
    )


def test_adapters_alone_have_gradients_and_optimizer_state() -> None:
    """Rank 2 on the 7B shape: (4 x 4096) + (2 x 4096) + (4096 + 2 x 11008) + (11008 + 4096) = 65,792 a layer
    and rank, so 2 x 32 x 65,792 = 4,210,688 in all."""
    training, lora = TrainingConfig(dtype="bfloat16"), LoraConfig(rank=2)
    memory = model_memory(LLAMA_2_7B, parallel=ParallelConfig(), training=training, lora=lora)
    assert memory.gradients == 4 * 4_210_688
    assert memory.optimizer == 12 * 4_210_688
    assert memory.weights == 2 * LLAMA_2_7B.parameters()


def test_optimizer_is_shared_by_data_parallel_ranks() -> None:
    training = TrainingConfig(dtype="bfloat16")
    one, four = (model_memory(LLAMA_2_7B, parallel=ParallelConfig(data=n), training=training).optimizer for n in (1, 4))
    assert one == 4 * four


def test_parameters_of_known_models() -> None:
    """Llama-2-7B has 6,738,415,616; with a score head, the output matrix (32,000 x 4,096) gives way to 4,096."""
    assert LLAMA_2_7B.parameters() == 6_738_415_616
    assert LLAMA_2_7B.parameters(head="score") == 6_738_415_616 - 32000 * 4096 + 4096


def test_sizes_are_read_from_either_form(tiny_model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = read_model_shape(tiny_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    assert shape.parameters() == sum(weight.numel() for weight in model.parameters())


def test_memory_by_hand() -> None:
    """bfloat16 on one device: 2 + 4 + 8 + 4 bytes a weight; tensor parallel halves them."""
    training = TrainingConfig(dtype="bfloat16", micro_batch_tokens=1)
    whole = model_memory(LLAMA_2_7B, parallel=ParallelConfig(), training=training)
    weights = LLAMA_2_7B.parameters()
    assert (whole.weights, whole.gradients, whole.optimizer) == (2 * weights, 4 * weights, 12 * weights)
    half = model_memory(LLAMA_2_7B, parallel=ParallelConfig(tensor=2), training=training)
    assert half.weights == pytest.approx(weights, rel=1e-6)
    frozen = model_memory(LLAMA_2_7B, parallel=ParallelConfig(), training=training, trainable=False)
    assert (frozen.gradients, frozen.optimizer) == (0, 0)
    assert frozen.activations < whole.activations


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto", "grpo", "rlhf", "online-dpo"])
def test_every_training_stage_has_a_plan_and_touches_nothing(
    stage: str, make_config: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(stage)
    before = sorted(tmp_path.rglob("*"))
    words = ["--model", str(config.model), "--data", str(config.data), "--out", str(config.out), "--steps", "5"]
    extra = ["--reward", "math"] if stage == "rlhf" else []
    assert main([stage, *words, "--batch_size", "4", "--max_length", "64", "--dry-run", *extra]) == 0
    shown = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert "nothing is started or written" in shown
    for text in ("placement:", "10 records", "5 of 4 records: 2.00 epochs", "memory per GPU", "bytes written"):
        assert text in shown, shown


def test_plan_says_what_the_stage_would_say(make_config: Callable[..., Any], tmp_path: Path) -> None:
    for changes, message in (
        ({"data": tmp_path / "nowhere"}, "data file '.*nowhere' does not exist"),
        ({"max_length": 4096}, "max_length 4096 is beyond the 256 positions"),
        ({"batch_size": 12}, "10 records are fewer than a batch of 12"),
    ):
        with pytest.raises(AlignError, match=message):
            plan_lines(make_config("sft", **changes))


def test_reference_beside_the_model_is_counted(make_config: Callable[..., Any]) -> None:
    once, step = (dict(plan_lines(make_config("dpo", reference=how))) for how in ("once", "step"))
    assert "memory per GPU, frozen reference" not in once
    assert "memory per GPU, frozen reference" in step


def test_tokenizer_of_another_model_is_told(make_config: Callable[..., Any], tmp_path: Path) -> None:
    """A config with a smaller vocabulary beside the tokenizer."""
    config = make_config("sft")
    other = tmp_path / "other"
    other.mkdir()
    for file in config.model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    raw = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**raw, "vocab_size": 100}))
    with pytest.raises(AlignError, match=r"has \d+ tokens, the model only 100; use the tokenizer that belongs"):
        plan_lines(make_config("sft", model=other))
