"""The screen shows what was measured, and nothing of it is markup."""

import io
import logging
import sys

import pytest
from rich.console import Console

from align_core.stages.live import Screen, shown, sparkline


def drawn(screen: Screen) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    console.print(screen)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_screen_shows_the_last_figures_phases_and_a_reply() -> None:
    screen = Screen("grpo", total=10, completed=2)
    screen.update({"reward": 0.25, "eval_reward": 0.5, "seconds_generate": 1.5, "seconds_sync": 0.0001})
    screen.update({"reward": 0.75, "seconds_generate": 2.5})
    screen.show_sample([{"reply": "it is [bold]42[/bold]", "reward": 1.0, "extracted": "42"}])
    screen.advance(4)
    text = drawn(screen)
    assert "4/10" in text
    assert "reward" in text and "0.75" in text and "0.25" not in text
    assert "0.5" in text  # measured one step earlier
    assert "generate 2.50 s" in text and "sync" not in text
    assert "it is [bold]42[/bold]" in text and "read: 42" in text


def test_sparkline_by_hand() -> None:
    assert sparkline([0, 1, 0.5]) == "\u2581\u2588\u2585"
    assert sparkline([3, 3]) == "\u2581\u2581"
    assert sparkline([]) == ""


def test_without_a_terminal_nothing_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(Screen("grpo", total=1, completed=0)):
        print("said", file=sys.stderr)
    assert capsys.readouterr().err == "said\n"


def test_log_lines_appear_around_the_screen_and_the_handler_gets_its_stream_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    handler = logging.StreamHandler(sys.stderr)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        screen = Screen("grpo", total=2, completed=0)
        with shown(screen):
            screen.update({"reward": 0.5})
            assert handler.stream is not terminal
            root.warning("a line of the log")
        assert handler.stream is terminal
    finally:
        root.removeHandler(handler)
    assert "a line of the log" in terminal.getvalue()
