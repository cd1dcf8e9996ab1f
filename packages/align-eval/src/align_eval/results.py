"""Writes results so that a reader never meets half a file: to a neighbour first, then renamed over the target.

Knows nothing of what the records mean.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Replaces `path` by `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Replaces `path` by one JSON object a line, atomically."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records))


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
