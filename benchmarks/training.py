"""Training throughput of the Megatron trainer on one GPU: Llama-2-7B and 13B shapes, random weights, packed sequences.

    python benchmarks/training.py --out DIR [--budget 200] [--only NAME ...]
    python benchmarks/training.py --out DIR --device cpu --tiny          # does the script itself work

Each variant is timed by the trainer's own clock (`StepClock`), after warm-up steps. Variants run in worker processes
one after the other; a worker that dies costs its variant only. Results: DIR/training.json, DIR/training.md, and
DIR/profile-NAME.txt for profiled variants. What does not start within the budget (seconds) is left out, and said so.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

SHAPE = {  # Llama-2-7B
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
SHAPES = {
    "7b": SHAPE,
    "13b": {
        **SHAPE,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
TINY_LENGTH = 32


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One setting to time."""

    name: str
    shape: str = "7b"
    """Width of the layers: `7b` or `13b` (Llama 2)."""
    layers: int = 8
    loss: str = "sft"
    """`sft`, `dpo` (reference log-probs given), `logprobs` (forward only)."""
    sequences: int = 16
    """Sequences a step."""
    length: int = 4096
    ragged: bool = False
    """Lengths of which no two are equal, 4096 on average over each pair; the variable-length attention kernel."""
    micro_batch: int = 2
    """Sequences in a micro-batch."""
    recompute: str = "none"
    """`full`, or the modules of selective recompute with + between them."""
    steps: int = 3
    warmup: int = 1
    profile: bool = False


# The most telling first: what does not fit into the budget falls off the end.
VARIANTS = [
    Variant(name="sft-16-layers", layers=16, profile=True),
    Variant(name="dpo-16-layers", layers=16, loss="dpo"),
    Variant(name="sft-32-layers-micro-1", layers=32, micro_batch=1, steps=2),
    Variant(name="dpo-32-layers", layers=32, loss="dpo", recompute="mlp+norm+attention", steps=2),
    Variant(name="sft-13b-16-layers", shape="13b", layers=16),
    Variant(name="sft-13b-8-layers", shape="13b"),
    Variant(name="sft-8-layers-ragged", ragged=True, profile=True),
    Variant(name="sft-8-layers"),
    Variant(name="sft-8-layers-activation", recompute="activation"),
    Variant(name="sft-8-layers-norm", recompute="norm"),
    Variant(name="sft-8-layers-attention", recompute="attention"),
    Variant(name="sft-8-layers-mlp", recompute="mlp"),
    Variant(name="sft-32-layers-activation-micro-1", layers=32, recompute="activation", micro_batch=1, steps=2),
    Variant(name="dpo-13b-16-layers", shape="13b", layers=16, loss="dpo", steps=2),
    Variant(name="logprobs-16-layers", layers=16, loss="logprobs"),
    Variant(name="sft-8-layers-micro-4", micro_batch=4),
    Variant(name="sft-8-layers-micro-1", micro_batch=1),
    Variant(name="sft-16-layers-full-recompute", layers=16, recompute="full", micro_batch=4),
    Variant(name="sft-32-layers-full-recompute", layers=32, recompute="full", steps=2),
]


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    wanted = [v for v in VARIANTS if not arguments.only or v.name in arguments.only]
    if arguments.tiny:
        wanted = [replace(v, layers=min(v.layers, 2), length=TINY_LENGTH, steps=1) for v in wanted]
    results: list[dict[str, Any]] = []
    if not arguments.only:
        results += in_worker(arguments, ["kernels"], time_left=arguments.budget)
    waiting = list(wanted)
    while waiting:
        left = arguments.budget - (time.monotonic() - started)
        done = in_worker(arguments, waiting, time_left=left)
        results += done
        waiting = waiting[len(done) :]
        write(arguments, results)
    write(arguments, results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--budget", type=float, default=200.0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def in_worker(arguments: argparse.Namespace, work: list[Any], *, time_left: float) -> list[dict[str, Any]]:
    """The results of some variants from a process of its own; if it dies, the one it died in is the last."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=worker, args=(sender, arguments, work, time_left))
    process.start()
    sender.close()
    results: list[dict[str, Any]] = []
    try:
        while len(results) < len(work):
            results.append(receiver.recv())
            show(results[-1])
    except EOFError:
        name = getattr(work[len(results)], "name", work[len(results)])
        results.append({"name": name, "error": "the worker process died"})
        show(results[-1])
    process.join(timeout=20)
    process.kill()
    return results


def worker(sender: Any, arguments: argparse.Namespace, work: list[Any], time_left: float) -> None:
    started = time.monotonic()
    for item in work:
        name = getattr(item, "name", item)
        if time.monotonic() - started > time_left:
            sender.send({"name": name, "error": "left out: the time is up"})
            continue
        try:
            found = check_kernels(arguments) if item == "kernels" else run(item, arguments)
        except Exception:
            found = {"error": traceback.format_exc()[-1500:]}
            release()
        sender.send({"name": name, **found})


def run(variant: Variant, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time one variant."""
    import torch  # noqa: PLC0415  (workers import it, not the driver)

    from align_core.megatron import MegatronTrainer  # noqa: PLC0415

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        shape = {**SHAPES[variant.shape], **(TINY if arguments.tiny else {}), "num_hidden_layers": variant.layers}
        write_zeros(Path(folder), shape)
        estimate = estimated_gib(Path(folder), variant, arguments.device)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer = MegatronTrainer(trainer_config(Path(folder), variant, arguments.device))
    try:
        randomise(trainer)
        loaded = time.perf_counter() - began
        batch, loss = batch_of(variant, shape["vocab_size"])
        steps = [one_step(trainer, batch, loss) for _ in range(variant.warmup + variant.steps)][variant.warmup :]
        found = {**summary(steps), "estimated_gib": estimate}
        if variant.profile:
            found["profile"] = profile(trainer, batch, loss, arguments.out / f"profile-{variant.name}.txt")
    finally:
        trainer.close()
        del trainer
        release()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor()
    return {"variant": asdict(variant), **found, "seconds_to_start": loaded, "device": device, **versions}


def trainer_config(model: Path, variant: Variant, device: str) -> Any:
    from align_core.config import OptimizerConfig, TrainerConfig, TrainingConfig  # noqa: PLC0415

    tokens = variant.micro_batch * variant.length
    recompute = variant.recompute if variant.recompute in ("none", "full") else "selective"
    modules = {"recompute_modules": tuple(variant.recompute.split("+"))} if recompute == "selective" else {}
    return TrainerConfig(
        model=model,
        steps=1000,
        trainable=variant.loss != "logprobs",
        optimizer=OptimizerConfig(lr=1e-6, schedule="constant"),
        training=TrainingConfig(
            dtype="bfloat16", device=device, micro_batch_tokens=tokens, recompute=recompute, **modules
        ),
    )


def estimated_gib(model: Path, variant: Variant, device: str) -> float:
    """What `--dry-run` would say of the memory."""
    from align_core.memory import model_memory  # noqa: PLC0415
    from align_core.model_shape import read_model_shape  # noqa: PLC0415

    config = trainer_config(model, variant, device)
    shape = read_model_shape(model)
    memory = model_memory(shape, parallel=config.parallel, training=config.training, trainable=config.trainable)
    return memory.total / 2**30


def write_zeros(directory: Path, shape: dict[str, Any]) -> None:
    """A checkpoint of zeros that takes no room: the file has a header and a hole. Real numbers are drawn on the GPU."""
    from align_convert import ModelConfig  # noqa: PLC0415

    (directory / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in ModelConfig.from_hf(shape).tensors().items():
        count = 2
        for length in size:
            count *= length
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, offset + count]}
        offset += count
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def randomise(trainer: Any) -> None:
    """Matrices of noise: products of zeros would draw less power and run faster than training does."""
    import torch  # noqa: PLC0415

    with torch.no_grad():
        for chunk in trainer._chunks:
            for parameter in chunk.parameters():
                parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    if trainer._optimization is not None:
        trainer._optimization.optimizer.reload_model_params()


def batch_of(variant: Variant, vocab_size: int) -> tuple[Any, Any]:
    """Random tokens, all but the first of a sequence targets."""
    import numpy as np  # noqa: PLC0415

    from align_core.config import DpoLoss, SftLoss  # noqa: PLC0415
    from align_core.types import Batch  # noqa: PLC0415

    rng = np.random.default_rng(0)
    lengths = [variant.length] * variant.sequences
    if variant.ragged:
        spread = rng.integers(1, variant.length // 2, variant.sequences // 2)
        lengths = [length for x in spread.tolist() for length in (variant.length - x, variant.length // 2 + x)]
    masks = [np.arange(length) > 0 for length in lengths]
    batch = Batch.of(
        [rng.integers(0, vocab_size, length).astype(np.int32) for length in lengths], tokens={"mask": masks}
    )
    if variant.loss != "dpo":
        return batch, SftLoss() if variant.loss == "sft" else None
    reference = np.full(len(batch.tokens), -10.0, np.float32)
    group = np.repeat(np.arange(len(lengths) // 2), 2)
    return batch.with_columns(tokens={"reference_logprobs": reference}, sequences={"group": group}), DpoLoss()


def one_step(trainer: Any, batch: Any, loss: Any) -> dict[str, float]:
    if loss is not None:
        return dict(trainer.step(batch, loss))
    import torch  # noqa: PLC0415

    from align_core.megatron.throughput import peak_flops, training_flops  # noqa: PLC0415

    began = time.perf_counter()
    trainer.logprobs(batch)
    seconds = time.perf_counter() - began
    found = {"seconds": seconds, "tokens_per_s": len(batch.tokens) / seconds}
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if peak is not None:
        found["mfu"] = training_flops(trainer.model_config, batch.lengths) / 3 / seconds / peak
        found["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def summary(steps: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of what the steps report, and the spread of their times."""
    names = [name for name in steps[0] if name.startswith(("seconds", "tokens_per_s", "memory", "mfu"))]
    found: dict[str, Any] = {name: statistics.median(step[name] for step in steps) for name in names}
    found["seconds_each"] = [step["seconds"] for step in steps]
    return found


def profile(trainer: Any, batch: Any, loss: Any, file: Path) -> dict[str, float]:
    """Seconds of one step on the device by kind of kernel; the table of kernels goes to `file`."""
    import torch  # noqa: PLC0415
    from torch.profiler import ProfilerActivity  # noqa: PLC0415

    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        one_step(trainer, batch, loss)
    averages = profiler.key_averages()
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    file.write_text(averages.table(sort_by=order, row_limit=45, max_name_column_width=110), encoding="utf-8")
    kinds: dict[str, float] = {}
    for event in averages:
        seconds = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        kinds[kind_of(event.key)] = kinds.get(kind_of(event.key), 0.0) + seconds
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


KINDS = {
    "matrix products": ("gemm", "nvjet", "cutlass", "sm90_xmma", "aten::mm", "aten::addmm"),
    "attention": ("flash", "fmha", "cudnn", "scaled_dot"),
    "optimizer": ("adam", "multi_tensor", "foreach", "lpnorm"),
    "swiglu": ("_forward", "_backward"),
    "rotary": ("_rotate",),
    "norm": ("rms", "layer_norm", "layernorm", "gammabeta"),
    "copies and fills": ("memcpy", "memset", "copy", "fill"),
    "reductions": ("reduce", "softmax"),
    "elementwise": ("elementwise",),
}


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def check_kernels(arguments: argparse.Namespace) -> dict[str, Any]:
    """Single operations at the sizes of the 7B layer: milliseconds, and TFLOP/s where that says something."""
    import torch  # noqa: PLC0415

    cuda = arguments.device == "cuda"
    tokens, heads = (8192, 32) if cuda and not arguments.tiny else (64, 2)
    found: dict[str, Any] = {}
    for name, make in operations(arguments.device, tokens, heads).items():
        try:
            call, flops = make()
            milliseconds = time_of(call, cuda=cuda)
            found[name] = {"ms": milliseconds, **({"tflops": flops / milliseconds / 1e9} if flops else {})}
        except Exception as error:
            found[name] = {"error": str(error)[:300]}
        if cuda:
            torch.cuda.empty_cache()
    return {"operations": found, "tokens": tokens}


def operations(device: str, tokens: int, heads: int) -> dict[str, Any]:
    """Name to a function that makes (call, floating-point operations)."""
    import torch  # noqa: PLC0415
    import torch.nn.functional as F  # noqa: PLC0415
    from torch.nn.attention import SDPBackend, sdpa_kernel, varlen  # noqa: PLC0415

    hidden, ffn = heads * 128, heads * 344
    length = min(4096, tokens)
    attention_flops = 2.0 * tokens * length * hidden

    def noise(*shape: int, grad: bool = False, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_(grad)

    def product() -> Any:
        x, w = noise(tokens, hidden), noise(2 * ffn, hidden)
        return lambda: x @ w.t(), 2.0 * tokens * hidden * 2 * ffn

    def weight_gradient() -> Any:
        x, g = noise(tokens, hidden), noise(tokens, 2 * ffn)
        return lambda: g.t() @ x, 2.0 * tokens * hidden * 2 * ffn

    def weight_gradient_then_add() -> Any:
        x, g, total = noise(tokens, hidden), noise(tokens, 2 * ffn), noise(2 * ffn, hidden, dtype=torch.float32)
        return lambda: total.add_(g.t() @ x), 2.0 * tokens * hidden * 2 * ffn

    def weight_gradient_fused() -> Any:
        from align_core.megatron.wgrad import _Extension  # noqa: PLC0415

        x, g = noise(tokens, hidden), noise(tokens, 2 * ffn)
        total = torch.zeros(2 * ffn, hidden, device=device)
        _Extension.wgrad_gemm_accum_fp32(x, g, total)
        error = (total - g.t().float() @ x.float()).abs().max() / total.abs().max()
        assert error < 0.01, f"fused weight gradient is off by {error}"
        return lambda: _Extension.wgrad_gemm_accum_fp32(x, g, total), 2.0 * tokens * hidden * 2 * ffn

    def dense(backend: Any, backward: bool) -> Any:
        q, k, v = (noise(tokens // length, heads, length, 128, grad=backward) for _ in range(3))

        def forward() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return timed_attention(forward, (q, k, v), attention_flops, backward)

    def ragged(backward: bool, cudnn: bool) -> Any:
        q, k, v = (noise(tokens, heads, 128, grad=backward) for _ in range(3))
        bounds = torch.arange(0, tokens + 1, length, device=device, dtype=torch.int32)
        varlen._should_use_cudnn = lambda _: cudnn  # torch has the path, switched off; is it faster here?
        causal = {"is_causal": True} if "is_causal" in varlen.varlen_attn.__annotations__ else {"window_size": (-1, 0)}

        def forward() -> torch.Tensor:
            return varlen.varlen_attn(q, k, v, bounds, bounds, length, length, **causal)

        return timed_attention(forward, (q, k, v), attention_flops, backward)

    def elementwise(function: Any, *inputs: torch.Tensor) -> Any:
        return lambda: torch.autograd.grad(value := function(*inputs), inputs, torch.ones_like(value)), None

    def torch_swiglu(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def our_swiglu(x: torch.Tensor) -> torch.Tensor:
        from align_core.megatron.layers import swiglu  # noqa: PLC0415

        return swiglu(x)

    def rotation(x: torch.Tensor) -> torch.Tensor:
        from align_core.megatron.rotary import rotate  # noqa: PLC0415

        return rotate(x, angles, angles)

    angles = torch.rand(tokens, 64, device=device)
    norm = torch.nn.RMSNorm(hidden, eps=1e-5, device=device, dtype=torch.bfloat16)
    return {
        "matrix product": product,
        "weight gradient": weight_gradient,
        "weight gradient, then added in float32": weight_gradient_then_add,
        "weight gradient added in the product": weight_gradient_fused,
        "attention cuDNN, forward": lambda: dense(SDPBackend.CUDNN_ATTENTION, False),
        "attention cuDNN, both": lambda: dense(SDPBackend.CUDNN_ATTENTION, True),
        "attention flash, forward": lambda: dense(SDPBackend.FLASH_ATTENTION, False),
        "attention flash, both": lambda: dense(SDPBackend.FLASH_ATTENTION, True),
        "attention varlen flash, forward": lambda: ragged(False, False),
        "attention varlen flash, both": lambda: ragged(True, False),
        "attention varlen cuDNN, forward": lambda: ragged(False, True),
        "attention varlen cuDNN, both": lambda: ragged(True, True),
        "swiglu torch, both": lambda: elementwise(torch_swiglu, noise(tokens, 2 * ffn, grad=True)),
        "swiglu ours, both": lambda: elementwise(our_swiglu, noise(tokens, 2 * ffn, grad=True)),
        "rotary ours, both": lambda: elementwise(rotation, noise(tokens, heads, 128, grad=True)),
        "rms norm torch, both": lambda: elementwise(norm, noise(tokens, hidden, grad=True)),
        "rms norm torch, weight too": lambda: norm_with_weight(norm, noise(tokens, hidden, grad=True)),
    }


def norm_with_weight(norm: Any, x: Any) -> Any:
    import torch  # noqa: PLC0415

    return lambda: torch.autograd.grad(value := norm(x), (x, norm.weight), torch.ones_like(value)), None


def timed_attention(forward: Any, inputs: Any, flops: float, backward: bool) -> Any:
    import torch  # noqa: PLC0415

    if not backward:
        return forward, flops
    upstream = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), inputs, upstream), 3.5 * flops


def time_of(call: Any, *, cuda: bool) -> float:
    """Milliseconds of one call, the median of eight."""
    import torch  # noqa: PLC0415

    times = []
    for _ in range(11):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[3:])


def release() -> None:
    import gc  # noqa: PLC0415

    import torch  # noqa: PLC0415

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def show(result: dict[str, Any]) -> None:
    shown = {k: round(v, 4) for k, v in result.items() if isinstance(v, float)}
    sys.stdout.write(f"{result['name']}: {result['error'].strip().splitlines()[-1] if 'error' in result else shown}\n")
    sys.stdout.flush()


def write(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    (arguments.out / "training.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    lines = [
        "| variant | layers | micro-batch | tokens/s | MFU | step s | optimizer s | GiB | estimated |",
        "|---|" + "--:|" * 8,
    ]
    for result in results:
        variant = result.get("variant")
        if variant is None:
            continue
        cells = (
            result["name"],
            variant["layers"],
            f"{variant['micro_batch']} x {variant['length']}",
            f"{result['tokens_per_s']:,.0f}",
            f"{result.get('mfu', 0):.1%}",
            f"{result['seconds']:.3f}",
            f"{result.get('seconds_optimizer', 0):.3f}",
            f"{result.get('memory_gib', 0):.1f}",
            f"{result['estimated_gib']:.1f}",
        )
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    for result in results:
        if "error" in result:
            lines += ["", f"{result['name']}: {result['error'].strip().splitlines()[-1]}"]
        for name, found in result.get("operations", {}).items():
            lines.append(f"* {name}: {json.dumps(found)}")
        if "profile" in result:
            lines += ["", f"{result['name']}, seconds on the device by kind: {json.dumps(result['profile'])}"]
    (arguments.out / "training.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
