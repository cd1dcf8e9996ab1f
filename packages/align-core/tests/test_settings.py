"""Settings from recipes, YAML files and options: which one wins, and what a wrong one is told."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from align_core import recipes
from align_core.config import DpoConfig, GrpoConfig, OnlineDpoConfig, RewardConfig, RlhfConfig, SftConfig, StageConfig
from align_core.errors import ConfigError
from align_core.recipes import smollm2, tiny
from align_core.settings import known_keys, parse
from align_core.stages.continuing import plain

PLACES = ["--model", "m", "--data", "d.jsonl", "--out", "o"]
STAGES = {"sft": SftConfig, "reward": RewardConfig, "dpo": DpoConfig, "grpo": GrpoConfig, "online-dpo": OnlineDpoConfig}


def sft(*words: str) -> SftConfig:
    return parse(SftConfig, [*PLACES, *words], stage="sft")


def grpo(*words: str) -> GrpoConfig:
    return parse(GrpoConfig, [*PLACES, *words], stage="grpo")


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_are_those_of_the_classes() -> None:
    for stage, kind in STAGES.items():
        expected = kind(model=Path("m"), data=Path("d.jsonl"), out=Path("o"))
        assert parse(kind, PLACES, stage=stage) == expected


def test_option_wins_over_file_and_file_over_recipe(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "steps: 10\noptimizer:\n  lr: 1e-5\n  warmup_steps: 0\n")
    recipe = tiny.sft(Path(), Path(), Path())
    made = sft("--recipe", "tiny", "--config", path, "--steps", "7")
    assert (made.steps, made.optimizer.lr) == (7, 1e-5)
    assert (made.batch_size, made.parallel) == (recipe.batch_size, recipe.parallel)
    assert (made.model, made.data, made.out) == (Path("m"), Path("d.jsonl"), Path("o"))


@pytest.mark.parametrize("form", [["--config={}"], ["--config", "{}"]])
def test_option_wins_over_a_file_that_comes_after_it(tmp_path: Path, form: list[str]) -> None:
    path = write(tmp_path / "a.yaml", "steps: 10\n")
    assert sft("--steps", "7", *(word.format(path) for word in form)).steps == 7


def test_later_file_wins_over_an_earlier_one(tmp_path: Path) -> None:
    first, second = (write(tmp_path / f"{n}.yaml", f"steps: {n}0\n{extra}") for n, extra in ((1, "seed: 5\n"), (2, "")))
    made = sft("--config", first, "--config", second)
    assert (made.steps, made.seed) == (20, 5)


def test_part_of_a_group_leaves_the_rest_at_the_stages_own_default() -> None:
    """Eight samples are GRPO's default; SamplingConfig alone has one."""
    assert grpo("--sampling.max_tokens", "9").sampling.n == 8


def test_places_may_come_from_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "model: x\ndata: y\nout: z\ncluster:\n  address: auto\n")
    made = parse(SftConfig, ["--config", path], stage="sft")
    assert (made.model, made.data, made.out, made.cluster.address) == (Path("x"), Path("y"), Path("z"), "auto")


@pytest.mark.parametrize("stage", STAGES)
def test_written_settings_give_the_same_settings_again(tmp_path: Path, stage: str) -> None:
    """OUT/config.yaml of a run is a valid --config."""
    made = tiny.STAGES[stage](Path("m"), Path("d"), Path("o"))
    path = write(tmp_path / "config.yaml", yaml.safe_dump(plain(made)))
    assert parse(type(made), ["--config", path], stage=stage) == made


@pytest.mark.parametrize("words", [["--optimizer.learning_rat", "1"], ["--optimizer.learning_rat=1"]])
def test_unknown_option_names_its_siblings_only(words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        sft(*words)
    message = str(caught.value)
    assert message.startswith("unknown setting 'optimizer.learning_rat'")
    assert "choose 'optimizer.beta1', 'optimizer.beta2', " in message
    assert "batch_size" not in message


@pytest.mark.parametrize(
    ("option", "near", "sibling"),
    [
        ("optimizer.beta3", "optimizer.beta", "optimizer.lr"),
        ("batchsize", "batch_size", "max_length"),
        ("optimiser", "optimizer", "max_length"),
        ("quite.another", None, "max_length"),
    ],
)
def test_unknown_key_hints_at_the_nearest(tmp_path: Path, option: str, near: str | None, sibling: str) -> None:
    *branches, leaf = option.split(".")
    text = (
        "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(branches))
        + f"{'  ' * len(branches)}{leaf}: 1\n"
    )
    path = write(tmp_path / "a.yaml", text)
    for words in ([f"--{option}", "1"], ["--config", path]):
        with pytest.raises(ConfigError) as caught:
            sft(*words)
        assert (f"did you mean '{near}" in str(caught.value)) if near else ("did you mean" not in str(caught.value))
        assert f"'{sibling}'" in str(caught.value)
    assert str(caught.value).startswith(f"{path}: unknown setting ")


def test_unknown_group_lists_the_keys_of_the_nearest_group_only() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'optimizer.lr'\? choose 'optimizer.beta1', ") as caught:
        sft("--optimiser.lr", "1")
    assert "batch_size" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", "many", "steps must be a whole number, got 'many'"),
        ("steps", "2.5", "steps must be a whole number, got '2.5'"),
        ("optimizer.lr", "fast", "optimizer.lr must be a number, got 'fast'"),
        ("parallel.sequence", "perhaps", "parallel.sequence must be true or false, got 'perhaps'"),
        ("optimizer.schedule", "cosin", "must be 'constant', 'cosine' or 'linear', got 'cosin'"),
        ("optimizer.lr", "-1", "lr must be greater than 0, got -1.0"),
    ],
)
def test_wrong_value_is_named_with_what_was_expected(tmp_path: Path, key: str, value: str, message: str) -> None:
    branch, _, leaf = key.rpartition(".")
    path = write(tmp_path / "a.yaml", f"{branch}:\n  {leaf}: {value}\n" if branch else f"{leaf}: {value}\n")
    for words in ([f"--{key}", value], ["--config", path]):
        with pytest.raises(ConfigError, match=message):
            sft(*words)


def test_wrong_value_of_a_file_names_the_file(tmp_path: Path) -> None:
    right, wrong = write(tmp_path / "a.yaml", "steps: 5\n"), write(tmp_path / "b.yaml", "optimizer:\n  lr: fast\n")
    files = ["--config", right, "--config", wrong]
    for words in (files, [*files, "--optimizer.lr", "1"]):
        with pytest.raises(ConfigError) as caught:
            sft(*words)
        assert str(caught.value) == f"{wrong}: optimizer.lr must be a number, got 'fast'"
    with pytest.raises(ConfigError) as caught:
        sft("--config", right, "--steps", "many")
    assert str(caught.value) == "steps must be a whole number, got 'many'"
    with pytest.raises(ConfigError) as caught:
        sft("--config", write(tmp_path / "c.yaml", "trackers: wandb\n"))
    assert str(caught.value) == f"{tmp_path / 'c.yaml'}: trackers must be a list or null, got 'wandb'"


@pytest.mark.parametrize("name", ["recipe", "dry-run"])
def test_option_that_is_no_setting_belongs_on_the_command_line(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.yaml", f"{name}: tiny\n")
    with pytest.raises(ConfigError) as caught:
        sft("--config", path)
    assert str(caught.value) == f"{path}: {name!r} is no setting; give --{name} on the command line"


def test_printed_settings_are_a_settings_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*PLACES, "--recipe", "tiny", "--steps", "77"]
    with pytest.raises(SystemExit):
        parse(SftConfig, [*words, "--dry-run", "--print_config"], stage="sft")
    path = write(tmp_path / "a.yaml", capsys.readouterr().out)
    assert parse(SftConfig, ["--config", path], stage="sft") == parse(SftConfig, words, stage="sft")


@pytest.mark.parametrize(("value", "shown"), [("null", "null"), ("5", "5")])
def test_group_without_settings_is_refused(tmp_path: Path, value: str, shown: str) -> None:
    path = write(tmp_path / "a.yaml", f"cluster: {value}\n")
    message = f"cluster is a group of settings, got {shown}; set 'cluster.address', "
    with pytest.raises(ConfigError, match=message):
        sft("--config", path)


def test_missing_places_are_named_as_options() -> None:
    with pytest.raises(ConfigError, match=r"^align sft needs --data, --out$"):
        parse(SftConfig, ["--model", "m"], stage="sft")


@pytest.mark.parametrize("words", [["stray"], ["-x"], ["--steps"]])
def test_words_that_are_no_options_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"unrecognized arguments|expected one argument"):
        sft(*words)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is not YAML"), ("- 1\n", "must hold keys and values, found a list"), ("", "found a NoneType")],
)
def test_file_that_holds_no_settings_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "a.yaml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        sft("--config", path)
    assert str(caught.value).startswith(path)


def test_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"settings file 'nowhere.yaml' does not exist"):
        sft("--config", "nowhere.yaml")


def test_unknown_recipe_and_stage_that_a_recipe_lacks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown recipe 'tinny'; did you mean 'tiny'\? choose .*'smollm2', .*or 'tiny'"
    ):
        sft("--recipe", "tinny")
    monkeypatch.setattr(tiny, "STAGES", {"grpo": tiny.grpo})
    with pytest.raises(ConfigError, match="unknown stage of recipe tiny 'sft'; choose 'grpo'"):
        sft("--recipe=tiny")


@pytest.mark.parametrize("recipe", [tiny, smollm2])
@pytest.mark.parametrize("stage", STAGES)
def test_recipe_reaches_the_stage_whole(recipe: object, stage: str) -> None:
    name = str(recipe.__name__).removeprefix(f"{recipes.__name__}.")  # type: ignore[attr-defined]
    expected: StageConfig = recipe.STAGES[stage](Path("m"), Path("d.jsonl"), Path("o"))  # type: ignore[attr-defined]
    assert parse(type(expected), [*PLACES, "--recipe", name], stage=stage) == expected


def test_recipe_of_rlhf_leaves_the_reward_model_to_the_user() -> None:
    with pytest.raises(ConfigError, match="reward 'model' needs the directory of a reward model"):
        parse(RlhfConfig, [*PLACES, "--recipe", "tiny"], stage="rlhf")
    made = parse(RlhfConfig, [*PLACES, "--recipe", "tiny", "--reward_model", "rm"], stage="rlhf")
    assert made == dataclasses.replace(tiny.rlhf(Path("m"), Path("d.jsonl"), Path("o")), reward_model=Path("rm"))


def test_rewards_and_their_settings_by_options(tmp_path: Path) -> None:
    words = [
        "--reward",
        "command=2,format=0.5",
        "--scoring.command",
        '["python3", "a b.py"]',
        "--scoring.pattern",
        "x.*",
    ]
    made = grpo(*words, "--loss.variant", "gspo", "--loss.clip_high", "0.01", "--correction.method", "masked")
    assert (made.reward, made.scoring.command) == ("command=2,format=0.5", ("python3", "a b.py"))
    assert made.loss.clip == (3e-4, 0.01)
    path = write(tmp_path / "again.yaml", yaml.safe_dump(plain(made)))
    assert grpo("--config", path) == made
    with pytest.raises(ConfigError, match=r"unknown variant 'gpso'; did you mean 'gspo'\? choose 'cispo', 'dapo'"):
        grpo("--loss.variant", "gpso")


def test_contradictions_are_checked_after_all_has_been_read() -> None:
    """The recipe's two ranks and in_process exclude each other, whichever comes from where."""
    with pytest.raises(ConfigError, match="in_process runs one rank, but parallel asks for 2"):
        sft("--recipe", "tiny", "--cluster.in_process", "true")
    assert sft("--recipe", "tiny", "--cluster.in_process", "true", "--parallel.tensor", "1").cluster.in_process


def test_known_keys_are_branches_and_leaves() -> None:
    keys = set(known_keys(GrpoConfig))
    assert {"optimizer", "optimizer.lr", "reward_model_parallel.tensor", "sampling.n"} <= keys
    assert all(key.rpartition(".")[0] in keys for key in keys if "." in key)


def test_texts_and_tokens_that_end_a_completion_are_lists(tmp_path: Path) -> None:
    config = grpo("--sampling.stop", '["\\n\\n", "####"]', "--sampling.stop_tokens", "[5, 7]")
    assert config.sampling.stop == ("\n\n", "####")
    assert config.sampling.stop_tokens == (5, 7)
    path = write(tmp_path / "settings.yaml", yaml.safe_dump({"sampling": plain(config.sampling)}))
    assert grpo("--config", path).sampling == config.sampling


def test_an_empty_text_ends_nothing() -> None:
    with pytest.raises(ConfigError, match="empty text"):
        grpo("--sampling.stop", '[""]')


@pytest.mark.parametrize(
    "words",
    [
        ["--training.recompute_modules", "norm", "--training.recompute_modules", "mlp"],
        ["--training.recompute_modules", '["norm", "mlp"]'],
    ],
)
def test_lists_of_words_come_one_by_one_or_as_a_list(words: list[str]) -> None:
    places = ["--model", "m", "--data", "d", "--out", "o", "--training.recompute=selective"]
    assert parse(SftConfig, [*places, *words], stage="sft").training.recompute_modules == ("norm", "mlp")
    one = parse(SftConfig, [*places, "--training.recompute_modules=norm"], stage="sft")
    assert one.training.recomputed == {"norm"}
    with pytest.raises(ConfigError, match="must be a list of 'activation', 'attention', 'mlp' or 'norm', got 'all'"):
        parse(SftConfig, [*places, "--training.recompute_modules", "all"], stage="sft")
