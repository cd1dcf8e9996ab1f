"""Many weight updates into one live engine, answers compared with Hugging Face after each; memory; greedy on SmolLM2.

    python benchmarks/rollout_syncs.py --out DIR                       # 200 updates of a tiny model, CPU, 3 minutes
    python benchmarks/rollout_syncs.py --out DIR --model SMOLLM2_DIR   # also real weights, float32 and bfloat16

Every update has new random weights. After it: greedy tokens equal `generate` of transformers on them, log-probs
of sampled tokens equal its forward pass, and all completions carry the version.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from align_core.config import EngineConfig, SamplingConfig
from align_core.stages.sync import synchronise
from align_core.types import ITEM_BYTES, ParamMeta, Prompt, WeightTensor, checksum
from align_rollout.vllm import VllmEngine

_QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three prime numbers.",
    "How many minutes are in two hours?",
]


def main() -> None:
    """Runs both parts and writes rollout-syncs.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--syncs", type=int, default=200)
    parser.add_argument("--model", type=Path, help="a directory with real weights, such as align make-model smollm2's")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"torch": torch.__version__, "syncs": many_syncs(arguments.syncs)}
    print(json.dumps(results["syncs"]), flush=True)
    if arguments.model:
        for dtype in ("float32", "bfloat16"):
            results[f"real_{dtype}"] = real_model(arguments.model, dtype)
            print(json.dumps(results[f"real_{dtype}"]), flush=True)
    (arguments.out / "rollout-syncs.json").write_text(json.dumps(results, indent=1) + "\n")


class Twin:
    """A transformers model whose weights are sent; a `WeightSource`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def randomise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def metadata(self) -> list[ParamMeta]:
        return [
            ParamMeta(name=name, shape=tuple(parameter.shape), dtype="float32")
            for name, parameter in self.model.named_parameters()
        ]

    def iterate(self) -> Iterator[WeightTensor]:
        for meta, parameter in zip(self.metadata(), self.model.parameters(), strict=True):
            data = parameter.detach().numpy().reshape(-1).view(np.uint8)
            yield WeightTensor(meta=meta, checksum=checksum(data, item_bytes=ITEM_BYTES[meta.dtype]), data=data)

    def greedy(self, prompt: np.ndarray, length: int) -> list[int]:
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        found = self.model.generate(ids, max_new_tokens=length, do_sample=False, pad_token_id=0)
        return [int(token) for token in found[0, len(prompt) :]]

    def logprobs(self, prompt: np.ndarray, completion: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
        with torch.no_grad():
            table = self.model(ids).logits[0].float().log_softmax(-1).numpy()
        found: np.ndarray = table[np.arange(len(prompt) - 1, ids.shape[1] - 1), completion]
        return found


def many_syncs(count: int) -> dict[str, Any]:
    """`count` updates in a row."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    twin = Twin(LlamaForCausalLM(config).float().eval())
    with tempfile.TemporaryDirectory() as folder:
        twin.model.save_pretrained(folder)
        engine = VllmEngine.from_model(Path(folder), EngineConfig(context=256, kv_cache_mib=64, device="cpu"))
    memory, seconds, worst, tokens, started = [], [], 0.0, 0, time.perf_counter()
    for version in range(1, count + 1):
        twin.randomise(version)
        seconds.append(synchronise(twin, engine.weight_sink(), version=version).seconds["total"])
        found, difference = compare(twin, engine, version)
        tokens, worst = tokens + found, max(worst, difference)
        memory.append(_resident_mib())
    engine.close()
    return {
        "updates": count,
        "tokens_compared": tokens,
        "largest_logprob_difference": worst,
        "seconds_per_sync_median": float(np.median(seconds)),
        "seconds": time.perf_counter() - started,
        "resident_mib_after_update_20": memory[min(19, count - 1)],
        "resident_mib_at_the_end": memory[-1],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def compare(twin: Twin, engine: Any, version: int) -> tuple[int, float]:
    """Greedy tokens and sampled log-probs of a few prompts; raises where tokens or versions differ."""
    generator = np.random.default_rng(version)
    prompts = [Prompt(id=i, tokens=generator.integers(3, 256, n).astype(np.int32)) for i, n in enumerate((1, 7, 150))]
    tokens = 0
    for prompt, completion in zip(prompts, engine.generate(prompts, SamplingConfig(max_tokens=8, temperature=0))):
        expected = twin.greedy(prompt.tokens, 8)[: len(completion.tokens)]
        if completion.tokens.tolist() != expected or completion.version != version:
            raise SystemExit(f"version {version}: {completion} instead of {expected}")
        tokens += len(expected)
    worst = 0.0
    for completion in engine.generate(prompts, SamplingConfig(n=2, max_tokens=8, seed=version)):
        expected_logprobs = twin.logprobs(prompts[completion.prompt_id].tokens, completion.tokens)
        worst = max(worst, float(np.abs(completion.logprobs - expected_logprobs).max()))
        tokens += len(completion.tokens)
    return tokens, worst


def real_model(path: Path, dtype: str) -> dict[str, Any]:
    """Greedy tokens and sampled log-probs of a real model against transformers."""
    twin = Twin(LlamaForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval())
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in _QUESTIONS
    ]
    prompts = [Prompt(id=i, tokens=np.asarray(tokenizer.encode(text), np.int32)) for i, text in enumerate(texts)]
    config = EngineConfig(context=512, kv_cache_mib=256, dtype=dtype, device="cpu")  # type: ignore[arg-type]
    engine = VllmEngine.from_model(path, config)
    equal = 0
    for prompt, completion in zip(prompts, engine.generate(prompts, SamplingConfig(max_tokens=32, temperature=0))):
        equal += completion.tokens.tolist() == twin.greedy(prompt.tokens, 32)[: len(completion.tokens)]
    sampling = SamplingConfig(n=4, max_tokens=32, seed=1)
    sampled = engine.generate(prompts, sampling)
    again = engine.generate(prompts, sampling)
    differences = np.abs(
        np.concatenate([c.logprobs - twin.logprobs(prompts[c.prompt_id].tokens, c.tokens) for c in sampled])
    )
    engine.close()
    return {
        "prompts": len(prompts),
        "greedy_equal_to_generate": equal,
        "sampled_tokens": len(differences),
        "logprob_difference_mean": float(differences.mean()),
        "logprob_difference_p99": float(np.quantile(differences, 0.99)),
        "logprob_difference_max": float(differences.max()),
        "seeds_reproduce": all(a.tokens.tolist() == b.tokens.tolist() for a, b in zip(sampled, again)),
    }


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()
