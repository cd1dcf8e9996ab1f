"""The loss of every stage: its form, and the numbers in its formula."""

from dataclasses import dataclass
from typing import Literal, get_args

from align_core import registry
from align_core.config.checks import between, positive
from align_core.errors import ConfigError, unknown_name


@dataclass(frozen=True, kw_only=True)
class SftLoss:
    """Cross-entropy on the response tokens, averaged over all of them in the batch."""

    turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns in a chat are learnt; the user's and the system's never are."""


@dataclass(frozen=True, kw_only=True)
class RewardLoss:
    """Bradley-Terry over all ordered pairs of a prompt's responses."""

    margin_scale: float = 0.0
    """Score that a difference of one in the labels should make at least (Llama 2's margin); 0 uses their order only."""
    centre_coef: float = 0.0
    """Pulls the scores of a pair to mean 0, which the likelihood leaves open; 0.01 where scores are to be added up."""

    def __post_init__(self) -> None:
        for name in ("margin_scale", "centre_coef"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DpoLoss:
    """Preference losses: direct preference optimisation (Rafailov et al. 2023) and its kin."""

    form: Literal["sigmoid", "ipo", "hinge", "robust", "simpo", "orpo"] = "sigmoid"
    """`sigmoid` is DPO; `simpo` and `orpo` need no reference. Each is described in align-algos' PAPERS.md."""
    beta: float = 0.1
    """Strength of the pull to the reference; DPO's and the tutorial's value. For SimPO a scale (2), for ORPO lambda."""
    label_smoothing: float = 0.0
    """Assumed share of swapped preferences; with `sigmoid` this is cDPO. `robust` needs it below 0.5."""
    length_normalised: bool | None = None
    """Mean instead of sum over a response's log-ratios. Unset: mean for `ipo` (as in its authors' experiments), sum for
    the others; `simpo` and `orpo` always take the mean."""
    simpo_margin: float = 0.5
    """SimPO's gamma, the reward by which the chosen response should win."""

    def __post_init__(self) -> None:
        positive(self, "beta")
        between(self, "label_smoothing", 0.0, 0.5)
        if self.label_smoothing and self.form not in ("sigmoid", "robust", "simpo"):
            raise ConfigError(f"label_smoothing has no meaning in form {self.form!r}; set it to 0")
        if self.form == "robust" and not 0 < self.label_smoothing < 0.5:
            raise ConfigError("form 'robust' needs label_smoothing above 0 and below 0.5: the share of wrong labels")

    @property
    def takes_mean(self) -> bool:
        """`length_normalised`, made definite."""
        return self.form == "ipo" if self.length_normalised is None else self.length_normalised

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the untrained model."""
        return self.form not in ("simpo", "orpo")


@dataclass(frozen=True, kw_only=True)
class KtoLoss:
    """Learning from single responses marked as wanted or not (Ethayarajh et al. 2024)."""

    beta: float = 0.1
    """Strength of the pull to the reference; the paper's value."""
    desirable_weight: float = 1.0
    """Weight of wanted responses; the paper asks for (weight x number) of both kinds within 1 to 4/3 of each other."""
    undesirable_weight: float = 1.0
    """Weight of unwanted responses."""

    def __post_init__(self) -> None:
        positive(self, "beta", "desirable_weight", "undesirable_weight")


PolicyVariant = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "reinforce_pp_baseline"]
"""Those of this project; a package adds more through the entry-point group `align.losses`."""

# Clip ranges (low, high) of the papers; CISPO's gives no upper bound, 4 caps the weight at 5.
_CLIPS: dict[str, tuple[float, float]] = {
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "cispo": (1.0, 4.0),
}


@dataclass(frozen=True, kw_only=True)
class GrpoLoss:
    """Clipped policy gradient with advantages from rewards alone: GRPO (Shao et al. 2024) and its family."""

    variant: PolicyVariant | str = "grpo"
    """Which advantages, ratio and average: grpo, dr_grpo (no length and difficulty bias), dapo (clip-higher), gspo
    (ratio of sequences), cispo (clipped weights), rloo (leave-one-out), reinforce_pp (whitened over the batch),
    reinforce_pp_baseline; or the name of a loss that an installed package offers in the group `align.losses`."""
    clip_low: float | None = None
    """Ratios below 1 - clip_low stop pulling; null takes that of the variant's paper, for grpo PPO's 0.2."""
    clip_high: float | None = None
    """Ratios above 1 + clip_high stop pulling; null as for clip_low."""
    kl_coef: float = 0.0
    """Weight of the k3 KL to the reference in the loss; the tutorial's is 0.1, practice with verifiable rewards 0."""
    kl_in_reward: float = 0.0
    """Weight of the k1 KL to the reference inside the reward, as RLOO and REINFORCE++ have it."""
    normalise_std: bool = True
    """Divide advantages by the group's standard deviation; Dr. GRPO, RLOO and REINFORCE++ never do."""
    length: int | None = None
    """Tokens by which Dr. GRPO divides every sequence's sum; null takes sampling.max_tokens."""
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    """How grpo averages: over all tokens of the batch (DAPO's way), or over each sequence first (the paper's)."""

    def __post_init__(self) -> None:
        if not self.shipped and self.variant not in (added := registry.names("align.losses")):
            remedy = "a package adds one through the entry-point group 'align.losses'"
            known = sorted([*get_args(PolicyVariant), *added])
            raise ConfigError(unknown_name("variant", self.variant, known, remedy=remedy))
        for name in ("clip_low", "clip_high"):
            if getattr(self, name) is not None:
                positive(self, name)
        for name in ("kl_coef", "kl_in_reward"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.length is not None:
            positive(self, "length")
        if self.reduction != "token_mean" and self.variant != "grpo":
            raise ConfigError(f"reduction {self.reduction!r} is grpo's; {self.variant!r} has an average of its own")

    @property
    def shipped(self) -> bool:
        """Whether the variant is this project's own."""
        return self.variant in get_args(PolicyVariant)

    @property
    def clip(self) -> tuple[float, float]:
        """How far below and above 1 the ratio counts."""
        low, high = _CLIPS.get(self.variant, (0.2, 0.2))
        return (
            low if self.clip_low is None else self.clip_low,
            high if self.clip_high is None else self.clip_high,
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probs enter."""
        return self.kl_coef > 0 or self.kl_in_reward > 0


@dataclass(frozen=True, kw_only=True)
class OnlineDpoLoss:
    """Preferences between completions of one prompt, ordered by their rewards (Guo et al. 2024)."""

    beta: float = 0.1
    """Strength of the pull to the reference; the tutorial's."""
    pairs: Literal["all", "best_vs_rest", "best_vs_worst"] = "all"
    """Which ordered pairs of a group count; the tutorial's are all with different rewards."""
    length_normalised: bool = True
    """Mean instead of sum over a completion's log-ratios, as in the tutorial; no pull towards length."""

    def __post_init__(self) -> None:
        positive(self, "beta")


@dataclass(frozen=True, kw_only=True)
class PpoLoss:
    """Clipped policy gradient with per-token advantages (Schulman et al. 2017)."""

    clip_low: float = 0.2
    """Ratios below 1 - clip_low stop pulling; the paper's and the tutorial's value."""
    clip_high: float = 0.2
    """Ratios above 1 + clip_high stop pulling."""
    dual_clip: float | None = None
    """Most that a token of negative advantage counts, as a ratio (Ye et al. 2020 use 3); null leaves it out."""

    def __post_init__(self) -> None:
        positive(self, "clip_low", "clip_high")
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ConfigError(f"dual_clip must be above 1 + clip_high = {1 + self.clip_high}, got {self.dual_clip}")


@dataclass(frozen=True, kw_only=True)
class ValueLoss:
    """Squared error of the value model, the larger of clipped and plain."""

    clip: float | None = 0.2
    """Largest move of a value that counts; the tutorial's is 0.1 without the max; null leaves clipping out."""

    def __post_init__(self) -> None:
        if self.clip is not None:
            positive(self, "clip")


LossConfig = SftLoss | RewardLoss | DpoLoss | KtoLoss | GrpoLoss | OnlineDpoLoss | PpoLoss | ValueLoss
