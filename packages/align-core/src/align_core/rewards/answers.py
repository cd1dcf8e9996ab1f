"""The JSON that a command or a server answers with: one number, null or object a completion."""

import math
from typing import cast

from align_core.errors import DataError
from align_core.types import Score


class NoAnswer(DataError):
    """There is none within `scoring.timeout`."""


def read_scores(document: object, *, count: int) -> list[Score]:
    """Scores from `[...]` or `{"scores": [...]}` of numbers or {"value", "error", "extracted"}.

    Raises:
        ValueError: another shape, or another number of scores; says what was expected.
    """
    found = document.get("scores") if isinstance(document, dict) else document
    if not isinstance(found, list) or len(found) != count:
        shape = f"a list of {len(found)}" if isinstance(found, list) else f"a {type(found).__name__}"
        raise ValueError(f"expected a JSON list of {count} scores, or it under the key 'scores'; got {shape}")
    return [_read(entry) for entry in cast("list[object]", found)]


def _read(entry: object) -> Score:
    if isinstance(entry, dict):
        extracted = str(entry.get("extracted", ""))
        if entry.get("value") is None:
            return Score(value=None, error=str(entry.get("error") or "no value"), extracted=extracted)
        return _number(entry["value"], extracted)
    return _number(entry, "")


def _number(value: object, extracted: str) -> Score:
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return Score(value=float(value), extracted=extracted)
    return Score(value=None, error=f"{value!r} is no finite number", extracted=extracted)
