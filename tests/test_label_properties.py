"""Whatever is said in a conversation, what is trained is its answers and the marks that close them.

pytest tests/test_label_properties.py
"""

from __future__ import annotations

import itertools
import re
import zlib

import numpy as np
import pytest
from chats import KINDS, STYLES, UNCLOSED, Style, chat_tokenizer, read, spoken, tokenizer_of
from hypothesis import HealthCheck, given, seed, settings, strategies as st

from lorafit.data import Encoder, Example, Turn
from lorafit.data.checks import check_labels, token_rows
from lorafit.data.tokens import Encoded

MARKS = sorted({token for style in STYLES for token in style.tokens} | {"<s>", "</s>", "<unk>", "[INST]", "<<SYS>>"})
SPECIAL = re.compile("|".join(map(re.escape, sorted(MARKS, key=len, reverse=True))))
PIECES = st.sampled_from(
    [*MARKS, " ", "  ", "\n", "\n\n", "\t", "\u00a0", "\u2028", "a", "the", "answer", "Who?", ".", "'s", "12", "é",
     "e\u0301", "日本", "🙂", "👩‍👩‍👧", "▁", "\ufffd",
     "\ue0000\ue001", "assistant\n", "user", "think", "final", "<|im_", "|>", "{{ x }}"]
)  # fmt: skip
TEXT = st.one_of(
    st.lists(PIECES, min_size=1, max_size=6).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
).filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn) -> Example:
    turns = [Turn("system", draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        turns += [Turn("user", draw(TEXT)), Turn("assistant", draw(TEXT))]
    return Example(tuple(turns), "rows.jsonl:1")


def without_system(example: Example) -> Example:
    return Example(tuple(turn for turn in example.turns if turn.role != "system"), example.where)


def as_given_back(tokenizer, text: str) -> str:
    """A text as the tokenizer gives it back."""
    return tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)


def around(style: Style | None, last: bool) -> tuple[str, str]:
    """What is trained before and behind an answer, from the text worked out by hand."""
    if style is None:
        return "", "</s>"
    text, spans = read(style.text)
    start, end = spans[last]
    before, _, behind = text[start:end].partition(("A potter.", "She sells his pots.")[last])
    return before, behind


def bare(text: str) -> str:
    """Without white space: tokenizers put it behind special tokens, templates strip it."""
    return "".join(text.split())


def drops_thoughts(style: Style | None, example: Example) -> bool:
    return style is not None and style.name == "qwen3" and any(
        "</think>" in turn.content for turn in example.turns if turn.role == "assistant"
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", (*STYLES, UNCLOSED, None), ids=lambda style: style.name if style else "plain")
def test_what_is_trained_is_the_answers_and_their_marks_and_nothing_else(style: Style | None, kind: str) -> None:
    tokenizer = chat_tokenizer(style, kind) if style else tokenizer_of(kind)
    encoder = Encoder(tokenizer, max_length=10**6)

    @settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @seed(zlib.crc32(f"{style} {kind}".encode()))
    @given(conversations())
    def holds(example: Example) -> None:
        if style is not None and not style.system:
            example = without_system(example)
        rendered, encoded = encoder.render(example), encoder.encode(example)
        runs = spoken(tokenizer, encoded)
        answers = [turn.content for turn in example.turns if turn.role == "assistant"]
        spans = [rendered.text[start:end] for start, end in rendered.answers]
        end = "" if rendered.closed else str(tokenizer.eos_token)
        # the labels are the text of the answers, to the last character
        assert len(runs) == len(spans) == len(answers)
        for run, span in zip(runs, [*spans[:-1], spans[-1] + end], strict=True):
            assert bare(run) in (bare(span), bare(as_given_back(tokenizer, span)))
        # and that is the answers and the marks that the template has around them
        if not drops_thoughts(style, example):
            for number, (span, answer) in enumerate(zip(spans, answers, strict=True)):
                lead, close = around(style, number == len(answers) - 1)
                if style is None and answer.endswith("</s>"):
                    close = ""  # it has its end token already
                assert span.startswith(lead) and span.endswith(close)
                assert span.removeprefix(lead).removesuffix(close).strip() == answer.strip()
            assert check_labels(encoder, example, encoded) is None
        # a prompt that is trained is found, unless it is nothing but special tokens
        start = int(np.flatnonzero(encoded.trained)[0])
        prompt_says = SPECIAL.sub("", bare(tokenizer.decode(encoded.ids[:start])))
        if prompt_says and not drops_thoughts(style, example):
            wrong = Encoded(encoded.ids, encoded.trained | (np.arange(len(encoded.ids)) < start))
            found = check_labels(encoder, example, wrong)
            assert found is not None and found.check == "prompt_trained"
        # the prompt in use is what stands before the last answer
        prompt = encoder.encode_prompt(example)
        assert encoded.ids[: len(prompt)].tolist() == prompt and not encoded.trained[: len(prompt)][-1:].any()
        assert encoded.trained[len(prompt) :].all()
        # the tokens that are shown are the text
        rows = token_rows(encoder, example)
        assert "".join(row["text"] for row in rows) == tokenizer.decode(encoded.ids)
        assert [row["trained"] for row in rows] == encoded.trained.tolist()

    holds()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_conversation_keeps_its_answers_whatever_is_said(kind: str) -> None:
    encoders = [
        Encoder(chat_tokenizer(style, kind), overflow="truncate_prompt", max_length=1)
        for style in (STYLES[0], STYLES[2])
    ]

    @settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @seed(zlib.crc32(kind.encode()))
    @given(conversations(), st.floats(0, 1))
    def holds(example: Example, share: float) -> None:
        for encoder in encoders:
            encoder.max_length = 1
            whole = encoder.encode(example)
            encoder.max_length = max(1, int(share * len(whole.ids)))
            encoded = encoder.encode(example)
            kept, cut = encoder.fit(encoded)
            if kept is not None:
                assert len(kept.ids) == min(encoder.max_length, len(whole.ids))
                assert np.array_equal(kept.ids[kept.trained], whole.ids[whole.trained])
                ranges = [range(start, end) for start, end in encoded.asked]
                assert set(np.flatnonzero(cut).tolist()) <= set(itertools.chain(*ranges))

    holds()
