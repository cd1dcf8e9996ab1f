"""Llama 1, 2 and 3.x.

Holds for multi-head, grouped-query and multi-query attention, tied and untied embeddings, rope scaling.
"""

from align_convert.families.blocks import ATTENTION, EMBEDDING, HEADS, MLP, NORMS
from align_convert.rules import Family

FAMILY = Family(
    name="llama",
    model_type="llama",
    lm_architecture="LlamaForCausalLM",
    score_architecture="LlamaForSequenceClassification",
    rules=(EMBEDDING, *ATTENTION, *MLP, *NORMS, *HEADS),
    derived=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    required_settings={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
)
