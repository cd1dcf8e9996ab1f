"""Compares each kernel's values and gradients with plain torch in float64; prints the names of those that agree."""

import sys

import torch


def check_swiglu(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Widths below, at and beyond one block."""
    from align_core.megatron.kernels.swiglu import SwiGluFunction  # triton is not everywhere

    for rows, width in ((3, 5), (2, 1024), (4, 2500)):
        gate_up, upstream = _noise(device, dtype, rows, 1, 2 * width), _noise(device, dtype, rows, 1, width)
        found = _with_grad(SwiGluFunction.apply, gate_up, upstream)
        expected = _with_grad(
            lambda x: torch.nn.functional.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], gate_up.double(), upstream
        )
        _compare(found, expected, tolerance)


def check_rotary(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Strided heads, as they are cut out of the joint projection; numbers of heads and features that fill no block."""
    from align_core.megatron.kernels import rotary

    for heads, features in ((3, 6), (4, 64), (8, 128)):
        joint = _noise(device, dtype, 5, heads, 3 * features)
        x = joint[..., features : 2 * features]
        angles = torch.randn(5, features // 2, device=device)
        cos, sin = angles.cos().contiguous(), angles.sin().contiguous()
        for backwards in (False, True):
            first, second = x.double().chunk(2, -1)
            c, s = cos[:, None].double(), (-sin if backwards else sin)[:, None].double()
            expected = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
            _compare([rotary.rotate(x, cos, sin, backwards=backwards)], [expected], tolerance)


def _with_grad(function, x, upstream):  # type: ignore[no-untyped-def]
    x = x.detach().requires_grad_()
    value = function(x)
    return [value.detach(), *torch.autograd.grad(value, x, upstream.to(value.dtype))]


def _noise(device: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _compare(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=tolerance, rtol=tolerance)


if __name__ == "__main__":
    torch.manual_seed(0)
    check_swiglu("cpu", torch.float32, 1e-5)
    sys.stdout.write("swiglu\n")
    check_rotary("cpu", torch.float32, 1e-5)
    sys.stdout.write("rotary\n")
