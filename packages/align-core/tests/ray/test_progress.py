"""Sentences about ranks, from activities written down by hand, and from a real collective that waits."""

import subprocess
import sys

import pytest

pytest.importorskip("ray")

from align_core.ray.progress import Activity, describe


def activity(**changes: object) -> Activity:
    return Activity(**{"method": "step", "call": 7, "busy": True, "seconds": 30.0, **changes})  # type: ignore[arg-type]


def test_who_waited_for_whom() -> None:
    ranks = {
        0: activity(waiting=True, where="all_reduce called from passes.py:76 (step)"),
        1: activity(where="losses.py:12 (grpo)"),
        2: activity(waiting=True, age=60.0),
        3: activity(busy=False, method="logprobs", call=6),
    }
    assert describe(ranks, ranks=5, dead=[4]).splitlines() == [
        "what the ranks were doing:",
        "  rank 0: in step (call 7) for 30 s, waiting for other ranks in all_reduce called from passes.py:76 (step)",
        "  rank 1: in step (call 7) for 30 s, at losses.py:12 (grpo)",
        "  rank 2: in step (call 7) for 30 s; silent since 60 s",
        "  rank 3: idle after logprobs (call 6) for 30 s",
        "  rank 4: dead; was never heard of",
        "rank 0 waited for ranks 1, 2, 3, 4",
    ]


def test_nobody_waits_for_nobody() -> None:
    assert "waited" not in describe({0: activity()}, ranks=1)
    assert "waited" not in describe({0: activity(waiting=True)}, ranks=1)


WAITS = """
import sys, threading, time, datetime
import torch, torch.distributed as dist
from align_core.ray.progress import locate
store = dist.FileStore(sys.argv[1], 2)
dist.init_process_group("gloo", store=store, rank=int(sys.argv[2]), world_size=2)
dist.barrier()
if sys.argv[2] == "1":
    store.wait(["looked"], datetime.timedelta(seconds=60))
    dist.all_reduce(torch.ones(1))
    raise SystemExit
main = threading.get_ident()
def look():
    deadline = time.monotonic() + 30
    found = "", False
    while not found[1] and time.monotonic() < deadline:
        time.sleep(0.1)
        found = locate(sys._current_frames()[main])
    print(*found)
    store.set("looked", "")
threading.Thread(target=look).start()
dist.all_reduce(torch.ones(1))
"""


def test_a_thread_in_a_collective_is_seen_to_wait(tmp_path: object) -> None:
    pytest.importorskip("torch")
    command = [sys.executable, "-c", WAITS, f"{tmp_path}/store"]
    with subprocess.Popen([*command, "1"]):
        found = subprocess.run([*command, "0"], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.split() == ["all_reduce", "True"]
