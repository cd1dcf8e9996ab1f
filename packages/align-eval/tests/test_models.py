"""Names and fingerprints of model directories."""

from pathlib import Path

import pytest

from align_core.errors import ConfigError
from align_eval.models import model_names


def test_models_are_named_by_their_shortest_distinct_ends() -> None:
    assert list(model_names(["runs/sft"])) == ["sft"]
    assert list(model_names(["runs/sft/hf", "runs/dpo/hf/"])) == ["sft-hf", "dpo-hf"]
    assert model_names(["before=runs/sft/hf", "runs/dpo/hf"]) == {
        "before": Path("runs/sft/hf"),
        "hf": Path("runs/dpo/hf"),
    }


@pytest.mark.parametrize("model", ["=runs/sft", "sft=", "a/b=runs/sft"])
def test_malformed_model_name_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="NAME=DIR"):
        model_names([model])
