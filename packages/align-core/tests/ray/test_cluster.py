"""A private Ray starts without a word and leaves nothing behind."""

import subprocess
import sys

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


def test_a_private_ray_says_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    assert (done.stdout, done.stderr) == ("1\n", "")
