"""Judging from the command line against a service that misbehaves: nothing lost, nothing twice, nothing made up."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from align_eval.cli import main
from align_eval.mt_bench.fastchat import SingleRow, read_pairs, read_single
from align_eval.mt_bench.folder import Folder
from align_eval.mt_bench.verdicts import strict_rating
from align_eval.stub_service import StubService, rating_reply

WriteModel = Callable[..., Folder]
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align_eval.judges._FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def _arguments(folder: Folder, data: Path, service: StubService, *more: object) -> list[str]:
    common = ["mt-bench", "judge", "--out", str(folder.root), "--data", str(data), "--url", service.url]
    return [*common, "--judge", "stub", *map(str, more)]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _without_time(path: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "tstamp"} for row in _rows(path)]


def test_faults_lose_nothing_and_cost_little_time(data: Path, write_model: WriteModel) -> None:
    """160 judgments, 6 at a time, 0.25 s each, a third of them after 1 or 2 faults of every kind, a tenth slow.

    Ideal: all that the service worked on (failed attempts too), divided by 6. What the client, on this thread, waited
    for a core is not its doing; none waits for it on a quiet machine. No request takes as long as the time limit.
    """
    folder = write_model("m")
    options = ("--concurrency", 6, "--timeout", 20, "--max-tokens", 100)
    with StubService(seconds=0.25, fault_share=0.33, slow_share=0.1, hang_seconds=1.0) as service:
        begin, starved = time.monotonic(), _starved_s()
        assert main(_arguments(folder, data, service, *options)) == 0
        seconds, starved = time.monotonic() - begin, _starved_s() - starved
        met = Counter(request["status"] for request in service.requests)
        ideal = service.seconds_worked / 6
    assert met["200"] == 160
    assert all(met[fault] for fault in ("429", "500", "hang", "malformed", "truncated", "empty", "broken")), met
    rows = read_single([folder.fastchat_judgments("stub", "single")])
    assert Counter((row.question_id, row.turn) for row in rows) == Counter(
        (number, turn) for number in range(81, 161) for turn in (1, 2)
    )
    for row in rows:
        assert row.score == strict_rating(row.judgment)
    assert seconds - starved <= 1.3 * ideal, f"{seconds:.2f} s, ideal {ideal:.2f} s, {starved:.2f} s without a core"


def _starved_s() -> float:
    """Seconds that this thread could have run and had no core, as Linux counts them; 0 where it does not."""
    path = Path("/proc/thread-self/schedstat")
    return int(path.read_text().split()[1]) / 1e9 if path.exists() else 0.0


def test_killed_ten_times_ends_in_the_same_file(data: Path, write_model: WriteModel) -> None:
    whole, killed = write_model("m", folder="whole"), write_model("m", folder="killed")
    store = killed.judgment_store("stub")
    seen: list[bytes] = []
    with StubService(seconds=0.15, fault_share=0.2, faults=("429", "500", "empty"), retry_after="0.05") as service:
        assert main(_arguments(whole, data, service, "--concurrency", 16)) == 0
        first = len(service.requests)
        command = [sys.executable, "-m", "align_eval", *_arguments(killed, data, service, "--concurrency", 4)]
        for _ in range(10):
            before = len(store.read_bytes().splitlines()) if store.exists() else 0
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            while len(store.read_bytes().splitlines() if store.exists() else []) < before + 3:
                assert process.poll() is None
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            seen.append(store.read_bytes())
        assert subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
        again = len(service.requests) - first
    final = store.read_bytes()
    for earlier in seen:  # what was there stays there, byte for byte, but for half a line
        assert final.startswith(earlier[: earlier.rfind(b"\n") + 1])
    assert _without_time(killed.fastchat_judgments("stub", "single")) == _without_time(
        whole.fastchat_judgments("stub", "single")
    )
    assert len(final.splitlines()) == 160
    # A kill loses at most the requests under way: 4, each perhaps in its second or third attempt.
    assert again <= first + 10 * 4 * 3


@pytest.mark.parametrize(("status", "message"), [(401, "Incorrect API key provided"), (400, "maximum context length")])
def test_refusal_stops_at_once_and_keeps_what_is_there(
    data: Path, write_model: WriteModel, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model("m")
    with StubService() as service:
        assert main(_arguments(folder, data, service, "--limit", 1)) == 0
    with StubService(refuse=(status, message), seconds=0.05) as service:
        assert main(_arguments(folder, data, service, "--concurrency", 4)) == 2
        assert len(service.requests) <= 8
    assert f"HTTP {status}: {message}" in capsys.readouterr().err
    assert len(_rows(folder.judgment_store("stub"))) == 16


def test_key_is_in_no_file_and_no_output(
    data: Path, write_model: WriteModel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    folder = write_model("m")
    with StubService(key=KEY) as service:
        assert main(_arguments(folder, data, service, "--key-variable", "MY_KEY")) == 0
        assert main(["mt-bench", "report", "--out", str(folder.root), "--data", str(data)]) == 0
    with StubService(key="other") as service:
        assert main(_arguments(folder, data, service, "--key-variable", "MY_KEY", "--seed", 9)) == 2
    shown = capfd.readouterr()
    assert "***" in shown.err
    assert KEY not in shown.out + shown.err
    files = [path for path in folder.root.rglob("*") if path.is_file()]
    assert len(files) >= 8
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path


def _first_turns(folder: Folder) -> dict[int, SingleRow]:
    rows = read_single([folder.fastchat_judgments("stub", "single")])
    return {row.question_id: row for row in rows if row.turn == 1}


def _talks(words: dict[str, Sequence[str]]) -> Callable[[Sequence[Any]], str]:
    """A judge whose replies to a conversation about question N are `words[N]`, one a re-ask; else a rating."""

    def reply(messages: Sequence[Any]) -> str:
        asked = sum(message["role"] == "user" for message in messages) - 1
        for number, replies in words.items():
            if f"First {number}?" in messages[1]["content"] and "Then" not in messages[1]["content"]:
                return replies[min(asked, len(replies) - 1)]
        return rating_reply(messages[:2])

    return reply


def test_unreadable_verdict_is_asked_for_again_and_then_failed(data: Path, write_model: WriteModel) -> None:
    words = {"81": ["It is good.", "[[7]]"], "82": ["no idea"], "83": ["[[11]]", "[[10]]"], "84": ["x " * 200]}
    folder = write_model("m")
    with StubService(reply=_talks(words)) as service:
        arguments = _arguments(folder, data, service, "--max-tokens", 100)
        assert main(arguments) == 0
        requests = len(service.requests)
        assert requests == 156 + 2 + 3 + 2 + 3
        assert main(arguments) == 0  # a verdict that could not be had is a result: nothing is asked again
        assert len(service.requests) == requests
    scores = _first_turns(folder)
    assert [scores[n].score for n in (81, 82, 83, 84)] == [7, -1, 10, -1]
    assert scores[81].judgment == "It is good.\n\n[[7]]"
    summary = json.loads(folder.judge_summary("stub", "single").read_text())
    assert [summary[n] for n in ("judgments", "with_verdict", "no_verdict", "cut_off", "asked_again")] == [
        160,
        158,
        1,
        1,
        4,
    ]


def test_too_many_missing_verdicts_are_status_1(data: Path, write_model: WriteModel) -> None:
    folder = write_model("m")
    with StubService(reply=_talks({"81": ["no"], "82": ["no"]})) as service:
        assert main(_arguments(folder, data, service, "--max-failures", 0.01)) == 1
        assert main(_arguments(folder, data, service, "--max-failures", 0.02)) == 0


def test_compatible_reading_asks_once_and_takes_the_first_bracket(data: Path, write_model: WriteModel) -> None:
    folder = write_model("m")
    with StubService(reply=_talks({"81": ["[[5]] or rather [[9]]"], "82": ["see [1]"], "83": ["none"]})) as service:
        assert main(_arguments(folder, data, service, "--compatible")) == 0
        assert len(service.requests) == 160
    rows = _first_turns(folder)
    assert [rows[n].score for n in (81, 82, 83)] == [5, 1, -1]


def test_changed_answer_prompt_or_setting_is_judged_again(data: Path, write_model: WriteModel) -> None:
    folder = write_model("m")
    with StubService() as service:
        assert main(_arguments(folder, data, service)) == 0
        path = folder.answers("m")
        rows = _rows(path)
        rows[0]["choices"][0]["turns"][1] = "something else"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(_arguments(folder, data, service)) == 0
        assert len(service.requests) == 160 + 1  # the second turn alone
        rows[0]["choices"][0]["turns"][0] = "something else"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(_arguments(folder, data, service)) == 0
        assert len(service.requests) == 160 + 1 + 2
        assert main(_arguments(folder, data, service, "--temperature", 0.5)) == 0
        assert len(service.requests) == 2 * 160 + 1 + 2
    assert len(_rows(folder.fastchat_judgments("stub", "single"))) == 160


def test_samples_give_their_median(data: Path, write_model: WriteModel) -> None:
    """Three samples of one answer, 3, 9 and 4 in the order of their seeds: 4, and the words of that sample."""
    folder = write_model("m")
    with StubService() as service:
        service.reply = lambda _: "never"
        original = service._respond
        scores = {0: 3, 1: 9, 2: 4}

        def respond(handler: Any, body: Any) -> str:
            service.reply = lambda _: f"[[{scores[body['seed']]}]]"
            return original(handler, body)

        service._respond = respond  # type: ignore[method-assign]
        assert main(_arguments(folder, data, service, "--samples", 3, "--limit", 1, "--concurrency", 1)) == 0
        assert len(service.requests) == 48
    rows = read_single([folder.fastchat_judgments("stub", "single")])
    assert {(row.score, row.judgment) for row in rows} == {(4.0, "[[4]]")}


def test_pairs_are_judged_in_both_orders(data: Path, write_model: WriteModel) -> None:
    """The judge likes the answer that says "good", and A when neither or both do."""

    def reply(messages: Sequence[Any]) -> str:
        text = messages[1]["content"]
        good = [line.partition(":")[0] for line in text.splitlines() if "good" in line]
        return f"[[{good[0] if len(set(good)) == 1 else 'A'}]]"

    write_model("base"), write_model("plain")
    folder = write_model("better", says="good")
    with StubService(reply=reply) as service:
        baseline = ("--mode", "pairwise-baseline", "--baseline", "base", "--limit", 1)
        assert main(_arguments(folder, data, service, *baseline)) == 0
        assert len(service.requests) == 2 * 8 * 2 * 2  # models, questions, turns, orders
        rows = read_pairs([folder.fastchat_judgments("stub", "pair")])
        found = Counter((row.model_1, row.model_2, row.g1_winner, row.g2_winner) for row in rows)
        assert found == {("better", "base", "model_1", "model_1"): 16, ("plain", "base", "model_1", "model_2"): 16}
        assert main(_arguments(folder, data, service, "--mode", "pairwise-all", "--limit", 1)) == 0
        assert len(service.requests) == 64 + 32  # of the three pairs only better-plain is new
    assert len(read_pairs([folder.fastchat_judgments("stub", "pair")])) == 48


def test_dry_run_counts_and_asks_nothing(
    data: Path, write_model: WriteModel, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = write_model("m")
    prices = tmp_path / "prices.json"
    prices.write_text('{"stub": {"prompt": 10, "completion": 1000}}')
    with StubService() as service:
        assert main(_arguments(folder, data, service, "--limit", 1)) == 0
        capsys.readouterr()
        assert main(_arguments(folder, data, service, "--dry-run", "--prices", prices, "--max-tokens", 100)) == 0
        assert len(service.requests) == 16
    told = " ".join(capsys.readouterr().err.split())
    assert "160 calls of stub (0 of 160 judgments are there)" in told
    assert "16,000 completion tokens" in told
    # 16,000 x 1000 / 1e6 = 16 dollars and a few cents for the prompts.
    assert "about $16." in told


def test_budget_stops_before_it_is_passed_and_a_higher_one_continues(
    data: Path, write_model: WriteModel, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each reply costs 6 tokens x 1000 / 1e6 = 0.006 and each request may cost 0.1: 0.5 allows about 67 of 160."""
    folder = write_model("m")
    prices = tmp_path / "prices.json"
    prices.write_text('{"stub": {"prompt": 0, "completion": 1000}}')
    with StubService() as service:
        limits = ("--prices", prices, "--max-tokens", 100, "--concurrency", 2, "--budget")
        assert main(_arguments(folder, data, service, *limits, 0.5)) == 2
        assert "budget of $0.50" in capsys.readouterr().err
        done = len(_rows(folder.judgment_store("stub")))
        assert len(service.requests) == done
        assert 0.5 - 0.1 - 4 * 0.1 <= 0.007 * done <= 0.5
        assert main(_arguments(folder, data, service, *limits, 5)) == 0
        assert len(service.requests) == 160


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "1"], "needs the judge's price"),
        (["--samples", "0"], "samples and max-tokens must be at least 1"),
        (["--baseline", "m"], "goes with --mode pairwise-baseline"),
        (["--mode", "pairwise-all"], "pairs need two models, there is 'm'"),
        (["--mode", "pairwise-baseline", "--baseline", "m"], "pairs need two models"),
        (["--model", "x"], "no answers of 'x'"),
        (["--references", "nowhere"], "references are 'corrected' or 'original' or a file"),
        (["--concurrency", "0"], "concurrency must be greater than 0"),
        (["--url", "ftp://x"], "base_url must begin with"),
        (["--url", "https://judge.example/v1"], "OPENAI_API_KEY, which is not set"),
    ],
)
def test_bad_options_are_told_before_anything_is_asked_or_written(
    data: Path, write_model: WriteModel, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model("m")
    with StubService() as service:
        assert main([*_arguments(folder, data, service), *options]) == 2
        assert not service.requests
    assert message in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in folder.root.iterdir()] == ["model_answer"]


def test_missing_answers_are_named(data: Path, write_model: WriteModel, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model("m")
    path = folder.answers("m")
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[2:]))
    with StubService() as service:
        assert main(_arguments(folder, data, service)) == 2
    assert "'m' lacks answers to 2 of 80 questions: 81, 82" in " ".join(capsys.readouterr().err.split())
