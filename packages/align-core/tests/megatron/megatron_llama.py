"""A tiny random Llama in Hugging Face's files, batches for it, and what Hugging Face makes of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from align_convert import ModelConfig
from align_core.types import Batch

# 301 tokens: no layout divides it, so every rank's share of the vocabulary is padded.
SETTINGS: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 301,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
LENGTHS = (5, 17, 1, 40, 33, 2, 24, 9)


@dataclass
class Run:
    """What a trainer said: log-probs at the start and the end, and each step's numbers."""

    first: NDArray[np.float32]
    steps: list[dict[str, float]]
    last: NDArray[np.float32]


def without_rates(step: Mapping[str, float]) -> dict[str, float]:
    """A step's numbers without those that measure time or memory."""
    return {name: v for name, v in step.items() if not name.startswith(("seconds", "tokens_per", "memory", "mfu"))}


def make_llama(directory: Path, **settings: object) -> None:
    """Config, float32 weights large enough that every layer matters, and a file that must travel with them."""
    config = {**SETTINGS, **settings}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "tokenizer.model").write_bytes(b"carried as it is")
    rng = np.random.default_rng(0)
    weights = {
        name: (1.0 + 0.1 * rng.standard_normal(shape) if len(shape) == 1 else 0.15 * rng.standard_normal(shape))
        for name, shape in ModelConfig.from_hf(config).tensors().items()
    }
    save_file({k: v.astype(np.float32) for k, v in weights.items()}, directory / "model.safetensors", {"format": "pt"})


def ragged_batch(*, seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> Batch:
    """Sequences of very different lengths; about half of the tokens are targets."""
    rng = np.random.default_rng(seed)
    masks = [rng.random(length) < 0.5 for length in lengths]
    for mask in masks:
        mask[0] = False
    sequences = [rng.integers(0, SETTINGS["vocab_size"], length).astype(np.int32) for length in lengths]
    return Batch.of(sequences, tokens={"mask": masks})


def hugging_face(directory: Path) -> Any:
    """The model as transformers loads it, float32."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)


def reference_logprobs(model: Any, batch: Batch) -> torch.Tensor:
    """float32 [N] with gradient, each sequence alone through the model; 0 for the first token of each."""
    parts = []
    for tokens in np.split(batch.tokens, batch.offsets[1:-1]):
        ids = torch.from_numpy(tokens.astype(np.int64))
        logprobs = torch.log_softmax(model(ids[None]).logits[0], dim=-1)
        parts += [torch.zeros(1), logprobs[torch.arange(len(ids) - 1), ids[1:]]]
    return torch.cat(parts)


def hugging_face_weights(directory: Path) -> dict[str, NDArray[np.float32]]:
    """The tensors of the file."""
    from safetensors.numpy import load_file

    return load_file(directory / "model.safetensors")


def reference_training(directory: Path, *, steps: int) -> tuple[NDArray[np.float32], list[float], NDArray[np.float32]]:
    """Log-probs before, losses, and log-probs after `steps` of any family by Hugging Face and torch's AdamW."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    with torch.no_grad():
        first = reference_logprobs(model, ragged_batch()).numpy()
    losses = []
    for step in range(steps):
        batch = ragged_batch(seed=step)
        optimizer.zero_grad()
        loss = -reference_logprobs(model, batch)[torch.from_numpy(batch.mask)].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return first, losses, reference_logprobs(model, ragged_batch()).numpy()
