"""The process that runs one reward function: JSON lines in, JSON lines out, until its input ends.

    python -m align_core.rewards.worker NAME

The first line holds the settings; each further one a call. What the function prints goes to the error output.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from align_core.config import ScoringConfig
from align_core.errors import AlignError
from align_core.rewards.answers import NoAnswer
from align_core.rewards.sources import resolve, scores_of


def main(argv: Sequence[str]) -> int:
    """Answers calls; returns the exit status."""
    (name,) = argv
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a function that prints must not break the protocol
    settings = json.loads(sys.stdin.readline())
    try:
        function = resolve(name, ScoringConfig(**{**settings, "command": tuple(settings["command"])}))
    except Exception as error:  # whatever a user's file does when it is loaded
        _tell(answers, {"error": str(error) if isinstance(error, AlignError) else f"{type(error).__name__}: {error}"})
        return 1
    _tell(answers, {"ready": True})
    for line in sys.stdin:
        call = json.loads(line)
        try:
            scores = scores_of(function, name, call["prompts"], call["completions"], call["columns"])
        except Exception as error:  # the function's own failure is an answer, not the end of the process
            reason = str(error) if isinstance(error, AlignError) else f"{type(error).__name__}: {error}"
            _tell(answers, {"failure": reason, "timed_out": isinstance(error, NoAnswer)})
        else:
            _tell(answers, {"scores": [dataclasses.asdict(score) for score in scores]})
    return 0


def _tell(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
