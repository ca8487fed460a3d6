"""The door: what a command line composes to, and what a wrong one is told.

pytest tests/test_config.py
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import pickle
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings, strategies as st
from omegaconf import OmegaConf

from lorafit import __main__ as door, config as lorafit_config, launch, schema
from lorafit.config import CONF, Config, check, compose, config_sha256, prepare, quoted, to_dict, unquoted
from lorafit.errors import DivergedError, InputError, Stopped
from lorafit.explain import config_groups, schema_keys
from lorafit.schema import Quant

YAMLS = sorted(CONF.rglob("*.yaml"))
OPTIONS = [path for path in YAMLS if path.parent != CONF]
STUB = "from lorafit.launch import start; start('train', lambda config, folder: print('rank', config.rank))"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has its own working directory, and gets logging back as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    root, handlers, level = logging.getLogger(), logging.getLogger().handlers[:], logging.getLogger().level
    yield
    for handler in {*root.handlers, *logging.getLogger("lorafit.failure").handlers} - set(handlers):
        handler.close()
    root.handlers[:], logging.getLogger("lorafit.failure").handlers[:] = handlers, []
    root.setLevel(level)


Program = Callable[..., tuple[int, str, str]]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """program(run, *arguments) -> (exit code, stdout, stderr), in this process."""

    def call(run: launch.Run, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lorafit train", *arguments])
        code = 0
        try:
            launch.start("train", run)
        except SystemExit as end:
            assert isinstance(end.code, int)
            code = end.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def message(*overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        compose(overrides)
    return str(caught.value)


@functools.cache
def composed(*groups: str) -> Config:
    return compose(groups)


def changed(overrides: str) -> Config:
    """What `compose` would give before its check; one composition serves many wrong values."""
    parts = overrides.split()
    groups = [part for part in parts if part.partition("=")[0] in config_groups()]
    config = copy.deepcopy(composed(*groups))
    for part in parts:
        key, _, value = part.partition("=")
        if part not in groups:
            *path, last = key.split(".")
            node = functools.reduce(getattr, path, config)
            if isinstance(node, dict):
                node[last] = yaml.safe_load(value)
            else:
                setattr(node, last, yaml.safe_load(value))
    return config


# --- the files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.relative_to(CONF).as_posix())
def test_every_yaml_opens_with_a_comment_and_its_command(path: Path) -> None:
    head = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        head.append(line)
    assert "python -m lorafit." in "\n".join(head)
    option = f"{path.parent.relative_to(CONF).as_posix()}={path.stem}"
    plain = option.endswith(("=default", "=causal_lm", "=embedded")) or path.parent.name == "logger"
    assert path.parent == CONF or plain or option in "\n".join(head)


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.relative_to(CONF).as_posix())
def test_every_option_of_every_group_composes(path: Path) -> None:
    overrides = [f"{path.parent.relative_to(CONF).as_posix()}={path.stem}"]
    if path.stem == "gsm8k":  # its data is the user's to give
        overrides.append("data.path=openai/gsm8k")
    config = compose(overrides)
    json.dumps(to_dict(config))


@pytest.mark.parametrize(
    "path",  # a diff (experiment, sweep) sets keys that are explained where they are defined
    [path for path in OPTIONS if path.parent.name not in ("experiment", "sweep")],
    ids=lambda path: path.relative_to(CONF).as_posix(),
)
def test_every_key_of_every_option_is_explained(path: Path) -> None:
    text = path.read_text().partition("defaults:")[0]
    bare = [line for line in text.splitlines() if re.match(r"\w+:", line) and " # " not in line]
    assert bare == []


def test_the_files_give_exactly_the_keys_of_the_schema() -> None:
    given = OmegaConf.to_container(OmegaConf.create(to_dict(compose(["quant=nf4"]))))
    schema = set(schema_keys(Config))
    flat = set()
    for key, value in given.items():
        flat.add(key)
        if isinstance(value, dict) and key != "optimizer":
            flat.update(f"{key}.{name}" for name in value)
    assert flat == schema


# --- the table of the design, row by row ----------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab'\"\\$ {}[],=~/.\té") | st.characters(codec="utf-8", exclude_characters="\n\r")))
def test_a_quoted_text_is_read_as_it_is(text: str) -> None:
    assert unquoted(quoted(text)) == text
    assert OverridesParser.create().parse_override(f"resume={quoted(text)}").value() == text


@pytest.mark.parametrize("name", ["o'brien", "my run", "a+b", "läufe", 'a"b'])
def test_a_path_that_is_yet_to_be_made_may_have_any_name(name: str, tmp_path: Path) -> None:
    [text] = prepare([f"out={tmp_path / name}"])
    assert OverridesParser.create().parse_override(text).value() == str(tmp_path / name)


@pytest.mark.parametrize("value", ["{0}/a,{0}/b", "{0}/run-${{rank}}", "[{0}/a b]", "'{0}/a b'"])
def test_what_has_a_meaning_to_hydra_keeps_it(value: str, tmp_path: Path) -> None:
    text = f"out={value.format(tmp_path)}"
    assert prepare([text]) == [text]


def test_what_stands_without_quotes_is_read_as_hydra_reads_it() -> None:
    assert unquoted("runs/a-1.b") == "runs/a-1.b" and unquoted("16") == "16" and unquoted("") == ""
    assert unquoted("null") is None and unquoted("a\\,b") == "a,b" and unquoted('"a b"') == "a b"
    assert unquoted("o'brien") == "o'brien" and unquoted("[a, b]") == "[a, b]"


@pytest.mark.parametrize(
    ("overrides", "rank", "alpha"),
    [
        ([], 16, 32),
        (["rank=16", "quant=nf4"], 16, 32),
        (["rank=24"], 24, 48),
        (["rank=24", "lora/alpha=equal"], 24, 24),
        (["rank=24", "alpha=7"], 24, 7),
        (["lora/rank=high"], 64, 128),
        (["lora/rank=high", "rank=3"], 3, 6),
        (["rank=3", "lora/rank=high"], 3, 6),
        (["rank=64", "lora/alpha=fixed16"], 64, 16),
        (["lora/rank=tiny", "lora/alpha=equal"], 4, 4),
        (["experiment=smoke", "rank=5"], 5, 10),
    ],
)
def test_alpha_follows_rank_and_a_value_beats_a_file(overrides: list[str], rank: int, alpha: int) -> None:
    config = compose(overrides)
    assert (config.rank, config.alpha) == (rank, alpha)
    assert isinstance(config.alpha, int)


def test_the_default_is_sixteen_bit_and_all_linear_layers() -> None:
    config = compose()
    assert config.target_modules == "all_linear"
    assert config.quant is None
    assert config.model.name == "embedded" and config.data.path == "embedded"
    assert config.logger is not None and config.logger.mode == "offline"


def test_nf4_is_double_quantized_with_bfloat16_compute() -> None:
    quant = compose(["rank=16", "quant=nf4"]).quant
    assert quant == Quant("nf4", True, 64, "bfloat16")


def test_nf4_alone() -> None:
    quant = compose(["quant=nf4", "quant.double_quant=false"]).quant
    assert quant is not None and quant.double_quant is False and quant.type == "nf4"


def test_target_modules_are_a_named_set_or_a_list() -> None:
    assert compose(["lora/target_modules=qv"]).target_modules == ["q_proj", "v_proj"]
    assert compose(["target_modules=[q_proj,k_proj]"]).target_modules == ["q_proj", "k_proj"]
    assert compose(["lora/target_modules=mlp", "target_modules=[c_attn]"]).target_modules == ["c_attn"]


def test_columns_are_given_from_the_shell() -> None:
    columns = {"prompt": "question", "completion": "answer"}
    assert compose(["data.columns={prompt: question, completion: answer}"]).data.columns == columns
    replaced = compose(["experiment=gsm8k", "data.path=a/b", "data.columns={prompt: q}"]).data.columns
    assert replaced == {"prompt": "q", "completion": "answer"}


def test_the_recipe_of_the_qlora_paper() -> None:
    config = compose(["experiment=qlora-paper", "model=llama2-7b"])
    assert (config.rank, config.alpha, config.dropout) == (64, 16, 0.1)
    assert config.quant is not None and config.quant.type == "nf4"
    assert config.optimizer["_target_"] == "bitsandbytes.optim.PagedAdamW32bit"
    assert config.optimizer["lr"] == 2e-4
    assert config.scheduler.name == "constant"
    assert config.trainer.gradient_clip_val == 0.3
    assert config.model.checkpointing == "full"


def test_a_real_model_gets_other_numbers_than_the_embedded_one() -> None:
    small, real = compose(), compose(["model=llama2-7b"])
    assert small.trainer.max_epochs is None and small.trainer.max_steps == 250
    assert real.trainer.max_epochs is None and real.trainer.max_steps is None  # one epoch
    assert small.optimizer["lr"] > real.optimizer["lr"] > 0
    lion = compose(["model=llama2-7b", "optimizer=lion_8bit"]).optimizer
    assert lion["lr"] == pytest.approx(real.optimizer["lr"] / 10) and "eps" not in lion


def test_an_optimizer_takes_more_arguments_with_a_plus_and_fewer_with_a_tilde() -> None:
    assert compose(["+optimizer.amsgrad=true"]).optimizer["amsgrad"] is True
    sgd = compose(["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "~optimizer.eps"]).optimizer
    assert sorted(sgd) == ["_target_", "lr", "weight_decay"]


def test_a_home_directory_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert compose(["data.path=~/rows.jsonl"]).data.path == str(tmp_path / "rows.jsonl")


# --- what a wrong command is told -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("quantt=nf4", "no config group 'quantt'. Did you mean 'quant'?"),
        ("quant=nf5", "no choice 'nf5' in config group 'quant' (fp4, int8, nf4, none). Did you mean 'nf4'?"),
        ("quant=null", "no choice 'null' in config group 'quant' (fp4, int8, nf4, none). Did you mean 'none'?"),
        ("lora/rnk=low", "no config group 'lora/rnk'. Did you mean 'lora/rank'?"),
        (
            "lora/rank=24",
            "no choice '24' in config group 'lora/rank' (high, low, medium, tiny). A value has no slash: rank=24",
        ),
        ("lora.rank=8", "no config key 'lora.rank'. Did you mean 'rank'?"),
        ("rnk=8", "no config key 'rnk'. Did you mean 'rank'?"),
        ("zzzzzzz=8", "no config group or key 'zzzzzzz'"),
        ("model.namee=x", "no config key 'model.namee'. Did you mean 'model.name'?"),
        ("+model.namee=x", "no config key 'model.namee'. Did you mean 'model.name'?"),
        ("+rankk=8", "no config key 'rankk'. Did you mean 'rank'?"),
        ("trainer.max_step=5", "no config key 'trainer.max_step'. Did you mean 'trainer.max_steps'?"),
        ("hydra.run.dirr=x", "no config key 'hydra.run.dirr'. Did you mean 'hydra.run.dir'?"),
        (
            "optimizer.lrr=1",
            "no config key 'optimizer.lrr'. Did you mean 'optimizer.lr'? "
            "An argument that its file does not list: +optimizer.lrr=VALUE",
        ),
        (
            "optimizer=lion_8bit optimizer.eps=1",
            "no config key 'optimizer.eps'. Did you mean 'optimizer.betas'? "
            "An argument that its file does not list: +optimizer.eps=VALUE",
        ),
        ("optimizer.lr=1 trainer.max_epochs=x", "trainer.max_epochs must be an integer, got 'x'"),
        ("+rank=5", "'rank' is there already: write 'rank=5', without the +"),
        ("+experiment=smoke", "'experiment' is there already: write 'experiment=smoke', without the +"),
        ("rank=4,8", "'rank=4,8' lists several values: add -m to run a job for each (a list is written in brackets)"),
        ("quant=nf4,none", "'quant=nf4,none' lists several values: add -m to run a job for each"),
        ("rank", "cannot read the override 'rank': an override is key=value"),
        (
            "data.allow=end_masked",
            "data.allow must be a list, in brackets also where it has one entry: 'data.allow=[A]', 'data.allow=[A,B]'",
        ),
        (
            "data.path=a=b",
            "cannot read the override 'data.path=a=b': "
            "quote a value that holds other signs than letters from a to z, digits and . _ - / : \"key='value'\"",
        ),
        (
            "quant.double_quant=false",
            "quant.double_quant cannot be set, quant is none: choose quant=nf4 (or fp4, int8) as well",
        ),
        (
            "logger=none logger.mode=online",
            "logger.mode cannot be set, logger is none: choose logger=wandb (or csv) as well",
        ),
        ("experiment=gsm8k", "data.path is not set: give data.path=FILE, or a name on the hub"),
        ("rank=0 lora/alpha=equal", "rank must be a positive integer, got 0"),
        ("rank=abc", "rank must be a positive integer, got 'abc'"),
        ("alpha=-1", "alpha must be a positive number, got -1"),
        ("quant=nf4 quant.typ=nf4", "no config key 'quant.typ'. Did you mean 'quant.type'?"),
        ("quant=nf4 quant.block_size=x", "quant.block_size must be an integer, got 'x'"),
        ("trainer.max_steps=abc", "trainer.max_steps must be an integer, got 'abc'"),
        ("dropout=abc", "dropout must be a number, got 'abc'"),
        ("data.packing=maybe", "data.packing must be true or false, got 'maybe'"),
        ("model.name=null", "model.name cannot be null"),
        ("~quant", "quant is not set: give quant=VALUE"),
    ],
)
def test_a_wrong_command_gets_one_line_with_the_nearest_right_one(overrides: str, expected: str) -> None:
    assert message(*overrides.split()) == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("rank=0", "rank must be a positive integer, got 0"),
        ("rank=-4", "rank must be a positive integer, got -4"),
        ("rank=abc", "rank must be a positive integer, got 'abc'"),
        ("rank=true", "rank must be a positive integer, got True"),
        ("rank=1.5", "rank must be a positive integer, got 1.5"),
        ("rank=null", "rank must be a positive integer, got None"),
        ("rank=0 alpha=0", "rank must be a positive integer, got 0"),
        ("alpha=-1", "alpha must be a positive number, got -1"),
        ("alpha=0", "alpha must be a positive number, got 0"),
        ("alpha=.nan", "alpha must be a positive number, got nan"),
        ("dropout=1.0", "dropout must be in [0, 1), got 1.0"),
        ("variant=dora", "variant must be one of lora, rslora, got 'dora'. Did you mean 'lora' or 'rslora'?"),
        ("seed=-1", "seed must be zero or a positive integer, got -1"),
        ("seed=4294967296", "seed must be below 2**32, got 4294967296"),
        ("target_modules=[]", "target_modules must be all_linear or a list of module names, got []"),
        ("quant=nf4 quant.block_size=100", "quant.block_size must be one of 32, 64, 128, 256, 512, got 100"),
        (
            "quant=int8 quant.block_size=64",
            "quant.block_size and quant.double_quant belong to nf4 and fp4, not to int8",
        ),
        (
            "model.dtype=bf16",
            "model.dtype must be one of auto, bfloat16, float16, float32, got 'bf16'. Did you mean 'bfloat16'?",
        ),
        ("data.batch_size=0", "data.batch_size must be a positive integer, got 0"),
        ("data.max_length=1", "data.max_length must be an integer above 1, got 1"),
        ("data.eval_fraction=1.0", "data.eval_fraction must be in (0, 1), got 1.0"),
        (
            'data.columns={"promt":"q"}',
            "data.columns has no entry 'promt' (instruction, output, conversations, messages, prompt, completion, ",
        ),
        ("data.max_lost=2", "data.max_lost must be in [0, 1], got 2"),
        ("data.overflow=cut", "data.overflow must be one of drop, truncate_prompt, truncate, error, got 'cut'"),
        ("data.on_bad_row=skp", "data.on_bad_row must be one of error, skip, got 'skp'. Did you mean 'skip'?"),
        ("data.allow=[answer_lots]", "data.allow: there is no check 'answer_lots' (end_masked, "),
        (
            "data.allow=[no_supervised_token]",
            "data.allow: no_supervised_token cannot be allowed, since there is nothing",
        ),
        ("data.path=[3]", "data.path: a source is a path or a mapping with a path, got 3"),
        ("data.path=[gone.jsonl]", "data.path: no file or folder 'gone.jsonl'"),
        (
            'data.path=[{"path":"embedded","columns":{"promt":"q"}}]',
            "data.path: columns has no entry 'promt' (instruction, ",
        ),
        (
            "data.streaming=true trainer.max_steps=null",
            "data.streaming=true: the data has no known end, so give trainer.max_steps",
        ),
        (
            "data.streaming=true trainer.max_steps=5 trainer.val_check_interval=0.5",
            "data.streaming=true: trainer.val_check_interval must be a number of steps",
        ),
        ("audit.tokens=0", "audit.tokens must be a positive integer, got 0"),
        ("data.columns=q", "data.columns must be like {prompt: question, completion: answer}, got 'q'"),
        ("data.path=nope.jsonl", "data.path: no file or folder 'nope.jsonl'"),
        ("data.path=./nope", "data.path: no file or folder './nope'"),
        ("data.eval_path=a/b/c", "data.eval_path: no file or folder 'a/b/c'"),
        ("data.path=''", "data.path is not set: give data.path=FILE, or a name on the hub"),
        ("model.name=./nope", "model.name: no file or folder './nope'"),
        ("task.retention_path=nope.txt", "task.retention_path: no file 'nope.txt'"),
        ("resume=nope", "resume: no folder 'nope'"),
        ("resume=.", "resume: '.' is no run"),
        ("optimizer.lr=0", "optimizer.lr must be a positive number, got 0"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay must be zero or a positive number, got -1"),
        ("optimizer.betas=[0.9,1]", "optimizer.betas must be numbers in [0, 1), got [0.9, 1]"),
        ("optimizer.eps=0", "optimizer.eps must be a positive number, got 0"),
        ("scheduler.warmup=1.5", "scheduler.warmup must be a fraction in [0, 1) or a whole number of steps, got 1.5"),
        (
            "scheduler.warmup=250",
            "scheduler.warmup must be shorter than the run: 250 steps of warmup, trainer.max_steps is 250",
        ),
        (
            "trainer.max_steps=0",
            "trainer.max_steps must be a positive integer, or -1 or null for none, got 0",
        ),
        (
            "trainer.val_check_interval=1.5",
            "trainer.val_check_interval must be a positive number of steps or a fraction in (0, 1], got 1.5",
        ),
        ("trainer.devices=0", "trainer.devices must be a positive integer or auto, got 0"),
        ("trainer.gradient_clip_val=0.0", "trainer.gradient_clip_val must be a positive number or null, got 0.0"),
        ("logger.mode=ofline", "logger.mode must be one of offline, online, disabled, got 'ofline'. Did you"),
        ("logger=csv logger.mode=online", "logger.type csv takes no other keys: choose logger=wandb with them"),
    ],
)
def test_a_wrong_value_gets_one_line_that_names_it(overrides: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        check(changed(overrides))
    said = str(caught.value)
    assert said.startswith(expected) and "\n" not in said


@pytest.mark.parametrize(
    "target", ["os.system", "torch.optim.sgd.os.system", "builtins.eval", "bitsandbytes.nn.Linear4bit", "3"]
)
def test_only_optimizers_can_be_the_target(target: str) -> None:
    assert "must be a class of torch.optim or bitsandbytes.optim" in message(f"optimizer._target_={target}")


def test_all_wrong_values_are_said_at_once() -> None:
    said = message("rank=0", "dropout=2", "data.batch_size=-3", "data.path=nope.csv")
    assert len(said.splitlines()) == 4


def test_a_near_file_name_is_named_and_an_empty_file_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    assert message("data.path=trian.jsonl") == (
        "data.path: no file or folder 'trian.jsonl'. Did you mean 'train.jsonl'?"
    )
    assert message("data.path=train.jsonl") == "data.path: 'train.jsonl' is empty"
    (tmp_path / "model").mkdir()
    assert message("model.name=./model") == "model.name: the folder './model' is empty"
    (tmp_path / "model" / "notes.txt").write_text("x")
    assert message("model.name=./model") == "model.name: './model' holds no config.json, so it is no model folder"


def test_names_on_the_hub_are_left_to_the_hub() -> None:
    config = compose(["data.path=openai/gsm8k", "model.name=HuggingFaceTB/SmolLM2-135M"])
    assert (config.data.path, config.model.name) == ("openai/gsm8k", "HuggingFaceTB/SmolLM2-135M")


def test_a_very_long_value_is_a_wrong_value_not_a_crash() -> None:
    assert message("data.path='" + "a (b), " * 100 + "'").startswith("data.path: no file or folder")


# --- identity -------------------------------------------------------------------------------------


def test_the_hash_tells_settings_apart_and_ignores_resume(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    plain = config_sha256(compose())
    assert plain == config_sha256(compose(["rank=16", "lora/alpha=double"]))
    assert plain == config_sha256(compose(["resume=run"]))
    assert plain != config_sha256(compose(["seed=43"]))


def test_a_composed_config_passes_its_own_check_again() -> None:
    check(compose(["quant=fp4", "logger=none", "callbacks=none"]))


# --- the program ----------------------------------------------------------------------------------


def test_a_run_gets_its_config_and_its_folder(program: Program) -> None:
    seen = []
    code, out, err = program(lambda config, folder: seen.append((config, folder)), "rank=8", "hydra.run.dir=here")
    assert (code, out, err) == (0, "", "")
    [(config, folder)] = seen
    assert isinstance(config, Config) and config.rank == 8
    assert folder == Path("here").absolute()
    assert yaml.safe_load((folder / ".hydra" / "resolved.yaml").read_text()) == to_dict(config)
    assert (folder / "train.log").is_file()


def test_two_runs_of_one_second_have_two_folders(program: Program) -> None:
    folders: list[Path] = []
    for _ in range(3):
        program(lambda config, folder: folders.append(folder))
    assert len(set(folders)) == 3
    assert all(re.fullmatch(r"\d\d-\d\d-\d\d(-\d)?", folder.name) for folder in folders)


def test_a_sweep_runs_every_combination_in_a_folder_of_its_name(program: Program) -> None:
    seen = {}
    code, out, _ = program(
        lambda config, folder: seen.update({folder.name: (config.rank, config.quant and config.quant.type)}),
        "-m",
        "rank=8,16,32",
        "quant=none,nf4",
        "trainer.max_steps=10",
    )
    assert code == 0
    assert seen == {f"rank={r},quant={q or 'none'}": (r, q) for r in (8, 16, 32) for q in (None, "nf4")}
    assert "HYDRA" not in out and "job 5: rank=32,quant=nf4" in out


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [
        (["sweep=rank"], [4, 8, 16, 32]),
        (["sweep=rank", "rank=5,6"], [5, 6]),
        (["-m", "rank=range(4,9,4)"], [4, 8]),
    ],
)
def test_a_sweep_comes_from_its_file_and_the_command_line_replaces_its_values(
    program: Program, arguments: list[str], ranks: list[int]
) -> None:
    seen: dict[str, int] = {}
    code, _, _ = program(lambda config, folder: seen.update({folder.name: config.rank}), *arguments)
    assert code == 0 and seen == {f"rank={rank}": rank for rank in ranks}


def test_flags_may_stand_anywhere(program: Program) -> None:
    ranks: list[int] = []
    code, _, _ = program(lambda config, folder: ranks.append(config.rank), "alpha=7", "-m", "rank=4")
    assert code == 0 and ranks == [4]


def test_a_sweep_over_quant_takes_keys_of_quant(program: Program) -> None:
    seen = []
    code, _, err = program(lambda c, f: seen.append((f.name, c.quant)), "-m", "quant=fp4", "quant.block_size=128")
    assert (code, err) == (0, "")
    assert seen == [("quant=fp4", Quant("fp4", True, 128, "bfloat16"))]
    code, _, err = program(lambda c, f: None, "-m", "quant=fp4,none", "quant.block_size=128")
    assert code == 2 and "quant.block_size cannot be set, quant is none" in err


@pytest.mark.parametrize(
    ("overrides", "fixed", "name"),
    [
        (["rank=8", "quant=nf4", "trainer.max_steps=10"], ["trainer.max_steps"], "rank=8,quant=nf4"),
        (["sweep=rank", "rank=8"], ["sweep", "rank"], "rank=8"),
        (["lora/rank=low", "target_modules=[q_proj,k_proj]"], [], "lora.rank=low,target_modules=q_proj+k_proj"),
        ([], [], "3"),
    ],
)
def test_a_job_folder_is_named_after_what_differs(overrides: list[str], fixed: list[str], name: str) -> None:
    assert lorafit_config._job_folder(overrides, fixed, 3) == name


def test_job_folders_stay_apart_and_are_safe_for_any_value() -> None:
    values = ["a/b", "a_b", "a:b", "'a b'", "x" * 300, "x" * 301, "../up"]
    names = [lorafit_config._job_folder([f"data.path={value}"], [], 0) for value in values]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w.=,+-]{1,125}", name) for name in names)


def test_a_failed_job_does_not_stop_the_others(program: Program) -> None:
    ran = []

    def run(config: Config, folder: Path) -> None:
        if config.rank == 5:
            raise DivergedError("the loss is nan at step 3")
        ran.append(config.rank)

    code, _, err = program(run, "-m", "rank=5,0,6")
    assert ran == [6]
    assert code == 3
    assert err.splitlines()[-3:] == [
        "lorafit train: 2 of 3 jobs failed:",
        "  rank=5: the loss is nan at step 3",
        "  rank=0: rank must be a positive integer, got 0",
    ]
    [log] = Path().glob("multirun/*/*/rank=5/train.log")
    assert "ERROR lorafit.failure: the loss is nan" in log.read_text()


def test_a_failed_job_lets_go_of_its_memory(program: Program) -> None:
    alive: list[int] = []
    held = []

    class Model:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    def run(config: Config, folder: Path) -> None:
        held.append(len(alive))
        model = Model()
        raise InputError(f"{model} is refused")

    program(run, "-m", "rank=4,8")
    assert held == [0, 0]


def test_a_failed_run_is_one_message_and_its_exit_code(program: Program) -> None:
    def run(config: Config, folder: Path) -> None:
        raise InputError("no rows are left")

    assert program(run, "rank=4") == (2, "", "lorafit train: no rows are left\n")


@pytest.mark.parametrize("arguments", [["rank=4"], ["-m", "rank=4,8"]])
def test_a_signal_ends_a_run_and_a_sweep_with_143(program: Program, arguments: list[str]) -> None:
    ran = []

    def run(config: Config, folder: Path) -> None:
        ran.append(config.rank)
        raise Stopped(signal.SIGTERM)

    code, _, err = program(run, *arguments)
    assert (code, err, ran) == (143, "lorafit train: stopped by SIGTERM\n", [4])


def test_an_interrupt_ends_with_130(program: Program) -> None:
    def run(config: Config, folder: Path) -> None:
        raise KeyboardInterrupt

    assert program(run)[0] == 130


def test_a_bug_shows_its_traceback_and_is_in_the_log(program: Program) -> None:
    def run(config: Config, folder: Path) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        program(run, "hydra.run.dir=here")
    assert "OSError: the disk is full" in Path("here/train.log").read_text()


def test_a_wrong_choice_in_a_sweep_starts_no_job(program: Program) -> None:
    ran: list[int] = []
    code, _, err = program(lambda config, folder: ran.append(config.rank), "-m", "rank=4,8", "quant=none,nf5")
    assert (code, ran) == (2, [])
    assert err.startswith("lorafit train: no choice 'nf5' in config group 'quant'")


def test_a_run_folder_that_cannot_be_made_is_said(program: Program, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, _, err = program(lambda config, folder: None, "hydra.run.dir=file/run")
    assert code == 2 and "file/run" in err and err.count("\n") == 1


def test_groups_of_the_users_own_folder_are_known(program: Program, tmp_path: Path) -> None:
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "data" / "news.yaml").write_text("defaults: [default, _self_]\npath: openai/gsm8k\n")
    paths: list[str] = []
    assert program(lambda c, f: paths.append(c.data.path), "--config-dir", "mine", "data=news")[0] == 0
    assert paths == ["openai/gsm8k"]
    _, _, err = program(lambda c, f: None, "--config-dir", "mine", "data=new")
    assert "Did you mean 'news'?" in err


def test_a_broken_file_of_the_user_is_one_line(program: Program, tmp_path: Path) -> None:
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "data" / "news.yaml").write_text("defaults: [default\npath: {a\n")
    code, _, err = program(lambda c, f: None, "--config-dir", "mine", "data=news")
    assert code == 2 and err.count("\n") == 1


def test_resume_replays_the_overrides_of_a_run_and_of_a_job_of_a_sweep(program: Program) -> None:
    seen: list[tuple[Config, Path]] = []
    program(lambda config, folder: None, "sweep=rank", "rank=4,8", "quant=nf4", "hydra.sweep.dir=all")
    for job in Path("all").glob("rank=*"):
        (job / "checkpoints").mkdir()
        (job / "checkpoints" / "last.ckpt").touch()
    # the folder's name holds a '=', which Hydra alone could not read
    code, _, err = program(lambda config, folder: seen.append((config, folder)), "resume=all/rank=8", "seed=7")
    assert (code, err) == (0, "")
    [(config, folder)] = seen
    assert folder.resolve() == Path("all/rank=8").resolve()  # it goes on in its own folder
    assert (config.rank, config.seed, config.resume) == (8, 7, "all/rank=8")
    assert config.quant is not None


def test_what_a_launcher_sends_to_its_workers_can_be_sent() -> None:
    jobs = pickle.loads(pickle.dumps(launch.Jobs(check)))
    assert jobs.run is check


def test_a_typing_error_is_answered_in_two_seconds_without_torch() -> None:
    probe = f"import sys, atexit; atexit.register(lambda: print('torch' in sys.modules)); {STUB}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", probe, "quantt=nf4"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # time on the processor: on a busy machine the wall clock says more about its neighbours
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert done.returncode == 2
    assert done.stderr == "lorafit train: no config group 'quantt'. Did you mean 'quant'?\n"
    assert done.stdout == "False\n"


# --- one name for all programs --------------------------------------------------------------------


def test_lorafit_lists_its_programs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["lorafit", *arguments])
        door.main()
        said = capsys.readouterr().out
        assert all(f"  {name} " in said for name in door.PROGRAMS)


def test_lorafit_helps_with_the_name_of_a_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lorafit", "trian", "rank=8"])
    with pytest.raises(SystemExit) as end:
        door.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "lorafit: no program 'trian'. Did you mean 'train' or 'ranks'?\n"


def test_a_program_sees_its_overrides_as_its_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Train:
        @staticmethod
        def main() -> None:
            seen.append(sys.argv)

    monkeypatch.setattr(sys, "argv", ["lorafit", "train", "rank=8"])
    monkeypatch.setattr(door.importlib, "import_module", {"lorafit.train": Train}.__getitem__)
    door.main()
    assert seen == [["lorafit train", "rank=8"]]


def test_the_choices_of_the_schema_are_those_of_the_code() -> None:
    """Written twice, since the schema must not import torch."""
    from lorafit.data import corpus, formats, tokens
    from lorafit.data.checks import CHECKS

    choices = schema._CHOICES
    assert choices["data.format"] == formats.FORMATS and schema._COLUMNS == formats.COLUMNS
    assert choices["data.template"] == tokens.TEMPLATES and choices["data.train_on"] == tokens.TRAIN_ON
    assert choices["data.overflow"] == tokens.OVERFLOW and choices["data.system"] == tokens.SYSTEM
    assert choices["data.on_bad_row"] == corpus.ON_BAD_ROW
    assert schema._CHECKS == tuple(CHECKS)


def test_a_list_of_sources_is_taken_as_it_is_written_and_its_paths_are_the_shells(tmp_path: Path) -> None:
    file = Path("rows.jsonl")
    file.write_text('{"text": "a"}\n')
    mixed = compose(["data.path=[rows.jsonl,{path: embedded, weight: 0.3, columns: {prompt: q, completion: a}}]"])
    assert mixed.data.path == [
        "rows.jsonl",
        {"path": "embedded", "weight": 0.3, "columns": {"prompt": "q", "completion": "a"}},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(Path.cwd()))
        assert compose(["data.path=['~/rows.jsonl']"]).data.path == [str(Path.cwd() / "rows.jsonl")]


def test_what_an_audit_shows_is_no_setting_of_the_run() -> None:
    assert config_sha256(compose(["audit.examples=9"])) == config_sha256(compose())
    assert config_sha256(compose(["data.packing=true"])) != config_sha256(compose())
