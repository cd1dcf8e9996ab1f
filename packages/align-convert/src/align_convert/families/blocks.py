"""Rules that several families share: a family's table is put together from these, and adds what is its own.

RoPE needs no permutation anywhere: Hugging Face and Megatron's `rotary_interleaved=False` both rotate halves.
Source: names and row orders as written by NVIDIA's converter (core_v0.17.0) and megatron-core 0.16.1's GPTModel.
"""

from align_convert.rules import Dim, Interleave, Place, Rule, Source, Split, When

HF_LAYER = "model.layers.{layer}."
LAYER = "decoder.layers.{layer}."


def _replicated(megatron: str, hf: str, dim: Dim, *, place: Place = Place.LAYER) -> Rule:
    """A vector that every tensor-parallel rank holds whole."""
    return Rule(megatron=megatron, sources=(Source(name=hf, dims=(dim,)),), place=place)


def _qkv(kind: str, dims: tuple[Dim, ...]) -> Rule:
    """Query, key and value rows of each KV group in turn; `kind` is `weight` or `bias`."""
    return Rule(
        megatron=LAYER + f"self_attention.linear_qkv.{kind}",
        sources=(
            Source(name=HF_LAYER + f"self_attn.q_proj.{kind}", dims=("query", *dims)),
            Source(name=HF_LAYER + f"self_attn.k_proj.{kind}", dims=("kv", *dims)),
            Source(name=HF_LAYER + f"self_attn.v_proj.{kind}", dims=("kv", *dims)),
        ),
        place=Place.LAYER,
        split=Split.ROWS,
        interleave=Interleave.KV_GROUPS,
    )


def gated_mlp(megatron: str, hf: str, width: Dim, *, gate: str, up: str, down: str) -> tuple[Rule, Rule]:
    """SwiGLU: each rank's slice of gate, then its slice of up, in one matrix; down cut by columns.

    Args:
        megatron, hf: prefixes; the last three are the HF names of the matrices.
    """
    fc1 = Rule(
        megatron=megatron + "linear_fc1.weight",
        sources=(
            Source(name=f"{hf}{gate}.weight", dims=(width, "hidden")),
            Source(name=f"{hf}{up}.weight", dims=(width, "hidden")),
        ),
        place=Place.LAYER,
        split=Split.ROWS,
        interleave=Interleave.TENSOR_PARALLEL,
    )
    fc2 = Rule(
        megatron=megatron + "linear_fc2.weight",
        sources=(Source(name=f"{hf}{down}.weight", dims=("hidden", width)),),
        place=Place.LAYER,
        split=Split.COLUMNS,
    )
    return fc1, fc2


def experts(hf: str, width: Dim, *, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """A router that every rank holds, and one gated MLP an expert; `hf` is the prefix of both within the layer."""
    router = Rule(
        megatron=LAYER + "mlp.router.weight",
        sources=(Source(name=HF_LAYER + hf + "gate.weight", dims=("experts", "hidden")),),
        place=Place.LAYER,
    )
    prefix = HF_LAYER + hf + "experts.{expert}."
    return router, *gated_mlp(LAYER + "mlp.experts.local_experts.{expert}.", prefix, width, gate=gate, up=up, down=down)


def _vocab(megatron: str, hf: str, place: Place, when: When = When.ALWAYS) -> Rule:
    """A matrix with a row a token, padded and cut by rows."""
    sources = (Source(name=hf, dims=("vocab", "hidden")),)
    return Rule(megatron=megatron, sources=sources, place=place, split=Split.ROWS, when=when)


def _pooler(layer: str, dims: tuple[Dim, ...]) -> Rule:
    """A tensor of the head of two layers, whole on every tensor-parallel rank."""
    sources = (Source(name=f"score.{layer}", dims=dims),)
    return Rule(megatron=f"pooler_head.{layer}", sources=sources, place=Place.LAST, when=When.POOLER)


EMBEDDING = _vocab("embedding.word_embeddings.weight", "model.embed_tokens.weight", Place.FIRST)

ATTENTION = (
    _qkv("weight", ("hidden",)),
    Rule(
        megatron=LAYER + "self_attention.linear_proj.weight",
        sources=(Source(name=HF_LAYER + "self_attn.o_proj.weight", dims=("hidden", "query")),),
        place=Place.LAYER,
        split=Split.COLUMNS,
    ),
)
QKV_BIAS = (_qkv("bias", ()),)
QK_NORMS = (
    _replicated(LAYER + "self_attention.q_layernorm.weight", HF_LAYER + "self_attn.q_norm.weight", "head"),
    _replicated(LAYER + "self_attention.k_layernorm.weight", HF_LAYER + "self_attn.k_norm.weight", "head"),
)
MLP = gated_mlp(LAYER + "mlp.", HF_LAYER + "mlp.", "ffn", gate="gate_proj", up="up_proj", down="down_proj")
NORMS = (
    _replicated(LAYER + "input_layernorm.weight", HF_LAYER + "input_layernorm.weight", "hidden"),
    _replicated(LAYER + "pre_mlp_layernorm.weight", HF_LAYER + "post_attention_layernorm.weight", "hidden"),
)
HEADS = (
    _replicated("decoder.final_layernorm.weight", "model.norm.weight", "hidden", place=Place.LAST),
    _vocab("output_layer.weight", "lm_head.weight", Place.LAST, When.UNTIED),
    _vocab("output_layer.weight", "model.embed_tokens.weight", Place.LAST, When.TIED),
    Rule(
        megatron="output_layer.weight",
        sources=(Source(name="score.weight", dims=("one", "hidden")),),
        place=Place.LAST,
        when=When.SCORE,
    ),
    _pooler("dense1.weight", ("hidden", "hidden")),
    _pooler("dense1.bias", ("hidden",)),
    _pooler("dense2.weight", ("one", "hidden")),
    _pooler("dense2.bias", ("one",)),
)
"""The final norm and one of the heads: its own, the embedding's second copy, a scalar one, or one of two layers."""
