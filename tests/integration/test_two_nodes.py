"""Runs the tests of `two_nodes.py` in a process that has not been in another Ray cluster before.

Ray numbers jobs and actors alike in every cluster, and a process that leaves one and joins a second has new actors
cancelled there; no program of ours does that, but the tests before this one have.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

DEADLINE_S = 300


def test_two_nodes() -> None:
    pytest.importorskip("ray")
    words = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).with_name("two_nodes.py"))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
