"""Reward for a form: 1 where the whole reply matches a regular expression, else 0."""

import re
from collections.abc import Mapping, Sequence

from align_core.config import ScoringConfig
from align_core.contracts import RewardFunction
from align_core.errors import ConfigError
from align_core.types import Score


class FormatReward:
    """`scoring.pattern` against each reply, white space around it left out; the dot matches line ends too."""

    def __init__(self, scoring: ScoringConfig) -> None:
        """Raises ConfigError without a pattern, or for one that is no regular expression."""
        if not scoring.pattern:
            raise ConfigError("reward 'format' needs the regular expression of a good reply; set scoring.pattern")
        try:
            self._pattern = re.compile(scoring.pattern, re.DOTALL)
        except re.error as error:
            raise ConfigError(f"scoring.pattern {scoring.pattern!r} is no regular expression: {error}") from error

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[object]]
    ) -> Sequence[Score]:
        """See `RewardFunction`; the extraction is the first group, where the pattern has one."""
        del prompts, columns
        return [self._score(text) for text in completions]

    def _score(self, text: str) -> Score:
        match = self._pattern.fullmatch(text.strip())
        if match is None:
            return Score(value=0.0)
        return Score(value=1.0, extracted=(match.group(1) or "") if self._pattern.groups else "")


_conforms: type[RewardFunction] = FormatReward
