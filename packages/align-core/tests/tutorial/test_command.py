"""`align tutorial`: what its options ask of the road, and that they are checked before anything runs."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from align_convert import Layout, LayoutError, ModelConfig
from align_core.cli import main
from align_core.errors import MissingDependencyError
from align_core.tutorial import command
from align_core.tutorial.road import Road
from align_core.tutorial.smollm2 import SIZES, installed_gguf, llama_config
from align_core.tutorial.tiny import TinyShape, tiny_config
from align_core.tutorial.walk import Outcome, Step


class Walk:
    """Stands for the runner and for the report; remembers what it was given."""

    def __init__(self) -> None:
        self.steps: Sequence[Step] = ()
        self.road: Road | None = None
        self.command = ""

    def run_steps(self, steps: Sequence[Step], out: Path, console: Console) -> list[Outcome]:
        self.steps = steps
        return []

    def write_report(self, road: Road, outcomes: Sequence[Outcome], command: str) -> Path:
        self.road, self.command = road, command
        return road.out / "report.html"


@pytest.fixture
def walk(monkeypatch: pytest.MonkeyPatch) -> Walk:
    made = Walk()
    monkeypatch.setattr(command, "run_steps", made.run_steps)
    monkeypatch.setattr(command, "write_report", made.write_report)
    return made


def road_of(walk: Walk, *words: str) -> Road:
    assert main(["tutorial", *words]) == 0
    assert walk.road is not None
    return walk.road


def test_default_is_the_tiny_model_with_its_recipe(walk: Walk, capsys: pytest.CaptureFixture[str]) -> None:
    road = road_of(walk)
    assert (road.recipe, road.out, road.tensor, road.steps, road.limit) == (
        "tiny",
        Path("runs/tutorial-tiny"),
        2,
        None,
        None,
    )
    assert road.make_model == ("align", "make-model", "tiny", "--out", "runs/tutorial-tiny/hf/start", "--seed", "0")
    assert road.make_data[:4] == ("align", "data", "prepare", "additions")
    assert road.reward_data == "ratings"
    assert walk.command == "align tutorial"
    assert [step.name for step in walk.steps][:4] == ["model", "data", "to-megatron", "sft"]
    assert capsys.readouterr().out == f"the report: {(road.out / 'report.html').resolve()}\n"


def test_options_reach_the_road_and_the_report(walk: Walk, tmp_path: Path) -> None:
    road = road_of(walk, "--out", f"{tmp_path}/my walk", "--seed", "3", "--steps", "7", "--limit", "9", "--tensor", "1")
    assert (road.out, road.seed, road.steps, road.limit, road.tensor) == (tmp_path / "my walk", 3, 7, 9, 1)
    assert walk.command == f"align tutorial --out '{tmp_path}/my walk' --seed 3 --steps 7 --limit 9 --tensor 1"
    assert all("3" in argv for argv in (road.make_model, road.make_data))


def test_quick_shortens_what_was_not_asked_for(walk: Walk) -> None:
    assert (road_of(walk, "--quick").steps, road_of(walk, "--quick").limit) == (8, 40)
    assert road_of(walk, "--quick", "--steps", "2").steps == 2


def test_smollm2_takes_the_users_questions_and_one_rank(walk: Walk, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    road = road_of(walk, "--model", "smollm2", "--data", str(tmp_path / "train.jsonl"))
    assert (road.recipe, road.tensor, road.limit, road.context) == ("smollm2", 1, 50, 1024)
    assert road.make_data[-4:] == ("--held_out", "50", "--source", str(tmp_path / "train.jsonl"))
    assert road.reward_data == "preferences"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "gsm8k"], "the model 'tiny' cannot do the task 'gsm8k': tiny adds, smollm2 does gsm8k"),
        (["--model", "smollm2", "--task", "additions"], "the model 'smollm2' cannot do the task 'additions'"),
        (["--model", "smollm2"], "the task 'gsm8k' needs its file of questions; give --data FILE"),
        (["--model", "smollm2", "--data", "nowhere"], "--data nowhere is not there, or is no file"),
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--limit", "-1"], "--limit: must be at least 1, got -1"),
        (
            ["--tensor", "3"],
            "trained with --tensor 3: tensor parallel size 3 does not divide 4 attention heads; use 1, 2 or 4",
        ),
        (["--tensor", "0"], "--tensor: must be at least 1, got 0"),
        (["--data", "mine"], "the task 'additions' makes its own data; leave out --data mine"),
    ],
)
def test_contradicting_options_are_refused(
    walk: Walk, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tutorial", *words]) == 2
    assert message in capsys.readouterr().err
    assert walk.steps == ()


POSSIBLE = {"tiny": (1, 2, 4), "smollm2": (1, 3)}


@pytest.mark.parametrize("model", POSSIBLE)
def test_tensor_sizes_are_those_that_the_converter_cuts_the_model_into(
    walk: Walk, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """4 heads with 2 for keys; 9 with 3, of which 9 ranks would each get 42.7 rows of keys and values."""
    (tmp_path / "train.jsonl").touch()
    words = ["--model", model, *(["--data", str(tmp_path / "train.jsonl")] if model == "smollm2" else [])]
    config = SIZES if model == "smollm2" else tiny_config(TinyShape())
    for size in range(1, 19):
        status, message = main(["tutorial", *words, "--tensor", str(size)]), capsys.readouterr().err
        assert (status == 0) == (size in POSSIBLE[model]) == _cuts(config, size), size
        if status:
            assert f"'{model}' cannot be trained with --tensor {size}: tensor parallel size {size} " in message
            assert f"; use {' or '.join(', '.join(map(str, POSSIBLE[model])).rsplit(', ', 1))}" in message


def test_sizes_of_smollm2_are_those_of_the_file() -> None:
    gguf = pytest.importorskip("gguf")
    try:
        reader = gguf.GGUFReader(installed_gguf())
    except MissingDependencyError as error:
        pytest.skip(str(error))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = llama_config(fields, tied=True)
    assert {name: config[name] for name in SIZES} == SIZES


def _cuts(config: dict[str, object], tensor: int) -> bool:
    try:
        Layout(tp=tensor).check(ModelConfig.from_hf(config))
    except LayoutError:
        return False
    return True
