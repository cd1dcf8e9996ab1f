"""A private Ray starts without a word and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

pytestmark = pytest.mark.slow

PROGRAM = """
from align_core.config import ClusterConfig
from align_core.ray import cluster

cluster.start(ClusterConfig())
print(len(cluster.nodes()))
cluster.stop()
"""


def test_a_private_ray_says_nothing(tmp_path: Path) -> None:
    """Also where temporary files lie in a folder with a long path, in which its sockets have no room."""
    folder = tmp_path / ("x" * 60)
    folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120, env=environment
    )
    told = [
        line for line in done.stderr.splitlines() if "/dev/shm has only" not in line
    ]  # Ray's advice for a container
    assert (done.stdout, told) == ("1\n", [])
