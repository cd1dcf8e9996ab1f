"""The plan of a stage: right numbers, the errors of the stage itself, and nothing touched."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align_core.cli import main
from align_core.config import ClusterConfig, EngineConfig, ParallelConfig, SamplingConfig, TrainingConfig
from align_core.errors import AlignError, CheckpointError, ConfigError, DataError
from align_core.model_shape import read_model_shape
from align_core.stages.dpo import run_dpo
from align_core.stages.dry_run import plan_lines
from align_core.stages.grpo import run_grpo
from align_core.stages.kto import run_kto
from align_core.stages.online_dpo import run_online_dpo
from align_core.stages.reward import run_reward
from align_core.stages.rlhf import run_rlhf
from align_core.stages.sft import run_sft
from align_core.text import encode_response, load_tokenizer, render_prompt

RUN: dict[str, Callable[..., None]] = {
    "sft": run_sft,
    "reward": run_reward,
    "dpo": run_dpo,
    "kto": run_kto,
    "grpo": run_grpo,
    "online-dpo": run_online_dpo,
    "rlhf": run_rlhf,
}


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


EMPTY = {
    "sft": ({"prompt": "1", "response": ""}, "'response' must be a text that is not empty, got ''"),
    "reward": ({"prompt": "1", "response": ["1"], "score": [1]}, "1 responses with 1 scores"),
    "dpo": ({"prompt": "1", "chosen": "", "rejected": "2"}, "'chosen' must be a text that is not empty"),
    "kto": ({"prompt": "1", "response": "2", "label": "yes"}, "'label' must be true or false, got 'yes'"),
    "grpo": ({"prompt": ""}, "'prompt' must be a text that is not empty"),
}
TURNS = [{"role": "system", "content": "1 + " * 100}, {"role": "user", "content": "1"}]  # no system's turn is cut
TOO_LONG = {
    "sft": {"prompt": TURNS, "response": "2"},
    "reward": {"prompt": TURNS, "response": ["2", "3"], "score": [1, 0]},
    "dpo": {"prompt": TURNS, "chosen": "2", "rejected": "3"},
    "kto": {"prompt": TURNS, "response": "2", "label": True},
    "grpo": {"prompt": TURNS},
}


def _refused_alike(config: Any, stage: str, message: str, world: Any) -> None:
    """By the plan and by the stage, in the same words."""
    said = []
    for refuse in (plan_lines, lambda config: RUN[stage](config, world)):
        with pytest.raises(AlignError, match=message) as refusal:
            refuse(config)
        said.append(str(refusal.value))
    assert said[0] == said[1]
    assert not world.operations


@pytest.mark.usefixtures("length")
@pytest.mark.parametrize("stage", EMPTY)
@pytest.mark.parametrize(("setting", "what"), [("data", "bad"), ("data", "too long"), ("eval_data", "too long")])
def test_a_record_that_the_stage_refuses_is_refused_by_the_plan(
    stage: str, setting: str, what: str, make_config: Callable[..., Any], fake_world: Callable[..., Any]
) -> None:
    """The last of many records; the messages are equal, as both have them of one function."""
    good = make_config(stage).data.read_text()
    row, message = EMPTY[stage] if what == "bad" else (TOO_LONG[stage], "the prompt template alone is [0-9]+ tokens")
    file = make_config(stage).out.with_name("many.jsonl")
    file.write_text(good * 52 + json.dumps(row) + "\n")
    config = make_config(stage, **{setting: file})
    _refused_alike(config, stage, f"many.jsonl, line 521: {message}", fake_world())
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("stage", "rows", "message"),
    [
        ("reward", [{"prompt": "1", "response": ["2", "3"], "score": [1, 1]}], "no held-out record .* scores one"),
        ("kto", [{"prompt": "1", "response": "2", "label": True}], "is the only held-out record"),
    ],
)
def test_held_out_records_that_measure_nothing_are_refused_by_both(
    stage: str,
    rows: list[dict[str, object]],
    message: str,
    make_config: Callable[..., Any],
    fake_world: Callable[..., Any],
) -> None:
    held_out = make_config(stage).out.with_name("held_out.jsonl")
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(stage, eval_data=held_out)
    with pytest.raises(DataError, match=message):
        plan_lines(config)
    with pytest.raises(DataError, match=message):
        RUN[stage](config, fake_world())


def test_plan_counts_what_training_will_see(make_config: Callable[..., Any], fake_world: Callable[..., Any]) -> None:
    """Ten records of one batch: its tokens are those of the plan, its mask those learnt."""
    for stage, sequences in (("sft", 10), ("reward", 30), ("dpo", 20), ("kto", 10)):
        changes = {"reference": "step"} if stage in ("dpo", "kto") else {}
        config = make_config(stage, batch_size=10, steps=1, out=stage, **changes)
        plan, world = dict(plan_lines(config)), fake_world()
        RUN[stage](config, world)
        (batch,) = world.trainers[0].seen
        tokens, learnt = len(batch.tokens), int(batch.mask.sum())
        assert plan["data as tokens"] == (
            f"10 records: {sequences} sequences of {tokens:,} tokens, {learnt:,} of them learnt; a sequence "
            f"has {tokens / sequences:.1f}, at most {batch.lengths.max()}; nothing is cut"
        )


def test_plan_says_what_is_cut(make_config: Callable[..., Any], tmp_path: Path) -> None:
    """One prompt, one answer, and both in one record; a chat whose oldest exchange does not fit; and one that fits."""
    long, turn = "1 + " * 60, {"role": "user", "content": "1?"}
    chat = [turn, {"role": "assistant", "content": "12345678" * 6}, turn, {"role": "assistant", "content": "1"}]
    rows: list[dict[str, object]] = [
        {"prompt": f"{long}1?", "response": "2"},
        {"prompt": "1?", "response": "12345678" * 20},
        {"prompt": f"{long}1?", "response": "12345678" * 20},
        {"messages": chat},
        {"prompt": "1?", "response": "2"},
    ]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = dict(plan_lines(make_config("sft", data=file, eval_data=file)))
    assert plan["data as tokens"].startswith("5 records: 5 sequences of ")
    assert plan["data as tokens"].endswith(
        "at most 64; 4 records are too long and lose a part, none is dropped: 1 their oldest exchanges, "
        "2 the beginning of the prompt's content, 2 the end of an answer"
    )
    assert plan["evaluation as tokens"] == plan["data as tokens"]


@pytest.mark.usefixtures("length")
def test_prompts_and_demonstrations_are_counted(make_config: Callable[..., Any]) -> None:
    """A prompt has what `sampling.max_tokens` leaves of 64 tokens."""
    demonstrations = make_config("sft").data
    plan = dict(plan_lines(make_config("grpo", sft_data=demonstrations, sft_coef=0.1, sft_batch_size=4)))
    tokenizer = load_tokenizer(make_config("sft").model)
    prompts = [len(render_prompt(tokenizer, f"What is {n}?", max_tokens=64)) for n in range(10)]
    answers = [len(encode_response(tokenizer, str(n * n))) for n in range(10)]
    assert plan["data as tokens"] == (
        f"10 records: 10 sequences of {sum(prompts)} tokens; a sequence has {sum(prompts) / 10:.1f}, at most "
        f"{max(prompts)}; nothing is cut"
    )
    assert f"of {sum(prompts) + sum(answers)} tokens, {sum(answers)} of them learnt" in plan["sft_data as tokens"]
    short = dict(plan_lines(make_config("grpo", sampling=SamplingConfig(n=3, max_tokens=64 - min(prompts) + 1))))
    assert "10 records are too long and lose a part, none is dropped: 10 the beginning" in short["data as tokens"]


def test_plan_says_how_many_of_a_large_file_it_encoded(make_config: Callable[..., Any], tmp_path: Path) -> None:
    """The stage encodes 10,000 beforehand; a record behind them is refused when its step comes."""
    file = tmp_path / "large.jsonl"
    file.write_text('{"prompt": "1", "response": "2"}\n' * 10_002 + json.dumps(TOO_LONG["sft"]) + "\n")
    plan = dict(plan_lines(make_config("sft", data=file)))
    assert plan["data as tokens"].startswith(
        "the first 10,000 of 10,003 records (the stage encodes the others in their steps): 10,000 sequences of "
    )


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


@pytest.mark.usefixtures("length")
@pytest.mark.parametrize("stage", ["sft", "kto", "grpo"])
def test_plan_of_a_run_that_is_there(
    stage: str, make_config: Callable[..., Any], fake_world: Callable[..., Any], tmp_path: Path
) -> None:
    """It continues, or is refused as the stage would refuse it, and nothing of it is touched."""
    config, whole = make_config(stage), fake_world()
    assert "run" not in dict(plan_lines(config))
    RUN[stage](make_config(stage, out="whole"), whole)
    third_step = [i for i, operation in enumerate(whole.operations) if operation == "step"][2]
    with pytest.raises(Exception, match=r"^step$"):
        RUN[stage](config, fake_world(crash_at=third_step))
    assert dict(plan_lines(config))["run"] == f"{config.out} holds this run: it continues from step 2 of 6"
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(config.data.read_text().splitlines(keepends=True)[:9]))
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}
    for changed, message in (
        (make_config(stage, seed=4), r"holds a run with other settings \(seed was 3, is 4\)"),
        (make_config(stage, data=fewer), r"holds a run with other settings \(data was .*fewer.jsonl'\)"),
    ):
        _refused_alike(changed, stage, message, fake_world())
    whole_data = config.data.read_text()
    config.data.write_text(fewer.read_text())
    _refused_alike(config, stage, "data of the run in .* has changed: .*records was 10, is 9", fake_world())
    config.data.write_text(whole_data)
    assert before == {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}
    RUN[stage](config, fake_world())
    assert dict(plan_lines(config))["run"] == f"{config.out} holds this run, finished: nothing would be done"
