"""The errors that users meet. Each one is picklable, so that it survives the trip from a worker to the driver."""

import difflib
from collections.abc import Iterable


class AlignError(Exception):
    """Base of every error that a user can act on; the command line prints it without a traceback."""


class ConfigError(AlignError):
    """A setting is unknown, mistyped or contradicts another one."""


class DataError(AlignError):
    """A file or record that the user brought cannot be used as it is."""


class LayoutError(AlignError):
    """The model cannot be cut as asked: tensor, pipeline or data parallel sizes do not fit it."""


class CheckpointError(AlignError):
    """A checkpoint is missing, incomplete, or belongs to another model or run."""


class SyncError(AlignError):
    """What the rollout engine holds is not what the trainer sent."""


class MissingDependencyError(AlignError):
    """An optional package is needed; the message carries the pip line."""


class Stopped(AlignError):
    """The run was asked to stop, and has saved what continues it."""


class WorkerError(AlignError):
    """A worker process failed; carries the worker's own error, its rank and the end of its log."""


def missing_dependency(package: str, requirement: str, *, needed_for: str) -> MissingDependencyError:
    """The error for an absent optional dependency, with the line that installs it."""
    return MissingDependencyError(
        f"{needed_for} needs {package}, which is not installed; run: pip install '{requirement}'"
    )


def choices(names: Iterable[str]) -> str:
    """Sorted, quoted names for an error message: `'a', 'b' or 'c'`."""
    quoted = [repr(name) for name in sorted(names)]
    if len(quoted) < 2:
        return "".join(quoted) or "none"
    return f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def unknown_name(kind: str, name: str, known: Iterable[str], *, remedy: str = "") -> str:
    """`unknown KIND 'NAME'; did you mean 'X'? choose 'A', 'B' or 'C'`, the text for any bad name."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    tail = f" ({remedy})" if remedy else ""
    return f"unknown {kind} {name!r}{hint} choose {choices(known)}{tail}"
