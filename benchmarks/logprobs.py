"""Time, memory and error of the log-prob kernels of align-algos beside the unfused way and liger-kernel.

    python benchmarks/logprobs.py --out results/logprobs --liger liger_kernel-0.8.5-py3-none-any.whl

Needs torch and align-algos; liger-kernel is optional (installed, or a wheel to unpack). One forward and backward pass
of - sum weight log p over bf16 hidden states and an output matrix, to the gradients of both. Memory is the peak beyond
inputs and gradients. A variant that fails is reported and does not stop the others. Exit status 1: ours broke its
error bound.
"""

import argparse
import functools
import gc
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from align_algos import (
    FusedOutput,
    LossOutput,
    fused_cross_entropy,
    fused_logprobs,
    fused_loss,
    grpo_loss,
    token_logprobs,
)
from align_algos.fused import BLOCK_BYTES
from align_algos.softmax_blocks import RowGradient, empty_statistics, take_block, to_gradient

MIB = 1 << 20
BASE = "unfused, float32 log-softmax"
LIGER = "liger fused linear cross-entropy"
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}


class Problem(NamedTuple):
    """Leaves that want gradients, and constants."""

    hidden_NH: Tensor
    weight_VH: Tensor
    targets_N: Tensor
    weights_N: Tensor


Variant = Callable[[Problem], tuple[Tensor, Tensor | None]]
"""To the loss with gradient, and the log-probs where the variant gives them."""


def unfused(problem: Problem) -> tuple[Tensor, Tensor]:
    """What most code does: a linear layer, float32, log-softmax, gather."""
    logits_NV = problem.hidden_NH @ problem.weight_VH.T
    upcast = torch.promote_types(logits_NV.dtype, torch.float32)
    logprobs_N = logits_NV.to(upcast).log_softmax(1).gather(1, problem.targets_N[:, None])[:, 0]
    return -(problem.weights_N * logprobs_N).sum(), logprobs_N


def unfused_low_precision(problem: Problem) -> tuple[Tensor, Tensor]:
    """torch's cross-entropy on the logits as they are: softmax rounded to 16 bits."""
    logprobs_N = -cross_entropy(problem.hidden_NH @ problem.weight_VH.T, problem.targets_N, reduction="none")
    return -(problem.weights_N * logprobs_N.to(problem.weights_N.dtype)).sum(), logprobs_N


def chunked(problem: Problem) -> tuple[Tensor, Tensor]:
    """`token_logprobs` on whole logits."""
    logprobs_N = token_logprobs(problem.hidden_NH @ problem.weight_VH.T, problem.targets_N)
    return -(problem.weights_N * logprobs_N).sum(), logprobs_N


def fused(*, block: int = BLOCK_BYTES, keep: int | None = 0, entropy: bool = False) -> Variant:
    """`fused_logprobs`; block and kept logits in bytes, None for what it keeps by itself."""

    def run(problem: Problem) -> tuple[Tensor, Tensor]:
        output = fused_logprobs(
            problem.hidden_NH,
            problem.weight_VH,
            problem.targets_N,
            entropy=entropy,
            block_bytes=block,
            keep_bytes=keep,
        )
        loss = -(problem.weights_N * output.logprobs_N).sum()
        if output.entropy_N is not None:
            loss = loss - 0.001 * (problem.weights_N * output.entropy_N).sum()
        return loss, output.logprobs_N

    return run


def known_weights(*, block: int | None = None, sums: torch.dtype = torch.float32) -> Variant:
    """`fused_cross_entropy`."""

    def run(problem: Problem) -> tuple[Tensor, Tensor]:
        return fused_cross_entropy(*problem, block_bytes=block, sum_dtype=sums)

    return run


def grpo(*, block: int | None) -> Variant:
    """`fused_loss` with the loss of GRPO, on policy with advantage 1: the same gradient as - sum weight log p."""

    def run(problem: Problem) -> tuple[Tensor, Tensor]:
        tokens = len(problem.targets_N)
        ones_N, mask_N = torch.ones_like(problem.weights_N), torch.ones_like(problem.targets_N, dtype=torch.bool)

        def piece(output: FusedOutput, rows: slice) -> LossOutput:
            logprobs_R = output.logprobs_N
            numbers = {"num_tokens": tokens, "clip_low": 0.2, "clip_high": 0.2}
            return grpo_loss(
                logprobs_R, logprobs_R.detach(), ones_N[rows].to(logprobs_R.dtype), mask_N[rows], **numbers
            )

        output = fused_loss(problem.hidden_NH, problem.weight_VH, problem.targets_N, piece, block_bytes=block)
        return output.loss, output.logprobs_N

    return run


def liger(*, accumulate: torch.dtype | None) -> Variant:
    """liger-kernel's fused linear cross-entropy; its mean equals our sum for weights 1/N."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction  # noqa: PLC0415

    def run(problem: Problem) -> tuple[Tensor, None]:
        arguments = (problem.hidden_NH, problem.weight_VH, problem.targets_N, None, None, -100, 0.0, 0.0, "mean")
        output = LigerFusedLinearCrossEntropyFunction.apply(*arguments, None, False, accumulate)
        return (output[0] if isinstance(output, tuple) else output), None

    return run


def variants(tokens: int, vocab: int, *, item: int, with_liger: bool) -> dict[str, Variant]:
    """All of them. Blocks are named for 32,768 tokens and shrink with the tokens, so that there are as many."""
    mib = max(1, tokens * MIB // 32768)
    table: dict[str, Variant] = {
        BASE: unfused,
        "unfused, 16-bit cross-entropy": unfused_low_precision,
        "token_logprobs on whole logits": chunked,
    }
    table["fused_logprobs"] = fused(keep=None)
    for block in (256, 512):
        table[f"fused_logprobs, block {block} MiB, nothing kept"] = fused(block=block * mib)
    table["fused_logprobs, all logits kept"] = fused(keep=tokens * vocab * item)
    table["fused_logprobs and entropy"] = fused(keep=None, entropy=True)
    table["fused_cross_entropy"] = known_weights()
    table["fused_cross_entropy, 16-bit sums"] = known_weights(sums=torch.bfloat16)
    for block in (256, 1024):
        table[f"fused_cross_entropy, block {block} MiB"] = known_weights(block=block * mib)
    table["fused_loss with GRPO"] = grpo(block=None)
    if with_liger:
        table[LIGER] = liger(accumulate=None)
        table[f"{LIGER}, float32 sums"] = liger(accumulate=torch.float32)
    return table


def make(tokens: int, hidden: int, vocab: int, *, dtype: torch.dtype, device: str, seed: int) -> Problem:
    """Random states and weights whose logits have standard deviation 3; every token weighs 1/N."""
    random = torch.Generator(device).manual_seed(seed)
    hidden_NH = torch.randn(tokens, hidden, generator=random, device=device).to(dtype)
    weight_VH = (torch.randn(vocab, hidden, generator=random, device=device) * (3 / hidden**0.5)).to(dtype)
    targets_N = torch.randint(0, vocab, (tokens,), generator=random, device=device)
    weights_N = torch.full((tokens,), 1.0 / tokens, device=device)
    return Problem(hidden_NH.requires_grad_(), weight_VH.requires_grad_(), targets_N, weights_N)


def errors(variant: Variant, problem: Problem, expected: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative error (norm of the difference over norm) of log-probs and both gradients."""
    loss, logprobs_N = variant(problem)
    found = (logprobs_N, *torch.autograd.grad(loss, (problem.hidden_NH, problem.weight_VH)))
    names = ("logprobs", "hidden_grad", "weight_grad")
    return {
        name: float((result.detach().double() - truth).norm() / truth.norm())
        for name, result, truth in zip(names, found, expected)
        if result is not None
    }


def reference(problem: Problem) -> tuple[Tensor, ...]:
    """In float64 from the same (rounded) inputs."""
    wide = Problem(*(x.detach().double().requires_grad_() if x.requires_grad else x for x in problem))
    loss, logprobs_N = unfused(wide._replace(weights_N=problem.weights_N.double()))
    return (logprobs_N.detach(), *torch.autograd.grad(loss, (wide.hidden_NH, wide.weight_VH)))


class Sample(NamedTuple):
    """One pass: milliseconds of forward and backward, of forward alone; peak bytes beyond inputs and gradients."""

    ms: float
    forward_ms: float
    peak_bytes: int


def measure(table: dict[str, Variant], problem: Problem, *, repeats: int) -> dict[str, dict[str, Any]]:
    """Every variant in turn, `repeats` rounds after two of warming up: a GPU that slows down slows all of them."""
    samples: dict[str, list[Sample]] = {name: [] for name in table}
    failed: dict[str, dict[str, Any]] = {}
    for _ in range(repeats + 2):
        for name, variant in table.items():
            if name not in failed:
                found = _guarded(lambda variant=variant: {"sample": _pass(variant, problem)})
                if "failed" in found:
                    failed[name] = found
                else:
                    samples[name].append(found["sample"])
    base = [sample.ms for sample in samples[BASE][2:]]
    peer = [sample.ms for sample in samples.get(LIGER, [])[2:]]
    return failed | {name: _summary(rounds[2:], base, peer) for name, rounds in samples.items() if name not in failed}


def _pass(variant: Variant, problem: Problem) -> Sample:
    cuda = problem.hidden_NH.is_cuda
    leaves = (problem.hidden_NH, problem.weight_VH)
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    _settle(cuda)
    before = torch.cuda.memory_allocated() if cuda else 0
    start = time.perf_counter()
    loss, _ = variant(problem)
    _wait(cuda)
    middle = time.perf_counter()
    found = torch.autograd.grad(loss, leaves)
    _wait(cuda)
    stop = time.perf_counter()
    peak = torch.cuda.max_memory_allocated() - before - gradients if cuda else 0
    del found
    return Sample(1e3 * (stop - start), 1e3 * (middle - start), peak)


def _summary(rounds: list[Sample], base: list[float], peer: list[float]) -> dict[str, Any]:
    """Medians; ratios are medians of those of each round."""
    both = [sample.ms for sample in rounds]
    return {
        "ms": statistics.median(both),
        "ms_min": min(both),
        "ms_max": max(both),
        "forward_ms": statistics.median(sample.forward_ms for sample in rounds),
        "peak_bytes": max(sample.peak_bytes for sample in rounds),
        "speed": statistics.median(other / own for other, own in zip(base, both)) if base else None,
        "speed_of_liger": statistics.median(other / own for other, own in zip(peer, both)) if peer else None,
    }


def products(problem: Problem, *, repeats: int) -> float:
    """Milliseconds of the three matrix products alone, the least that any variant needs."""
    cuda = problem.hidden_NH.is_cuda
    with torch.no_grad():
        logits_NV = problem.hidden_NH @ problem.weight_VH.T
        times = []
        for _ in range(repeats + 2):
            _wait(cuda)
            start = time.perf_counter()
            torch.mm(problem.hidden_NH, problem.weight_VH.T, out=logits_NV)
            first, second = logits_NV @ problem.weight_VH, logits_NV.T @ problem.hidden_NH
            _wait(cuda)
            times.append(1e3 * (time.perf_counter() - start))
            del first, second
    return statistics.median(times[2:])


def benchmark(options: argparse.Namespace, vocab: int, with_liger: bool) -> dict[str, Any]:
    """All variants for one vocabulary."""
    rows: dict[str, dict[str, Any]] = defaultdict(dict)
    for dtype in (torch.float32, torch.bfloat16):
        problem = _make(options, vocab, options.check_tokens, dtype)
        expected = reference(problem)
        table = variants(options.check_tokens, vocab, item=dtype.itemsize, with_liger=with_liger)
        for name, variant in table.items():
            if name.endswith("and entropy"):  # another loss than the reference
                continue
            found = _guarded(functools.partial(errors, variant, problem, expected))
            rows[name][f"error_{_name(dtype)}"] = found
        del problem, expected
        _settle(options.device == "cuda")
    problem = _make(options, vocab, options.tokens, torch.bfloat16)
    alone = _guarded(lambda: {"ms": products(problem, repeats=options.repeats)})
    table = variants(options.tokens, vocab, item=2, with_liger=with_liger)
    for name, found in measure(table, problem, repeats=options.repeats).items():
        rows[name] |= found
        print(f"{vocab} {name}: {found.get('ms', found.get('failed'))}", flush=True)
    pieces = _guarded(lambda: parts(problem, repeats=options.repeats))
    tiles = _guarded(lambda: kernels(problem, repeats=options.repeats)) if options.device == "cuda" else {}
    broken = [f"{name}: {row}" for name, row in rows.items() if _breaks(name, row)]
    return {"vocab": vocab, "products": alone, "parts": pieces, "kernels": tiles, "variants": rows, "broken": broken}


def parts(problem: Problem, *, repeats: int) -> dict[str, Any]:
    """Milliseconds of each step of `fused_logprobs` on one block, by columns of the block, and of its alternatives."""
    cuda = problem.hidden_NH.is_cuda
    return {
        str(columns): {
            name: _guarded(functools.partial(_time, step, repeats, cuda))
            for name, step in _steps(problem, columns).items()
        }
        for columns in (2048, 4096, 8192, 16384)
    }


def _steps(problem: Problem, columns: int) -> dict[str, Callable[[], Any]]:
    hidden_NH, block_CH = problem.hidden_NH.detach(), problem.weight_VH.detach()[:columns]
    target_N, logits_NC = problem.targets_N, hidden_NH @ block_CH.T
    plain, moments = (empty_statistics(len(hidden_NH), like=hidden_NH, entropy=entropy) for entropy in (False, True))
    rows = RowGradient(plain.top_N, plain.mass_N + 1, problem.weights_N, None, None)
    out_CH, total_NH = torch.empty_like(block_CH), torch.zeros_like(hidden_NH, dtype=torch.float32)
    steps: dict[str, Callable[[], Any]] = {
        "logits": lambda: torch.mm(hidden_NH, block_CH.T, out=logits_NC),
        "statistics": lambda: take_block(logits_NC, target_N, plain, temperature=1.0),
        "statistics with entropy": lambda: take_block(logits_NC, target_N, moments, temperature=1.0),
        "gradient": lambda: to_gradient(logits_NC, target_N, rows, temperature=1.0),
        "weight gradient": lambda: torch.mm(logits_NC.T, hidden_NH, out=out_CH),
        "hidden gradient, product alone": lambda: logits_NC @ block_CH,
        "hidden gradient, product and sum": lambda: total_NH.add_(logits_NC @ block_CH),
    }
    if hidden_NH.is_cuda:
        add = torch.ops.aten.addmm.dtype_out
        steps["hidden gradient, one call"] = lambda: add(total_NH, logits_NC, block_CH, torch.float32, out=total_NH)
    return steps


def kernels(problem: Problem, *, repeats: int) -> dict[str, Any]:
    """Milliseconds of the two Triton kernels on 512 MiB of whole rows, by tile and warps."""
    from align_algos import softmax_triton  # noqa: PLC0415 (needs Triton)

    rows = 512 * MIB // (2 * len(problem.weight_VH))
    part = Problem(problem.hidden_NH.detach()[:rows], problem.weight_VH, *(x[:rows] for x in problem[2:]))
    found: dict[str, Any] = {}
    for tile, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16)):
        softmax_triton._TILE, softmax_triton._WARPS = tile, warps
        steps = _steps(part, len(problem.weight_VH))
        for name in ("statistics", "statistics with entropy", "gradient"):
            key = f"{name}, tile {tile}, {warps} warps"
            found[key] = _guarded(functools.partial(_time, steps[name], repeats, True))
    return found


def _time(step: Callable[[], Any], repeats: int, cuda: bool) -> dict[str, float]:
    times = []
    for _ in range(repeats + 2):
        _wait(cuda)
        start = time.perf_counter()
        step()
        _wait(cuda)
        times.append(1e3 * (time.perf_counter() - start))
    return {"ms": statistics.median(times[2:])}


def _make(options: argparse.Namespace, vocab: int, tokens: int, dtype: torch.dtype) -> Problem:
    return make(tokens, options.hidden, vocab, dtype=dtype, device=options.device, seed=options.seed)


def _breaks(name: str, row: dict[str, Any]) -> bool:
    """Whether one of ours failed or is off by more than its bound; with entropy the loss is another one."""
    if "fused_" not in name or "entropy" in name.replace("cross_entropy", ""):
        return False
    found = [(row[f"error_{label}"], bound) for label, bound in BOUNDS.items()]
    return "failed" in row or any("failed" in error or max(error.values()) > bound for error, bound in found)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _guarded(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result, or why there is none; one variant must not take the others with it."""
    try:
        return run()
    except Exception as error:  # reported in the table
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def _settle(cuda: bool) -> None:
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    facts = results["facts"]
    lines = [
        "# Log-prob kernels",
        "",
        f"{facts['device']}, {facts['versions']}, commit {facts['commit']}, seed {facts['seed']}. Hidden "
        f"{facts['hidden']}, {facts['tokens']} tokens, bf16; forward + backward to the gradients of hidden states and "
        f"output matrix, medians of {facts['repeats']} "
        "rounds in which every variant takes its turn, after two to warm up; speed: to the first row. Memory: peak "
        "beyond inputs and gradients. "
        f"Errors: relative to float64, {facts['check_tokens']} tokens, the largest of log-probs and both gradients.",
    ]
    for result in results["vocabularies"]:
        base = result["variants"][BASE]
        lines += [
            "",
            f"## Vocabulary {result['vocab']}",
            "",
            f"The three matrix products alone: {result['products'].get('ms', float('nan')):.1f} ms.",
            "",
            "| variant | ms (least to most) | forward | speed | to liger | peak MiB | of unfused | fp32 error | bf16 |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [_row(name, row, base) for name, row in result["variants"].items()]
        lines += [f"\nBroke its bound: {broken}" for broken in result["broken"]]
    return "\n".join(lines) + "\n"


def _row(name: str, row: dict[str, Any], base: dict[str, Any]) -> str:
    def error(label: str) -> str:
        found = row.get(f"error_{label}", {})
        return "failed" if "failed" in found else f"{max(found.values()):.1e}" if found else "-"

    if "failed" in row:
        return f"| {name} | {row['failed']} | | | | | | {error('float32')} | {error('bfloat16')} |"
    speed, beside = (f"{row[key]:.2f}x" if row[key] is not None else "-" for key in ("speed", "speed_of_liger"))
    share = f"{row['peak_bytes'] / base['peak_bytes']:.1%}" if base.get("peak_bytes") else "-"
    return (
        f"| {name} | {row['ms']:.1f} ({row['ms_min']:.1f} to {row['ms_max']:.1f}) | {row['forward_ms']:.1f} | "
        f"{speed} | {beside} | {row['peak_bytes'] / MIB:.0f} | {share} | {error('float32')} | {error('bfloat16')} |"
    )


def _find_liger(wheel: Path | None) -> bool:
    """Put the wheel on the path, if one is given; whether liger-kernel is there."""
    if wheel is not None:
        folder = tempfile.mkdtemp(prefix="liger-")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        sys.path.insert(0, folder)
    return importlib.util.find_spec("liger_kernel") is not None


def _facts(options: argparse.Namespace, with_liger: bool) -> dict[str, Any]:
    cuda = options.device == "cuda"
    names = ["torch", "triton", *(["liger-kernel"] if with_liger else [])]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "versions": ", ".join(f"{name} {_version(name)}" for name in names),
        "commit": options.commit or commit.stdout.strip() or "unknown",
        **{key: getattr(options, key) for key in ("tokens", "hidden", "seed", "repeats", "check_tokens")},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> int:
    """Reads the arguments, runs, writes OUT.md and OUT.json after each vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/logprobs"))
    parser.add_argument("--liger", type=Path, default=None, help="wheel of liger-kernel, if it is not installed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--check-tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 151936])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", default=None, help="for the record, where there is no git")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    with_liger = options.device == "cuda" and _find_liger(options.liger)
    results: dict[str, Any] = {"facts": _facts(options, with_liger), "vocabularies": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for vocab in options.vocab:
        results["vocabularies"].append(benchmark(options, vocab, with_liger))
        options.out.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        options.out.with_suffix(".md").write_text(table(results))
    print(table(results))
    return 1 if any(result["broken"] for result in results["vocabularies"]) else 0


if __name__ == "__main__":
    sys.exit(main())
