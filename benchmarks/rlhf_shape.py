"""Seconds by phase of an RLHF (PPO) step at a Llama-2 shape: policy, reference, reward, value and engine on one GPU.

    python benchmarks/rlhf_shape.py --out results --layers 8 --samples 1024 --new-tokens 512 --steps 3 --budget 240

Weights are random, so replies are as long as the limit: this measures time, not learning. Each reply gets an arbitrary
score on top of the reward model's 0, because gradients of 0 make a GPU faster than it is in earnest. 8 layers of the 7B
shape (1.9 billion parameters) are what two trained models with their optimizers leave room for on one H200.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from align_core.atomic import new_directory
from align_core.stages.run import read_metrics
from align_core.tutorial.tiny import TinyShape, make_tiny_model, weight_shapes

PHASES = ("sync", "generate", "score", "logprobs", "values", "train")


def main() -> None:
    """Makes the model, runs `align rlhf` up to its last step, writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("rlhf-shape"), help="where model and run go")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--samples", type=int, default=1024, help="completions a step")
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--memory-fraction", type=float, default=0.2, help="of the GPU, for the engine")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds for everything")
    options = parser.parse_args()
    deadline = time.monotonic() + options.budget
    options.out.mkdir(parents=True, exist_ok=True)
    model = make_model(options)
    data = make_prompts(options)
    run = options.work / "run"
    log = options.out / "rlhf-shape.log"
    with log.open("w") as stream:
        words = [sys.executable, "-m", "align_core", *command(options, model, data, run)]
        process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT)
        while process.poll() is None and time.monotonic() < deadline and len(read_metrics(run)) < options.steps:
            time.sleep(0.2)
        # What would follow the last step is not measured: two checkpoints of 14 bytes a parameter, and exports.
        process.kill()
        status = process.wait()
    lines = read_metrics(run)
    facts = {
        "options": {k: str(v) for k, v in vars(options).items()},
        "status": f"{len(lines)} of {options.steps} steps, then status {status}",
        "device": device(),
        "steps": lines,
    }
    (options.out / "rlhf-shape.json").write_text(json.dumps(facts, indent=1) + "\n")
    (options.out / "rlhf-shape.md").write_text(table(options, facts))
    sys.stdout.write(table(options, facts))


def command(options: argparse.Namespace, model: Path, data: Path, run: Path) -> list[str]:
    """`align rlhf` with everything in one process."""
    context = options.prompt_tokens + options.new_tokens
    return [
        *("rlhf", "--model", str(model), "--reward_model", str(model), "--data", str(data), "--out", str(run)),
        *("--steps", str(options.steps), "--batch_size", str(options.samples), "--max_length", str(context)),
        *("--template", "plain", "--reward", f"model=1,{Path(__file__).resolve()}:arbitrary=1", "--samples", "0"),
        *("--save_every", "1000000", "--cluster.in_process", "true"),
        *("--sampling.n", "1", "--sampling.max_tokens", str(options.new_tokens), "--sampling.seeded", "false"),
        *("--engine.context", str(context), "--engine.max_sequences", str(min(options.samples, 512))),
        *("--engine.dtype", options.dtype, "--engine.memory_fraction", str(options.memory_fraction)),
        *("--engine.sleep", "false", "--training.dtype", options.dtype),
        *("--training.micro_batch_tokens", str(options.micro_batch_tokens), "--canary_threshold", "1.0"),
        *("--optimizer.lr", "2.4e-7", "--optimizer.schedule", "constant"),
    ]


def arbitrary(
    prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[object]]
) -> list[float | None]:
    """A reward for `align rlhf`: from -1 to 1, by the checksum of the reply."""
    del prompts, columns
    return [2 * zlib.crc32(text.encode()) / 0xFFFFFFFF - 1 for text in completions]


def make_model(options: argparse.Namespace) -> Path:
    """A Llama of the shape with random weights; the tokenizer is the tiny model's, which knows the first ids."""
    out: Path = options.work / "model"
    if out.exists():
        return out
    tiny = options.work / "tiny"
    if not tiny.exists():
        make_tiny_model(tiny, seed=0)
    shape = TinyShape(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        ffn_size=options.ffn,
        num_layers=options.layers,
        num_heads=options.heads,
        num_kv_heads=options.heads,
        max_positions=4096,
    )
    config = json.loads((tiny / "config.json").read_text())
    config |= {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": shape.max_positions,
        "torch_dtype": "bfloat16",
    }
    where = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(where).manual_seed(0)
    with new_directory(out) as staging:
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "generation_config.json"):
            (staging / name).write_bytes((tiny / name).read_bytes())
        (staging / "config.json").write_text(json.dumps(config))
        weights = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else (0.02 * torch.randn(size, generator=generator, device=where)).to("cpu", torch.bfloat16)
            for name, size in weight_shapes(shape).items()
        }
        save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
    return out


def make_prompts(options: argparse.Namespace) -> Path:
    """Prompts of digits, which are a token each."""
    rng = np.random.default_rng(0)
    length = options.prompt_tokens - 2  # the beginning-of-sequence token, and the space put in front
    path: Path = options.work / "prompts.jsonl"
    rows = ("".join(str(digit) for digit in rng.integers(0, 10, size=length)) for _ in range(options.samples))
    path.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    return path


def device() -> str:
    """What it ran on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def table(options: argparse.Namespace, facts: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"# RLHF by phase, {options.layers} layers of hidden size {options.hidden}",
        "",
        f"{facts['device']}, {options.dtype}; {options.samples} samples a step, {options.prompt_tokens} tokens a "
        f"prompt, {options.new_tokens} new ones; policy, reference, reward and value of this shape and the engine on "
        "one GPU.",
        "",
        f"| step | {' | '.join(PHASES)} | all | tokens/s |",
        "|---|" + "---:|" * (len(PHASES) + 2),
    ]
    rows = [[line.get(f"seconds_{name}", 0.0) for name in PHASES] for line in facts["steps"]]
    for line, row in zip(facts["steps"], rows):
        cells = " | ".join(f"{value:.2f}" for value in row)
        lines.append(f"| {int(line['step'])} | {cells} | {sum(row):.2f} | {line['tokens'] / sum(row):,.0f} |")
    if len(rows) > 1:
        medians = [statistics.median(column) for column in zip(*rows[1:])]
        lines.append(f"| median after the first | {' | '.join(f'{m:.2f}' for m in medians)} | {sum(medians):.2f} | |")
    return "\n".join([*lines, "", f"Measured: {facts['status']}.", ""])


if __name__ == "__main__":
    main()
