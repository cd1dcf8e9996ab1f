"""Which GPU of which node each rank and each engine gets. Arithmetic only: works for a cluster that is only described.

Colocated: rank i of every model and of the engines is on GPU i; who works keeps its memory, the others give theirs up.
Disaggregated: models from the first GPU on, engines on the last ones, and neither on the other's.
Nodes are filled one after another, so that tensor-parallel ranks, which talk most, are neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from align_core.config import PlacementMode
from align_core.errors import ConfigError, LayoutError


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One machine."""

    gpus: int
    """0: its processes run on CPU."""
    gpu_gib: float = 0.0
    """Memory of each GPU, GiB; 0 where it is not known."""
    cpus: int = 1
    """Processor cores."""

    @property
    def slots(self) -> int:
        """How many ranks have a device of their own here."""
        return self.gpus or self.cpus


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Slot:
    """A device: a GPU, or on nodes without one a processor core, which several ranks may share."""

    node: int
    index: int


class Placement:
    """Hands out the slots of a cluster."""

    def __init__(self, nodes: Sequence[Node], mode: PlacementMode) -> None:
        """Of nodes with GPUs and without, the former alone are used."""
        self.on_gpus = any(node.gpus for node in nodes)
        self.mode: PlacementMode = mode
        self.nodes = tuple(nodes)
        self._slots = [
            Slot(node=number, index=index)
            for number, node in enumerate(nodes)
            if bool(node.gpus) == self.on_gpus
            for index in range(node.slots)
        ]
        self._trainers = 0
        self._engines = 0

    @property
    def slots(self) -> list[Slot]:
        """All of them, in the order of their use."""
        return list(self._slots)

    def trainer(self, ranks: int) -> list[Slot]:
        """A slot for each rank; all models begin at the first one.

        Raises:
            ConfigError: there are fewer GPUs, or disaggregated engines have them.
        """
        self._trainers = max(self._trainers, ranks)
        self._check()
        return [self._slots[rank % len(self._slots)] for rank in range(ranks)]

    def engines(self, tensor: int, replicas: int = 1) -> list[list[Slot]]:
        """The slots of each replica of an engine, `tensor` of one node.

        Raises:
            ConfigError: there are fewer GPUs, or disaggregated trainers have them.
            LayoutError: a replica would lie on two nodes.
        """
        needed = tensor * replicas
        self._engines = max(self._engines, needed)
        self._check()
        first = len(self._slots) - needed if self.mode == "disaggregated" else 0
        taken = [self._slots[(first + index) % len(self._slots)] for index in range(needed)]
        parts = [taken[start : start + tensor] for start in range(0, needed, tensor)]
        for part in parts:
            if self.on_gpus and len({slot.node for slot in part}) > 1:
                raise LayoutError(
                    f"engine.tensor {tensor} would cut an engine over the nodes {part[0].node} and {part[-1].node}; "
                    "choose an engine.tensor that divides the GPUs of a node"
                )
        return parts

    def _check(self) -> None:
        """On CPU ranks share the cores, so there are always enough."""
        if not self.on_gpus:
            return
        total = len(self._slots)
        if max(self._trainers, self._engines) > total:
            raise ConfigError(
                f"{max(self._trainers, self._engines)} ranks need as many GPUs, the cluster has {total}; "
                "lower parallel.* or the engine's sizes, or bring more nodes"
            )
        if self.mode == "disaggregated" and self._trainers + self._engines > total:
            raise ConfigError(
                f"disaggregated, {self._trainers} GPUs for training and {self._engines} for engines are "
                f"{self._trainers + self._engines}, the cluster has {total}; lower one of them, or set "
                "cluster.placement to 'colocated'"
            )


def parse_cluster(text: str) -> list[Node]:
    """Nodes from `NODESxGPUSxGIB`, for example `2x8x80`: two nodes of eight GPUs with 80 GiB each.

    Raises:
        ConfigError: the text has another form.
    """
    parts = text.lower().split("x")
    try:
        nodes, gpus, gib = int(parts[0]), int(parts[1]), float(parts[2])
        if len(parts) != 3 or nodes < 1 or gpus < 1 or not gib > 0:
            raise ValueError
    except (ValueError, IndexError):
        raise ConfigError(
            f"a cluster is described as NODESxGPUSxGIB, for example '1x8x80' (eight GPUs of 80 GiB), got {text!r}"
        ) from None
    return [Node(gpus=gpus, gpu_gib=gib)] * nodes
