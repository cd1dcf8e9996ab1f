"""Finds what other packages bring through entry points: engines, rewards, judges, recipes, commands.

A third party adds one by declaring it in its own pyproject, for example
`[project.entry-points."align.rewards"]  my_reward = "my_package.rewards:MyReward"`.
"""

from importlib.metadata import entry_points
from typing import Literal

from align_core.errors import ConfigError, unknown_name

Group = Literal["align.engines", "align.rewards", "align.judges", "align.recipes", "align.commands"]

_KINDS: dict[str, str] = {
    "align.engines": "rollout engine",
    "align.rewards": "reward",
    "align.judges": "judge",
    "align.recipes": "recipe",
    "align.commands": "command",
}
_SHIPPED_BY: dict[tuple[str, str], str] = {
    ("align.engines", "vllm"): "align-rollout",
    ("align.rewards", "math"): "align-eval",
    ("align.commands", "convert"): "align-convert",
    ("align.commands", "eval"): "align-eval",
    ("align.commands", "rollout"): "align-rollout",
}


def names(group: Group) -> list[str]:
    """The sorted names that installed packages offer in `group`."""
    return sorted({point.name for point in entry_points(group=group)})


def load(group: Group, name: str) -> object:
    """The object registered as `name`; raises ConfigError with the nearest name, or the pip line that brings it."""
    for point in entry_points(group=group):
        if point.name == name:
            return point.load()
    remedy = "a package adds one through the entry-point group " + repr(group)
    if package := _SHIPPED_BY.get((group, name)):
        raise ConfigError(
            f"{_KINDS[group]} {name!r} is part of {package}, which is not installed; run: pip install {package}"
        )
    raise ConfigError(unknown_name(_KINDS[group], name, names(group), remedy=remedy))
