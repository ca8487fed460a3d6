"""Conversations as tokens: which of them are trained, and what is cut when there are too many.

pytest tests/test_tokens.py
"""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import (
    CHATML,
    GEMMA,
    KINDS,
    LLAMA2,
    LLAMA3,
    MISTRAL,
    PHI3,
    SHORT,
    STYLES,
    TALK,
    UNCLOSED,
    UNCLOSED_LINES,
    ZEPHYR,
    Style,
    chat_tokenizer,
    read,
    spoken,
    tokenizer_of,
)
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from lorafit.data import IGNORE, Encoder, Example, Formatter, Turn, load_tokenizer, parse_sources, read_rows
from lorafit.data.tokens import Encoded
from lorafit.embedded import MODEL
from lorafit.errors import InputError

EVERY_STYLE = pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
DATA = Path(__file__).parents[2] / "shared" / "data"
SMOLLM2 = Path.home() / ".cache" / "lorafit-models" / "smollm2-135m-instruct"


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def labels_of(encoded: Encoded) -> list[int]:
    return encoded.sequence()["labels"].tolist()


def bare(text: str) -> str:
    """Without white space: some tokenizers put a space behind every special token."""
    return "".join(text.split())


def adding(pattern: str) -> Any:
    """The embedded tokenizer, putting special tokens around every text by itself."""
    changed = copy.deepcopy(tokenizer_of("embedded"))
    special = [("<s>", changed.bos_token_id), ("</s>", changed.eos_token_id)]
    changed.backend_tokenizer.post_processor = TemplateProcessing(single=pattern, special_tokens=special)
    return changed


# --- tokens and labels, worked out by hand ------------------------------------------------------------


@EVERY_STYLE
@EVERY_KIND
def test_tokens_and_labels_are_those_worked_out_by_hand(style: Style, kind: str) -> None:
    tokenizer = chat_tokenizer(style, kind)
    for example, marked_text in ((style.talk(), style.text), (SHORT, style.short)):
        text, spans = read(marked_text)
        encoded = Encoder(tokenizer).encode(example)
        messages = [{"role": turn.role, "content": turn.content} for turn in example.turns]
        whole = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == text
        # GPT-2's way to split parts "\n\n" before a word and not at the end of a prompt, so a prompt must be cut off
        splits = kind == "trimmed" and style is LLAMA3
        if not splits:
            assert encoded.ids.tolist() == whole[: len(encoded.ids)]
        # a text up to a place, tokenized by itself, has the tokens that stand before that place
        edges = [0, *itertools.chain(*spans)]
        pieces = [ids_of(tokenizer, text[:edge])[len(ids_of(tokenizer, text[:before])) :]
                  for before, edge in itertools.pairwise(edges)]  # fmt: skip
        if splits:
            pieces = [ids_of(tokenizer, text[before:edge]) for before, edge in itertools.pairwise(edges)]
        assert encoded.ids.tolist() == list(itertools.chain(*pieces))
        assert labels_of(encoded) == [
            token if number % 2 else IGNORE for number, piece in enumerate(pieces) for token in piece
        ]


@EVERY_KIND
@pytest.mark.parametrize("style", (UNCLOSED, UNCLOSED_LINES), ids=lambda style: style.name)
def test_an_answer_without_a_mark_gets_the_end_token_and_no_line_break(style: Style, kind: str) -> None:
    tokenizer = chat_tokenizer(style, kind)
    encoded = Encoder(tokenizer).encode(TALK)
    assert tokenizer.decode(encoded.ids) == read(style.text)[0] + "</s>"
    assert [run.lstrip(" ") for run in spoken(tokenizer, encoded)] == ["A potter.", "She sells his pots.</s>"]
    # although a full stop and a line break are one token elsewhere
    if kind in ("bpe", "unigram"):
        assert ids_of(tokenizer, "pots.\n")[-1] not in (ids_of(tokenizer, "pots\n")[-1], ids_of(tokenizer, "pots.")[-1])
    assert labels_of(encoded)[-1] == tokenizer.eos_token_id


@EVERY_KIND
def test_the_plain_template_trains_each_answer_and_its_end_token(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    encoded = Encoder(tokenizer).encode(TALK)
    assert tokenizer.decode(encoded.ids).split() == (
        "Be brief.\nWho is Felix?\nA potter.</s>And Ina?\nShe sells his pots.</s>".split()
    ) or kind in ("bpe", "unigram")
    assert [run.strip() for run in spoken(tokenizer, encoded)] == ["A potter.</s>", "She sells his pots.</s>"]
    assert [label for label in labels_of(encoded) if label == tokenizer.eos_token_id] == [tokenizer.eos_token_id] * 2


@pytest.mark.parametrize("completion", ["potter", "potter</s>", "a </s> inside", "naïve 日本語 🙂"])
def test_the_end_token_is_trained_once_and_last_whatever_the_completion(completion: str) -> None:
    tokenizer = tokenizer_of("embedded")
    for example in (Example.of("Who?", completion), Example.of("", completion)):
        encoded = Encoder(tokenizer).encode(example)
        ids = encoded.ids[encoded.trained].tolist()
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[-2:-1]
        assert (completion.removesuffix("</s>") + "</s>").endswith(tokenizer.decode(ids))


# --- which answers ------------------------------------------------------------------------------------


@EVERY_STYLE
@EVERY_KIND
def test_completion_last_turn_and_all_train_every_answer_the_last_and_every_token(style: Style, kind: str) -> None:
    tokenizer = chat_tokenizer(style, kind)
    answers, last, everything = (
        Encoder(tokenizer, train_on=train_on).encode(style.talk()) for train_on in ("completion", "last_turn", "all")
    )
    assert spoken(tokenizer, last) == spoken(tokenizer, answers)[1:] and len(spoken(tokenizer, answers)) == 2
    assert np.array_equal(last.ids, answers.ids)
    # nothing can predict the first token
    assert everything.trained.tolist() == [False] + [True] * (len(everything.ids) - 1)
    assert np.array_equal(everything.ids[: len(answers.ids)], answers.ids)


@EVERY_STYLE
@EVERY_KIND
def test_an_answer_of_weight_0_is_read_and_not_trained(style: Style, kind: str) -> None:
    tokenizer = chat_tokenizer(style, kind)
    turns = style.talk().turns
    first = Example(tuple(turn._replace(trained=turn.content != "A potter.") for turn in turns))
    last = Example(tuple(turn._replace(trained=turn.content == "A potter.") for turn in turns))
    whole = Encoder(tokenizer).encode(style.talk())
    for example, number in ((first, 1), (last, 0)):
        encoded = Encoder(tokenizer).encode(example)
        assert spoken(tokenizer, encoded) == [spoken(tokenizer, whole)[number]]
        assert np.array_equal(encoded.ids, whole.ids[: len(encoded.ids)])
    # behind the last trained token nothing is left
    assert encoded.trained[-1] and len(encoded.ids) < len(whole.ids)
    unclosed = Encoder(chat_tokenizer(UNCLOSED, kind)).encode(last)
    assert [run.strip() for run in spoken(chat_tokenizer(UNCLOSED, kind), unclosed)] == ["A potter."]


@EVERY_STYLE
def test_the_mark_that_closes_an_answer_is_trained_also_where_padding_has_its_id(style: Style) -> None:
    tokenizer = chat_tokenizer(style)
    encoder = Encoder(tokenizer)
    ids = encoder.encode(style.talk()).sequence()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ends = [
        token
        for token, following in itertools.pairwise([*ids["labels"].tolist(), IGNORE])
        if token != IGNORE == following
    ]
    assert len(ends) == 2 and (set(ends) <= set(encoder.end_ids) or style.name == "harmony")
    assert ends[-1] in encoder.end_ids


# --- the boundary between prompt and answer -------------------------------------------------------------

ANSWERS = (
    "A potter.",
    " A potter.",
    "  A",
    "\nA",
    "\n\nA",
    " \n A",
    "\tA",
    "é",
    "日",
    "🙂",
    "?",
    "</s>",
    "'s",
    "1",
    "▁A",
)


@pytest.mark.parametrize("style", (*STYLES, UNCLOSED), ids=lambda style: style.name)
@EVERY_KIND
def test_the_prompt_in_use_is_what_stands_before_the_answer_in_training(style: Style, kind: str) -> None:
    tokenizer = chat_tokenizer(style, kind)
    encoder = Encoder(tokenizer)
    for question in ("Who?", "Who? ", "Who\n\n"):
        rendered = encoder.render(Example.of(question, "x"))
        alone = ids_of(tokenizer, rendered.text[: rendered.answers[0][0]])
        for answer in ANSWERS:
            example = Example.of(question, answer)
            encoded = encoder.encode(example)
            assert encoder.encode_prompt(example) == alone
            assert encoded.ids[: len(alone)].tolist() == alone
            assert encoded.trained.tolist() == [False] * len(alone) + [True] * (len(encoded.ids) - len(alone))
            [run] = spoken(tokenizer, encoded)
            written = rendered_answer(encoder, example)
            if kind in ("bpe", "unigram"):
                written = written.replace("▁", " ")  # its sign for a space
            assert bare(run).removesuffix("</s>") == bare(written).removesuffix("</s>")


def rendered_answer(encoder: Encoder, example: Example) -> str:
    rendered = encoder.render(example)
    return rendered.text[slice(*rendered.answers[-1])]


@EVERY_KIND
def test_the_plain_prompt_in_use_is_what_stands_before_the_answer_in_training(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    for answer in ANSWERS:
        encoder, example = Encoder(tokenizer), Example.of("Who?", answer)
        encoded = encoder.encode(example)
        assert encoder.encode_prompt(example) == ids_of(tokenizer, "Who?\n") == encoded.ids[~encoded.trained].tolist()


@EVERY_KIND
def test_an_answer_that_goes_on_from_a_prompt_gets_no_space_of_its_own(kind: str) -> None:
    tokenizer = chat_tokenizer(CHATML, kind)
    for answer in ("A", "\nA", "\n\nA", "  A", "é"):
        encoded = Encoder(tokenizer).encode(Example.of("Who?", answer))
        assert tokenizer.decode(encoded.ids) .endswith(f"assistant\n{answer}<|im_end|>")  # fmt: skip


@EVERY_KIND
def test_earlier_answers_are_cut_off_in_a_prompt_as_they_were_in_training(kind: str) -> None:
    tokenizer = chat_tokenizer(LLAMA3, kind)
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))
    encoder = Encoder(tokenizer)
    prompt, encoded = encoder.encode_prompt(Example(turns)), encoder.encode(Example(turns))
    first = encoder.encode(Example(turns[:2]))
    assert encoded.ids[: len(prompt)].tolist() == prompt and not encoded.trained[len(prompt) - 1]
    assert prompt[: len(first.ids)] == first.ids.tolist()


@pytest.mark.parametrize(
    ("pattern", "beginning"), [("<s> $A </s>", ["<s>"]), ("<s> $A", ["<s>"]), ("$A </s>", []), ("</s> $A", ["</s>"])]
)
def test_special_tokens_that_the_tokenizer_adds_stand_at_the_ends_alone(pattern: str, beginning: list[str]) -> None:
    tokenizer = adding(pattern)
    encoder, plain = Encoder(tokenizer), tokenizer_of("embedded")
    for prompt in ("Who is Felix?", ""):
        text = [*plain.tokenize(f"{prompt}\n" if prompt else ""), *plain.tokenize("potter")]
        example = Example.of(prompt, "potter")
        encoded = encoder.encode(example)
        assert tokenizer.convert_ids_to_tokens(encoded.ids) == [*beginning, *text, "</s>"]
        assert (
            encoder.encode_prompt(example)
            == encoded.ids[: len(encoded.ids) - len(plain.tokenize("potter")) - 1].tolist()
        )
    # a chat template writes its own
    chat = copy.deepcopy(chat_tokenizer(LLAMA2))
    chat.backend_tokenizer.post_processor = tokenizer.backend_tokenizer.post_processor
    assert np.array_equal(Encoder(chat).encode(SHORT).ids, Encoder(chat_tokenizer(LLAMA2)).encode(SHORT).ids)


def test_the_template_is_the_tokenizers_own_unless_another_is_asked_for() -> None:
    tokenizer = chat_tokenizer(CHATML)
    auto, chat, plain, alpaca = (
        Encoder(tokenizer, template=name).encode(SHORT) for name in ("auto", "chat", "plain", "alpaca")
    )
    assert np.array_equal(auto.ids, chat.ids)
    assert tokenizer.decode(plain.ids) == "Who is Felix?\nA potter.<|im_end|>"
    assert tokenizer.decode(alpaca.ids) == "### Instruction:\nWho is Felix?\n\n### Response:\nA potter.<|im_end|>"
    # plain text is not dressed up as an answer
    text = Encoder(tokenizer).encode(Example.of("", "Once upon a time."))
    assert tokenizer.decode(text.ids) == "Once upon a time.<|im_end|>"


# --- too long -----------------------------------------------------------------------------------------


@EVERY_STYLE
@EVERY_KIND
def test_truncate_prompt_cuts_the_contents_of_questions_and_nothing_else(style: Style, kind: str) -> None:
    tokenizer = chat_tokenizer(style, kind)
    turns = style.talk().turns
    long = Example(
        tuple(turn._replace(content=" One two three. " * 5) if turn.role == "user" else turn for turn in turns)
    )
    encoder = Encoder(tokenizer, overflow="truncate_prompt", max_length=10**6)
    whole = encoder.encode(long)
    answers = spoken(tokenizer, whole)
    lengths = set()
    for length in range(len(whole.ids) + 1):
        encoder.max_length = length
        encoded = encoder.encode(long)
        assert np.array_equal(encoded.ids, whole.ids) and np.array_equal(encoded.trained, whole.trained)
        kept, cut = encoder.fit(encoded)
        if kept is None:
            assert cut.all()
            continue
        lengths.add(length)
        assert len(kept.ids) == min(length, len(whole.ids)) == (~cut).sum()
        assert spoken(tokenizer, kept) == answers and not (cut & whole.trained).any()
        # whatever is cut is a question's own
        for start, end in np.flatnonzero(np.diff(cut, prepend=False, append=False)).reshape(-1, 2):
            assert bare(tokenizer.decode(whole.ids[start:end])) in bare(" One two three. " * 5)
    assert lengths == set(range(min(lengths), len(whole.ids) + 1))
    # at its shortest, nothing of the questions is left but what their marks share a token with
    assert len(whole.ids) - min(lengths) > 0.7 * sum(
        len(ids_of(tokenizer, turn.content.strip())) for turn in long.turns if turn.role == "user"
    )


@pytest.mark.parametrize("style", (CHATML, LLAMA2, MISTRAL, GEMMA, ZEPHYR, PHI3), ids=lambda style: style.name)
@EVERY_KIND
def test_what_is_left_of_a_cut_prompt_is_its_marks_and_its_end(style: Style, kind: str) -> None:
    tokenizer = chat_tokenizer(style, kind)
    question = "x y z " * 20 + "Who is Felix?"
    encoder = Encoder(tokenizer, overflow="truncate_prompt", max_length=10**6)
    full = encoder.encode(Example.of(question, "A potter."))
    encoder.max_length = len(full.ids) - 11
    kept, cut = encoder.fit(encoder.encode(Example.of(question, "A potter.")))
    edges = np.flatnonzero(np.diff(cut.astype(int))).tolist()
    assert cut.sum() == 11 and len(edges) == 2  # one stretch
    before, _, after = read(style.short)[0].partition("Who is Felix?")
    start, middle, end = bare(tokenizer.decode(kept.ids)).partition("WhoisFelix?")
    if kind in ("embedded", "trimmed"):  # the others put spaces behind special tokens
        assert tokenizer.decode(kept.ids).startswith(before)
    assert start.startswith(bare(before)) and set(start.removeprefix(bare(before))) <= set("xyz") and middle
    assert end and bare(after).startswith(end)


def test_an_answer_that_is_too_long_by_itself_is_dropped_by_truncate_prompt() -> None:
    encoder = Encoder(chat_tokenizer(CHATML), overflow="truncate_prompt", max_length=12)
    kept, cut = encoder.fit(encoder.encode(Example.of("Who?", "A potter. " * 9)))
    assert kept is None and cut.all()


def test_drop_truncate_and_error_do_what_they_are_called() -> None:
    tokenizer = tokenizer_of("embedded")
    example = Example.of("Who is Felix?", "the cat and the dog", "rows.jsonl:7")
    whole = Encoder(tokenizer).encode(example)
    prompt, length = int((~whole.trained).sum()), len(whole.ids)
    for overflow in ("drop", "truncate", "truncate_prompt", "error"):
        encoder = Encoder(tokenizer, overflow=overflow, max_length=length)
        kept, cut = encoder.fit(encoder.encode(example))
        assert np.array_equal(kept.ids, whole.ids) and not cut.any()
    for short in range(1, length):
        kept, cut = Encoder(tokenizer, overflow="drop", max_length=short).fit(whole)
        assert kept is None and cut.all()
        kept, cut = Encoder(tokenizer, overflow="truncate", max_length=short).fit(whole)
        assert (kept is None) == (short <= prompt)
        if kept is not None:
            assert np.array_equal(kept.ids, whole.ids[:short]) and np.array_equal(kept.trained, whole.trained[:short])
            assert np.array_equal(~cut, np.arange(length) < short)
        with pytest.raises(
            InputError, match=f"rows.jsonl:7: the example has {length} tokens, data.max_length is {short}"
        ):
            Encoder(tokenizer, overflow="error", max_length=short).fit(whole, "rows.jsonl:7")


def test_an_example_without_a_trained_token_is_dropped_however_short() -> None:
    encoder = Encoder(chat_tokenizer(CHATML), train_on="last_turn")
    turns = tuple(turn._replace(trained=turn.content == "A potter.") for turn in TALK.turns)
    assert encoder.fit(encoder.encode(Example(turns)))[0] is None


def test_a_tokenizer_that_asks_to_cut_or_fill_up_does_neither() -> None:
    asking = copy.deepcopy(chat_tokenizer(CHATML))
    asking.backend_tokenizer.enable_truncation(5)
    asking.backend_tokenizer.enable_padding(length=500, pad_id=0)
    expected = Encoder(chat_tokenizer(CHATML)).encode(TALK)
    encoder = Encoder(asking)
    assert np.array_equal(encoder.encode(TALK).ids, expected.ids)
    # nor when it was used otherwise in between
    asking(["a", "b"], padding="max_length", max_length=400, padding_side="left")
    found = encoder.encode_all([TALK, SHORT])
    assert np.array_equal(found[0].ids, expected.ids) and len(found[1].ids) < len(found[0].ids)
    asking(["a", "b"], padding="max_length", truncation=True, max_length=7)
    prompt = encoder.encode_prompt(TALK)
    assert prompt == expected.ids[: len(prompt)].tolist() and len(prompt) > 7


# --- many at once, and wrong input ------------------------------------------------------------------------


def test_what_is_wrong_with_one_row_is_said_in_its_place_and_the_others_are_read() -> None:
    found = Encoder(chat_tokenizer(GEMMA)).encode_all([SHORT, TALK, SHORT])
    assert isinstance(found[1], InputError) and "rows.jsonl:1" in str(found[1])
    assert np.array_equal(found[0].ids, found[2].ids)
    with pytest.raises(InputError, match="System role not supported"):
        Encoder(chat_tokenizer(GEMMA)).encode(TALK)


@pytest.mark.parametrize(
    ("option", "value", "near"),
    [
        ("template", "chats", "chat"),
        ("train_on", "al", "all"),
        ("overflow", "dropp", "drop"),
        ("system", "keeps", "keep"),
    ],
)
def test_a_wrong_choice_is_told_the_nearest(option: str, value: str, near: str) -> None:
    with pytest.raises(InputError, match=f"data.{option} .*{value}.*Did you mean '{near}'"):
        Encoder(tokenizer_of("embedded"), **{option: value})


def test_the_chat_template_asked_for_must_be_there() -> None:
    with pytest.raises(InputError, match="data.template=plain"):
        Encoder(tokenizer_of("embedded"), template="chat")


def test_a_tokenizer_without_an_end_token_is_refused_and_one_without_padding_is_not(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((MODEL / name).read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())

    def without(*names: str) -> None:
        kept = {key: value for key, value in settings.items() if key not in names}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(kept))

    without("pad_token")
    padded = load_tokenizer(str(tmp_path))
    assert padded.pad_token_id == padded.eos_token_id == tokenizer_of("embedded").eos_token_id
    without("eos_token")
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id is None
    with pytest.raises(InputError, match=r"has no end token, .* never stops"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path / "nowhere"))


# --- a real model -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SMOLLM2.is_dir() and DATA.is_dir()), reason="the real model and data are not here")
@pytest.mark.parametrize(
    ("file", "columns"),
    [
        ("gsm8k/test.jsonl", {"question": "question", "answer": "answer"}),
        ("mts-dialog/train.csv", {"prompt": "dialogue", "completion": "section_text"}),
    ],
)
def test_a_real_chat_model_is_trained_on_the_answers_of_real_rows(file: str, columns: dict[str, str]) -> None:
    tokenizer = load_tokenizer(str(SMOLLM2))
    [source] = parse_sources(str(DATA / file), columns=columns)
    formatter = Formatter(source.format, source.columns)
    examples = [formatter(row) for row in itertools.islice(read_rows(source, "train"), 200)]
    encoder = Encoder(tokenizer, max_length=4096)
    for example, encoded in zip(examples, encoder.encode_all(examples), strict=True):
        messages = [{"role": turn.role, "content": turn.content} for turn in example.turns]
        whole = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=True, add_generation_prompt=True)["input_ids"]
        answer = ids_of(tokenizer, example.completion + tokenizer.eos_token)
        assert (
            encoded.ids.tolist()
            == whole[: len(encoded.ids)]
            == prompt + answer
            == encoder.encode_prompt(example) + answer
        )
        assert labels_of(encoded) == [IGNORE] * len(prompt) + answer


# --- the prompt in use, and what a text must not hold -------------------------------------------------


@EVERY_STYLE
def test_the_prompt_in_use_is_cut_as_it_was_in_training(style: Style) -> None:
    asked = TALK.turns[-2]._replace(content="Who is " + "very " * 60 + "old?")
    example = Example((*TALK.turns[:-2], asked, TALK.turns[-1]))
    if style.talk() is not TALK:  # a template that knows no system text
        example = Example(example.turns[1:])
    encoder = Encoder(chat_tokenizer(style), overflow="truncate_prompt", max_length=10**6)
    encoder.max_length = len(encoder.encode(example).ids) - 25
    kept, _ = encoder.fit(encoder.encode(example))
    assert kept is not None
    prompt = encoder.encode_prompt(example)
    assert prompt == kept.ids[: len(prompt)].tolist() and len(kept.ids) == encoder.max_length
    assert kept.trained[len(prompt) :].any() and len(prompt) == np.flatnonzero(np.diff(kept.trained))[-1] + 1


def test_a_special_token_in_a_text_is_found_but_for_the_end_of_a_plain_answer() -> None:
    plain, chat = Encoder(tokenizer_of("embedded")), Encoder(chat_tokenizer(CHATML))
    assert plain.special_in(Example.of("p", "c</s>")) is None and plain.special_in(Example.of("p<s>", "c")) == "<s>"
    assert chat.special_in(Example.of("p", "c<|im_end|>")) == "<|im_end|>" and chat.special_in(SHORT) is None


@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_a_system_text_is_folded_and_dropped_without_a_chat_template_too(template: str) -> None:
    example = Example((Turn("system", "SYS"), Turn("user", "q"), Turn("assistant", "a")))

    def text(system: str) -> str:
        return Encoder(tokenizer_of("embedded"), template=template, system=system).render(example).text

    assert "SYS" not in text("drop") and "SYS\n\nq" in text("fold") and "SYS\n" in text("keep")
