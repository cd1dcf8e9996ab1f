"""The Triton kernels against plain torch, by Triton's interpreter on the CPU; test_gpu.py runs them compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_kernels_equal_torch() -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    check = Path(__file__).with_name("kernel_checks.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(check)], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["swiglu", "rotary"]
