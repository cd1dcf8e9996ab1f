"""Reward by a program: {"prompts", "completions", "columns"} as JSON on its input, a list of scores on its output.

The program is an argument list, never a line for a shell.
"""

import json
import subprocess
from collections.abc import Mapping, Sequence

from align_core.config import ScoringConfig
from align_core.contracts import RewardFunction
from align_core.errors import ConfigError, DataError
from align_core.rewards.answers import NoAnswer, read_scores
from align_core.types import Score

_SHOWN = 2000  # characters of what a failed program wrote to its error output


class CommandReward:
    """Runs `scoring.command` once a call."""

    def __init__(self, scoring: ScoringConfig) -> None:
        """Raises ConfigError without a command."""
        if not scoring.command:
            raise ConfigError(
                "reward 'command' needs a program; set scoring.command, e.g. '[\"python3\", \"mine.py\"]'"
            )
        self._scoring = scoring

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[object]]
    ) -> Sequence[Score]:
        """See `RewardFunction`; DataError where the program fails or answers in another form."""
        if not completions:
            return []
        name = self._scoring.command[0]
        request = {"prompts": list(prompts), "completions": list(completions), "columns": dict(columns)}
        try:
            done = subprocess.run(
                list(self._scoring.command),
                input=json.dumps(request),
                capture_output=True,
                text=True,
                timeout=self._scoring.timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise NoAnswer(f"command {name!r} gave no scores within {self._scoring.timeout:g} s") from error
        except OSError as error:
            raise DataError(f"command {name!r} cannot be run: {error}") from error
        if done.returncode:
            raise DataError(f"command {name!r} ended with status {done.returncode}: {done.stderr[-_SHOWN:].strip()}")
        try:
            return read_scores(json.loads(done.stdout), count=len(completions))
        except ValueError as error:
            raise DataError(f"command {name!r}: {error}") from error


_conforms: type[RewardFunction] = CommandReward
