"""`align-eval mt-bench answer`: from options to answer files."""

import argparse
import asyncio
from collections.abc import Mapping
from functools import partial

from align_core.errors import ConfigError
from align_core.fingerprint import fingerprint
from align_core.text import load_tokenizer, resolve_template
from align_eval.errors import UnansweredError
from align_eval.judges import make_judge
from align_eval.models import check_directories, engine_class, hugging_face, model_names, running_engine
from align_eval.mt_bench.answering import answer_with_engine, answer_with_service, template_hash
from align_eval.mt_bench.fastchat import write_answers
from align_eval.mt_bench.folder import Folder
from align_eval.mt_bench.questions import Bench, load_bench
from align_eval.mt_bench.sheet import KEY_FIELDS, AnswerSettings, AnswerSheet
from align_eval.options import engine_config, progress_bar, say, service_config
from align_eval.results import write_json
from align_eval.store import Store

INCOMPLETE = 1  # exit status: some questions have no answer


def run(arguments: argparse.Namespace) -> int:
    """Answers with every model that is named; what was answered before is kept."""
    bench = load_bench(arguments.data, limit=arguments.limit)
    folder = Folder(arguments.out)
    if arguments.url is None:
        return _by_engine(arguments, bench, folder)
    if arguments.template != "auto":
        raise ConfigError(f"the service applies its own template; --template {arguments.template} is for directories")
    return max([_by_service(arguments, bench, folder, model) for model in arguments.model])


def export_answers(folder: Folder, sheet: AnswerSheet, *, extra: Mapping[str, object]) -> None:
    """Writes the answers that are complete, and how they were made."""
    write_answers(folder.answers(sheet.model), sheet.answers())
    write_json(folder.answer_summary(sheet.model), {**sheet.summary(), **extra})


def _by_engine(arguments: argparse.Namespace, bench: Bench, folder: Folder) -> int:
    models = model_names(arguments.model)
    check_directories(models)
    config = engine_config(arguments)
    engine_class(config.name)
    for name, path in models.items():
        directory = hugging_face(path, work=folder.converted())
        tokenizer = load_tokenizer(directory)
        template = resolve_template(tokenizer, arguments.template)
        settings = AnswerSettings(
            source=f"{fingerprint(path)} {config.name} {config.dtype} {config.context}",
            template=template,
            template_hash=template_hash(tokenizer, template),
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
        )
        with Store(folder.answer_store(name), KEY_FIELDS) as store:
            sheet = AnswerSheet(name, bench.questions, settings, store)
            total, done = sheet.counts()
            if done < total:
                with running_engine(directory, config) as engine, progress_bar(name, total=total, done=done) as advance:
                    answer_with_engine(engine, tokenizer, sheet, context=config.context, progress=advance)
            export_answers(folder, sheet, extra={"path": str(path), "engine": config.name, "dtype": config.dtype})
        say(f"{name}: {total} turns in {folder.answers(name)}")
    return 0


def _by_service(arguments: argparse.Namespace, bench: Bench, folder: Folder, model: str) -> int:
    name, equals, served = model.partition("=")
    config = service_config(arguments, model=served if equals else name)
    settings = AnswerSettings(
        source=f"{config.base_url} {config.model} {config.extra}".strip(),
        template="server",
        template_hash="",
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    make = partial(make_judge, config, accept_empty=arguments.accept_empty)
    make()  # a missing key is found before anything is written
    with Store(folder.answer_store(name), KEY_FIELDS) as store:
        sheet = AnswerSheet(name, bench.questions, settings, store)
        total, done = sheet.counts()

        async def answer() -> list[UnansweredError]:
            service = make()
            try:
                with progress_bar(name, total=total, done=done) as advance:
                    return await answer_with_service(service, sheet, at_once=2 * config.concurrency, progress=advance)
            finally:
                await service.close()

        try:
            unanswered = asyncio.run(answer())
        finally:
            export_answers(folder, sheet, extra={"url": config.base_url, "served": config.model})
    if unanswered:
        say(f"{name}: {len(unanswered)} questions have no answer, for example: {unanswered[0]}. Run again to continue.")
        return INCOMPLETE
    say(f"{name}: {total} turns in {folder.answers(name)}")
    return 0
