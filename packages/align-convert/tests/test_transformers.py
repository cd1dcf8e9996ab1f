"""Against transformers itself: it writes what we read, and reads what we write with the same results."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from align_convert import Layout, ModelConfig, load_any, write_hf
from align_convert.copy import to_hf, to_megatron

transformers = pytest.importorskip("transformers", reason="comes with the extra: pip install 'align-convert[verify]'")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("head", ["lm", "score"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_model_computes_the_same_after_the_round_trip(tmp_path: Path, head: str, tied: bool) -> None:
    """Equal weights and settings give equal logits, bit for bit."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-3,
        rope_parameters=LLAMA3,
        tie_word_embeddings=tied,
        num_labels=1,
        pad_token_id=0,
    )
    kinds = {"lm": transformers.LlamaForCausalLM, "score": transformers.LlamaForSequenceClassification}
    model = kinds[head](config).eval()
    model.save_pretrained(tmp_path / "hf")
    to_megatron(load_any(tmp_path / "hf"), tmp_path / "megatron", layout=Layout(tp=2, pp=2))
    to_hf(load_any(tmp_path / "megatron"), tmp_path / "back")
    again = kinds[head].from_pretrained(tmp_path / "back").eval()
    tokens = torch.arange(1, 41).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")


@pytest.mark.parametrize("head", ["lm", "score"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_same_model_after_the_round_trip(
    make_family: Callable[..., ModelConfig], tmp_path: Path, family: str, head: str
) -> None:
    """Names and shapes are those that transformers itself writes; experts over 2 expert-parallel ranks."""
    torch.manual_seed(0)
    ours = make_family(family, num_hidden_layers=2).with_head("score" if head == "score" else "lm")
    config = transformers.AutoConfig.for_model(**ours.hf, pad_token_id=0)
    model = _randomised(
        {"lm": transformers.AutoModelForCausalLM, "score": transformers.AutoModelForSequenceClassification}[head]
        .from_config(config)
        .eval()
    )
    model.save_pretrained(tmp_path / "hf")
    layout = Layout(tp=2, pp=2, ep=2 if ours.num_experts else 1)
    to_megatron(load_any(tmp_path / "hf"), tmp_path / "megatron", layout=layout)
    to_hf(load_any(tmp_path / "megatron"), tmp_path / "back")
    again = type(model).from_pretrained(tmp_path / "back").eval()
    tokens = torch.arange(1, 41).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)


def _randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Norms and biases that are not all ones and zeros, so that a mix-up of them shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_config_with_another_head_is_understood(tmp_path: Path) -> None:
    raw = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    ).to_dict()
    config = ModelConfig.from_hf(raw | {"model_type": "llama"}).with_head("score")
    weights = {name: torch.zeros(shape) for name, shape in config.tensors().items()}
    write_hf(tmp_path / "out", config, weights.items(), dtype=torch.float32)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (type(model).__name__, model.config.num_labels) == ("LlamaForSequenceClassification", 1)
