"""Reads a stage's settings: a recipe's defaults, then YAML files, then dotted options of the command line."""

import dataclasses
import difflib
import json
import re
import typing
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from align_core import registry
from align_core.config import ResponsesConfig, StageConfig
from align_core.errors import ConfigError, choices, unknown_name

Config = TypeVar("Config", bound=StageConfig | ResponsesConfig)

DRY_RUN = frozenset({"--dry-run", "--dry_run"})
"""Words that ask for the plan of a stage instead of the stage."""

_OWN_OPTIONS = {"config", "recipe", "help", "print_config", "dry-run", "dry_run"}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}


def parse(config_type: type[Config], argv: Sequence[str], *, stage: str) -> Config:
    """The settings of `stage` from the words after `align STAGE`.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a value of the wrong type, a missing required key.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _parser(config_type, stage)
    _check_options(config_type, argv)
    if recipe := _option(argv, "recipe"):
        parser.set_defaults(_recipe_defaults(recipe, stage))
        argv = _without(argv, "recipe")
    words = _files_first(_gathered(config_type, [word for word in argv if word not in DRY_RUN]))
    try:
        namespace = parser.parse_args(words)
    except ArgumentError as error:
        raise ConfigError(_reworded(config_type, str(error.message), stage, _options(argv, "config"))) from error
    _check_branches(config_type, namespace)
    values = parser.instantiate(namespace)
    fields = {field.name for field in dataclasses.fields(config_type)}
    return config_type(**{name: value for name, value in vars(values).items() if name in fields})


def _parser(config_type: type[Config], stage: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"align {stage}",
        description=(config_type.__doc__ or "").strip(),
        exit_on_error=False,
        default_env=False,
    )
    recipes = "named defaults: " + ", ".join(registry.names("align.recipes"))
    parser.add_argument("--recipe", default=SUPPRESS, help=recipes)  # suppressed, so that --print_config is a --config
    if issubclass(config_type, StageConfig):
        plan = "print what would be done, checked as the stage checks it; start and write nothing"
        parser.add_argument("--dry-run", action="store_true", default=SUPPRESS, help=plan)
    parser.add_argument("--config", action="config", help="YAML file of settings; may be given several times")
    parser.add_class_arguments(config_type, None, as_group=True)
    for action in parser._actions:  # a list gets `--data+ FILE` besides, which forgets `--data FILE`; ours is to repeat
        action.option_strings = [option for option in action.option_strings if not option.endswith("+")]
    return parser


def known_keys(config_type: type[object], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a config class, branches and leaves."""
    return iter(_types(config_type, prefix))


def _types(config_type: type[object], prefix: str = "") -> dict[str, Any]:
    """The type of every dotted key."""
    hints = typing.get_type_hints(config_type)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cast("Any", config_type)):
        found[prefix + field.name] = hints[field.name]
        if dataclasses.is_dataclass(hints[field.name]):
            found |= _types(cast("type[object]", hints[field.name]), f"{prefix}{field.name}.")
    return found


def _check_options(config_type: type[object], argv: Sequence[str]) -> None:
    known = set(known_keys(config_type))
    for word in argv:
        if word.startswith("--"):
            key = word[2:].split("=", 1)[0]
            if key not in known | _OWN_OPTIONS:
                raise ConfigError(_unknown(key, known))
    for path in _options(argv, "config"):
        for key in _yaml_settings(Path(path)):
            if key in _OWN_OPTIONS:
                raise ConfigError(f"{path}: {key!r} is no setting; give --{key} on the command line")
            if key not in known:
                raise ConfigError(f"{path}: {_unknown(key, known)}")


def _unknown(key: str, known: set[str]) -> str:
    """The nearest keys only: a list of all of them would hide the hint."""
    branch = key.rpartition(".")[0]
    if branch and branch not in known:
        near = difflib.get_close_matches(key, known, n=1)
        branch = near[0].rpartition(".")[0] if near else ""
    return unknown_name("setting", key, [name for name in known if name.rpartition(".")[0] == branch])


def _check_branches(config_type: type[object], namespace: Namespace) -> None:
    """Refuses `optimizer: null` or `optimizer: 5`, which the parser would let through to a constructor."""
    for key, kind in _types(config_type).items():
        known = [name for name in known_keys(config_type) if name.rpartition(".")[0] == key]
        found = namespace.get(key)
        if known and dataclasses.is_dataclass(kind) and not isinstance(found, Namespace):
            got = "null" if found is None else repr(found)
            raise ConfigError(f"{key} is a group of settings, got {got}; set {choices(known)} or leave it out")


def _reworded(config_type: type[object], message: str, stage: str, files: Sequence[str]) -> str:
    """The parser's complaint in the words of this project, where it has a form that is known, and the file's name."""
    if wrong := re.match(r'Parser key "(.+?)":.*(?:Got|Given) value: (.*)', message, flags=re.DOTALL):
        key, value = wrong.groups()
        source = next((f"{file}: " for file in files if str(_yaml_settings(Path(file)).get(key)) == value), "")
        return f"{source}{key} must be {_kind(_types(config_type).get(key))}, got {value!r}"
    if missing := re.match(r"the following arguments are required: (.*)", message):
        return f"align {stage} needs " + ", ".join(f"--{key}" for key in missing.group(1).split(", "))
    return message


def _kind(hint: Any) -> str:
    """A type in words: `a whole number`, `'cpu' or 'cuda'`."""
    if typing.get_origin(hint) is typing.Literal:
        return choices(typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return "a list"
    if typing.get_origin(hint) is tuple:
        return f"a list of {_kind(typing.get_args(hint)[0])}"
    if members := typing.get_args(hint):
        return " or ".join("null" if member is type(None) else _kind(member) for member in members)
    return _KINDS.get(hint, "a group of settings")


def _yaml_settings(path: Path) -> dict[str, object]:
    """Every dotted key of a file, branches and leaves, with its value."""
    if not path.is_file():
        raise ConfigError(f"settings file {str(path)!r} does not exist")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold keys and values, found a {type(tree).__name__}")
    return dict(_flatten(tree))


def _flatten(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")


def _files_first(argv: Sequence[str]) -> list[str]:
    """The same words with `--config FILE` in front: an option wins over a file wherever it stands."""
    files: list[str] = []
    others: list[str] = []
    words = iter(argv)
    for word in words:
        place = files if word.split("=", 1)[0] == "--config" else others
        place.append(word)
        if word == "--config":
            place.extend(value for value in [next(words, None)] if value is not None)
    return files + others


def _gathered(config_type: type[object], argv: Sequence[str]) -> list[str]:
    """Options of lists that are given several times, as one: `--data a --data b` is `--data ["a", "b"]`; and one value
    of a list of texts as that list."""
    words = list(argv)
    for key, kind in _types(config_type).items():
        values = _options(words, key)
        alone = len(values) == 1 and _is_list_of_texts(kind) and not values[0].startswith("[")
        if not alone and (len(values) < 2 or not _takes_list(kind)):
            continue
        words = [*_without(words, key), f"--{key}", json.dumps(values)]
    return words


def _without(argv: Sequence[str], name: str) -> list[str]:
    """The words less every `--name VALUE` and `--name=VALUE`."""
    kept = []
    words = iter(argv)
    for word in words:
        if word == f"--{name}":
            next(words, None)
        elif not word.startswith(f"--{name}="):
            kept.append(word)
    return kept


def _takes_list(hint: Any) -> bool:
    return typing.get_origin(hint) in (list, tuple) or any(_takes_list(member) for member in typing.get_args(hint))


def _is_list_of_texts(hint: Any) -> bool:
    """Of texts or words to choose among, or such a list or null; not `data`, of which one value is a path."""
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    if typing.get_origin(hint) not in (list, tuple):
        return len(members) == 1 and _is_list_of_texts(members[0])
    return members[0] is str or typing.get_origin(members[0]) is typing.Literal


def _option(argv: Sequence[str], name: str) -> str | None:
    return next(reversed(_options(argv, name)), None)


def _options(argv: Sequence[str], name: str) -> list[str]:
    """Every value of `--name VALUE` and `--name=VALUE`, in order."""
    found = []
    for word, following in zip(argv, [*argv[1:], None]):
        if word == f"--{name}" and following is not None:
            found.append(following)
        elif word.startswith(f"--{name}="):
            found.append(word.split("=", 1)[1])
    return found


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
        elif prefix or field.name not in ("model", "data", "out", "reward_model"):
            yield f"{prefix}{field.name}", value
