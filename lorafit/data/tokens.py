"""Conversations as token ids, and which of them are trained.

A text is tokenized whole, as the tokenizer of the model in use would, and an answer's tokens are found by the
characters they stand for. Where a token lies across the place at which an answer begins or ends (a space or a line
break that merges with it), the text is cut there first: in use the prompt is tokenized alone, and the model must meet
the boundary that it was trained on. The mark that closes an answer is trained with it, or the model would never stop;
it is told by its place and not by its id, so that it is trained also where padding has the same id.

What stands behind the last trained token is cut, since nothing is learned from it. The first token of a text is never
trained: there is no place to predict it from.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from transformers import AutoTokenizer

from lorafit.data.formats import Example
from lorafit.data.templates import ChatTemplate, PlainTemplate, Rendered, Span, Unusable
from lorafit.errors import InputError, did_you_mean, reason
from lorafit.loading import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
TEMPLATES = ("auto", "chat", "plain", "alpaca")
TRAIN_ON = ("completion", "all", "last_turn")
OVERFLOW = ("drop", "truncate_prompt", "truncate", "error")
SYSTEM = ("keep", "fold", "drop")
Sequence = dict[str, Any]  # input_ids and labels, each a list or an array of ints


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model (hub id, folder or "embedded"), with an end token and a padding token.

    Raises InputError when there is none, or when it has no end token: a model trained without one never stops.
    """
    options = {"revision": revision} if revision is not None else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=trust_remote_code, **options)
    except InputError:
        raise
    except Exception as error:  # of its files the libraries raise what they happen to meet
        raise InputError(f"the tokenizer of {name!r} cannot be loaded: {reason(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer of {name!r} has no end token, and a model trained without one never stops: "
            "name one as eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        # only fills up batches: padded places are masked by position, not by this id
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens, uncut: ids [length] (int32), and for each whether it is trained (bool).

    asked: where the whole is too long and questions may be cut, the token ranges of their contents, and of those of
    answers that nothing is learned from. as_written: whether the text is just the contents and what the template has
    around them.
    """

    ids: np.ndarray
    trained: np.ndarray
    asked: tuple[Span, ...] = ()
    as_written: bool = True

    def sequence(self) -> Sequence:
        """{"input_ids", "labels"}, int64 arrays: a label is -100 where nothing is trained."""
        ids = self.ids.astype(np.int64)
        return {"input_ids": ids, "labels": np.where(self.trained, ids, IGNORE)}


class _Tokens(NamedTuple):
    """A text as tokens. locate: from a character to the first token that starts at it or later; offsets: the
    characters of each token, nothing where the tokenizer does not tell."""

    ids: list[int]
    locate: Callable[[int], int]
    offsets: Callable[[], list[Span]]

    def without(self, count: int) -> _Tokens:
        """What stands behind the first character, which has `count` tokens."""
        return _Tokens(
            self.ids[count:],
            lambda at: self.locate(at + 1) - count,
            lambda: [(start - 1, end - 1) for start, end in self.offsets()[count:]],
        )


class Encoder:
    """Turns examples into tokens with one tokenizer, template and length limit.

    template: "chat" is the tokenizer's own, "plain" and "alpaca" are PlainTemplate's, "auto" takes the chat template
    where there is one. train_on: "completion" (every answer), "last_turn" (the last), or "all" (every token).
    overflow: what becomes of an example longer than max_length tokens: "drop" it; "truncate_prompt", from the
    beginning of its first question on, and drop it where that is not enough; "truncate" its end, answer or not; or
    "error". system: see ChatTemplate. Raises InputError for a choice that does not exist.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str = "auto",
        max_length: int = 512,
        train_on: str = "completion",
        overflow: str = "drop",
        system: str = "keep",
    ) -> None:
        for key, value, choices in (
            ("template", template, TEMPLATES),
            ("train_on", train_on, TRAIN_ON),
            ("overflow", overflow, OVERFLOW),
            ("system", system, SYSTEM),
        ):
            if value not in choices:
                raise InputError(
                    f"data.{key} must be one of {', '.join(choices)}, got {value!r}.{did_you_mean(value, choices)}"
                )
        self.tokenizer = tokenizer
        self.max_length, self.train_on, self.overflow = max_length, train_on, overflow
        self.plain = PlainTemplate(str(tokenizer.eos_token), headings=template == "alpaca", system=system)
        use_chat = template == "chat" or (template == "auto" and bool(tokenizer.chat_template))
        self.chat = ChatTemplate(tokenizer, system=system) if use_chat else None
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        self._added = frozenset(tokenizer.added_tokens_decoder)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self._alone: dict[str, list[int]] = {}
        self.beginning = self._special_beginning()
        # a tokenizer of SentencePiece's kind puts a space before every text, also before the rest of a text
        self._adds_space = self._ids("\na")[-len(self._ids("a")) :] != self._ids("a")

    @property
    def end_ids(self) -> list[int]:
        """The tokens at which an answer ends: the tokenizer's end token, and the mark of the chat template."""
        ids = [int(self.tokenizer.eos_token_id)]
        mark = self.chat.end_mark() if self.chat is not None else None
        if mark is not None and (found := self._ids(mark)) and found[-1] not in ids:
            ids.append(found[-1])
        return ids

    def special_in(self, example: Example) -> str | None:
        """The first special token that stands in a text of the example itself, where it would be read as what it
        is to the model. At the very end of an answer the plain template takes an end token for its own."""
        for turn in example.turns:
            text = turn.content
            if self.chat is None and turn.role == "assistant":
                text = text.removesuffix(str(self.tokenizer.eos_token))
            if found := self._special.search(text):
                return found[0]
        return None

    # -------------------------------------------------------------------------------------------- encoding

    def encode(self, example: Example) -> Encoded:
        """One example, uncut; raises InputError when the template refuses it."""
        found = self.encode_all([example])[0]
        if isinstance(found, InputError):
            raise found
        return found

    def encode_all(self, examples: Iterable[Example]) -> list[Encoded | InputError]:
        """Each example, uncut, or what is wrong with it. Raises Unusable where the template is what is wrong."""
        examples = list(examples)
        rendered: list[Rendered | InputError] = []
        for example in examples:
            try:
                rendered.append(self.render(example))
            except Unusable:
                raise
            except InputError as error:
                rendered.append(error)
        encodings = iter(self._encode_batch([item.text for item in rendered if isinstance(item, Rendered)]))
        return [
            self._encoded(example, item, next(encodings)) if isinstance(item, Rendered) else item
            for example, item in zip(examples, rendered, strict=True)
        ]

    def render(self, example: Example) -> Rendered:
        """The example as text. A text of its own is not dressed up as an answer, whatever the template."""
        template = self.plain if self.chat is None or len(example.turns) == 1 else self.chat
        return template.render(example.turns, example.where)

    def encode_prompt(self, example: Example) -> list[int]:
        """What the model is given in use: everything before the last answer, up to where the answer begins."""
        rendered = self.render(example)
        encoding = self._encode_batch([rendered.text])[0]
        tokens = self._tokenize(rendered, encoding)
        ids = self._begin(rendered) + tokens.ids[: tokens.locate(rendered.answers[-1][0])]
        if self.overflow != "truncate_prompt":
            return ids
        # as it is trained: with the question cut so that the answer fits
        kept, cut = self.fit(self._encoded(example, rendered, encoding))
        return ids if kept is None else [token for token, gone in zip(ids, cut, strict=False) if not gone]

    def _encoded(self, example: Example, rendered: Rendered, encoding: Any) -> Encoded:
        assistants = [turn for turn in example.turns if turn.role == "assistant"]
        chosen = [
            span
            for index, (turn, span) in enumerate(zip(assistants, rendered.answers, strict=True))
            if turn.trained and (self.train_on != "last_turn" or index == len(assistants) - 1)
        ]
        tokens, begin = self._tokenize(rendered, encoding), self._begin(rendered)
        ranges = [(len(begin) + tokens.locate(start), len(begin) + tokens.locate(end)) for start, end in chosen]
        ids = tokens.ids
        if not rendered.closed:  # no mark in the text: the end token closes the last answer
            end_id = int(self.tokenizer.eos_token_id)
            ids = [*ids[: tokens.locate(rendered.answers[-1][1])], end_id]
            if chosen and chosen[-1] == rendered.answers[-1]:
                ranges[-1] = (ranges[-1][0], len(begin) + len(ids))
        if self.train_on == "all":
            ranges = [(0, len(begin) + len(ids))]
        length = max((end for _, end in ranges), default=len(begin) + len(ids))
        all_ids = np.array([*begin, *ids][:length], dtype=np.int32)
        trained = np.zeros(len(all_ids), dtype=bool)
        for start, end in ranges:
            trained[start:end] = True
        trained[:1] = False
        asked: list[Span] = []
        if length > self.max_length and self.overflow == "truncate_prompt" and self.train_on != "all":
            offsets, turns = (
                tokens.offsets(),
                example.turns[-len(rendered.contents) :],
            )  # as the system text may be gone
            asked = [
                (len(begin) + first, len(begin) + last)
                for turn, span in zip(turns, rendered.contents, strict=True)
                if turn.role != "system" and span is not None
                if not any(one <= span[0] and span[1] <= other for one, other in chosen)
                for first, last in [_inside(offsets, *span)]
                if first < last and len(begin) + last <= length
            ]
        return Encoded(all_ids, trained, tuple(sorted(asked)), None not in rendered.contents)

    def _begin(self, rendered: Rendered) -> list[int]:
        # a chat template writes its own beginning
        return self.beginning if rendered.plain else []

    # -------------------------------------------------------------------------------------------- fitting

    def fit(self, encoded: Encoded, where: str = "") -> tuple[Encoded | None, np.ndarray]:
        """(what is left within max_length, or None when the example is dropped; for each uncut token, whether it is
        cut). Raises InputError under overflow="error"."""
        length, excess = len(encoded.ids), len(encoded.ids) - self.max_length
        cut = np.zeros(length, dtype=bool)
        if excess <= 0:
            return (encoded if encoded.trained.any() else None), cut
        if self.overflow == "error":
            raise InputError(
                f"{where}: the example has {length:,} tokens, data.max_length is {self.max_length:,}. Raise it, or "
                "choose data.overflow=drop, truncate_prompt or truncate"
            )
        if self.overflow == "truncate":
            cut[self.max_length :] = True
        elif self.overflow == "truncate_prompt":
            for start, end in encoded.asked:
                cut[start : min(end, start + excess - int(cut.sum()))] = True
        kept = Encoded(encoded.ids[~cut], encoded.trained[~cut])
        if len(kept.ids) > self.max_length or not kept.trained.any():
            return None, np.ones(length, dtype=bool)
        return kept, cut

    # -------------------------------------------------------------------------------------------- tokens

    def _encode_batch(self, texts: list[str]) -> list[Any]:
        if self._backend is None:
            return texts
        # a tokenizer's file may ask for either, and so may whoever used it last; they would cut or fill up in silence
        self._backend.no_truncation()
        self._backend.no_padding()
        return self._backend.encode_batch(texts, add_special_tokens=False)

    def _tokenize(self, rendered: Rendered, encoding: Any) -> _Tokens:
        """The tokens of a text, none of which lies across the beginning or the end of an answer."""
        text, ids = rendered.text, encoding.ids if self._backend is not None else []
        if self._backend is not None and all(
            self._begins_clean(encoding, ids, text, start) and self._ends_clean(encoding, ids, text, end)
            for start, end in rendered.answers
        ):
            return _Tokens(ids, partial(_locate, encoding, text), lambda: encoding.offsets)
        # rare, so that it need not be fast: the text in pieces, cut where an answer begins, and where it ends without
        # a mark (some marks swallow the white space behind them)
        ends = (end for _, end in rendered.answers if self._backend is None or not self._closes(encoding, ids, end))
        edges = sorted({0, len(text), *(start for start, _ in rendered.answers), *ends})
        pieces = [
            self._continue(text[start:end]) if start else self._start(text[:end]) for start, end in pairwise(edges)
        ]
        tokens_at = [0, *accumulate(len(piece.ids) for piece in pieces)]

        def locate(at: int) -> int:
            place = bisect_left(edges, at)
            if place == len(edges) or edges[place] == at:
                return tokens_at[min(place, len(edges) - 1)]
            return tokens_at[place - 1] + pieces[place - 1].locate(at - edges[place - 1])

        def offsets() -> list[Span]:
            return [
                (edge + start, edge + end)
                for edge, piece in zip(edges, pieces, strict=False)
                for start, end in piece.offsets()
            ]

        return _Tokens([token for piece in pieces for token in piece.ids], locate, offsets)

    def _begins_clean(self, encoding: Any, ids: list[int], text: str, at: int) -> bool:
        """Whether the tokens of a text part at character `at`, and those before it are those of that text alone.

        Some tokenizers leave white space out of their offsets; then it is unclear whose it is, and the answer is no.
        """
        if at <= 0 or at >= len(text):
            return True
        token = encoding.char_to_token(at)
        if token is None or encoding.token_to_chars(token)[0] < at:
            return False
        if token and encoding.token_to_chars(token - 1)[1] < at:
            return False
        if not text[max(0, at - 2) : at].isspace() or at < 2:
            return True
        # the last of several spaces or line breaks may go with what follows, as in GPT-2's "\n\n" before a word
        first = token - 1
        while first > 0 and ids[first] not in self._added:
            first -= 1
        tail = text[encoding.token_to_chars(first)[0] : at]
        if tail not in self._alone:
            if len(self._alone) > 1000:
                self._alone.clear()
            self._alone[tail] = self._encode_batch([tail])[0].ids
        return self._alone[tail] == ids[first:token]

    def _ends_clean(self, encoding: Any, ids: list[int], text: str, at: int) -> bool:
        """Whether no token lies across character `at`, where an answer ends."""
        if at >= len(text) or self._closes(encoding, ids, at):
            return True
        token = encoding.char_to_token(at)
        return token is not None and encoding.token_to_chars(token)[0] >= at

    def _closes(self, encoding: Any, ids: list[int], at: int) -> bool:
        """Whether the token before character `at` is one of the marks that are cut out of any text."""
        token = encoding.char_to_token(at - 1)
        return token is not None and ids[token] in self._added

    def _start(self, text: str) -> _Tokens:
        if self._backend is None:  # a tokenizer without offsets knows the ends of a piece alone
            ids = self._ids(text)
            return _Tokens(ids, lambda at: len(ids), list)
        encoding = self._encode_batch([text])[0]
        return _Tokens(encoding.ids, partial(_locate, encoding, text), lambda: encoding.offsets)

    def _continue(self, text: str) -> _Tokens:
        """A text that goes on from another, without the space that some tokenizers put before every text."""
        for before in ("\n", "x", ".") if self._adds_space else ():
            lead, found = self._ids(before), self._start(before + text)
            # not where it merged with the text
            if found.ids[: len(lead)] == lead and found.locate(1) == len(lead):
                return found.without(len(lead))
        return self._start(text)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _special_beginning(self) -> list[int]:
        """The special tokens that the tokenizer puts before any text by itself."""
        ids, bare = self.tokenizer("x").input_ids, self._ids("x")
        return next((ids[:at] for at in range(len(ids)) if ids[at : at + len(bare)] == bare), [])


def _locate(encoding: Any, text: str, at: int) -> int:
    """The first token that starts at character `at` or later."""
    for place in range(at, len(text)):
        token = encoding.char_to_token(place)
        if token is not None:
            return token if encoding.token_to_chars(token)[0] >= at else token + 1
    return len(encoding)


def _inside(offsets: list[Span], start: int, end: int) -> Span:
    """The range of the tokens that stand for characters of [start, end) and for no others."""
    first = last = 0
    before = 0  # where the token before ends: what offsets leave out belongs to the next token
    for index, (one, other) in enumerate(offsets):
        if min(one, before) < start:
            first = index + 1
        if other <= end:
            last = index + 1
        before = max(before, other)
    return first, last
