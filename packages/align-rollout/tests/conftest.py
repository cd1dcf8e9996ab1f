"""A tiny Llama on disk, its Hugging Face twin to compare with, and one running vLLM engine a module."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_core.types import ITEM_BYTES, ParamMeta, WeightTensor, checksum

_VOCAB = 128
_CONTEXT = 256
_EOS = 2


@dataclasses.dataclass(kw_only=True)
class TinyLlama:
    """A Hugging Face model and the directory it was first saved in; a `WeightSource` of its current weights."""

    model: Any
    path: Path
    tied: bool
    vocab_size: int = _VOCAB
    context: int = _CONTEXT
    eos_id: int = _EOS

    def randomise(self, seed: int) -> None:
        """New weights, large enough that logits are far apart and greedy tokens do not hang on rounding."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def metadata(self) -> list[ParamMeta]:
        """All weights, under Hugging Face's names."""
        return [
            ParamMeta(name=name, shape=tuple(parameter.shape), dtype="float32")
            for name, parameter in self.model.named_parameters()
        ]

    def iterate(self) -> Iterator[WeightTensor]:
        """Copies of the current weights."""
        for meta, parameter in zip(self.metadata(), self.model.parameters(), strict=True):
            data = parameter.detach().numpy().copy().reshape(-1).view(np.uint8)
            yield WeightTensor(meta=meta, checksum=checksum(data, item_bytes=ITEM_BYTES[meta.dtype]), data=data)

    def greedy(self, prompt: np.ndarray, max_tokens: int) -> list[int]:
        """What Hugging Face's own generate gives for `prompt`."""
        import torch

        ids = torch.tensor(prompt[None].astype(np.int64))
        found = self.model.generate(ids, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
        return [int(token) for token in found[0, len(prompt) :]]

    def logprobs(self, prompt: np.ndarray, completion: np.ndarray) -> np.ndarray:
        """Log-softmax of a full forward pass, at the tokens of `completion`."""
        import torch

        ids = torch.tensor(np.concatenate([prompt, completion])[None].astype(np.int64))
        with torch.no_grad():
            table = self.model(ids).logits[0].log_softmax(-1).numpy()
        return table[np.arange(len(prompt) - 1, len(prompt) + len(completion) - 1), completion]


def make_tiny_llama(path: Path, *, tied: bool) -> TinyLlama:
    """A random two-layer Llama in float32; head size 32, the smallest that vLLM's CPU attention takes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=_CONTEXT,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=_EOS,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float().eval()
    model.save_pretrained(path)
    return TinyLlama(model=model, path=path, tied=tied)


@pytest.fixture(scope="module")  # tests change its weights
def tied(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    """The output layer is the embedding."""
    return make_tiny_llama(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")  # tests change its weights
def untied(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    """The output layer has weights of its own."""
    return make_tiny_llama(tmp_path_factory.mktemp("untied"), tied=False)
