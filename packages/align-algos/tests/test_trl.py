"""The same numbers as TRL, from TRL's own code on shared random inputs: value and gradient of each loss.

TRL's losses are methods of its trainers, so they are called here with a stand-in for the trainer (its settings) and for
the model (the log-probs it would give). TRL is needed by these tests only. Where ours differs on purpose, the test
says how the two are brought together.

Not compared, as TRL 1.16 has no such code to call: PPO's value loss, GAE and whitening (no PPO trainer any more),
REINFORCE++, the KL over a vocabulary, overlong and n-gram penalties. The importance ratios of the engine are computed
in the middle of its generation; here only their way into the loss is compared. TRL's other forms (exo_pair, nca_pair,
bco_pair, sppo_hard, aot, apo, discopop, sapo, vespo, luspo) are not in this package.
"""

import importlib
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from align_algos import (
    cispo_loss,
    dapo_loss,
    dpo_loss,
    dr_grpo_loss,
    entropy_loss,
    flatten,
    group_normalised,
    grpo_loss,
    gspo_loss,
    hinge_loss,
    ipo_loss,
    kto_kl,
    kto_loss,
    leave_one_out,
    negative_sequence_mask,
    online_dpo_loss,
    orpo_loss,
    padded_offsets,
    per_token,
    ppo_policy_loss,
    reward_loss,
    rloo_loss,
    robust_dpo_loss,
    sft_loss,
    sft_mixing_loss,
    simpo_loss,
    token_logprobs,
    truncated_importance,
    unflatten,
)

pytest.importorskip("trl", reason="needs TRL, the implementation to compare with")

SEQUENCES, LENGTH = 6, 7  # three pairs, or two groups of three
DOUBLE = torch.float64


def trl(module: str) -> ModuleType:
    """A module of TRL; what it and its own dependencies warn of while they are imported is not ours to fix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"trl.{module}")


class Data:
    """Padded as TRL wants it: log-probs [B, L] of policy, reference and old policy, 0 outside the completion mask."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        lengths = torch.tensor([5, 2, 7, 3, 1, 6])
        self.mask = torch.arange(LENGTH) < lengths[:, None]

        def logprobs() -> Tensor:
            return -torch.rand(SEQUENCES, LENGTH, generator=random, dtype=DOUBLE) * 2 * self.mask

        self.policy, self.reference, self.old = logprobs().requires_grad_(), logprobs(), logprobs()
        self.old = (self.policy.detach() + 0.2 * (self.old - self.reference)) * self.mask
        self.rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, 2.0, -1.0], dtype=DOUBLE)
        self.groups = torch.tensor([0, 0, 0, 1, 1, 1])

    def flat(self, *columns: Tensor, order: list[int] | None = None) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Columns, mask and offsets as this package wants them, sequences in this order."""
        rows = list(range(SEQUENCES)) if order is None else order
        present = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)  # the padding as tokens outside the loss mask
        *flat, mask = flatten(present, *(column[rows] for column in columns), self.mask[rows])
        return tuple(flat), mask, padded_offsets(present)

    def pairs(self, *columns: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """TRL holds all chosen, then all rejected; ours alternate."""
        return self.flat(*columns, order=[0, 3, 1, 4, 2, 5])

    def compare(self, ours: Tensor, theirs: Tensor) -> None:
        """Value, and gradient by the padded log-probs of the policy."""
        assert_close(ours, theirs)
        (found,), (truth,) = (torch.autograd.grad(loss, self.policy) for loss in (ours, theirs))
        assert_close(found * self.mask, truth * self.mask)
        assert found.any()


def trainer(**settings: Any) -> MagicMock:
    """Has these settings; hands gathered values back as they are and swallows metrics."""
    stand_in = MagicMock(aux_loss_enabled=False, **settings)
    stand_in.accelerator.gather_for_metrics = stand_in.accelerator.gather = lambda x: x
    stand_in.accelerator.reduce = lambda x, reduction: x
    stand_in.accelerator.device = torch.device("cpu")
    stand_in.accelerator.num_processes = 1
    stand_in.model.training = True
    return stand_in


def model_output(logprobs: Tensor) -> SimpleNamespace:
    """TRL's model predicts from the second position on and gives more than the loss needs."""
    zeros = torch.zeros_like(logprobs)
    return SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def shifted(mask: Tensor) -> Tensor:
    """A prompt of one token before every completion, as its trainers expect."""
    return torch.cat([torch.zeros(len(mask), 1), mask], dim=1).long()


def dpo_of_trl(data: Data, loss_type: str, **settings: Any) -> Tensor:
    module = trl("trainer.dpo_trainer")
    defaults = {"ld_alpha": None, "precompute_ref_logps": True, "f_divergence_type": "reverse_kl"}
    defaults |= {"use_weighting": False, "loss_types": [loss_type], "loss_weights": [1.0], "label_smoothing": 0.0}
    chosen, rejected = data.reference.sum(1).chunk(2)
    ids = torch.zeros(SEQUENCES, LENGTH + 1, dtype=torch.int64)
    inputs = {"completion_mask": shifted(data.mask), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    stand_in = trainer(**(defaults | settings), _tp_size=1, _total_train_tokens=0)
    return module.DPOTrainer._compute_loss(stand_in, lambda **_: model_output(data.policy), inputs, False)


@pytest.mark.parametrize(
    ("loss_type", "function", "ours", "theirs"),
    [
        ("sigmoid", dpo_loss, {}, {}),
        ("sigmoid_norm", dpo_loss, {"length_normalised": True}, {}),
        ("robust", robust_dpo_loss, {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
        ("ipo", ipo_loss, {}, {}),
        ("hinge", hinge_loss, {}, {}),
    ],
)
def test_dpo_family(loss_type: str, function: Any, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    data = Data()
    columns, mask, offsets = data.pairs(data.policy, data.reference)
    found = function(*columns, mask, offsets, beta=0.3, num_pairs=3, **ours).loss
    data.compare(found, dpo_of_trl(data, loss_type, beta=0.3, **theirs))


def test_dpo_with_label_smoothing() -> None:
    """TRL smooths labels in its CPO trainer, which has no reference: ours gets the reference's log-ratio by hand."""
    module, data = trl("experimental.cpo.cpo_trainer"), Data()
    stand_in = trainer(alpha=0.0, loss_type="sigmoid", beta=0.3, label_smoothing=0.1)
    losses, *_ = module.CPOTrainer.cpo_loss(stand_in, *(data.policy - data.reference).sum(1).chunk(2))
    columns, mask, offsets = data.pairs(data.policy, data.reference)
    data.compare(dpo_loss(*columns, mask, offsets, beta=0.3, num_pairs=3, label_smoothing=0.1).loss, losses.mean())


def test_dpo_with_sft_mixing() -> None:
    """The supervised term of TRL is a mean over the chosen tokens of the micro-batch, here those of the batch."""
    data = Data()
    theirs = dpo_of_trl(data, "sigmoid", beta=0.3, loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.5])
    columns, mask, offsets = data.pairs(data.policy, data.reference)
    chosen = mask & (per_token(torch.tensor([1.0, 0.0] * 3), offsets) > 0)
    mixed = sft_mixing_loss(columns[0], chosen, num_tokens=int(chosen.sum()), coef=0.5).loss
    data.compare(dpo_loss(*columns, mask, offsets, beta=0.3, num_pairs=3).loss + mixed, theirs)


def test_online_dpo() -> None:
    """Two completions of each prompt. TRL takes the first of two equal rewards as better, ours makes no pair."""
    module, data = trl("experimental.online_dpo.online_dpo_trainer"), Data()
    arguments = SimpleNamespace(use_vllm=False, missing_eos_penalty=None, loss_type="sigmoid", optim="adamw", n_gpu=1)
    arguments.torch_empty_cache_steps, arguments.gradient_accumulation_steps = None, 1
    stand_in = trainer(beta=0.3, ref_model="reference", eos_token_ids=[1], args=arguments)
    ids = torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64)
    stand_in._generate = lambda *_: (ids[:, :1], ids[:, :1] + 1, ids, data.mask.long(), None)
    stand_in._forward = lambda model, *_: data.reference if model == "reference" else data.policy
    stand_in._calculate_rewards_from_functions = lambda **_: data.rewards
    losses: list[Tensor] = []
    stand_in.accelerator.backward = losses.append
    module.OnlineDPOTrainer.training_step(stand_in, MagicMock(), {"prompt": ["a", "b", "c"]})
    columns, mask, offsets = data.flat(data.policy, data.reference)
    rewards = {"rewards_B": data.rewards, "group_B": torch.tensor([0, 1, 2, 0, 1, 2])}  # TRL: all first, all second
    data.compare(online_dpo_loss(*columns, mask, offsets, **rewards, beta=0.3, num_pairs=3).loss, losses[0])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_simpo(label_smoothing: float) -> None:
    """TRL takes means of the log-probs before this method, and the margin in units of reward as ours."""
    module, data = trl("experimental.cpo.cpo_trainer"), Data()
    stand_in = trainer(alpha=0.0, loss_type="simpo", simpo_gamma=0.5, beta=2.0, label_smoothing=label_smoothing)
    means = data.policy.sum(1) / data.mask.sum(1)
    losses, *_ = module.CPOTrainer.cpo_loss(stand_in, *means.chunk(2))
    columns, mask, offsets = data.pairs(data.policy)
    numbers = {"beta": 2.0, "margin": 0.5, "num_pairs": 3, "label_smoothing": label_smoothing}
    data.compare(simpo_loss(*columns, mask, offsets, **numbers).loss, losses.mean())


def test_orpo() -> None:
    """TRL computes the odds-ratio term in float32, hence the tolerance. Its supervised term is a mean over tokens of
    the micro-batch, ours (the paper's) over those of each response: here TRL's preference term and the latter."""
    module, data = trl("experimental.orpo.orpo_trainer"), Data()
    means = data.policy.sum(1) / data.mask.sum(1)
    losses, *_ = module.ORPOTrainer.odds_ratio_loss(trainer(beta=0.3), *means.chunk(2))
    columns, mask, offsets = data.pairs(data.policy)
    ours = orpo_loss(*columns, mask, offsets, beta=0.3, num_pairs=3)
    theirs = means[:3].mean().neg() - losses.mean()
    assert_close(ours.loss, theirs, rtol=1e-6, atol=1e-6)
    (found,), (truth,) = (torch.autograd.grad(loss, data.policy) for loss in (ours.loss, theirs))
    assert_close(found * data.mask, truth * data.mask, rtol=1e-6, atol=1e-6)


def test_kto() -> None:
    """TRL estimates the baseline per micro-batch and rank; here there is one of each, so it is ours."""
    module, data = trl("trainer.kto_trainer"), Data()
    desirable = torch.tensor([True, False, True, True, False, False])
    mismatched = data.old + 1.0 * data.mask
    stand_in = trainer(calculate_KL=True, precompute_ref_logps=True, loss_type="kto", beta=0.3, _tp_size=1)
    stand_in.desirable_weight, stand_in.undesirable_weight, stand_in._total_train_tokens = 1.5, 0.7, 0
    stand_in._compute_kl_logps = lambda model, batch: mismatched.sum(1)
    ids = torch.zeros(SEQUENCES, LENGTH + 1, dtype=torch.int64)
    inputs = {"completion_mask": shifted(data.mask), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= {"label": desirable, "ref_logps": data.reference.sum(1), "ref_KL_logps": data.reference.sum(1)}
    theirs = module.KTOTrainer._compute_loss(stand_in, lambda **_: model_output(data.policy), inputs, False)
    columns, mask, offsets = data.flat(data.policy, data.reference, mismatched)
    kl = float(kto_kl(columns[2], columns[1], mask, offsets, num_sequences=SEQUENCES))
    assert kl > 0
    numbers = {"beta": 0.3, "kl": kl, "num_sequences": SEQUENCES, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    data.compare(kto_loss(*columns[:2], mask, offsets, desirable_B=desirable, **numbers).loss, theirs)


def grpo_of_trl(data: Data, advantages: Tensor, loss_type: str, **settings: Any) -> Tensor:
    """One micro-batch, one process, no accumulation: its normalisers are ours."""
    module = trl("trainer.grpo_trainer")
    arguments = SimpleNamespace(delta=settings.pop("delta", None), use_bias_correction_kl=False, steps_per_generation=1)
    defaults = {"top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "importance_sampling_level": "token"}
    defaults |= {"beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.3, "use_vllm": False, "max_completion_length": 9}
    defaults |= {"_entropy_bonus_enabled": False, "current_gradient_accumulation_steps": 1, "loss_type": loss_type}
    entropies = settings.pop("entropies", torch.zeros_like(data.policy))
    stand_in = trainer(args=arguments, **(defaults | settings))
    stand_in._get_per_token_logps_and_entropies = lambda *_, **__: (data.policy, entropies, None)
    stand_in.get_off_policy_mask = module.GRPOTrainer.get_off_policy_mask
    ids = torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64)
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids}
    inputs["importance_sampling_ratio"] = settings.get("importance_sampling_ratio")
    inputs |= {"completion_mask": data.mask.long(), "advantages": advantages, "old_per_token_logps": data.old}
    inputs |= {"ref_per_token_logps": data.reference, "num_items_in_batch": data.mask.sum()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of means over no clipped sequences, in its metrics
        return module.GRPOTrainer._compute_loss(stand_in, None, inputs)


TOKENS = {"num_tokens": 24}
SEQUENCE = {"num_tokens": 24, "num_sequences": SEQUENCES}
CLIP = {"clip_low": 0.2, "clip_high": 0.3}


@pytest.mark.parametrize(
    ("loss_type", "function", "ours", "theirs"),
    [
        ("dapo", dapo_loss, TOKENS | CLIP, {}),
        ("bnpo", grpo_loss, TOKENS | CLIP | {"kl_coef": 0.1}, {"beta": 0.1}),
        ("grpo", grpo_loss, SEQUENCE | CLIP | {"kl_coef": 0.1, "reduction": "sequence_mean"}, {"beta": 0.1}),
        ("dr_grpo", dr_grpo_loss, SEQUENCE | CLIP | {"kl_coef": 0.1, "length": 9}, {"beta": 0.1}),
        # TRL names the cap itself, ours how far it is above 1.
        ("cispo", cispo_loss, TOKENS | {"clip_high": 0.1}, {"epsilon_high": 1.1}),
        (
            "grpo",
            gspo_loss,
            SEQUENCE | {"clip_low": 0.02, "clip_high": 0.03},
            {"importance_sampling_level": "sequence", "epsilon_low": 0.02, "epsilon_high": 0.03},
        ),
    ],
)
def test_grpo_variants(loss_type: str, function: Any, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    data = Data()
    advantages = group_normalised(data.rewards, data.groups)
    columns, mask, offsets = data.flat(data.policy, data.old)
    extra = {"reference_logprobs_N": data.flat(data.reference)[0][0]} if "kl_coef" in ours else {}
    tensors = (*columns, per_token(advantages, offsets), mask)
    if function in (dr_grpo_loss, gspo_loss):
        output = function(*tensors, offsets, **ours, **extra)
    else:
        sequences = {"offsets": offsets} if "reduction" in ours else {}
        output = function(*tensors, **ours, **extra, **sequences)
    assert output.metrics["clip_fraction"] > 0
    data.compare(output.loss, grpo_of_trl(data, advantages, loss_type, **theirs))


def test_dual_clip() -> None:
    """TRL's two-sided clipping holds the ratio at `delta` whatever the advantage; for a positive one the clip does."""
    data = Data()
    with torch.no_grad():
        data.old -= 1.5 * data.mask  # ratios around e^1.5 = 4.5
    advantages = group_normalised(data.rewards, data.groups)
    columns, mask, offsets = data.flat(data.policy, data.old)
    tensors = (*columns, per_token(advantages, offsets), mask)
    ours = ppo_policy_loss(*tensors, **TOKENS, **CLIP, dual_clip=4.0).loss
    assert ours < ppo_policy_loss(*tensors, **TOKENS, **CLIP).loss
    data.compare(ours, grpo_of_trl(data, advantages, "dapo", delta=4.0))


def test_entropy_bonus() -> None:
    """A mean over tokens whatever the policy loss is divided by, as ours. The entropies here are any differentiable."""
    data = Data()
    advantages = group_normalised(data.rewards, data.groups)
    settings = {"_entropy_bonus_enabled": True, "use_adaptive_entropy": False, "entropy_coef": 0.2}
    theirs = grpo_of_trl(data, advantages, "grpo", entropies=data.policy.square(), **settings)
    columns, mask, offsets = data.flat(data.policy, data.old, data.policy.square())
    tensors = (*columns[:2], per_token(advantages, offsets), mask)
    ours = grpo_loss(*tensors, **SEQUENCE, **CLIP, reduction="sequence_mean", offsets=offsets).loss
    data.compare(ours + entropy_loss(columns[2], mask, **TOKENS, coef=0.2).loss, theirs)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_correction_weights(level: str) -> None:
    """Weights of engine against trainer multiply each token's loss, and never the KL term."""
    data = Data()
    advantages = group_normalised(data.rewards, data.groups)
    columns, mask, offsets = data.flat(data.policy, data.old, data.reference)
    engine = data.flat(data.old + 0.3 * (data.reference - data.old))[0][0]
    weights = truncated_importance(columns[1], engine, mask, offsets, **TOKENS, level=level, cap=1.05).weights_N
    assert (weights[mask] < 1.0).any() and (weights == 1.05).any()
    kl = {"kl_coef": 0.1, "reference_logprobs_N": columns[2], "weights_N": weights}
    ours = grpo_loss(*columns[:2], per_token(advantages, offsets), mask, **TOKENS, **CLIP, **kl).loss
    ratios = unflatten(weights, torch.ones_like(data.mask))
    settings = {"use_vllm": True, "vllm_importance_sampling_correction": True, "importance_sampling_ratio": ratios}
    data.compare(ours, grpo_of_trl(data, advantages, "bnpo", beta=0.1, **settings))


def test_group_advantages() -> None:
    """TRL divides by the sample standard deviation plus 1e-4, ours by the population's plus 1e-5 (the tutorial's)."""
    data = Data()
    grouped = data.rewards.view(2, 3)
    centred = grouped - grouped.mean(1, keepdim=True)
    theirs = (centred / (grouped.std(1, keepdim=True) + 1e-4)).view(-1)
    ours = group_normalised(data.rewards, data.groups, eps=1e-4 * (2 / 3) ** 0.5)
    assert_close(ours * (2 / 3) ** 0.5, theirs)


def test_off_policy_sequence_mask() -> None:
    """TRL masks by log pi - log engine of the policy in training, as ours when given its log-probs."""
    data = Data()
    advantages = group_normalised(data.rewards, data.groups)
    theirs = trl("trainer.grpo_trainer").GRPOTrainer.get_off_policy_mask(
        advantages=advantages[:, None],
        per_token_logps=data.policy.detach(),
        sampling_per_token_logps=data.reference,
        mask=data.mask,
        off_policy_threshold=0.1,
    )
    columns, mask, offsets = data.flat(data.policy.detach(), data.reference)
    numbers = {"num_tokens": 24, "threshold": 0.1}
    weights = negative_sequence_mask(*columns, per_token(advantages, offsets), mask, offsets, **numbers).weights_N
    padded = unflatten(weights, torch.ones_like(data.mask))
    assert_close(padded, theirs.to(DOUBLE) * data.mask)
    assert 0 < theirs.sum() < SEQUENCES


def test_rloo() -> None:
    module, data = trl("trainer.rloo_trainer"), Data()
    advantages = leave_one_out(data.rewards, data.groups)
    stand_in = trainer(epsilon_low=0.2, epsilon_high=0.3)
    stand_in._get_per_token_logps_and_entropies = lambda *_, **__: (data.policy, torch.zeros_like(data.policy), None)
    ids = torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64)
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids}
    inputs |= {"completion_mask": data.mask.long(), "advantages": advantages, "old_logps": data.old.sum(1)}
    theirs = module.RLOOTrainer._compute_loss(stand_in, None, inputs)
    columns, mask, offsets = data.flat(data.policy, data.old)
    output = rloo_loss(*columns, per_token(advantages, offsets), mask, offsets, **SEQUENCE, **CLIP)
    data.compare(output.loss, theirs)


@pytest.mark.parametrize("centre", [None, 0.01])
def test_reward(centre: float | None) -> None:
    """A margin of TRL's column is half a point of score per point of label difference here."""
    module = trl("trainer.reward_trainer")
    scores = torch.randn(SEQUENCES, generator=torch.Generator().manual_seed(1), dtype=DOUBLE).requires_grad_()
    labels = torch.tensor([3.0, 2.0, 5.0, 1.0, 1.5, 0.0])
    stand_in = trainer(args=SimpleNamespace(center_rewards_coefficient=centre), _tp_size=1, _total_train_tokens=0)
    inputs = {"attention_mask": torch.ones(6, 2), "margin": 0.5 * (labels[:3] - labels[3:]).to(DOUBLE)}
    theirs = module.RewardTrainer.compute_loss(stand_in, lambda **_: SimpleNamespace(logits=scores[:, None]), inputs)
    groups = torch.tensor([0, 1, 2, 0, 1, 2])
    ours = reward_loss(scores, labels, groups, num_pairs=3, margin_scale=0.5, centre_coef=centre or 0.0).loss
    assert_close(ours, theirs)
    assert_close(*(torch.autograd.grad(loss, scores)[0] for loss in (ours, theirs)))


def test_sft() -> None:
    """TRL's trainer leaves the loss to the model: transformers' cross-entropy over the global number of targets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss_utils = importlib.import_module("transformers.loss.loss_utils")
    random = torch.Generator().manual_seed(2)
    logits = torch.randn(2, LENGTH, 11, generator=random).requires_grad_()
    tokens = torch.randint(0, 11, (2, LENGTH), generator=random)
    mask = torch.rand(2, LENGTH, generator=random) < 0.6
    theirs = loss_utils.ForCausalLMLoss(logits, tokens.masked_fill(~mask, -100), 11, num_items_in_batch=20)
    # Row i predicts token i + 1; the first token of a sequence has no prediction.
    logprobs = token_logprobs(logits[:, :-1].reshape(-1, 11), tokens[:, 1:].reshape(-1))
    ours = sft_loss(logprobs, mask[:, 1:].reshape(-1), num_tokens=20).loss
    assert_close(ours, theirs)
    assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))
