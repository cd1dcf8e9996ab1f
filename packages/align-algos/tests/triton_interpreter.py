"""Checks of test_fused.py with Triton's interpreter in place of a GPU. Not a test file; started by test_fused.py."""

import contextlib
import warnings

import torch

import test_fused
from align_algos import softmax_blocks


def main() -> None:
    """Runs every float32 and bf16 check; prints how many ran."""
    softmax_blocks.use_triton = lambda logits: logits.dtype != torch.float64
    torch.cuda.device = lambda _: contextlib.nullcontext()
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy, of exp(lowest float - x) in the interpreter
    ran = 0
    for dtype in (torch.float32, torch.bfloat16):
        case = test_fused.make_case(dtype)
        for entropy in (False, True):
            for temperature, block, keep in ((1.0, 256, 0), (0.7, 256, 2)):
                test_fused.check_logprobs(case, temperature=temperature, block=block, keep=keep, entropy=entropy)
                ran += 1
        for temperature, rows in ((1.0, 1), (0.7, 16)):
            test_fused.check_cross_entropy(case, temperature=temperature, rows=rows)
            ran += 1
        test_fused.check_expanded_gradient(case)
        test_fused.check_not_finite(case)
        ran += 2
    print("ran", ran)


if __name__ == "__main__":
    main()
