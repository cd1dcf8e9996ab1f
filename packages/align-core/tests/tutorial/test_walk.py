"""The walk does each step once, shows why one failed, and continues there, whoever killed it before."""

import json
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from align_core.errors import ConfigError, MissingDependencyError, WorkerError
from align_core.tutorial.walk import Outcome, Step, read_outcomes, run_steps

# Does what its first word says, and writes the file that its second word names.
SCRIPT = """#!/bin/sh
echo "$@" >> {log}
case "$1" in
  fail) for i in $(seq 60); do echo "line $i [/not] \\\\377"; done; printf '\\377 the reason\\n' >&2; exit 3 ;;
  forget) echo nothing written ;;
  *) echo "[/bold] working"; touch "$2" ;;
esac
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Puts the command `worker` beside the interpreter; gives what it was called with so far."""
    binaries, log = tmp_path / "bin", tmp_path / "calls"
    binaries.mkdir()
    (binaries / "worker").write_text(SCRIPT.format(log=log))
    (binaries / "worker").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(binaries / "python"))
    return lambda: log.read_text().splitlines() if log.exists() else []


def step(tmp_path: Path, name: str, action: str = "work") -> Step:
    done = tmp_path / f"{name}.done"
    return Step(name=name, title=f"Do {name}", argv=("worker", action, str(done)), done=done)


def console() -> Console:
    return Console(file=StringIO(), width=200)


def shown(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_steps_run_in_order_and_are_noted(tmp_path: Path, calls: Callable[[], list[str]]) -> None:
    screen = console()
    outcomes = run_steps([step(tmp_path, "a"), step(tmp_path, "b")], tmp_path / "out", screen)
    assert calls() == [f"work {tmp_path}/a.done", f"work {tmp_path}/b.done"]
    assert [(o.name, o.title, o.command) for o in outcomes] == [
        ("a", "Do a", f"worker work {tmp_path}/a.done"),
        ("b", "Do b", f"worker work {tmp_path}/b.done"),
    ]
    assert read_outcomes(tmp_path / "out") == outcomes
    assert f"[1/2] Do a\n    $ worker work {tmp_path}/a.done\n" in shown(screen)
    assert (tmp_path / "out" / "logs" / "02-b.log").read_text() == "[/bold] working\n"


def test_finished_steps_are_not_repeated(tmp_path: Path, calls: Callable[[], list[str]]) -> None:
    steps = [step(tmp_path, "a"), step(tmp_path, "b")]
    first = run_steps(steps, tmp_path / "out", console())
    screen = console()
    assert run_steps(steps, tmp_path / "out", screen) == first
    assert len(calls()) == 2
    assert "[2/2] Do b: done before" in shown(screen)


def test_failure_shows_the_end_of_the_log_and_the_command_and_continues_there(
    tmp_path: Path, calls: Callable[[], list[str]]
) -> None:
    """The log has 61 lines; the last 40 are shown: from line 22 on, and the reason."""
    good, bad = step(tmp_path, "a"), step(tmp_path, "b", "fail")
    with pytest.raises(WorkerError) as caught:
        run_steps([good, bad], tmp_path / "out", console())
    message = str(caught.value)
    assert message.startswith(f"worker fail {tmp_path}/b.done\nended with status 3; the end of its log (")
    assert f"{tmp_path}/out/logs/02-b.log" in message
    assert "line 21 " not in message
    assert "line 22 [/not]" in message
    assert "\ufffd the reason\n" in message
    assert message.endswith("run the same `align tutorial` command again: it continues here")
    run_steps([good, step(tmp_path, "b")], tmp_path / "out", console())
    assert [call.split()[0] for call in calls()] == ["work", "fail", "work"]


def test_command_that_ends_well_without_its_file_has_failed(tmp_path: Path, calls: Callable[[], list[str]]) -> None:
    forgetful = step(tmp_path, "a", "forget")
    with pytest.raises(WorkerError, match=r"ended without writing .*/a.done; the end of its log"):
        run_steps([forgetful], tmp_path / "out", console())
    assert len(calls()) == 1


def test_step_that_ended_before_a_kill_could_be_noted_is_not_repeated(
    tmp_path: Path, calls: Callable[[], list[str]]
) -> None:
    steps = [step(tmp_path, "a"), step(tmp_path, "b")]
    steps[0].done.touch()
    outcomes = run_steps(steps, tmp_path / "out", console())
    assert calls() == [f"work {tmp_path}/b.done"]
    assert (outcomes[0].name, outcomes[0].seconds) == ("a", 0.0)
    assert outcomes[1].name == "b"


def test_seconds_are_those_of_all_attempts(tmp_path: Path, calls: Callable[[], list[str]]) -> None:
    (tmp_path / "out").mkdir()
    before = Outcome(name="a", title="Do a", command="worker work", seconds=100.0)
    rows = [{"name": before.name, "title": before.title, "command": before.command, "seconds": before.seconds}]
    (tmp_path / "out" / "steps.json").write_text(json.dumps(rows))
    (outcome,) = run_steps([step(tmp_path, "a")], tmp_path / "out", console())
    assert 100.0 <= outcome.seconds < 160.0
    assert len(calls()) == 1


def test_results_of_other_options_are_refused(tmp_path: Path, calls: Callable[[], list[str]]) -> None:
    run_steps([step(tmp_path, "a")], tmp_path / "out", console())
    with pytest.raises(
        ConfigError, match=r"holds a walk with other options: it ran\nworker work .*\nand now\nworker other"
    ):
        run_steps([step(tmp_path, "a", "other"), step(tmp_path, "b")], tmp_path / "out", console())
    assert len(calls()) == 1


def test_missing_command_is_found_before_the_first_step(tmp_path: Path, calls: Callable[[], list[str]]) -> None:
    steps = [step(tmp_path, "a"), Step(name="b", title="b", argv=("align-eval",), done=tmp_path / "b")]
    with pytest.raises(MissingDependencyError, match=r"needs the command 'align-eval', .* pip install 'align-eval'"):
        run_steps(steps, tmp_path / "out", console())
    assert calls() == []


def test_interruption_ends_the_command_and_is_noted(
    tmp_path: Path, calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: object, text: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rich.status.Status.update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_steps([step(tmp_path, "a")], tmp_path / "out", console())
    assert [outcome.name for outcome in read_outcomes(tmp_path / "out")] == ["a"]
    assert len(calls()) == 1
