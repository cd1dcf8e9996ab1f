"""The estimate of memory: near what was measured, by hand for one shape, and of the constants that the head has."""

import dataclasses
from typing import Any

import pytest

from align_core.config import EngineConfig, LoraConfig, ParallelConfig, TrainingConfig
from align_core.memory import engine_memory, model_memory, models_memory
from align_core.model_shape import ModelShape

LLAMA_2_7B = ModelShape(
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=32,
    head_dim=128,
    ffn=11008,
    vocab=32000,
    max_positions=4096,
    tied_embeddings=False,
)


# Peaks in GiB on an H200 (benchmarks/results/training-h200.md): layers of the 7B shape, tokens a micro-batch, mode of
# recompute. The first two with the head as it is now; the others with the one before, which took up to 1 GiB more.
MEASURED = [
    (16, 8192, "none", 75.8),
    (32, 4096, "none", 129.8),
    (8, 8192, "none", 40.9),
    (8, 16384, "none", 50.0),
    (8, 4096, "none", 36.3),
    (16, 8192, "selective", 73.4),
    (16, 16384, "full", 63.6),
    (32, 4096, "selective", 127.1),
]


@pytest.mark.parametrize(("layers", "tokens", "recompute", "gib"), MEASURED)
def test_estimate_is_near_the_measured_peak(layers: int, tokens: int, recompute: Any, gib: float) -> None:
    training = TrainingConfig(dtype="bfloat16", micro_batch_tokens=tokens, recompute=recompute)
    shape = dataclasses.replace(LLAMA_2_7B, layers=layers)
    assert model_memory(shape, parallel=ParallelConfig(), training=training).total / 2**30 == pytest.approx(
        gib, rel=0.03
    )


def test_adapters_alone_have_gradients_and_optimizer_state() -> None:
    """Rank 2 on the 7B shape: (4 x 4096) + (2 x 4096) + (4096 + 2 x 11008) + (11008 + 4096) = 65,792 a layer
    and rank, so 2 x 32 x 65,792 = 4,210,688 in all."""
    training, lora = TrainingConfig(dtype="bfloat16"), LoraConfig(rank=2)
    memory = model_memory(LLAMA_2_7B, parallel=ParallelConfig(), training=training, lora=lora)
    assert memory.gradients == 4 * 4_210_688
    assert memory.optimizer == 12 * 4_210_688
    assert memory.weights == 2 * LLAMA_2_7B.parameters()


def test_optimizer_is_shared_by_data_parallel_ranks() -> None:
    training = TrainingConfig(dtype="bfloat16")
    one, four = (model_memory(LLAMA_2_7B, parallel=ParallelConfig(data=n), training=training).optimizer for n in (1, 4))
    assert one == 4 * four


def test_parameters_of_known_models() -> None:
    """Llama-2-7B has 6,738,415,616; with a score head, the output matrix (32,000 x 4,096) gives way to 4,096."""
    assert LLAMA_2_7B.parameters() == 6_738_415_616
    assert LLAMA_2_7B.parameters(head="score") == 6_738_415_616 - 32000 * 4096 + 4096


def test_memory_by_hand() -> None:
    """bfloat16 on one device: 2 + 4 + 8 + 4 bytes a weight; tensor parallel halves them."""
    training = TrainingConfig(dtype="bfloat16", micro_batch_tokens=1)
    whole = model_memory(LLAMA_2_7B, parallel=ParallelConfig(), training=training)
    weights = LLAMA_2_7B.parameters()
    assert (whole.weights, whole.gradients, whole.optimizer) == (2 * weights, 4 * weights, 12 * weights)
    half = model_memory(LLAMA_2_7B, parallel=ParallelConfig(tensor=2), training=training)
    assert half.weights == pytest.approx(weights, rel=1e-6)
    frozen = model_memory(LLAMA_2_7B, parallel=ParallelConfig(), training=training, trainable=False)
    assert (frozen.gradients, frozen.optimizer) == (0, 0)
    assert frozen.activations < whole.activations


@pytest.mark.parametrize(
    ("modules", "values"),
    [
        (("activation",), 8 * 4096 + 2 * 11008),
        (("mlp",), 8 * 4096),
        (("norm",), 6 * 4096 + 3 * 11008),
        (("attention",), 7 * 4096 + 3 * 11008),
        (("mlp", "norm", "attention"), 5 * 4096),
    ],
)
def test_activations_by_module(modules: Any, values: int) -> None:
    """A layer keeps the input and output of both norms, queries, keys, values and what attention gives, each 4,096
    wide, and gate, up and their product, each 11,008."""
    training = TrainingConfig(
        dtype="bfloat16", micro_batch_tokens=100, recompute="selective", recompute_modules=modules
    )
    memory = model_memory(LLAMA_2_7B, parallel=ParallelConfig(), training=training)
    assert memory.activations == 2 * 100 * 32 * values


def test_head_is_counted_as_it_works() -> None:
    """The constants are repeated, because the modules that own them bring torch."""
    pytest.importorskip("torch")
    from align_algos import fused
    from align_core import memory
    from align_core.megatron import passes

    assert (memory._LOGITS_KEPT, memory._LOGITS_SHARE) == (passes._KEPT_LOGITS, fused.KEPT_SHARE)
    assert memory._LOGITS_BLOCK == fused.BLOCK_BYTES


def test_head_of_a_large_vocabulary_is_not_kept_whole() -> None:
    """32,768 tokens over 151,936 rows in bfloat16 are 9.27 GiB: two fifths stay, a block of 512 MiB comes and goes,
    and the gradient of the matrix with its 3,584 columns is 1.01 GiB."""
    shape = dataclasses.replace(LLAMA_2_7B, vocab=151_936, hidden=3584)
    training = TrainingConfig(dtype="bfloat16", micro_batch_tokens=32_768)
    memory = model_memory(shape, parallel=ParallelConfig(), training=training)
    logits = 2 * 32_768 * 151_936
    assert memory.logits == int(0.4 * logits) + 2**29 + 2 * 151_936 * 3584
    frozen = model_memory(shape, parallel=ParallelConfig(), training=training, trainable=False)
    assert frozen.logits == 2**29


def test_models_that_take_turns_share_what_they_work_with() -> None:
    """Policy, reference, reward model and value model of a PPO run on one GPU."""
    training, one = TrainingConfig(dtype="bfloat16"), ParallelConfig()
    policy = model_memory(LLAMA_2_7B, parallel=one, training=training)
    reference = model_memory(LLAMA_2_7B, parallel=one, training=training, trainable=False)
    reward = model_memory(LLAMA_2_7B, parallel=one, training=training, trainable=False, head="score")
    value = model_memory(LLAMA_2_7B, parallel=one, training=training, head="score")
    weights, scored = LLAMA_2_7B.parameters(), LLAMA_2_7B.parameters(head="score")
    standing = 18 * weights + 2 * weights + 2 * scored + 18 * scored
    assert models_memory([policy, reference, reward, value]) == standing + policy.activations + policy.logits
    assert models_memory([]) == 0


def test_engine_by_hand() -> None:
    """The 7B shape in bfloat16 on two devices: half of 6,738,415,616 weights, and keys and values of 2,048 tokens:
    2 x 32 layers x 16 heads x 128 x 2,048 x 2 bytes = 512 MiB. Heads that are fewer than devices are repeated."""
    engine = EngineConfig(dtype="bfloat16", tensor=2, context=2048)
    memory = engine_memory(LLAMA_2_7B, engine)
    assert (memory.weights, memory.sequence) == (6_738_415_616, 512 * 2**20)
    assert memory.least == memory.weights + memory.sequence
    one_head = dataclasses.replace(LLAMA_2_7B, kv_heads=1)
    assert engine_memory(one_head, engine).sequence == 32 * 2**20
    assert memory.taken(engine, gpu_bytes=1000) == 400
    fixed = dataclasses.replace(engine, kv_cache_mib=1024)
    assert memory.taken(fixed, gpu_bytes=1000) == memory.weights + 2**30


def test_experts_are_spread_and_the_rest_is_not() -> None:
    """Mixtral 8x7B: 46.7 G parameters, of which 45.1 G are experts; over four ranks each holds 1.6 G and a quarter."""
    shape = dataclasses.replace(LLAMA_2_7B, kv_heads=8, ffn=14336, max_positions=32768, experts=8, experts_per_token=2)
    experts = 32 * 8 * 3 * 4096 * 14336
    rest = shape.parameters() - experts
    assert shape.parameters() == 46_702_792_704
    training = TrainingConfig(dtype="bfloat16")
    spread = model_memory(shape, parallel=ParallelConfig(data=4, expert=4), training=training)
    assert spread.weights == 2 * (rest + experts // 4)
    assert spread.gradients == 2 * spread.weights
    copied = model_memory(shape, parallel=ParallelConfig(data=4), training=training)
    assert spread.optimizer == copied.optimizer == 12 * shape.parameters() // 4
