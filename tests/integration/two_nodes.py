"""Two Ray nodes on this machine: ranks that meet over a port, and weights that cross over links or Ray's store.

The two raylets do share /dev/shm, which nothing here may use across them: the source is the one for several nodes, and
every file that it makes is written by ranks of one node only.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray")
pytest.importorskip("vllm")
pytest.importorskip("megatron.core")

from ray.cluster_utils import Cluster

from align_core.config import (
    ClusterConfig,
    EngineConfig,
    GrpoLoss,
    OptimizerConfig,
    ParallelConfig,
    SamplingConfig,
    TrainerConfig,
)
from align_core.errors import ConfigError
from align_core.ray import cluster
from align_core.ray.crossing import CrossingSource
from align_core.ray.source import LinkedWorkersSource
from align_core.ray.trainer import RayTrainer
from align_core.ray.world import RayWorld
from align_core.stages.rollout import rollout_batch
from align_core.stages.sync import compare_logprobs, synchronise
from align_core.tutorial.tiny import make_tiny_model
from align_core.types import Prompt, checksum

pytestmark = pytest.mark.slow


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a cluster of two nodes with one core each; this process has not joined it."""
    token = tmp_path / "token"
    token.write_text(cluster.private_token(), encoding="ascii")  # a process that has used one cannot use another
    token.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    cluster.stop()  # of a test before
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    yield str(nodes.address)
    cluster.stop()
    nodes.shutdown()


def test_ranks_and_engine_on_two_nodes(address: str, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "hf", seed=3)
    world = RayWorld(ClusterConfig(address=address, placement="disaggregated"))
    try:
        trainer = world.trainer(
            TrainerConfig(
                model=tmp_path / "hf", parallel=ParallelConfig(tensor=2), optimizer=OptimizerConfig(lr=0.05), steps=3
            )
        )
        engine = world.engine(tmp_path / "hf", EngineConfig(context=64, kv_cache_mib=64))
        assert isinstance(trainer, RayTrainer)
        assert len({place.node_id for place in trainer._workers.processes.places}) == 2
        source = trainer.weights()
        assert isinstance(source, LinkedWorkersSource)
        assert isinstance(source._host, CrossingSource)
        for weight in source.iterate():
            assert weight.file is None and weight.data is not None
            assert checksum(weight.data, item_bytes=4) == weight.checksum, weight.meta.name
        said = set()
        for version, transport in enumerate(("auto", "links", "links")):
            report = synchronise(source, engine.weight_sink(), version=version, transport=transport)  # type: ignore[arg-type]
            assert report.way == {"auto": "host"}.get(transport, transport)
            asked = [Prompt(id=10 * version + k, tokens=np.arange(5, 12 + k, dtype=np.int32)) for k in range(4)]
            completions = engine.generate(asked, SamplingConfig(n=2, max_tokens=8))
            assert {completion.version for completion in completions} == {version}
            said.add(tuple(completions[0].logprobs[:1].tolist()))
            batch = rollout_batch(asked, completions)
            own = trainer.logprobs(batch)
            sampled = np.concatenate([completion.logprobs for completion in completions])
            canary = compare_logprobs(sampled, own[batch.mask], threshold=1e-4, version=version)
            assert canary.max < 1e-4
            rewards = np.asarray([completion.tokens[0] for completion in completions], np.float32)
            advantages = np.where(batch.mask, np.repeat(rewards - rewards.mean(), batch.lengths), 0)
            trainer.step(
                batch.with_columns(
                    tokens={"old_logprobs": own, "advantages": advantages.astype(np.float32)},
                    sequences={"reward": rewards},
                ),
                GrpoLoss(),
            )
        assert len(said) == 3, "the update must change what the engine says, or nothing was sent"
    finally:
        world.close()


def test_an_address_where_no_cluster_is() -> None:
    cluster.stop()
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'.*ray start --head"):
        RayWorld(ClusterConfig(address="127.0.0.1:1")).trainer(TrainerConfig(model=Path("m")))
