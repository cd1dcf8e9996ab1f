"""SFT, reward model, the DPO family and KTO reach the numbers of TRL's trainers: same model, data, order and settings,
float32, no dropout. Both train the whole model with AdamW at a learning rate that moves the loss.

The trainers of TRL run in a process of their own (their libraries warn); ours are the `align` command in this one.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("trl")

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from align_core.cli import main
from align_core.data.order import indices_of_step
from align_core.tutorial.additions import write_additions
from align_core.tutorial.tiny import make_tiny_model

pytestmark = pytest.mark.slow

STEPS, BATCH, RECORDS, LR = 8, 4, 10, 1e-3
Row = dict[str, Any]


def template(prompt: str) -> str:
    return f"\n\nHuman: {prompt}\n\nAssistant:"


def in_order(rows: Sequence[Row]) -> list[Row]:
    """The rows of all steps in the order that `align` takes them."""
    steps = [indices_of_step(step, records=len(rows), batch_size=BATCH, seed=0) for step in range(STEPS)]
    return [rows[i] for i in np.concatenate(steps)]


def pair(row: Row) -> Row:
    return {
        "prompt": template(row["prompt"]),
        "chosen": f" {row['chosen']}",
        "rejected": f" {row['rejected']}",
    }


def completion(row: Row) -> Row:
    return {"prompt": template(row["prompt"]), "completion": f" {row['response']}"}


DPO_FORMS: Mapping[str, tuple[str, Row, list[str]]] = {
    "dpo sigmoid": ("dpo", {"beta": 0.3}, ["--loss.beta", "0.3"]),
    "dpo hinge": ("dpo", {"beta": 0.3, "loss_type": "hinge"}, ["--loss.beta", "0.3", "--loss.form", "hinge"]),
    "dpo ipo": ("dpo", {"beta": 0.3, "loss_type": "ipo"}, ["--loss.beta", "0.3", "--loss.form", "ipo"]),
    "dpo robust": (
        "dpo",
        {"beta": 0.3, "loss_type": "robust", "label_smoothing": 0.2},
        ["--loss.beta", "0.3", "--loss.form", "robust", "--loss.label_smoothing", "0.2"],
    ),
    "dpo mean": (
        "dpo",
        {"beta": 2.0, "loss_type": "sigmoid_norm"},
        ["--loss.beta", "2.0", "--loss.length_normalised", "true"],
    ),
    "simpo": (
        "cpo",
        {"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 0.5, "cpo_alpha": 0.0},
        ["--loss.beta", "2.0", "--loss.form", "simpo", "--loss.simpo_margin", "0.5"],
    ),
}
# Not ORPO: TRL's trainer takes the likelihood of prompt and response together, the paper's eq. 6 that of the response.


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, score model and data."""
    work = tmp_path_factory.mktemp("trl")
    make_tiny_model(work / "model", seed=0)
    make_score_model(work / "model", work / "score_model")
    write_additions(work / "data", seed=0)
    pairs = lines(work / "data" / "preferences.jsonl")[:RECORDS]
    # Responses of different lengths, so that sums and means differ.
    pairs = [
        {
            "prompt": row["prompt"],
            "chosen": " ".join([row["chosen"].strip()] * (1 + n % 3)),
            "rejected": row["rejected"].strip(),
        }
        for n, row in enumerate(pairs)
    ]
    write(work / "pairs.jsonl", pairs)
    write(work / "sft.jsonl", [{"prompt": row["prompt"], "response": row["chosen"]} for row in pairs])
    marked = [(row["prompt"], row["chosen"], True) if n % 3 else (row["prompt"], row["rejected"], False)
              for n, row in enumerate(pairs)]  # fmt: skip
    write(work / "marked.jsonl", [{"prompt": p, "response": r, "label": wanted} for p, r, wanted in marked])
    return work


@pytest.fixture(scope="module")
def theirs(work: Path) -> dict[str, list[float]]:
    """TRL's losses, all from one process."""
    pairs = in_order(lines(work / "pairs.jsonl"))
    marked = in_order(lines(work / "marked.jsonl"))
    runs: dict[str, Row] = {
        "sft": {
            "trainer": "sft",
            "settings": {},
            "rows": [completion(row) for row in in_order(lines(work / "sft.jsonl"))],
        },
        "reward": {
            "trainer": "reward",
            "settings": {"pad_token": "<unk>", "center_rewards_coefficient": 0.01},
            "rows": [pair(row) for row in pairs],
        },
        "kto": {
            "trainer": "kto",
            "settings": {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.5},
            "rows": [{**completion(row), "label": row["label"]} for row in marked],
        },
    }
    for name, (trainer, settings, _) in DPO_FORMS.items():
        runs[name] = {"trainer": trainer, "settings": settings, "rows": [pair(row) for row in pairs]}
    job = {
        "model": str(work / "model"),
        "score_model": str(work / "score_model"),
        "out": str(work / "trl"),
        "batch_size": BATCH,
        "lr": LR,
        "runs": runs,
    }
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("trl_losses.py")), str(work / "job.json")],
        check=False,
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "cache")},
    )
    assert shown.returncode == 0, shown.stderr[-4000:]
    found: dict[str, list[float]] = json.loads(shown.stdout.splitlines()[-1])
    return found


def lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_score_model(source: Path, out: Path) -> None:
    """The tiny model's body under a random score head."""
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(source, num_labels=1, pad_token_id=0)
    model = LlamaForSequenceClassification.from_pretrained(source, config=config, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=0.2)
    model.save_pretrained(out)
    for file in source.glob("tokenizer*"):
        (out / file.name).write_bytes(file.read_bytes())


def ours(work: Path, stage: str, name: str, data: str, *words: str, model: str = "model") -> list[Row]:
    out = work / "ours" / name.replace(" ", "_")
    arguments = [
        *(stage, "--model", str(work / model), "--data", str(work / data), "--out", str(out)),
        *("--steps", str(STEPS), "--batch_size", str(BATCH), "--max_length", "256", "--cluster.in_process", "true"),
        *("--optimizer.lr", str(LR), "--optimizer.schedule", "constant", "--template", "human-assistant"),
        *("--trackers", "[]", *words),
    ]
    assert main(arguments) == 0
    return lines(out / "metrics.jsonl")


def compare(found: Sequence[Row], wanted: Sequence[float], *, tolerance: float) -> None:
    """Same losses, and losses that move: a test of equal constants would show nothing."""
    losses = [row["loss"] for row in found]
    assert len(wanted) == STEPS
    assert max(abs(a - b) for a, b in zip(losses, wanted)) <= tolerance, (losses, wanted)
    assert max(losses) - min(losses) > 100 * tolerance


def test_sft(work: Path, theirs: dict[str, list[float]]) -> None:
    compare(ours(work, "sft", "sft", "sft.jsonl"), theirs["sft"], tolerance=2e-5)


def test_reward(work: Path, theirs: dict[str, list[float]]) -> None:
    found = ours(
        work, "reward", "reward", "pairs.jsonl", "--loss.centre_coef", "0.01", model="score_model"
    )  # fmt: skip
    compare(found, theirs["reward"], tolerance=2e-5)


@pytest.mark.parametrize("form", DPO_FORMS)
def test_dpo_family(form: str, work: Path, theirs: dict[str, list[float]]) -> None:
    compare(ours(work, "dpo", form, "pairs.jsonl", *DPO_FORMS[form][2]), theirs[form], tolerance=5e-5)


def test_kto(work: Path, theirs: dict[str, list[float]]) -> None:
    found = ours(
        work, "kto", "kto", "marked.jsonl", "--loss.beta", "0.3", "--loss.undesirable_weight", "1.5"
    )  # fmt: skip
    compare(found, theirs["kto"], tolerance=5e-5)


@pytest.mark.parametrize("reference", ["once", "step"])
def test_first_dpo_loss_is_ln_2(reference: str, work: Path) -> None:
    (first, *_) = ours(work, "dpo", f"ln2 {reference}", "pairs.jsonl", "--reference", reference)
    assert abs(first["loss"] - math.log(2)) < 1e-6
