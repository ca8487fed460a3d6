"""Sources: every kind of file, folder and data set gives the same rows, and text stays the text that it was.

pytest tests/test_sources.py
"""

from __future__ import annotations

import codecs
import collections
import csv
import io
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings, strategies as st

from lorafit.data import Formatter, Source, held_out_sources, parse_sources, read_rows
from lorafit.data.sources import (
    Row,
    _hub,
    draw_rows,
    fields,
    files_not_read,
    folder_files,
    has_held_out_files,
    held_out_files,
)
from lorafit.embedded import TEST, TRAIN
from lorafit.errors import InputError

ROWS = [
    {"prompt": "What is 1+1?", "completion": "2"},
    {"prompt": 'Say "a, b;\tc"', "completion": "a,\nb\r\n\n c"},
    {"prompt": "naïve 日本語 🙂\u2028", "completion": " 007 "},
]
TALK = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in ROWS
]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows: list[dict[str, str]], **options: Any) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(source: Source | str | Path, *args: Any, **options: Any) -> list[dict[str, Any]]:
    return [dict(fields(row)) for row in read_rows(source, *args, **options)]


def refused(source: Source | str | Path, *args: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(source, *args)
    return str(caught.value)


# --- every kind -----------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Path, list[dict[str, Any]]], Any]] = {
    "a.jsonl": lambda path, rows: write(path, lines(rows)),
    "b.ndjson": lambda path, rows: write(path, "\n" + lines(rows).replace("\n", "\r\n\n \t\n").rstrip()),
    "c.jsonl": lambda path, rows: write(path, codecs.BOM_UTF8 + lines(rows).encode()),
    "d.JSONL": lambda path, rows: write(path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
    "e.json": lambda path, rows: write(path, json.dumps(rows)),
    "f.json": lambda path, rows: write(path, codecs.BOM_UTF8 + json.dumps(rows, indent=2).encode()),
    "g.json": lambda path, rows: write(path, "\n " + lines(rows)),
    "h.parquet": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(path),
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
    "dict": lambda path, rows: datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(path),
}
TABLES: dict[str, Callable[[Path, list[dict[str, Any]]], Any]] = {
    "a.csv": lambda path, rows: write(path, table(rows)),
    "b.csv": lambda path, rows: write(path, codecs.BOM_UTF8 + table(rows, lineterminator="\n").encode()),
    "c.csv": lambda path, rows: write(path, "\n\n" + table(rows, delimiter=";", quoting=csv.QUOTE_ALL)),
    "d.csv": lambda path, rows: write(path, table(rows, delimiter="\t")),
    "e.TSV": lambda path, rows: write(path, table(rows, delimiter="\t", lineterminator="\n\n").rstrip("\n")),
}


@pytest.mark.parametrize("name", [*KINDS, *TABLES])
def test_every_kind_of_file_gives_the_same_rows_each_with_its_place(tmp_path: Path, name: str) -> None:
    (KINDS | TABLES)[name](tmp_path / name, ROWS)
    assert read(tmp_path / name) == ROWS
    places = [row.where for row in read_rows(str(tmp_path / name))]
    assert len(set(places)) == 3 and all(place.startswith(f"{tmp_path / name}:") for place in places)


@pytest.mark.parametrize("name", KINDS)
def test_conversations_come_out_of_every_kind_as_they_went_in(tmp_path: Path, name: str) -> None:
    KINDS[name](tmp_path / name, TALK)
    formatter, plain = Formatter(), Formatter()
    examples = [formatter(row) for row in read_rows(tmp_path / name)]
    assert [example.turns for example in examples] == [plain(Row("", row)).turns for row in ROWS]


def test_a_place_is_that_of_the_file(tmp_path: Path) -> None:
    text = 'prompt,completion\n"a\nb",c\n\nd,e\n'
    assert [row.where for row in read_rows(write(tmp_path / "a.csv", text))] == [
        f"{tmp_path}/a.csv:2",
        f"{tmp_path}/a.csv:5",
    ]
    text = '\n{"a": 1}\n\n{"a": 2}'
    assert [row.where for row in read_rows(write(tmp_path / "a.jsonl", text))] == [
        f"{tmp_path}/a.jsonl:2",
        f"{tmp_path}/a.jsonl:4",
    ]
    assert [row.where for row in read_rows(write(tmp_path / "a.json", '[{"a": 1}, {}]'))] == [
        f"{tmp_path}/a.json: row 1",
        f"{tmp_path}/a.json: row 2",
    ]


def test_a_folder_is_all_of_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number, (name, keep) in enumerate((KINDS | TABLES).items()):
        if "." in name:
            keep(tmp_path / f"{number % 3}" / name, ROWS) if name != "h.parquet" else keep(tmp_path / name, ROWS)
    write(tmp_path / "README.md", "not data")
    write(tmp_path / ".hidden" / "a.jsonl", "not data")
    write(tmp_path / "1" / ".a.jsonl.swp.jsonl", "not data")
    found = [Path(row.where.rpartition(":")[0]) for row in read_rows(tmp_path)]
    assert read(tmp_path) == ROWS * 13
    assert found == sorted(found)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_the_hub_is_read_by_its_name_split_and_subset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    # a folder of that name is what `datasets` takes instead of the hub
    for part in ("train", "validation"):
        write(tmp_path / "hub" / "data" / "main" / f"{part}.jsonl", lines([row | {"part": part} for row in ROWS]))
    about = "---\nconfigs:\n- config_name: main\n  data_files:\n" + "".join(
        f"  - split: {part}\n    path: main/{part}.jsonl\n" for part in ("train", "validation")
    )
    write(tmp_path / "hub" / "data" / "README.md", about + "---\n")
    monkeypatch.chdir(tmp_path / "hub")
    source = Source("data", subset="main")
    for split in ("train", "validation"):
        found = list(_hub(source, split, streaming))
        assert [row.payload for row in found] == [row | {"part": split} for row in ROWS]
        assert [row.where for row in found] == ["data: row 1", "data: row 2", "data: row 3"]
    with pytest.raises(InputError, match="^data 'data' cannot be read: .*other"):
        list(_hub(source, "other", streaming))


def test_a_data_set_that_is_not_there_is_told_by_its_name() -> None:
    assert refused("nobody/nothing").startswith("data 'nobody/nothing' cannot be read: ")


def test_a_data_set_that_was_saved_as_arrays_is_read_as_what_it_says(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([TALK[0] | {"number": 7}]).with_format("numpy")
    data.save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == [TALK[0] | {"number": 7}]


def test_the_embedded_data_has_its_two_splits() -> None:
    for split, file in (("train", TRAIN), ("test", TEST), ("validation", TEST)):
        assert read("embedded", split) == [json.loads(line) for line in file.read_text().splitlines()]


def test_a_row_is_not_parsed_before_it_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": 1}\nbroken\n{"a": 3}\n')
    rows = list(read_rows(path))
    assert [row.payload for row in rows] == [b'{"a": 1}\n', b"broken\n", b'{"a": 3}\n']
    assert fields(rows[2]) == {"a": 3}


# --- text stays text ------------------------------------------------------------------------------

CELLS = [
    *(
        "007",
        "NA",
        "null",
        "None",
        "nan",
        "1e5",
        "1.10",
        "-0",
        "true",
        "2020-01-01",
        "=1+1",
        "#",
        "[1]",
        "{}",
        "'",
        "\\",
    ),
    *("", " a ", '"', '""', "a\nb", "a\r\nb", "a,b;c\td", "\ufeff", "\0", "\x1a", "\u2028", "\x0c", "é🙂"),
]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_the_text_of_a_table_stays_as_it_is(tmp_path: Path, separator: str, end: str, mark: bytes) -> None:
    rows = [{"prompt": cell, "completion": other} for cell, other in zip(CELLS, reversed(CELLS), strict=True)]
    text = table(rows, delimiter=separator, lineterminator=end).encode()
    assert read(write(tmp_path / "a.csv", mark + text)) == rows


@settings(max_examples=60)
@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4), st.sampled_from(",;\t"))
def test_any_text_survives_a_table(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], separator: str
) -> None:
    pairs = [tuple(cell.replace("\r", "") for cell in pair) for pair in pairs]  # type: ignore[misc]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    text = table(rows, delimiter=separator, quoting=csv.QUOTE_ALL)
    assert read(write(tmp_path_factory.getbasetemp() / "any.csv", text)) == rows


def test_a_table_knows_null_from_the_word_in_parquet_alone(tmp_path: Path) -> None:
    rows = [{"prompt": "NA", "completion": None}, {"prompt": "null", "completion": "x"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == rows


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2,3\n", "a.csv:2: the row has 3 cells, the header 2"),
        ("a,b\n1,2\n3\n", "a.csv:3: the row has 1 cells, the header 2"),
        ("a,a\n1,2\n", "a.csv:1: the header names 'a' twice"),
        ("\n\na,b,b,,\n1,2,3,4,5\n", "a.csv:3: the header names 'b' twice"),
        (b"a,b\n1,\xff\n", "a.csv:2: the row is not UTF-8 (byte 0xff at position 0 of cell 2)"),
        (b"a\xe9,b\n1,2\n", "a.csv:1: the header is not UTF-8 (byte 0xe9 at position 1 of cell 1)"),
        ("a,b\n1,2\n".encode("utf-16"), "a.csv:1: the header is not UTF-8 (byte 0xff at position 0 of cell 1)"),
        ('a,b\n1,"2\n3,4\n', "a.csv:2: a quote or a line break of this row is broken (unexpected end of data, line 3)"),
        ('a,b\n1,"2" 3\n', "a.csv:2: a quote or a line break of this row is broken (',' expected after '\"', line 2)"),
        ("a,b\r1,2\r", "a.csv:1: a quote or a line break of this row is broken (new-line character seen"),
    ],
)
def test_what_is_wrong_with_a_table_is_told_by_its_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    assert f"{tmp_path}/{said}" in refused(write(tmp_path / "a.csv", text))


def test_a_bad_byte_in_a_cell_of_several_lines_makes_no_rows_of_the_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'a,b\n1,"caf\xe9\nx, y\nz,w"\n3,4\n')
    first, second = read_rows(path)
    with pytest.raises(InputError, match="a.csv:2: the row is not UTF-8 .byte 0xe9 at position 3 of cell 2"):
        fields(first)
    assert (second.where, second.payload) == (f"{path}:5", {"a": "3", "b": "4"})


@pytest.mark.parametrize("behind", ['x,y"\n5,6\n', "x, y, z\n5,6\n", '5,"6\n7"\n'])
def test_behind_a_broken_quote_nothing_is_taken_for_a_row_that_may_be_text(tmp_path: Path, behind: str) -> None:
    rows = read_rows(write(tmp_path / "a.csv", f'a,b\n1,2\n3,"He said "hi"\n{behind}'))
    assert next(rows).payload == {"a": "1", "b": "2"}
    with pytest.raises(InputError, match="a.csv:3: .* cannot be skipped"):
        next(rows)
    assert list(rows) == []


@pytest.mark.parametrize("line", ['3,"He said "hi" to me"', '3,"never closed', '"3" 4,5', '3,"a" b'])
def test_a_broken_quote_that_ends_with_its_line_costs_that_line_alone(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "a.csv", f'a,b\n1,2\n{line}\n5,6\n\n7,"8 ""or"" 9"\n')
    good, bad, *rest = read_rows(path)
    with pytest.raises(InputError, match="a.csv:3: a quote or a line break of this row is broken"):
        fields(bad)
    assert [row.where for row in (good, bad, *rest)] == [f"{path}:{number}" for number in (2, 3, 4, 6)]
    assert [row.payload for row in (good, *rest)] == [
        {"a": "1", "b": "2"},
        {"a": "5", "b": "6"},
        {"a": "7", "b": '8 "or" 9'},
    ]


# --- what is missing or cannot be read ------------------------------------------------------------


def test_a_missing_file_is_told_the_one_that_was_meant(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "{}")
    assert refused(tmp_path / "trian.jsonl").endswith("does not exist. Did you mean 'train.jsonl'?")
    for path in ("~nobody-of-this-name/a.jsonl", f"{'x' * 300}.jsonl", "/" + "x" * 5000, "./a", "nowhere/at/all"):
        assert "does not exist" in refused(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "", "data file '{}' is empty"),
        ("a.txt", "text", "data file '{}' has the ending '.txt': jsonl, json, csv or parquet is read"),
        ("a.json", "\n", "{}: the file is not JSON"),
        ("a.json", '{\n "prompt": "p"}', "{}: the file holds one JSON object; it must hold a list of them"),
        ("a.json", '{\n "data": []\n}', "{}: the file holds one JSON object; it must hold a list of them"),
        ("a.json", '"text"', "{}: the file must hold one list of objects, it holds str"),
        ("a.json", "[{}, 2]", "{}: row 2: a row must be a JSON object, this is int"),
        ("a.json", '[{"a": 1},', "{}: the file is not JSON (Expecting value"),
        ("a.parquet", "this is no parquet", "data '{}' cannot be read: "),
    ],
)
def test_a_file_that_cannot_be_read_is_told_by_its_name(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = write(tmp_path / name, content)
    assert refused(path).startswith(said.replace("{}", str(path)))


def test_what_the_system_says_against_reading_is_an_error_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    for name in ("a.jsonl", "a.json", "a.csv"):
        path = write(tmp_path / name, "[]")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", denied)
            assert refused(path).startswith(f"data file '{path}' cannot be read: [Errno 13]")


@pytest.mark.parametrize("name", ["dataset_dict.json", "state.json"])
@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"splits": 3}', '{"splits": ["train"]}', "\xff"])
def test_a_saved_folder_that_is_damaged_is_told_by_its_name(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path / name, content.encode("latin1"))
    assert not has_held_out_files(str(tmp_path))
    assert refused(tmp_path).startswith(f"data '{tmp_path}' cannot be read: ")


def test_a_folder_without_data_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "README.md", "nothing")
    assert "holds no file that ends in .jsonl" in refused(tmp_path)


# --- held-out files -------------------------------------------------------------------------------


def test_a_folder_trains_on_its_training_files_and_holds_out_the_others(tmp_path: Path) -> None:
    names = {
        "train": ["train-00000.jsonl", "b/latest.jsonl", "contest.jsonl", "developer.jsonl"],
        "validation": ["my_validation.jsonl", "dev/a.jsonl", "b/val-2.jsonl"],
        "test": ["test.jsonl", "b/Test_1.jsonl"],
    }
    for part in names.values():
        for name in part:
            write(tmp_path / name, lines([{"text": name}]))

    def found(split: str) -> set[str]:
        return {row["text"] for row in read(tmp_path, split)}

    assert found("train") == set(names["train"])
    # what is chosen by is not what is reported on in the end
    assert found("test") == found("validation") == set(names["validation"])
    for name in names["validation"]:
        (tmp_path / name).unlink()
    assert found("test") == set(names["test"])
    assert has_held_out_files(str(tmp_path))
    for name in names["test"]:
        (tmp_path / name).unlink()
    assert not has_held_out_files(str(tmp_path))
    assert found("test") == set(names["train"])  # named to be measured on, all of it is


def test_a_folder_of_files_to_measure_on_alone_is_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", "{}")
    assert "holds only files to measure on" in refused(tmp_path)
    with pytest.raises(InputError, match="holds no file"):
        folder_files(tmp_path / "nowhere", "train")


def test_a_saved_folder_trains_on_train_and_holds_out_the_best_of_the_others(tmp_path: Path) -> None:
    parts = ("train", "dev", "test", "extra")
    data = datasets.DatasetDict({part: datasets.Dataset.from_list([{"text": part}]) for part in parts})
    data.save_to_disk(tmp_path / "saved")
    path = str(tmp_path / "saved")
    assert has_held_out_files(path)
    asked = ("train", "validation", "test", "extra")
    assert [read(path, split) for split in asked] == [[{"text": part}] for part in parts]
    data.pop("dev"), data.pop("test")
    data.save_to_disk(tmp_path / "rest")
    assert not has_held_out_files(str(tmp_path / "rest"))
    assert refused(tmp_path / "rest", "test").endswith("has no split 'test'; it has train, extra")


@pytest.mark.parametrize("split", ["trian", "train_sft", "train[:10]", "test[:5]", ""])
def test_a_split_that_is_not_there_is_never_answered_with_rows_to_measure_on(tmp_path: Path, split: str) -> None:
    for part in ("train", "test"):
        write(tmp_path / "folder" / f"{part}.jsonl", "{}")
    data = datasets.DatasetDict({part: datasets.Dataset.from_list([{"text": part}]) for part in ("train", "test")})
    data.save_to_disk(tmp_path / "saved")
    for path in ("embedded", tmp_path / "folder", tmp_path / "saved"):
        assert f"has no split {split!r}" in refused(path, split)


def test_only_sources_that_hold_rows_out_are_measured_on(tmp_path: Path) -> None:
    for name in ("a/train.jsonl", "a/test.jsonl", "b/train.jsonl", "c.jsonl"):
        write(tmp_path / name, lines([{"text": name}]))
    sources = parse_sources([str(tmp_path / name) for name in ("a", "b", "c.jsonl")])
    assert held_out_sources(sources) == sources[:1]
    assert held_out_sources(sources[1:]) is None
    assert held_out_sources(parse_sources("embedded")) == [Source("embedded")]


# --- several sources ------------------------------------------------------------------------------


def drawn(sources: list[Source], **options: Any) -> list[tuple[int, int]]:
    return [(number, fields(row)["i"]) for number, row in draw_rows(sources, **options)]


def numbered(folder: Path, **counts: int) -> list[str]:
    return [str(write(folder / f"{name}.jsonl", lines([{"i": i} for i in range(n)]))) for name, n in counts.items()]


def test_sources_without_weights_follow_one_another(tmp_path: Path) -> None:
    sources = parse_sources(numbered(tmp_path, a=3, b=2))
    expected = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert drawn(sources) == drawn(sources, streaming=True) == expected
    weighted = [Source(source.path, weight=2) for source in sources]
    assert drawn(weighted) == expected  # the loader mixes what has been read


def test_a_stream_of_weighted_sources_is_proportional_and_the_same_each_time(tmp_path: Path) -> None:
    a, b, c = numbered(tmp_path, a=3000, b=4000, c=300)
    sources = parse_sources([{"path": a, "weight": 6}, {"path": b, "weight": 3.0}, {"path": c, "weight": 1}])
    first = drawn(sources, streaming=True)[:10_000]
    assert len(first) == 10_000 and first == drawn(sources, streaming=True)[:10_000]
    assert first != drawn(sources, streaming=True, seed=1)[:10_000]
    counts = collections.Counter(number for number, _ in first)
    for number, share in enumerate((0.6, 0.3, 0.1)):
        assert abs(counts[number] - share * 10_000) < 5 * (10_000 * share * (1 - share)) ** 0.5
        # each source is read in order, and from the beginning again when it ends
        rows = [row for found, row in first if found == number]
        size = (3000, 4000, 300)[number]
        assert rows == list(itertools.islice(itertools.cycle(range(size)), len(rows)))


def test_a_weighted_stream_ends_when_every_source_has_ended_once(tmp_path: Path) -> None:
    a, b = numbered(tmp_path, a=40, b=5)
    found = drawn([Source(a, weight=1), Source(b, weight=1)], streaming=True)
    assert {row for number, row in found if number == 0} == set(range(40))
    assert collections.Counter(number for number, _ in found)[1] > 5
    empty = write(tmp_path / "empty.jsonl", "\n\n")
    with pytest.raises(InputError, match="empty.jsonl' has no rows"):
        drawn([Source(a, weight=1), Source(str(empty), weight=1)], streaming=True)


def test_sources_are_named_by_a_path_a_mapping_or_a_list_of_them() -> None:
    columns = {"prompt": "q", "completion": "a"}
    assert parse_sources("a.jsonl") == [Source("a.jsonl")]
    assert parse_sources(["a.jsonl", Path("b.csv")], format="chat") == [
        Source("a.jsonl", format="chat"),
        Source("b.csv", format="chat"),
    ]
    mixed = [{"path": "a.jsonl", "weight": 0.7}, {"path": "b.csv", "weight": 1, "columns": columns, "format": None}]
    assert parse_sources(mixed, subset="main") == [
        Source("a.jsonl", 0.7, subset="main"),
        Source("b.csv", 1, columns=columns, subset="main"),
    ]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ([], "data.path is an empty list"),
        ("", "a source is a path or a mapping with a path, got ''"),
        (3, "a source is a path or a mapping with a path, got 3"),
        ([None], "a source is a path or a mapping with a path, got None"),
        ([{"weight": 1}], "a source is a path or a mapping with a path"),
        ([{"path": ["a"]}], "a source is a path or a mapping with a path"),
        ([{"path": "a", "wieght": 1}], "a source has no key 'wieght'. Did you mean 'weight'"),
        ([{"path": "a", 3: 1}], "a source has no key 3"),
        ([{"path": "a", "weight": 1}, "b"], "give a weight to every source, or to none"),
        *(([{"path": "a", "weight": weight}], "the weight of 'a' must be a positive number")
          for weight in (0, -1, True, "1", float("nan"), float("inf"), [1])),
        ([{"path": "a", "columns": "q"}], "columns of 'a' must be like {prompt: question"),
        ([{"path": "a", "format": 3}], "format of 'a' must be a name, got 3"),
        ([{"path": "a", "subset": ["x"]}], "subset of 'a' must be a name"),
    ],
)  # fmt: skip
def test_a_source_that_is_none_is_told_why(path: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_sources(path)
    assert said in str(caught.value)


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", '{"text": "mine"}')
    write(tmp_path / "folder" / "b.jsonl", '{"text": "mine"}')
    assert read("~/a.jsonl") == read("~/folder") == [{"text": "mine"}]
    assert os.environ["HOME"] == str(tmp_path)


def test_the_separator_of_a_table_is_not_one_that_stands_in_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"prompt, or so, or so";completion\np;c\n')
    [row] = read_rows(tmp_path / "a.csv")
    assert fields(row) == {"prompt, or so, or so": "p", "completion": "c"}


def test_columns_without_a_name_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion,,\np,c,,\n")
    [row] = read_rows(tmp_path / "a.csv")
    assert fields(row)["prompt"] == "p" and fields(row)["completion"] == "c"


def test_a_file_with_one_row_is_read_whatever_its_ending(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text('{"prompt": "p", "completion": "c"}\n')
        assert [fields(row)["prompt"] for row in read_rows(tmp_path / name)] == ["p"]


def test_a_table_without_rows_is_empty_and_says_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    datasets.Dataset.from_dict({"prompt": [], "completion": []}).to_parquet(tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet")) == []
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="b.parquet"):
        list(read_rows(tmp_path / "b.parquet"))
    assert capfd.readouterr() == ("", "")


def test_many_broken_rows_take_time_in_proportion(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\n" + 'p,"c"x\n' * 50_000)
    assert sum(isinstance(row.payload, InputError) for row in read_rows(tmp_path / "a.csv")) == 50_000


def test_what_a_folder_holds_beside_its_training_files_is_listed(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.gz", "c.txt", "README.md", "LICENSE", ".hidden.txt", "sub/unit_test.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert files_not_read(str(tmp_path)) == ["b.jsonl.gz", "c.txt"]
    assert held_out_files(str(tmp_path)) == ["sub/unit_test.jsonl"]
    assert files_not_read(str(tmp_path / "a.jsonl")) == held_out_files("embedded") == []


def test_a_mistyped_file_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(InputError, match="'rows.jsnl' does not exist. Did you mean 'rows.jsonl'"):
        list(read_rows("rows.jsnl"))
    with pytest.raises(InputError, match="Nor is there a file or folder of this name. Did you mean 'rows.jsonl'"):
        list(read_rows("rows"))
