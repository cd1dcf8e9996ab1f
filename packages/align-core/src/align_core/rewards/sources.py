"""From a reward's name to its function: built in, of an installed package, or a function in a file of the user's.

A function takes (prompts, completions, columns) and returns one number, `Score` or None (with no score) a completion.
"""

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from align_core import registry
from align_core.config import ScoringConfig
from align_core.contracts import RewardFunction
from align_core.errors import ConfigError, DataError, unknown_name
from align_core.rewards.command import CommandReward
from align_core.rewards.format import FormatReward
from align_core.rewards.http import HttpReward, longest_post
from align_core.rewards.judge import AT_ONCE, JudgeReward
from align_core.types import Score

BUILT_IN: Mapping[str, Callable[[ScoringConfig], RewardFunction]] = {
    "command": CommandReward,
    "format": FormatReward,
    "http": HttpReward,
    "judge": JudgeReward,
}
_MARGIN = 5.0  # seconds; a reward that ends its requests itself says more about them than the end of its process
IN_DRIVER = ("model", "overlong", "repetition")
"""Rewards that need more than texts: the reward model, the lengths in tokens, and the tokens themselves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighted:
    """One term of a reward."""

    name: str
    weight: float


def parse_rewards(text: str) -> list[Weighted]:
    """`math=1,model=0.5` in parts; a name without a weight has weight 1.

    Raises:
        ConfigError: an empty name, a weight that is no finite number, a name given twice, or two under one figure.
    """
    found: list[Weighted] = []
    for word in text.split(","):
        name, separator, number = word.strip().partition("=")
        try:
            weight = float(number) if separator else 1.0
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight):
            raise ConfigError(f"reward {text!r} is not NAME[=WEIGHT],...; {word.strip()!r} is none of its kind")
        if name in (other.name for other in found):
            raise ConfigError(f"reward {text!r} names {name!r} twice; add up the weights")
        found.append(Weighted(name=name, weight=weight))
    if len(found) > 1:
        _check_figures([part.name for part in found])
    return found


def figure_of(name: str) -> str:
    """What stands behind `reward_` where `name` is logged alone: a function of a file goes by its own name."""
    return name.rpartition(":")[2]


def _check_figures(names: Sequence[str]) -> None:
    shown: dict[str, str] = {"std": "the spread of the whole reward"}
    for name in names:
        other = shown.setdefault(figure_of(name), repr(name))
        if other != repr(name):
            figure = f"reward_{figure_of(name)}"
            raise ConfigError(f"reward {name!r} and {other} are both logged as {figure!r}; rename one of the functions")


def resolve(name: str, scoring: ScoringConfig) -> RewardFunction:
    """The function called `name`.

    Raises:
        ConfigError: no such name, file or function, or a setting that it needs is missing.
    """
    check_name(name)
    if name in BUILT_IN:
        return BUILT_IN[name](scoring)
    made = from_file(name) if _is_file(name) else registry.load("align.rewards", name)
    if isinstance(made, type) or not _is_file(name):
        made = cast("Callable[[], object]", made)()
    if not callable(made):
        raise ConfigError(f"reward {name!r} is a {type(made).__name__} and cannot be called")
    return cast("RewardFunction", made)


def longest_call(name: str, scoring: ScoringConfig, *, count: int) -> float:
    """Seconds after which a call about `count` completions counts as hanging.

    The time limit is one of a call, but one of a request for rewards that ask a server.
    """
    if name == "http":
        return longest_post(scoring) + _MARGIN
    if name == "judge":
        return math.ceil(count / AT_ONCE) * longest_post(scoring) + _MARGIN
    return scoring.timeout


def check_name(name: str) -> None:
    """Raises ConfigError unless `name` can be resolved; runs no code of the user's."""
    if name in BUILT_IN or name in IN_DRIVER:
        return
    if _is_file(name):
        path = Path(name.rpartition(":")[0])
        if not path.is_file():
            raise ConfigError(f"reward {name!r}: the file {str(path)!r} does not exist")
        return
    known = registry.names("align.rewards")
    if name not in known and not registry.package_of("align.rewards", name):
        remedy = "or a function of yours as FILE.py:NAME"
        raise ConfigError(unknown_name("reward", name, [*known, *BUILT_IN, *IN_DRIVER], remedy=remedy))
    registry.check("align.rewards", name)


def from_file(name: str) -> object:
    """The object NAME of `FILE.py:NAME`; the file is run as a module of its own."""
    file, _, attribute = name.rpartition(":")
    path = Path(file).absolute()
    spec = importlib.util.spec_from_file_location(f"align_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"reward {name!r}: {str(path)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in the file look their module up
    spec.loader.exec_module(module)
    if not hasattr(module, attribute):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise ConfigError(unknown_name(f"function in {file}", attribute, public))
    return getattr(module, attribute)


def scores_of(
    function: RewardFunction,
    name: str,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[object]],
) -> list[Score]:
    """The function's answers as scores: numbers are taken as values, None and values that are not finite as failures.

    Raises:
        DataError: not one answer a completion.
    """
    answers = list(cast("Sequence[object]", function(prompts, completions, columns)))
    if len(answers) != len(completions):
        raise DataError(f"reward {name!r} gave {len(answers)} scores for {len(completions)} completions")
    return [_score(answer) for answer in answers]


def _score(answer: object) -> Score:
    if isinstance(answer, Score):  # whose fields a user's function may have filled with other types
        value, extracted = answer.value, cast("object", answer.extracted)
        return Score(
            value=None if value is None else float(value),
            error=str(answer.error),
            extracted="" if extracted is None else str(extracted),
        )
    if answer is None:
        return Score(value=None, error="the function returned None")
    if not hasattr(answer, "__float__"):
        return Score(value=None, error=f"the function returned a {type(answer).__name__}, not a number")
    value = float(answer)
    return Score(value=value) if math.isfinite(value) else Score(value=None, error=f"the value is {value}")


def _is_file(name: str) -> bool:
    return ".py:" in name
