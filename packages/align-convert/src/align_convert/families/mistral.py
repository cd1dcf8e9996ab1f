"""Mistral 7B, Nemo, Small (dense): the tensors of a Llama.

Sliding-window attention is a setting, not a weight: it stays in config.json.
"""

from align_convert.families.blocks import ATTENTION, EMBEDDING, HEADS, MLP, NORMS
from align_convert.rules import Family

FAMILY = Family(
    name="mistral",
    model_type="mistral",
    lm_architecture="MistralForCausalLM",
    score_architecture="MistralForSequenceClassification",
    rules=(EMBEDDING, *ATTENTION, *MLP, *NORMS, *HEADS),
    required_settings={"hidden_act": ("silu",)},
    defaults={"num_key_value_heads": 8},
)
