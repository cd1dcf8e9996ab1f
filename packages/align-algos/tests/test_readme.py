"""What the README shows must run: its Python blocks one after the other, as a reader would type them."""

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[1] / "README.md"


def test_every_python_block_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, block {number}", "exec"), names)  # noqa: S102
    assert names["logits"].grad.any() and names["hidden"].grad.any() and names["weight"].grad.any()
    assert names["loss"].item() == 1.5
    assert names["offsets"].tolist() == [0, 2, 5]
