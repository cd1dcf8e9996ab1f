"""The command as a user meets it: what it prints, where, and its exit status."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from align_convert import Layout, ModelConfig, PlanError, load_any
from align_convert.cli import main
from align_convert.copy import to_megatron

Make = Callable[..., ModelConfig]
MakeHf = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


def test_there_and_back_and_verified(make_config: Make, make_hf: MakeHf, tmp_path: Path, capsys: Capture) -> None:
    """65184 numbers of 4 bytes; TP 2 repeats 17 norms of 32 and pads two vocabularies from 50 to 56 rows of 32."""
    hf, megatron, back = str(make_hf(make_config())), str(tmp_path / "m"), str(tmp_path / "back")
    assert main(["to-megatron", hf, megatron, "--tp", "2", "--pp", "2", "--vp", "2", "--vocab-divisor", "4"]) == 0
    assert main(["to-hf", megatron, back, "--max-shard-size", "100KB"]) == 0
    assert main(["verify", hf, back]) == 0
    assert main(["verify", megatron, back]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"wrote {megatron}: 4 files of weights, 264.45 kB, float32, in ")
    assert out[1].startswith(f"wrote {back}: 3 files of weights, 260.74 kB, float32, in ")
    assert out[2] == "equal: 75 tensors, 260.74 kB, bit for bit"


def test_verify_names_the_difference_and_exits_1(make_config: Make, make_hf: MakeHf, capsys: Capture) -> None:
    a = make_hf(make_config(), "a")
    b = make_hf(make_config(), "b", extra={"model.norm.weight": torch.ones(32)})
    assert main(["verify", str(a), str(b)]) == 1
    assert capsys.readouterr().out.startswith("different: tensor 'model.norm.weight' differs in 32 of 32 elements")


def test_dry_run_writes_nothing(make_config: Make, make_hf: MakeHf, tmp_path: Path, capsys: Capture) -> None:
    hf, out = str(make_hf(make_config())), str(tmp_path / "out")
    assert main(["to-megatron", hf, out, "--tp", "2", "--dtype", "bfloat16", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"would write {out}: 2 files of weights, ")
    assert lines[0].endswith("bfloat16")
    assert lines[1].startswith("  iter_0000001/mp_rank_00/model_optim_rng.pt  ")
    assert "  tokenizer.model" in lines
    assert lines[-1].endswith("nothing was written")
    assert main(["to-hf", hf, out, "--dry-run"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_inspect_shows_layout_and_tensors(make_config: Make, make_hf: MakeHf, tmp_path: Path, capsys: Capture) -> None:
    hf, megatron = str(make_hf(make_config())), str(tmp_path / "m")
    main(["to-megatron", hf, megatron, "--tp", "2"])
    capsys.readouterr()
    assert main(["inspect", megatron]) == 0
    shown = capsys.readouterr().out
    assert f"{megatron}: megatron torch" in shown
    assert "layout tp: 2" in shown
    assert "layout padded_vocab: 256" in shown
    assert main(["inspect", hf, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["layout"], found["parameters"]) == ("huggingface", {}, 65184)
    assert found["tensors"][0] == {
        "name": "model.embed_tokens.weight",
        "shape": [50, 32],
        "dtype": "float32",
        "bytes": 6400,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--tp", "3"],
            "align-convert: error: tensor parallel size 3 does not divide 4 attention heads; use 1, 2 or 4",
        ),
        (["--pp", "5"], "align-convert: error: pipeline parallel size 5 does not divide 8 layers; use 1, 2, 4 or 8"),
        (["--tp", "0"], "align-convert: error: tp is 0; it must be a positive integer"),
        (["--tp", "two"], "align-convert to-megatron: error: argument --tp: invalid int value: 'two'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_refusals_are_one_line_and_status_2(
    *, make_config: Make, make_hf: MakeHf, tmp_path: Path, capsys: Capture, options: list[str], message: str
) -> None:
    hf = str(make_hf(make_config()))
    assert main(["to-megatron", hf, str(tmp_path / "out"), *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_missing_input_taken_output_and_bad_size_are_refused(
    make_config: Make, make_hf: MakeHf, tmp_path: Path, capsys: Capture
) -> None:
    hf = str(make_hf(make_config()))
    (tmp_path / "file").write_text("x")
    cases = [
        (["to-hf", str(tmp_path / "nowhere"), "out"], "nowhere' is not a directory"),
        (["to-megatron", hf, str(tmp_path / "file")], "exists and is not a directory; give another name"),
        (["to-megatron", hf, str(tmp_path / "file" / "below")], "align-convert: error: "),
        (["to-hf", hf, "out", "--max-shard-size", "big"], "'big' is not a size; write e.g. 500MB, 5GB or 2GiB"),
        ([], "the following arguments are required: COMMAND"),
    ]
    for argv, message in cases:
        assert main(argv) == 2
        assert message in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = "import sys; from align_convert.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, "to-megatron" in done.stdout) == (0, True)


def test_installed_command_runs() -> None:
    program = shutil.which("align-convert", path=str(Path(sys.executable).parent))
    assert program is not None
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[0]) == (0, "align-convert")


def test_reshard_plan_and_json(make_config: Make, make_hf: MakeHf, tmp_path: Path, capsys: Capture) -> None:
    """8 layers as 1, 3, 4 over three stages; every answer one JSON object."""
    hf, first, second = str(make_hf(make_config())), str(tmp_path / "a"), str(tmp_path / "b")
    assert main(["plan", "to-megatron", hf, first, "--tp", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["written"], len(plan["files"])) == (False, 2)
    assert plan["peak_memory_bytes"] <= 512 << 20
    assert not (tmp_path / "a").exists()
    assert main(["to-megatron", hf, first, "--format", "torch_dist", "--memory", "16MiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] is True
    assert main(["reshard", first, second, "--pp", "3", "--chunk-layers", "1,3,4", "--names", "legacy"]) == 0
    capsys.readouterr()
    assert main(["verify", hf, second, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is True
    assert main(["inspect", second, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["layout"]["chunk_layers"]) == ("megatron torch", [1, 3, 4])
    ends = [found["args"][f"decoder_{end}_pipeline_num_layers"] for end in ("first", "last")]
    assert ends == ["1", "4"]
    assert main(["reshard", hf, str(tmp_path / "c")]) == 2
    assert main(["reshard", first, str(tmp_path / "c"), "--pp", "3", "--first-stage-layers", "1", "--json"]) == 2
    assert "cannot be spread evenly" in json.loads(capsys.readouterr().out)["error"]


def test_value_too_large_for_float16_is_named(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    large = torch.full((32,), 7e4)
    hf = make_hf(make_config(), extra={"model.norm.weight": large})
    with pytest.raises(PlanError, match=r"'model.norm.weight' has a value of size 70000, which float16 cannot hold"):
        to_megatron(load_any(hf), tmp_path / "out", layout=Layout(), dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
