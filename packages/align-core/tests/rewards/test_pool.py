"""Reward functions in processes of their own: what hangs, dies, prints or fails costs itself and says why."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest

from align_core.config import ScoringConfig
from align_core.errors import ConfigError, WorkerError
from align_core.rewards import pool as pool_module
from align_core.rewards.pool import RewardPool

FUNCTIONS = """
import os, pathlib, time
from dataclasses import dataclass
from fractions import Fraction
import numpy as np
from align_core.types import Score

@dataclass
class Marked:
    length: int

def length(prompts, completions, columns):
    print("a function may print")
    return [float(len(text)) for text in completions]

class Stateful:
    def __init__(self):
        self.calls = 0
    def __call__(self, prompts, completions, columns):
        self.calls += 1
        return [Score(value=1.0, extracted=f"{p}/{c}/{a}") for p, c, a in zip(prompts, completions, columns["answer"])]

def hangs_on_x(prompts, completions, columns):
    if "x" in completions:
        pathlib.Path(__file__).with_name(f"hangs-{os.getpid()}").touch()
        time.sleep(60)
    return [1.0] * len(completions)

def dies_on_x(prompts, completions, columns):
    if "x" in completions:
        os._exit(7)
    return [1.0] * len(completions)

def raises_on_x(prompts, completions, columns):
    if "x" in completions:
        raise ValueError("x is no answer")
    return [1.0] * len(completions)

def flaky(prompts, completions, columns, seen=[]):
    seen.append(len(completions))
    return [None] * len(completions) if len(seen) == 1 else [2.0] * len(completions)

def fails_twice(prompts, completions, columns, sizes=[]):
    sizes.append(len(completions))
    return [Score(value=len(sizes), extracted=str(sizes)) if len(sizes) > 2 or c != "x" else None for c in completions]

def always_hangs(prompts, completions, columns):
    time.sleep(60)

def other_types(prompts, completions, columns):
    return [Score(value=np.float32(0.5), extracted=["x"]), Score(value=Fraction(1, 4), extracted=None)]

def unprintable(prompts, completions, columns):
    return [Score(value=1.0, extracted=Unprintable() if text == "x" else text) for text in completions]

class Unprintable:
    def __str__(self):
        raise ValueError("no text")

def too_few(prompts, completions, columns):
    return [1.0]

number = 3
"""

Open = Callable[..., RewardPool]


@pytest.fixture
def open_pool(tmp_path: Path) -> Iterator[Open]:
    """A pool of a function of the file above."""
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS, encoding="utf-8")
    opened: list[RewardPool] = []

    def make(name: str, **scoring: object) -> RewardPool:
        settings = {"timeout": 20.0, "retries": 0, **scoring}
        opened.append(RewardPool(f"{file}:{name}", ScoringConfig(**settings)))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for pool in opened:
        pool.close()


def score(pool: RewardPool, *texts: str) -> list[tuple[float | None, str]]:
    found = pool.score(["p"] * len(texts), list(texts), {"answer": ["a"] * len(texts)})
    return [(one.value, one.error) for one in found]


def test_function_of_a_file_scores_in_order_over_several_processes(open_pool: Open) -> None:
    """Seven texts in chunks of two over two processes; what the function prints does no harm."""
    pool = open_pool("length", workers=2, chunk=2)
    texts = ["a" * n for n in range(7)]
    assert score(pool, *texts) == [(float(n), "") for n in range(7)]


def test_class_is_made_once_and_sees_prompts_and_columns(open_pool: Open) -> None:
    pool = open_pool("Stateful")
    (one,) = pool.score(["why?"], ["so"], {"answer": ["because"]})
    assert (one.value, one.extracted) == (1.0, "why?/so/because")


def test_what_hangs_is_ended_and_costs_only_itself(open_pool: Open) -> None:
    pool = open_pool("hangs_on_x", timeout=1.0)
    began = time.monotonic()
    assert score(pool, "a", "x", "b") == [(1.0, ""), (None, "no score within 1 s"), (1.0, "")]
    assert time.monotonic() - began < 60
    assert score(pool, "a") == [(1.0, "")]


def test_what_dies_is_started_again_and_says_its_status(open_pool: Open) -> None:
    pool = open_pool("dies_on_x")
    found = score(pool, "a", "x", "b")
    assert [value for value, _ in found] == [1.0, None, 1.0]
    assert found[1][1] == "the reward's process ended with status 7: it said nothing"


def test_what_raises_keeps_its_reason(open_pool: Open) -> None:
    assert score(open_pool("raises_on_x"), "a", "x") == [(1.0, ""), (None, "ValueError: x is no answer")]


def test_failures_are_tried_again(open_pool: Open) -> None:
    assert score(open_pool("flaky", retries=1), "a", "b") == [(2.0, ""), (2.0, "")]
    assert score(open_pool("flaky"), "a") == [(None, "the function returned None")]


def test_failures_of_a_chunk_are_tried_again_in_one_call(open_pool: Open) -> None:
    """So that a judge, which asks about several replies at once, does so here too."""
    found = open_pool("fails_twice", retries=3).score(["p"] * 4, list("axxa"), {})
    assert [(one.value, one.extracted) for one in found] == [(1, "[4]"), (3, "[4, 2, 2]"), (3, "[4, 2, 2]"), (1, "[4]")]


def test_reward_that_always_hangs_stops_soon(open_pool: Open) -> None:
    pool = open_pool("always_hangs", timeout=0.2)
    with pytest.raises(WorkerError, match=r"no score within 0\.2 s for 9 of 16 completions of one step"):
        score(pool, *"abcdefghijklmnop")


@pytest.mark.parametrize(("on_failure", "hung"), [("stop", 1), ("drop", 2)])
def test_completions_that_hang_are_counted_once_however_often_they_are_tried(
    open_pool: Open, monkeypatch: pytest.MonkeyPatch, on_failure: str, hung: int
) -> None:
    """With a limit of 1: one hung completion of four, or half of them where they are dropped; two tries each."""
    monkeypatch.setattr(pool_module, "_GIVE_UP", 1)
    pool = open_pool("hangs_on_x", timeout=1.0, retries=1, on_failure=on_failure)
    found = score(pool, *"x" * hung, *"a" * (4 - hung))
    assert [value for value, _ in found] == [None] * hung + [1.0] * (4 - hung)


@pytest.mark.parametrize("on_failure", ["stop", "drop"])
def test_nothing_more_is_asked_after_a_failure_that_ends_the_run(open_pool: Open, on_failure: str) -> None:
    pool = open_pool("raises_on_x", chunk=2, on_failure=on_failure)
    not_asked = (None, "not asked after another had failed: ValueError: x is no answer")
    last = not_asked if on_failure == "stop" else (1.0, "")
    assert score(pool, *"aaxab") == [(1.0, ""), (1.0, ""), (None, "ValueError: x is no answer"), (1.0, ""), last]


def test_drop_ends_where_more_than_half_hang(open_pool: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_GIVE_UP", 1)
    pool = open_pool("hangs_on_x", timeout=1.0, on_failure="drop")
    with pytest.raises(WorkerError, match="for 3 of 5 completions of one step"):
        score(pool, *"xxxaa")


def test_closing_waits_for_no_function(open_pool: Open, tmp_path: Path) -> None:
    """Two calls are under way and more wait; each would hang for longer than the test may take."""
    pool = open_pool("hangs_on_x", timeout=60.0, workers=2, chunk=1)
    score(pool, "a", "b")
    with ThreadPoolExecutor(1) as thread:
        scores = thread.submit(score, pool, *"xxxx")
        while len(list(tmp_path.glob("hangs-*"))) < 2:
            time.sleep(0.01)
        began = time.monotonic()
        pool.close()
        with pytest.raises(CancelledError):
            scores.result(timeout=60)
        assert time.monotonic() - began < 30


def test_fields_of_other_types_are_taken_as_numbers_and_texts(open_pool: Open) -> None:
    pool = open_pool("other_types")
    found = pool.score(["p", "p"], ["a", "b"], {})
    assert [(one.value, one.extracted) for one in found] == [(0.5, "['x']"), (0.25, "")]


def test_score_that_cannot_be_written_is_a_failure_and_the_process_goes_on(open_pool: Open) -> None:
    assert score(open_pool("unprintable"), "a", "x") == [(1.0, ""), (None, "ValueError: no text")]


def test_wrong_number_of_scores_is_a_failure_of_each(open_pool: Open) -> None:
    """Asked alone, one score for one completion is right."""
    assert score(open_pool("too_few"), "a", "b") == [(1.0, ""), (1.0, "")]


@pytest.mark.parametrize(
    ("name", "message"),
    [("lenght", "unknown function in .*; did you mean 'length'"), ("number", "is a int and cannot be called")],
)
def test_function_that_is_not_there_is_refused_at_the_start(open_pool: Open, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_pool(name)


def test_file_that_does_not_load_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import nothing_of_this_name\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="ModuleNotFoundError: No module named 'nothing_of_this_name'"):
        RewardPool(f"{tmp_path / 'bad.py'}:f", ScoringConfig())
