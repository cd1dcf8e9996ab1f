"""Turns the two halves of each head by the angle of its token, in one pass over memory, from strided views.

Legend: P tokens, A heads, D features a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS = 4  # heads a program: enough work to hide latency, few registers


def rotate(x_PAD: Tensor, cos_PE: Tensor, sin_PE: Tensor, *, backwards: bool) -> Tensor:
    """The rotated copy, contiguous.

    Args:
        x_PAD: any strides, features adjacent.
        cos_PE: float32 [P, D/2], contiguous, and so is `sin_PE`.
        backwards: turn the other way, which is the gradient.
    """
    x_PAD = x_PAD if x_PAD.stride(-1) == 1 else x_PAD.contiguous()
    tokens, heads, features = x_PAD.shape
    result = torch.empty(x_PAD.shape, dtype=x_PAD.dtype, device=x_PAD.device)
    half = features // 2
    _rotate[(tokens, triton.cdiv(heads, _HEADS))](
        x_PAD,
        cos_PE,
        sin_PE,
        result,
        x_PAD.stride(0),
        x_PAD.stride(1),
        heads,
        half,
        -1.0 if backwards else 1.0,
        HEADS=_HEADS,
        HALF=triton.next_power_of_2(half),
    )
    return result


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]  # noqa: PLR0917  (a kernel has no keywords)
    x, cos, sin, result, token_stride, head_stride, heads, half, sign, HEADS: tl.constexpr, HALF: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    feature = tl.arange(0, HALF)[None]
    inside = (head < heads) & (feature < half)
    c = tl.load(cos + token * half + feature, mask=feature < half, other=0.0)
    s = tl.load(sin + token * half + feature, mask=feature < half, other=0.0) * sign
    source = x + token * token_stride + head * head_stride + feature
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    target = result + (token * heads + head) * 2 * half + feature
    tl.store(target, first * c - second * s, mask=inside)
    tl.store(target + half, second * c + first * s, mask=inside)
