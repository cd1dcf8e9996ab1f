"""Whether a run may be continued with these settings: what is computed must be the same, the rest may change."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Settings (with all below them) that may change between a run and its continuation: they change speed, place and
# tolerance, not what is computed. training.dtype is none of them: checkpoints hold float32 main weights under bfloat16.
_FREE = {
    *("out", "save_every", "keep_last", "export", "trackers", "evaluations", "eval_limit"),
    *("parallel", "reward_model_parallel", "value_parallel", "cluster"),
    *("training.micro_batch_tokens", "training.device", "training.layers", "training.async_save"),
    *("training.recompute", "training.recompute_modules", "training.router_float32"),
    *("canary_threshold", "samples", "scoring.workers", "scoring.timeout", "scoring.chunk", "scoring.retries"),
    *("scoring.on_failure", "scoring.url", "scoring.key_variable", "scoring.patience"),  # a reward server may move
    *("engine.name", "engine.tensor", "engine.dtype", "engine.device", "engine.seed"),
    *("engine.memory_fraction", "engine.kv_cache_mib", "engine.enforce_eager", "engine.max_sequences"),
    *("engine.replicas", "engine.sleep", "engine.verify", "engine.transport"),
}


def plain(config: object) -> Any:
    """A config as dicts, lists and plain values, for YAML."""
    if dataclasses.is_dataclass(config):
        return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return [plain(item) for item in config]
    return str(config) if isinstance(config, Path) else config


def changes(before: Mapping[str, Any], config: object) -> list[str]:
    """What of `config` differs from the settings of the run and matters to what it computes, sorted, in words.

    A setting that there was not when the run began is no change at its default, which is what the run did then.
    """
    return sorted(_changes(before, plain(config), _defaults(config), ""))


def newer_settings(before: Mapping[str, Any], config: object) -> list[str]:
    """Names of the settings that there were not when the run began."""
    return sorted(_newer(before, plain(config), ""))


def _changes(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str
) -> Iterator[str]:
    for key in before.keys() | now.keys():
        name = f"{prefix}{key}"
        if name in _FREE:
            continue
        if key not in now:
            yield f"{name} was {before[key]!r}, is no setting any more"
        elif key not in before:
            if key not in defaults or now[key] != defaults[key]:
                yield f"{name} was no setting yet, is {now[key]!r}"
        elif isinstance(before[key], dict) and isinstance(now[key], dict):
            yield from _changes(before[key], now[key], defaults.get(key) or {}, f"{name}.")
        elif before[key] != now[key]:
            yield f"{name} was {before[key]!r}, is {now[key]!r}"


def _newer(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in now.items():
        if key not in before:
            yield f"{prefix}{key}"
        elif isinstance(before[key], dict) and isinstance(value, dict):
            yield from _newer(before[key], value, f"{prefix}{key}.")


def _defaults(config: object) -> dict[str, Any]:
    """The defaults of a config and of the configs in it, as far as fields have one; plain like the config itself."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found[field.name] = _defaults(value)  # by its own class, whatever class stands in the field's default
        elif field.default is not dataclasses.MISSING:
            found[field.name] = plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = plain(field.default_factory())
    return found
