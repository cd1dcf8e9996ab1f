"""config.json in, neutral description out; nothing guessed, nothing lost."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from align_convert import ConfigError, ModelConfig

Make = Callable[..., ModelConfig]


def test_sizes_and_defaults_are_those_of_llama(make_config: Make) -> None:
    config = make_config(num_key_value_heads=None, rms_norm_eps=None, rope_theta=None)
    assert (config.num_kv_heads, config.head_dim, config.norm_eps, config.rope_theta) == (4, 8, 1e-6, 10000.0)
    assert (config.family, config.head, config.tied_embeddings) == ("llama", "lm", False)


def test_explicit_head_size_wins_over_hidden_size_per_head(make_config: Make) -> None:
    config = make_config(head_dim=16)
    assert config.tensors()["model.layers.0.self_attn.q_proj.weight"] == (4 * 16, 32)
    assert config.tensors()["model.layers.0.self_attn.o_proj.weight"] == (32, 4 * 16)


def test_rope_is_read_from_old_and_new_spelling(make_config: Make) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0}
    old = make_config(rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    new = make_config(rope_theta=None, rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", **scaling})
    assert old.rope_theta == new.rope_theta == 5e5
    assert old.rope_scaling == new.rope_scaling == {"rope_type": "llama3", **scaling}


def test_plain_rope_parameters_mean_no_scaling(make_config: Make) -> None:
    config = make_config(rope_theta=None, rope_parameters={"rope_theta": 20000, "rope_type": "default"})
    assert (config.rope_theta, config.rope_scaling) == (20000.0, None)


def test_tensors_are_listed_in_order_of_the_model(make_config: Make) -> None:
    names = list(make_config(num_hidden_layers=1).tensors())
    layer = "model.layers.0."
    assert names == [
        "model.embed_tokens.weight",
        layer + "self_attn.q_proj.weight",
        layer + "self_attn.k_proj.weight",
        layer + "self_attn.v_proj.weight",
        layer + "self_attn.o_proj.weight",
        layer + "mlp.gate_proj.weight",
        layer + "mlp.up_proj.weight",
        layer + "mlp.down_proj.weight",
        layer + "input_layernorm.weight",
        layer + "post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]


def test_tied_model_has_no_head_tensor(make_config: Make) -> None:
    config = make_config(tie_word_embeddings=True)
    assert config.tied_embeddings
    assert "lm_head.weight" not in config.tensors()


def test_score_head_is_one_row_and_never_tied(make_config: Make) -> None:
    config = make_config(tie_word_embeddings=True).with_head("score")
    assert not config.tied_embeddings
    assert config.tensors()["score.weight"] == (1, 32)
    again = ModelConfig.from_hf(config.hf)
    assert (again.head, again.tied_embeddings) == ("score", False)
    back = again.with_head("lm")
    assert (back.head, back.tied_embeddings, back.hf["architectures"]) == ("lm", True, ["LlamaForCausalLM"])


def test_unknown_keys_are_kept(make_config: Make) -> None:
    assert make_config(pretraining_tp=1, my_note="x").hf["my_note"] == "x"


def test_config_survives_pickling(make_config: Make) -> None:
    config = make_config()
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301  our own object


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' in config.json is not supported; supported: 'llama'"),
        ({"hidden_size": None}, "config.json has no 'hidden_size'; add it"),
        ({"num_hidden_layers": "8"}, "'num_hidden_layers' is '8'; it must be a positive int"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' is True"),
        ({"vocab_size": 0}, "'vocab_size' is 0"),
        ({"attention_bias": True}, "'attention_bias' is True; family 'llama' supports False"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'; family 'llama' supports silu"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide 4 attention heads; use 1, 2 or 4"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "5 attention heads do not divide hidden_size 32"),
        ({"architectures": ["LlamaForTokenClassification"]}, "supported: LlamaForCausalLM or LlamaForSequence"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "a score head with 2 labels is not supported"),
        ({"rope_scaling": 2.0}, "'rope_scaling' is 2.0; it must be an object or null"),
    ],
)
def test_unsupported_config_is_refused(make_config: Make, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=r".") as caught:
        make_config(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", '"x"'])
def test_config_file_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_hf(tmp_path)


def test_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json; give a Hugging Face model directory"):
        ModelConfig.from_hf(tmp_path)


def test_config_is_read_from_a_directory(tmp_path: Path, make_config: Make) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dict(make_config().hf)), encoding="utf-8")
    assert ModelConfig.from_hf(tmp_path) == make_config()
