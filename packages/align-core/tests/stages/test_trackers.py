"""Trackers get the run and its numbers; TensorBoard's are read back, the services' packages are stood in for."""

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align_core import trackers
from align_core.errors import ConfigError, MissingDependencyError
from align_core.stages.sft import run_sft
from align_core.trackers import RunInfo, Tracker, check_trackers


def info(tmp_path: Path, *, first_step: int = 0) -> RunInfo:
    return RunInfo(
        id="0123456789abcdef",
        name="sft out",
        out=tmp_path,
        settings={"steps": 6, "optimizer": {"lr": 0.5}, "data": ["a", "b"]},
        first_step=first_step,
    )


def test_unknown_and_absent_trackers_are_told_before_anything_is_written(
    make_config: Callable[..., Any], fake_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"unknown tracker 'wandv'; did you mean 'wandb'\?"):
        check_trackers(["wandv"])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(
        MissingDependencyError, match=r"the tracker 'mlflow' needs mlflow, .* run: pip install 'mlflow'"
    ):
        check_trackers(["mlflow"])
    with pytest.raises(MissingDependencyError, match=r"pip install 'align-core\[tensorboard\]'"):
        check_trackers(["tensorboard"])
    assert check_trackers(None) == []
    config, world = make_config("sft", trackers=["wandb"]), fake_world()
    with pytest.raises(MissingDependencyError):
        run_sft(config, world)
    assert world.operations == []
    assert not config.out.exists()


def test_tensorboard_holds_every_metric_of_every_step(
    make_config: Callable[..., Any], fake_world: Callable[..., Any]
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = make_config("sft")
    with pytest.raises(Exception, match=r"^step$"):
        run_sft(config, fake_world(crash_at=3 + 1))  # three steps and a save; what step 2 logged is repeated
    run_sft(config, fake_world())
    events = accumulator.EventAccumulator(str(config.out / "tensorboard"))
    events.Reload()
    losses = events.Scalars("loss")
    assert [point.step for point in losses] == list(range(6))
    assert losses[-1].value < losses[0].value
    assert {"loss", "lr", "grad_norm", "seconds_train"} <= set(events.Tags()["scalars"])


class Recorder:
    """Stands for a service's module: remembers calls, and answers with itself."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.found: list[Any] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return self.found if name == "search_runs" else self

        return call


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[Recorder, Callable[[RunInfo], Tracker]]]:
    """The class of a tracker whose package is stood in for, as the entry point names it."""

    def load(name: str) -> tuple[Recorder, Callable[[RunInfo], Tracker]]:
        recorder = Recorder()
        monkeypatch.setitem(sys.modules, name, recorder)  # type: ignore[arg-type]
        monkeypatch.delitem(sys.modules, f"align_core.trackers.{name}", raising=False)
        module: types.ModuleType = importlib.import_module(f"align_core.trackers.{name}")
        return recorder, getattr(module, name.capitalize())

    return load


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_service_gets_settings_steps_and_its_end(name: str, tmp_path: Path, service: Callable[..., Any]) -> None:
    recorder, tracker_type = service(name)
    tracker = tracker_type(info(tmp_path))
    tracker.log(3, {"loss": 0.5})
    tracker.close()
    logged = [call for call in recorder.calls if call[0] in ("log", "log_metrics")]
    assert [(args, kwargs) for _, args, kwargs in logged] == [(({"loss": 0.5},), {"step": 3})]
    assert recorder.calls[-1][0] in ("finish", "end_run")
    assert "0.5" in repr(recorder.calls[:-2])  # the settings' lr


def test_wandb_continues_under_its_id(tmp_path: Path, service: Callable[..., Any]) -> None:
    recorder, tracker_type = service("wandb")
    tracker_type(info(tmp_path, first_step=4))
    (_, _, kwargs) = recorder.calls[0]
    assert (kwargs["id"], kwargs["resume"], kwargs["project"]) == ("0123456789abcdef", "allow", "align")


def test_mlflow_finds_the_run_that_it_continues(tmp_path: Path, service: Callable[..., Any]) -> None:
    recorder, tracker_type = service("mlflow")
    recorder.found = [types.SimpleNamespace(info=types.SimpleNamespace(run_id="77"))]
    tracker_type(info(tmp_path, first_step=4))
    assert recorder.calls[-1] == ("start_run", (), {"run_id": "77"})
