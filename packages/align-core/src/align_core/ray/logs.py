"""The last lines that a worker wrote, read on the node where it ran, also after it died."""

import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

LINES = 20
_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Whereabouts:
    """Where a worker process is, and where its output goes."""

    node_id: str
    address: str
    """IP address of its node."""
    pid: int
    files: tuple[Path, ...]
    """Its standard output and error."""


def here() -> Whereabouts:
    """Of the calling worker."""
    return Whereabouts(
        node_id=ray.get_runtime_context().get_node_id(),
        address=ray.util.get_node_ip_address(),
        pid=os.getpid(),
        files=tuple(dict.fromkeys(path for fd in (1, 2) if (path := _file_of(fd)) is not None)),
    )


def tail(worker: Whereabouts) -> str:
    """The last lines of its output; a text that says why there are none, if so."""
    try:
        if worker.node_id == ray.get_runtime_context().get_node_id():
            return last_lines(worker.files)
        task = ray.remote(last_lines).options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=worker.node_id, soft=False)
        )
        text: str = ray.get(task.remote(worker.files), timeout=_TIMEOUT_S)
    except Exception as error:  # the worker's own error is being reported: this one must not take its place
        return f"(its log on node {worker.address} cannot be read: {type(error).__name__})"
    return text


def last_lines(files: tuple[Path, ...]) -> str:
    """The last LINES lines of the files together, each indented; Ray's own markers are left out."""
    lines: deque[str] = deque(maxlen=LINES)
    for path in files:
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                lines.extend(line.rstrip() for line in file if line.strip() and not line.startswith(":"))
        except OSError as error:
            lines.append(f"({path}: {error.strerror})")
    return "\n".join(f"  {line}" for line in lines) or "  (it wrote nothing)"


def _file_of(fd: int) -> Path | None:
    try:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
    except OSError:  # no /proc on this system
        return None
    return path if path.is_file() else None
