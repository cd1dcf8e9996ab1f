"""How fast align-convert is beside `cp` and sync of the same bytes, how much memory it takes, what a kill does to it.

    python benchmarks/convert.py make --work DIR [--sizes 2.2,0.5,1,2,4,8]     models of TinyLlama's shape, bfloat16
    sudo python benchmarks/convert.py compare --work DIR --out RESULTS         paired runs, cold cache, TP 4
    sudo python benchmarks/convert.py scale --work DIR --out RESULTS           time and peak memory against size
    python benchmarks/convert.py kill --work DIR --out RESULTS                 SIGKILL at random moments, then --resume
    python benchmarks/convert.py grid --work DIR --out RESULTS                 every family, layout and format

Caches are dropped before every timed run (needs root). `copy` is load_any + to_megatron in a process that has imported
everything; `command` is the whole `align-convert` command, with Python's start and torch's import, also from a cold
cache. Peak memory is the resident maximum during the copy less what was resident before it.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from importlib import metadata
from math import prod
from pathlib import Path

import torch

from align_convert import Layout, ModelConfig, load_any, write_hf
from align_convert.copy import to_hf, to_megatron
from align_convert.transfer import DEFAULT_MEMORY, Settings

RAW: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LAYERS = {"2.2": 22, "0.5": 3, "1": 8, "2": 20, "4": 42, "8": 88}
"""Size in GB -> layers: 88 MB each, and 262 MB of embedding and head."""


def make(work: Path, sizes: list[str]) -> None:
    """Random weights that differ from tensor to tensor."""
    block = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for size in sizes:
        if (work / size).exists():
            continue
        config = ModelConfig.from_hf(RAW | {"num_hidden_layers": LAYERS[size]})
        shapes = enumerate(config.tensors().items())
        weights = (
            (name, block.roll(number * 1001).repeat(-(-prod(shape) // block.numel()))[: prod(shape)].view(shape))
            for number, (name, shape) in shapes
        )
        write_hf(work / size, config, weights, dtype=torch.bfloat16)


def compare(work: Path, runs: int) -> dict[str, object]:
    """cp + sync, the copy, and the whole command in turn; the order changes from run to run."""
    source, rows = work / "2.2", []
    for run in range(runs):
        seconds = {}
        order = ["cp", "copy", "command"]
        for kind in order if run % 2 == 0 else reversed(order):
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            seconds[kind], peak = _timed(kind, source, out)
            if kind == "copy":
                seconds["peak_mb"] = peak
        rows.append(seconds)
        print(run, {key: round(value, 2) for key, value in seconds.items()}, flush=True)
    shutil.rmtree(work / "out", ignore_errors=True)
    ratios = {kind: [row[kind] / row["cp"] for row in rows] for kind in ("copy", "command")}
    return {
        "bytes": sum(path.stat().st_size for path in source.iterdir()),
        "runs": rows,
        "median_ratio": {kind: statistics.median(values) for kind, values in ratios.items()},
        "ratio_of_medians": {
            kind: statistics.median(r[kind] for r in rows) / statistics.median(r["cp"] for r in rows)
            for kind in ("copy", "command")
        },
        "memory_budget_mb": DEFAULT_MEMORY / 1e6,
    }


def scale(work: Path, sizes: list[str]) -> dict[str, object]:
    """Time and peak memory of the copy, at the default budget and at 64 MiB."""
    rows = []
    for size in sizes:
        for memory in (DEFAULT_MEMORY, 64 << 20):
            shutil.rmtree(work / "out", ignore_errors=True)
            seconds, peak = _timed("copy", work / size, work / "out", memory=memory)
            num_bytes = sum(path.stat().st_size for path in (work / size).iterdir())
            rows.append({"gb": num_bytes / 1e9, "memory_mb": memory / 1e6, "seconds": seconds, "peak_mb": peak})
            print(rows[-1], flush=True)
    shutil.rmtree(work / "out", ignore_errors=True)
    return {"rows": rows}


def kill(work: Path, rounds: int, seed: int) -> dict[str, object]:
    """SIGKILL the command at random moments of its copy until `rounds` were hit; compare with an undisturbed run."""
    source, whole, out = work / "0.5", work / "whole", work / "killed"
    rng = random.Random(seed)
    for path in (whole, out):
        shutil.rmtree(path, ignore_errors=True)
    subprocess.run(_command(source, whole), check=True, stdout=subprocess.DEVNULL)
    wanted, rows, missed = _digests(whole), [], 0
    while len(rows) < rounds:
        for path in (out, _partial(out)):
            shutil.rmtree(path, ignore_errors=True)
        moment = rng.uniform(0.0, 1.0)
        journal_lines, seen = _run_and_kill(source, out, moment)
        if journal_lines is None:
            missed += 1
            continue
        subprocess.run(_command(source, out, "--resume"), check=True, stdout=subprocess.DEVNULL)
        row = {"s_after_start_of_copy": round(moment, 3), "tiles_done": journal_lines}
        rows.append(row | {"half_written_seen": seen, "equal_after_resume": _digests(out) == wanted})
        print(len(rows), rows[-1], flush=True)
    for path in (whole, out):
        shutil.rmtree(path, ignore_errors=True)
    return {
        "rounds": rows,
        "finished_before_the_kill": missed,
        "equal": sum(bool(row["equal_after_resume"]) for row in rows),
        "half_written_seen": sum(bool(row["half_written_seen"]) for row in rows),
    }


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def _run_and_kill(source: Path, out: Path, moment: float) -> tuple[int | None, bool]:
    """(finished tiles when killed, or None if it had ended; whether a reader saw an incomplete destination)."""
    process = subprocess.Popen(_command(source, out), stdout=subprocess.DEVNULL)
    while process.poll() is None and not _partial(out).exists():
        time.sleep(0.002)
    end, seen = time.monotonic() + moment, False
    while time.monotonic() < end and process.poll() is None:
        seen = seen or (out.exists() and not (out / "align-convert.json").is_file())
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.returncode != -signal.SIGKILL or out.exists():
        return None, seen
    journal = _partial(out) / ".align-convert.journal"
    return (journal.read_bytes().count(b"\n") if journal.is_file() else 0), seen or out.exists()


FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "mistral": {"architectures": ["MistralForCausalLM"]},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 8},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 4,
        "moe_intermediate_size": 112,
        "num_experts_per_tok": 2,
        "head_dim": 4,
    },
}
RATIOS: dict[str, dict[str, object]] = {
    "7B": {"num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 128, "intermediate_size": 344},
    "13B": {"num_attention_heads": 40, "num_key_value_heads": 40, "hidden_size": 160, "intermediate_size": 432},
    "70B": {"num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 128, "intermediate_size": 448},
}
"""Llama-2's heads exactly, widths divided by 32 (70B: 64)."""


def grid(work: Path, chosen: list[str]) -> dict[str, object]:
    """Hugging Face -> Megatron -> Hugging Face through files: the safetensors file that comes back, byte for byte."""
    sizes = {"vocab_size": 500, "num_hidden_layers": 8}
    models = {family: RAW | RATIOS["70B"] | sizes | {"model_type": family} | own for family, own in FAMILIES.items()}
    models |= {f"llama {name}": RAW | ratio | sizes | {"model_type": "llama"} for name, ratio in RATIOS.items()}
    layouts = [(tp, pp, vp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4) for vp in (1, 2) if pp > 1 or vp == 1]
    counts: dict[str, int] = {}
    unequal = []
    for model in chosen or list(models):
        raw = models[model]
        config = ModelConfig.from_hf(raw)
        generator = torch.Generator().manual_seed(0)
        weights = {n: torch.randn(shape, generator=generator).bfloat16() for n, shape in config.tensors().items()}
        source = work / "grid"
        write_hf(source, config, weights.items(), dtype=torch.bfloat16, overwrite=True)
        wanted = (source / "model.safetensors").read_bytes()
        for tp, pp, vp in layouts:
            ep = 2 if config.num_experts and pp > 1 else 1
            namings = ["local", "te", "legacy"] if config.num_experts is None else ["local", "te", "te-grouped"]
            for how in [*({"naming": naming} for naming in namings), {"file_format": "torch_dist"}]:
                for path in ("grid-m", "grid-back"):
                    shutil.rmtree(work / path, ignore_errors=True)
                to_megatron(load_any(source), work / "grid-m", layout=Layout(tp=tp, pp=pp, vp=vp, ep=ep), **how)
                to_hf(load_any(work / "grid-m"), work / "grid-back")
                if (work / "grid-back" / "model.safetensors").read_bytes() != wanted:
                    unequal.append([model, tp, pp, vp, ep, how])
                counts[model] = counts.get(model, 0) + 1
        print(model, counts[model], len(unequal), flush=True)
    return {"round_trips": counts, "total": sum(counts.values()), "unequal": unequal}


def _timed(kind: str, source: Path, out: Path, *, memory: int = DEFAULT_MEMORY) -> tuple[float, float]:
    """(seconds, peak memory in MB above import for `copy`) of one run from a cold cache."""
    if kind == "copy":
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_copy_in_child, args=(source, out, memory, sender))
        process.start()
        seconds, peak = receiver.recv()
        process.join()
        return seconds, peak
    _drop_caches()
    began = time.perf_counter()
    if kind == "cp":
        subprocess.run(["cp", "-r", str(source), str(out)], check=True)
        os.sync()
    else:
        subprocess.run(_command(source, out), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began, 0.0


def _copy_in_child(source: Path, out: Path, memory: int, sender: "multiprocessing.connection.Connection") -> None:
    before = _resident_mb()
    _drop_caches()
    began = time.perf_counter()
    to_megatron(load_any(source), out, layout=Layout(tp=4), settings=Settings(memory=memory))
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    sender.send((seconds, peak - before))


def _resident_mb() -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("/proc/self/status has no VmRSS")


def _drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")


def _command(source: Path, out: Path, *options: str) -> list[str]:
    code = "import sys; from align_convert.cli import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", code, "to-megatron", str(source), str(out), "--tp", "4", *options]


def _digests(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _record(out: Path, name: str, result: dict[str, object]) -> None:
    """Add to convert.json in the results directory."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "convert.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    versions = {package: metadata.version(package) for package in ("align-convert", "torch", "numpy", "xxhash")}
    known[name] = {"commit": commit.stdout.strip(), "python": sys.version.split()[0], "versions": versions, **result}
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("make", "compare", "scale", "kill", "grid"))
    parser.add_argument("--work", type=Path, required=True, help="scratch directory on the disk to be measured")
    parser.add_argument("--out", type=Path, help="directory of results")
    parser.add_argument("--sizes", default="0.5,1,2,4,8", help="of make and scale, GB")
    parser.add_argument("--models", nargs="*", default=[], help="of grid; by default all")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sizes = arguments.sizes.split(",")
    if arguments.part == "make":
        make(arguments.work, sizes)
        return
    if arguments.part == "compare":
        result = compare(arguments.work, arguments.runs)
    elif arguments.part == "scale":
        result = scale(arguments.work, sizes)
    elif arguments.part == "grid":
        result = grid(arguments.work, arguments.models)
    else:
        result = kill(arguments.work, arguments.rounds, arguments.seed)
    _record(arguments.out, arguments.part, result)


if __name__ == "__main__":
    main()
