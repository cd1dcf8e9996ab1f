"""Reads files of one JSON object a line, and says of a bad line where it is. Knows nothing of what the objects mean."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align_core.errors import DataError, choices


def read_rows(path: Path, needed: Sequence[str] = ()) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """Line number from 1, place for error messages, and object of each line that is not blank.

    Raises:
        DataError: the file does not exist, or a line is no object or lacks one of the fields `needed`.
    """
    if not path.is_file():
        raise DataError(f"the file {str(path)!r} does not exist")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 (byte {error.start + 1} of the line)") from error
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected an object, got {type(row).__name__}")
            missing = [name for name in needed if name not in row]
            if missing:
                raise DataError(f"{where}: no {choices(missing)}, only {choices(row)}")
            yield number, where, row
