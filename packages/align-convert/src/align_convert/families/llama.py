"""Llama 1, 2 and 3.x: the weight table.

Holds for multi-head, grouped-query and multi-query attention, tied and untied embeddings, language-model and score
heads. RoPE needs no permutation: Hugging Face's Llama and Megatron's `rotary_interleaved=False` both rotate halves.
Source: names and row orders as written by NVIDIA's converter (core_v0.17.0) and megatron-core 0.16.1's GPTModel.
"""

from align_convert.rules import Family, Interleave, Place, Rule, Source, Split, When

_HF_LAYER = "model.layers.{layer}."
_LAYER = "decoder.layers.{layer}."

FAMILY = Family(
    name="llama",
    model_type="llama",
    lm_architecture="LlamaForCausalLM",
    score_architecture="LlamaForSequenceClassification",
    rules=(
        Rule(
            megatron="embedding.word_embeddings.weight",
            sources=(Source(name="model.embed_tokens.weight", dims=("vocab", "hidden")),),
            place=Place.FIRST,
            split=Split.ROWS,
        ),
        Rule(
            megatron=_LAYER + "self_attention.linear_qkv.weight",
            sources=(
                Source(name=_HF_LAYER + "self_attn.q_proj.weight", dims=("query", "hidden")),
                Source(name=_HF_LAYER + "self_attn.k_proj.weight", dims=("kv", "hidden")),
                Source(name=_HF_LAYER + "self_attn.v_proj.weight", dims=("kv", "hidden")),
            ),
            place=Place.LAYER,
            split=Split.ROWS,
            interleave=Interleave.KV_GROUPS,
        ),
        Rule(
            megatron=_LAYER + "self_attention.linear_proj.weight",
            sources=(Source(name=_HF_LAYER + "self_attn.o_proj.weight", dims=("hidden", "query")),),
            place=Place.LAYER,
            split=Split.COLUMNS,
        ),
        Rule(
            megatron=_LAYER + "mlp.linear_fc1.weight",
            sources=(
                Source(name=_HF_LAYER + "mlp.gate_proj.weight", dims=("ffn", "hidden")),
                Source(name=_HF_LAYER + "mlp.up_proj.weight", dims=("ffn", "hidden")),
            ),
            place=Place.LAYER,
            split=Split.ROWS,
            interleave=Interleave.TENSOR_PARALLEL,
        ),
        Rule(
            megatron=_LAYER + "mlp.linear_fc2.weight",
            sources=(Source(name=_HF_LAYER + "mlp.down_proj.weight", dims=("hidden", "ffn")),),
            place=Place.LAYER,
            split=Split.COLUMNS,
        ),
        Rule(
            megatron=_LAYER + "input_layernorm.weight",
            sources=(Source(name=_HF_LAYER + "input_layernorm.weight", dims=("hidden",)),),
            place=Place.LAYER,
        ),
        Rule(
            megatron=_LAYER + "pre_mlp_layernorm.weight",
            sources=(Source(name=_HF_LAYER + "post_attention_layernorm.weight", dims=("hidden",)),),
            place=Place.LAYER,
        ),
        Rule(
            megatron="decoder.final_layernorm.weight",
            sources=(Source(name="model.norm.weight", dims=("hidden",)),),
            place=Place.LAST,
        ),
        Rule(
            megatron="output_layer.weight",
            sources=(Source(name="lm_head.weight", dims=("vocab", "hidden")),),
            place=Place.LAST,
            split=Split.ROWS,
            when=When.UNTIED,
        ),
        Rule(
            megatron="output_layer.weight",
            sources=(Source(name="model.embed_tokens.weight", dims=("vocab", "hidden")),),
            place=Place.LAST,
            split=Split.ROWS,
            when=When.TIED,
        ),
        Rule(
            megatron="output_layer.weight",
            sources=(Source(name="score.weight", dims=("one", "hidden")),),
            place=Place.LAST,
            when=When.SCORE,
        ),
    ),
    derived=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    tied_alias=("lm_head.weight", "model.embed_tokens.weight"),
    required_settings={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
)
