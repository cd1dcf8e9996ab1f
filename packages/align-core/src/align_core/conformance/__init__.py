"""What every implementation of a contract must do, as plain functions that raise ConformanceError.

Each implementation calls these in its own tests, the fakes too: a stage that works with one then works with all. Knows
numpy and the contracts, no test framework, and nothing of how an implementation is made.
"""

from align_core.conformance.asynchronous import check_async, check_change_on_the_way, check_partial, check_sleep
from align_core.conformance.engine import check_engine, check_generation
from align_core.conformance.expectations import ConformanceError
from align_core.conformance.judge import check_judge
from align_core.conformance.reward import check_reward
from align_core.conformance.trainer import check_trainer
from align_core.conformance.weights import check_weight_sink, check_weight_source

__all__ = [
    "ConformanceError",
    "check_async",
    "check_change_on_the_way",
    "check_engine",
    "check_generation",
    "check_judge",
    "check_partial",
    "check_reward",
    "check_sleep",
    "check_trainer",
    "check_weight_sink",
    "check_weight_source",
]
