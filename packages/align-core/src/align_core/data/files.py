"""Which files a setting `data` names, in which proportion: `FILE`, a directory, or several `FILE:RATIO`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from align_core.errors import DataError, choices

DataFiles = Path | list[str]
"""One file or directory, or several files, each `FILE` or `FILE:RATIO`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """One file and its share."""

    path: Path
    ratio: float | None = None
    """Share of the records of every batch, relative to the other files'; None takes every record equally often."""


def data_files(data: DataFiles, *, name_in_directory: str) -> list[DataFile]:
    """The files that `data` names, each known to exist.

    Args:
        name_in_directory: the file to take where `data` is a directory, as `align data prepare` names it.

    Raises:
        DataError: a file that is not there, a ratio that is no positive number, or only some of several with a ratio.
    """
    words = [str(data)] if isinstance(data, Path) else data
    if not words:
        raise DataError("no data file is given; give --data FILE, or --data FILE:RATIO several times")
    files = [_data_file(word, name_in_directory) for word in words]
    without = [str(file.path) for file in files if file.ratio is None]
    if len(without) not in (0, len(files)):
        raise DataError(
            f"some data files have a ratio, but {choices(without)} have none; give all of them one, or none"
        )
    return files


def plain_paths(files: Sequence[DataFile]) -> str:
    """The files for a message."""
    return ", ".join(str(file.path) for file in files)


def _data_file(word: str, name_in_directory: str) -> DataFile:
    path, ratio = Path(word), None
    name, colon, number = word.rpartition(":")
    if colon and not path.exists():
        path, ratio = Path(name), _ratio(word, number)
    if path.is_dir():
        inside = path / name_in_directory
        if not inside.is_file():
            found = sorted(file.name for file in path.glob("*.jsonl"))
            raise DataError(f"data directory {str(path)!r} has no {name_in_directory!r}; give one of {choices(found)}")
        path = inside
    return DataFile(path=path, ratio=ratio)


def _ratio(word: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        raise DataError(f"data file {word!r} does not exist (FILE:RATIO ends in a number)") from None
    if not 0 < value < float("inf"):
        raise DataError(f"the ratio of {word!r} must be greater than 0 and finite, got {number}")
    return value
