"""A stage killed with SIGKILL continues where it was: the metrics of the undisturbed run, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

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
