"""The proof of what is trained: every check finds its fault, and none is found in data that is right.

pytest tests/test_checks.py
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from chats import (
    CHATML,
    KINDS,
    LLAMA2,
    MARKED_TOO_FAR,
    MISPLACED,
    NO_PROMPT,
    QWEN3,
    SHORT,
    STYLES,
    TALK,
    THINKS,
    UNCLOSED,
    Style,
    chat_tokenizer,
    spoken,
    tokenizer_of,
)

from lorafit.data import Encoder, Example, Sequences, Turn
from lorafit.data.checks import (
    CHECKS,
    Refusal,
    check_labels,
    check_sequences,
    check_template,
    label_table,
    one_of_each,
    token_rows,
    way_past,
)
from lorafit.data.store import Builder
from lorafit.data.tokens import Encoded


def sequences_of(encoder: Encoder, *examples: Example) -> tuple[Sequences, dict[str, Any]]:
    """(what is kept of the examples, the accounts that `check_sequences` is given)."""
    built, lost, lengths = Builder(), 0, []
    for example in examples:
        encoded = encoder.encode(example)
        lengths.append(len(encoded.ids))
        kept, cut = encoder.fit(encoded)
        lost += bool(encoded.trained.any() if kept is None else (cut & encoded.trained).any())
        if kept is not None:
            built.add(kept, example.key(), example.where)
    return built.sequences(), {"lost": lost, "examples": len(examples), "lengths": lengths, "max_lost": 0.2}


def all_checks(encoder: Encoder, *examples: Example) -> dict[str, str]:
    """What is refused of the examples: {check: message}."""
    sequences, accounts = sequences_of(encoder, *examples)
    faults = [check_labels(encoder, example, encoder.encode(example)) for example in examples]
    found = [*check_template(encoder), *filter(None, faults), *check_sequences(encoder, sequences, **accounts)]
    return {refusal.check: refusal.message for refusal in one_of_each(found)}


def trained(encoded: Encoded, flags: np.ndarray) -> Encoded:
    return Encoded(encoded.ids, flags)


# --- right data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_on", ["completion", "last_turn", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", (*STYLES, UNCLOSED), ids=lambda style: style.name)
def test_nothing_is_found_in_right_data(style: Style, kind: str, train_on: str) -> None:
    encoder = Encoder(chat_tokenizer(style, kind), train_on=train_on, max_length=10**4)
    unlearned = tuple(turn._replace(trained=turn.content != "A potter.") for turn in style.talk().turns)
    assert all_checks(encoder, style.talk(), SHORT, Example(unlearned), Example.of("", "Once upon a time.")) == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_nothing_is_found_in_right_data_without_a_chat_template(kind: str, template: str) -> None:
    encoder = Encoder(tokenizer_of(kind), template=template)
    assert all_checks(encoder, TALK, SHORT, Example.of("", "Once upon a time."), Example.of("q", "an answer</s>")) == {}


@pytest.mark.parametrize(
    "answer",
    ["</s>", "<|im_end|>", "a<|im_end|>", "<|im_start|>assistant\na", "think", "user", "\ufffd", "é", "e\u0301"],
)
@pytest.mark.parametrize("style", (CHATML, QWEN3, LLAMA2, UNCLOSED), ids=lambda style: style.name)
def test_nothing_is_found_in_answers_that_spell_marks_or_repeat_words_of_the_template(
    style: Style, answer: str
) -> None:
    turns = (
        Turn("user", answer),
        Turn("assistant", answer),
        Turn("user", answer),
        Turn("assistant", f"{answer} {answer}"),
    )
    for kind in KINDS:
        assert all_checks(Encoder(chat_tokenizer(style, kind)), Example(turns)) == {}


def test_a_tokenizer_that_folds_case_and_accents_is_no_fault() -> None:
    from tokenizers import normalizers

    folding = copy.deepcopy(chat_tokenizer(CHATML))
    folding.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    encoder, example = Encoder(folding), Example.of("Où?", "À Genève, près du Léman.")
    assert spoken(folding, encoder.encode(example)) == ["a geneve, pres du leman.<|im_end|>"]
    assert all_checks(encoder, example) == {}


def test_a_thought_that_the_model_writes_itself_is_part_of_the_answer_also_where_its_marks_are_no_tokens() -> None:
    plain_marks = Style("qwen3_plain", QWEN3.source, ("<|im_start|>", "<|im_end|>"), "", "", eos="<|im_end|>")
    encoder = Encoder(chat_tokenizer(plain_marks))
    for answer in ("A potter.", "<think>\nClay.\n</think>\n\nA potter.", "think"):
        assert all_checks(encoder, Example.of("Who?", answer)) == {}


# --- planted faults -----------------------------------------------------------------------------------


def test_no_supervised_token_is_found_where_max_length_leaves_none() -> None:
    encoder = Encoder(chat_tokenizer(CHATML), max_length=3)
    found = all_checks(encoder, SHORT, TALK)
    assert set(found) == {"no_supervised_token"}
    assert (
        "none of the 2 examples" in found["no_supervised_token"] and "data.max_length=3" in found["no_supervised_token"]
    )


def test_end_masked_is_found_where_every_end_is_cut_off() -> None:
    encoder = Encoder(chat_tokenizer(CHATML), overflow="truncate")
    long = Example.of("Who?", "A potter and a seller of pots. " * 3)
    encoder.max_length = len(encoder.encode(long).ids) - 1
    found = all_checks(encoder, long)
    assert set(found) == {"end_masked", "answer_lost"} and "'<|im_end|>'" in found["end_masked"]
    # one that is whole shows the end
    assert set(all_checks(encoder, long, SHORT)) == {"answer_lost"}


def test_marks_that_say_more_than_the_answer_are_found() -> None:
    found = all_checks(Encoder(chat_tokenizer(MARKED_TOO_FAR)), TALK)
    assert "Rate this answer." in found["prompt_trained"] and "rows.jsonl:1" in found["prompt_trained"]
    assert "data.template=plain" in found["prompt_trained"]


def test_marks_around_the_user_are_found() -> None:
    found = all_checks(Encoder(chat_tokenizer(MISPLACED)), TALK)
    question = next(turn.content for turn in TALK.turns if turn.role == "user")
    assert set(found) == {"prompt_trained"} and repr(question.strip())[:-1] in found["prompt_trained"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", (*STYLES, UNCLOSED, None), ids=lambda style: style.name if style else "plain")
def test_every_label_that_is_wrong_in_a_token_that_can_be_read_is_found(style: Style | None, kind: str) -> None:
    tokenizer = chat_tokenizer(style, kind) if style else tokenizer_of(kind)
    encoder, example = Encoder(tokenizer), style.talk() if style else TALK
    encoded = encoder.encode(example)
    special = set(tokenizer.added_tokens_decoder)
    lead = set("".join(encoder.chat.lead().split()) if encoder.chat else "")
    for place, token in enumerate(encoded.ids.tolist()):
        text = tokenizer.decode([token]).strip()
        if not text or token in special or set(text) <= lead:
            continue
        flags = encoded.trained.copy()
        flags[place] = not flags[place]
        found = check_labels(encoder, example, trained(encoded, flags))
        assert found is not None and found.check == ("answer_masked" if encoded.trained[place] else "prompt_trained")
    assert check_labels(encoder, example, encoded) is None


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_is_not_trained_at_all_is_found(kind: str) -> None:
    encoder = Encoder(chat_tokenizer(CHATML, kind))
    encoded = encoder.encode(TALK)
    for masked in ("A potter.", "She sells his pots."):
        flags = encoder.encode(
            Example(tuple(turn._replace(trained=turn.content != masked) for turn in TALK.turns))
        ).trained
        flags = np.pad(flags, (0, len(encoded.ids) - len(flags)))
        found = check_labels(encoder, TALK, trained(encoded, flags))
        assert found is not None and found.check == "answer_masked"
    assert check_labels(encoder, TALK, trained(encoded, encoded.trained & False)).check == "answer_masked"


def test_an_answer_that_the_template_cuts_is_found() -> None:
    """Qwen3 leaves out the thoughts of earlier answers."""
    thought = "<think>\nClay.\n</think>\n\nA potter."
    turns = (Turn("user", "Who?"), Turn("assistant", thought), Turn("user", "Sure?"), Turn("assistant", "Yes."))
    encoder = Encoder(chat_tokenizer(QWEN3))
    assert set(all_checks(encoder, Example(turns))) == {"answer_masked"}
    assert all_checks(encoder, Example(turns[:2])) == {}
    assert all_checks(Encoder(chat_tokenizer(QWEN3), train_on="last_turn"), Example(turns)) == {}


def test_a_plain_text_that_is_masked_is_found() -> None:
    encoder, example = Encoder(tokenizer_of("embedded")), Example.of("", "the cat and the dog")
    encoded = encoder.encode(example)
    assert check_labels(encoder, example, encoded) is None
    assert check_labels(encoder, example, trained(encoded, encoded.trained & False)).check == "answer_masked"
    assert check_labels(encoder, example, trained(encoded, np.arange(len(encoded.ids)) == 2)).check == "answer_masked"


def test_answer_lost_is_found_beyond_the_share_allowed_and_says_what_would_do() -> None:
    encoder = Encoder(chat_tokenizer(CHATML), max_length=40)
    examples = [Example.of("Who?", "A potter.")] * 7 + [Example.of("Who?", "A potter. " * 20)] * 3
    sequences, accounts = sequences_of(encoder, *examples)
    assert accounts["lost"] == 3
    [found] = check_sequences(encoder, sequences, **accounts)
    longest = max(accounts["lengths"])
    assert found.check == "answer_lost" and "3 of 10 examples (30.0%)" in found.message
    assert f"95 % fit in {longest} tokens" in found.message and "data.max_lost allows 20%" in found.message
    assert check_sequences(encoder, sequences, **accounts | {"max_lost": 0.3}) == []


def test_template_mismatch_is_found_where_the_marks_are_no_tokens() -> None:
    stranger = Style("stranger", CHATML.source, (), "", "")
    found = all_checks(Encoder(chat_tokenizer(stranger)), SHORT)
    assert set(found) == {"template_mismatch"} and "'<|im_end|>'" in found["template_mismatch"]


def test_opening_differs_is_found_where_a_thought_is_begun_in_use_alone() -> None:
    found = all_checks(Encoder(chat_tokenizer(THINKS)), SHORT)
    assert set(found) == {"opening_differs"} and "<think>" in found["opening_differs"]
    # a template that writes no prompt for generation opens an answer in one way
    assert all_checks(Encoder(chat_tokenizer(NO_PROMPT)), SHORT) == {}


def test_opening_differs_is_found_in_a_marked_template_too() -> None:
    source = THINKS.source.replace(
        "{{ turn.content }}", "{% if turn.role == 'assistant' %}{% generation %}{{ turn.content }}{% endgeneration %}"
        "{% else %}{{ turn.content }}{% endif %}"
    )  # fmt: skip
    style = Style("thinks_marked", source, THINKS.tokens, "", "", eos="<|im_end|>")
    assert set(all_checks(Encoder(chat_tokenizer(style)), SHORT)) == {"opening_differs"}


def test_doubled_special_is_found_where_the_text_and_the_tokenizer_both_begin_it() -> None:
    from tokenizers.processors import TemplateProcessing

    beginning = copy.deepcopy(tokenizer_of("embedded"))
    beginning.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", beginning.bos_token_id)]
    )
    encoder = Encoder(beginning)
    doubled, single = (
        Example.of("<s>Who?", "A potter.", "rows.jsonl:4"),
        Example.of("Who?", "A potter.", "rows.jsonl:3"),
    )
    found = all_checks(encoder, single, doubled)
    assert set(found) == {"doubled_special"}
    assert found["doubled_special"].startswith("rows.jsonl:4: '<s>' stands twice at the start, as in 1 examples")
    assert all_checks(encoder, single) == {}
    # a word twice at the start is none of its business, nor is a template that writes its own beginning
    assert all_checks(encoder, Example.of("the the", "the the")) == {}


def test_every_check_is_planted_above() -> None:
    assert set(CHECKS) == {
        "no_supervised_token", "end_masked", "prompt_trained", "answer_masked", "answer_lost", "template_mismatch",
        "opening_differs", "doubled_special",
    }  # fmt: skip


def test_refusals_are_one_of_each_in_order_without_those_that_are_allowed() -> None:
    found = [Refusal("answer_lost", "a"), Refusal("end_masked", "b"), Refusal("answer_lost", "c")]
    assert one_of_each(found) == [found[1], found[0]]
    assert one_of_each(iter(found), allow=["end_masked"]) == [found[0]]


# --- what is shown --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "answer", ["A potter.", "naïve 日本語 🙂🙂", "🙂", "\ufffd", "\ufffd\ufffdx", "a  b \n c", "é" * 40]
)
def test_tokens_are_shown_as_the_text_they_stand_for(kind: str, answer: str) -> None:
    tokenizer = chat_tokenizer(CHATML, kind)
    encoder, example = Encoder(tokenizer, max_length=10**4), Example.of("Who?", answer)
    encoded, rows = encoder.encode(example), token_rows(encoder, example)
    assert "".join(row["text"] for row in rows) == tokenizer.decode(encoded.ids)
    assert [row["trained"] for row in rows] == encoded.trained.tolist() and not any(row["cut"] for row in rows)
    assert rows[:3] == token_rows(encoder, example, width=3)
    # a special token is shown by itself, or behind a character that only then is known to be whole
    assert rows[0]["text"].strip() == "<|im_start|>" and rows[-1]["text"].strip("\ufffd ") == "<|im_end|>"


@pytest.mark.parametrize("overflow", ["drop", "truncate", "truncate_prompt", "error"])
def test_tokens_that_are_cut_are_shown_as_cut(overflow: str) -> None:
    encoder, example = Encoder(chat_tokenizer(CHATML), overflow=overflow), Example.of("Who is it? " * 5, "A potter.")
    encoded = encoder.encode(example)
    encoder.max_length = len(encoded.ids) - 4
    rows = token_rows(encoder, example)
    cut = [index for index, row in enumerate(rows) if row["cut"]]
    length, header = len(encoded.ids), len(encoder.tokenizer("<|im_start|>user\n", add_special_tokens=False).input_ids)
    expected = {
        "drop": list(range(length)),
        "truncate": list(range(length - 4, length)),
        "truncate_prompt": list(range(header, header + 4)),
        "error": [],
    }
    assert cut == expected[overflow] and len(rows) == length
    assert not any(row["trained"] and row["cut"] for row in rows)


def test_the_first_examples_are_shown_in_two_parts() -> None:
    encoder = Encoder(chat_tokenizer(CHATML))
    sequences, _ = sequences_of(encoder, TALK, SHORT)
    first, second = label_table(encoder, sequences)
    assert (first["row"], second["row"]) == ("rows.jsonl:1", "rows.jsonl:2")
    assert second["masked"] == "<|im_start|>user\nWho is Felix?<|im_end|>\n<|im_start|>assistant\n"
    assert second["trained"] == "A potter.<|im_end|>"
    assert first["trained"] == "A potter.<|im_end|>She sells his pots.<|im_end|>"
    assert (second["tokens"], second["trained_tokens"]) == (
        len(encoder.encode(SHORT).ids),
        int(encoder.encode(SHORT).trained.sum()),
    )
    assert len(label_table(encoder, sequences, count=1)) == 1


def test_nobody_is_told_to_choose_what_is_chosen() -> None:
    long = [Example.of("q", "word " * 60)] * 4 + [Example.of("q", "a")] * 4
    for overflow, advised in (("drop", True), ("truncate", True), ("truncate_prompt", False)):
        encoder = Encoder(tokenizer_of("embedded"), max_length=30, overflow=overflow)
        assert ("data.overflow=truncate_prompt" in all_checks(encoder, *long)["answer_lost"]) is advised


def test_where_nothing_is_to_be_learned_the_length_is_not_blamed() -> None:
    example = Example((Turn("user", "q"), Turn("assistant", "a", trained=False)))
    message = all_checks(Encoder(tokenizer_of("embedded")), example)["no_supervised_token"]
    assert "max_length" not in message and "weight 0" in message


def test_only_what_can_be_allowed_is_offered() -> None:
    assert way_past(["vocabulary", "packing", "no_supervised_token"]) == ""
    assert (
        way_past(["end_masked", "packing", "doubled_special"])
        == "data.allow=[end_masked,doubled_special] trains all the same"
    )
