"""Which models and engines a stage puts on which GPU, what each GPU must hold, and whether that fits.

Two moments count: models at work (the engine asleep, where they share GPUs), and the engine at work. Arithmetic only;
the cluster may be one that is described and not here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from align_core.config import (
    EngineConfig,
    GrpoConfig,
    OnlineDpoConfig,
    ParallelConfig,
    PolicyConfig,
    ReferenceConfig,
    RewardConfig,
    RlhfConfig,
    StageConfig,
)
from align_core.errors import ConfigError
from align_core.memory import ModelMemory, engine_memory, model_memory
from align_core.model_shape import read_model_shape
from align_core.placement import Node, Placement, Slot, parse_cluster
from align_core.types import Head

_GIB = 2**30
_RUNTIME = _GIB  # CUDA and NCCL in one process, which allocators do not know of
_ASLEEP = 2 * _GIB  # what a sleeping engine keeps: its process, graphs, buffers


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """A model of a stage."""

    name: str
    path: Path
    parallel: ParallelConfig
    head: Head = "lm"
    trainable: bool = True

    def memory(self, config: StageConfig) -> ModelMemory:
        """On its fullest GPU."""
        shape = read_model_shape(self.path)
        return model_memory(
            shape,
            parallel=self.parallel,
            training=config.training,
            head=self.head,
            trainable=self.trainable,
            lora=config.lora if self.path == config.model else None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one GPU holds at one moment."""

    slot: Slot
    moment: str
    parts: tuple[tuple[str, int], ...]
    """Name and bytes."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(size for _, size in self.parts)

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in self.parts)
        return f"{self.total / _GIB:.1f} GiB ({shown})"


def roles(config: StageConfig) -> list[Role]:
    """The models that the stage loads, the trained one first."""
    head: Head = "score" if isinstance(config, RewardConfig) else "lm"
    found = [Role(name="trained model", path=config.model, parallel=config.parallel, head=head)]
    if _has_reference(config):
        found.append(Role(name="frozen reference", path=config.model, parallel=config.parallel, trainable=False))
    if isinstance(config, PolicyConfig) and config.uses_reward_model and config.reward_model:
        parallel = config.reward_model_parallel
        found.append(
            Role(name="reward model", path=config.reward_model, parallel=parallel, head="score", trainable=False)
        )
    if isinstance(config, RlhfConfig) and (path := config.value_model or config.reward_model):
        found.append(Role(name="value model", path=path, parallel=config.value_parallel, head="score"))
    return found


def gpu_lines(config: StageConfig) -> Iterator[tuple[str, str]]:
    """The placement on the described cluster, and what its GPUs hold.

    Raises:
        ConfigError: there are too few GPUs, or one of them holds too much.
        LayoutError: an engine would lie on two nodes.
    """
    nodes = parse_cluster(config.cluster.described)
    placement = Placement(nodes, config.cluster.placement)
    loads = _loads(config, placement)
    for role in roles(config):
        yield f"GPUs of the {role.name}", _shown(placement.trainer(role.parallel.world_size))
    if isinstance(config, PolicyConfig):
        for number, slots in enumerate(placement.engines(config.engine.tensor, config.engine.replicas)):
            yield f"GPUs of engine {number}", _shown(slots)
    for moment in dict.fromkeys(load.moment for load in loads):
        fullest = max((load for load in loads if load.moment == moment), key=lambda load: load.total)
        yield f"fullest GPU, {moment}", f"{fullest} of {nodes[0].gpu_gib:g} GiB"
    for load in loads:
        _check(load, nodes[load.slot.node])


def _loads(config: StageConfig, placement: Placement) -> list[Load]:
    held = [(role, role.memory(config), placement.trainer(role.parallel.world_size)) for role in roles(config)]
    engines = isinstance(config, PolicyConfig) and [
        slot for part in placement.engines(config.engine.tensor, config.engine.replicas) for slot in part
    ]
    loads = []
    for slot in placement.slots:
        here = [(role, memory) for role, memory, slots in held if slot in slots]
        standing = [(role.name, memory.standing) for role, memory in here]
        working = max((memory.working for _, memory in here), default=0)
        runtime = ("runtime", _RUNTIME * max(1, len({role.parallel for role, _ in here})))
        engine = _engine_bytes(config, placement.nodes[slot.node]) if engines and slot in engines else 0
        sleeps = isinstance(config, PolicyConfig) and config.engine.sleep and placement.mode == "colocated"
        if here:
            beside = [("engine asleep", min(_ASLEEP, engine)) if sleeps else ("engine", engine)] if engine else []
            parts = (*standing, ("activations and logits", working), runtime, *beside)
            loads.append(Load(slot=slot, moment="models at work", parts=parts))
        if engine:
            weights = [("weights of the policy", here[0][1].weights), runtime] if here else []
            parts = (("engine", engine), *(weights if sleeps else [*standing, runtime] if here else []))
            loads.append(Load(slot=slot, moment="engine at work", parts=parts))
    return loads


def _engine_bytes(config: StageConfig, node: Node) -> int:
    """Weights and KV cache: the share of the memory that the engine is told to take."""
    assert isinstance(config, PolicyConfig)
    memory = engine_memory(read_model_shape(config.model), config.engine)
    taken = memory.taken(config.engine, gpu_bytes=int(node.gpu_gib * _GIB))
    if memory.least > taken:
        raise ConfigError(
            f"{_engine_setting(config.engine, node)} are {taken / _GIB:.1f} GiB; the weights and one sequence of "
            f"{config.engine.context} tokens need {memory.least / _GIB:.1f}: raise it or engine.tensor, or lower "
            "engine.context"
        )
    return taken


def _engine_setting(engine: EngineConfig, node: Node) -> str:
    if engine.kv_cache_mib:
        return f"the weights and engine.kv_cache_mib {engine.kv_cache_mib}"
    return f"engine.memory_fraction {engine.memory_fraction} of {node.gpu_gib:g} GiB"


def _check(load: Load, node: Node) -> None:
    if load.total > node.gpu_gib * _GIB:
        raise ConfigError(
            f"GPU {load.slot.index} of node {load.slot.node} would hold about {load} with {load.moment}, and has "
            f"{node.gpu_gib:g} GiB; raise parallel.tensor, parallel.pipeline or the number of GPUs, or lower "
            "training.micro_batch_tokens or engine.memory_fraction"
        )


def _has_reference(config: StageConfig) -> bool:
    if isinstance(config, GrpoConfig):
        return config.loss.needs_reference
    if isinstance(config, (RlhfConfig, OnlineDpoConfig)):
        return True
    return isinstance(config, ReferenceConfig) and config.reference == "step"


def _shown(slots: Sequence[Slot]) -> str:
    by_node: dict[int, list[int]] = {}
    for slot in slots:
        by_node.setdefault(slot.node, []).append(slot.index)
    return "; ".join(f"node {node}: {', '.join(map(str, indices))}" for node, indices in by_node.items())
