"""What a person sees of a sampling stage: figures of a rollout, sample completions."""

from collections.abc import Mapping

import numpy as np

from align_core.config import PolicyConfig
from align_core.rewards.sources import figure_of
from align_core.stages.clock import Clock
from align_core.stages.rewards import Scored
from align_core.stages.rollout import Question
from align_core.stages.run import Run
from align_core.text import Tokenizer
from align_core.types import Completion


class Reporter:
    """Writes each step's figures and sample completions."""

    def __init__(self, run: Run, config: PolicyConfig, tokenizer: Tokenizer) -> None:
        self._run, self._config, self._tokenizer = run, config, tokenizer

    def step(self, step: int, scored: Scored, clock: Clock, figures: Mapping[str, float]) -> None:
        """Logs one step: its completions, `figures` of the stage's own, seconds by phase; and sample completions."""
        self._run.samples(step, sample_rows(scored, self._tokenizer, count=self._config.samples))
        self._run.log(step, {**describe(scored), **figures, **clock.laps, **rates(scored, clock.laps)})


def describe(scored: Scored) -> dict[str, float]:
    """Figures of one step's completions."""
    completions = scored.rollout.completions
    lengths = np.asarray([len(c.tokens) for c in completions])
    group_B = scored.rollout.batch.sequence_column("group")
    spread = [np.ptp(scored.rewards[group_B == group]) for group in np.unique(group_B)]
    figures = {
        "reward": float(scored.rewards.mean()),
        "reward_std": float(scored.rewards.std()),
        "tied_groups": float(np.mean(np.asarray(spread) == 0)),
        "length": float(lengths.mean()),
        "length_max": float(lengths.max()),
        "truncated": float(np.mean([c.finish_reason == "length" for c in completions])),
        "failed_scores": len(scored.failures) / (len(scored.failures) + len(completions)),
    }
    return figures | part_means(scored, "reward")


def part_means(scored: Scored, prefix: str) -> dict[str, float]:
    """The mean of each reward alone, where there are several."""
    if len(scored.parts) < 2:
        return {}
    return {f"{prefix}_{figure_of(name)}": float(values.mean()) for name, values in scored.parts.items()}


def rates(scored: Scored, seconds: Mapping[str, float]) -> dict[str, float]:
    """Tokens a second: of generation (new ones), and of the whole step (prompts and completions)."""
    new = sum(len(c.tokens) for c in scored.rollout.completions)
    generating = seconds.get("seconds_generate", 0.0)
    whole = sum(seconds.values())
    return {
        "generated_tokens_per_second": new / generating if generating else 0.0,
        "tokens_per_second": len(scored.rollout.batch.tokens) / whole if whole else 0.0,
    }


def sample_rows(scored: Scored, tokenizer: Tokenizer, *, count: int) -> list[dict[str, object]]:
    """Some completions of a step, spread over its groups, with what a person needs to judge their rewards; after them
    up to `count` of those that could not be scored, with the reason."""
    rows = []
    for i in np.unique(np.linspace(0, len(scored.rewards) - 1, num=count).astype(int)) if count else []:
        scores = {
            "reward": float(scored.rewards[i]),
            "parts": {name: float(values[i]) for name, values in scored.parts.items()},
            "extracted": scored.extracted[i],
            "error": "",
        }
        rows.append(_row(scored.rollout.questions[i], scored.rollout.completions[i], scores, tokenizer))
    for failure in scored.failures[:count]:
        scores = {"reward": None, "parts": {}, "extracted": "", "error": failure.reason}
        rows.append(_row(failure.question, failure.completion, scores, tokenizer))
    return rows


def _row(
    question: Question, completion: Completion, scores: Mapping[str, object], tokenizer: Tokenizer
) -> dict[str, object]:
    return {
        "prompt": tokenizer.decode(question.prompt.tokens),
        "reply": tokenizer.decode(completion.tokens),
        **scores,
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.tokens),
        "version": completion.version,
    }
