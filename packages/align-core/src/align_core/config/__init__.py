"""Every setting of every stage: one tree of frozen dataclasses, with unit and reason of the default under each field.

Values are checked where they are made (`__post_init__`); reading YAML files and command lines is the work of
`align_core.settings`. "The tutorial" in these files is the Llama tutorial whose road this project follows. No slots:
the argument parser reads `__dict__`.
"""

from align_core.config.cluster import ClusterConfig, PlacementMode
from align_core.config.engine import EngineConfig, InFlight, SamplingConfig, Transport, Verify
from align_core.config.evaluation import EvaluationConfig, JudgeConfig
from align_core.config.losses import (
    DpoLoss,
    GrpoLoss,
    KtoLoss,
    LossConfig,
    OnlineDpoLoss,
    PolicyVariant,
    PpoLoss,
    RewardLoss,
    SftLoss,
    ValueLoss,
)
from align_core.config.offline import DpoConfig, KtoConfig, OfflineConfig, ReferenceConfig, RewardConfig, SftConfig
from align_core.config.policy import CorrectionConfig, PolicyConfig, ScheduleConfig
from align_core.config.responses import LogprobsConfig, ResponsesConfig, ScoreConfig
from align_core.config.rl import GrpoConfig, KlConfig, OnlineDpoConfig, RlhfConfig
from align_core.config.scoring import ScoringConfig
from align_core.config.stage import StageConfig, TrainerConfig
from align_core.config.training import (
    Device,
    Dtype,
    LoraConfig,
    OptimizerConfig,
    ParallelConfig,
    RecomputeModule,
    TrainingConfig,
)

__all__ = [
    "ClusterConfig",
    "CorrectionConfig",
    "Device",
    "DpoConfig",
    "DpoLoss",
    "Dtype",
    "EngineConfig",
    "EvaluationConfig",
    "GrpoConfig",
    "GrpoLoss",
    "InFlight",
    "JudgeConfig",
    "KlConfig",
    "KtoConfig",
    "KtoLoss",
    "LogprobsConfig",
    "LoraConfig",
    "LossConfig",
    "OfflineConfig",
    "OnlineDpoConfig",
    "OnlineDpoLoss",
    "OptimizerConfig",
    "ParallelConfig",
    "PlacementMode",
    "PolicyConfig",
    "PolicyVariant",
    "PpoLoss",
    "RecomputeModule",
    "ReferenceConfig",
    "ResponsesConfig",
    "RewardConfig",
    "RewardLoss",
    "RlhfConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "ScoreConfig",
    "ScoringConfig",
    "SftConfig",
    "SftLoss",
    "StageConfig",
    "TrainerConfig",
    "TrainingConfig",
    "Transport",
    "ValueLoss",
    "Verify",
]
