"""Per-token estimates of KL(policy || reference) from sampled tokens, and the controllers of its coefficient.

Source: J. Schulman, "Approximating KL Divergence", 2020, http://joschu.net/blog/kl-approx.html (k1, k2, k3);
Ziegler et al. 2019, arXiv:1909.08593, section 2.2 (adaptive coefficient).

Legend: N flat tokens.
"""

from collections.abc import Mapping
from typing import Literal, Protocol

from torch import Tensor

from align_algos.checks import check_choice, check_columns, check_number, check_positive
from align_algos.errors import InputError
from align_algos.ratios import exp_excess
from align_algos.reductions import working_precision

# Ziegler et al. limit the relative error to 0.2, so that one odd batch cannot throw the coefficient far.
MAX_RELATIVE_ERROR = 0.2


Estimator = Literal["k1", "k2", "k3"]
ESTIMATORS: tuple[Estimator, ...] = ("k1", "k2", "k3")
LossEstimator = Literal["k2", "k3"]
# Those whose gradient points somewhere: the mean of k1's over samples of the policy is 0.
LOSS_ESTIMATORS: tuple[LossEstimator, ...] = ("k2", "k3")


def kl_estimate(logprobs_N: Tensor, reference_logprobs_N: Tensor, *, estimator: Estimator) -> Tensor:
    """The estimate of that name, per token.

    Args:
        logprobs_N: floating [N], log pi(token) under the policy that sampled it, nats.
        reference_logprobs_N: floating [N], log ref(token) under the reference.
        estimator: "k1", "k2" or "k3".
    Returns: [N], nats, float32 (float64 for float64 log-probs), with gradient to both.
    Raises:
        InputError: a value that is not finite, a wrong shape, or an unknown name.
    Source: J. Schulman, "Approximating KL Divergence", 2020, http://joschu.net/blog/kl-approx.html.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    check_columns("token", logprobs_N.numel(), logprobs_N=logprobs_N, reference_logprobs_N=reference_logprobs_N)
    return estimate_of(working_precision(logprobs_N) - working_precision(reference_logprobs_N), estimator)


def estimate_of(log_ratio_N: Tensor, estimator: Estimator) -> Tensor:
    """The estimate from log pi - log ref, for losses, which have checked them."""
    if estimator == "k3":
        return exp_excess(-log_ratio_N)
    return log_ratio_N if estimator == "k1" else log_ratio_N.square() / 2


def k1(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """log pi - log ref: unbiased, may be negative, high variance.

    Args, Returns and Raises: as in `kl_estimate`.
    """
    return kl_estimate(logprobs_N, reference_logprobs_N, estimator="k1")


def k2(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2: never negative, biased, low variance.

    Args, Returns and Raises: as in `kl_estimate`.
    """
    return kl_estimate(logprobs_N, reference_logprobs_N, estimator="k2")


def k3(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """rho - 1 - log rho with rho = ref / pi: unbiased and never negative. rho is capped as in `ratios`.

    Args, Returns and Raises: as in `kl_estimate`.
    """
    return kl_estimate(logprobs_N, reference_logprobs_N, estimator="k3")


class KlController(Protocol):
    """Holds the KL coefficient of a run; its state belongs in the run's checkpoint."""

    @property
    def coef(self) -> float: ...

    def update(self, *, kl: float, num_samples: int) -> None: ...

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: Mapping[str, float]) -> None: ...


class FixedKl:
    """A coefficient that never moves."""

    def __init__(self, *, coef: float) -> None:
        check_number("coef", coef, low=0.0)
        self._coef = coef

    @property
    def coef(self) -> float:
        """The coefficient, per nat."""
        return self._coef

    def update(self, *, kl: float, num_samples: int) -> None:
        """Accepts an observation, checks it and stays where it is."""
        _check_observation(kl, num_samples)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"coef": self._coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore from `state_dict`."""
        self._coef = _stored_coef(state)


class AdaptiveKl:
    """Steers the KL to the reference towards a target.

    coef <- coef * (1 + clip(kl / target - 1, -0.2, 0.2) * num_samples / horizon)

    Args:
        initial_coef: first coefficient, per nat.
        target: nats per sample, of the KL to the *reference* (not to the previous policy).
        horizon: samples over which the coefficient moves by up to 20 %.
    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    def __init__(self, *, initial_coef: float, target: float, horizon: int) -> None:
        check_number("initial_coef", initial_coef, low=0.0)
        check_positive("target", target, hint=" of nats")
        check_number("horizon", horizon, low=1)
        self._coef = initial_coef
        self._target = target
        self._horizon = horizon

    @property
    def coef(self) -> float:
        """The coefficient, per nat."""
        return self._coef

    def update(self, *, kl: float, num_samples: int) -> None:
        """Move the coefficient after a batch of `num_samples` completions with mean KL `kl` (nats per sample)."""
        _check_observation(kl, num_samples)
        if num_samples > self._horizon:
            raise InputError(f"num_samples {num_samples} exceeds the horizon {self._horizon}; use a longer horizon")
        error = max(-MAX_RELATIVE_ERROR, min(MAX_RELATIVE_ERROR, kl / self._target - 1.0))
        self._coef *= 1.0 + error * num_samples / self._horizon

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps; target and horizon come from the configuration."""
        return {"coef": self._coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore from `state_dict`."""
        self._coef = _stored_coef(state)


_conforms: tuple[type[KlController], ...] = (FixedKl, AdaptiveKl)


def _check_observation(kl: float, num_samples: int) -> None:
    check_number("kl", kl)
    check_number("num_samples", num_samples, low=0)


def _stored_coef(state: Mapping[str, float]) -> float:
    if set(state) != {"coef"}:
        raise InputError(f"the state of a KL controller has the keys {sorted(state)}; expected ['coef']")
    check_number("coef", state["coef"], low=0.0)
    return float(state["coef"])
