"""Runs TRL's trainers on given batches in a process of its own, and prints the loss of each step.

    python trl_losses.py JOB.json

JOB holds `model` (a directory), `out`, `batch_size`, `beta`, `lr`, and `runs`: name -> {trainer, settings, rows}. Rows
are texts in the order of training; `batch_size` of them make a step. Printed is one JSON object: name -> losses.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental import cpo

TRAINERS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig),
    "reward": (trl.RewardTrainer, trl.RewardConfig),
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "kto": (trl.KTOTrainer, trl.KTOConfig),
    "cpo": (cpo.CPOTrainer, cpo.CPOConfig),
}


def losses(job: dict[str, Any], name: str) -> list[float]:
    """Every step's loss in full precision; the trainers' own logs are rounded."""
    run = job["runs"][name]
    trainer_type, config_type = TRAINERS[run["trainer"]]
    found: list[float] = []

    class Recording(trainer_type):  # type: ignore[misc, valid-type]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            value = super().compute_loss(*args, **kwargs)
            found.append(float((value[0] if isinstance(value, tuple) else value).detach()))
            return value

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.pad_token = tokenizer.unk_token
    kind = AutoModelForSequenceClassification if run["trainer"] == "reward" else AutoModelForCausalLM
    directory = job["score_model"] if run["trainer"] == "reward" else job["model"]
    model = kind.from_pretrained(directory, dtype=torch.float32)
    config = config_type(
        output_dir=str(Path(job["out"]) / name),
        per_device_train_batch_size=job["batch_size"],
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None if run["trainer"] != "cpo" else 256,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **run["settings"],
    )
    extra = {"ref_model": kind.from_pretrained(directory, dtype=torch.float32)} if run["trainer"] == "kto" else {}
    trainer = Recording(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(run["rows"]),
        processing_class=tokenizer,
        **extra,
    )
    trainer.train()
    return found


def main() -> None:
    """Runs the job."""
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = {name: losses(job, name) for name in job["runs"]}
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
