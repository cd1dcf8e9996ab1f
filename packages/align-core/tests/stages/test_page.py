"""The page of a run says what its files say, and nothing that a model says can act in it."""

import html
import re
from collections.abc import Callable
from typing import Any

import pytest

from align_core.cli import main
from align_core.errors import DataError
from align_core.stages.online_dpo import run_online_dpo
from align_core.stages.page import write_page
from align_core.stages.run import Run, markdown_table, read_lines, read_metrics

pytestmark = [pytest.mark.usefixtures("length"), pytest.mark.draws_pages]


def test_finished_run_has_a_page_with_its_figures_and_samples(
    make_config: Callable[..., Any], fake_world: Callable[..., Any]
) -> None:
    config = make_config("online-dpo", samples=1)
    run_online_dpo(config, fake_world())
    page = (config.out / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", page)))
    lines = read_metrics(config.out)
    assert f"reward of the samples 6 {lines[0]['reward']:.4g} {lines[-1]['reward']:.4g}" in text
    assert "6 of 6 steps" in text
    assert "generate" in text and "batch_size: 4" in text
    assert "<svg" in page
    for row in read_lines(config.out / "samples.jsonl")[::5]:
        assert f"{row['reward']:.3g}" in text


def test_what_a_model_says_is_no_markup(make_config: Callable[..., Any]) -> None:
    config = make_config("online-dpo")
    run = Run(config)
    run.log(0, {"reward": 1.0})
    script = "<script>alert('x')</script>"
    row = {"prompt": script, "reply": script, "reward": 1.0, "extracted": script, "finish_reason": "stop"}
    run.samples(0, [row])
    page = write_page(config.out).read_text(encoding="utf-8")
    assert script not in page
    assert page.count("&lt;script&gt;alert") == 3


def test_completion_that_could_not_be_scored_is_shown_with_the_reason(make_config: Callable[..., Any]) -> None:
    config = make_config("online-dpo")
    run = Run(config)
    run.log(0, {"reward": 1.0})
    row = {
        "prompt": "p",
        "reply": "r",
        "reward": None,
        "extracted": "",
        "error": "no <number>",
        "finish_reason": "stop",
    }
    run.samples(0, [row])
    page = write_page(config.out).read_text(encoding="utf-8")
    assert ">failed</td>\n<td>no &lt;number&gt;</td>" in page


def test_page_of_a_run_under_way_by_command(make_config: Callable[..., Any]) -> None:
    config = make_config("sft")
    Run(config).log(0, {"loss": 1.0})
    assert main(["report", str(config.out)]) == 0
    assert "1 of 6 steps" in (config.out / "report.html").read_text(encoding="utf-8")


def test_directory_without_a_run_is_refused(make_config: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="holds no run with a finished step"):
        write_page(make_config("sft").out)


def test_markdown_table_by_hand() -> None:
    table = markdown_table([{"reply": "a|b\n<i>", "reward": 0.5}])
    assert table.splitlines() == ["| reply | reward |", "| --- | --- |", "| a&#124;b<br>&lt;i> | 0.5 |"]
