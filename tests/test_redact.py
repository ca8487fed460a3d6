"""Secrets become *** wherever something is written down.

pytest tests/test_redact.py
"""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from programs import run_program
from rich.table import Table

from lorafit import train
from lorafit.files import write_json
from lorafit.redact import MASK, redact, redact_logs, redact_values
from lorafit.terminal import _Patient, say

MARK = "mark-5c1e-of-a-secret"
SMALL = (
    "trainer.max_steps=2",
    "task.generate_examples=1",
    "task.eval_examples=2",
    "task.retention_path=general.txt",
    "trainer.accelerator=cpu",
    "rank=2",
)


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Three variables that hold secrets, in an empty folder of work."""
    marks = {name: f"mark-{name.lower()}-5c1e" for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_PASSWORD")}
    for name, mark in marks.items():
        monkeypatch.setenv(name, mark)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "general.txt").write_text("Bees tell each other where flowers are by dancing on the comb.")
    return marks


def holders(folder: Path, marks: dict[str, str]) -> list[str]:
    """The files and names below a folder that hold a mark."""
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        found += [f"{path}: {name}" for name, mark in marks.items() if mark.encode() in content or mark in path.name]
    return found


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "MY_SECRET", "DB_PASSWORD"])
def test_the_value_of_a_variable_named_as_a_secret_is_masked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, MARK)
    assert redact(f"at {MARK}/x") == f"at {MASK}/x"
    assert redact_values({MARK: [MARK, 1, (MARK,)]}) == {MASK: [MASK, 1, [MASK]]}
    monkeypatch.delenv(name)
    assert redact(MARK) == MARK


def test_a_value_shorter_than_eight_characters_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "model")
    assert redact("a model") == "a model"


@pytest.mark.parametrize("text", ["hf_" + "a1" * 17, "hf_oauth_" + "a1" * 17, "wandb_v1_abcdefgh123"])
def test_texts_shaped_like_keys_and_passwords_in_urls_are_masked(text: str) -> None:
    assert redact(f"<{text}>") == f"<{MASK}>"


@pytest.mark.parametrize("given", ["me:word", ":word", "me:w@rd", "me:w:rd"])
def test_passwords_in_addresses_are_masked(given: str) -> None:
    assert redact(f"see https://{given}@host:80/x?a=b@c now") == f"see https://{MASK}@host:80/x?a=b@c now"
    for innocent in ("http://localhost:8080/a@b", '{"u":"http://h:80","e":"a@b.c"}'):
        assert redact(innocent) == innocent


@pytest.mark.parametrize(
    ("name", "value", "path"),
    [
        ("HF_HOME", "~/hub", "hub/token"),
        ("HF_TOKEN_PATH", "~/mine", "mine"),
        ("XDG_CACHE_HOME", "~/other", "other/huggingface/token"),
        ("NETRC", "~/passwords", "passwords"),
    ],
)
def test_the_files_that_logins_leave_are_found_where_their_libraries_look(
    name: str, value: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HF_HOME", "HF_TOKEN_PATH", "XDG_CACHE_HOME", "NETRC"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(name, value)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    login = f"machine api.wandb.ai login user password {MARK}" if name == "NETRC" else MARK
    (tmp_path / path).write_text(login + "\n")
    assert redact(f"<{MARK}>") == f"<{MASK}>"


def test_the_token_file_of_the_hub_is_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "token").write_text(MARK + "\n")
    assert redact(MARK) == MASK


def test_json_the_terminal_and_logs_do_not_hold_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", MARK)
    write_json(tmp_path / "x.json", {"name": MARK})
    say(MARK)
    before, stream = logging.getLogRecordFactory(), io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("test.redact")
    logger.addHandler(handler)
    try:
        redact_logs()
        try:
            raise ValueError(MARK)
        except ValueError:
            logger.exception("it is %s", MARK)
    finally:
        logging.setLogRecordFactory(before)
        logger.removeHandler(handler)
    assert json.loads((tmp_path / "x.json").read_text()) == {"name": MASK}
    written = capsys.readouterr().out + stream.getvalue()
    assert MARK not in written and written.count(MASK) == 3 and "Traceback" in written


def test_a_secret_is_masked_as_json_python_and_addresses_spell_it(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = 'mark "of\\a" secret/ä'
    monkeypatch.setenv("MY_PASSWORD", secret)
    assert redact(json.dumps([secret])) == f'["{MASK}"]'
    assert redact(f"{secret!r}") == f"'{MASK}'"
    assert redact("https://host/?key=mark+%22of%5Ca%22+secret%2F%C3%A4") == f"https://host/?key={MASK}"


def test_a_secret_is_masked_before_a_table_breaks_it_over_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "mark-" + "a1b2c3d4" * 8
    monkeypatch.setenv("HF_TOKEN", secret)
    table = Table("key", title=f"of {secret}")
    table.add_row(f"data from {secret}")
    stream = io.StringIO()
    terminal = _Patient(file=stream, width=30)
    terminal.print(table)
    terminal.print(f"[bold]step[/] {secret}", table)
    shown = stream.getvalue()
    assert "a1b2" not in shown and shown.count(MASK) == 5


def test_a_run_leaves_no_secret_in_its_folder_or_on_the_terminal(secrets: dict[str, str], tmp_path: Path) -> None:
    password = secrets["MY_PASSWORD"]
    (tmp_path / password).mkdir()
    rows = [{"prompt": f"Say {secrets['WANDB_API_KEY']}.", "completion": f"No, {password}."}] * 12
    data = tmp_path / password / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run_program(
        train,
        *SMALL,
        f"data.path={data}",
        f"data.eval_path={data}",
        "logger.mode=offline",
        "logger.name=${oc.env:HF_TOKEN}",
        f"logger.tags=[of,{password}]",
        "logger.group=${oc.env:WANDB_API_KEY}",
        "hydra.run.dir=run",
    )
    assert code == 0, err
    assert holders(tmp_path / "run", secrets) == []
    assert [mark for mark in secrets.values() if mark in out + err] == []
    kept = next((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")).read_bytes()
    assert b"before/loss" in kept and MASK.encode() in kept  # it is no sealed file, in which nothing could be found
    recorded = {
        name: yaml.safe_load((tmp_path / f"run/.hydra/{name}.yaml").read_text()) for name in ("config", "resolved")
    }
    assert recorded["resolved"]["logger"]["name"] == MASK
    assert recorded["config"]["logger"]["name"] == "${oc.env:HF_TOKEN}"  # which is no secret
    overrides = yaml.safe_load((tmp_path / "run/.hydra/overrides.yaml").read_text())
    assert "logger.name=${oc.env:HF_TOKEN}" in overrides and f"logger.tags=[of,{MASK}]" in overrides


@pytest.mark.parametrize("logger", ["wandb", "csv"])
def test_an_error_in_training_leaves_no_secret(
    logger: str, secrets: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.module import FinetuneModule

    said = " and ".join(secrets.values())

    def broken(*_: object) -> None:
        raise RuntimeError(f"it is {said}")

    monkeypatch.setattr(FinetuneModule, "training_step", broken)
    named = ["logger.name=${oc.env:HF_TOKEN}"] if logger == "wandb" else []
    with pytest.raises(RuntimeError, match="it is"):
        run_program(train, *SMALL, f"logger={logger}", *named, "hydra.run.dir=run")
    assert holders(tmp_path / "run", secrets) == []
    assert f"it is {MASK}" in (tmp_path / "run" / "metrics.json").read_text()
    assert f"RuntimeError: it is {MASK}" in (tmp_path / "run" / "train.log").read_text()


def test_data_that_are_not_there_are_named_without_a_secret(secrets: dict[str, str], tmp_path: Path) -> None:
    code, out, err = run_program(train, *SMALL, "data.path=/${oc.env:MY_PASSWORD}/x.jsonl", "hydra.run.dir=run")
    assert code == 2 and MASK in err
    assert holders(tmp_path / "run", secrets) == []
    assert [mark for mark in secrets.values() if mark in out + err] == []


def test_an_error_that_nobody_catches_is_printed_without_a_secret(secrets: dict[str, str]) -> None:
    program = """
import os, sys, threading, warnings
from lorafit.launch import start
sys.argv = ["it", "hydra.run.dir=run", "hydra.job.name=it"]
def fail(*_):
    warnings.warn(os.environ["HF_TOKEN"])
    thread = threading.Thread(target=lambda: int(os.environ["WANDB_API_KEY"]))
    thread.start(); thread.join()
    raise ValueError(os.environ["MY_PASSWORD"])
start("train", fail)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 1 and done.stderr.count("Traceback") == 2 and done.stderr.count(MASK) == 3
    assert [mark for mark in secrets.values() if mark in done.stdout + done.stderr] == []


def test_a_sweep_leaves_no_secret_and_goes_on_when_what_was_masked_is_given_again(
    secrets: dict[str, str], tmp_path: Path
) -> None:
    password = f"logger.project={secrets['MY_PASSWORD']}"
    code, out, err = run_program(train, "-m", "rank=1,2", *SMALL[:-1], password, "hydra.sweep.dir=all")
    assert code == 0, err
    assert holders(tmp_path / "all", secrets) == []
    assert [mark for mark in secrets.values() if mark in out + err] == []
    code, _, err = run_program(train, "resume=all")
    assert code == 2 and "logger.project was masked: give it again" in err
    code, out, err = run_program(train, "resume=all", password)
    assert code == 0 and out.count("done already") == 2, err


def test_a_run_goes_on_when_what_was_masked_is_given_again(secrets: dict[str, str], tmp_path: Path) -> None:
    tags = f"logger.tags=[{secrets['HF_TOKEN']}]"
    code, _, err = run_program(train, *SMALL, tags, "hydra.run.dir=run")
    assert code == 0, err
    more = ("resume=run", "trainer.max_steps=3", "allow_changed=[trainer.max_steps]")
    code, _, err = run_program(train, *more)
    assert code == 2 and "logger.tags was masked: give it again" in err
    code, _, err = run_program(train, *more, tags)
    assert code == 0, err
    assert holders(tmp_path / "run", secrets) == []


def test_a_run_that_is_refused_or_killed_at_once_has_written_down_its_command(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, _, _ = run_program(train, "rank=-1", f"hydra.run.dir={folder}")
    assert code == 2 and yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text()) == ["rank=-1"]
    assert {path.name for path in (folder / ".hydra").iterdir()} == {"overrides.yaml", "config.yaml", "hydra.yaml"}
    hydra = yaml.safe_load((folder / ".hydra" / "hydra.yaml").read_text())["hydra"]
    assert hydra["output_subdir"] is None  # Hydra itself wrote nothing, not even for a moment
