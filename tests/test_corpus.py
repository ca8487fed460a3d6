"""The corpus: which rows are held out, what became of every row, and a cache that is right or not used.

pytest tests/test_corpus.py
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import QWEN3, chat_tokenizer

from lorafit.cache import cache_folder
from lorafit.data import (
    Corpus,
    Encoder,
    Example,
    Sequences,
    held_out_sources,
    load_tokenizer,
    parse_sources,
    read_corpus,
)
from lorafit.errors import InputError

CHATML = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("embedded")


@pytest.fixture
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer)


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(encoder: Encoder, *paths: Path | str, **options: Any) -> Corpus:
    return read_corpus(parse_sources([str(path) for path in paths]), encoder, **options)


def texts(sequences: Sequences, encoder: Encoder) -> list[str]:
    return [encoder.tokenizer.decode(one["input_ids"]) for one in sequences]


def said(corpus: Corpus) -> dict[str, Any]:
    """All of a corpus, in plain Python."""
    parts = {"train": corpus.train, "held_out": corpus.held_out}
    arrays = {
        f"{name} {array}": getattr(part, array).tolist()
        for name, part in parts.items()
        for array in ("ids", "trained", "offsets", "keys")
    }
    places = {name: [part.place(index) for index in range(len(part))] for name, part in parts.items()}
    return arrays | places | {
        "examples": corpus.held_out_examples, "sizes": corpus.sizes, "report": corpus.report.as_dict()
    }  # fmt: skip


# --- held-out rows --------------------------------------------------------------------------------

MANY = [{"prompt": f"question {index % 400}", "completion": f"answer {index}"} for index in range(1000)]


@pytest.fixture
def split(tmp_path: Path, encoder: Encoder) -> Callable[..., tuple[set[str], set[str]]]:
    def split(rows: Rows, fraction: float) -> tuple[set[str], set[str]]:
        corpus = read(encoder, write(tmp_path / "a.jsonl", rows), eval_fraction=fraction)
        train, held_out = texts(corpus.train, encoder), texts(corpus.held_out, encoder)
        assert len(train) + len(held_out) == len(rows) == corpus.report.rows
        assert len(train) == sum(corpus.sizes)
        assert [f"{one.prompt}\n{one.completion}</s>" for one in corpus.held_out_examples] == held_out
        return set(train), set(held_out)

    return split


def test_held_out_rows_are_about_the_fraction_asked_for_and_all_rows_are_somewhere(split: Any) -> None:
    train, held_out = split(MANY, 0.1)
    assert sorted(train | held_out) == sorted(f"{row['prompt']}\n{row['completion']}</s>" for row in MANY)
    # 100 expected of 400 prompts with two or three rows each: four standard deviations
    assert 36 < len(held_out) < 164


def test_which_rows_are_held_out_survives_reordering_and_appending(split: Any) -> None:
    train, held_out = split(MANY, 0.1)
    assert split(random.Random(0).sample(MANY, len(MANY)), 0.1) == (train, held_out)
    more, held_more = split([*MANY, *({"prompt": f"new {i}", "completion": "a"} for i in range(300))], 0.1)
    assert (train <= more, held_out <= held_more) == (True, True)
    # a larger share holds out all that a smaller one does
    assert held_out < split(MANY, 0.3)[1]


@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.3, 0.9])
def test_no_prompt_is_both_trained_and_held_out(split: Any, fraction: float) -> None:
    rows = [{"prompt": f"question {index % 7}", "completion": f"answer {index}"} for index in range(40)]
    parts = split(rows, fraction)
    prompts = [{text.partition("\n")[0] for text in part} for part in parts]
    assert not prompts[0] & prompts[1] and all(prompts)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_of_few_rows_one_is_held_out_and_it_is_the_same_in_any_order(split: Any, count: int) -> None:
    train, held_out = split(MANY[:count], 1e-9)
    assert (len(train), len(held_out)) == (count - 1, 1)
    assert split(MANY[:count][::-1], 1e-9) == (train, held_out)


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_one_prompt_cannot_be_split(tmp_path: Path, encoder: Encoder, fraction: float) -> None:
    for rows in ([{"prompt": "p", "completion": c} for c in "abc"], [{"prompt": "p", "completion": "a"}]):
        with pytest.raises(InputError, match=f"{len(rows)} examples? (is|are) of one prompt .* data.eval_path"):
            read(encoder, write(tmp_path / "a.jsonl", rows), eval_fraction=fraction)


def test_a_share_that_leaves_nothing_to_train_is_an_error(tmp_path: Path, encoder: Encoder) -> None:
    with pytest.raises(InputError, match="a.jsonl.: 5 examples are held out .* lower data.eval_fraction"):
        read(encoder, write(tmp_path / "a.jsonl", MANY[:5]), eval_fraction=1 - 1e-12)


def test_rows_of_plain_text_are_told_apart_by_their_text(tmp_path: Path, encoder: Encoder) -> None:
    rows = [{"text": f"text {index}"} for index in range(100)]
    corpus = read(encoder, write(tmp_path / "a.jsonl", rows), eval_fraction=0.2)
    assert 4 < len(corpus.held_out) < 36 and len(corpus.train) + len(corpus.held_out) == 100


def test_no_more_rows_are_held_out_than_are_used_and_none_of_the_rest_is_trained(
    tmp_path: Path, encoder: Encoder
) -> None:
    path = write(tmp_path / "a.jsonl", MANY)
    some, every = (read(encoder, path, eval_fraction=0.1, eval_limit=limit) for limit in (5, None))
    assert said(some)["train"] == said(every)["train"]
    assert said(some)["held_out"] == said(every)["held_out"][:5]


def test_rows_of_their_own_are_measured_on_and_all_others_are_trained(tmp_path: Path, encoder: Encoder) -> None:
    train, test = write(tmp_path / "a.jsonl", MANY[:20]), write(tmp_path / "b.jsonl", MANY[20:40])
    corpus = read(encoder, train, eval_sources=parse_sources(str(test)), eval_limit=3)
    assert said(corpus)["train"] == [f"{train}:{line}" for line in range(1, 21)]
    assert said(corpus)["held_out"] == [f"{test}:{line}" for line in (1, 2, 3)]


def test_a_folder_is_measured_on_its_held_out_files(tmp_path: Path, encoder: Encoder) -> None:
    for name, rows in {"train": MANY[:9], "validation": MANY[9:12], "test": MANY[12:20]}.items():
        write(tmp_path / "f" / f"{name}.jsonl", rows)
    corpus = read(encoder, tmp_path / "f")
    assert said(corpus)["train"] == [f"{tmp_path}/f/train.jsonl:{line}" for line in range(1, 10)]
    assert said(corpus)["held_out"] == [f"{tmp_path}/f/validation.jsonl:{line}" for line in (1, 2, 3)]


def test_rows_to_measure_on_that_are_too_long_or_bad_are_an_error(tmp_path: Path, tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, max_length=24)
    train = write(tmp_path / "a.jsonl", MANY[:9])
    for rows, found in (
        ([{"prompt": "long " * 30, "completion": "a"}], "none of the 1 rows of .*b.jsonl' can be measured on within"),
        (["broken"], "none of the 1 rows of .* 1 of them are bad, the first: .*b.jsonl:1: the line is not JSON"),
        (["\n"], "b.jsonl' has no rows"),
    ):
        test = parse_sources(str(write(tmp_path / "b.jsonl", rows)))
        with pytest.raises(InputError, match=found):
            read(encoder, train, eval_sources=test, on_bad_row="skip")


# --- every row is accounted for -------------------------------------------------------------------


@pytest.mark.parametrize("overflow", ["drop", "truncate", "truncate_prompt"])
def test_every_row_is_trained_held_out_dropped_or_skipped(tmp_path: Path, tokenizer: Any, overflow: str) -> None:
    rows: list[Any] = [{"prompt": "p " * (index % 60), "completion": f"answer {index}"} for index in range(1, 600)]
    for index in range(0, 599, 13):
        rows[index] = ["{", {"prompt": "p", "completion": ""}, {"prompt": None, "completion": "c"}][index % 3]
    encoder = Encoder(tokenizer, max_length=30, overflow=overflow)
    test = parse_sources(str(write(tmp_path / "b.jsonl", [{"prompt": "p", "completion": "c"}, "[]"])))
    corpus = read(encoder, write(tmp_path / "a.jsonl", rows), eval_sources=test, on_bad_row="skip")
    report = corpus.report
    bad = len(range(0, 599, 13))
    assert (report.rows, report.skipped) == (599 + 2, bad + 1)
    assert len(corpus.train) + report.dropped == 599 - bad == len(report.lengths)
    assert len(report.bad_rows) == 20 and report.bad_rows[0].startswith(f"{tmp_path}/a.jsonl:1: the line is not JSON")
    longer = sum(length > 30 for length in report.lengths)
    assert report.dropped + report.truncated == longer > 0
    assert (report.truncated == 0) == (overflow == "drop")
    assert max(corpus.train.lengths) <= 30


def test_each_source_is_read_in_its_own_layout_and_its_examples_are_counted(tmp_path: Path, encoder: Encoder) -> None:
    a = write(tmp_path / "a.jsonl", MANY[:300])
    b = write(tmp_path / "b.jsonl", [{"q": row["prompt"], "a": row["completion"], "id": 1} for row in MANY[300:700]])
    c = write(tmp_path / "c.jsonl", [{"text": f"text {index}"} for index in range(50)])
    mixed = [{"path": str(a)}, {"path": str(b), "columns": {"question": "q", "answer": "a"}}, {"path": str(c)}]
    corpus = read_corpus(parse_sources(mixed), encoder, eval_fraction=0.1)
    assert corpus.report.formats == ["prompt_completion", "question_answer", "text"]
    assert corpus.report.unused == [[], ["id"], []]
    places = said(corpus)["train"]
    assert corpus.sizes == [sum(place.startswith(f"{path}:") for place in places) for path in (a, b, c)]
    assert places == sorted(places, key=lambda place: (place[: len(str(a))], int(place.rpartition(":")[2])))


@pytest.mark.parametrize("overflow", ["truncate", "truncate_prompt", "drop"])
def test_when_the_lowest_prompt_is_held_out_only_what_is_trained_is_counted(
    tmp_path: Path, tokenizer: Any, overflow: str
) -> None:
    encoder = Encoder(tokenizer, max_length=12, overflow=overflow)
    for shift in (0, 1):  # the one held out is short, and long
        rows = [{"prompt": f"{index}", "completion": "word " * (3 + 4 * ((index + shift) % 2))} for index in range(8)]
        report = (corpus := read(encoder, write(tmp_path / "a.jsonl", rows), eval_fraction=1e-9)).report
        assert len(corpus.held_out) == 1
        whole = [len(encoder.encode(Example.of(row["prompt"], row["completion"])).ids) for row in rows]
        [gone] = corpus.held_out_examples
        left = [length for row, length in zip(rows, whole, strict=True) if row["prompt"] != gone.prompt]
        cut = sum(length > 12 for length in left)
        assert sorted(report.lengths) == sorted(left) and len(corpus.train) == 7 - report.dropped
        assert report.truncated + report.dropped == report.lost == cut > 0


def test_when_the_lowest_prompt_is_held_out_its_source_has_fewer_examples(tmp_path: Path, encoder: Encoder) -> None:
    a, b = write(tmp_path / "a.jsonl", MANY[:2]), write(tmp_path / "b.jsonl", MANY[400:404])
    corpus = read(encoder, a, b, eval_fraction=1e-9)
    places = said(corpus)["train"]
    assert corpus.sizes == [sum(place.startswith(f"{path}:") for place in places) for path in (a, b)]
    assert len(places) + len(corpus.held_out) == 6


def test_a_bad_row_is_an_error_that_says_how_to_go_on(tmp_path: Path, encoder: Encoder) -> None:
    path = write(tmp_path / "a.jsonl", [*MANY[:3], {"prompt": "p", "complation": "c"}])
    with pytest.raises(InputError) as caught:
        read(encoder, path, eval_fraction=0.1)
    message = str(caught.value)
    assert message.startswith(f"{path}:4: the row has no field 'completion'")
    assert message.endswith("(data.on_bad_row=skip leaves out bad rows, and counts them.)")
    assert ".. (" not in message and "?. (" not in message


def test_a_file_without_a_good_row_is_an_error_that_shows_the_first(tmp_path: Path, encoder: Encoder) -> None:
    path = write(tmp_path / "a.jsonl", ["{"] * 3)
    with pytest.raises(InputError, match="every row of .* was skipped as a bad one; the first: .*a.jsonl:1"):
        read(encoder, path, on_bad_row="skip")
    with pytest.raises(InputError, match="a.jsonl' has no rows"):
        read(encoder, write(tmp_path / "a.jsonl", ["", " "]))


def test_a_limit_reads_no_further_than_it_needs(tmp_path: Path, encoder: Encoder) -> None:
    path = write(tmp_path / "a.jsonl", [*MANY[:4], "broken"])
    assert read(encoder, path, limit=4, eval_fraction=0.1).report.rows == 4


def test_the_embedded_data_brings_its_own_rows_to_measure_on(encoder: Encoder) -> None:
    corpus = read(encoder, "embedded", limit=50, eval_limit=10)
    assert (len(corpus.train), len(corpus.held_out)) == (50, 10)
    assert not set(corpus.train.keys.tolist()) & set(corpus.held_out.keys.tolist())


# --- the cache ------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    return cache_folder("tokens")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many examples were tokenized, each time."""
    counts: list[int] = []
    encode_all = Encoder.encode_all

    def counted(self: Encoder, examples: Any) -> Any:
        found = encode_all(self, examples)
        counts.append(len(found))
        return found

    monkeypatch.setattr(Encoder, "encode_all", counted)
    yield counts


def test_what_was_read_once_is_not_read_again_and_is_the_same(
    tmp_path: Path, encoder: Encoder, cache: Path, encoded: list[int]
) -> None:
    rows: list[Any] = [*MANY[:50], "broken", *MANY[50:100]]
    options: dict[str, Any] = {"eval_fraction": 0.1, "on_bad_row": "skip"}
    path = write(tmp_path / "a.jsonl", rows)
    plain = read(encoder, path, **options)
    assert not cache.exists()
    first = read(encoder, path, cache=True, **options)
    assert sum(encoded) == 200
    second = read(encoder, path, cache=True, **options)
    assert sum(encoded) == 200 and len(list(cache.iterdir())) == 1
    assert said(plain) == said(first) == said(second)
    assert isinstance(second.train.ids, np.memmap)
    for ours, theirs in zip(first.train, second.train, strict=True):
        assert {name: array.dtype for name, array in ours.items()} == {n: a.dtype for n, a in theirs.items()}


def changes(folder: Path, tokenizer: Any) -> dict[str, Callable[[], Any]]:
    """Ways to read something else than `read(Encoder(tokenizer), folder / "a.jsonl", cache=True)`."""
    path, other = folder / "a.jsonl", folder / "b.jsonl"

    def changed(change: Callable[[Any], Any]) -> Any:
        one = copy.deepcopy(tokenizer)
        change(one)
        return one

    def chat(template: str) -> Any:
        return changed(lambda one: setattr(one, "chat_template", template))

    def with_(tokenizer: Any = tokenizer, path: Any = str(path), /, **options: Any) -> Callable[[], Any]:
        names = ("max_length", "train_on", "overflow", "template", "system")
        of_encoder = {name: options.pop(name) for name in names if name in options}
        return lambda: read_corpus(parse_sources(path), Encoder(tokenizer, **of_encoder), cache=True, **options)

    def content(rows: list[Any]) -> Callable[[], Any]:
        def reread() -> Any:
            before = path.read_bytes()
            write(path, rows)
            found = with_()()
            path.write_bytes(before)
            return found

        return reread

    write(other, MANY[:60])
    turned = {"prompt": "completion", "completion": "prompt"}
    return {
        "content": content([*MANY[:59], {"prompt": "question 59", "completion": "answer 60"}]),
        "order": content(MANY[:60][::-1]),
        "a row more": content(MANY[:61]),
        "white space": content([f" {json.dumps(row)}" for row in MANY[:60]]),
        "name": with_(tokenizer, str(other)),
        "two sources": with_(tokenizer, [str(path), str(other)]),
        "source's columns": with_(tokenizer, [{"path": str(path), "columns": turned}]),
        "source's format": with_(tokenizer, [{"path": str(path), "format": "prompt_completion"}]),
        "a token": with_(changed(lambda one: one.add_tokens(["question 5"]))),
        "end token": with_(changed(lambda one: setattr(one, "eos_token", "<s>"))),
        "chat template": with_(chat(CHATML)),
        "another chat template": with_(chat(CHATML.replace("\n", " "))),
        "system": with_(chat(CHATML), system="fold"),
        "template": with_(template="alpaca"),
        "max_length": with_(max_length=500),
        "train_on": with_(train_on="last_turn"),
        "all": with_(train_on="all"),
        "overflow": with_(overflow="truncate"),
        "limit": with_(limit=30),
        "eval_fraction": with_(eval_fraction=0.2),
        "eval_limit": with_(eval_limit=1),
        "on_bad_row": with_(on_bad_row="skip"),
        "rows to measure on": with_(eval_sources=parse_sources(str(other))),
        "part of those": with_(eval_sources=parse_sources(str(other)), eval_limit=7),
    }  # fmt: skip


def test_any_change_of_what_tokens_depend_on_is_another_entry(tmp_path: Path, tokenizer: Any, cache: Path) -> None:
    path = write(tmp_path / "a.jsonl", MANY[:60])
    read(Encoder(tokenizer), path, cache=True)
    count = 1
    for name, change in changes(tmp_path, tokenizer).items():
        change()
        count += 1
        assert len(list(cache.iterdir())) == count, name
        change()
        assert len(list(cache.iterdir())) == count, name
    read(Encoder(copy.deepcopy(tokenizer)), path, cache=True)
    assert len(list(cache.iterdir())) == count


def test_a_folders_entry_depends_on_all_of_its_files_and_their_names(
    tmp_path: Path, encoder: Encoder, cache: Path
) -> None:
    for name in ("train", "test"):
        write(tmp_path / "f" / f"{name}.jsonl", MANY[:9])
    read(encoder, tmp_path / "f", cache=True)
    write(tmp_path / "f" / "test.jsonl", MANY[:10])
    assert len(read(encoder, tmp_path / "f", cache=True).held_out) == 10
    (tmp_path / "f" / "train.jsonl").rename(tmp_path / "f" / "train_b.jsonl")
    assert said(read(encoder, tmp_path / "f", cache=True))["train"][0] == f"{tmp_path}/f/train_b.jsonl:1"
    write(tmp_path / "f" / "notes.txt", ["no data"])
    read(encoder, tmp_path / "f", cache=True)
    assert len(list(cache.iterdir())) == 3


def test_a_template_that_knows_the_day_is_read_anew_tomorrow(
    tmp_path: Path, tokenizer: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datetime

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2100, 1, 1)

    path = write(tmp_path / "a.jsonl", MANY[:60])
    for template, entries in ((CHATML, 1), (f"{{# strftime_now #}}{CHATML}", 2)):
        cache_before = len(list(cache.iterdir())) if cache.exists() else 0
        dated = copy.deepcopy(tokenizer)
        dated.chat_template = template
        read(Encoder(dated), path, cache=True)
        with monkeypatch.context() as patch:
            patch.setattr("lorafit.data.corpus.date", Tomorrow)
            read(Encoder(dated), path, cache=True)
        assert len(list(cache.iterdir())) - cache_before == entries


@pytest.mark.parametrize("damage", ["train-ids.npy", "held_out-keys.npy", "meta.json", "sums.json"])
def test_a_damaged_entry_is_read_anew_and_mended(
    tmp_path: Path, encoder: Encoder, cache: Path, encoded: list[int], damage: str
) -> None:
    path = write(tmp_path / "a.jsonl", MANY[:60])
    first = said(read(encoder, path, cache=True))
    once = sum(encoded)
    [entry] = cache.iterdir()
    content = bytearray((entry / damage).read_bytes())
    content[-3] ^= 1
    (entry / damage).write_bytes(content)
    assert said(read(encoder, path, cache=True)) == first and sum(encoded) == 2 * once
    assert said(read(encoder, path, cache=True)) == first and sum(encoded) == 2 * once


def test_a_half_written_entry_is_read_anew(tmp_path: Path, encoder: Encoder, cache: Path) -> None:
    path = write(tmp_path / "a.jsonl", MANY[:60])
    first = said(read(encoder, path, cache=True))
    [entry] = cache.iterdir()
    for file in sorted(entry.iterdir()):
        file.unlink()
        assert said(read(encoder, path, cache=True)) == first
        assert file.is_file()


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", MANY[:60])
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", Path("/proc/nowhere")):
        monkeypatch.setenv("LORAFIT_CACHE", str(folder))
        assert said(read(encoder, path, cache=True)) == said(read(encoder, path))


def test_what_cannot_be_read_is_the_same_error_with_a_cache(tmp_path: Path, encoder: Encoder, cache: Path) -> None:
    for path in (tmp_path / "nowhere.jsonl", tmp_path / "~nobody", write(tmp_path / "e" / "test.jsonl", []).parent):
        messages = []
        for cached in (False, True):
            with pytest.raises(InputError) as caught:
                read(encoder, path, cache=cached)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    assert not cache.exists()


def test_a_data_set_that_has_no_files_here_is_not_cached(
    tmp_path: Path, encoder: Encoder, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_the_hub(*_: Any) -> Any:
        import lorafit.data.sources as sources

        return (sources.Row(f"hub: row {i}", row) for i, row in enumerate(MANY[:60]))

    monkeypatch.setattr("lorafit.data.sources._hub", of_the_hub)
    assert len(read(encoder, "some/data", cache=True).train) > 40
    assert not cache.exists()


def test_held_out_examples_come_back_from_the_cache_as_they_were(tmp_path: Path, encoder: Encoder, cache: Path) -> None:
    turns = [
        *({"role": "user", "content": "é"}, {"role": "assistant", "content": "a", "weight": 0}),
        *({"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}),
    ]
    rows = [{"messages": [{"role": "system", "content": f"row {index}"}, *turns]} for index in range(30)]
    path = write(tmp_path / "a.jsonl", rows)
    first, second = (read(encoder, path, eval_fraction=0.3, cache=True).held_out_examples for _ in range(2))
    assert first == second and all(isinstance(one, Example) and not one.turns[2].trained for one in second)


def test_the_sources_that_hold_rows_out_may_be_named_or_found(tmp_path: Path, encoder: Encoder) -> None:
    for name in ("train", "test"):
        write(tmp_path / "f" / f"{name}.jsonl", MANY[:9])
    sources = parse_sources(str(tmp_path / "f"))
    found = read_corpus(sources, encoder)
    assert said(found) == said(read_corpus(sources, encoder, eval_sources=held_out_sources(sources)))


# --- accounts and sides ---------------------------------------------------------------------------


def test_rows_of_one_question_are_on_one_side_whatever_stands_around_or_behind_it(
    tmp_path: Path, encoder: Encoder
) -> None:
    def talk(index: int, *more: str) -> dict[str, Any]:
        said = (f"question {index}", f"answer {index}", *more)
        return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]}

    rows = [talk(index, *more) for index in range(200) for more in ((), ("And?", "No more."))]
    rows += [
        {"messages": [{"role": "user", "content": f"question {i} \n"}, talk(i)["messages"][1]]} for i in range(200)
    ]
    corpus = read(encoder, write(tmp_path / "a.jsonl", rows), eval_fraction=0.3)
    held_out = {example.turns[0].content.strip() for example in corpus.held_out_examples}
    assert 30 < len(held_out) < 90 and len(corpus.held_out_examples) == 3 * len(held_out)
    assert not np.isin(corpus.train.keys, corpus.held_out.keys).any()


@pytest.mark.parametrize("given", [True, False])
def test_held_out_rows_that_are_too_long_or_not_needed_are_counted(tmp_path: Path, tokenizer: Any, given: bool) -> None:
    rows = [{"prompt": f"question {i} " + "word " * (i % 2 * 60), "completion": "a"} for i in range(400)]
    path = write(tmp_path / "a.jsonl", rows)
    encoder = Encoder(tokenizer, max_length=40)
    if given:
        corpus = read(encoder, path, eval_sources=parse_sources(str(path)), eval_limit=1000)
        assert len(corpus.held_out) == corpus.report.eval_dropped == 200 and corpus.report.eval_unused == 0
        return
    corpus = read(encoder, path, eval_fraction=0.3, eval_limit=20)
    report = corpus.report
    # beyond the limit nothing is looked at any more
    assert report.eval_dropped > 0 and report.eval_unused > 20 and len(corpus.held_out) == 20
    assert len(corpus.train) + report.dropped + 20 + report.eval_dropped + report.eval_unused == 400


def test_a_row_with_nothing_to_learn_is_not_one_that_is_too_long(tmp_path: Path, tokenizer: Any) -> None:
    def talk(index: int) -> dict[str, Any]:
        asked = {"role": "user", "content": f"question {index}"}
        answers = [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b", "weight": index % 2}]
        return {"messages": [asked, answers[0], {"role": "user", "content": "And?"}, answers[1]]}

    path = write(tmp_path / "a.jsonl", [talk(index) for index in range(100)])
    corpus = read(Encoder(tokenizer, train_on="last_turn"), path, eval_fraction=0.1)
    report = corpus.report
    assert report.untrained + report.eval_dropped == 50 and report.dropped == report.lost == 0
    assert len(corpus.train) + len(corpus.held_out) == 50


def test_answers_that_are_too_long_are_lost_also_where_their_rows_are_skipped(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": f"q {index}", "completion": "word " * 40} for index in range(40)]
    encoder = Encoder(tokenizer, max_length=20, overflow="error")
    report = read(encoder, write(tmp_path / "a.jsonl", MANY[:40] + rows), on_bad_row="skip").report
    assert report.lost >= 30 and report.skipped == 40


def test_special_tokens_in_a_text_are_counted_and_named(tmp_path: Path, encoder: Encoder) -> None:
    rows = [*MANY[:30], {"prompt": "q", "completion": "a</s> b"}, {"prompt": "q", "completion": "all</s>"}]
    report = read(encoder, write(tmp_path / "a.jsonl", rows)).report
    assert report.marked == 1 and report.first_marked.endswith("a.jsonl:31 has '</s>'")


def test_a_limit_takes_of_each_source_its_part(tmp_path: Path, encoder: Encoder) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", MANY) for name in "ab"]
    assert sum(read(encoder, *paths, limit=40).sizes) == 40 - len(read(encoder, *paths, limit=40).held_out)
    weighted = parse_sources(
        [{"path": str(path), "weight": weight} for path, weight in zip(paths, (3, 1), strict=True)]
    )
    corpus = read_corpus(weighted, encoder, limit=40, eval_sources=parse_sources(str(paths[0])))
    assert corpus.sizes == [30, 10]


def test_a_row_whose_answer_the_template_rewrites_is_found_wherever_it_stands(tmp_path: Path) -> None:
    def talk(index: int) -> dict[str, Any]:
        first = "<think>\nold\n</think>\n\nA" if index == 90 else "A"
        said = (f"Q{index}", first, "R", "B")
        return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]}

    encoder = Encoder(chat_tokenizer(QWEN3))
    corpus = read(encoder, write(tmp_path / "a.jsonl", [talk(index) for index in range(100)]), eval_fraction=0.01)
    [fault] = corpus.report.faults
    assert fault.check == "answer_masked" and ":91:" in fault.message and "data.train_on=last_turn" in fault.message
