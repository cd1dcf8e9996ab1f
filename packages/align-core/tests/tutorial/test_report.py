"""The report says what the files of the walk say, and nothing that a model says can act in it."""

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_core.tutorial.curves import Curve, _running_mean, draw, read_curves
from align_core.tutorial.report import write_report
from align_core.tutorial.road import TRAINED, Road
from align_core.tutorial.walk import Outcome

SCRIPT = "<script>alert('x')</script>"
CORRECT = {"start": 0, "sft": 90, "rlhf": 190, "online_dpo": 170, "grpo": 181, "grpo_reward_model": 150, "dpo": 60}
STEPS = 20


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def road(tmp_path: Path) -> Road:
    """A walk's files, of which every number is known."""
    accuracy = {}
    for name, correct in CORRECT.items():
        share = correct / 200
        accuracy[name] = {"n": 200, "correct": correct, "accuracy": share, "low": share - 0.05, "high": share + 0.05}
        rows = [
            {"prompt": f"What is {n} <b>?", "answer": f"#### {n}", "completion": f"{SCRIPT} {name}", "correct": True}
            for n in range(30)
        ]
        write_lines(tmp_path / "accuracy" / f"{name}.jsonl", rows)
    (tmp_path / "accuracy" / "accuracy.json").write_text(json.dumps(accuracy))
    metrics = {"sft": ["loss"], "reward": ["accuracy", "loss"], "dpo": ["margin", "accuracy"]}
    metrics |= {name: ["eval_reward"] for name in ("rlhf", "online_dpo")}
    metrics |= {"grpo": ["reward", "eval_reward"], "grpo_reward_model": ["eval_reward"]}
    for stage, names in metrics.items():
        rows = [{"step": step, **dict.fromkeys(names, step / 16), "time": 0.0} for step in range(STEPS)]
        write_lines(tmp_path / stage / "metrics.jsonl", rows)
    (tmp_path / "reward" / "result.json").write_text(json.dumps({"eval_accuracy": 0.875}))
    return Road(
        recipe="tiny",
        out=tmp_path,
        seed=5,
        tensor=2,
        steps=None,
        limit=None,
        max_tokens=8,
        context=64,
        dtype="float32",
        make_model=(),
        make_data=(),
        reward_data="ratings",
    )


OUTCOMES = [
    Outcome(name="a", title="Do <a>", command="align a --x '<y>'", seconds=61.5),
    Outcome(name="b", title="Do b", command="align b", seconds=58.5),
]


def test_summary_repeats_the_numbers_of_the_files(road: Road) -> None:
    """GRPO: 181 of 200 against SFT's 90 are (0.905 - 0.45) * 100 = 45.5 points; DPO: (0.3 - 0.45) * 100 = -15."""
    write_report(road, OUTCOMES, "align tutorial")
    summary = json.loads((road.out / "summary.json").read_text())
    accuracy = json.loads((road.out / "accuracy" / "accuracy.json").read_text())
    assert summary["accuracy"] == accuracy
    assert list(summary["accuracy"]) == ["start", *TRAINED]
    points = {"rlhf": 50.0, "online_dpo": 40.0, "grpo": 45.5, "grpo_reward_model": 30.0, "dpo": -15.0}
    assert summary["points_above_sft"] == points
    assert summary["reward_model_eval_accuracy"] == 0.875
    assert (summary["model"], summary["seed"], summary["command"]) == ("tiny", 5, "align tutorial")
    assert summary["seconds"] == 120.0
    assert [step["command"] for step in summary["steps"]] == ["align a --x '<y>'", "align b"]
    assert "numpy" in summary["versions"]


def test_summary_of_the_curves_by_hand(road: Road) -> None:
    """Values step / 16: the first two of 20 have the mean 0.5 / 16, the last two 18.5 / 16; a rising loss is worse."""
    write_report(road, OUTCOMES, "align tutorial")
    curves = json.loads((road.out / "summary.json").read_text())["curves"]
    assert [(c["stage"], c["metric"]) for c in curves] == [
        *(("sft", "loss"), ("reward", "accuracy"), ("reward", "loss")),
        *((stage, "eval_reward") for stage in ("rlhf", "online_dpo")),
        ("grpo", "reward"),
        *(("grpo", "eval_reward"), ("grpo_reward_model", "eval_reward"), ("dpo", "margin"), ("dpo", "accuracy")),
    ]
    for curve in curves:
        assert (curve["values"], curve["first_tenth"], curve["last_tenth"]) == (20, 0.5 / 16, 18.5 / 16)
        assert curve["improved"] == (curve["metric"] != "loss")


def test_page_shows_the_numbers_of_the_summary(road: Road) -> None:
    page = write_report(road, OUTCOMES, "align tutorial --seed 5").read_text(encoding="utf-8")
    text = html.unescape(re.sub(r"<[^>]*>", " ", page))
    flat = re.sub(r"\s+", " ", text)
    assert "GRPO, verifiable reward 181 of 200 90.5 % 85.5 to 95.5 % +45.5" in flat
    assert "DPO 60 of 200 30.0 % 25.0 to 35.0 % -15.0" in flat
    assert "ranks 87.5 % of held-out pairs rightly" in flat
    assert "SFT: loss on demonstrations 20 0.0312 1.1562 no" in flat
    assert "2.0 minutes" in flat
    assert "$ align tutorial --seed 5" in flat
    assert "$ align a --x '<y>'" in text


def test_nothing_that_a_model_or_a_command_says_becomes_markup(road: Road) -> None:
    page = write_report(road, OUTCOMES, f"align tutorial --out {SCRIPT}").read_text(encoding="utf-8")
    assert "<script" not in page
    assert html.escape(SCRIPT, quote=False).replace("'", "&#39;") in page
    assert "Do &lt;a&gt;" in page
    assert "&lt;b&gt;?" in page


def test_page_needs_nothing_from_outside(road: Road) -> None:
    page = write_report(road, OUTCOMES, "align tutorial").read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", page))
    assert all(
        re.match(r"https?://(www\.w3\.org|purl\.org|creativecommons\.org|matplotlib\.org)", a) for a in addresses
    )
    assert not re.search(r"<(link|img|iframe)\b", page)
    assert not re.search(r"\b(src|href)=\"(?!#)", page)


def test_page_without_held_out_pairs_says_nothing_of_them(road: Road) -> None:
    (road.out / "reward" / "result.json").write_text(json.dumps({"eval_accuracy": None}))
    page = write_report(road, OUTCOMES, "align tutorial").read_text(encoding="utf-8")
    assert "of held-out pairs" not in page


def test_curves_are_the_shown_metrics_of_stages_that_have_them(tmp_path: Path) -> None:
    write_lines(tmp_path / "grpo" / "metrics.jsonl", [{"step": 0, "reward": 0.5, "loss": 1.0}])
    (curve,) = read_curves(tmp_path)
    assert (curve.stage, curve.metric, curve.values, curve.first, curve.last) == ("grpo", "reward", (0.5,), 0.5, 0.5)
    assert not curve.improved
    assert draw([]) == ""


def test_drawing_has_a_panel_a_curve_and_is_the_same_each_time() -> None:
    curves = [
        Curve(stage="s", metric="m", label=f"{n}", better="higher", steps=values, values=values)
        for n in range(4)
        for values in [tuple(range(n + 1))]
    ]
    svg = draw(curves)
    assert svg.startswith("<svg")
    assert svg.count('id="axes_') == 4


def test_running_mean_by_hand() -> None:
    """A ramp of 20 keeps its middle; its first value is (5 * 0 + 1 + 2 + 3 + 4) / 9. Three values stay as they are."""
    ramp = _running_mean(np.arange(20.0))
    assert ramp[0] == pytest.approx(10 / 9)
    assert ramp[4:16].tolist() == pytest.approx(list(range(4, 16)))
    assert _running_mean(np.array([0.0, 3.0, 6.0])).tolist() == [0.0, 3.0, 6.0]


def test_evaluation_of_the_finished_model_ends_its_curve(tmp_path: Path) -> None:
    """Evaluations before steps 0 and 10 stand in the metrics, the one after the last of 15 steps in result.json."""
    lines = [{"step": 0, "eval_reward": 0.25}, {"step": 1, "loss": 0.0}, {"step": 10, "eval_reward": 0.5}]
    write_lines(tmp_path / "grpo" / "metrics.jsonl", lines)
    (tmp_path / "grpo" / "result.json").write_text(json.dumps({"steps": 15, "eval_reward": 0.75}))
    (curve,) = read_curves(tmp_path)
    assert (curve.steps, curve.values, curve.improved) == ((0, 10, 15), (0.25, 0.5, 0.75), True)
