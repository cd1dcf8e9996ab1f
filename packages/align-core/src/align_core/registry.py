"""Finds what other packages bring through entry points: engines, rewards, losses, judges, recipes, commands.

A third party adds one by declaring it in its own pyproject, for example
`[project.entry-points."align.rewards"]  my_reward = "my_package.rewards:MyReward"`.
"""

from importlib.metadata import entry_points
from typing import Literal

from align_core.errors import ConfigError, unknown_name

Group = Literal[
    "align.engines",
    "align.rewards",
    "align.losses",
    "align.judges",
    "align.evaluations",
    "align.recipes",
    "align.commands",
    "align.trackers",
]

_KINDS: dict[str, str] = {
    "align.engines": "rollout engine",
    "align.rewards": "reward",
    "align.losses": "loss",
    "align.judges": "judge",
    "align.evaluations": "evaluation",
    "align.recipes": "recipe",
    "align.commands": "command",
    "align.trackers": "tracker",
}
_SHIPPED_BY: dict[tuple[str, str], str] = {
    ("align.engines", "vllm"): "align-rollout",
    ("align.rewards", "math"): "align-eval",
    ("align.rewards", "math-verify"): "align-eval",
    ("align.judges", "openai"): "align-eval",
    ("align.evaluations", "accuracy"): "align-eval",
    ("align.evaluations", "mt-bench-answers"): "align-eval",
    ("align.commands", "convert"): "align-convert",
    ("align.commands", "eval"): "align-eval",
    ("align.commands", "rollout"): "align-rollout",
}


def package_of(group: Group, name: str) -> str | None:
    """The package of this project that brings `name`, installed or not; None if none of ours does."""
    return _SHIPPED_BY.get((group, name))


def names(group: Group) -> list[str]:
    """The sorted names that installed packages offer in `group`."""
    return sorted({point.name for point in entry_points(group=group)})


def check(group: Group, name: str) -> None:
    """Raises ConfigError, with the nearest name or the pip line that brings it, unless `name` is installed."""
    if name in names(group):
        return
    if package := package_of(group, name):
        raise ConfigError(
            f"{_KINDS[group]} {name!r} is part of {package}, which is not installed; run: pip install {package}"
        )
    remedy = f"a package adds one through the entry-point group {group!r}"
    raise ConfigError(unknown_name(_KINDS[group], name, names(group), remedy=remedy))


def load(group: Group, name: str) -> object:
    """The object registered as `name`; raises what `check` raises."""
    check(group, name)
    return next(point for point in entry_points(group=group) if point.name == name).load()
