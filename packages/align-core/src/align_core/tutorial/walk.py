"""The road of the tutorial as a list of commands that a user could type, and the runner that does not repeat itself.

A step is done when the file that it writes last is there; the stages continue from their own checkpoints. This file
knows nothing of what the commands do.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.status import Status
from rich.text import Text

from align_core.atomic import write_json
from align_core.errors import ConfigError, WorkerError, missing_dependency

_TAIL_LINES = 40  # of a failed command's log, shown to the user


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One command of the road."""

    name: str
    """Short and unique, for the log's file name."""
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
    """Of all attempts together."""


def run_steps(steps: Sequence[Step], out: Path, console: Console) -> list[Outcome]:
    """Runs what is not done yet, in order; returns the outcomes of all.

    Raises:
        ConfigError: a step that is done was done with another command.
        MissingDependencyError: a command is not installed.
        WorkerError: a command failed; carries the end of its log and how to continue.
    """
    outcomes = {outcome.name: outcome for outcome in read_outcomes(out)}
    _check_commands(steps, outcomes, out)
    _check_programs(steps)
    for number, step in enumerate(steps, start=1):
        label = f"[{number}/{len(steps)}] {step.title}"
        before = outcomes.get(step.name, _outcome(step, seconds=0.0))
        outcomes[step.name] = before
        if step.done.exists():
            console.print(f"{label}: done before", markup=False)
            continue
        console.print(f"{label}\n    $ {shlex.join(step.argv)}", markup=False, soft_wrap=True)
        began = time.perf_counter()
        try:
            _run(step, out / "logs" / f"{number:02d}-{step.name}.log", console)
        finally:
            seconds = before.seconds + time.perf_counter() - began
            outcomes[step.name] = _outcome(step, seconds=round(seconds, 1))
            write_json(out / "steps.json", [asdict(outcome) for outcome in outcomes.values()])
        console.print(f"    {seconds:.0f} s", markup=False)
    return [outcomes[step.name] for step in steps]


def read_outcomes(out: Path) -> list[Outcome]:
    """The outcomes of the steps that were begun, from OUT/steps.json."""
    path = out / "steps.json"
    return [Outcome(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def _outcome(step: Step, *, seconds: float) -> Outcome:
    return Outcome(name=step.name, title=step.title, command=shlex.join(step.argv), seconds=seconds)


def _check_commands(steps: Sequence[Step], outcomes: Mapping[str, Outcome], out: Path) -> None:
    """A report must not call results its own that other options gave."""
    for step in steps:
        before = outcomes.get(step.name)
        if before and step.done.exists() and before.command != shlex.join(step.argv):
            raise ConfigError(
                f"{out} holds a walk with other options: it ran\n{before.command}\nand now\n{shlex.join(step.argv)}\n"
                "is asked for; repeat the options to continue it, or choose another --out"
            )


def _check_programs(steps: Sequence[Step]) -> None:
    """A walk of minutes must not end at its last step for want of a package."""
    for name in dict.fromkeys(step.argv[0] for step in steps):
        if not _program(name).exists():
            package = "align-core" if name == "align" else name
            raise missing_dependency(f"the command {name!r}", package, needed_for="the tutorial")


def _program(name: str) -> Path:
    """A console script of the environment that this process runs in, whether or not it is on the PATH."""
    return Path(sys.executable).parent / name


def _run(step: Step, log: Path, console: Console) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, Status("", console=console) as status, _start(step) as process:
        try:
            for line in process.stdout or ():
                file.write(line)
                file.flush()
                if line.strip():
                    status.update(Text(line.strip()[: max(console.width - 4, 20)]))  # Text: a log is not markup
        except BaseException:
            process.terminate()
            raise
        code = process.wait()
    if code or not step.done.exists():
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-_TAIL_LINES:])
        ending = f"ended with status {code}" if code else f"ended without writing {step.done}"
        raise WorkerError(
            f"{shlex.join(step.argv)}\n{ending}; the end of its log ({log}):\n{tail}\n"
            "mend the cause and run the same `align tutorial` command again: it continues here"
        )


def _start(step: Step) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [str(_program(step.argv[0])), *step.argv[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "COLUMNS": "200"},  # or rich folds the log's lines at 80 columns
    )
