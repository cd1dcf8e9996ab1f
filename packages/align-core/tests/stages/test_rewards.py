"""Scoring a rollout: texts and columns, weighted sums, failures that keep their reason, lengths, the reward model."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_core import registry
from align_core.config import SamplingConfig, ScoringConfig
from align_core.data.records import PromptRecord
from align_core.errors import ConfigError, DataError
from align_core.stages.rewards import Rewards
from align_core.stages.rollout import Question, Rollout, assemble
from align_core.stages.seeing import sample_rows
from align_core.text import Tokenizer, load_tokenizer
from align_core.types import Completion, Prompt, Score

RECORDS = [
    PromptRecord(prompt="1 + 1?", columns={"answer": "2"}),
    PromptRecord(prompt=[{"role": "system", "content": "s"}, {"role": "user", "content": "so?"}], columns={"x": 1}),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model)


@pytest.fixture
def rewards_of(
    monkeypatch: pytest.MonkeyPatch,
    make_config: Callable[..., Any],
    fake_world: Callable[..., Any],
    tokenizer: Tokenizer,
) -> Callable[..., Rewards]:
    """The rewards of a stage in which functions are registered by these names."""

    def make(functions: Mapping[str, object] | object, **changes: Any) -> Rewards:
        named = functions if isinstance(functions, dict) else {"mine": functions}
        monkeypatch.setattr(registry, "names", lambda group: sorted(named))
        monkeypatch.setattr(registry, "load", lambda group, name: lambda: named[name])
        config = make_config("grpo", **{"reward": ",".join(named), **changes})
        return Rewards(config, fake_world(), tokenizer)

    return make


def rollout(tokenizer: Tokenizer, *texts: str) -> Rollout:
    questions, completions = [], []
    for i, (record, text) in enumerate(zip(RECORDS, texts, strict=True)):
        tokens = np.array([*tokenizer.encode_continuation(text), tokenizer.eos_id], np.int32)
        questions.append(Question(prompt=Prompt(id=i, tokens=np.array([1, 5], np.int32)), record=record))
        completions.append(
            Completion(
                prompt_id=i,
                sample=0,
                tokens=tokens,
                logprobs=np.zeros(len(tokens), np.float32),
                finish_reason="stop",
                version=0,
            )
        )
    return assemble(questions, completions)


def test_function_gets_the_words_without_special_tokens_and_every_column(
    rewards_of: Callable[..., Rewards], tokenizer: Tokenizer
) -> None:
    """A column that only some records have is None for the others."""
    seen: dict[str, Any] = {}

    def function(prompts: Sequence[str], texts: Sequence[str], columns: Mapping[str, Sequence[object]]) -> list[Score]:
        seen.update(prompts=prompts, texts=texts, columns=columns)
        return [Score(value=0.5, extracted="2"), Score(value=-1.0)]

    scored = rewards_of(function).score(rollout(tokenizer, "2", "3 is"))
    assert scored.rewards.tolist() == [0.5, -1.0]
    assert scored.rewards.dtype == np.float32
    assert list(scored.extracted) == ["2", ""]
    assert seen["prompts"] == ["1 + 1?", "system: s\n\nuser: so?"]
    assert seen["texts"] == ["2", "3 is"]
    assert seen["columns"] == {"answer": ["2", None], "x": [None, 1]}


def test_weighted_sum_of_several_rewards(rewards_of: Callable[..., Rewards], tokenizer: Tokenizer) -> None:
    """0.5 * 4 - 2 * 1 = 0 and 0.5 * 8 - 2 * 3 = -2; numbers count as scores."""
    functions = {"a": lambda p, c, k: [4, 8.0], "b": lambda p, c, k: [Score(value=1, extracted="x"), np.float32(3)]}
    scored = rewards_of(functions, reward="a=0.5, b=-2").score(rollout(tokenizer, "2", "3"))
    assert scored.rewards.tolist() == [0.0, -2.0]
    assert {name: values.tolist() for name, values in scored.parts.items()} == {"a": [4, 8], "b": [1, 3]}
    assert list(scored.extracted) == ["b: x", ""]


def test_evaluation_may_have_rewards_of_its_own(rewards_of: Callable[..., Rewards], tokenizer: Tokenizer) -> None:
    functions = {"a": lambda p, c, k: [1, 1], "b": lambda p, c, k: [2, 2]}
    rewards = rewards_of(functions, reward="a", eval_reward="b=3")
    assert rewards.score(rollout(tokenizer, "2", "3")).rewards.tolist() == [1, 1]
    assert rewards.evaluate(rollout(tokenizer, "2", "3")).rewards.tolist() == [6, 6]


def test_score_that_failed_stops_with_reward_reason_reply_and_prompt(
    rewards_of: Callable[..., Rewards], tokenizer: Tokenizer
) -> None:
    rewards = rewards_of(lambda prompts, texts, columns: [Score(value=1.0), Score(value=None, error="no number")])
    expected = (
        r"reward 'mine' could not score a reply: no number; the reply is '3 is', "
        r"the prompt 'system: s\\n\\nuser: so\?'; "
        "--scoring.on_failure drop leaves such completions out"
    )
    with pytest.raises(DataError, match=expected):
        rewards.score(rollout(tokenizer, "2", "3 is"))


@pytest.mark.parametrize("answer", [None, float("nan"), "7", Score(value=None, error="no number")])
def test_score_that_failed_is_left_out_and_counted_where_the_config_says_so(
    rewards_of: Callable[..., Rewards], tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, answer: object
) -> None:
    """Never a 0: the completion is no longer in the rollout. The log and the samples say why."""
    drop = ScoringConfig(workers=0, on_failure="drop")
    scored = rewards_of(lambda prompts, texts, columns: [answer, 3.0], scoring=drop).score(rollout(tokenizer, "2", "4"))
    assert scored.rewards.tolist() == [3.0]
    assert len(scored.failures) == 1
    assert [c.prompt_id for c in scored.rollout.completions] == [1]
    assert scored.rollout.batch.sequence_column("group").tolist() == [1]
    (failure,) = scored.failures
    (warning,) = (record.getMessage() for record in caplog.records)
    assert failure.reason.startswith("reward 'mine' could not score a reply: ")
    assert warning.startswith(
        f"1 of 2 completions could not be scored and are left out; {failure.reason}; the reply is '2'"
    )
    kept, failed = sample_rows(scored, tokenizer, count=4)
    assert (kept["reply"], kept["reward"], kept["error"]) == ("4", 3.0, "")
    assert (failed["reply"], failed["reward"], failed["error"]) == ("2", None, failure.reason)
    assert list(kept) == list(failed), "one table shows both"


def test_nothing_left_stops_even_when_failures_are_dropped(
    rewards_of: Callable[..., Rewards], tokenizer: Tokenizer
) -> None:
    drop = ScoringConfig(workers=0, on_failure="drop")
    rewards = rewards_of(lambda prompts, texts, columns: [None, None], scoring=drop)
    with pytest.raises(DataError, match=r"none of 2 completions could be scored; .*returned None"):
        rewards.score(rollout(tokenizer, "2", "4"))


def test_too_few_scores_are_refused(rewards_of: Callable[..., Rewards], tokenizer: Tokenizer) -> None:
    rewards = rewards_of(lambda prompts, texts, columns: [Score(value=1.0)])
    with pytest.raises(DataError, match="reward 'mine' gave 1 scores for 2 completions"):
        rewards.score(rollout(tokenizer, "2", "3"))


def test_overlong_falls_over_its_buffer(rewards_of: Callable[..., Rewards], tokenizer: Tokenizer) -> None:
    """Limit 8, buffer 4: 4 tokens cost nothing, 7 cost 3/4."""
    settings = {
        "reward": "overlong=2",
        "sampling": SamplingConfig(n=2, max_tokens=8),
        "scoring": ScoringConfig(workers=0, overlong_buffer=4),
    }
    rewards = rewards_of({}, **settings)
    asked = rollout(tokenizer, "2", "2")
    lengths = [4, 7]
    long = [
        replace(c, tokens=np.full(n, 5, np.int32), logprobs=np.zeros(n, np.float32))
        for c, n in zip(asked.completions, lengths)
    ]
    assert rewards.score(assemble(asked.questions, long)).rewards.tolist() == [0.0, -1.5]


def test_repetition_costs_and_variety_does_not(rewards_of: Callable[..., Rewards], tokenizer: Tokenizer) -> None:
    asked = rollout(tokenizer, "2", "2")
    texts = [np.array([5, 6, 5, 6, 5, 6], np.int32), np.array([5, 6, 7, 8, 9, 10], np.int32)]
    varied = [
        replace(c, tokens=tokens, logprobs=np.zeros(len(tokens), np.float32))
        for c, tokens in zip(asked.completions, texts)
    ]
    values = rewards_of({}, reward="repetition").score(assemble(asked.questions, varied)).rewards
    assert values[0] < -1
    assert values[1] == 0


def test_reward_model_is_clipped_and_summed_with_a_function(
    tiny_model: Path, rewards_of: Callable[..., Rewards], tokenizer: Tokenizer
) -> None:
    rewards = rewards_of(
        {"mine": lambda p, c, k: [1, 2]},
        reward="mine,model=10",
        reward_model=tiny_model,
        scoring=ScoringConfig(workers=0, clip=0.5),
    )
    scored = rewards.score(rollout(tokenizer, "2", "3"))
    assert scored.parts["model"].tolist() == [0, 0]
    assert scored.rewards.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("mine=x", "'mine=x' is none of its kind"),
        ("mine,,mine", "'' is none of its kind"),
        ("mine,mine=2", "names 'mine' twice"),
        ("mint", "unknown reward 'mint'; did you mean 'mine'"),
        ("absent.py:f", "the file 'absent.py' does not exist"),
        ("format", "set scoring.pattern"),
        ("command", "set scoring.command"),
        ("http", "set scoring.url"),
    ],
)
def test_bad_rewards_are_refused_before_anything_starts(
    rewards_of: Callable[..., Rewards], reward: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        rewards_of(lambda p, c, k: [], reward=reward)


REPORTING = """
from align_core.types import Score
from pathlib import Path


def mine(prompts, completions, columns):
    with Path(__file__).with_name("asked.txt").open("a") as file:
        file.writelines(f"{text}\\n" for text in completions)
    return [Score(value=None, error="bad") if "5" in t else Score(value=float(len(t))) for t in completions]
"""


def test_completions_are_scored_ahead_once_and_the_rest_when_it_is_asked_for(
    tmp_path: Path, make_config: Callable[..., Any], fake_world: Callable[..., Any], tokenizer: Tokenizer
) -> None:
    (tmp_path / "mine.py").write_text(REPORTING)
    scoring = ScoringConfig(workers=1, on_failure="drop", retries=0)
    config = make_config("grpo", reward=f"{tmp_path / 'mine.py'}:mine", scoring=scoring)
    with closing(Rewards(config, fake_world(), tokenizer)) as rewards:
        both = rollout(tokenizer, "22", "4 5")
        rewards.score_ahead(both.select(np.asarray([1])))
        asked, deadline = tmp_path / "asked.txt", time.monotonic() + 30
        while not (asked.exists() and asked.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert asked.read_text().split() == ["4", "5"], "scored before anybody asks for the score"
        scored = rewards.score(both)
        assert scored.rewards.tolist() == [2.0] and len(scored.failures) == 1
        assert asked.read_text().splitlines() == ["4 5", "22"]
        assert len(rewards.score(both).failures) == 1
        assert asked.read_text().splitlines() == ["4 5", "22", "22", "4 5"], "a score is handed out once"
