"""The audit: what it shows, what it counts, and what it refuses, by the real command.

pytest tests/test_audit.py
"""

from __future__ import annotations

import copy
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from programs import run_program
from tokenizers import AddedToken

from lorafit import audit, train
from lorafit.audit_page import audit_page
from lorafit.data import load_tokenizer
from lorafit.embedded import MODEL
from lorafit.tables import token_runs

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def audited(*overrides: str) -> tuple[int, str, str, dict[str, Any]]:
    code, out, err = run_program(audit, "hydra.run.dir=run", "logger=none", *overrides)
    file = Path("run/audit.json")
    return code, out, err, json.loads(file.read_text()) if file.is_file() else {}


def write(name: str, *rows: Any) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def questions(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(count)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def chat_model(folder: str, template: str, *tokens: str) -> str:
    """The embedded model's folder with a chat template, and with these special tokens in its tokenizer."""
    tokenizer = copy.deepcopy(load_tokenizer("embedded"))
    tokenizer.chat_template = template
    if tokens:
        tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens], special_tokens=True)
        tokenizer.eos_token = tokens[-1]
    tokenizer.save_pretrained(folder)
    config = json.loads((MODEL / "config.json").read_text()) | {"vocab_size": 1600}
    (Path(folder) / "config.json").write_text(json.dumps(config))
    return folder


# --- what it shows ----------------------------------------------------------------------------------


def test_the_default_data_is_shown_token_by_token_and_nothing_is_wrong() -> None:
    code, out, err, found = audited("audit.examples=2")
    assert code == 0, err
    assert len(found["examples"]) == 2 and found["refusals"] == []
    for example in found["examples"]:
        assert all(set(token) == {"text", "trained", "cut"} for token in example["tokens"])
        trained = "".join(token["text"] for token in example["tokens"] if token["trained"])
        row = json.loads(
            open(example["where"].rpartition(":")[0]).readlines()[int(example["where"].rpartition(":")[2]) - 1]
        )
        assert trained == row["completion"] + "</s>"
        assert "".join(token["text"] for token in example["tokens"]) == f"{row['prompt']}\n{trained}"
        assert row["completion"] in out
    assert "every check passed" in out
    assert found["coverage"]["q_proj"] == {"wrapped": 4, "total": 4}
    assert found["coverage"]["lm_head"] == {"wrapped": 0, "total": 1}
    assert found["layers"]["q_proj"] == {str(layer): True for layer in range(4)}


def test_it_counts_what_train_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = (f"data.path={write('a.jsonl', *questions(40), questions(40)[39])}", "data.eval_fraction=0.2")
    _, _, _, found = audited(*overrides)
    code, _, err = run_program(
        train, "hydra.run.dir=trained", "logger=none", "trainer.max_steps=1", "trainer.accelerator=cpu", *overrides
    )
    assert code == 0, err
    data = json.loads(Path("trained/metrics.json").read_text())["data"]
    assert found["total_tokens"] == data["train_tokens"]
    for key in ("supervised_tokens", "truncated_examples", "dropped_examples", "duplicate_examples", "leaked_examples"):
        assert found[key] == data[key]
    assert found["train_examples"] + found["eval_examples"] == 41


def test_targets_of_some_layers_are_shown_by_kind_and_by_layer() -> None:
    code, _, err, found = audited("target_modules='.*layers.[01].*[qv]_proj'")
    assert code == 0, err
    assert found["coverage"]["v_proj"] == {"wrapped": 2, "total": 4} and found["coverage"]["k_proj"]["wrapped"] == 0
    assert found["layers"]["q_proj"] == {"0": True, "1": True, "2": False, "3": False}


def test_an_example_that_is_cut_is_shown_in_a_colour_of_its_own() -> None:
    rows = [*questions(30), {"prompt": "word " * 60, "completion": "short"}]
    path = write("a.jsonl", *rows)
    code, out, err, found = audited(
        f"data.path={path}", "data.max_length=40", "data.overflow=truncate_prompt", "audit.examples=1"
    )
    assert code == 0, err
    cut = found["examples"][-1]
    assert cut["outcome"] == "cut" and cut["where"].endswith(":31") and found["truncated_examples"] == 1
    assert sum(not token["cut"] for token in cut["tokens"]) == 40
    assert {state for state, _, _ in token_runs(cut["tokens"])} == {"masked", "trained", "cut"}
    page = Path("run/audit.html").read_text()
    assert 'class="cut"' in page and 'class="trained"' in page and 'class="masked"' in page
    assert "cut" in out


def test_the_page_needs_nothing_else_and_shows_text_as_text() -> None:
    rows = [{"prompt": f"<script>alert({i})</script>", "completion": "<b>&amp;</b>"} for i in range(30)]
    code, _, err, found = audited(f"data.path='{write('<odd>.jsonl', *rows)}'")
    assert code == 0, err
    page = Path("run/audit.html").read_text()
    assert "<script" not in page and "http" not in page and "src=" not in page
    shown = html.unescape(re.sub(r"<[^>]*>", "", page))
    assert all(text in shown for text in ("<script>alert(1)</script>", "<b>&amp;</b>", "<odd>.jsonl"))
    assert audit_page(found, "<odd>.jsonl") == page


def test_the_examples_are_a_table_of_weights_and_biases() -> None:
    code, _, err = run_program(audit, "hydra.run.dir=run", "audit.examples=2")
    assert code == 0, err
    [table] = Path("run").rglob("media/table/audit*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["row", "state", "tokens", "text"]
    assert [row[1] for row in content["data"]] == ["masked", "trained"] * 2


def test_an_audit_reads_no_weights() -> None:
    folder = chat_model("chat", CHATML, "<|im_start|>", "<|im_end|>")
    assert not list(Path(folder).glob("*.safetensors"))
    code, out, err, found = audited(f"model.name={folder}", f"data.path={write('a.jsonl', *questions(30))}")
    assert code == 0, err
    assert "<|im_start|>assistant" in out and found["refusals"] == []


# --- what it refuses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "template", "tokens", "overrides"),
    [
        ("template_mismatch", CHATML, (), ()),
        (
            "prompt_trained",
            CHATML.replace(
                "{{ m.content }}",
                "{% if m.role == 'user' %}{% generation %}{{ m.content }}{% endgeneration %}"
                "{% else %}{{ m.content }}{% endif %}",
            ),
            None,
            (),
        ),
        ("opening_differs", CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"), None, ()),
        ("answer_lost", CHATML, None, ("data.max_length=50",)),
        ("end_masked", CHATML, None, ("data.max_length=20", "data.overflow=truncate", "data.max_lost=1")),
    ],
)
def test_a_planted_fault_is_refused_by_audit_and_by_train_and_can_be_allowed(
    check: str, template: str, tokens: tuple[str, ...] | None, overrides: tuple[str, ...]
) -> None:
    folder = chat_model("chat", template, *(("<|im_start|>", "<|im_end|>") if tokens is None else tokens))
    long = [{"prompt": f"question {i}", "completion": "many words " * (1 + 8 * (i % 2))} for i in range(30)]
    arguments = (f"model.name={folder}", f"data.path={write('a.jsonl', *long)}", *overrides)
    code, out, err, found = audited(*arguments)
    names = [item["check"] for item in found["refusals"]]
    assert code == 2 and check in names and "Traceback" not in err
    assert f"{check}: " in err and Path("run/audit.html").is_file()
    code, _, err = run_program(train, "hydra.run.dir=trained", "logger=none", "model.init=random", *arguments)
    assert code == 2 and f"data.allow=[{','.join(names)}]" in err and "Traceback" not in err
    assert not Path("trained/metrics.json").exists()
    code, _, err, found = audited(*arguments, f"data.allow=[{','.join(names)}]")
    assert code == 0 and found["refusals"] == [], err


def test_a_vocabulary_smaller_than_a_token_is_refused_with_the_row() -> None:
    folder = Path(chat_model("chat", CHATML, "<|im_start|>", "<|im_end|>"))
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 1530}
    (folder / "config.json").write_text(json.dumps(config))
    code, _, err, found = audited(f"model.name={folder}", f"data.path={write('a.jsonl', *questions(30))}")
    assert code == 2 and [item["check"] for item in found["refusals"]] == ["vocabulary"]
    assert "a.jsonl:" in err and "the model knows 1530 tokens" in err


def test_packing_is_proven_on_the_model_itself() -> None:
    code, out, err, found = audited("data.packing=true", "data.limit=200")
    assert code == 0, err
    proof = found["packing"]
    assert proof["error"] <= proof["tolerance"] and proof["leak"] <= proof["allowed_leak"] < proof["contaminated"]
    assert "proven on 4 examples" in out


def test_bad_rows_are_listed_and_wrong_input_is_one_message() -> None:
    path = write("a.jsonl", *questions(30), {"prompt": "no answer", "completion": ""})
    code, _, err, _ = audited(f"data.path={path}")
    assert code == 2 and "a.jsonl:31: " in err and "data.on_bad_row=skip" in err and err.count("\n") == 1
    code, out, err, found = audited(f"data.path={path}", "data.on_bad_row=skip")
    assert code == 0 and found["skipped_rows"] == 1 and "a.jsonl:31" in found["bad_rows"][0] and "a.jsonl:31" in out
    code, _, err, _ = audited("quantt=nf4")
    assert code == 2 and "Did you mean 'quant'?" in err


def test_data_cannot_move_the_cursor_or_turn_the_text_around() -> None:
    rows = [{"prompt": f"\x1b[2J{i}\u202eq", "completion": "\x1b]0;title\x07a\r\nb"} for i in range(30)]
    code, out, err, found = audited(f"data.path={write('a.jsonl', *rows)}")
    assert code == 0, err
    assert "\x1b" not in out and "\u202e" not in out and "\x07" not in out and "<U+001B>" in out
    assert any("\x1b" in token["text"] for token in found["examples"][0]["tokens"])


def test_files_and_rows_that_are_left_out_are_told() -> None:
    Path("data").mkdir()
    write("data/a.jsonl", *questions(30))
    write("data/unit test.jsonl", *questions(40)[30:])
    Path("data/b.jsonl.gz").write_bytes(b"")
    code, out, err, found = audited("data.path=data")
    assert code == 0, err
    assert "files of data that are held out for their names: unit test.jsonl" in found["notes"]
    assert "files of data that are not read: b.jsonl.gz" in found["notes"]
    assert "b.jsonl.gz" in out
