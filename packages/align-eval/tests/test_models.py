"""Names of model directories, and their conversion."""

from pathlib import Path

import pytest

from align_core.errors import CheckpointError, ConfigError
from align_eval.models import hugging_face, model_names


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


def test_megatron_checkpoint_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, work = tmp_path / "sft", tmp_path / "work"
    model.mkdir()
    assert hugging_face(model, work=work) == model
    (model / "latest_checkpointed_iteration.txt").write_text("1")
    calls: list[list[str]] = []

    def convert(argv: list[str]) -> int:
        calls.append(argv)
        Path(argv[2]).mkdir()
        return 0

    monkeypatch.setattr("align_core.registry.load", lambda group, name: convert)
    converted = hugging_face(model, work=work)
    assert converted.parent == work
    assert hugging_face(model, work=work) == converted
    assert calls == [["to-hf", str(model), str(converted)]]
    (model / "latest_checkpointed_iteration.txt").write_text("2")
    monkeypatch.setattr("align_core.registry.load", lambda group, name: lambda argv: 2)
    with pytest.raises(CheckpointError, match="could not be converted"):
        hugging_face(model, work=work)
