"""A tiny random Llama and a SentencePiece tokenizer, made on the spot in the files of a Hugging Face directory.

The model is what a laptop trains in minutes, and yet a complete Llama: grouped-query attention, rotary positions,
untied embeddings, and sizes that tensor parallel 2 and pipeline parallel 2 divide. The tokenizer is a real BPE
`tokenizer.model` with Llama 2's settings (byte fallback, one piece a digit, no normalisation, a space put in front of
the text), so that everything around it is exercised as with Llama 2. Knows nothing about training and Megatron.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from align_core.atomic import new_directory
from align_core.errors import missing_dependency
from align_core.tutorial import additions

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_INIT_STD = 0.05  # Llama 2's 0.02 is for wider layers: here it learns later, and with spikes in the loss
_SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2
_SPACE = "\u2581"  # how sentencepiece writes a space
_PLAIN_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyShape:
    """Sizes of the tiny Llama."""

    vocab_size: int = 320
    """259 control and byte pieces, the characters of the task and about thirty merges; a multiple of 64."""
    hidden_size: int = 128
    """Features a token."""
    ffn_size: int = 256
    """Features inside the gated MLP."""
    num_layers: int = 2
    """Decoder layers; even, so that two pipeline stages share them."""
    num_heads: int = 4
    """Query heads; hidden_size / num_heads is 32, the smallest head size that vLLM supports on CPU."""
    num_kv_heads: int = 2
    """Key and value heads, each shared by two query heads."""
    max_positions: int = 256
    """Tokens of the longest sequence."""

    @property
    def head_size(self) -> int:
        """Features a head."""
        return self.hidden_size // self.num_heads


def make_tiny_model(out: Path, *, seed: int, shape: TinyShape | None = None) -> None:
    """Write config, random float32 weights and tokenizer to the directory `out`, all of it or nothing.

    The same seed gives the same bytes.

    Raises:
        DataError: `out` exists already and is not an empty directory.
    """
    shape = shape or TinyShape()
    with new_directory(out) as staging:
        _write_json(staging / "config.json", tiny_config(shape))
        _write_json(staging / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
        _write_weights(staging, shape, seed=seed)
        _write_tokenizer(staging, shape)


def weight_shapes(shape: TinyShape) -> dict[str, tuple[int, ...]]:
    """Hugging Face names of all tensors and their sizes."""
    hidden, ffn = shape.hidden_size, shape.ffn_size
    queries, keys = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        sizes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (queries, hidden),
            f"{prefix}.self_attn.k_proj.weight": (keys, hidden),
            f"{prefix}.self_attn.v_proj.weight": (keys, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, queries),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_proj.weight": (ffn, hidden),
            f"{prefix}.mlp.up_proj.weight": (ffn, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, ffn),
        }
    return sizes | {"model.norm.weight": (hidden,), "lm_head.weight": (shape.vocab_size, hidden)}


def _write_weights(directory: Path, shape: TinyShape, *, seed: int) -> None:
    try:
        from safetensors.numpy import save_file  # noqa: PLC0415
    except ImportError as error:
        raise missing_dependency("safetensors", "align-core[megatron]", needed_for="the tiny model") from error

    rng = np.random.default_rng(seed)
    weights = {
        name: np.ones(size, np.float32) if len(size) == 1 else _INIT_STD * rng.standard_normal(size, np.float32)
        for name, size in weight_shapes(shape).items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def tiny_config(shape: TinyShape) -> dict[str, object]:
    """Hugging Face's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "initializer_range": _INIT_STD,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def _write_tokenizer(directory: Path, shape: TinyShape) -> None:
    try:
        import sentencepiece  # noqa: PLC0415
    except ImportError as error:
        raise missing_dependency("sentencepiece", "align-core[megatron]", needed_for="the tiny tokenizer") from error

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=additions.corpus(),
        model_writer=model,
        model_type="bpe",
        vocab_size=shape.vocab_size,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,  # training prints its progress otherwise
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    _write_json(directory / "tokenizer.json", _tokenizer_json(pieces))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL[1],
        "eos_token": _SPECIAL[2],
        "unk_token": _SPECIAL[0],
        "model_max_length": shape.max_positions,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(directory / "tokenizer_config.json", settings)


def _tokenizer_json(pieces: "SentencePieceProcessor") -> dict[str, object]:
    """The same tokenizer for Hugging Face's `tokenizers`, which encodes every text as sentencepiece does.

    Transformers can read `tokenizer.model` too, but its LlamaTokenizer then leaves out the space in front of a text
    that begins with a space.
    """
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    special = [{"id": i, "content": token, "special": True, **_PLAIN_TOKEN} for i, token in enumerate(_SPECIAL)]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    begin = {"SpecialToken": {"id": _SPECIAL[1], "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, space]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, second],
            "special_tokens": {_SPECIAL[1]: {"id": _SPECIAL[1], "ids": [1], "tokens": [_SPECIAL[1]]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": _SPECIAL[0],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": _merges(pieces, vocab),
        },
    }


def _merges(pieces: "SentencePieceProcessor", vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best score first: the order in which sentencepiece merges."""
    by_score = sorted(vocab, key=lambda piece: -pieces.get_score(vocab[piece]))
    return [
        (piece[:cut], piece[cut:])
        for piece in by_score
        if not pieces.is_byte(vocab[piece]) and not pieces.is_control(vocab[piece]) and vocab[piece] != 0
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
