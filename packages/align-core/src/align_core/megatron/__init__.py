"""Training with Megatron-core: the only package that imports megatron. `MegatronTrainer` is one rank of it.

Importing it imports torch and megatron-core, and starts nothing: no process group, no device.
"""

from align_core.errors import missing_dependency
from align_core.megatron.quiet import quiet_megatron

try:
    from align_core.megatron.deferred import deferred_compile

    with quiet_megatron(), deferred_compile():
        import megatron.core.dist_checkpointing
        import megatron.core.models.gpt
        import megatron.core.optimizer  # noqa: F401
except ImportError as error:
    raise missing_dependency("megatron-core", "align-core[megatron]", needed_for="training") from error

from align_core.megatron.parallel import RankContext, close_rank, init_rank
from align_core.megatron.trainer import MegatronTrainer

__all__ = ["MegatronTrainer", "RankContext", "close_rank", "init_rank"]
