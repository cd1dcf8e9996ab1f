"""Logits of a Megatron directory by megatron-core's GPTModel on gloo: one process a rank, each loading its own files.

The model is built and the pipeline driven here, so nothing of ours lies between the files and the logits but the
loading itself: `load_state_dict` of `torch` files, every tensor of which must have its place, and
`dist_checkpointing.load` at its default strictness of `torch_dist` ones. megatron-core takes CUDA for granted; these
processes, which do nothing else, tell it otherwise.
"""

import contextlib
import io
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch._C._distributed_c10d import FileStore

from align_convert.config import ModelConfig
from align_convert.errors import ConfigError, FormatError
from align_convert.formats.dist_reader import DistReader
from align_convert.formats.megatron_args import knows_rope_scaling, rope_args
from align_convert.formats.megatron_files import model_keys, rank_file
from align_convert.formats.megatron_reader import MegatronReader
from align_convert.layout import Layout, Rank, layers_of


@dataclass(frozen=True, slots=True)
class _Job:
    """What every process is told."""

    folder: Path
    config: ModelConfig
    layout: Layout
    is_dist: bool
    tokens: torch.Tensor
    store: Path
    result: Path
    save: Path | None


def megatron_logits(
    source: MegatronReader | DistReader, tokens: torch.Tensor, *, layout: Layout | None = None, save: Path | None = None
) -> torch.Tensor:
    """Logits (or scores) of a Megatron directory, float32.

    Args:
        tokens: int64 [sequences, length].
        layout: for `torch_dist`, the one to load under; `torch` files have their own.
        save: a directory for megatron-core to save the loaded model into, as `torch_dist`.
    Returns:
        [sequences, length, vocabulary or 1].
    Raises:
        ConfigError: the model has settings that this comparison does not know.
    """
    is_dist = isinstance(source, DistReader)
    chosen = layout if layout is not None and is_dist else source.layout
    if chosen.vocab_divisor > source.config.vocab_size and is_dist and layout is None:
        chosen = Layout(vocab_divisor=chosen.vocab_divisor)
    _check(source.config, chosen)
    world = chosen.tp * chosen.pp
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "logits.pt"
        job = _Job(
            folder=source.location.folder,
            config=source.config,
            layout=chosen,
            is_dist=is_dist,
            tokens=tokens,
            store=Path(scratch) / "store",
            result=result,
            save=save,
        )
        torch.multiprocessing.spawn(_process, (job, world), nprocs=world)  # type: ignore[attr-defined,no-untyped-call]
        logits: torch.Tensor = torch.load(result, weights_only=True)
    width = 1 if source.config.head != "lm" else source.config.vocab_size
    return logits[..., :width]


def _check(config: ModelConfig, layout: Layout) -> None:
    if not knows_rope_scaling(config):
        raise ConfigError(f"megatron-core cannot compute rope scaling {config.rope_scaling!r}; compare bits instead")
    if config.head == "pooler" or layout.ep > 1:
        raise ConfigError("--logits does not know heads of two layers and expert parallelism; compare bits instead")


def _process(rank: int, job: _Job, world: int) -> None:
    """One rank: load, compute, hand the last stage's logits back."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        _pretend_cuda()
        from megatron.core import dist_checkpointing, parallel_state  # noqa: PLC0415 # optional, and only in here
    dist.init_process_group("gloo", store=FileStore(str(job.store), world), rank=rank, world_size=world)
    layout = job.layout
    with contextlib.redirect_stdout(io.StringIO()):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
        )
    here = Rank(
        tp=parallel_state.get_tensor_model_parallel_rank(), pp=parallel_state.get_pipeline_model_parallel_rank()
    )
    state = None if job.is_dist else _load(rank_file(job.folder, layout, here))
    fused = state is not None and any("linear_qkv.layer_norm_weight" in name for name in state[model_keys(layout)[0]])
    chunks = [_build(job.config, layout, Rank(tp=here.tp, pp=here.pp, vp=vp), fused=fused) for vp in range(layout.vp)]
    if state is not None:
        for chunk, key in zip(chunks, model_keys(layout), strict=True):
            chunk.load_state_dict({k: v for k, v in state[key].items() if v is not None}, strict=False)
            _check_loaded(chunk, set(state[key]))
    else:
        sharded = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
        loaded = dist_checkpointing.load(sharded, str(job.folder))
        for i, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[f"model{i}"])
    if job.save is not None:
        dist_checkpointing.save({"model": chunks[0].sharded_state_dict()}, str(job.save))
    logits = _forward(chunks, job, here)
    if here.is_last(Layout(pp=layout.pp, vp=1)) and here.tp == 0:
        torch.save(logits, job.result)
    dist.barrier()
    dist.destroy_process_group()


def _load(path: Path) -> dict[str, Any]:
    """As Megatron loads it: torch's restricted unpickler with Namespace allowed."""
    with torch.serialization.safe_globals([Namespace]):
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def _check_loaded(model: nn.Module, given: set[str]) -> None:
    """What strict loading would refuse, had every spec the same empty extra states."""
    wanted, found = ({name for name in names if "_extra_state" not in name} for names in (model.state_dict(), given))
    if wanted != found:
        raise FormatError(f"megatron-core and the file do not hold the same tensors: {sorted(wanted ^ found)[:4]}")


def _pretend_cuda() -> None:
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_: self
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *_: None
    from megatron.core import tensor_parallel  # noqa: PLC0415
    from megatron.core.transformer.moe import moe_utils  # noqa: PLC0415

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 forgets to, where there is no Transformer Engine

    class NoTracker:
        """Random states of a GPU; nothing here is random."""

        @contextlib.contextmanager
        def fork(self, *_: object) -> Iterator[None]:
            yield

    tensor_parallel.get_cuda_rng_tracker = NoTracker


def _build(config: ModelConfig, layout: Layout, rank: Rank, *, fused: bool) -> Any:
    """One pipeline chunk of GPTModel, its weights not yet set."""
    from megatron.core.models.gpt import GPTModel  # noqa: PLC0415
    from megatron.core.transformer import TransformerConfig  # noqa: PLC0415

    options = _transformer_options(config, layout)
    rope = rope_args(config.rope_scaling)
    if layout.chunk_layers is not None:
        drawn = [["decoder"] * count for count in layout.chunk_layers]
        drawn[0], drawn[-1] = ["embedding", *drawn[0]], [*drawn[-1], "loss"]
        options["pipeline_model_parallel_layout"] = drawn
    model: Any = GPTModel(
        config=TransformerConfig(**options),
        transformer_layer_spec=_spec(config, fused=fused),
        vocab_size=layout.padded_vocab(config.vocab_size),
        max_sequence_length=config.max_positions,
        pre_process=rank.is_first(),
        post_process=rank.is_last(layout),
        parallel_output=False,
        share_embeddings_and_output_weights=config.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=config.rope_theta,
        rope_scaling=rope["use_rope_scaling"],
        rope_scaling_factor=rope["rope_scaling_factor"],
        seq_len_interpolation_factor=rope["rotary_seq_len_interpolation_factor"],
        vp_stage=rank.vp if layout.vp > 1 else None,
    )
    if config.head == "score" and rank.is_last(layout):
        model.output_layer = _Score(config.hidden_size)
    if len(model.decoder.layers) != len(layers_of(config.num_layers, layout, rank)):
        raise FormatError(f"megatron-core puts {len(model.decoder.layers)} layers on {rank}; the plan says otherwise")
    return model.eval()


def _transformer_options(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    fusions = ("gradient_accumulation", "bias_activation", "masked_softmax", "bias_dropout", "apply_rope")
    options: dict[str, Any] = {f"{name}_fusion": False for name in fusions}
    if config.num_experts is not None:
        options |= {
            "num_moe_experts": config.num_experts,
            "moe_ffn_hidden_size": config.expert_ffn_size,
            "moe_router_topk": config.experts_per_token,
            "moe_router_pre_softmax": not config.renormalizes_experts,
            "moe_token_dispatcher_type": "allgather",
            "moe_router_load_balancing_type": "none",
        }
    return options | {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_size,
        "num_attention_heads": config.num_heads,
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim,
        "layernorm_epsilon": config.norm_eps,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": bool(config.table.megatron_args.get("add_qkv_bias")),
        "qk_layernorm": bool(config.table.megatron_args.get("qk_layernorm")),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vp if layout.vp > 1 else None,
        "pipeline_dtype": torch.float32,
    }


def _spec(config: ModelConfig, *, fused: bool) -> Any:
    """megatron-core's local layer spec; with fused norms, one whose tensors are named as Transformer Engine's."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: PLC0415
    from megatron.core.tensor_parallel import ColumnParallelLinear  # noqa: PLC0415
    from megatron.core.transformer.identity_op import IdentityOp  # noqa: PLC0415

    qk_norm = bool(config.table.megatron_args.get("qk_layernorm"))
    spec = get_gpt_layer_local_spec(num_experts=config.num_experts, qk_layernorm=qk_norm, normalization="RMSNorm")
    if not fused:
        return spec

    class NormThenLinear(ColumnParallelLinear):  # type: ignore[misc]
        """A column-parallel linear layer with the norm before it in one module."""

        def __init__(self, input_size: int, output_size: int, **options: Any) -> None:
            super().__init__(input_size, output_size, **options)
            self.layer_norm_weight = nn.Parameter(torch.ones(input_size))

        def forward(self, hidden: torch.Tensor, *rest: Any, **options: Any) -> Any:
            shape = (hidden.shape[-1],)
            normed = nn.functional.rms_norm(hidden, shape, self.layer_norm_weight, config.norm_eps)
            return super().forward(normed, *rest, **options)

    parts = spec.submodules
    parts.input_layernorm = IdentityOp
    parts.self_attention.submodules.linear_qkv = NormThenLinear
    if config.num_experts is None:
        parts.pre_mlp_layernorm = IdentityOp
        parts.mlp.submodules.linear_fc1 = NormThenLinear
    return spec


class _Score(nn.Module):
    """One number a token."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))

    def forward(self, hidden: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        return nn.functional.linear(hidden, self.weight), None


@torch.no_grad()
def _forward(chunks: list[Any], job: _Job, here: Rank) -> torch.Tensor:
    """Through the pipeline, virtual chunk by virtual chunk; the ranks of a stage are neighbours in the world."""
    layout, tokens = job.layout, job.tokens
    sequences, length = tokens.shape
    positions = torch.arange(length).expand(sequences, length)
    mask = torch.ones(1, 1, length, length).triu(1).bool()
    before, after = ((here.pp + step) % layout.pp * layout.tp + here.tp for step in (-1, 1))
    output = torch.empty(0)
    for vp, chunk in enumerate(chunks):
        rank = Rank(pp=here.pp, vp=vp)
        if not rank.is_first():
            received = torch.empty(length, sequences, job.config.hidden_size)
            dist.recv(received, before)
            chunk.set_input_tensor([received])
        output = chunk(tokens, positions, mask)
        if not rank.is_last(layout):
            dist.send(output.contiguous(), after)
    return output.float()
