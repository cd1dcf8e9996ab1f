"""Checks of a reward function: one score or reason a completion, whatever else is in the call."""

import math
from collections.abc import Mapping, Sequence

from align_core.conformance.expectations import expect
from align_core.contracts import RewardFunction
from align_core.types import Score


def check_reward(
    reward: RewardFunction,
    *,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[object]],
) -> None:
    """One finite score or reason a completion, the same whatever else is in the call."""
    scores = list(reward(prompts, completions, columns))
    expect(len(scores) == len(completions), f"{len(completions)} completions got {len(scores)} scores")
    for score in scores:
        expect(isinstance(score, Score), f"a score is a {type(score).__name__}, not an align_core.types.Score")
        expect(score.value is None or math.isfinite(score.value), f"a score is {score.value}")
    expect(list(reward(prompts, completions, columns)) == scores, "the same call twice gives different scores")
    for i, score in enumerate(scores):
        one = {name: [values[i]] for name, values in columns.items()}
        expect(
            list(reward([prompts[i]], [completions[i]], one)) == [score],
            f"completion {i} is scored differently when it comes alone",
        )
    none: Mapping[str, Sequence[object]] = {name: [] for name in columns}
    expect(list(reward([], [], none)) == [], "no completions must give no scores")
