"""A stage killed with SIGKILL continues where it was: the metrics of the undisturbed run, bit for bit."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("ray")

from align_core.tutorial.additions import write_additions
from align_core.tutorial.tiny import make_tiny_model

pytestmark = pytest.mark.slow

STEPS = 12
DEADLINE_S = 240.0
TIMES = ("time", "seconds", "tokens_per_s", "memory_gib", "mfu")  # beginnings of what no two runs share


def command(tmp_path: Path, name: str) -> list[str]:
    return [
        *(sys.executable, "-m", "align_core", "sft", "--model", str(tmp_path / "hf")),
        *("--data", str(tmp_path / "data" / "sft.jsonl"), "--out", str(tmp_path / name), "--max_length", "64"),
        *("--steps", str(STEPS), "--batch_size", "32", "--save_every", "2", "--cluster.in_process", "true"),
    ]


def metrics(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(TIMES)} for line in lines]


def test_sft_killed_in_the_middle_continues_to_the_same_numbers(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "hf", seed=0)
    write_additions(tmp_path / "data", seed=0)
    subprocess.run(command(tmp_path, "whole"), check=True, capture_output=True, timeout=DEADLINE_S)

    process = subprocess.Popen(
        command(tmp_path, "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + DEADLINE_S
    while not (checkpoints / "step_4").exists() and not (checkpoints / "step_6").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "result.json").exists()

    again = subprocess.run(command(tmp_path, "killed"), check=True, capture_output=True, text=True, timeout=DEADLINE_S)
    assert "continuing" in again.stderr
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert len(metrics(tmp_path / "whole")) == STEPS


def over_ray(tmp_path: Path, name: str) -> list[str]:
    """The same run over two tensor-parallel ranks, in processes of their own."""
    words = command(tmp_path, name)
    place = words.index("--cluster.in_process")
    return [*words[:place], *words[place + 2 :], "--parallel.tensor", "2"]


@contextmanager
def stopped_after(process: subprocess.Popen[str], metrics_file: Path, *, count: int) -> Iterator[list[int]]:
    """Waits until so many steps have been logged, and holds the driver up; the process ids of the two ranks."""
    deadline = time.monotonic() + DEADLINE_S
    while not metrics_file.exists() or metrics_file.read_bytes().count(b"\n") < count:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be disturbed"
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)  # looking for the ranks takes as long as some of the steps that are left
    try:
        names = {child.pid: name_of(child) for child in psutil.Process(process.pid).children(recursive=True)}
        ranks = sorted(pid for pid, name in names.items() if name.startswith("ray::Host"))
        assert len(ranks) == 2, names
        yield ranks
    finally:
        process.send_signal(signal.SIGCONT)


def name_of(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:  # Ray ends a worker now and then
        return ""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with model, data, and a run over Ray that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make_tiny_model(folder / "hf", seed=0)
    write_additions(folder / "data", seed=0)
    subprocess.run(over_ray(folder, "whole"), check=True, capture_output=True, timeout=DEADLINE_S)
    return folder


def test_sigterm_saves_the_step_that_is_under_way(undisturbed: Path) -> None:
    """Also where the ranks are told as well: they leave the end to the driver."""
    words = [*over_ray(undisturbed, "stopped"), "--save_every", "100"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        metrics_file = undisturbed / "stopped" / "metrics.jsonl"
        with stopped_after(process, metrics_file, count=3) as ranks:
            for pid in [*ranks, process.pid]:
                os.kill(pid, signal.SIGTERM)
        _, shown = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 143
    done = len(metrics(metrics_file.parent))
    assert f"stopped after step {done} of {STEPS}, which is saved" in shown
    assert [path.name for path in (metrics_file.parent / "checkpoints").iterdir()] == [f"step_{done}"]
    again = subprocess.run(words, check=True, capture_output=True, text=True, timeout=DEADLINE_S)
    assert f"from step {done}" in again.stderr
    assert metrics(metrics_file.parent) == metrics(undisturbed / "whole")


def test_rank_killed_at_any_step_is_continued_by_the_command_that_is_printed(undisturbed: Path) -> None:
    """With the same layout bit for bit; on one rank in the driver's process, the same up to rounding."""
    tmp_path = undisturbed
    after, which = random.SystemRandom().randint(3, STEPS - 2), random.SystemRandom().randint(0, 1)
    print(f"rank {which} is killed after {after} steps")  # for whoever reads a failure

    words = over_ray(tmp_path, "killed")
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        with stopped_after(process, tmp_path / "killed" / "metrics.jsonl", count=after) as ranks:
            os.kill(ranks[which], signal.SIGKILL)
        _, shown = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2, shown
    assert "trainer" in shown and "Traceback" not in shown
    assert not (tmp_path / "killed" / "result.json").exists()
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")

    printed = shlex.split(shown.split("to continue from the last checkpoint, run: ")[1])
    assert printed[0] == "align"
    again = subprocess.run(
        [*words[:3], *printed[1:]], check=True, capture_output=True, text=True, timeout=DEADLINE_S
    )  # fmt: skip
    assert "continuing" in again.stderr
    whole = metrics(tmp_path / "whole")
    assert metrics(tmp_path / "killed") == whole
    assert len(whole) == STEPS

    subprocess.run(command(tmp_path, "alone"), check=True, capture_output=True, timeout=DEADLINE_S)
    assert [row["loss"] for row in metrics(tmp_path / "alone")] == pytest.approx(
        [row["loss"] for row in whole], abs=1e-4
    )


def test_grpo_killed_in_two_phases_continues_to_the_same_numbers(tmp_path: Path) -> None:
    """The lean form of benchmarks/resume.py: real vLLM and Megatron, SIGKILL in a weight sync and in a generation."""
    pytest.importorskip("vllm")
    script = Path(__file__).parents[2] / "benchmarks" / "resume.py"
    arguments = ["--schedule", "in_process", "--points", "2", "--seed", "7", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False, timeout=2 * DEADLINE_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "resume-in_process.json").read_text(encoding="utf-8"))
    assert [(point["phase"], point["killed"], point["equal"]) for point in record["points"]] == [
        ("sync", True, True),
        ("generate", True, True),
    ]
    assert record["rewards"][0] != record["rewards"][-1], "a policy that does not learn proves nothing"
