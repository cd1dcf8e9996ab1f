"""Gives every pytest run, under nox or by hand, the environment of tests/environment.py before anything is imported."""

import importlib.util
import os
from pathlib import Path

_ROOT = Path(__file__).parent


def _apply_environment() -> None:
    spec = importlib.util.spec_from_file_location("environment", _ROOT / "tests" / "environment.py")
    assert spec is not None and spec.loader is not None
    environment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(environment)
    os.environ.update(environment.variables(_ROOT / ".nox" / "home"))


_apply_environment()
