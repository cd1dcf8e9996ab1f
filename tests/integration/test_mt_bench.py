"""Evaluation over the real parts: a Megatron checkpoint, converted, answers MT-Bench through vLLM; a stub judge; the
report; and the evaluations that stages call on a live engine."""

import json
from pathlib import Path
from typing import cast

import numpy as np
import pytest

pytest.importorskip("vllm")

from align_convert.cli import main as convert
from align_core import registry
from align_core.config import EngineConfig, EvaluationConfig, SamplingConfig
from align_core.contracts import Evaluation
from align_core.text import load_tokenizer
from align_core.tutorial.tiny import make_tiny_model
from align_core.types import Prompt
from align_eval.cli import main
from align_eval.models import running_engine
from align_eval.mt_bench.fastchat import read_answers
from align_eval.mt_bench.folder import Folder
from align_eval.stub_service import StubService

pytestmark = pytest.mark.slow


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two questions, one of them with a reference."""
    folder = tmp_path / "data"
    folder.mkdir()
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["Say a word.", "Another."]},
        {"question_id": 111, "category": "math", "turns": ["1+1?", "2+2?"]},
    ]
    names = ("single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn")
    fields = ("{question} {answer}", "{answer_1} {answer_2}", "{ref_answer_1} {answer}", "{ref_answer_2} {answer_2}")
    prompts = [{"name": n, "system_prompt": "Judge.", "prompt_template": f} for n, f in zip(names, fields)]
    references = [{"question_id": 111, "choices": [{"turns": ["2", "4"]}]}]
    for name, rows in (("question", questions), ("judge_prompts", prompts), ("gpt-4", references)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_megatron_checkpoint_is_answered_judged_and_reported(data: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "hf", seed=3)
    assert convert(["to-megatron", str(tmp_path / "hf"), str(tmp_path / "megatron"), "--tp", "2"]) == 0
    out = ["--out", str(tmp_path / "run"), "--data", str(data)]
    engine = ["--max-tokens", "12", "--context", "128", "--device", "cpu", "--template", "human-assistant"]
    models = ["--model", f"tiny-hf={tmp_path / 'hf'}", "--model", f"tiny-megatron={tmp_path / 'megatron'}"]
    assert main(["mt-bench", "answer", *out, *models, *engine, "--temperature", "0"]) == 0
    folder = Folder(tmp_path / "run")
    hf, megatron = read_answers(folder.answers("tiny-hf")), read_answers(folder.answers("tiny-megatron"))
    assert sorted(hf) == [81, 111]
    assert {q: a.turns for q, a in hf.items()} == {q: a.turns for q, a in megatron.items()}  # the same weights
    with StubService() as service:
        assert main(["mt-bench", "judge", *out, "--judge", "stub", "--url", service.url]) == 0
        assert len(service.requests) == 8
    assert main(["mt-bench", "report", *out]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [(m["model"], m["micro"]["valid"]) for m in report["models"]] == [("tiny-hf", 4), ("tiny-megatron", 4)]
    assert report["differences"][0]["mean"] == 0.0


def test_evaluations_of_stages_leave_the_live_engine_as_it_was(data: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "hf", tmp_path / "out"
    make_tiny_model(model, seed=3)
    tokenizer = load_tokenizer(model)
    tasks = tmp_path / "sums.jsonl"
    tasks.write_text("".join(json.dumps({"prompt": f"{a}+1=", "answer": a + 1}) + "\n" for a in range(8)))
    sampling = SamplingConfig(max_tokens=8, temperature=0.0)
    prompt = Prompt(id=0, tokens=np.asarray(tokenizer.encode_prompt("1+1="), np.int32))
    with running_engine(model, EngineConfig(context=128, device="cpu")) as engine:
        before = engine.generate([prompt], sampling)[0].tokens.tolist()
        for name, given in (("accuracy", tasks), ("mt-bench-answers", data)):
            evaluation = cast("Evaluation", registry.load("align.evaluations", name))
            config = EvaluationConfig(data=given, out=out, context=128, max_tokens=12)
            metrics = evaluation(engine, tokenizer, config, step=5)
            assert metrics
        assert engine.generate([prompt], sampling)[0].tokens.tolist() == before
    items = [json.loads(line) for line in (out / "accuracy_step_5.jsonl").read_text().splitlines()]
    assert [item["answer"] for item in items] == [str(a + 1) for a in range(8)]
    assert sorted(read_answers(Folder(out).answers("step_5"))) == [81, 111]
