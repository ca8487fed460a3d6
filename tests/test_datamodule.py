"""The data module: from a path to counted, checked and proven batches.

pytest tests/test_datamodule.py
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chats import QWEN3, chat_tokenizer
from tokenizers import AddedToken

from lorafit.data import IGNORE, Encoder, ResumableLoader, StreamLoader, load_tokenizer
from lorafit.datamodule import FinetuneDataModule
from lorafit.errors import InputError

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(count: int, words: int = 1) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}", "completion": "cat " * (1 + i % words)} for i in range(count)]


def ready(*args: Any, **options: Any) -> FinetuneDataModule:
    data = FinetuneDataModule(*args, **options)
    data.setup()
    return data


def rows_of(batches: Any) -> list[list[int]]:
    """The token ids of every example in some batches, in order."""
    found = []
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            ids, positions = batch["input_ids"][row].tolist(), batch.get("position_ids")
            if positions is None:
                found.append(ids[: int(batch["attention_mask"][row].sum())])
            else:
                starts = [at for at, place in enumerate(positions[row].tolist()) if place == 0] + [len(ids)]
                parts = [ids[a:b] for a, b in zip(starts, starts[1:], strict=False)]
                found += [part for part in parts if set(part) != {2}]  # filler
    return found


# --- counts ---------------------------------------------------------------------------------------


def test_the_statistics_count_what_the_sequences_hold(tmp_path: Path, tokenizer) -> None:
    data = ready(
        write(tmp_path / "a.jsonl", *questions(60, words=30)),
        tokenizer=tokenizer,
        eval_fraction=0.2,
        max_length=24,
        max_lost=1.0,
    )
    numbers = data.statistics()
    sequences = list(data.train_sequences)
    assert numbers["train_examples"] == len(sequences) and numbers["eval_examples"] == len(data.eval_examples)
    assert numbers["train_tokens"] == sum(len(s["input_ids"]) for s in sequences)
    assert numbers["supervised_tokens"] == sum(int((s["labels"] != IGNORE).sum()) for s in sequences)
    encoder = Encoder(tokenizer)
    lengths = {e.where: len(encoder.encode(e).ids) for e in data.first_examples()}
    assert numbers["dropped_examples"] == sum(length > 24 for length in lengths.values()) > 0
    assert numbers["truncated_examples"] == 0 and len(sequences) == len(lengths) - numbers["dropped_examples"]


def test_repeated_rows_and_rows_that_are_held_out_as_well_are_counted_and_named(tmp_path: Path, tokenizer) -> None:
    rows = questions(10)
    train = write(tmp_path / "a.jsonl", *rows, rows[3], rows[3], rows[5] | {"completion": "another"})
    held_out = write(
        tmp_path / "b.jsonl", rows[7], {"messages": [{"role": "user", "content": "x"}]} | questions(20)[19]
    )
    data = ready(train, eval_path=held_out, tokenizer=tokenizer, format="prompt_completion")
    assert [data.train_sequences.place(int(i)) for i in data.duplicates()] == [f"{train}:11", f"{train}:12"]
    assert [data.train_sequences.place(int(i)) for i in data.leaked()] == [f"{train}:8"]
    numbers = data.statistics()
    assert (numbers["duplicate_examples"], numbers["leaked_examples"]) == (2, 1)


def test_the_content_hash_sees_tokens_and_labels_and_nothing_else(tokenizer) -> None:
    def digest(**options: Any) -> str | None:
        return ready(limit=20, eval_limit=5, tokenizer=tokenizer, **options).content_hash()

    assert digest() == digest(batch_size=3) == digest(cache=True) == digest(cache=True)
    assert len({digest(), digest(train_on="all"), digest(max_length=18, max_lost=1.0)}) == 3


# --- rows to measure on -----------------------------------------------------------------------------


def test_rows_for_evaluation_are_those_of_their_own_file(tmp_path: Path, tokenizer) -> None:
    train = write(tmp_path / "a.jsonl", *({"prompt": f"train {i}", "completion": "a"} for i in range(4)))
    test = write(tmp_path / "b.jsonl", *({"prompt": f"test {i}", "completion": "a"} for i in range(4)))
    data = ready(train, eval_path=test, eval_limit=3, tokenizer=tokenizer)
    assert [e.prompt for e in data.eval_examples] == ["test 0", "test 1", "test 2"]
    assert len(data.train_sequences) == 4


def test_one_prompt_cannot_be_split(tmp_path: Path, tokenizer) -> None:
    for number, prompt in enumerate(("same", "another", "a third")):  # wherever its hash falls
        path = write(tmp_path / f"{number}.jsonl", {"prompt": prompt, "completion": "a"})
        with pytest.raises(InputError, match="1 example is of one prompt .* data.eval_path"):
            ready(path, tokenizer=tokenizer, eval_fraction=0.5)


def test_a_token_outside_the_vocabulary_is_an_error_that_names_its_row(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", *questions(12))
    data = ready(path, tokenizer=tokenizer, eval_fraction=0.2)
    largest = int(data.train_sequences.ids.max())
    data.check_vocabulary(int(max(largest, data.eval_sequences.ids.max())) + 1)
    with pytest.raises(InputError, match=rf"a.jsonl:\d+: the tokenizer gives token id {largest} .*{largest} tokens"):
        data.check_vocabulary(largest)


# --- what is refused --------------------------------------------------------------------------------


def test_too_many_lost_answers_are_refused_with_the_length_that_would_do(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", *questions(100, words=30))
    with pytest.raises(InputError, match="data.allow=\\[answer_lost\\]") as caught:
        ready(path, tokenizer=tokenizer, max_length=20).require_proof()
    needed = int(str(caught.value).partition("99 % in ")[2].partition(":")[0])
    assert ready(path, tokenizer=tokenizer, max_length=needed).refusals() == []
    assert ready(path, tokenizer=tokenizer, max_length=20, allow=["answer_lost"]).refusals() == []
    assert ready(path, tokenizer=tokenizer, max_length=20, max_lost=0.9).refusals() == []


def test_a_length_that_leaves_no_answer_is_refused_as_such(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", *({"prompt": f"{i} " * 40, "completion": "a"} for i in range(9)))
    [refusal] = ready(path, tokenizer=tokenizer, max_length=20).refusals()
    assert refusal.check == "no_supervised_token" and "data.max_length=20: raise it" in refusal.message


def test_cut_answers_that_lose_every_end_token_are_refused(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", *({"prompt": f"{i}", "completion": "cat " * 40} for i in range(9)))
    data = ready(path, tokenizer=tokenizer, max_length=20, overflow="truncate", max_lost=1.0)
    assert [refusal.check for refusal in data.refusals()] == ["end_masked"]
    assert data.statistics()["truncated_examples"] == len(data.train_sequences) > 0


def test_a_template_of_another_tokenizer_is_refused(tmp_path: Path, tokenizer) -> None:
    strange = copy.deepcopy(tokenizer)
    strange.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    path = write(tmp_path / "a.jsonl", *questions(20))
    assert [refusal.check for refusal in ready(path, tokenizer=strange).refusals()] == ["template_mismatch"]
    fitting = copy.deepcopy(strange)
    fitting.add_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")], special_tokens=True)
    assert ready(path, tokenizer=fitting).refusals() == []


# --- batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packing": True, "max_length": 48},
        {"padding_free": True},
        {"packing": True, "padding_free": True, "max_length": 48},
        {"group_by_length": True},
        {"num_workers": 2, "packing": True, "max_length": 48},
    ],
)
def test_every_way_of_batching_has_every_example_once_an_epoch(tokenizer, options: dict[str, Any]) -> None:
    data = ready(limit=101, eval_limit=5, tokenizer=tokenizer, batch_size=8, **options)
    loader = data.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    expected = sorted(s["input_ids"].tolist() for s in data.train_sequences)
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert sorted(rows_of(batches)) == expected
        assert sum(int(batch["tokens"]) for batch in batches) == data.statistics()["train_tokens"]


def test_packed_rows_hold_no_more_than_max_length_and_waste_little(tokenizer) -> None:
    data = ready(eval_limit=5, tokenizer=tokenizer, packing=True, max_length=256)
    batches = list(data.train_dataloader())
    assert max(batch["input_ids"].shape[1] for batch in batches) <= 256
    filled = sum(int(b["tokens"]) for b in batches) / sum(b["input_ids"].numel() for b in batches)
    assert filled > 0.98
    least = -(-data.statistics()["train_tokens"] // 256)
    assert least <= data.statistics()["packed_rows"] <= 1.02 * least


def test_weights_are_shares_of_the_rows_of_an_epoch(tmp_path: Path, tokenizer) -> None:
    one = write(tmp_path / "one.jsonl", *({"prompt": f"one {i}", "completion": "a"} for i in range(90)))
    two = write(tmp_path / "two.jsonl", *({"prompt": f"two {i}", "completion": "a"} for i in range(30)))
    held_out = write(tmp_path / "held.jsonl", *questions(3))
    path = [{"path": one, "weight": 1}, {"path": two, "weight": 3}]
    data = ready(path, eval_path=held_out, tokenizer=tokenizer, batch_size=10)
    first = tokenizer("two").input_ids[0]
    for _ in range(2):
        rows = rows_of(data.train_dataloader())
        assert len(rows) == 120 and sum(row[0] == first for row in rows) == 90
    plain = ready([one, two], eval_path=held_out, tokenizer=tokenizer, batch_size=10)
    assert sum(row[0] == first for row in rows_of(plain.train_dataloader())) == 30


def test_a_streamed_run_trains_what_a_run_in_memory_trains(tokenizer) -> None:
    options: dict[str, Any] = {
        "limit": 300,
        "eval_limit": 5,
        "tokenizer": tokenizer,
        "batch_size": 16,
        "eval_path": None,
    }
    memory = ready(**options)
    stream = ready(streaming=True, stream_batches=-(-300 // 16), window=4096, **options)
    loader = stream.train_dataloader()
    assert isinstance(loader, StreamLoader)
    assert sorted(rows_of(loader)) == sorted(s["input_ids"].tolist() for s in memory.train_sequences)
    kept = ("train_examples", "train_tokens", "supervised_tokens", "dropped_examples")
    assert {k: stream.statistics()[k] for k in kept} == {k: memory.statistics()[k] for k in kept}


def test_streaming_holds_out_the_same_rows_as_reading_it_all(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", *questions(400))
    memory = ready(path, tokenizer=tokenizer, eval_limit=10, eval_fraction=0.1)
    stream = ready(path, tokenizer=tokenizer, eval_limit=10, eval_fraction=0.1, streaming=True, stream_batches=60)
    assert stream.eval_examples == memory.eval_examples and len(stream.eval_examples) == 10
    held_out = {tuple(s["input_ids"].tolist()) for s in stream.eval_sequences}
    assert not held_out & {tuple(row) for row in rows_of(stream.train_dataloader())}


def test_the_sample_for_the_proof_of_packing_has_several_examples_of_fair_length(tokenizer) -> None:
    sample = ready(eval_limit=5, tokenizer=tokenizer).sample_for_packing()
    assert len(sample) == 4 and 16 < sum(len(s["input_ids"]) for s in sample) <= 512
    tiny = ready(limit=3, eval_limit=1, tokenizer=tokenizer).sample_for_packing()
    assert len(tiny) == 3 and torch.tensor(np.concatenate([s["input_ids"] for s in tiny])).dtype == torch.int64


# --- real data --------------------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not here")
@pytest.mark.parametrize(
    ("name", "columns", "trained", "held_out"),
    [
        ("gsm8k", {"prompt": "question", "completion": "answer"}, 7473, 1319),
        ("mts-dialog", {"prompt": "dialogue", "completion": "section_text"}, 1201, 100),
        ("banking77", {"prompt": "text", "completion": "category"}, 10003, 3080),
    ],
)
def test_real_data_is_read_whole_from_its_folder(tokenizer, name, columns, trained: int, held_out: int) -> None:
    data = ready(str(DATA / name), columns=columns, tokenizer=tokenizer, max_length=20_000)
    numbers = data.statistics()
    assert (numbers["train_examples"], numbers["eval_examples"]) == (trained, held_out)
    assert numbers["dropped_examples"] == numbers["skipped_rows"] == 0 and data.refusals() == []


# --- sides and sources ----------------------------------------------------------------------------


def test_a_resumed_run_hears_that_its_data_has_changed(tmp_path: Path, tokenizer, caplog) -> None:
    path = write(tmp_path / "a.jsonl", *questions(40))
    state = ready(path, tokenizer=tokenizer).state_dict()
    ready(path, tokenizer=tokenizer, packing=True, batch_size=3).load_state_dict(state)
    assert not caplog.records
    write(tmp_path / "a.jsonl", *questions(40, words=2))
    ready(path, tokenizer=tokenizer).load_state_dict(state)
    assert "resume: the training tokens are not those" in caplog.text


def test_a_weighted_stream_holds_out_each_row_once_and_calls_no_row_a_duplicate_of_itself(
    tmp_path: Path, tokenizer
) -> None:
    long = write(tmp_path / "a.jsonl", *questions(300))
    short = write(tmp_path / "b.jsonl", *({"prompt": f"other {i}", "completion": "b"} for i in range(10)))
    paths = [{"path": long, "weight": 0.5}, {"path": short, "weight": 0.5}]
    options = {"tokenizer": tokenizer, "streaming": True, "eval_fraction": 0.3, "eval_limit": 1000, "window": 200}
    data = ready(paths, **options)
    places = [example.where for example in data.eval_examples]
    assert len(places) == len(set(places)) > 60
    assert len(set(data.train_sequences.keys.tolist())) < len(data.train_sequences) and not len(data.duplicates())


def test_a_weighted_source_without_a_row_to_train_is_refused_at_once(tmp_path: Path, tokenizer) -> None:
    rows = questions(6)
    paths = [write(tmp_path / f"{i}.jsonl", row) for i, row in enumerate(rows)]
    with pytest.raises(InputError, match="source [1-6] of 6 has a weight, and no row of it is left .* data.eval_path"):
        ready([{"path": path, "weight": 1} for path in paths], tokenizer=tokenizer, eval_fraction=1e-9)


def test_a_stream_of_bad_rows_names_the_file_that_holds_them(tmp_path: Path, tokenizer) -> None:
    bad = write(tmp_path / "bad.jsonl", *([{"prompt": "p", "completion": None}] * 20))
    good = write(tmp_path / "good.jsonl", *questions(20))
    with pytest.raises(InputError, match="rows of '[^']*bad.jsonl' give nothing to train; .* bad: [^ ]*bad.jsonl:1: "):
        ready(bad, tokenizer=tokenizer, eval_path=good, streaming=True, eval_limit=4, on_bad_row="skip")


def test_no_example_that_is_shown_is_held_out(tmp_path: Path, tokenizer) -> None:
    data = ready(write(tmp_path / "a.jsonl", *questions(5)), tokenizer=tokenizer, eval_fraction=1e-9)
    shown = [example.where for example in data.first_examples()]
    assert len(shown) == len(data.train_sequences) == 4 and data.eval_examples[0].where not in shown


def test_an_answer_that_the_template_rewrites_is_found_in_a_stream_wherever_it_stands(tmp_path: Path) -> None:
    def talk(index: int) -> dict[str, Any]:
        first = "<think>\nold\n</think>\n\nA" if index == 391 else "A"
        said = (f"Q{index}", first, "R", "B")
        return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]}

    path = write(tmp_path / "a.jsonl", *(talk(index) for index in range(400)))
    data = ready(path, tokenizer=chat_tokenizer(QWEN3), streaming=True, eval_limit=4)
    [refusal] = data.refusals()
    assert refusal.check == "answer_masked" and ":392:" in refusal.message
