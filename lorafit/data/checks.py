"""Proof of what is trained, from the tokens themselves.

Labels are made by character spans (tokens.py). Here they are checked by another road: the trained tokens are turned
back into text, and that text must be the answers and the marks that close them, and nothing else. What that and the
other checks find is a `Refusal`: it says what is wrong, how to go on, and under which name `data.allow` lets it pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorafit.data.formats import Example, Turn
from lorafit.data.store import Sequences
from lorafit.data.tokens import Encoded, Encoder
from lorafit.errors import InputError

CHECKS = {
    "no_supervised_token": "no token of the data is trained",
    "end_masked": "the end token is never trained",
    "prompt_trained": "a token of a prompt is trained under data.train_on=completion",
    "answer_masked": "a part of an answer is not trained",
    "answer_lost": "more answers are lost to data.max_length than data.max_lost allows",
    "template_mismatch": "the chat template closes answers with marks that the tokenizer does not know",
    "opening_differs": "the chat template opens an answer differently in use than in training",
    "doubled_special": "a special token stands twice at the start",
}

NEVER_ALLOWED = "no_supervised_token"


@dataclass(frozen=True)
class Refusal:
    """A check that the data did not pass. check: its name, one of CHECKS. What `data.allow` cannot let pass is
    `no_supervised_token`: there is nothing to train."""

    check: str
    message: str


def check_labels(encoder: Encoder, example: Example, encoded: Encoded) -> Refusal | None:
    """Hold the trained tokens of one uncut example against its answers; None when they are just those."""
    if encoder.train_on == "all":
        return None
    decode: Any = encoder.tokenizer.decode
    answers = [turn for turn in example.turns if turn.role == "assistant"]
    chosen = [turn for turn in (answers[-1:] if encoder.train_on == "last_turn" else answers) if turn.trained]
    edges = np.flatnonzero(np.diff(encoded.trained, prepend=False, append=False))
    runs = [decode(encoded.ids[start:end].tolist()) for start, end in edges.reshape(-1, 2)]
    if len(example.turns) == 1:  # of a text the first token may have no place to be predicted from
        whole, known = _plain(chosen[0].content), _plain("".join(runs))
        known = known.removesuffix(_plain(str(encoder.tokenizer.eos_token)))
        return None if known and whole.endswith(known) else _masked(example, whole)
    marks, beside = _marks(encoder), None
    for run in runs:
        verdict = _holds(encoder, run, chosen[0], marks) if chosen else None
        if verdict is not None:
            chosen = chosen[1:]
        if not verdict:
            beside = beside or run
    asked = [_plain(turn.content) for turn in example.turns if turn.role != "assistant"]
    if chosen and (beside is None or not any(content in _plain(beside) for content in asked)):
        return _masked(example, chosen[0].content)
    if beside is not None:
        return Refusal(
            "prompt_trained",
            f"{example.where}: {_short(beside)} is trained, which is more than an answer. The chat template marks more "
            "than the answers: correct its {% generation %} marks, or take data.template=plain",
        )
    return None


def _holds(encoder: Encoder, run: str, turn: Turn, marks: tuple[str, ...]) -> bool | None:
    """True when a stretch of trained text is an answer and marks, False when more, None when it is not all there."""
    # as the tokenizer gives it back, which may be without accents or capitals
    forms = (_plain(turn.content), _plain(str(encoder.tokenizer.decode(_ids(encoder, turn.content)))))
    trained = _plain(run)
    if any(_bare(trained, marks) == _bare(form, marks) for form in forms):
        return True
    return False if any(form in trained for form in forms) else None


def _masked(example: Example, answer: str) -> Refusal:
    return Refusal(
        "answer_masked",
        f"{example.where}: the answer {_short(answer)} is not trained as a whole. The chat template or the tokenizer "
        "changes it: correct the template, take data.template=plain, or, where it is not the last answer of its "
        "conversation, data.train_on=last_turn",
    )


def _ids(encoder: Encoder, text: str) -> list[int]:
    return encoder.tokenizer(text, add_special_tokens=False).input_ids


def _plain(text: str) -> str:
    """Without white space, which tokenizers and templates add and drop at the edges."""
    return re.sub(r"\s+", "", text)


def _marks(encoder: Encoder) -> tuple[str, ...]:
    """What may be trained around an answer: the special tokens, and what the template has the model write first."""
    special = [token.content for token in encoder.tokenizer.added_tokens_decoder.values()]
    lead = encoder.chat.lead() if encoder.chat is not None else ""
    marks = {_plain(text) for text in (*special, str(encoder.tokenizer.eos_token), lead)}
    return tuple(sorted(marks - {""}, key=len, reverse=True))


def _bare(text: str, marks: tuple[str, ...]) -> str:
    """A text without the marks at both of its ends."""
    while text.startswith(marks):
        text = text.removeprefix(next(mark for mark in marks if text.startswith(mark)))
    while text.endswith(marks):
        text = text.removesuffix(next(mark for mark in marks if text.endswith(mark)))
    return text


def _short(text: str, width: int = 60) -> str:
    return repr(text if len(text) <= width else f"{text[:width]}…")


def check_template(encoder: Encoder) -> list[Refusal]:
    """What can be said of the template before any row is read."""
    chat, found = encoder.chat, []
    if chat is None:
        return []
    if marks := chat.unknown_marks():
        found.append(
            Refusal(
                "template_mismatch",
                f"the chat template closes an answer with {marks[0]!r}, which is no token of this tokenizer: the "
                "template belongs to another one. Take the tokenizer that it came with, or data.template=plain",
            )
        )
    asked, answered = chat.opening()
    if not answered.startswith(asked):
        found.append(
            Refusal(
                "opening_differs",
                f"in use the chat template opens an answer with {_short(asked)}, but writes {_short(answered)} before "
                "an answer that is there: the model would not be asked what it was trained on. Take "
                "data.template=plain, or a template without that difference",
            )
        )
    return found


def check_sequences(
    encoder: Encoder, sequences: Sequences, *, lost: int, examples: int, max_lost: float, lengths: Seq[int]
) -> list[Refusal]:
    """What the tokens show. lost: how many of `examples` lost their answer, or a part of it, to max_length;
    lengths: tokens of each before anything was cut."""
    if not sequences.trained.any():
        if lost:
            within = f"within data.max_length={encoder.max_length}: raise it"
        else:
            within = f"under data.train_on={encoder.train_on}: its answers have weight 0, or it is one token long"
        return [Refusal("no_supervised_token", f"none of the {examples:,} examples has a token to train {within}")]
    found = []
    share = lost / examples if examples else 0.0
    if share > max_lost:
        needed = sorted(lengths)
        other = "" if encoder.overflow == "truncate_prompt" else "choose data.overflow=truncate_prompt, "
        at = [int(needed[min(len(needed) - 1, int(quantile * len(needed)))]) for quantile in (0.95, 0.99)]
        found.append(
            Refusal(
                "answer_lost",
                f"{lost:,} of {examples:,} examples ({share:.1%}) lose their answer to data.max_length="
                f"{encoder.max_length}; data.max_lost allows {max_lost:.0%}. 95 % fit in {at[0]:,} tokens, 99 % in "
                f"{at[1]:,}: raise data.max_length, {other}or raise data.max_lost",
            )
        )
    ends = np.isin(sequences.ids[sequences.trained], encoder.end_ids)
    if not ends.any():
        names = ", ".join(repr(encoder.tokenizer.decode([token])) for token in encoder.end_ids)
        found.append(
            Refusal(
                "end_masked",
                f"the end token ({names}) is trained in none of the examples, so the model would never stop. Raise "
                "data.max_length, or choose a data.overflow that keeps the ends of answers",
            )
        )
    long = sequences.offsets[:-1][sequences.lengths > 1]
    first, second = sequences.ids[long], sequences.ids[long + 1]
    special = np.array(sorted({*encoder.tokenizer.all_special_ids}), dtype=np.int64)
    doubled = np.flatnonzero((first == second) & np.isin(first, special))
    if len(doubled):
        index = int(np.flatnonzero(sequences.lengths > 1)[doubled[0]])
        name = encoder.tokenizer.decode([int(first[doubled[0]])])
        found.append(
            Refusal(
                "doubled_special",
                f"{sequences.place(index)}: {name!r} stands twice at the start, as in {len(doubled):,} examples: the "
                "text or the template has it, and the tokenizer adds it. Take it out of one of them",
            )
        )
    return found


def require_vocabulary(sequences: Sequences, size: int, encoder: Encoder) -> None:
    """Raise InputError, naming the row, if a token id lies outside a vocabulary of `size`."""
    outside = np.flatnonzero(sequences.ids >= size)
    if len(outside):
        token = int(sequences.ids[outside[0]])
        index = int(np.searchsorted(sequences.offsets, outside[0], side="right")) - 1
        raise InputError(
            f"{sequences.place(index)}: the tokenizer gives token id {token} "
            f"({encoder.tokenizer.convert_ids_to_tokens(token)!r}), the model knows {size} tokens: they do not belong "
            "together"
        )


def one_of_each(refusals: Iterable[Refusal], allow: Iterable[str] = ()) -> list[Refusal]:
    """The first refusal of each check, in the order of CHECKS, without those that are allowed."""
    first: dict[str, Refusal] = {}
    for refusal in refusals:
        first.setdefault(refusal.check, refusal)
    return [first[check] for check in CHECKS if check in first and check not in set(allow)]


def way_past(checks: Iterable[str]) -> str:
    """How to let these checks pass, as far as that can be done."""
    names = ",".join(check for check in checks if check in CHECKS and check != NEVER_ALLOWED)
    return f"data.allow=[{names}] trains all the same" if names else ""


def label_table(encoder: Encoder, sequences: Sequences, count: int = 8) -> list[dict[str, Any]]:
    """The first examples as they are trained: where the row stands, its tokens, and its text in two parts."""
    rows = []
    for index in range(min(count, len(sequences))):
        start, end = sequences.offsets[index], sequences.offsets[index + 1]
        ids, trained = sequences.ids[start:end], sequences.trained[start:end]
        rows.append(
            {
                "row": sequences.place(index),
                "tokens": len(ids),
                "trained_tokens": int(trained.sum()),
                "masked": encoder.tokenizer.decode(ids[~trained].tolist()),
                "trained": encoder.tokenizer.decode(ids[trained].tolist()),
            }
        )
    return rows


def token_rows(encoder: Encoder, example: Example, width: int | None = None) -> list[dict[str, Any]]:
    """The tokens of one example as they would be trained: [{"text", "trained", "cut"}], at most `width` of them."""
    encoded = encoder.encode(example)
    _, cut = encoder.fit(encoded, example.where) if encoder.overflow != "error" else (None, encoded.trained & False)
    texts = _texts(encoder, encoded.ids.tolist())
    rows = [
        {"text": text, "trained": bool(flag and not gone), "cut": bool(gone)}
        for text, flag, gone in zip(texts, encoded.trained, cut, strict=True)
    ]
    return rows[:width]


def _texts(encoder: Encoder, ids: list[int]) -> list[str]:
    """The text of each token; of a character in several tokens the last shows it, those before are empty."""
    decode = encoder.tokenizer.decode
    texts: list[str] = []
    # a window of the character before and the one to show, so that spaces between tokens are seen, and time stays
    # linear: tokens from `start` on, of which those before `new` are shown as `shown`
    start, new, shown = 0, 0, ""
    for end in range(1, len(ids) + 1):
        whole = str(decode(ids[start:end]))
        # a part of a character, or this very character in several tokens
        if whole.endswith("\ufffd") and end - new < 32 and end < len(ids):
            texts.append("")
            continue
        texts.append(whole.removeprefix(shown))
        start, new = new, end
        shown = str(decode(ids[start:end]))
    return texts
