"""Mixtures of experts: log-probs, training curve, checkpoints and exports, wherever the experts are.

Each layout starts once; what it found is looked at from several sides. AdamW's eps is 1e-5: at 1e-8 a gradient of
rounding noise moves a weight by a full step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron_llama import hugging_face_weights, ragged_batch, reference_logprobs, without_rates
from megatron_world import run_ranks
from numpy.typing import NDArray

from align_convert import load_any
from align_convert.cli import main as convert
from align_core.config import LoraConfig, OptimizerConfig, ParallelConfig, SftLoss, TrainerConfig, TrainingConfig
from align_core.errors import ConfigError, LayoutError
from align_core.megatron import MegatronTrainer, RankContext
from align_core.megatron.export import export_hf
from align_core.megatron.weights import total_bytes, weight_metas
from align_core.types import checksum

STEPS = 20
SAVED = 17  # steps before the checkpoint
EXPERTS = 4
LAYERS = 2
FAMILIES: dict[str, dict[str, object]] = {
    "mixtral": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "sliding_window": None,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 16,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
}
LAYOUTS = {
    "one": ParallelConfig(),
    "ep2": ParallelConfig(data=2, expert=2),
    "tp2": ParallelConfig(tensor=2, sequence=True),
    "pp2": ParallelConfig(pipeline=2),
    "ep2-tp2": ParallelConfig(data=2, expert=2, tensor=2, sequence=True),
}
PLACES = [(family, layout) for family in FAMILIES for layout in LAYOUTS]


@dataclass
class Trained:
    """What a run said and where it wrote."""

    first: NDArray[np.float32]
    steps: list[dict[str, float]]
    last: NDArray[np.float32]
    checksums: dict[str, int]
    folder: Path


@dataclass
class Reference:
    """The same by Hugging Face and torch's AdamW; routing and balance are those of the first step."""

    first: NDArray[np.float32]
    losses: list[float]
    norms: list[float]
    last: NDArray[np.float32]
    load: float
    balance: float


Run = Callable[[str, str], Trained]


@pytest.fixture(scope="module")
def trained(llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trains a family on a layout, once."""
    done: dict[tuple[str, str], Trained] = {}

    def run(family: str, layout: str) -> Trained:
        if (family, layout) not in done:
            folder = tmp_path_factory.mktemp(f"{family}-{layout}")
            directory = llama(**FAMILIES[family])
            weights = folder / "weights"
            with weights.open("wb") as file:
                file.truncate(total_bytes(weight_metas(load_any(directory).config, "float32")))
            found = run_ranks(_train, LAYOUTS[layout], directory, folder)
            sums: dict[str, int] = {}
            for *_, own in found:
                for name, value in own.items():
                    sums[name] = (sums.get(name, 0) + value) % 2**64
            first, steps, last, _ = found[0]
            assert all(without_rates(a) == without_rates(b) for a, b in zip(steps, found[-1][1], strict=True))
            done[family, layout] = Trained(first, steps, last, sums, folder)
        return done[family, layout]

    return run


@pytest.fixture(scope="module")
def reference(llama: Callable[..., Path]) -> Callable[[str], Reference]:
    """Hugging Face's run of a family, once."""
    done: dict[str, Reference] = {}

    def run(family: str) -> Reference:
        if family not in done:
            done[family] = _reference(llama(**FAMILIES[family]))
        return done[family]

    return run


@pytest.mark.parametrize(("family", "layout"), PLACES)
def test_experts_train_as_hugging_face(
    trained: Run, reference: Callable[[str], Reference], family: str, layout: str
) -> None:
    found, expected = trained(family, layout), reference(family)
    np.testing.assert_allclose(found.first, expected.first, atol=1e-5, rtol=0)
    np.testing.assert_allclose([step["loss"] for step in found.steps], expected.losses, atol=1e-4, rtol=0)
    np.testing.assert_allclose([step["grad_norm"] for step in found.steps], expected.norms, rtol=1e-4)
    np.testing.assert_allclose(found.last, expected.last, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("family", "layout"), PLACES)
def test_the_log_tells_how_tokens_spread(
    trained: Run, reference: Callable[[str], Reference], family: str, layout: str
) -> None:
    """Every real token counts once, whoever routes it and however it is packed and padded."""
    step, expected = trained(family, layout).steps[0], reference(family)
    assert step["expert_load"] == pytest.approx(expected.load, rel=1e-6)
    assert step["expert_load_max"] >= step["expert_load"]
    assert 0 <= step["experts_idle"] <= 1
    assert step["balance_loss"] == pytest.approx(expected.balance, rel=1e-5)


@pytest.mark.parametrize(("family", "layout"), [("mixtral", "ep2-tp2"), ("mixtral", "pp2"), ("qwen3_moe", "ep2")])
def test_what_leaves_training_is_what_was_loaded(
    trained: Run, llama: Callable[..., Path], family: str, layout: str
) -> None:
    """Before the first step: the export in Hugging Face's files, and the weights that an engine would get."""
    found = trained(family, layout)
    expected = hugging_face_weights(llama(**FAMILIES[family]))
    export_hf(found.folder / "exported", found.folder / "hf")
    exported = load_any(found.folder / "hf")
    exported.check()
    assert set(exported.tensors()) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(exported.read_hf(name).numpy(), values)
    offset = 0
    buffer = np.fromfile(found.folder / "weights", np.uint8)
    for meta in weight_metas(exported.config, "float32"):
        sent = buffer[offset : offset + meta.nbytes]
        np.testing.assert_array_equal(sent.view(np.float32).reshape(meta.shape), expected[meta.name])
        assert found.checksums[meta.name] == checksum(sent, item_bytes=4)
        offset += meta.nbytes


@pytest.mark.parametrize(
    ("family", "saved", "loaded"),
    [
        ("mixtral", "one", "one"),
        ("mixtral", "ep2", "ep2"),
        ("qwen3_moe", "ep2-tp2", "ep2-tp2"),
        ("mixtral", "ep2-tp2", "pp2"),
        ("qwen3_moe", "tp2", "ep2"),
    ],
)
def test_a_run_continues(trained: Run, llama: Callable[..., Path], family: str, saved: str, loaded: str) -> None:
    """Bit for bit on the same layout, to rounding on another."""
    before = trained(family, saved)
    steps = run_ranks(_continue, LAYOUTS[loaded], llama(**FAMILIES[family]), before.folder / "checkpoint")[0]
    for found, expected in zip(steps, before.steps[SAVED:], strict=True):
        if saved == loaded:
            assert without_rates(found) == without_rates(expected)
        else:
            assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("options", [("--tp", "2", "--ep", "4"), ("--format", "torch_dist")], ids=["torch", "dist"])
def test_megatron_directories_with_experts_are_loaded_as_they_are(
    llama: Callable[..., Path], tmp_path: Path, options: tuple[str, ...]
) -> None:
    directory = llama(**FAMILIES["mixtral"])
    assert convert(["to-megatron", str(directory), str(tmp_path / "megatron"), *options]) == 0
    found, expected = (run_ranks(_logprobs, LAYOUTS["ep2"], model)[0] for model in (tmp_path / "megatron", directory))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        ("one", {}),
        ("tp2", {}),
        ("one", {"recompute": "full"}),
        ("tp2", {"recompute": "selective"}),
        ("one", {"recompute": "selective", "recompute_modules": ("mlp", "norm", "attention")}),
    ],
    ids=["one", "tp2", "one-full", "tp2-selective", "one-all-modules"],
)
def test_the_balance_loss_teaches_as_its_formula(
    llama: Callable[..., Path], layout: str, recompute: dict[str, Any]
) -> None:
    """In one micro-batch, which is the whole batch; its gradient comes once, also where passes are computed again."""
    directory = llama(**FAMILIES["mixtral"])
    steps, last = run_ranks(_balance, LAYOUTS[layout], directory, recompute)[0]
    expected = _reference(directory, balance_coef=0.5, steps=len(steps))
    np.testing.assert_allclose([step["loss"] for step in steps], expected.losses, atol=1e-5, rtol=0)
    np.testing.assert_allclose([step["grad_norm"] for step in steps], expected.norms, rtol=1e-4)
    assert steps[0]["balance_loss"] == pytest.approx(expected.balance, rel=1e-5)
    np.testing.assert_allclose(last, expected.last, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("parallel", "more", "complaint"),
    [
        (ParallelConfig(tensor=2), {}, r"router needs each token on one rank; .*set parallel.sequence to true"),
        (ParallelConfig(data=3, expert=3), {}, r"expert parallel size 3 does not divide 4 experts; use 1, 2 or 4"),
        (ParallelConfig(), {"lora": LoraConfig(rank=2)}, "adapters are for dense models; set lora.rank to 0"),
    ],
    ids=["tensor", "experts", "lora"],
)
def test_what_experts_cannot_have_is_refused(
    llama: Callable[..., Path], parallel: ParallelConfig, more: dict[str, Any], complaint: str
) -> None:
    with pytest.raises((ConfigError, LayoutError), match=complaint):
        MegatronTrainer(TrainerConfig(model=llama(**FAMILIES["mixtral"]), parallel=parallel, **more))


def test_a_dense_model_has_no_experts_to_spread(llama: Callable[..., Path]) -> None:
    with pytest.raises(LayoutError, match="needs a mixture of experts; this model is dense: use 1"):
        MegatronTrainer(TrainerConfig(model=llama(), parallel=ParallelConfig(data=2, expert=2)))


def _config(context: RankContext, directory: Path, **training: Any) -> TrainerConfig:
    return TrainerConfig(
        model=directory,
        parallel=context.parallel,
        steps=STEPS,
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-5, schedule="constant"),
        training=TrainingConfig(**{"micro_batch_tokens": 48, "device": "cpu", **training}),
    )


def _train(
    context: RankContext, directory: Path, folder: Path
) -> tuple[NDArray[np.float32], list[dict[str, float]], NDArray[np.float32], dict[str, int]]:
    trainer = MegatronTrainer(_config(context, directory), context)
    trainer.export(folder / "exported")
    sums = trainer.write_weights(folder / "weights")
    first = trainer.logprobs(ragged_batch())
    steps = _steps(trainer, 0, SAVED)
    trainer.save(folder / "checkpoint", {})
    steps += _steps(trainer, SAVED, STEPS)
    return first, steps, trainer.logprobs(ragged_batch()), sums


def _continue(context: RankContext, directory: Path, checkpoint: Path) -> list[dict[str, float]]:
    trainer = MegatronTrainer(_config(context, directory), context)
    trainer.load(checkpoint)
    return _steps(trainer, SAVED, STEPS)


def _logprobs(context: RankContext, directory: Path) -> NDArray[np.float32]:
    return MegatronTrainer(_config(context, directory), context).logprobs(ragged_batch())


def _balance(
    context: RankContext, directory: Path, recompute: dict[str, Any]
) -> tuple[list[dict[str, float]], NDArray[np.float32]]:
    config = _config(context, directory, micro_batch_tokens=4096, balance_coef=0.5, **recompute)
    trainer = MegatronTrainer(config, context)
    return _steps(trainer, 0, 3), trainer.logprobs(ragged_batch())


def _steps(trainer: MegatronTrainer, first: int, last: int) -> list[dict[str, float]]:
    return [dict(trainer.step(ragged_batch(seed=step), SftLoss())) for step in range(first, last)]


def _reference(directory: Path, *, balance_coef: float = 0.0, steps: int = STEPS) -> Reference:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    routed: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _module, _given, found: routed.append(found[0]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    with torch.no_grad():
        first = reference_logprobs(model, ragged_batch()).numpy()
    losses, norms, routing = [], [], []
    for step in range(steps):
        batch = ragged_batch(seed=step)
        routed.clear()
        optimizer.zero_grad()
        loss = -reference_logprobs(model, batch)[torch.from_numpy(batch.mask)].mean()
        load, balance = _balance_of(routed)
        routing.append((load, balance.item()))
        (loss + balance_coef * balance).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        last = reference_logprobs(model, ragged_batch()).numpy()
    return Reference(first, losses, norms, last, *routing[0])


def _balance_of(routed: list[torch.Tensor]) -> tuple[float, torch.Tensor]:
    """(busiest expert's load in terms of the mean, E sum f P), each averaged over the layers.

    The hooks saw the layers in turn, sequence by sequence.
    """
    loads, terms = [], []
    for layer in range(LAYERS):
        logits_TE = torch.cat([part.reshape(-1, EXPERTS) for part in routed[layer::LAYERS]])
        counts_E = torch.bincount(logits_TE.topk(2).indices.flatten(), minlength=EXPERTS).float()
        loads.append(float(counts_E.max() / counts_E.mean()))
        terms.append(EXPERTS * (counts_E / counts_E.sum() * logits_TE.softmax(-1).mean(0)).sum())
    return float(np.mean(loads)), torch.stack(terms).mean()
