"""The output directory of one stage: where it resumes, what it logs, when it saves, how it ends.

OUT/config.yaml             the settings, resolved
OUT/data.json               its id; size and hash of each data file, fingerprints of models, hashes of reward files
OUT/metrics.jsonl           one line a step
OUT/tensorboard/ ...        what trackers write
OUT/samples.jsonl           some completions of each step, of the stages that sample
OUT/checkpoints/NAME_step_N the same step of the models beside the policy (the value model); written before step_N
OUT/checkpoints/step_N/     all that is needed to continue; the newest one counts, and each is complete
OUT/checkpoints/...         what a stage computes once before its first step
OUT/best/                   with keep_best: the model of the best evaluation
OUT/model/                  the trained model as a Megatron checkpoint
OUT/NAME/                   the same of the models beside the policy
OUT/hf/                     with export hf: the same as a Hugging Face directory
OUT/report.html             curves, times, samples (with align-core[tutorial]); `align report OUT` at any time
OUT/result.json             written last: the stage is finished
"""

import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import yaml

from align_core.atomic import write_json, write_text
from align_core.config import StageConfig
from align_core.contracts import SupportsAsyncSave
from align_core.errors import (
    CheckpointError,
    MissingDependencyError,
    Stopped,
    missing_dependency,
)
from align_core.stages.continuing import plain
from align_core.stages.directory import Fingerprinted, Inputs, check_same, inputs_of, is_stale, look, saved_steps
from align_core.stages.live import Screen, shown
from align_core.stages.stopping import stop_request
from align_core.stages.world import Model
from align_core.trackers import RunInfo, TakesTexts, Tracker, check_trackers, open_trackers

logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """What a stage keeps beside its models; texts, so that a checkpoint's record holds it."""

    def state(self) -> Mapping[str, str]:
        """What a checkpoint keeps."""
        ...

    def restore(self, state: Mapping[str, str]) -> None:
        """Continues from `state`, which may hold other keys too."""
        ...


class Run:
    """One stage's run in its directory."""

    def __init__(
        self, config: StageConfig, *, data: Mapping[str, Fingerprinted] | None = None, code: Sequence[Path] = ()
    ) -> None:
        """Opens the directory.

        Args:
            data: the setting's name and its data set; a continued run must find the same ones.
            code: files of the user's that the run calls; a continued run says which of them are others now.

        Raises:
            ConfigError: the directory holds a run with other settings, or a tracker is not there.
            DataError: it holds a run with other data, or with another model in the same directory.
        """
        self.config = config
        self.out = config.out
        self._metrics = self.out / "metrics.jsonl"
        self._samples = self.out / "samples.jsonl"
        self._tracker_names = check_trackers(config.trackers)
        self._trackers: list[Tracker] = []
        self._screen: Screen | None = None
        self._until_finished = ExitStack()
        """What stays in force between the last step and the end of `finish`."""
        self._id = self._begin(inputs_of(config, data or {}, code))

    @property
    def finished(self) -> bool:
        """True when the stage has ended before."""
        return (self.out / "result.json").exists()

    def steps(
        self, model: Model, *, beside: Mapping[str, Model] | None = None, state: Sequence[Stateful] = ()
    ) -> Iterator[int]:
        """The steps still to do, from 0 or from the newest checkpoint; saves after every `save_every` and the last.

        After the last one a SIGTERM lets `finish`, which is to follow, come to its end.

        Args:
            beside: further trained models, by name, saved and loaded with `model`.
            state: what else must survive, such as the coefficient of a controller.

        Raises:
            Stopped: SIGTERM came; the step that was under way is done, and saved.
        """
        beside = beside or {}
        first = self._resume(model, beside, state)
        self._trackers = open_trackers(self._tracker_names, self._info(first))
        try:
            self._screen = Screen(self.out.name, total=self.config.steps, completed=first)
            with shown(self._screen), ExitStack() as stack:
                stop = stack.enter_context(stop_request())
                for step in range(first, self.config.steps):
                    yield step
                    self._screen.advance(step + 1)
                    due = (step + 1) % self.config.save_every == 0 or step + 1 == self.config.steps
                    if due or stop.is_set():
                        self._save(step + 1, model, beside, state)
                    if stop.is_set():
                        if isinstance(model, SupportsAsyncSave):
                            model.finish_saving()
                        raise Stopped(f"stopped after step {step + 1} of {self.config.steps}, which is saved")
                self._until_finished = stack.pop_all()
        finally:
            for tracker in self._trackers:
                tracker.close()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl, to the log and to the trackers; raises OSError when the disk is full."""
        numbers = {name: float(value) for name, value in metrics.items()}
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers, "time": time.time()}) + "\n")
        for tracker in self._trackers:
            tracker.log(step, numbers)
        if self._screen is not None:
            self._screen.update(numbers)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        logger.info("step %d/%d  %s", step + 1, self.config.steps, shown)

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Appends sample completions of a step to samples.jsonl, and shows them to trackers that take texts."""
        with self._samples.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **row}) + "\n" for row in rows)
        for tracker in self._trackers:
            if isinstance(tracker, TakesTexts) and rows:
                tracker.text(step, "samples", markdown_table(rows))
        if self._screen is not None:
            self._screen.show_sample(rows)

    def finish(
        self,
        model: Model,
        result: Mapping[str, object],
        *,
        evaluate: Callable[[], Mapping[str, object]],
        beside: Mapping[str, Model] | None = None,
    ) -> None:
        """Evaluates and exports, then writes result.json, then drops the checkpoints that are no longer needed.

        What fails here is repeated by the same command, without a step: the last one is saved.

        Args:
            evaluate: finds what joins `result` of the finished model.
            beside: further trained models, by name, exported to OUT/NAME.
        """
        with self._until_finished:
            found = evaluate()
            for name, other in (beside or {}).items():
                other.export(self.out / name)
            model.export(self.out / "model")
            if self.config.export == "hf":
                _export_hf(self.out / "model", self.out / "hf")
            self._write_page()
            last = read_metrics(self.out)[-1]
            write_json(self.out / "result.json", {"steps": self.config.steps, "last_step": last, **result, **found})
            shutil.rmtree(self.out / "checkpoints", ignore_errors=True)

    def _write_page(self) -> None:
        """The report of the run, where what draws it is installed; a run is complete without it."""
        from align_core.stages.page import write_page  # noqa: PLC0415  (it reads with functions of this file)

        try:
            write_page(self.out)
        except MissingDependencyError as error:
            logger.info("no report.html: %s", error)

    def _info(self, first_step: int) -> RunInfo:
        stage = type(self.config).__name__.removesuffix("Config").lower()
        return RunInfo(
            id=self._id,
            name=f"{stage} {self.out.name}",
            out=self.out,
            settings=plain(self.config),
            first_step=first_step,
        )

    def _begin(self, inputs: Inputs) -> str:
        """Compares settings and inputs with those of a run that is there, and notes them; returns the run's id."""
        found = look(self.out)
        check_same(found, self.config, inputs)
        self.out.mkdir(parents=True, exist_ok=True)
        if is_stale(found, self.config, inputs):
            for computed in ("checkpoints", "best"):
                shutil.rmtree(self.out / computed, ignore_errors=True)
        write_text(self.out / "config.yaml", yaml.safe_dump(plain(self.config), sort_keys=False))
        if found.begun and found.record:
            return str(found.record["id"])
        identity = uuid.uuid4().hex
        record = {"id": identity, "data": inputs.data, "models": inputs.models, "code": inputs.code}
        write_json(self.out / "data.json", record)
        return identity

    def _resume(self, model: Model, beside: Mapping[str, Model], state: Sequence[Stateful]) -> int:
        newest = max(saved_steps(self.out), default=0)
        if newest:
            path = self.out / "checkpoints" / f"step_{newest}"
            saved = dict(model.load(path))
            if saved.get("step") != str(newest):
                raise CheckpointError(f"{str(path)!r} says that it is of step {saved.get('step')}; remove it")
            for name, other in beside.items():
                other.load(self.out / "checkpoints" / f"{name}_step_{newest}")
            for each in state:
                each.restore(saved)
            logger.info("continuing %s from step %d of %d", self.out, newest, self.config.steps)
        kept = [line for line in read_metrics(self.out) if line["step"] < newest]
        write_text(self._metrics, "".join(json.dumps(line) + "\n" for line in kept))
        if self._samples.exists():
            rows = [row for row in read_lines(self._samples) if row["step"] < newest]
            write_text(self._samples, "".join(json.dumps(row) + "\n" for row in rows))
        return newest

    def _save(self, step: int, model: Model, beside: Mapping[str, Model], state: Sequence[Stateful]) -> None:
        folder = self.out / "checkpoints"
        for name, other in beside.items():
            path = folder / f"{name}_step_{step}"
            shutil.rmtree(path, ignore_errors=True)  # of a run that was killed before it wrote step_N
            other.save(path, {"step": str(step)})
            if isinstance(other, SupportsAsyncSave):
                other.finish_saving()
        # Last: its presence says that the step is complete.
        kept = {key: value for each in state for key, value in each.state().items()}
        model.save(folder / f"step_{step}", {"step": str(step), **kept})
        # Of those that are complete: one that is still being written is not among them.
        for older in sorted(saved_steps(self.out))[: -self.config.keep_last]:
            shutil.rmtree(folder / f"step_{older}")
            for name in beside:
                shutil.rmtree(folder / f"{name}_step_{older}", ignore_errors=True)


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same keys as a Markdown table; nothing in a cell can end it or become markup."""

    def cell(value: object) -> str:
        text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("`", "&#96;")
        return "<br>".join(text.splitlines())

    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([cell(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_metrics(out: Path) -> list[dict[str, float]]:
    """The lines of OUT/metrics.jsonl; a last line cut off by a crash is left out."""
    return read_lines(out / "metrics.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, up to the first line that a crash cut off; none without the file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _export_hf(model: Path, out: Path) -> None:
    """Writes the Hugging Face form of a finished model; on the driver's CPU, tensor by tensor."""
    try:
        from align_core.megatron.export import export_hf  # noqa: PLC0415  (brings torch)
    except ModuleNotFoundError as error:
        raise missing_dependency(str(error.name), "align-core[megatron]", needed_for="export to hf") from error
    export_hf(model, out)
