"""What a run's directory holds of an earlier run, and whether settings, data and models may go on with it.

Reads only, so that a dry run says what the run itself would say.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from align_core.config import StageConfig
from align_core.errors import ConfigError, DataError
from align_core.fingerprint import fingerprint
from align_core.stages.continuing import changes, newer_settings

logger = logging.getLogger(__name__)


class Fingerprinted(Protocol):
    """Data that can be recognised."""

    def fingerprint(self) -> list[Mapping[str, object]]:
        """Of each file, what another file would not have."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a run reads, as a continued one recognises it."""

    data: Mapping[str, list[Mapping[str, object]]]
    """Fingerprints of the files of each setting that names data."""
    code: Mapping[str, str]
    """Hashes of the user's files that the run calls."""
    models: Mapping[str, str]
    """Fingerprints of what the models' directories hold, by setting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """An earlier run; all is empty where there was none."""

    settings: Mapping[str, Any]
    record: Mapping[str, Any]
    """data.json: the run's id and its `Inputs`."""
    steps: Sequence[int]
    """Those that are saved, in no order."""
    finished: bool

    @property
    def begun(self) -> bool:
        """Whether there is something to continue."""
        return self.finished or bool(self.steps)


def inputs_of(config: StageConfig, data: Mapping[str, Fingerprinted], code: Sequence[Path]) -> Inputs:
    """Args: `data`: the setting's name and its data set; `code`: files of the user's."""
    named = {name: getattr(config, name, None) for name in ("model", "reward_model")}
    return Inputs(
        data={name: found.fingerprint() for name, found in data.items()},
        code={str(path): hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() for path in code},
        models={name: fingerprint(path) for name, path in named.items() if path is not None and path.is_dir()},
    )


def look(out: Path) -> Found:
    """What `out`, which need not be there, holds."""
    settings, record = out / "config.yaml", out / "data.json"
    return Found(
        settings=yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.exists() else {},
        record=json.loads(record.read_text(encoding="utf-8")) if record.exists() else {},
        steps=saved_steps(out),
        finished=(out / "result.json").exists(),
    )


def saved_steps(out: Path) -> list[int]:
    """Numbers of the checkpoints in `out`."""
    names = (entry.name for entry in (out / "checkpoints").glob("step_*"))
    return [int(name.removeprefix("step_")) for name in names if name.removeprefix("step_").isdigit()]


def check_same(found: Found, config: StageConfig, inputs: Inputs) -> None:
    """Refuse to go on with other settings, data or models than the run began with; tells what else has changed.

    Raises:
        ConfigError: other settings.
        DataError: other data, or another model in the same directory.
    """
    if not found.begun:
        return
    out, record = config.out, found.record
    if found.settings:
        if newer := newer_settings(found.settings, config):
            logger.info("settings that are newer than the run in %s: %s", out, ", ".join(newer))
        if changed := changes(found.settings, config):
            raise ConfigError(
                f"{out} holds a run with other settings ({'; '.join(changed)}); "
                "repeat those settings to continue it, or choose another --out"
            )
    for name, files in inputs.data.items():
        old = record.get("data", {}).get(name)
        if old is not None and old != files:
            raise DataError(
                f"{name} of the run in {out} has changed: {_data_change(old, files)}; "
                "restore the file to continue, or choose another --out"
            )
    for name, model in inputs.models.items():
        if record.get("models", {}).get(name, model) != model:
            raise DataError(
                f"{str(getattr(config, name))!r} holds another model than when the run in {out} began "
                f"(setting {name}); restore it to continue, or choose another --out"
            )
    for file, code in inputs.code.items():
        if record.get("code", {}).get(file, code) != code:
            logger.warning("%s has changed since the run in %s began; it goes on with the new one", file, out)


def is_stale(found: Found, config: StageConfig, inputs: Inputs) -> bool:
    """Whether what a run computed before its first step, the only one it came to, is of other settings or inputs."""
    if found.begun:
        return False
    record = found.record
    other_inputs = record and (record["data"], record.get("models", inputs.models)) != (inputs.data, inputs.models)
    return bool(other_inputs or (found.settings and changes(found.settings, config)))


def _data_change(before: list[dict[str, object]], now: list[Mapping[str, object]]) -> str:
    if len(before) != len(now):
        return f"{len(before)} files then, {len(now)} now"
    was, found = next((old, new) for old, new in zip(before, now) if old != dict(new))
    return ", ".join(f"{key} was {was[key]}, is {found[key]}" for key in was if was[key] != found[key])
