"""The store: flat arrays that say what a list of examples would, and the cache that keeps them between starts.

pytest tests/test_store.py
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from lorafit.cache import cache_folder
from lorafit.data import IGNORE, Sequences
from lorafit.data.store import Builder, load, save
from lorafit.data.tokens import Encoded

TOKENS = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=6)
PLACES = st.one_of(
    st.builds("{}:{}".format, st.text(max_size=4), st.integers(0, 10**20)), st.text("ab:0123 ٣\n", max_size=24)
)
EXAMPLES = st.lists(st.tuples(TOKENS, st.integers(0, 2**64 - 1), PLACES), max_size=8)

Rows = list[tuple[list[tuple[int, bool]], int, str]]


def built(rows: Rows) -> Sequences:
    builder = Builder()
    for tokens, key, where in rows:
        ids = np.array([token for token, _ in tokens], dtype=np.int32)
        builder.add(Encoded(ids, np.array([flag for _, flag in tokens], dtype=bool)), key, where)
    assert len(builder) == len(rows)
    return builder.sequences()


def said(sequences: Sequences) -> list[Any]:
    """All that can be asked of a store, in plain Python."""
    return [
        (one["input_ids"].tolist(), one["labels"].tolist(), int(key), sequences.place(index), int(length), int(trained))
        for index, (one, key, length, trained) in enumerate(
            zip(sequences, sequences.keys, sequences.lengths, sequences.supervised, strict=True)
        )
    ]


def expected(rows: Rows) -> list[Any]:
    return [
        (
            [token for token, _ in tokens],
            [token if flag else IGNORE for token, flag in tokens],
            key,
            where,
            len(tokens),
            sum(flag for _, flag in tokens),
        )
        for tokens, key, where in rows
    ]


@given(EXAMPLES)
def test_a_store_gives_back_what_was_put_in(rows: Rows) -> None:
    assert said(built(rows)) == expected(rows)


@given(EXAMPLES.flatmap(lambda rows: st.tuples(st.just(rows), st.lists(st.sampled_from(range(len(rows) or 1))))))
def test_a_selection_is_that_of_a_list(case: tuple[Rows, list[int]]) -> None:
    rows, chosen = case
    chosen = chosen if rows else []
    assert said(built(rows).select(np.array(chosen))) == expected([rows[index] for index in chosen])


def test_there_is_no_example_outside() -> None:
    sequences = built([([(1, True)], 0, "a:1")])
    for index in (-1, 1):
        with pytest.raises(IndexError, match=f"sequence {index} of 1"):
            sequences[index]


# --- on the disk ----------------------------------------------------------------------------------

ROWS: Rows = [([(7, False), (8, True)], 2**64 - 1, "a.jsonl:1"), ([(9, True)], 5, "a.jsonl:2"), ([], 6, "b: row 30")]
PARTS = ("train", "held_out")


def entry(folder: Path) -> Path:
    save(folder, {"train": built(ROWS), "held_out": built(ROWS[:1])}, {"note": "ours"})
    return folder


@settings(max_examples=20)
@given(EXAMPLES, EXAMPLES)
def test_an_entry_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, one: Rows, two: Rows) -> None:
    folder = tmp_path_factory.mktemp("cache") / "entry"
    save(folder, {"train": built(one), "held_out": built(two)}, {"rows": [1, "é\ud800"]})
    found = load(folder, PARTS)
    assert found is not None
    assert [said(found[0][part]) for part in PARTS] == [expected(one), expected(two)]
    assert found[1] == {"rows": [1, "é\ud800"]}
    assert [path.name for path in folder.parent.iterdir()] == ["entry"]  # no draft is left


def files_of_an_entry() -> list[str]:
    arrays = ("ids", "trained", "offsets", "keys", "origin", "number")
    return [*(f"{part}-{name}.npy" for part in PARTS for name in arrays), "meta.json", "sums.json"]


@pytest.mark.parametrize("name", files_of_an_entry())
def test_an_entry_with_any_file_damaged_is_none_and_is_written_anew(tmp_path: Path, name: str) -> None:
    whole = entry(tmp_path / "whole")
    assert sorted(path.name for path in whole.iterdir()) == sorted(files_of_an_entry())
    content = (whole / name).read_bytes()
    damages = {
        "gone": None,
        "empty": b"",
        "cut": content[:-1],
        "zeros": bytes(len(content)),
        "one bit": content[:-1] + bytes([content[-1] ^ 1]),
        "null": b"null",
        "other": b"{}",
    }
    for damage, bad in damages.items():
        folder = tmp_path / damage
        shutil.copytree(whole, folder)
        if bad is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(bad)
        assert load(folder, PARTS) is None, damage
        assert load(entry(folder), PARTS) is not None, damage


def test_an_entry_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert load(tmp_path / "nowhere", PARTS) is None
    (tmp_path / "file").write_text("")
    assert load(tmp_path / "file" / "below", PARTS) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    entry(tmp_path / "file" / "entry")
    entry(Path("/proc/lorafit/entry"))
    assert load(tmp_path / "file" / "entry", PARTS) is None


def test_an_entry_that_cannot_be_touched_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = entry(tmp_path / "entry")

    def denied(*_: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(os, "utime", denied)
    assert load(folder, PARTS) is not None


def test_above_the_limit_the_entries_that_were_not_used_for_longest_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(file.stat().st_size for file in entry(tmp_path / "a").iterdir())
    for name in ("b", "c", ".draft-of-a-killed-process"):
        entry(tmp_path / name)
    for age, name in enumerate(("c", "b", "a", ".draft-of-a-killed-process")):
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert load(tmp_path / "a", PARTS) is not None  # used now, so that it stays
    monkeypatch.setattr("lorafit.data.store.CACHE_LIMIT", 3 * size + size // 2)
    entry(tmp_path / "d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "d"]
    monkeypatch.setattr("lorafit.data.store.CACHE_LIMIT", size // 2)
    entry(tmp_path / "e")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e"]  # which is in use


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", "~/mine")
    assert cache_folder("tokens") == Path.home() / "mine" / "tokens"
    monkeypatch.delenv("LORAFIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/ours")
    assert cache_folder("tokens") == Path("/var/ours/lorafit/tokens")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("tokens") == Path.home() / ".cache" / "lorafit" / "tokens"
