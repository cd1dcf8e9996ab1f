"""Reads a stage's settings: a recipe's defaults, then YAML files, then dotted options of the command line."""

import dataclasses
import typing
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from align_core import registry
from align_core.config import StageConfig
from align_core.errors import ConfigError, unknown_name

Config = TypeVar("Config", bound=StageConfig)

_OWN_OPTIONS = {"config", "recipe", "help", "print_config"}


def parse(config_type: type[Config], argv: Sequence[str], *, stage: str) -> Config:
    """The settings of `stage` from the words after `align STAGE`.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a value of the wrong type, a missing required key.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"align {stage}",
        description=(config_type.__doc__ or "").strip(),
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument("--recipe", help="named defaults: " + ", ".join(registry.names("align.recipes")))
    parser.add_argument("--config", action="config", help="YAML file of settings; may be given several times")
    parser.add_class_arguments(config_type, None, as_group=True)
    _check_options(config_type, argv)
    if recipe := _option(argv, "recipe"):
        parser.set_defaults(_recipe_defaults(recipe, stage))
    try:
        namespace = parser.parse_args(list(argv))
    except ArgumentError as error:
        raise ConfigError(str(error.message)) from error
    values = parser.instantiate(namespace)
    fields = {field.name for field in dataclasses.fields(config_type)}
    return config_type(**{name: value for name, value in vars(values).items() if name in fields})


def known_keys(config_type: type[object], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a config class, branches and leaves."""
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(cast("Any", config_type)):
        yield prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from known_keys(cast("type[object]", hints[field.name]), f"{prefix}{field.name}.")


def _check_options(config_type: type[object], argv: Sequence[str]) -> None:
    known = set(known_keys(config_type))
    for word in argv:
        if word.startswith("--"):
            key = word[2:].split("=", 1)[0]
            if key not in known | _OWN_OPTIONS:
                raise ConfigError(_unknown(key, known))
    for path in _options(argv, "config"):
        for key in _yaml_keys(Path(path)):
            if key not in known:
                raise ConfigError(f"{path}: {_unknown(key, known)}")


def _unknown(key: str, known: set[str]) -> str:
    """The nearest keys only: a list of all of them would hide the hint."""
    branch = key.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == branch] or sorted(known)
    return unknown_name("setting", key, siblings)


def _yaml_keys(path: Path) -> list[str]:
    if not path.is_file():
        raise ConfigError(f"settings file {str(path)!r} does not exist")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold keys and values, found a {type(tree).__name__}")
    return list(_flatten(tree))


def _flatten(tree: dict[str, object], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")


def _option(argv: Sequence[str], name: str) -> str | None:
    return next(reversed(_options(argv, name)), None)


def _options(argv: Sequence[str], name: str) -> list[str]:
    following = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == f"--{name}"]
    return following + [word.split("=", 1)[1] for word in argv if word.startswith(f"--{name}=")]


def _recipe_defaults(recipe: str, stage: str) -> dict[str, object]:
    """What the recipe sets for `stage`, as dotted keys."""
    stages = cast("dict[str, Callable[[Path, Path, Path], StageConfig]]", registry.load("align.recipes", recipe))
    if stage not in stages:
        raise ConfigError(unknown_name(f"stage of recipe {recipe}", stage, stages))
    here = Path()
    return dict(_leaves(stages[stage](here, here, here)))


def _leaves(config: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    for field in dataclasses.fields(cast("Any", config)):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        elif prefix or field.name not in ("model", "data", "out"):
            yield f"{prefix}{field.name}", value
