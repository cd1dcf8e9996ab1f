"""The plan of a stage: right numbers, the errors of the stage itself, and nothing touched."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align_core.cli import main
from align_core.config import ClusterConfig, EngineConfig, ParallelConfig, SamplingConfig, TrainingConfig
from align_core.errors import AlignError, CheckpointError, ConfigError
from align_core.model_shape import read_model_shape
from align_core.stages.dry_run import plan_lines
from align_core.stages.grpo import run_grpo
from align_core.stages.online_dpo import run_online_dpo
from align_core.stages.rlhf import run_rlhf

RUN: dict[str, Callable[..., None]] = {"grpo": run_grpo, "online-dpo": run_online_dpo, "rlhf": run_rlhf}


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever these tests run."""
    for module in ("dry_run", "preflight"):
        monkeypatch.setattr(f"align_core.stages.{module}.cuda_gpus", lambda: 0)


def test_sizes_are_read_from_either_form(tiny_model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = read_model_shape(tiny_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    assert shape.parameters() == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto", "grpo", "rlhf", "online-dpo"])
def test_every_training_stage_has_a_plan_and_touches_nothing(
    stage: str, make_config: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(stage)
    before = sorted(tmp_path.rglob("*"))
    words = ["--model", str(config.model), "--data", str(config.data), "--out", str(config.out), "--steps", "5"]
    samples = stage in ("grpo", "rlhf", "online-dpo")
    extra = ["--reward", "math", "--engine.context", "64", "--sampling.max_tokens", "8"] if samples else []
    assert main([stage, *words, "--batch_size", "4", "--max_length", "64", "--dry-run", *extra]) == 0
    shown = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert "nothing is started or written" in shown
    for text in ("placement:", "10 records", "5 of 4 records: 2.00 epochs", "memory per process", "bytes written"):
        assert text in shown, shown
    assert ("engine: vllm: 1 rank " in shown) == samples
    assert "GPU" not in shown, shown


def test_plan_says_what_the_stage_would_say(make_config: Callable[..., Any], tmp_path: Path) -> None:
    for changes, message in (
        ({"data": tmp_path / "nowhere"}, "data file '.*nowhere' does not exist"),
        ({"max_length": 4096}, "max_length 4096 is beyond the 256 positions"),
        ({"batch_size": 12}, "10 records are fewer than a batch of 12"),
        (
            {"parallel": ParallelConfig(tensor=3)},
            "tensor parallel size 3 does not divide 4 attention heads; use 1, 2 or 4",
        ),
        ({"trackers": ["wandbb"]}, "unknown tracker 'wandbb'; did you mean 'wandb'"),
        ({"parallel": ParallelConfig(pipeline=5)}, "pipeline parallel size 5 does not divide"),
    ):
        with pytest.raises(AlignError, match=message):
            plan_lines(make_config("sft", **changes))


REFUSED = {
    "tensor": ({"engine": EngineConfig(tensor=3, context=64)}, "engine.tensor 3 does not divide 4 attention heads"),
    "context": ({"engine": EngineConfig(context=4096)}, "engine.context 4096 is longer than the 256 positions"),
    "one device": (
        {"engine": EngineConfig(name="transformers", tensor=2, context=64)},
        "the engine 'transformers' runs on one device",
    ),
    "engine": ({"engine": EngineConfig(name="vlm", context=64)}, "unknown rollout engine 'vlm'"),
    "reward": ({"reward": "lenght"}, "unknown reward 'lenght'; did you mean 'length'"),
    "weight": ({"reward": "length=x"}, r"reward 'length=x' is not NAME\[=WEIGHT\]"),
    "file": ({"reward": "mine.py:foo"}, "reward 'mine.py:foo': the file 'mine.py' does not exist"),
    "eval_reward": ({"eval_reward": "foo"}, "unknown reward 'foo'"),
    "pattern": ({"reward": "format"}, "reward 'format' needs the regular expression"),
    "overlong": ({"reward": "length,overlong"}, "overlong_buffer 32 is longer than sampling.max_tokens 5"),
    "evaluation": ({"evaluations": "foo=bar"}, "unknown evaluation 'foo'"),
    "room": ({"sampling": SamplingConfig(n=3, max_tokens=64)}, "leaves no room for a prompt"),
    "eval_data": ({"eval_data": Path("nowhere")}, "data file 'nowhere' does not exist"),
    "sft_data": ({"sft_data": Path("nowhere"), "sft_coef": 0.1}, "data file 'nowhere' does not exist"),
}


@pytest.mark.usefixtures("length")
@pytest.mark.parametrize("stage", ["grpo", "online-dpo", "rlhf"])
@pytest.mark.parametrize("what", REFUSED)
def test_plan_and_stage_refuse_the_same_before_anything_is_written(
    stage: str, what: str, make_config: Callable[..., Any], fake_world: Callable[..., Any]
) -> None:
    changes, message = REFUSED[what]
    config = make_config(stage, **changes)
    world = fake_world()
    with pytest.raises(AlignError, match=message):
        plan_lines(config)
    with pytest.raises(AlignError, match=message):
        RUN[stage](config, world)
    assert not world.operations
    assert not config.out.exists()


@pytest.mark.parametrize("setting", ["model", "reward_model", "value_model"])
def test_missing_model_directory_is_told_alike_for_every_model(
    setting: str, length: type, make_config: Callable[..., Any], tiny_model: Path
) -> None:
    models = {"reward": "model", "reward_model": tiny_model, "value_model": tiny_model}
    with pytest.raises(CheckpointError, match=r"^model directory 'nope' does not exist$"):
        plan_lines(make_config("rlhf", **{**models, setting: Path("nope")}))


def test_a_refused_plan_shows_the_refusal_alone(
    make_config: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("sft")
    words = ["--model", str(config.model), "--data", "nowhere", "--out", str(config.out), "--dry-run"]
    assert main(["sft", *words, "--max_length", "64"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("align: error: data file 'nowhere' does not exist; give a JSON-lines file of ")


@pytest.mark.usefixtures("length")
def test_sampling_that_biases_training_is_told(make_config: Callable[..., Any]) -> None:
    for sampling in (SamplingConfig(n=3, max_tokens=5, temperature=0.6), SamplingConfig(n=3, max_tokens=5, top_p=0.9)):
        plan = dict(plan_lines(make_config("grpo", sampling=sampling)))
        assert f"temperature {sampling.temperature:g} and sampling.top_p {sampling.top_p:g}" in plan["warning"]
    assert "warning" not in dict(plan_lines(make_config("grpo")))


def test_reference_beside_the_model_is_counted(make_config: Callable[..., Any]) -> None:
    once, step = (dict(plan_lines(make_config("dpo", reference=how))) for how in ("once", "step"))
    assert "memory per process, frozen reference" not in once
    assert "memory per process, frozen reference" in step


def test_devices_are_those_that_are_there_or_described(
    length: type, make_config: Callable[..., Any], fake_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = dict(plan_lines(make_config("grpo")))
    assert "1 rank = tensor 1 x pipeline 1 x context 1 x data 1, one process each" in here["placement"]
    described = dict(plan_lines(make_config("grpo", cluster=ClusterConfig(described="1x1x80"))))
    assert "one GPU each" in described["placement"]
    assert "memory per GPU, trained model" in described
    monkeypatch.setattr("align_core.stages.dry_run.cuda_gpus", lambda: 1)
    assert "one GPU each" in dict(plan_lines(make_config("grpo")))["placement"]
    on_cpu = make_config("grpo", training=TrainingConfig(device="cpu"))
    assert "one process each" in dict(plan_lines(on_cpu))["placement"]


def test_cuda_needs_a_gpu_here_or_a_described_cluster(
    length: type, make_config: Callable[..., Any], fake_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = {"training": TrainingConfig(device="cuda"), "engine": EngineConfig(name="fake", context=64, device="cuda")}
    config = make_config("grpo", **cuda)
    with pytest.raises(
        ConfigError, match=r"training.device and engine.device 'cuda' needs a GPU, and torch finds none"
    ):
        plan_lines(config)
    with pytest.raises(ConfigError, match="torch finds none here"):
        run_grpo(config, fake_world())
    assert not config.out.exists()
    for cluster in (ClusterConfig(described="1x1x80"), ClusterConfig(address="auto")):
        plan_lines(make_config("grpo", cluster=cluster, **cuda))
    monkeypatch.setattr("align_core.stages.preflight.cuda_gpus", lambda: 1)
    plan_lines(config)


def test_engine_is_planned_for_every_stage_that_samples(length: type, make_config: Callable[..., Any]) -> None:
    """Keys and values of a token: 2 x (half of the heads for them) x size x 4 bytes a layer."""
    shape = read_model_shape(make_config("grpo").model)
    engine = EngineConfig(name="fake", context=64, tensor=2, replicas=2)
    line = dict(plan_lines(make_config("grpo", engine=engine)))["engine"]
    sequence = 64 * 2 * (shape.kv_heads // 2) * shape.head_dim * shape.layers * 4 / 2**20
    assert line.startswith("fake: 4 ranks = tensor 2 x replicas 2, beside the models; float32; a process holds ")
    assert line.endswith(f"of weights and {sequence:.1f} MiB for each sequence of 64 tokens")


def test_files_that_are_mixed_show_their_shares(make_config: Callable[..., Any], tmp_path: Path) -> None:
    """24 records: 18 of a file with 10, 6 of one with 4."""
    config = make_config("sft")
    few = tmp_path / "few.jsonl"
    few.write_text("".join(config.data.read_text().splitlines(keepends=True)[:4]))
    plan = dict(plan_lines(make_config("sft", data=[f"{config.data}:3", f"{few}:1"], parallel=ParallelConfig(data=2))))
    assert plan["data"].endswith("few.jsonl:1: 14 records")
    assert plan[f"data {config.data}:3"] == "10 records, 75.0% of the batches: 1.80 epochs"
    assert plan[f"data {few}:1"] == "4 records, 25.0% of the batches: 1.50 epochs"
    assert plan["steps"] == "6 of 4 records"
    assert plan["batches"].startswith("4 records a step, shared by 2 copies of the model; at most 64 tokens")


def test_evaluations_are_planned(length: type, make_config: Callable[..., Any]) -> None:
    config = make_config("grpo")
    plan = dict(plan_lines(make_config("grpo", eval_data=config.data, evaluations=f"accuracy={config.data}")))
    assert plan["evaluation"] == f"{config.data}: 10 records every 10 steps"
    assert plan["evaluations"] == f"accuracy={config.data} every 10 steps"


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


def test_every_model_is_looked_at_before_anything_starts(
    make_config: Callable[..., Any], tmp_path: Path, fake_world: Callable[..., Any]
) -> None:
    """The reward model of a PPO run is of an architecture that is not known; the world has made no model by then."""
    other = tmp_path / "other"
    other.mkdir()
    raw = json.loads((make_config("sft").model / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps({**raw, "architectures": ["MambaForCausalLM"], "model_type": "mamba"})
    )
    config = make_config("rlhf", reward_model=other)
    with pytest.raises(AlignError, match="mamba"):
        plan_lines(config)
    world = fake_world()
    with pytest.raises(AlignError, match="mamba"):
        run_rlhf(config, world)
    assert not config.out.exists()
