"""The tiny model is a complete Hugging Face directory, and its tokenizer is the same in both libraries."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from align_core.errors import DataError
from align_core.tutorial import additions
from align_core.tutorial.tiny import TinyShape, make_tiny_model, weight_shapes

TEMPLATE = "\n\nHuman: {}\n\nAssistant:"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_model(directory, seed=7)
    return directory


@pytest.fixture(scope="module")
def hf_tokenizer(tiny: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def sp_tokenizer(tiny: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(tiny / "tokenizer.model"))


def random_texts(count: int) -> list[str]:
    """Words of the task, spaces in any place and number, and characters that only bytes can spell."""
    rng = random.Random(0)
    parts = [
        "Human",
        "Assistant:",
        "What is",
        " ",
        "  ",
        "\n",
        "\t",
        "0",
        "7",
        "+",
        "?",
        "is",
        "H",
        "zq",
        "\u00e9",
        "\u65e5",
    ]
    return ["".join(rng.choices(parts, k=rng.randrange(12))) for _ in range(count)]


def test_model_loads_in_transformers_and_computes_with_the_written_weights(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    written = load_file(tiny / "model.safetensors")
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert {name: value.shape for name, value in written.items()} == weight_shapes(TinyShape())
    assert written.keys() == state.keys()
    assert all((state[name] == written[name]).all() for name in written)
    assert model.config.num_key_value_heads == 2
    assert model.config.head_dim == 32
    logits = model(torch.tensor([[1, 5, 9]])).logits
    assert logits.shape == (1, 3, 320)
    assert torch.isfinite(logits).all()


def test_random_weights_have_the_standard_deviation_of_the_config(tiny: Path) -> None:
    """8,192 or more draws a matrix: four standard errors of the deviation are 0.05 * 4 / sqrt(2 * 8192) = 0.0016."""
    assert json.loads((tiny / "config.json").read_text())["initializer_range"] == 0.05
    for name, value in load_file(tiny / "model.safetensors").items():
        if value.ndim == 1:
            assert (value == 1).all(), name
        else:
            assert abs(value.std() - 0.05) < 0.0016, name


def test_same_seed_same_bytes_and_another_seed_other_weights(tiny: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "again", seed=7)
    make_tiny_model(tmp_path / "other", seed=8)
    names = sorted(path.name for path in tiny.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((tiny / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    differing = [name for name in names if (tiny / name).read_bytes() != (tmp_path / "other" / name).read_bytes()]
    assert differing == ["model.safetensors"]


def test_tokenizer_encodes_as_sentencepiece_does(
    hf_tokenizer: PreTrainedTokenizerBase, sp_tokenizer: sentencepiece.SentencePieceProcessor
) -> None:
    for text in ["", " ", "  a", "a ", "\n\nHuman: What is 27 + 58?\n\nAssistant: 85", *random_texts(500)]:
        assert hf_tokenizer(text).input_ids == [1, *sp_tokenizer.encode(text)], text
        assert hf_tokenizer(text, add_special_tokens=False).input_ids == sp_tokenizer.encode(text), text


def test_tokenizer_restores_every_text(
    hf_tokenizer: PreTrainedTokenizerBase, sp_tokenizer: sentencepiece.SentencePieceProcessor
) -> None:
    for text in random_texts(200):
        assert hf_tokenizer.decode(hf_tokenizer(text).input_ids, skip_special_tokens=True) == text
        assert sp_tokenizer.decode(sp_tokenizer.encode(text)) == text


def test_tokenizer_has_the_settings_of_llama(
    hf_tokenizer: PreTrainedTokenizerBase, sp_tokenizer: sentencepiece.SentencePieceProcessor
) -> None:
    assert (sp_tokenizer.unk_id(), sp_tokenizer.bos_id(), sp_tokenizer.eos_id(), sp_tokenizer.pad_id()) == (0, 1, 2, -1)
    assert (hf_tokenizer.bos_token_id, hf_tokenizer.eos_token_id, hf_tokenizer.pad_token_id) == (1, 2, None)
    assert sp_tokenizer.vocab_size() == len(hf_tokenizer) == 320
    assert [sp_tokenizer.id_to_piece(3 + byte) for byte in (0x00, 0x0A, 0xFF)] == ["<0x00>", "<0x0A>", "<0xFF>"]
    digits = [piece for piece in map(sp_tokenizer.id_to_piece, range(259, 320)) if any(c.isdigit() for c in piece)]
    assert sorted(digits) == list("0123456789")


def test_prompts_have_one_length_and_are_a_prefix_of_prompt_and_answer(hf_tokenizer: PreTrainedTokenizerBase) -> None:
    """Two digits each: 20 tokens with <s>. The answer starts with the space piece, so no merge crosses the border."""
    for a, b in [(10, 10), (27, 58), (10, 89)]:
        prompt = TEMPLATE.format(additions.Addition(a=a, b=b).question)
        prompt_ids = hf_tokenizer(prompt).input_ids
        ids = hf_tokenizer(f"{prompt} {a + b}").input_ids
        assert len(prompt_ids) == 20
        assert ids[:20] == prompt_ids
        assert len(ids) == 20 + 1 + 2


def test_existing_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        make_tiny_model(tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    """A vocabulary of 100 cannot hold 256 bytes, so the tokenizer fails after config and weights are written."""
    with pytest.raises(RuntimeError):
        make_tiny_model(tmp_path / "tiny", seed=0, shape=TinyShape(vocab_size=100))
    assert list(tmp_path.iterdir()) == []


def test_config_is_plain_llama(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] == config["num_attention_heads"] * config["head_dim"]
    assert config["tie_word_embeddings"] is False
