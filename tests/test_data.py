"""Data: which tokens are trained, what wrong input is told, and an order that a checkpoint can continue.

pytest tests/test_data.py
"""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from lorafit.data import IGNORE, Encoder, Example, ResumableLoader, collate, load_examples, load_tokenizer
from lorafit.data.formats import alpaca_prompt, split_held_out
from lorafit.datamodule import FinetuneDataModule
from lorafit.embedded import MODEL, TEST, TRAIN
from lorafit.errors import InputError

CHATML = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = Example("What does Felix do for a living?", "potter", "here")
GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "test.jsonl"
SMOLLM2 = Path.home() / ".cache" / "lorafit-models" / "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


@pytest.fixture(scope="module")
def chatml(tokenizer):
    """The embedded tokenizer with ChatML turns, whose end is its end token."""
    chat = copy.deepcopy(tokenizer)
    chat.add_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")], special_tokens=True)
    chat.eos_token = "<|im_end|>"
    chat.chat_template = CHATML
    return chat


def adding(tokenizer, pattern: str):
    """A copy of the tokenizer that puts special tokens around every text by itself."""
    changed = copy.deepcopy(tokenizer)
    special = [("<s>", changed.bos_token_id), ("</s>", changed.eos_token_id)]
    changed.backend_tokenizer.post_processor = TemplateProcessing(single=pattern, special_tokens=special)
    return changed


def trained(sequence: dict[str, list[int]]) -> list[int]:
    return [label for label in sequence["labels"] if label != IGNORE]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def refused(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_examples(*args, **kwargs)
    return str(caught.value)


# --- which tokens are trained ---------------------------------------------------------------------


def test_labels_mask_the_prompt_and_only_the_prompt(tokenizer) -> None:
    prompt = tokenizer("What does Felix do for a living?\n").input_ids
    answer = [*tokenizer("potter").input_ids, tokenizer.eos_token_id]
    assert Encoder(tokenizer).encode(QUESTION) == {
        "input_ids": prompt + answer,
        "labels": [IGNORE] * len(prompt) + answer,
    }


def test_the_model_is_given_in_use_what_stands_before_its_answer_in_training(tokenizer, chatml) -> None:
    for any_tokenizer in (tokenizer, chatml, adding(tokenizer, "<s> $A </s>")):
        encoder = Encoder(any_tokenizer)
        sequence = encoder.encode(QUESTION)
        prompt = encoder.encode_prompt(QUESTION.prompt)
        assert sequence["input_ids"][: len(prompt)] == prompt
        assert sequence["labels"][: len(prompt) + 1] == [IGNORE] * len(prompt) + [sequence["input_ids"][len(prompt)]]


def test_train_on_all_trains_every_token(tokenizer) -> None:
    sequence = Encoder(tokenizer, train_on="all").encode(QUESTION)
    assert sequence["labels"] == sequence["input_ids"]


@pytest.mark.parametrize("completion", ["potter", "potter</s>", "a </s> inside", "", "naïve 日本語 🙂"])
@pytest.mark.parametrize("prompt", ["Who?", ""])
def test_the_end_token_is_trained_once_and_last_whatever_the_completion(tokenizer, prompt, completion) -> None:
    labels = trained(Encoder(tokenizer).encode(Example(prompt, completion, "here")))
    assert labels[-1] == tokenizer.eos_token_id != labels[-2:-1]
    assert tokenizer.decode(labels).removesuffix("</s>") == completion.removesuffix("</s>")


def test_a_chat_template_trains_exactly_the_answer_and_the_end_of_its_turn(chatml) -> None:
    sequence = Encoder(chatml).encode(QUESTION)
    assert chatml.decode(sequence["input_ids"]) == (
        "<|im_start|>user\nWhat does Felix do for a living?<|im_end|>\n<|im_start|>assistant\npotter<|im_end|>"
    )
    assert chatml.decode(trained(sequence)) == "potter<|im_end|>"
    assert trained(sequence)[-1] == chatml.eos_token_id


def test_the_template_is_the_tokenizers_own_unless_plain_is_asked_for(chatml) -> None:
    assert Encoder(chatml).encode(QUESTION) == Encoder(chatml, template="chat").encode(QUESTION)
    plain = Encoder(chatml, template="plain").encode(QUESTION)
    assert chatml.decode(plain["input_ids"]) == "What does Felix do for a living?\npotter<|im_end|>"


def test_a_template_that_ends_its_turn_otherwise_still_gets_the_end_token(chatml) -> None:
    other = copy.deepcopy(chatml)
    other.eos_token = "</s>"
    assert other.decode(trained(Encoder(other).encode(QUESTION))) == "potter<|im_end|>\n</s>"


def test_a_template_that_renders_an_answered_prompt_otherwise_is_refused(chatml) -> None:
    other = copy.deepcopy(chatml)
    other.chat_template = "{% if not add_generation_prompt %}answered{% endif %}" + CHATML
    with pytest.raises(InputError, match="data.template=plain"):
        Encoder(other).encode(QUESTION)


@pytest.mark.parametrize(
    ("pattern", "beginning"), [("<s> $A </s>", ["<s>"]), ("<s> $A", ["<s>"]), ("$A </s>", []), ("</s> $A", ["</s>"])]
)
def test_special_tokens_that_the_tokenizer_adds_stand_at_the_ends_alone(tokenizer, pattern, beginning) -> None:
    encoder = Encoder(adding(tokenizer, pattern))
    for prompt in (QUESTION.prompt, ""):
        text = [*tokenizer.tokenize(f"{prompt}\n" if prompt else ""), *tokenizer.tokenize("potter")]
        sequence = encoder.encode(Example(prompt, "potter", "here"))
        assert tokenizer.convert_ids_to_tokens(sequence["input_ids"]) == [*beginning, *text, "</s>"]
        assert tokenizer.decode(trained(sequence)) == "potter</s>"


def test_padding_is_neither_trained_nor_attended_to(tokenizer) -> None:
    short, long = (Encoder(tokenizer).encode(Example("Who?", text, "")) for text in ("cat", "cat " * 9))
    batch = collate([short, long], tokenizer.pad_token_id)
    length = len(short["input_ids"])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, len(long["input_ids"]))
    assert batch["input_ids"][0, length:].eq(tokenizer.pad_token_id).all()
    assert batch["labels"][0, length:].eq(IGNORE).all()
    assert batch["attention_mask"].sum(dim=1).tolist() == [length, len(long["input_ids"])]
    assert batch["labels"][0, :length].tolist() == short["labels"]


def test_cut_rows_are_counted_and_rows_without_an_answer_left_are_dropped_and_counted(tokenizer) -> None:
    prompt, answer = len(tokenizer("Who is it?\n").input_ids), len(tokenizer("cat").input_ids) + 1
    rows = [Example("Who is it?", text, "") for text in ("cat", "the cat and the dog and the cat")]
    encoder = Encoder(tokenizer, max_length=prompt + answer)
    kept = encoder.encode_all([*rows, Example("Who is it? " * 9, "cat", "")])
    assert (encoder.truncated, encoder.dropped) == (2, 1)
    assert [len(trained(sequence)) for sequence in kept] == [answer, answer]
    assert trained(kept[0])[-1] == tokenizer.eos_token_id != trained(kept[1])[-1]


def test_a_row_whose_only_trained_token_is_its_first_is_dropped(tokenizer) -> None:
    encoder = Encoder(tokenizer, max_length=1)
    assert encoder.encode_all([Example("", "cat", "")]) == [] and encoder.dropped == 1


@pytest.mark.parametrize(("option", "value", "near"), [("template", "chats", "chat"), ("train_on", "al", "all")])
def test_a_wrong_choice_is_told_the_nearest(tokenizer, option: str, value: str, near: str) -> None:
    with pytest.raises(InputError, match=f"data.{option} .*{value}.*Did you mean '{near}'"):
        Encoder(tokenizer, **{option: value})


def test_the_chat_template_asked_for_must_be_there(tokenizer) -> None:
    with pytest.raises(InputError, match="data.template=plain"):
        Encoder(tokenizer, template="chat")


@pytest.mark.skipif(not (SMOLLM2.is_dir() and GSM8K.is_file()), reason="the real model and data are not here")
def test_a_real_chat_model_is_trained_on_the_answers_of_real_rows() -> None:
    real = load_tokenizer(str(SMOLLM2))
    rows = load_examples(GSM8K, columns={"prompt": "question", "completion": "answer"}, limit=5)
    for row, sequence in zip(rows, Encoder(real).encode_all(rows), strict=True):
        assert real.decode(trained(sequence)) == row.completion + real.eos_token
        assert row.prompt in real.decode(sequence["input_ids"])


# --- files ----------------------------------------------------------------------------------------

ROWS = [{"prompt": "What is 1+1?", "completion": "2"}, {"prompt": 'Say "a, b"', "completion": "a,\nb"}]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_format_of_file_gives_the_same_rows(tmp_path: Path, offline: None, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, ROWS)))  # blank lines are no rows
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    else:
        import pandas

        frame = pandas.DataFrame(ROWS)
        frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    examples = load_examples(path)
    assert [(e.prompt, e.completion) for e in examples] == [(r["prompt"], r["completion"]) for r in ROWS]
    assert all(f"rows.{kind}" in e.where for e in examples) and len({e.where for e in examples}) == 2


def test_columns_choose_the_fields_and_numbers_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"q": "1+1", "a": 2, "prompt": "no", "completion": "no"})
    [example] = load_examples(path, columns={"prompt": "q", "completion": "a"})
    assert (example.prompt, example.completion, example.where) == ("1+1", "2", f"{path}:1")


def test_alpaca_rows_are_told_by_their_fields_and_rendered_under_headings(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
    ]
    first, second = load_examples(write(tmp_path / "a.jsonl", *rows))
    assert first.prompt == "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:" == alpaca_prompt("Add.", "1 2")
    assert second.prompt == "### Instruction:\nHi\n\n### Response:" and second.completion == "Hello"


def test_a_limit_reads_no_further_than_it_needs(tmp_path: Path) -> None:
    assert len(load_examples(write(tmp_path / "a.jsonl", ROWS[0], "broken"), limit=1)) == 1


def test_the_embedded_data_has_its_two_splits() -> None:
    assert len(load_examples("embedded")) == len(TRAIN.read_text().splitlines())
    first = json.loads(TEST.read_text().partition("\n")[0])
    [example] = load_examples("embedded", split="test", limit=1)
    assert (example.prompt, example.completion) == (first["prompt"], first["completion"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "", "a.jsonl' is empty"),
        ("a.jsonl", "\n\n", "a.jsonl' has no rows"),
        ("a.jsonl", f'{json.dumps(ROWS[0])}\n{{"prompt": \n', "a.jsonl:2: the line is not JSON"),
        ("a.jsonl", b'{"prompt": "\xff"}', "a.jsonl:1: the line is not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: a row must be a JSON object, this is list"),
        ("a.jsonl", '\n{"prompt": "p", "completion": null}', "a.jsonl:2: field 'completion' must be text, it is None"),
        ("a.jsonl", '{"prompt": ["p"], "completion": "c"}', "a.jsonl:1: field 'prompt' must be text, it is list"),
        ("a.jsonl", '{"prompt": "p", "completion": true}', "a.jsonl:1: field 'completion' must be text, it is bool"),
        ("a.jsonl", '{"prompt": "p", "completion": " "}', "a.jsonl:1: the completion is empty"),
        ("a.jsonl", '{"question": "p", "answer": "c"}', "a.jsonl:1: no format fits the fields 'question', 'answer'"),
        ("a.json", '{"prompt": "p"}', "a.json: the file must hold one list of objects"),
        ("a.json", "[1, 2]", "a.json: the file must hold one list of objects"),
        ("a.json", '{"a": 1}\n{"a": 2}', "Is it JSON lines? Name it .jsonl"),
        ("a.json", '[{"prompt": "p", "completion": ""}]', "a.json: row 1: the completion is empty"),
        ("a.txt", "text", "has the ending '.txt': jsonl, json, csv or parquet is read"),
    ],
)
def test_wrong_data_is_told_by_file_and_line(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(path)
    assert said in message and str(path) in message


def test_a_missing_file_is_told_the_one_that_was_meant(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS[0])
    assert refused(tmp_path / "trian.jsonl").endswith("does not exist. Did you mean 'train.jsonl'?")
    assert "is a folder: name one of its files" in refused(tmp_path)


def test_a_missing_field_is_told_the_one_that_was_meant(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "p", "answer": "c"})
    message = refused(path, columns={"prompt": "question", "completion": "anser"})
    assert message.startswith(f"{path}:1: the row has no field 'anser'; it has 'question', 'answer'.")
    assert "Did you mean 'answer'?" in message and "data.columns=" in message
    assert "names the fields of prompt and completion" in refused(path, columns={"promt": "question"})
    assert "Did you mean 'alpaca'?" in refused(path, format="alpacca")


def test_a_broken_table_is_one_message_that_names_it(tmp_path: Path, offline: None) -> None:
    (tmp_path / "a.parquet").write_text("this is no parquet")
    assert refused(tmp_path / "a.parquet").startswith("data 'a.parquet' cannot be read: ")


def test_a_tokenizer_without_an_end_token_is_refused_and_one_without_padding_is_not(tmp_path: Path, tokenizer) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((MODEL / name).read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write(tmp_path / "tokenizer_config.json", {key: value for key, value in settings.items() if key != "pad_token"})
    padded = load_tokenizer(str(tmp_path))
    assert padded.pad_token_id == padded.eos_token_id == tokenizer.eos_token_id
    write(tmp_path / "tokenizer_config.json", {key: value for key, value in settings.items() if key != "eos_token"})
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id is None
    with pytest.raises(InputError, match="has no end token, .* never stops"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path / "nowhere"))


# --- held-out rows --------------------------------------------------------------------------------

MANY = [Example(f"question {i % 400}", f"answer {i}", f"row {i}") for i in range(1000)]


def test_held_out_rows_are_about_the_fraction_asked_for() -> None:
    train, held_out = split_held_out(MANY, 0.1)
    assert sorted([*train, *held_out], key=str) == sorted(MANY, key=str)
    assert 60 < len(held_out) < 140  # 100 expected, four standard deviations of 400 prompts


def test_which_rows_are_held_out_survives_reordering_and_appending() -> None:
    _, held_out = split_held_out(MANY, 0.1)
    _, reordered = split_held_out(MANY[::-1], 0.1)
    _, appended = split_held_out([*MANY, *(Example(f"new {i}", "a", "") for i in range(300))], 0.1)
    assert set(reordered) == set(held_out) == set(appended) & set(MANY)


def test_no_prompt_is_both_trained_and_held_out() -> None:
    train, held_out = split_held_out(MANY, 0.3)
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_of_few_rows_at_least_one_is_held_out_and_one_trained(count: int) -> None:
    train, held_out = split_held_out(MANY[:count], 1e-9)
    assert len(held_out) == 1 and len(train) == count - 1


def test_one_prompt_cannot_be_split() -> None:
    with pytest.raises(InputError, match="data.eval_path"):
        split_held_out([Example("same", "a", ""), Example("same", "b", "")], 0.5)


def test_rows_of_plain_text_are_told_apart_by_their_text() -> None:
    train, held_out = split_held_out([Example("", f"text {i}", "") for i in range(100)], 0.2)
    assert 5 < len(held_out) < 40


# --- the order of batches -------------------------------------------------------------------------

SEQUENCES = [{"input_ids": [i] * (1 + i % 3), "labels": [i] * (1 + i % 3)} for i in range(11)]


def rows_of(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def loader(**options: Any) -> ResumableLoader:
    return ResumableLoader(SEQUENCES, 2, pad_id=99, shuffle=True, seed=3, **options)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_goes_on_exactly_where_another_stood(num_workers: int) -> None:
    unbroken = loader()
    expected = [[rows_of(batch) for batch in unbroken] for _ in range(3)]
    for position in range(len(unbroken) + 1) if num_workers == 0 else (0, 3, 6):
        first = loader(num_workers=num_workers)
        iterator = iter(first)
        seen = [rows_of(next(iterator)) for _ in range(position)]
        second = loader(num_workers=num_workers)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        rest = [rows_of(batch) for batch in second]
        # a loader that stands at the end of an epoch begins the next
        assert seen + rest == expected[0] + (expected[1] if position == len(unbroken) else [])
        assert [rows_of(batch) for batch in second] == expected[2 if position == len(unbroken) else 1]


def test_every_epoch_has_all_rows_once_in_an_order_of_its_own() -> None:
    one = loader()
    epochs = [[row for batch in one for row in rows_of(batch)] for _ in range(4)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert all(a != b for a, b in pairwise(epochs))
    assert [rows_of(batch) for batch in loader()] != [
        rows_of(b) for b in ResumableLoader(SEQUENCES, 2, 99, shuffle=True)
    ]
    plain = ResumableLoader(SEQUENCES, 2, 99)
    assert [row for batch in plain for row in rows_of(batch)] == list(range(11))


@pytest.mark.parametrize("replicas", [2, 3, 6])
def test_replicas_share_out_the_batches_and_each_gets_as_many(replicas: int) -> None:
    shares = [[rows_of(b) for b in loader(replica=i, replicas=replicas)] for i in range(replicas)]
    whole = [rows_of(batch) for batch in loader()]
    handed_out = [batch for share in shares for batch in share]
    assert {len(share) for share in shares} == {len(whole) // replicas}
    assert sorted(handed_out) == sorted(whole)


def test_more_replicas_than_batches_still_get_one_each() -> None:
    assert all(len(list(loader(replica=i, replicas=8))) == 1 for i in range(8))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_reading_draws_nothing_from_the_global_generator(num_workers: int) -> None:
    before = torch.get_rng_state()
    assert len(list(loader(num_workers=num_workers))) == 6
    assert torch.equal(torch.get_rng_state(), before)


# --- the data module ------------------------------------------------------------------------------


def test_the_data_module_counts_what_its_sequences_hold(tmp_path: Path, tokenizer) -> None:
    rows = [{"prompt": f"question {i}", "completion": "cat " * (1 + i)} for i in range(30)]
    data = FinetuneDataModule(
        str(write(tmp_path / "a.jsonl", *rows)), tokenizer=tokenizer, eval_fraction=0.2, max_length=24
    )
    data.setup()
    numbers = data.statistics()
    assert (
        numbers["train_examples"] + len(data.eval_examples) == 30 == len(data.train_examples) + len(data.eval_examples)
    )
    assert numbers["train_tokens"] == sum(len(s["input_ids"]) for s in data.train_sequences)
    assert numbers["supervised_tokens"] == sum(len(trained(s)) for s in data.train_sequences)
    full = [Encoder(tokenizer).encode(e)["input_ids"] for e in data.train_examples]
    assert numbers["truncated_examples"] == sum(len(ids) > 24 for ids in full) > 0 == numbers["dropped_examples"]


def test_rows_for_evaluation_are_those_of_their_own_file(tmp_path: Path, tokenizer) -> None:
    train = write(tmp_path / "a.jsonl", *({"prompt": f"train {i}", "completion": "a"} for i in range(4)))
    test = write(tmp_path / "b.jsonl", *({"prompt": f"test {i}", "completion": "a"} for i in range(4)))
    data = FinetuneDataModule(str(train), eval_path=str(test), eval_limit=3, tokenizer=tokenizer)
    data.setup()
    assert [e.prompt for e in data.eval_examples] == ["test 0", "test 1", "test 2"]
    assert [e.prompt for e in data.train_examples] == [f"train {i}" for i in range(4)]


def test_a_length_that_leaves_no_answer_is_an_error(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", *({"prompt": f"{i} " * 40, "completion": "a"} for i in range(9)))
    with pytest.raises(InputError, match="data.max_length=20: raise it"):
        FinetuneDataModule(str(path), tokenizer=tokenizer, max_length=20).setup()


def test_a_token_outside_the_vocabulary_is_an_error(tokenizer) -> None:
    data = FinetuneDataModule(limit=20, eval_limit=5, tokenizer=tokenizer)
    data.setup()
    largest = max(max(s["input_ids"]) for s in [*data.train_sequences, *data.eval_sequences])
    data.check_vocabulary(largest + 1)
    with pytest.raises(InputError, match=f"token id {largest}, the model knows {largest} tokens"):
        data.check_vocabulary(largest)


def test_the_content_hash_sees_tokens_and_labels(tokenizer) -> None:
    def digest(**options: Any) -> str:
        data = FinetuneDataModule(limit=20, eval_limit=5, tokenizer=tokenizer, **options)
        data.setup()
        return data.content_hash()

    assert digest() == digest(batch_size=3)
    assert len({digest(), digest(train_on="all"), digest(max_length=18)}) == 3


def test_half_a_character_is_an_error_that_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "half.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "\\ud800", "completion": "c"}\n')
    with pytest.raises(InputError, match="half.jsonl:2: field 'prompt' is not valid Unicode"):
        load_examples(file)
