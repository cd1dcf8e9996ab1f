"""The same GRPO with TRL's GRPOTrainer and its colocated vLLM, for a comparison back to back on one GPU.

    python benchmarks/trl_grpo.py --model qwen --train gsm8k_train.jsonl --out results --steps 10 --budget 200

64 prompts x 8 samples, at most 256 new tokens, micro-batch 64, bfloat16, no KL, learning rate 1e-6: the settings of
`grpo_gsm8k.py`. OUT/trl-grpo.json is written after each step.
"""

import argparse
import json
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import gsm8k_task

PACKAGES = ("torch", "transformers", "trl")


def main() -> None:
    """Trains within the budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=64, help="sequences of one forward pass")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds for everything")
    parser.add_argument("--no-vllm", action="store_true", help="generate with transformers (to try it on CPU)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    records = gsm8k_task.read(options.train, seed=options.seed)
    timing = Timing(options)
    trainer = GRPOTrainer(
        model=str(options.model),
        reward_funcs=reward,
        args=settings(options),
        train_dataset=Dataset.from_list(records),
        callbacks=[timing],
    )
    trainer.train()
    timing.write()
    steady = timing.steps[2:] or timing.steps
    seconds = [step["seconds"] for step in steady]
    sys.stdout.write(f"TRL: median {statistics.median(seconds):.2f} s a step over {len(seconds)} steps\n")


def settings(options: argparse.Namespace) -> GRPOConfig:
    """GRPOConfig with our settings."""
    cuda = torch.cuda.is_available()
    return GRPOConfig(
        output_dir=str(options.out / "trl"),
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=8 * options.prompts // options.micro_batch,
        num_generations=8,
        max_completion_length=options.max_tokens,
        max_steps=options.steps,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        beta=0.0,
        temperature=1.0,
        bf16=cuda,
        model_init_kwargs={"dtype": "bfloat16" if cuda else "float32"},
        gradient_checkpointing=False,
        use_vllm=not options.no_vllm,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=options.seed,
    )


def reward(prompts: list[Any], completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Our grading of TRL's completions."""
    texts = [completion[0]["content"] for completion in completions]
    return gsm8k_task.total([str(prompt) for prompt in prompts], texts, answer)


class Timing(TrainerCallback):
    """Seconds and logged figures of every optimizer step; ends training when the budget is used up."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._began = self._last = time.monotonic()
        self.start_up = 0.0
        self.steps: list[dict[str, float]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start-up ends here."""
        self._last = time.monotonic()
        self.start_up = self._last - self._began

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """One rollout with its update is done."""
        now = time.monotonic()
        self.steps.append({"step": state.global_step, "seconds": now - self._last})
        self._last = now
        if now - self._began > self._options.budget:
            control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """What TRL says about the step, beside its seconds."""
        if self.steps and logs and "reward" in logs:
            self.steps[-1].update({k: v for k, v in logs.items() if isinstance(v, int | float)})
            self.write()

    def write(self) -> None:
        """OUT/trl-grpo.json as far as it is known."""
        facts = {
            "command": " ".join(sys.argv),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "versions": {name: version(name) for name in PACKAGES},
            "start_up_seconds": self.start_up,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
            "steps": self.steps,
        }
        (self._options.out / "trl-grpo.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
