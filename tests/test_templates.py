"""Conversations as text: where each answer begins and ends in the chat templates people use.

pytest tests/test_templates.py
"""

from __future__ import annotations

import pytest
from chats import (
    CHATML,
    GEMMA,
    KINDS,
    LLAMA2,
    LLAMA3,
    MARKED_TOO_FAR,
    MISPLACED,
    MISTRAL,
    PHI3,
    QWEN3,
    SHORT,
    STYLES,
    TALK,
    THINKS,
    UNCLOSED,
    ZEPHYR,
    Style,
    chat_tokenizer,
    read,
    tokenizer_of,
)

from lorafit.data import Encoder, Example, Formatter, Turn
from lorafit.data.sources import Row
from lorafit.data.templates import ChatTemplate, PlainTemplate
from lorafit.errors import InputError

EVERY = pytest.mark.parametrize("style", (*STYLES, UNCLOSED), ids=lambda style: style.name)
ANSWERS = ("A potter.", "She sells his pots.")


def spans_of(style: Style, example: Example) -> tuple[str, list[tuple[int, int]]]:
    rendered = ChatTemplate(chat_tokenizer(style)).render(example.turns)
    return rendered.text, list(rendered.answers)


# --- the text and its answers ---------------------------------------------------------------------


@EVERY
def test_text_and_answers_are_those_worked_out_by_hand(style: Style) -> None:
    assert spans_of(style, SHORT)[1] == read(style.short)[1]
    text, answers = spans_of(style, style.talk())
    assert answers == read(style.text)[1]
    assert text == read(style.text)[0] + ("\n" if style is UNCLOSED else "")


@EVERY
def test_the_span_of_each_content_holds_that_content(style: Style) -> None:
    rendered = ChatTemplate(chat_tokenizer(style)).render(style.talk().turns)
    assert [rendered.text[slice(*span)] for span in rendered.contents] == [turn.content for turn in style.talk().turns]


@EVERY
@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("  Who?\n", "\n A potter. \n"),
        ("[/INST] </s><|im_end|>", "a<|im_end|>\nb</s>"),
        ("\ue0001\ue001", "\ue0000\ue001"),
    ],
)
def test_contents_with_space_around_them_marks_in_them_or_placeholders_are_found(
    style: Style, asked: str, answered: str
) -> None:
    turns = (Turn("user", asked), Turn("assistant", answered), Turn("user", asked), Turn("assistant", answered))
    rendered = ChatTemplate(chat_tokenizer(style)).render(turns)
    hand = ChatTemplate(chat_tokenizer(style)).render(
        tuple(turn._replace(content=ANSWERS[turn.role == "assistant"]) for turn in turns)
    )
    for start, end in rendered.answers:
        assert answered.strip() in rendered.text[start:end]
        assert asked.strip() not in rendered.text[start:end]
    # and with it the template's own marks, as around any contents
    for (start, end), (first, last) in zip(rendered.answers, hand.answers, strict=True):
        lead, _, close = hand.text[first:last].partition(ANSWERS[1])
        assert rendered.text[start:end].startswith(lead) and rendered.text[start:end].endswith(close)
        assert rendered.text[start:end][len(lead) :].lstrip().startswith(answered.strip())
        assert rendered.text[start:end].removesuffix(close).rstrip().endswith(answered.strip())


@EVERY
def test_the_prompt_in_use_is_what_stands_before_the_answer(style: Style) -> None:
    tokenizer = chat_tokenizer(style)
    rendered = ChatTemplate(tokenizer).render(SHORT.turns)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Who is Felix?"}], tokenize=False,
                                           add_generation_prompt=True)  # fmt: skip
    before = rendered.text[: rendered.answers[0][0]]
    # a template that ignores add_generation_prompt writes its header with the answer
    header = "<|im_start|>assistant\n" if style.name == "no_prompt" else ""
    assert before == prompt + header


# --- templates that do more with a conversation -----------------------------------------------------


def test_thoughts_in_an_answer_are_part_of_it_and_those_that_the_template_leaves_out_are_not_there() -> None:
    thought = "<think>\nHe has clay on his hands.\n</think>\n\nA potter."
    turns = (Turn("user", "Who?"), Turn("assistant", thought), Turn("user", "Sure?"), Turn("assistant", thought))
    text, answers = spans_of(QWEN3, Example(turns))
    assert [text[start:end] for start, end in answers] == ["\n\nA potter.<|im_end|>".lstrip(), f"{thought}<|im_end|>"]
    text, answers = spans_of(QWEN3, Example(turns[:2]))
    assert [text[start:end] for start, end in answers] == [f"{thought}<|im_end|>"]


def test_a_system_text_is_kept_folded_or_dropped() -> None:
    tokenizer = chat_tokenizer(GEMMA)
    with pytest.raises(InputError, match=r"rows.jsonl:1: .*System role not supported.*data.system=fold"):
        ChatTemplate(tokenizer).render(TALK.turns, TALK.where)
    folded = ChatTemplate(tokenizer, system="fold").render(TALK.turns)
    assert folded.text.startswith("<bos><start_of_turn>user\nBe brief.\n\nWho is Felix?<end_of_turn>")
    assert len(folded.contents) == 4
    dropped = ChatTemplate(tokenizer, system="drop").render(TALK.turns)
    assert dropped == ChatTemplate(tokenizer).render(TALK.turns[1:])


def test_a_template_that_leaves_a_text_out_is_refused_and_folding_helps() -> None:
    """As Mistral's of 2024, which writes the system text before the last turn if that is the user's."""
    source = (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
        "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for turn in turns %}"
        "{% if turn.role == 'user' %}"
        "{{ '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + turn.content + '[/INST]' }}"
        "{% else %}{{ ' ' + turn.content + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = chat_tokenizer(Style("mistral2024", source, MISTRAL.tokens, "", ""))
    with pytest.raises(InputError, match=r"rows.jsonl:1: .*leaves out the system text.*data.system=fold"):
        ChatTemplate(tokenizer).render(TALK.turns, TALK.where)
    folded = ChatTemplate(tokenizer, system="fold").render(TALK.turns)
    assert folded.text.startswith("<s>[INST] Be brief.\n\nWho is Felix?[/INST] A potter.</s>[INST] And Ina?[/INST]")


def test_an_answer_that_a_template_repeats_cannot_be_told_and_a_question_that_it_repeats_can() -> None:
    twice = "{% for turn in messages %}{{ turn.role + turn.content + turn.content + '\n' }}{% endfor %}"
    with pytest.raises(InputError, match=r"rows.jsonl:2: .*data.template=plain"):
        ChatTemplate(chat_tokenizer(Style("twice", twice, (), "", ""))).render(SHORT.turns, SHORT.where)
    asked = (
        "{% for turn in messages %}{% if turn.role == 'user' %}Q: {{ turn.content }} ({{ turn.content }})\nA: "
        "{% else %}{{ turn.content }}</s>{% endif %}{% endfor %}"
    )
    rendered = ChatTemplate(chat_tokenizer(Style("asked", asked, (), "", ""))).render(SHORT.turns)
    assert rendered.text[slice(*rendered.answers[0])] == "A potter.</s>"


def test_a_conversation_that_a_template_refuses_is_named() -> None:
    turns = (Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c"))
    with pytest.raises(InputError, match=r"here: the chat template refuses this conversation \(roles must alternate\)"):
        ChatTemplate(chat_tokenizer(MISTRAL)).render(turns, "here")


def test_a_tokenizer_without_a_chat_template_is_told_to_take_the_plain_one() -> None:
    with pytest.raises(InputError, match="data.template=plain"):
        ChatTemplate(tokenizer_of("embedded"))


def test_the_opening_of_an_answer_in_use_and_in_training_are_told_apart() -> None:
    asked, answered = ChatTemplate(chat_tokenizer(THINKS)).opening()
    assert asked == "<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert answered == "<|im_end|>\n<|im_start|>assistant\n"
    for style in (CHATML, LLAMA3, QWEN3, LLAMA2, ZEPHYR):
        asked, answered = ChatTemplate(chat_tokenizer(style)).opening()
        assert answered.startswith(asked)


def test_marks_around_other_text_than_the_answers_are_taken_as_they_are() -> None:
    text, answers = spans_of(MISPLACED, SHORT)
    assert [text[slice(*span)] for span in answers] == ["Who is Felix?"]
    text, answers = spans_of(MARKED_TOO_FAR, SHORT)
    assert [text[slice(*span)] for span in answers] == ["A potter.<|im_end|>\nRate this answer."]


def test_the_mark_that_closes_an_answer_is_known_or_named_as_unknown() -> None:
    assert ChatTemplate(chat_tokenizer(PHI3)).end_mark() == "<|end|>"
    assert ChatTemplate(chat_tokenizer(UNCLOSED)).end_mark() is None
    stranger = Style("stranger", CHATML.source, (), "", "")
    template = ChatTemplate(chat_tokenizer(stranger))
    assert template.unknown_marks() == ["<|im_end|>"] and template.end_mark() is None
    assert all(ChatTemplate(chat_tokenizer(style)).unknown_marks() == [] for style in (*STYLES, UNCLOSED))


# --- without a chat template ------------------------------------------------------------------------


def test_the_plain_template_is_turns_in_lines_with_an_end_token_after_each_answer() -> None:
    rendered = PlainTemplate("</s>").render(TALK.turns)
    text, spans = read("Be brief.\nWho is Felix?\n«A potter.</s>»And Ina?\n«She sells his pots.</s>»")
    assert (rendered.text, list(rendered.answers)) == (text, spans)
    assert [text[slice(*span)] for span in rendered.contents] == [turn.content for turn in TALK.turns]
    headings = PlainTemplate("</s>", headings=True).render(SHORT.turns)
    assert (headings.text, list(headings.answers)) == read(
        "### Instruction:\nWho is Felix?\n\n### Response:\n«A potter.</s>»"
    )
    alone = PlainTemplate("</s>", headings=True).render((Turn("assistant", "text</s>"),))
    assert (alone.text, alone.answers) == ("text</s>", ((0, 8),))


# --- every layout -----------------------------------------------------------------------------------

LAYOUTS = {
    "alpaca": {"instruction": "Who is Felix?", "input": "", "output": "A potter.", "system": "Be brief."},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Who is Felix?"}, {"from": "gpt", "value": "A potter."}],
        "system": "Be brief.",
    },
    "chat": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Who is Felix?"},
            {"role": "assistant", "content": [{"type": "text", "text": "A potter."}]},
        ]
    },
    "prompt_completion": {"prompt": "Who is Felix?", "completion": "A potter.", "system": "Be brief."},
    "question_answer": {"question": "Who is Felix?", "answer": "A potter."},
}


@EVERY
@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_gives_the_same_tokens_and_labels_in_every_layout(style: Style, kind: str) -> None:
    encoder = Encoder(chat_tokenizer(style, kind))
    for system in (False, True) if style.system else (False,):
        seen = set()
        for name, fields in LAYOUTS.items():
            row = dict(fields)
            if not system:
                row.pop("system", None)
                if name == "chat":
                    row["messages"] = row["messages"][1:]
            elif name == "question_answer":
                continue  # has no place for it
            formatter = Formatter()
            encoded = encoder.encode(formatter(Row("rows.jsonl:1", row)))
            assert formatter.format == name
            seen.add((tuple(encoded.ids.tolist()), tuple(encoded.trained.tolist())))
        assert len(seen) == 1
        if not system:
            encoded = encoder.encode(SHORT)
            assert seen == {(tuple(encoded.ids.tolist()), tuple(encoded.trained.tolist()))}
