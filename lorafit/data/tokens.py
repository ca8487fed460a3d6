"""Conversations as token ids, and which of them are trained.

A text is tokenized whole, as the tokenizer of the model in use would, and an answer's tokens are found by the
characters they stand for. Where a token lies across the place at which an answer begins (a space or a line break that
merges with it), the text is cut there first: in use the prompt is tokenized alone, and the model must meet the
boundary that it was trained on. The mark that closes an answer is trained with it, or the model would never stop; it
is told by its place and not by its id, so that it is trained also where padding has the same id.

What stands behind the last trained token is cut, since nothing is learned from it. The first token of a text is never
trained: there is no place to predict it from.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import AutoTokenizer

from lorafit.data.formats import Example
from lorafit.data.templates import ChatTemplate, PlainTemplate, Rendered, Span
from lorafit.errors import InputError, did_you_mean, reason
from lorafit.quant import resolve

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
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
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

    asked: token ranges of the contents that nothing is learned from, which may be cut when the whole is too long.
    """

    ids: np.ndarray
    trained: np.ndarray
    asked: tuple[Span, ...] = ()

    def sequence(self) -> Sequence:
        """{"input_ids", "labels"}, int64 arrays: a label is -100 where nothing is trained."""
        ids = self.ids.astype(np.int64)
        return {"input_ids": ids, "labels": np.where(self.trained, ids, IGNORE)}


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
        self.plain = PlainTemplate(str(tokenizer.eos_token), headings=template == "alpaca")
        use_chat = template == "chat" or (template == "auto" and bool(tokenizer.chat_template))
        self.chat = ChatTemplate(tokenizer, system=system) if use_chat else None
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self._backend is not None:
            # a tokenizer's file may ask for either, and would cut in silence
            self._backend.no_truncation()
            self._backend.no_padding()
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

    # -------------------------------------------------------------------------------------------- encoding

    def encode(self, example: Example) -> Encoded:
        """One example, uncut; raises InputError when the template refuses it."""
        found = self.encode_all([example])[0]
        if isinstance(found, InputError):
            raise found
        return found

    def encode_all(self, examples: Iterable[Example]) -> list[Encoded | InputError]:
        """Each example, uncut, or what is wrong with it."""
        examples = list(examples)
        rendered: list[Rendered | InputError] = []
        for example in examples:
            try:
                rendered.append(self.render(example))
            except InputError as error:
                rendered.append(error)
        texts = [item.text for item in rendered if isinstance(item, Rendered)]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False) if self._backend else texts)
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
        return self._begin(rendered) + self._ids(rendered.text[: rendered.answers[-1][0]])

    def _encoded(self, example: Example, rendered: Rendered, encoding: Any) -> Encoded:
        assistants = [turn for turn in example.turns if turn.role == "assistant"]
        chosen = [
            span
            for index, (turn, span) in enumerate(zip(assistants, rendered.answers, strict=True))
            if turn.trained and (self.train_on != "last_turn" or index == len(assistants) - 1)
        ]
        ids, locate = self._tokenize(rendered, encoding)
        begin = self._begin(rendered)
        ranges = [(len(begin) + locate(start), len(begin) + locate(end)) for start, end in chosen]
        asked = [
            (len(begin) + locate(start), len(begin) + locate(end))
            for start, end in (span for span in rendered.contents if span is not None)
            if not any(one <= start and end <= other for one, other in chosen)
        ]
        if not rendered.closed:  # no mark in the text: the end token closes the last answer
            ids = ids[: locate(rendered.answers[-1][1])]
            end_id = int(self.tokenizer.eos_token_id)
            if ids[-1:] != [end_id]:
                ids = [*ids, end_id]
                if chosen and chosen[-1] == rendered.answers[-1]:
                    ranges[-1] = (ranges[-1][0], len(begin) + len(ids))
        if self.train_on == "all":
            ranges, asked = [(0, len(begin) + len(ids))], []
        length = max((end for _, end in ranges), default=len(begin) + len(ids))
        all_ids = np.array([*begin, *ids][:length], dtype=np.int32)
        trained = np.zeros(len(all_ids), dtype=bool)
        for start, end in ranges:
            trained[start:end] = True
        trained[:1] = False
        return Encoded(all_ids, trained, tuple((start, end) for start, end in asked if end <= length))

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

    def _tokenize(self, rendered: Rendered, encoding: Any) -> tuple[list[int], Callable[[int], int]]:
        """The ids of a text, no token lying across the beginning of an answer, and a function from a character to the
        first token that starts at it or later."""
        text = rendered.text
        if self._backend is not None and all(_is_clean(encoding, text, start) for start, _ in rendered.answers):
            return encoding.ids, lambda at: _locate(encoding, text, at)
        # rare, so that it need not be fast: the text in pieces, cut at both ends of every answer
        edges = sorted({0, len(text), *(at for span in rendered.answers for at in span)})
        pieces = [
            self._continue(text[start:end]) if start else self._start(text[:end]) for start, end in pairwise(edges)
        ]
        tokens_at = [0, *accumulate(len(found) for found, _ in pieces)]

        def locate(at: int) -> int:
            piece = bisect_left(edges, at)
            if piece == len(edges) or edges[piece] == at:
                return tokens_at[min(piece, len(edges) - 1)]
            found, inside = pieces[piece - 1]
            return tokens_at[piece - 1] + min(inside(at - edges[piece - 1]), len(found))

        return [token for found, _ in pieces for token in found], locate

    def _start(self, text: str) -> tuple[list[int], Callable[[int], int]]:
        if self._backend is None:  # a tokenizer without offsets knows the ends of a piece alone
            ids = self._ids(text)
            return ids, lambda at: len(ids)
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, lambda at: _locate(encoding, text, at)

    def _continue(self, text: str) -> tuple[list[int], Callable[[int], int]]:
        """A text that goes on from another, without the space that some tokenizers put before every text."""
        if self._adds_space:
            lead = self._ids("\n")
            ids, locate = self._start("\n" + text)
            if ids[: len(lead)] == lead:
                return ids[len(lead) :], lambda at: locate(at + 1) - len(lead)
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


def _is_clean(encoding: Any, text: str, at: int) -> bool:
    """Whether the tokens of a text part at character `at`: those before end there, and the next one starts there.

    Some tokenizers leave white space out of their offsets; then it is unclear whose it is, and the answer is no.
    """
    if at <= 0 or at >= len(text):
        return True
    token = encoding.char_to_token(at)
    if token is None:
        return False
    start, _ = encoding.token_to_chars(token)
    if start < at:
        return False
    return token == 0 or encoding.token_to_chars(token - 1)[1] >= at
