"""Malformed input: hundreds of broken files, and each is an error that names the place, or bad rows that are counted.

pytest tests/test_malformed.py
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import gzip
import io
import json
import logging
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lorafit import train
from lorafit.data import Corpus, Encoder, Formatter, load_tokenizer, parse_sources, read_corpus
from lorafit.data.sources import Row
from lorafit.errors import InputError


def user(text: Any = "Hi") -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: Any = "Hello", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | more


def good(layout: str, number: int) -> dict[str, Any]:
    """A row of a layout that nothing is wrong with."""
    ask, answer = f"question {number}", f"answer {number}"
    return {
        "prompt_completion": {"prompt": ask, "completion": answer},
        "question_answer": {"question": ask, "answer": answer},
        "alpaca": {"instruction": ask, "input": "", "output": answer},
        "chat": {"messages": [user(ask), bot(answer)]},
        "sharegpt": {"conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]},
        "text": {"text": answer},
    }[layout]


LAYOUTS = ("prompt_completion", "question_answer", "alpaca", "chat", "sharegpt", "text")
ANSWERS = {"prompt_completion": "completion", "question_answer": "answer", "alpaca": "output", "text": "text"}


@dataclass(frozen=True)
class Case:
    """A broken file. rows: the good ones that are to be read, or None where nothing of the file can be. bad: how many
    rows are bad, and first: what follows the file's name where the first of them is told."""

    name: str
    file: str
    content: bytes
    rows: tuple[Any, ...] | None = None
    bad: int = 1
    first: str = ""

    def __str__(self) -> str:
        return f"{self.name} in {self.file}"


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


# --- lines ----------------------------------------------------------------------------------------

# what is no JSON object at all
NO_ROW: dict[str, bytes] = {
    "cut": b'{"prompt": "p", "comple',
    "cut in an escape": b'{"prompt": "p\\u00',
    "not closed": b'{"prompt": "p", "completion": "c"',
    "comma": b'{"prompt": "p", "completion": "c",}',
    "single quotes": b"{'prompt': 'p', 'completion': 'c'}",
    "no quotes": b"{prompt: p}",
    "two objects": b'{"prompt": "p", "completion": "c"} {"prompt": "p", "completion": "c"}',
    "behind it": b'{"prompt": "p", "completion": "c"} // a remark',
    "a remark": b"# prompt, completion",
    "control": b'{"prompt": "p\x01", "completion": "c"}',
    "wrong escape": b'{"prompt": "\\x41", "completion": "c"}',
    "nan": b'{"prompt": "p", "completion": NaN}',
    "infinity": b'{"prompt": "p", "completion": -Infinity}',
    "nan elsewhere": b'{"prompt": "p", "completion": "c", "score": NaN}',
    "twice": b'{"prompt": "p", "completion": "c", "completion": "d"}',
    "twice inside": b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
    "huge integer": b'{"prompt": "p", "completion": ' + b"9" * 5000 + b"}",
    "list": b'["prompt", "completion"]',
    "number": b"7",
    "fraction": b"0.5",
    "text": b'"prompt"',
    "true": b"true",
    "null": b"null",
    "brackets": b"[" * 100_000,
    "closed brackets": b"[" * 100_000 + b"]" * 100_000,
    "objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep field": b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b', "completion": "c"}',
    "latin-1": '{"prompt": "café", "completion": "c"}'.encode("latin-1"),
    "byte at the start": b'\xff{"prompt": "p", "completion": "c"}',
    "byte at the end": b'{"prompt": "p", "completion": "c"}\xc3',
    "byte in a name": b'{"pro\x80mpt": "p", "completion": "c"}',
    "cut character": b'{"prompt": "\xf0\x9f\x98", "completion": "c"}',
    "overlong": b'{"prompt": "\xc0\x80", "completion": "c"}',
    "surrogate bytes": b'{"prompt": "\xed\xa0\x80", "completion": "c"}',
    "above unicode": b'{"prompt": "\xf4\x90\x80\x80", "completion": "c"}',
    "utf-16": '{"prompt": "p"}'.encode("utf-16-be"),
    "bom inside": b'\xef\xbb\xbf{"prompt": "p", "completion": "c"}',
    "nul": b"\0",
    "csv": b"prompt,completion",
    "html": b"<html>",
}

# of any layout with an answer that is a text: what stands in its place
NO_TEXT: dict[str, bytes] = {
    "null": b"null",
    "empty": b'""',
    "blank": b'" \\n\\t\\u00a0"',
    "true": b"true",
    "list": b'["c"]',
    "object": b'{"text": "c"}',
    "half character": b'"\\ud800"',
    "other half": b'"a \\udfff b"',
    "swapped halves": b'"\\ude00\\ud83d"',
    "overflow": b"1e999",
    "negative overflow": b"-1e999",
    "a million characters": b'"' + b"x" * 1_000_000 + b'"',
    "a million words": b'"' + b"to be " * 170_000 + b'"',
    "a long number": b"1." + b"1" * 1_000_000,
}

# turns that are no conversation
NO_TALK: dict[str, Any] = {
    "null": None,
    "text": "Hi",
    "object": user(),
    "number": 3,
    "none": [],
    "a turn of a turn": [[user(), bot()]],
    "null turn": [user(), None, bot()],
    "text turn": ["Hi", "Hello"],
    "empty turn": [{}, bot()],
    "unanswered": [user()],
    "trailing question": [user(), bot(), user()],
    "answer alone": [bot()],
    "two questions": [user(), user(), bot()],
    "two answers": [user(), bot(), bot()],
    "system in the middle": [user(), {"role": "system", "content": "s"}, bot()],
    "system at the end": [user(), bot(), {"role": "system", "content": "s"}],
    "two systems": [{"role": "system", "content": "s"}, {"role": "developer", "content": "s"}, user(), bot()],
    "system alone": [{"role": "system", "content": "s"}],
    "system and answer": [{"role": "system", "content": "s"}, bot()],
    "empty answer": [user(), bot("")],
    "blank answer": [user(), bot(" \n")],
    "empty question": [user(""), bot()],
    "null answer": [user(), bot(None)],
    "true answer": [user(), bot(True)],
    "object answer": [user(), bot({"text": "a"})],
    "list answer": [user(), bot(["a"])],
    "no parts": [user(), bot([])],
    "picture": [user([{"type": "image_url", "image_url": {"url": "x"}}]), bot()],
    "text and picture": [user([{"type": "text", "text": "a"}, {"type": "image"}]), bot()],
    "null part": [user([None]), bot()],
    "list in a part": [user([{"type": "text", "text": ["a"]}]), bot()],
    "tool role": [user(), {"role": "tool", "content": "4"}, bot()],
    "tool call": [user(), bot(None, tool_calls=[{"function": {"name": "f"}}])],
    "tool call and text": [user(), bot("a", tool_calls=[{"function": {"name": "f"}}])],
    "function call": [user(), bot("a", function_call={"name": "f"})],
    "thoughts": [user(), bot("a", reasoning_content="because")],
    "unknown role": [{"role": "narrator", "content": "a"}, bot()],
    "capital role": [{"role": "User", "content": "a"}, bot()],
    "null role": [{"role": None, "content": "a"}, bot()],
    "list role": [{"role": ["user"], "content": "a"}, bot()],
    "object role": [{"role": {"a": "user"}, "content": "a"}, bot()],
    "long role": [{"role": "u" * 1_000_000, "content": "a"}, bot()],
    "half a role": [{"role": "\ud800", "content": "a"}, bot()],
    "no role": [{"content": "a"}, bot()],
    "no content": [{"role": "user"}, bot()],
    "mixed names": [{"role": "user", "value": "a"}, bot()],
    "mixed names, other": [{"from": "human", "content": "a"}, bot()],
    "weight 2": [user(), bot(weight=2)],
    "weight of text": [user(), bot(weight="1")],
    "weight of list": [user(), bot(weight=[1])],
    "weight of object": [user(), bot(weight={})],
    "half a weight": [user(), bot(weight=0.5)],
    "no weight": [user(), bot(weight=0)],
    "half a character": [user("\ud800"), bot()],
    "half a character answered": [user(), bot("\udc00")],
    "a million characters": [user("x" * 1_000_000), bot()],
    "a million characters in turns": [user("x" * 1000), bot("y" * 1000)] * 500,
}


def lined(name: str, layout: str, line: bytes, at: int = 1, suffix: str = "jsonl") -> Case:
    """Three good rows of a layout with a bad line among them."""
    rows = tuple(good(layout, number) for number in range(3))
    lines = [dumps(row) for row in rows]
    lines.insert(at, line)
    return Case(f"{layout}: {name}", f"a.{suffix}", b"\n".join(lines) + b"\n", rows, first=f":{at + 1}: ")


def line_cases() -> Iterator[Case]:
    for name, line in NO_ROW.items():
        if name != "bom inside":
            yield lined(name, "prompt_completion", line, at=0)
        yield lined(name, "chat", line, at=1, suffix="ndjson")
        yield lined(name, "text", line, at=3)
    for layout, field in ANSWERS.items():
        for name, value in NO_TEXT.items():
            row = dumps(good(layout, 9) | {field: "HERE"}).replace(b'"HERE"', value)
            yield lined(f"answer {name}", layout, row)
        left = {key: value for key, value in good(layout, 9).items() if key != field}
        yield lined("answer missing", layout, dumps(left))
        if left:
            yield lined("no field", layout, b"{}")
        yield lined("many fields", layout, dumps({f"field {index}": index for index in range(5000)}))
    for field, layout in (
        ("prompt", "prompt_completion"),
        ("question", "question_answer"),
        ("instruction", "alpaca"),
        ("input", "alpaca"),
    ):
        for name, value in NO_TEXT.items():
            may_be_empty = field in ("prompt", "input") and name in ("empty", "blank")
            if not may_be_empty and (field, name) != ("input", "null"):
                row = dumps(good(layout, 9) | {field: "HERE"}).replace(b'"HERE"', value)
                yield lined(f"{field} {name}", layout, row, at=2)
    for name, turns in NO_TALK.items():
        yield lined(name, "chat", dumps({"messages": turns}))
        if name not in ("mixed names", "mixed names, other"):
            yield lined(name, "sharegpt", dumps({"conversations": turns}), at=2)
        if isinstance(turns, list):
            yield lined(f"of messages, {name}", "prompt_completion", dumps({"prompt": turns, "completion": []}))
            if name not in ("trailing question", "none"):
                yield lined(
                    f"asked {name}", "prompt_completion", dumps({"prompt": [user(), *turns], "completion": "c"})
                )
    for layout in LAYOUTS:
        for other in LAYOUTS:
            if layout != other:
                yield lined(f"with {other}", layout, dumps(good(other, 9)), at=3)


# --- whole files ----------------------------------------------------------------------------------

JSON_FILES: dict[str, bytes] = {
    "one object": b'{"prompt": "p", "completion": "c"}',
    "wrapped": b'{"data": [{"prompt": "p", "completion": "c"}]}',
    "by columns": b'{"prompt": ["p", "q"], "completion": ["c", "d"]}',
    "over lines": b'{\n "prompt": "p",\n "completion": "c"\n}\n',
    "number": b"3",
    "text": b'"prompt"',
    "null": b"null",
    "true": b"true",
    "cut": b'[{"prompt": "p", "completion": "c"}, {"prom',
    "not closed": b'[{"prompt": "p", "completion": "c"}',
    "two lists": b'[{"prompt": "p", "completion": "c"}] [{"prompt": "p", "completion": "c"}]',
    "lists in lines": b'["p", "c"]\n["q", "d"]\n',
    "brackets": b"[" * 100_000,
    "closed brackets": b"[" * 100_000 + b"]" * 100_000,
    "utf-16": '[{"prompt": "p", "completion": "c"}]'.encode("utf-16"),
    "not utf-8": b'[{"prompt": "p\xff", "completion": "c"}]',
    "nan": b'[{"prompt": "p", "completion": NaN}]',
    "empty list": b"[]",
    "list of nothing": b"[[], [], []]",
    "list of texts": b'["prompt", "completion"]',
    "list of numbers": b"[1, 2, 3]",
    "list of nulls": b"[null, null]",
    "list of lists": b'[["p", "c"], ["q", "d"]]',
}

GARBAGE: dict[str, bytes] = {
    "bytes": random.Random(0).randbytes(5000),
    "nuls": bytes(4096),
    "zip": b"PK\x03\x04" + random.Random(1).randbytes(500),
    "gzip": gzip.compress(dumps(good("text", 1)), mtime=0),
    "picture": b"\x89PNG\r\n\x1a\n" + random.Random(2).randbytes(500),
    "blank": b"\n \n\t\n\r\n",
    "mark": b"\xef\xbb\xbf",
    "nothing": b"",
    "words": b"Once upon a time\nthere was no data.\n",
    "page": b"<!DOCTYPE html>\n<html><body>404</body></html>\n",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
}
SUFFIXES = ("jsonl", "ndjson", "json", "csv", "tsv", "parquet", "txt", "xlsx")


def table(*lines: str | bytes, header: str = "prompt,completion") -> bytes:
    return b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in (header, *lines))


ONE, TWO = good("prompt_completion", 1), good("prompt_completion", 2)


def table_cases() -> Iterator[Case]:
    bad: dict[str, str | bytes] = {
        "quote never closed": 'p,"c',
        "quote inside quotes": 'p,"He said "hi" to me"',
        "backslash before a quote": 'p,"say \\"hi\\""',
        "text behind a quote": '"p" q,c',
        "too few": "p",
        "too many": "p,c,d",
        "a cell of nothing more": "p,c,",
        "separators": ",,,,,,",
        "other separator": "p;c",
        "empty answer": "p,",
        "blank answer": "p,  ",
        "quoted blank": '"p"," "',
        "nothing": ",",
        "white space": "   ",
        "latin-1": "café,c".encode("latin-1"),
        "byte in the answer": b"p,\xff\xfe",
        "byte in quotes": b'"p","\xe9"',
        "byte over lines": b'"p","\xe9\nx, y\nz,w"',
        "cut character": b"p,\xf0\x9f\x98",
        "surrogate bytes": b"p,\xed\xa0\x80",
        "a million characters": "p," + "x" * 1_000_000,
        "a million lines": '"' + "x\n" * 500_000 + '",c',
        "a thousand cells": ",".join(["c"] * 1000),
    }
    for name, line in bad.items():
        for at in (0, 2):
            lines: list[str | bytes] = ["question 1,answer 1", "question 2,answer 2"]
            lines.insert(at, line)
            yield Case(name, "a.csv", table(*lines), (ONE, TWO), first=f":{at + 2}: ")
    inch = {"prompt": "p", "completion": '5"'}  # outside of quotes a quote is a character like any other
    yield Case("quote at the end", "a.csv", table("question 1,answer 1", 'p,5"', '"'), (ONE, inch), first=":4: ")
    whole: dict[str, tuple[bytes, str]] = {
        "header alone": (table(), ""),
        "header and blank lines": (table("", "", ""), ""),
        "quote inside quotes over lines": (table('p,"He said "hi"', 'x,y"', "q,d"), ":2: "),
        "line ends of old": (b"prompt,completion\rp,c\rq,d\r", ":1: "),
        "line end in a cell": (table("p,c\rd"), ":2: "),
        "header twice": (table("p,c,d", header="prompt,completion,prompt"), ":1: "),
        "no header": (table("q,d", header="p,c"), ":2: "),
        "header of blanks": (table("p,c", header=" , "), ":2: "),
        "other names": (table("p,c", header="input,target"), ":2: "),
        "blanks around names": (table("p, c", header="prompt, completion"), ":2: "),
        "header with a bad byte": (b"prompt\xff,completion\np,c\n", ":1: "),
        "header with a broken quote": (b'"prompt,completion\np,c\n', ":1: "),
        "utf-16": ("prompt,completion\np,c\n".encode("utf-16"), ":1: "),
        "every answer empty": (table("p,", "q,", "r,"), ":2: "),
        "chats as text": (table('"[{""role"": ""user""}]"', header="messages"), ":2: "),
    }
    for name, (content, first) in whole.items():
        yield Case(name, "a.csv", content, first=first)
        yield Case(name, "a.tsv", content.replace(b",", b"\t") if name != "utf-16" else content, first=first)


def whole_cases() -> Iterator[Case]:
    for name, content in JSON_FILES.items():
        yield Case(name, "a.json", content)
    for name, content in GARBAGE.items():
        for suffix in SUFFIXES:
            yield Case(name, f"a.{suffix}", content)
    for name, line in NO_ROW.items():
        if name not in ("bom inside",):
            yield Case(f"only {name}", "a.jsonl", line + b"\n", first=":1: ")
    yield Case("every answer empty", "a.jsonl", b"\n".join([dumps(ONE | {"completion": ""})] * 30), first=":1: ")
    yield Case("pretty", "a.jsonl", json.dumps([ONE, TWO], indent=1).encode(), first=":1: ")
    yield Case("a list of rows", "a.jsonl", dumps([ONE, TWO]), first=":1: ")
    yield Case("old line ends", "a.jsonl", dumps(ONE) + b"\r" + dumps(TWO), first=":1: ")
    for suffix in ("jsonl", "csv", "json"):
        yield Case("parquet", f"a.{suffix}", parquet(pyarrow.table({"text": ["a", "b"]})))


def list_cases() -> Iterator[Case]:
    """Rows of a list in one JSON file."""
    for name, value in {
        "null": None,
        "number": 3,
        "text": "prompt",
        "list": ["p", "c"],
        "true": True,
        "empty": {},
        "answer null": ONE | {"completion": None},
        "answer empty": ONE | {"completion": ""},
        "answer list": ONE | {"completion": ["c"]},
        "answer half": ONE | {"completion": "\ud800"},
        "other": good("chat", 1),
    }.items():
        yield Case(f"row {name}", "a.json", dumps([ONE, value, TWO]), (ONE, TWO), first=": row 2: ")
    lines = b"\n".join([dumps(ONE), b"{", dumps(TWO), b"[]"])
    yield Case("lines", "a.json", lines, (ONE, TWO), bad=2, first=":2: ")


# --- parquet --------------------------------------------------------------------------------------


def parquet(table: pyarrow.Table) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def column(values: list[Any], type: Any = None) -> bytes:
    prompts = [f"question {index}" for index in range(len(values))]
    return parquet(pyarrow.table({"prompt": prompts, "completion": pyarrow.array(values, type)}))


def parquet_cases() -> Iterator[Case]:
    day = datetime.datetime(2024, 1, 1)
    for name, values, type in (
        ("nulls", [None, None], pyarrow.null()),
        ("text that is null", [None, None], pyarrow.string()),
        ("booleans", [True, False], None),
        ("bytes", [b"a", b"\xff"], None),
        ("lists", [["a"], ["b"]], None),
        ("objects", [{"text": "a"}, {"text": "b"}], None),
        ("times", [day, day], None),
        ("days", [day.date(), day.date()], None),
        ("hours", [datetime.time(1), datetime.time(2)], None),
        ("spans", [datetime.timedelta(1), datetime.timedelta(2)], None),
        ("decimals", [decimal.Decimal("1.5"), decimal.Decimal("2.5")], None),
        ("no numbers", [float("nan"), float("inf")], None),
        ("empty", ["", " "], None),
    ):
        yield Case(name, "a.parquet", column(values, type), first=": row 1: ")
    for name, value in (("null", None), ("empty", ""), ("blank", "\n"), ("long", "x" * 1_000_000)):
        rows = ({"prompt": "question 0", "completion": "a"}, {"prompt": "question 2", "completion": "b"})
        yield Case(f"{name} among others", "a.parquet", column(["a", value, "b"]), rows, first=": row 2: ")
    for name in ("trailing question", "two answers", "unanswered", "empty answer", "null answer"):
        turns = [good("chat", 1)["messages"], NO_TALK[name], good("chat", 2)["messages"]]
        content = parquet(pyarrow.table({"messages": turns}))
        yield Case(name, "a.parquet", content, (good("chat", 1), good("chat", 2)), first=": row 2: ")
    whole = column(["a", "b", "c"])
    yield Case("maps", "a.parquet", column([[("a", "b")]], pyarrow.map_(pyarrow.string(), pyarrow.string())))
    yield Case("cut at the end", "a.parquet", whole[:-10])
    yield Case("cut at the start", "a.parquet", whole[10:])
    yield Case("half", "a.parquet", whole[: len(whole) // 2])
    yield Case("zeros in the foot", "a.parquet", whole[:-200] + bytes(150) + whole[-50:])
    yield Case("no rows", "a.parquet", parquet(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())})))
    yield Case("no columns", "a.parquet", parquet(pyarrow.table({})))
    yield Case("other columns", "a.parquet", parquet(pyarrow.table({"a": ["b"]})), first=": row 1: ")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["p"]), pyarrow.array(["c"])], names=["text", "text"])
    yield Case("a column twice", "a.parquet", parquet(twice))
    ends = pyarrow.array([0, 2], pyarrow.int32()).buffers()[1]
    broken = pyarrow.StringArray.from_buffers(1, ends, pyarrow.py_buffer(b"\xff\xfe"))
    yield Case("text that is not UTF-8", "a.parquet", parquet(pyarrow.table({"text": broken})))


CASES = [*line_cases(), *list_cases(), *table_cases(), *whole_cases(), *parquet_cases()]


# --- reading them ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(load_tokenizer("embedded"))


def write(folder: Path, case: Case) -> Path:
    path = folder / case.file
    path.write_bytes(case.content)
    return path


def read(path: Path, encoder: Encoder, on_bad_row: str) -> Corpus:
    return read_corpus(parse_sources(str(path)), encoder, on_bad_row=on_bad_row)


def test_there_are_hundreds_of_them_and_no_two_are_alike() -> None:
    assert len({(case.file, case.content) for case in CASES}) == len(CASES) >= 200
    assert {case.file.rpartition(".")[2] for case in CASES} == set(SUFFIXES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_broken_file_is_an_error_that_names_the_place_and_when_skipped_only_good_rows_are_read(
    case: Case, tmp_path: Path, encoder: Encoder
) -> None:
    path = write(tmp_path, case)
    with pytest.raises(InputError) as caught:
        read(path, encoder, "error")
    message = str(caught.value)
    assert f"{path}{case.first}" in message and len(message) < 2000
    if case.rows is None:
        with pytest.raises(InputError) as caught:
            read(path, encoder, "skip")
        assert f"{path}{case.first}" in str(caught.value)
        return
    corpus = read(path, encoder, "skip")
    report = corpus.report
    assert (report.rows, report.skipped, len(report.bad_rows)) == (len(case.rows) + case.bad, case.bad, case.bad)
    assert f"{path}{case.first}" in report.bad_rows[0]
    formatter = Formatter()
    expected = [formatter(Row("", row)).key() for row in case.rows]
    assert sorted([*corpus.train.keys.tolist(), *corpus.held_out.keys.tolist()]) == sorted(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_broken_in_some_lines_cost_no_other_line(layout: str, tmp_path: Path, encoder: Encoder) -> None:
    draw = random.Random(layout)
    rows = [good(layout, number) for number in range(40)]
    lines = [dumps(row) for row in rows]
    for number in range(1, 40, 2):
        line = bytearray(lines[number])
        for _ in range(draw.choice((1, 1, 5))):
            at = draw.randrange(len(line))
            line[at : at + draw.randrange(3)] = bytes(
                draw.choice(b'\xff\x80\x00{}[]":,\\u0') for _ in range(draw.randrange(3))
            )
        lines[number] = bytes(line).replace(b"\n", b" ")
    path = write(tmp_path, Case("", "a.jsonl", b"\n".join(lines)))
    corpus = read(path, encoder, "skip")
    formatter = Formatter()
    kept = set(corpus.train.keys.tolist()) | set(corpus.held_out.keys.tolist())
    assert {formatter(Row("", row)).key() for row in rows[::2]} <= kept
    assert len(corpus.train) + len(corpus.held_out) + corpus.report.skipped == corpus.report.rows
    assert 35 <= corpus.report.rows <= 40 and corpus.report.skipped > 5


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_whatever_is_done_to_a_file_it_is_read_or_an_error_that_names_it(
    suffix: str, tmp_path: Path, encoder: Encoder
) -> None:
    draw = random.Random(suffix)
    rows = [good("prompt_completion", number) for number in range(6)]
    whole = {
        "jsonl": b"\n".join(map(dumps, rows)),
        "json": dumps(rows),
        "csv": table(*(f'"{row["prompt"]}",{row["completion"]}' for row in rows)),
        "parquet": column([row["completion"] for row in rows]),
    }[suffix]
    outcomes = set()
    for _ in range(40):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 3))):
            start, length = draw.randrange(len(content)), draw.choice((0, 1, 1, 4, 40))
            content[start : start + length] = draw.randbytes(draw.choice((0, 1, 1, 4)))
        path = write(tmp_path, Case("", f"a.{suffix}", bytes(content)))
        try:
            corpus = read(path, encoder, "skip")
        except InputError as error:
            assert str(path) in str(error)
            outcomes.add("refused")
        else:
            assert len(corpus.train) + len(corpus.held_out) + corpus.report.skipped == corpus.report.rows
            outcomes.add("read")
    assert outcomes == {"read"} if suffix == "jsonl" else outcomes >= {"refused"}  # of lines some are always good


# --- the program ----------------------------------------------------------------------------------


def program(*arguments: str) -> tuple[int, str]:
    """(exit code, all that is printed) of `python -m lorafit.train`, in this process."""
    printed, code = io.StringIO(), 0
    root, failure = logging.getLogger(), logging.getLogger("lorafit.failure")
    handlers, level = root.handlers[:], root.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lorafit train", *arguments])
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                train.main()
        except SystemExit as end:
            assert isinstance(end.code, int)
            code = end.code
        finally:
            for handler in {*root.handlers, *failure.handlers} - set(handlers):
                handler.close()
            root.handlers[:], failure.handlers[:] = handlers, []
            root.setLevel(level)
    return code, printed.getvalue()


CHOSEN = [
    *("prompt_completion: cut in a.jsonl", "chat: objects in a.ndjson", "chat: long role in a.jsonl"),
    *("text: answer half character in a.jsonl", "sharegpt: trailing question in a.jsonl", "wrapped in a.json"),
    *("not utf-8 in a.json", "quote never closed in a.csv", "byte over lines in a.csv", "header twice in a.tsv"),
    *("bytes in a.parquet", "times in a.parquet", "nothing in a.jsonl", "blank in a.csv", "words in a.txt"),
]


@pytest.mark.parametrize("name", CHOSEN)
def test_the_program_ends_with_code_2_and_one_message(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(case for case in CASES if str(case) == name)
    path = write(tmp_path, case)
    monkeypatch.chdir(tmp_path)
    quiet = ("callbacks.progress=false", "trainer.accelerator=cpu", "logger=none", "task.generate_examples=0")
    code, printed = program(f"data.path={path}", "task.eval_examples=2", *quiet)
    assert code == 2
    assert "Traceback" not in printed and str(path) in printed
    assert len(printed.strip().splitlines()) <= 3 and len(printed) < 3000, printed
