"""The report from the command line: its figures, its three files, and the page as a browser shows it."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from align_eval.cli import main
from align_eval.mt_bench.folder import Folder
from align_eval.mt_bench.radar import radar_svg
from align_eval.results import write_json
from align_eval.stub_service import StubService, rating_reply

EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">{{ 7 * 7 }}</pre>"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def _reply(messages: Sequence[Any]) -> str:
    """Ratings and winners; nothing readable about questions 95 to 99, and words that try to leave the page."""
    text = messages[1]["content"]
    if re.search(r"First 9[5-9]\?", text):
        return f"{EVIL} I cannot say."
    if "pair" in messages[0]["content"]:
        a, b = re.findall(r"^[AB]: (.*)$", text, re.MULTILINE)[-2:]
        longer = "A" if len(a) > len(b) else "B"  # whatever the order
        return f"{EVIL} [[{'A' if re.search(r'First 81', text) else longer}]]"
    return f"{EVIL} {rating_reply(messages)}"


@pytest.fixture(scope="module")
def judged(data: Path, write_into: Callable[..., Folder], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    """Three models, one of whose answers attacks the page, judged singly and in pairs."""
    root = tmp_path_factory.mktemp("run")
    for model, says in (("alpha", "well"), ("beta", EVIL)):
        write_into(root, model, says=says)
    folder: Folder = write_into(root, "gamma-with-a-longer-name", says="hm")
    for model in ("alpha", "beta"):
        write_json(folder.answer_summary(model), {"model": model, "answered": 160, "cut_off": 3, "template": EVIL})
    with StubService(reply=_reply) as service:
        judge = ["mt-bench", "judge", "--out", str(folder.root), "--data", str(data), "--url", service.url]
        judge += ["--judge", "stub", "--reasks", "0"]
        assert main([*judge, "--samples", "2"]) == 0
        assert main([*judge, "--mode", "pairwise-all"]) == 0
    yield folder


def _report(folder: Folder, data: Path) -> dict[str, Any]:
    assert main(["mt-bench", "report", "--out", str(folder.root), "--data", str(data)]) == 0
    found: dict[str, Any] = json.loads((folder.root / "report.json").read_text())
    return found


def test_figures_are_those_of_the_judgments(judged: Folder, data: Path) -> None:
    """Recomputed from FastChat's file: means by category, turn and all; macro is the mean of the categories."""
    report = _report(judged, data)
    rows = [json.loads(line) for line in judged.fastchat_judgments("stub", "single").read_text().splitlines()]
    assert [model["model"] for model in report["models"]] == ["alpha", "beta", "gamma-with-a-longer-name"]
    for model in report["models"]:
        scored = [r for r in rows if r["model"] == model["model"] and r["score"] != -1]
        assert (model["micro"]["valid"], model["micro"]["expected"]) == (150, 160)
        assert model["micro"]["mean"] == pytest.approx(sum(r["score"] for r in scored) / 150)
        assert model["failures"] == {"no verdict": 10}
        for turn in (1, 2):
            of_turn = [r["score"] for r in scored if r["turn"] == turn]
            assert model["turns"][str(turn)]["mean"] == pytest.approx(sum(of_turn) / len(of_turn))
        means = []
        for index, category in enumerate(report["categories"]):
            ids = range(81 + 10 * index, 91 + 10 * index)
            of_category = [r["score"] for r in scored if r["question_id"] in ids]
            cell = model["categories"][category]
            assert (cell["valid"], cell["expected"]) == (len(of_category), 20)
            assert cell["mean"] == pytest.approx(sum(of_category) / len(of_category))
            assert cell["interval"][0] <= cell["mean"] <= cell["interval"][1]
            means.append(cell["mean"])
        assert model["macro"]["mean"] == pytest.approx(sum(means) / 8)
        assert model["judge_sd"] == 0.0  # the stub judge says the same twice
        assert report["fastchat_means"][model["model"]]["average"] == pytest.approx(model["micro"]["mean"])
    assert len(report["differences"]) == 3
    assert report["order"]["matches"] + report["order"]["failed"] == 3 * 160
    assert report["order"]["failed"] == 3 * 10
    # The longer answer wins in either order (beta, then alpha), but A of question 81, which is a tie.
    wins = {rate["model"]: (rate["wins"], rate["losses"], rate["ties"]) for rate in report["win_rates"]}
    assert wins == {"beta": (296, 0, 4), "alpha": (148, 148, 4), "gamma-with-a-longer-name": (0, 296, 4)}
    assert report["order"]["inconsistent"] == 6


def test_markdown_and_table_say_what_is_missing(judged: Folder, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _report(judged, data)
    shown = capsys.readouterr()
    assert "[10/20]" in shown.out
    text = (judged.root / "report.md").read_text()
    assert "30 of 480 judgments (6%) have no rating (30 no verdict)" in text
    assert "too weak for its figures to mean much" in text
    assert "alpha: 3 of 160 turns were cut off at the token limit" in text
    assert "| roleplay |" in text
    assert "<script" not in text


def test_judge_without_a_single_verdict_is_called_useless(
    data: Path, write_model: Callable[..., Folder], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model("m")
    with StubService(reply=lambda _: "no idea") as service:
        judge = ["mt-bench", "judge", "--out", str(folder.root), "--data", str(data), "--url", service.url]
        assert main([*judge, "--judge", "stub", "--limit", "1"]) == 1
    report = _report(folder, data)
    assert report["models"][0]["micro"] == {"mean": None, "interval": None, "valid": 0, "expected": 16}
    assert "16 of 16 judgments (100%) have no rating (16 no verdict). There are no means" in report["warnings"][0]
    assert "- [0/16]" in capsys.readouterr().out
    assert "<svg" in (folder.root / "report.html").read_text()


def test_page_holds_every_judgment_escaped_and_nothing_from_outside(judged: Folder, data: Path) -> None:
    _report(judged, data)
    page = (judged.root / "report.html").read_text(encoding="utf-8")
    assert page.count("I cannot say.") >= 3 * 10 * 2  # both samples of the unreadable ones
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "<img" not in page
    assert "{{ 7 * 7 }}" in page  # model output is no template
    assert not re.findall(r"(?:src|href)\s*=", page.replace("src=x", ""))
    assert re.findall(r"https?://[^\s\"'<]+", page) == ["http://www.w3.org/2000/svg"] or all(
        url.startswith(("http://www.w3.org/", "http://127.0.0.1")) for url in re.findall(r"https?://[^\s\"'<]+", page)
    )


def test_page_opens_in_a_browser_and_runs_nothing(judged: Folder, data: Path, tmp_path: Path) -> None:
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser to open the page in (looked for {', '.join(BROWSERS)})")
    _report(judged, data)
    page = (judged.root / "report.html").resolve().as_uri()
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--no-first-run", "--disable-sync", "--disable-component-update", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    shot = tmp_path / "page.png"
    shoot = [*command, f"--screenshot={shot}", "--window-size=1200,1800", page]
    subprocess.run(shoot, check=True, capture_output=True, timeout=120)
    assert shot.read_bytes().startswith(b"\x89PNG")
    assert shot.stat().st_size > 50_000  # an empty page of this size takes 10 kB
    dom = subprocess.run(
        [*command[:-2], "--dump-dom", page], check=True, capture_output=True, timeout=120
    ).stdout.decode()
    assert "<title>MT-Bench, judged by stub</title>" in dom  # the attacks would have changed it
    assert dom.count("<details") == 80 + 3 * 160 + 3 * 160
    assert "<svg" in dom
    assert dom.count("<script") == 0


def test_radar_is_a_polygon_a_model_with_escaped_names() -> None:
    """4 axes from the top clockwise; 5 of 10 is halfway out: (240, 200 - 80) for the first."""
    svg = radar_svg(["a", "b", "<c>", "d"], {"<m>": [5.0, 10.0, None, 0.0]})
    assert "240.0,120.0 400.0,200.0 240.0,200.0 240.0,200.0" in svg
    assert "&lt;m&gt;" in svg
    assert "&lt;c&gt; no rating" in svg
    assert "<m>" not in svg
    assert svg.count("<circle") == 4


def test_published_judgments_are_reported_without_answers_or_judge(data: Path, tmp_path: Path) -> None:
    """FastChat's files alone: read strictly, repeated rows once, and the page shows what the judge read."""
    row = {"model": "m", "judge": ["gpt-4", "single-v1"], "user_prompt": "the judge's prompt", "tstamp": 1.0}
    rows = [
        {**row, "question_id": 81, "turn": 1, "judgment": "[[5]], finally [[9]]", "score": 5},
        {**row, "question_id": 81, "turn": 2, "judgment": "[[4]]", "score": 4},
        {**row, "question_id": 81, "turn": 2, "judgment": "[[6]]", "score": 6},
        {**row, "question_id": 82, "turn": 1, "judgment": "as in [1]", "score": 1},
    ]
    file = tmp_path / "gpt-4_single.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = ["--out", str(tmp_path / "out"), "--data", str(data)]
    assert main(["mt-bench", "report", *out, "--judgments", str(file)]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (model,) = report["models"]
    assert report["judge"] == "gpt-4"
    assert (model["micro"]["mean"], model["micro"]["valid"]) == (7.5, 2)
    assert model["failures"] == {"no verdict": 1, "not judged": 157}
    assert (tmp_path / "out" / "report.html").read_text().count("the judge&#39;s prompt") == 3


def test_published_judgments_of_several_judges_are_reported_one_judge_at_a_time(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"model": "m", "user_prompt": "?", "tstamp": 1.0, "question_id": 81, "turn": 1}
    file = tmp_path / "both.jsonl"
    judged = (("gpt-4", 9), ("claude", 2))
    rows = [{**row, "judge": [name, "single-v1"], "judgment": f"[[{n}]]", "score": n} for name, n in judged]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    report = ["mt-bench", "report", "--out", str(tmp_path / "out"), "--data", str(data), "--judgments", str(file)]
    for more in ([], ["--compatible"]):
        assert main([*report, *more]) == 2
        assert "several judges have judged here; choose with --judge: 'claude' or 'gpt-4'" in capsys.readouterr().err
    for name, score in judged:
        assert main([*report, "--judge", name]) == 0
        made = json.loads((tmp_path / "out" / "report.json").read_text())
        assert (made["judge"], made["models"][0]["micro"]["mean"]) == (name, score)
        assert main([*report, "--judge", name, "--compatible"]) == 0
        assert f"{score}.000000" in capsys.readouterr().out
    assert main([*report, "--judge", "three"]) == 2
    assert "no judgments of 'three'; there are those of 'claude' or 'gpt-4'" in capsys.readouterr().err


def test_what_is_missing_or_ambiguous_is_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["mt-bench", "report", "--out", str(tmp_path), "--data", str(data)]
    assert main(out) == 2
    assert "holds no judgments; run `align-eval mt-bench judge` first" in capsys.readouterr().err
    for judge in ("one", "two"):
        write_json(Folder(tmp_path).judge_summary(judge, "single"), {"judge": judge})
    assert main(out) == 2
    assert "several judges have judged here; choose with --judge: 'one' or 'two'" in capsys.readouterr().err
    assert main([*out, "--judge", "three"]) == 2
    assert "no judgments of 'three'; there are those of 'one' or 'two'" in capsys.readouterr().err
