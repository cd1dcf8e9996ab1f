"""Records of a JSON-lines file, read one at a time by an index of where each line begins; the file is never in memory.

Opening a file reads it once, line by line: every line is parsed and checked, so that a bad one is found before anything
else starts, and the contents are hashed, so that a continued run notices another file. What stays in memory is eight
bytes a record.
"""

import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar, overload

from align_core.data.json_text import parse_json
from align_core.errors import DataError

Record = TypeVar("Record")
Row = dict[str, object]


class LineRecords(Sequence[Record], Generic[Record]):
    """The records of one file, parsed when they are asked for."""

    def __init__(self, path: Path, parse: Callable[[Row], Record], *, expected: str) -> None:
        """Indexes and checks `path`.

        Raises:
            DataError: the file is missing, empty, no JSON lines, or has a bad line, which is named.
        """
        if not path.is_file():
            raise DataError(f"data file {str(path)!r} does not exist; give a JSON-lines file of {expected}")
        self.path = path
        self._parse, self._expected = parse, expected
        self._stamp = _stamp(path)
        self._starts, self._numbers, self._digest = self._scan()
        if not self._numbers:
            raise DataError(f"{path} holds no records; expected lines of {expected}")

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        if _stamp(self.path) != self._stamp:
            raise DataError(f"data file {str(self.path)!r} was changed while it was in use; restore it")
        with self.path.open("rb") as file:
            file.seek(self._starts[row])
            return self._record(file.readline(), self._numbers[row])

    def where(self, index: int) -> str:
        """File and line of a record, for messages."""
        return f"{self.path}, line {self._numbers[index]}"

    def fingerprint(self) -> Mapping[str, object]:
        """Size, number of records and hash of the contents; the same for a copy elsewhere."""
        return {"bytes": self._stamp[0], "records": len(self), "blake2b": self._digest}

    def _scan(self) -> tuple["array[int]", "array[int]", str]:
        starts, numbers, digest, position = array("q"), array("q"), hashlib.blake2b(digest_size=16), 0
        with self.path.open("rb") as lines:
            if lines.read(1) == b"[":
                raise DataError(
                    f"{self.path} begins with '[': a JSON array, not JSON lines; write one object a line "
                    f"('align data prepare' does it for known formats); expected {self._expected}"
                )
            lines.seek(0)
            for number, line in enumerate(lines, start=1):
                digest.update(line)
                if line.strip():
                    self._record(line, number)
                    starts.append(position)
                    numbers.append(number)
                position += len(line)
        return starts, numbers, digest.hexdigest()

    def _record(self, line: bytes, number: int) -> Record:
        try:  # decoded line by line, so that a byte that is not UTF-8 has a line number
            row = parse_json(line)
            if not isinstance(row, dict):
                raise DataError(f"a {type(row).__name__}, not an object")
            return self._parse(row)
        except DataError as error:
            raise DataError(f"{self.path}, line {number}: {error}; expected {self._expected}") from error


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
