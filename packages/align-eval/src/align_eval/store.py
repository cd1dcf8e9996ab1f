"""A file of records that survives a kill: appended one line at a time, each line under a key that occurs once.

A record is in the file whole or not at all: it is written with one write call and synced; half a line, left by a crash,
is cut off when the file is opened again. One process writes at a time (a lock on the file, freed by the kernel when the
process ends, however it ends). Knows nothing of what the records mean.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from align_core.errors import ConfigError, DataError

Key = tuple[object, ...]
Record = Mapping[str, object]


class Store:
    """Records of one file by key. A context manager; opening it takes the lock."""

    def __init__(self, path: Path, key_fields: Sequence[str]) -> None:
        """Opens or makes `path`; `key_fields` name the fields of a record that together identify it.

        Raises:
            ConfigError: another process has the file open.
            DataError: a line before the last is not such a record.
        """
        self._path = path
        self._fields = tuple(key_fields)
        self._records: dict[Key, Record] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise ConfigError(
                f"{str(path)!r} is in use by another process; wait for it, or choose another --out"
            ) from None
        try:
            self._load()
        except BaseException:
            os.close(self._file)
            raise

    def __contains__(self, key: Key) -> bool:
        return key in self._records

    def get(self, key: Key) -> Record | None:
        """The record under `key`, if there is one."""
        return self._records.get(key)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def append(self, record: Record) -> None:
        """Adds a record; when this returns, it is on the disk.

        Raises:
            DataError: its key is taken already, or it lacks a field of the key.
        """
        key = self._key(record)
        if key in self._records:
            raise DataError(f"{str(self._path)!r} already holds a record of {self._named(key)}")
        data = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        written = os.write(self._file, data)
        if written != len(data):
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise DataError(f"{str(self._path)!r} cannot grow: {written} of {len(data)} bytes were written; disk full?")
        os.fsync(self._file)
        self._records[key] = record

    def close(self) -> None:
        """Frees the lock; calling it again does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self) -> None:
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
                key = self._key(record)
            except (ValueError, TypeError, DataError) as error:
                raise DataError(f"{self._path}, line {number}: not a record of this store ({error})") from error
            if key in self._records:
                raise DataError(f"{self._path}, line {number}: a second record of {self._named(key)}")
            self._records[key] = record
        if whole < len(data):
            os.ftruncate(self._file, whole)

    def _key(self, record: Record) -> Key:
        missing = [name for name in self._fields if name not in record]
        if missing:
            raise DataError(f"the record has no {missing[0]!r}")
        return tuple(record[name] for name in self._fields)

    def _named(self, key: Key) -> str:
        return ", ".join(f"{name} {value!r}" for name, value in zip(self._fields, key))


def read_store(path: Path, key_fields: Sequence[str]) -> dict[Key, Record]:
    """The records of a store's file by key, without taking its lock or mending it; none of a file that is not there."""
    if not path.is_file():
        return {}
    data = path.read_bytes()
    records = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
    return {tuple(record[name] for name in key_fields): record for record in records}
