"""The `align` command: exit statuses, messages, and which command gets the words."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from align_core import __version__, cli, registry
from align_core.cli import main
from align_core.config import StageConfig
from align_core.errors import SyncError, WorkerError


class Recorder:
    """Stands for a stage and its world; remembers what it was called with."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.config: StageConfig | None = None
        self.closed = False
        self._error = error

    def __call__(self, config: StageConfig, world: object) -> None:
        assert world is self
        self.config = config
        if self._error:
            raise self._error

    def close(self) -> None:
        self.closed = True


def words(stage: str, tmp_path: Path) -> list[str]:
    return [stage, "--model", "m", "--data", "d", "--out", str(tmp_path / "out")]


def put(monkeypatch: pytest.MonkeyPatch, stage: str, recorder: Recorder) -> None:
    monkeypatch.setattr(f"align_core.stages.{stage}.run_{stage}", recorder)
    monkeypatch.setattr(cli, "_world", lambda config: recorder)


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: align COMMAND")
    listed = [line.split()[0] for line in out.splitlines()[2:]]
    assert listed[: len(cli._COMMANDS)] == list(cli._COMMANDS)
    assert set(registry.names("align.commands")) <= set(listed)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"align-core {__version__}\n"


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "grpo"])
def test_stage_runs_with_its_settings_and_the_world_is_closed(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    put(monkeypatch, stage, recorder)
    assert main([*words(stage, tmp_path), "--steps", "7"]) == 0
    assert recorder.config is not None
    assert recorder.config.steps == 7
    assert recorder.closed
    captured = capsys.readouterr()
    assert captured.err == f"done: {tmp_path / 'out' / 'model'}\n"
    assert captured.out == ""


def test_error_of_a_stage_is_one_message_without_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Brackets and long lines come as they are: rich neither reads them as markup nor folds them."""
    recorder = Recorder(SyncError("weight 'a[0]' [red]" + " and more" * 30))
    put(monkeypatch, "sft", recorder)
    assert main(words("sft", tmp_path)) == 2
    assert capsys.readouterr().err == "align: error: weight 'a[0]' [red]" + " and more" * 30 + "\n"
    assert recorder.closed


def test_interruption_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(KeyboardInterrupt())
    put(monkeypatch, "sft", recorder)
    assert main(words("sft", tmp_path)) == 130
    assert "run the same command again to continue" in capsys.readouterr().err
    assert recorder.closed


def test_defect_of_the_program_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "sft", Recorder(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(words("sft", tmp_path))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sfd"], "unknown command 'sfd'; did you mean 'sft'? choose "),
        (["sft", "--optimizer.lrr", "1"], "unknown setting 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        (["sft", "--model", "m"], "align sft needs --data, --out"),
        (["grpo", "--recipe", "tinny"], "unknown recipe 'tinny'; did you mean 'tiny'?"),
        (["data", "prepare", "hh", "--out", "o"], "hh is prepared from its original file; give --source FILE"),
        (["tutorial", "--task", "gsm8k"], "the model 'tiny' cannot do the task 'gsm8k'"),
    ],
)
def test_mistakes_end_with_status_2_and_their_message(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith(f"align: error: {message}")


@pytest.mark.parametrize("command", ["sft", "grpo", "data", "make-model", "tutorial", "doctor"])
def test_help_of_a_command_returns_0(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"usage: align {command}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["data", "prepare", "nothing"], ["make-model", "huge"], ["doctor", "--fix"]])
def test_words_that_a_parser_refuses_return_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert "usage: align" in capsys.readouterr().err


def test_command_of_another_package_gets_its_words_and_gives_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Sequence[str]] = []

    class Point:
        name = "convert"

        def load(self) -> object:
            return lambda argv: (got.append(argv), 7)[1]

    monkeypatch.setattr(registry, "entry_points", lambda group: [Point()] if group == "align.commands" else [])
    assert main(["convert", "a", "--b"]) == 7
    assert got == [["a", "--b"]]


def test_command_of_a_package_that_is_not_installed_gets_the_pip_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    assert main(["convert", "a"]) == 2
    assert "command 'convert' is part of align-convert, which is not installed; run: pip install align-convert" in (
        capsys.readouterr().err
    )


def test_missing_ray_gets_the_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "align_core.ray.world", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(words("sft", tmp_path)) == 2
    assert "running over several processes needs ray, which is not installed; run: pip install 'align-core[ray]'" in (
        capsys.readouterr().err
    )


def test_make_model_writes_the_tiny_model_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["make-model", "tiny", "--out", str(tmp_path / "tiny")]
    assert main(argv) == 0
    assert json.loads((tmp_path / "tiny" / "config.json").read_text())["model_type"] == "llama"
    assert main(argv) == 2
    assert "exists already; remove it or choose another directory" in capsys.readouterr().err


def test_module_is_the_command_and_starts_without_the_heavy_packages() -> None:
    code = (
        "import sys; from align_core.cli import main; status = main(['--help']); "
        "heavy = {'torch', 'ray', 'vllm', 'megatron', 'transformers', 'jsonargparse'} & set(sys.modules); "
        "print(sorted(heavy), status)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[] 0"
    found = subprocess.run([sys.executable, "-m", "align_core", "sfd"], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "did you mean 'sft'?" in found.stderr


def test_dead_worker_ends_with_the_command_that_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(monkeypatch, "sft", Recorder(WorkerError("trainer rank 1 died")))
    assert main([*words("sft", tmp_path), "--data", "a file.jsonl:0.5"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("align: error: trainer rank 1 died\n")
    again = shlex.split(err.split("run: ")[1])
    assert again == ["align", *words("sft", tmp_path), "--data", "a file.jsonl:0.5"]


def test_lists_may_be_given_by_repeating_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    put(monkeypatch, "sft", recorder)
    argv = ["sft", "--model", "m", "--out", str(tmp_path), "--data", "a:0.7", "--data=b:0.3", "--trackers", "wandb"]
    assert main([*argv, "--trackers", "mlflow"]) == 0
    assert recorder.config is not None
    assert recorder.config.data == ["a:0.7", "b:0.3"]
    assert recorder.config.trackers == ["wandb", "mlflow"]


@pytest.mark.parametrize("form", ["wandb", '["wandb"]', "[wandb]"])
def test_list_of_one(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    put(monkeypatch, "sft", recorder)
    assert main([*words("sft", tmp_path), "--trackers", form]) == 0
    assert recorder.config is not None
    assert recorder.config.trackers == ["wandb"]


@pytest.mark.parametrize("stage", sorted(cli._STAGES))
def test_help_of_a_stage_shows_what_the_stage_takes(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([stage, "--help"]) == 0
    shown = capsys.readouterr().out
    assert ("--dry-run" in shown.split()) == (stage not in ("score", "logprobs"))
    assert not re.search(r"--\w+\+", shown)  # `--data+ FILE`, which the parser would add


def test_commands_that_train_nothing_have_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words("score", tmp_path), "--dry-run"]) == 2
    assert "align score trains nothing" in capsys.readouterr().err
