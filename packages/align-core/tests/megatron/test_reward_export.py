"""A reward model in Hugging Face's form scores as ours does, and comes back; so do the commands that annotate files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("megatron.core")

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align_core.cli import main
from align_core.data.examples import encode_example
from align_core.text import load_tokenizer

PAIRS = [
    {"prompt": f"What is {n} + {n + 3}?", "chosen": f"{2 * n + 3}", "rejected": f"{n}, or {n * n}?"} for n in range(12)
]
RESPONSES = [
    *({"prompt": row["prompt"], "response": [row["chosen"], row["rejected"]], "source": "test"} for row in PAIRS[:5]),
    {"prompt": "1 + 1?", "response": "2"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def align(stage: str, model: Path, data: Path, out: Path, *words: str) -> None:
    """The command in this process, on one rank."""
    places = ["--model", str(model), "--data", str(data), "--out", str(out)]
    assert main([stage, *places, "--max_length", "64", "--cluster.in_process", "true", *words]) == 0


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A trained reward model's directory, with its Hugging Face form."""
    work = tmp_path_factory.mktemp("reward")
    training = ["--steps", "6", "--batch_size", "6", "--optimizer.lr", "1e-2", "--export", "hf"]
    align("reward", tiny_model, write(work / "pairs.jsonl", PAIRS), work / "out", *training)
    return work / "out"


@pytest.fixture(scope="module")
def scored(reward: Path) -> list[dict[str, Any]]:
    """What `align score` makes of the Megatron checkpoint."""
    out = reward.parent / "scored.jsonl"
    align("score", reward / "model", write(reward.parent / "responses.jsonl", RESPONSES), out)
    return read(out)


def sequences(model: Path) -> list[torch.Tensor]:
    tokenizer = load_tokenizer(model)
    return [
        torch.tensor(
            encode_example(tokenizer, row["prompt"], text, template="auto", max_length=64).tokens.astype(np.int64)
        )
        for row in RESPONSES
        for text in ([row["response"]] if isinstance(row["response"], str) else row["response"])
    ]


def flat(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [value for row in rows for value in (row[name] if isinstance(row[name], list) else [row[name]])]


def test_rows_keep_their_columns_and_gain_a_score_a_response(scored: list[dict[str, Any]]) -> None:
    assert [{k: v for k, v in row.items() if k != "score"} for row in scored] == RESPONSES
    assert [np.shape(row["score"]) for row in scored] == [(2,)] * 5 + [()]
    assert np.std(flat(scored, "score")) > 0.01


def test_transformers_gives_the_same_scores(reward: Path, scored: list[dict[str, Any]]) -> None:
    """One by one and in a padded batch: the padding token is none that ends a sequence."""
    model = AutoModelForSequenceClassification.from_pretrained(reward / "hf", dtype=torch.float32)
    assert model.config.num_labels == 1
    texts = sequences(reward / "hf")
    with torch.no_grad():
        alone = [model(text[None]).logits.item() for text in texts]
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=model.config.pad_token_id)
        together = model(padded, attention_mask=padded != model.config.pad_token_id).logits[:, 0].tolist()
    assert alone == pytest.approx(flat(scored, "score"), abs=1e-5)
    assert together == pytest.approx(flat(scored, "score"), abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(reward / "hf")
    assert model.config.pad_token_id != tokenizer.eos_token_id


def test_hugging_face_form_comes_back(reward: Path, scored: list[dict[str, Any]]) -> None:
    align("score", reward / "hf", reward.parent / "responses.jsonl", reward.parent / "again.jsonl")
    assert flat(read(reward.parent / "again.jsonl"), "score") == flat(scored, "score")


def test_logprobs_are_those_of_transformers(tmp_path: Path, tiny_model: Path) -> None:
    data = write(tmp_path / "responses.jsonl", RESPONSES)
    align("logprobs", tiny_model, data, tmp_path / "out.jsonl", "--tokens", "true", "--batch_size", "4")
    found = read(tmp_path / "out.jsonl")
    tokenizer = load_tokenizer(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    record = encode_example(tokenizer, "1 + 1?", "2", template="auto", max_length=64)
    ids = torch.tensor(record.tokens.astype(np.int64))
    with torch.no_grad():
        of_next = torch.log_softmax(model(ids[None]).logits[0, :-1], -1)[torch.arange(len(ids) - 1), ids[1:]]
    wanted = of_next[torch.tensor(record.mask[1:])]
    assert found[-1]["token_ids"] == record.tokens[record.mask].tolist()
    assert found[-1]["token_logprobs"] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert found[-1]["logprob"] == pytest.approx(wanted.sum().item(), abs=1e-5)
    assert [len(row["num_tokens"]) for row in found[:5]] == [2] * 5


def test_output_is_never_overwritten_and_wrong_heads_are_told(
    tmp_path: Path, tiny_model: Path, reward: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write(tmp_path / "responses.jsonl", RESPONSES), tmp_path / "out.jsonl"
    words = ["--data", str(data), "--out", str(out), "--max_length", "64", "--cluster.in_process", "true"]
    assert main(["logprobs", "--model", str(reward / "model"), *words]) == 2
    assert "holds a reward model" in capsys.readouterr().err
    assert not out.exists()
    out.touch()
    assert main(["score", "--model", str(reward / "model"), *words]) == 2
    assert "exists already; remove it or choose another --out" in capsys.readouterr().err
