"""The road of the tutorial as a list of commands that a user could type, and the runner that does not repeat itself.

A step is done when the file that it writes last is there; the stages continue from their own checkpoints.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.status import Status

from align_core.atomic import write_json
from align_core.errors import WorkerError

_TAIL_LINES = 40  # of a failed command's log, shown to the user


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One command of the road."""

    name: str
    """Short, for the log's file name."""
    title: str
    """What it does, for people."""
    argv: tuple[str, ...]
    """The command, its first word a console script of one of the packages."""
    done: Path
    """Exists when the step has ended well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What running a step gave."""

    name: str
    title: str
    command: str
    seconds: float


def run_steps(steps: Sequence[Step], out: Path, console: Console) -> list[Outcome]:
    """Runs what is not done yet, in order; returns the outcomes of all, with the seconds each took when it ran.

    Raises:
        WorkerError: a command failed; carries the end of its log and the command that continues.
    """
    outcomes = {outcome.name: outcome for outcome in read_outcomes(out)}
    for number, step in enumerate(steps, start=1):
        label = f"[{number}/{len(steps)}] {step.title}"
        if step.done.exists() and step.name in outcomes:
            console.print(f"{label}: done before", markup=False)
            continue
        console.print(f"{label}\n    $ {shlex.join(step.argv)}", markup=False, soft_wrap=True)
        began = time.perf_counter()
        _run(step, out / "logs" / f"{number:02d}-{step.name}.log", console)
        seconds = time.perf_counter() - began
        outcomes[step.name] = Outcome(
            name=step.name, title=step.title, command=shlex.join(step.argv), seconds=round(seconds, 1)
        )
        write_json(out / "steps.json", [asdict(outcome) for outcome in outcomes.values()])
        console.print(f"    {seconds:.0f} s", markup=False)
    return [outcomes[step.name] for step in steps]


def read_outcomes(out: Path) -> list[Outcome]:
    """The outcomes of the steps that ended, from OUT/steps.json."""
    path = out / "steps.json"
    return [Outcome(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def _run(step: Step, log: Path, console: Console) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    program = Path(sys.executable).parent / step.argv[0]
    with log.open("a", encoding="utf-8") as file, Status("", console=console) as status:
        process = subprocess.Popen(
            [str(program), *step.argv[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "COLUMNS": "200"},  # or rich folds the log's lines at 80 columns
        )
        try:
            for line in process.stdout or ():
                file.write(line)
                file.flush()
                if line.strip():
                    status.update(line.strip()[: max(console.width - 4, 20)])
        except BaseException:
            process.terminate()
            process.wait()
            raise
        code = process.wait()
    if code or not step.done.exists():
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-_TAIL_LINES:])
        raise WorkerError(
            f"{shlex.join(step.argv)}\nended with status {code}; the end of its log ({log}):\n{tail}\n"
            "mend the cause and run the same `align tutorial` command again: it continues here"
        )
