"""The CPU path of megatron-core: refusals, and that torch itself stays as it is."""

import megatron.core
import pytest
import torch

from align_core.errors import AlignError
from align_core.megatron import cpu


def test_an_untested_megatron_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "installed", lambda: False)
    monkeypatch.setattr(megatron.core, "__version__", "9.9.9")
    with pytest.raises(AlignError, match=r"megatron-core 9\.9\.9 has not been tested on CPU; run: pip install"):
        cpu.install()


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without CUDA")
def test_torch_itself_stays_as_it_is() -> None:
    cpu.install()
    cpu.install()
    assert cpu.installed()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1).cuda()
    with cpu.tensors_stay():
        assert torch.zeros(1).cuda().device.type == "cpu"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1).cuda()


def test_inside_megatron_core_cuda_means_the_cpu() -> None:
    cpu.install()
    from megatron.core import utils

    assert utils.torch.zeros(2, device="cuda").device.type == "cpu"
    assert utils.torch.cuda.current_device() == torch.device("cpu")
    assert utils.torch.nn is torch.nn
