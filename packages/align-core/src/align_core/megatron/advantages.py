"""Advantages of a whole rollout, before it is cut into updates, micro-batches and ranks: numpy in, numpy out.

The formulas are `align_algos`'s. Runs in the driver, on CPU: it sees every token of the rollout, so statistics are
those of all of it. Knows nothing about models and ranks.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from align_algos.advantages import gae, group_normalised, moments, whiten
from align_algos.kl import AdaptiveKl, FixedKl, KlController, k1, k2, k3
from align_core.config import GrpoLoss, KlConfig
from align_core.types import Batch

# Keeps advantages of nearly equal rewards finite; far below any difference between real rewards.
STD_EPS = 1e-6
_WHITEN_EPS = 1e-8  # added to the variance, as in the tutorial
_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def with_group_advantages(loss: GrpoLoss, batch: Batch) -> Batch:
    """`advantages` from the columns `reward` and `group`: each token gets that of its sequence within its group."""
    advantages_B = group_normalised(
        _tensor(batch.sequence_column("reward"), np.float32),
        _tensor(batch.sequence_column("group"), np.int64),
        eps=STD_EPS,
        std=loss.normalise_std,
    )
    return batch.with_columns(tokens={"advantages": np.repeat(advantages_B.numpy(), batch.lengths)})


def kl_of_tokens(batch: Batch, *, estimator: str) -> NDArray[np.float32]:
    """float32 [N], estimate of KL(policy || reference) at each sampled token, nats; 0 elsewhere."""
    estimate = _ESTIMATORS[estimator](
        _tensor(batch.token_column("old_logprobs"), np.float32),
        _tensor(batch.token_column("reference_logprobs"), np.float32),
    )
    return np.where(batch.mask, estimate.numpy(), np.float32(0)).astype(np.float32)


def with_value_advantages(
    batch: Batch, kl_N: NDArray[np.float32], *, kl_coef: float, gamma: float, lam: float, normalise: bool
) -> Batch:
    """`advantages` and `returns` from `reward`, `old_values` and the KL of each token (Ouyang et al. 2022, eq. 2).

    Every sampled token's reward is -kl_coef * KL; the sequence's reward falls on its last sampled token.
    """
    rewards_N = np.where(batch.mask, -np.float32(kl_coef) * kl_N, np.float32(0)).astype(np.float32)
    rewards_N[batch.offsets[1:] - 1] += batch.sequence_column("reward").astype(np.float32)
    mask_N = torch.from_numpy(batch.mask.copy())
    found = gae(
        torch.from_numpy(rewards_N),
        _tensor(batch.token_column("old_values"), np.float32),
        mask_N,
        torch.from_numpy(batch.offsets.copy()),
        gamma=gamma,
        lam=lam,
    )
    advantages_N = found.advantages_N
    if normalise:
        advantages_N = whiten(advantages_N, mask_N, moments(advantages_N, mask_N), eps=_WHITEN_EPS)
    return batch.with_columns(tokens={"advantages": advantages_N.numpy(), "returns": found.returns_N.numpy()})


def make_kl_controller(config: KlConfig) -> KlController:
    """What steers the KL coefficient of a run."""
    if config.adaptive:
        return AdaptiveKl(initial_coef=config.coef, target=config.target, horizon=config.horizon)
    return FixedKl(coef=config.coef)


def _tensor(column: NDArray[np.generic], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.array(column, dtype=dtype))
