"""Evaluations by name in the middle of training: when they run, on which weights, and what is refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align_core import registry
from align_core.config import EvaluationConfig, GrpoConfig
from align_core.errors import ConfigError
from align_core.stages.evaluations import parse_evaluations
from align_core.stages.grpo import run_grpo
from align_core.stages.rollout import Prompts
from align_core.stages.run import read_metrics

Found = list[tuple[int, int, EvaluationConfig]]


@pytest.fixture
def spy(length: type, monkeypatch: pytest.MonkeyPatch) -> Found:
    """Registers the evaluation `spy`, which notes (step, version of the engine's weights, config) and counts calls."""
    calls: Found = []

    def evaluate(engine: Any, tokenizer: Any, config: EvaluationConfig, *, step: int) -> Mapping[str, float]:
        calls.append((step, engine.weight_sink().version, config))
        (config.out / f"spy_{step}.txt").write_text(tokenizer.decode([5]))
        return {"spied": len(calls)}

    rewards = registry.entry_points
    point = SimpleNamespace(name="spy", load=lambda: evaluate)
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [point] if group == "align.evaluations" else rewards(group=group)
    )
    return calls


def test_they_see_the_weights_after_so_many_steps(
    spy: Found, make_config: Callable[..., GrpoConfig], fake_world: Callable[..., Any], tmp_path: Path
) -> None:
    """Before steps 0, 2, 4 of 6, and after the last; without held-out prompts of the stage's own."""
    config = make_config("grpo", evaluations=f"spy={tmp_path}", eval_every=2, eval_limit=7)
    run_grpo(config, fake_world())
    assert [(step, version) for step, version, _ in spy] == [(0, 0), (2, 2), (4, 4), (6, 6)]
    lines = {line["step"]: line for line in read_metrics(config.out)}
    assert [lines[step].get("eval_spied") for step in range(6)] == [1, None, 2, None, 3, None]
    assert json.loads((config.out / "result.json").read_text())["eval_spied"] == 4
    settings = spy[0][2]
    assert (settings.data, settings.out, settings.limit) == (tmp_path, config.out / "evaluations" / "spy", 7)
    assert (settings.context, settings.max_tokens) == (config.engine.context, config.sampling.max_tokens)
    assert sorted(path.name for path in settings.out.iterdir()) == [f"spy_{step}.txt" for step in (0, 2, 4, 6)]


def test_unknown_name_is_refused_before_anything_starts(
    spy: Found, make_config: Callable[..., GrpoConfig], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"unknown evaluation 'spi'; did you mean 'spy'"):
        Prompts(make_config("grpo", evaluations=f"spi={tmp_path}"))
    with pytest.raises(ConfigError, match=r"the data of evaluation 'spy', 'nowhere.jsonl', does not exist"):
        Prompts(make_config("grpo", evaluations="spy=nowhere.jsonl"))


def test_names_and_paths_are_read_in_order() -> None:
    assert parse_evaluations("accuracy=a/b.jsonl, mt-bench-answers=bench,") == [
        ("accuracy", Path("a/b.jsonl")),
        ("mt-bench-answers", Path("bench")),
    ]
    assert parse_evaluations("") == []


@pytest.mark.parametrize("text", ["accuracy", "=a.jsonl", "accuracy="])
def test_a_part_without_name_or_path_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"written NAME=PATH,\.\.\., got "):
        parse_evaluations(text)


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluation 'accuracy' is given twice, for 'a' and 'b'"):
        parse_evaluations("accuracy=a,accuracy=b")
