"""`align-rollout bench`: one line of JSON, of any engine; of vLLM also beside `LLM.generate` itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_rollout import cli
from align_rollout.fake import save_bigram

_SIZES = ["--prompts", "20", "--prompt-tokens", "8", "--max-tokens", "5"]


def bench(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert cli.main(["bench", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[-1])


@pytest.fixture
def bigram(tmp_path: Path) -> Path:
    """A model that never ends by itself."""
    weights = {"bigram.weight": np.zeros((8, 8), np.float32), "bias": np.array([0, -90, 0, 0, 0, 0, 0, 0], np.float32)}
    config = {"model_type": "bigram", "vocab_size": 8, "eos_token_id": 1}
    save_bigram(tmp_path, weights, eos_id=1)
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "num_attention_heads": 1, "hidden_size": 8, "num_hidden_layers": 1})
    )
    return tmp_path


def test_of_any_engine(bigram: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(capsys, "--engine", "fake", "--model", str(bigram), *_SIZES)
    assert (found["engine"], found["prompts"], found["prompt_tokens"], found["new_tokens"]) == ("fake", 20, 160, 100)
    assert found["new_tokens_per_second"] == pytest.approx(100 / found["seconds"])


def test_what_does_not_fit_is_refused_before_the_engine_starts(
    bigram: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "--engine", "fake", "--model", str(bigram), "--context", "12", *_SIZES]) == 2
    assert "--prompt-tokens 8 and --max-tokens 5 do not fit in --context 12" in capsys.readouterr().err


def test_only_vllm_is_compared_with_vllm(bigram: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--engine", "fake", "--model", str(bigram), "--plain-pairs", "1", *_SIZES]
    assert cli.main(words) == 2
    assert "this is a FakeEngine" in capsys.readouterr().err


@pytest.mark.slow
def test_vllm_in_pairs_with_plain_vllm(tied: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vllm")
    words = ["--model", str(tied.path), "--context", "64", "--kv-cache-mib", "32", "--plain-pairs", "2"]
    found = bench(capsys, *words, *_SIZES)
    assert len(found["new_tokens_per_second"]) == len(found["plain_new_tokens_per_second"]) == 2
    ours, plain = found["new_tokens_per_second"][0], found["plain_new_tokens_per_second"][0]
    assert found["ratios_to_plain"][0] == pytest.approx(ours / plain)
    assert found["median_ratio_to_plain"] > 0
