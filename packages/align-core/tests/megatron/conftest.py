"""Tiny Llamas made once a session, and a door to real processes."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import align_core.megatron  # noqa: F401  (first, because it imports megatron-core without its warnings)

# Ranks are processes of their own: what they run must be importable by name, which test modules are not.
sys.path.insert(0, str(Path(__file__).parent))

from megatron_llama import make_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes the directory of a tiny random Llama with these config.json settings, once for each set of settings."""
    made: dict[str, Path] = {}

    def make(**settings: object) -> Path:
        key = repr(sorted(settings.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("llama")
            make_llama(made[key], **settings)
        return made[key]

    return make
