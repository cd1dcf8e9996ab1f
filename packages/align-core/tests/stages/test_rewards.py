"""Functions of the registry as rewards of completions: texts, columns, and answers that do not fit."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_core import registry
from align_core.data.records import PromptRecord
from align_core.errors import DataError
from align_core.stages.rewards import Reward, make_reward
from align_core.text import Tokenizer, load_tokenizer
from align_core.types import Batch, Completion, Score

RECORDS = [
    PromptRecord(prompt="1 + 1?", columns={"answer": "2"}),
    PromptRecord(prompt=[{"role": "system", "content": "s"}, {"role": "user", "content": "so?"}], columns={"x": 1}),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model)


@pytest.fixture
def reward_of(
    monkeypatch: pytest.MonkeyPatch,
    make_config: Callable[..., Any],
    fake_world: Callable[..., Any],
    tokenizer: Tokenizer,
) -> Callable[[object], Reward]:
    """The reward that a function, registered as `mine`, becomes."""

    def make(function: object) -> Reward:
        monkeypatch.setattr(registry, "load", lambda group, name: lambda: function)
        return make_reward(make_config("grpo", reward="mine"), fake_world(), tokenizer)

    return make


def completions(tokenizer: Tokenizer, *texts: str) -> list[Completion]:
    made = []
    for text in texts:
        tokens = np.array([*tokenizer.encode_continuation(text), tokenizer.eos_id], np.int32)
        made.append(
            Completion(
                prompt_id=0,
                sample=0,
                tokens=tokens,
                logprobs=np.zeros(len(tokens), np.float32),
                finish_reason="stop",
                version=0,
            )
        )
    return made


def test_function_gets_the_words_without_special_tokens_and_every_column(
    reward_of: Callable[..., Reward], tokenizer: Tokenizer
) -> None:
    """A column that only some records have is None for the others."""
    seen: dict[str, Any] = {}

    def function(prompts: Sequence[str], texts: Sequence[str], columns: Mapping[str, Sequence[object]]) -> list[Score]:
        seen.update(prompts=prompts, texts=texts, columns=columns)
        return [Score(value=0.5), Score(value=-1.0)]

    values = reward_of(function)(RECORDS, completions(tokenizer, "2", "3 is"), Batch.of([]))
    assert values.tolist() == [0.5, -1.0]
    assert values.dtype == np.float32
    assert seen["prompts"] == ["1 + 1?", "so?"]
    assert seen["texts"] == ["2", "3 is"]
    assert seen["columns"] == {"answer": ["2", None], "x": [None, 1]}


def test_score_that_failed_names_reward_completion_prompt_and_reason(
    reward_of: Callable[..., Reward], tokenizer: Tokenizer
) -> None:
    reward = reward_of(lambda prompts, texts, columns: [Score(value=1.0), Score(value=None, error="no number")])
    with pytest.raises(DataError, match=r"reward 'mine' could not score '3 is' for the prompt 'so\?': no number"):
        reward(RECORDS, completions(tokenizer, "2", "3 is"), Batch.of([]))


def test_too_few_scores_are_refused(reward_of: Callable[..., Reward], tokenizer: Tokenizer) -> None:
    reward = reward_of(lambda prompts, texts, columns: [Score(value=1.0)])
    with pytest.raises(DataError, match="reward 'mine' gave 1 scores for 2 completions"):
        reward(RECORDS, completions(tokenizer, "2", "3"), Batch.of([]))
