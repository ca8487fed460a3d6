"""Secrets become *** wherever something is written down.

pytest tests/test_redact.py
"""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest

from lorafit.files import write_json
from lorafit.redact import MASK, redact, redact_logs, redact_values
from lorafit.terminal import say

MARK = "mark-5c1e-of-a-secret"


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


@pytest.mark.parametrize("text", ["hf_" + "a1" * 17, "wandb_v1_abcdefgh123"])
def test_texts_shaped_like_keys_and_passwords_in_urls_are_masked(text: str) -> None:
    assert redact(f"<{text}>") == f"<{MASK}>"
    assert redact("https://me:word@host/x") == f"https://{MASK}@host/x"


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
