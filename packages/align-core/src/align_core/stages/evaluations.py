"""Evaluations of the policy in the middle of its training, by name (`align.evaluations`), on the live engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from align_core import registry
from align_core.config import EvaluationConfig, PolicyConfig
from align_core.contracts import Evaluation, RolloutEngine
from align_core.errors import ConfigError
from align_core.text import Tokenizer


@dataclass(frozen=True)
class _Named:
    name: str
    measure: Evaluation
    config: EvaluationConfig


class Evaluations:
    """Those of a stage's setting `evaluations`, found and checked before anything starts."""

    def __init__(self, config: PolicyConfig, tokenizer: Tokenizer) -> None:
        """Raises ConfigError for an unknown name or data that is not there."""
        self._tokenizer = tokenizer
        self._all = [_open(name, data, config) for name, data in parse_evaluations(config.evaluations)]

    def __bool__(self) -> bool:
        return bool(self._all)

    def __call__(self, engine: RolloutEngine, *, step: int) -> dict[str, float]:
        """What they find, as `eval_` and their own names; `step` updates are in the engine's weights."""
        found: dict[str, float] = {}
        for each in self._all:
            each.config.out.mkdir(parents=True, exist_ok=True)
            figures: Mapping[str, float] = each.measure(engine, self._tokenizer, each.config, step=step)
            found |= {f"eval_{metric}": float(value) for metric, value in figures.items()}
        return found


def parse_evaluations(text: str) -> list[tuple[str, Path]]:
    """Name and data of each, from `NAME=PATH,...`.

    Raises:
        ConfigError: a part without name or path, or a name given twice (its figures would have the same names).
    """
    found: dict[str, Path] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, path = part.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"evaluations are written NAME=PATH,..., got {part!r}; for example accuracy=test.jsonl")
        if name in found:
            raise ConfigError(f"evaluation {name!r} is given twice, for {str(found[name])!r} and {path!r}; keep one")
        found[name] = Path(path)
    return list(found.items())


def _open(name: str, data: Path, config: PolicyConfig) -> _Named:
    registry.check("align.evaluations", name)
    if not data.exists():
        raise ConfigError(f"the data of evaluation {name!r}, {str(data)!r}, does not exist; give NAME=PATH")
    settings = EvaluationConfig(
        data=data,
        out=config.out / "evaluations" / name,
        template=config.template,
        context=config.engine.context,
        max_tokens=config.sampling.max_tokens,
        limit=config.eval_limit,
    )
    return _Named(name, cast("Evaluation", registry.load("align.evaluations", name)), settings)
