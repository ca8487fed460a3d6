"""From a conversation to text, and where in that text each turn stands.

A `Rendered` text knows, to the character, the content of every turn and the span of every answer: from the place
where the model takes over from the prompt to the end of the mark that closes its turn. Nothing about labels is guessed
from tokens.

`ChatTemplate` is the tokenizer's own template. Where it has {% generation %} marks, they say what an answer is. Where
it has none, its *prefixes* say it: the conversation up to each answer is rendered with the prompt for generation, and
so is the conversation up to its end. Prefixes are rendered once per pattern of roles, with placeholders for the
contents, and the text of a row is then held against that skeleton from its first character to its last. So a template
that moves the system text to the last question (Mistral) or dresses up the last answer alone (Qwen3) is read rightly;
one that rewrites contents is read by the prefixes of the row itself; and what neither explains is refused, never
guessed.

`PlainTemplate` is for models without one: the turns, a line break after each question, an end token after each answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from lorafit.data.formats import Turn
from lorafit.errors import InputError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# what looks like the mark of a turn in text, whether or not the tokenizer knows it
_MARK_LIKE = re.compile(r"<\|[^<>|\s]+\|>|</?[a-z]+(?:_[a-z]+)+>|</?s>|\[/?[A-Z_]+\]")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. contents: the span of each turn's content, None where it is not known;
    answers: of each turn of the assistant, the span that a model would write, closing mark included;
    closed: whether the last answer has a closing mark in the text. plain: no chat template was used."""

    text: str
    contents: tuple[Span | None, ...]
    answers: tuple[Span, ...]
    closed: bool
    plain: bool


class PlainTemplate:
    """Questions and answers one after another. headings: under Alpaca's headings `### Instruction:`, `###
    Response:`."""

    def __init__(self, end: str, *, headings: bool = False) -> None:
        self.end, self.headings = end, headings

    def render(self, turns: tuple[Turn, ...], where: str = "") -> Rendered:
        """The text of a conversation; a single answer is rendered as it is."""
        headings = self.headings and len(turns) > 1
        text, contents, answers = "", [], []
        for turn in turns:
            text += {"user": "### Instruction:\n", "assistant": "### Response:\n"}.get(turn.role, "") * headings
            start = len(text)
            text += turn.content
            contents.append((start, len(text)))
            if turn.role == "assistant":
                text += "" if turn.content.endswith(self.end) else self.end
                answers.append((start, len(text)))
            else:
                text += "\n\n" if headings else "\n"
        return Rendered(text, tuple(contents), tuple(answers), closed=True, plain=True)


@dataclass(frozen=True)
class _Skeleton:
    """What a template puts around the contents of one pattern of roles: `order[i]` is the turn whose content stands
    between `around[i]` and `around[i + 1]`; `lead[turn]` and `close[turn]` are how many characters before and after
    an answer's content belong to it."""

    order: tuple[int, ...]
    around: tuple[str, ...]
    lead: dict[int, int]
    close: dict[int, int]
    closed: bool


class ChatTemplate:
    """A tokenizer's own chat template.

    system: what becomes of a system turn: "keep", "fold" (it goes before the first question), or "drop".
    Raises InputError when the tokenizer has none, or one that is no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, system: str = "keep") -> None:
        if not tokenizer.chat_template:
            raise InputError("data.template=chat: the tokenizer has no chat template. Take data.template=plain")
        try:
            self.source: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise InputError(f"data.template=chat: {reason(error)}") from error
        self.system = system
        self.marked = bool(_MARKS.search(self.source))
        self._variables = dict(tokenizer.special_tokens_map)
        added = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self.added = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        self._closing = re.compile(rf"\s*(?:{self.added.pattern})")
        self._skeletons: dict[tuple[str, ...], _Skeleton | None] = {}

    # -------------------------------------------------------------------------------------------- a conversation

    def render(self, turns: tuple[Turn, ...], where: str = "") -> Rendered:
        """The text of a conversation that ends with an answer; raises InputError for one that the template refuses or
        in which its answers cannot be told from the rest."""
        turns = self._with_system(turns)
        text, marks = self._apply(turns, where, marks=self.marked)
        skeleton = self._skeleton(tuple(turn.role for turn in turns))
        contents = None if skeleton is None else _walk(skeleton, turns, text)
        assistants = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        if len(marks) == len(assistants):
            answers = [self._whole_mark(text, span) for span in marks]
        elif skeleton is not None and contents is not None:
            answers = [
                (contents[index][0] - skeleton.lead[index], contents[index][1] + skeleton.close[index])
                for index in assistants
            ]
        else:
            answers = self._prefixes(turns, text, where)
        closed = bool(self.added.search(text, *answers[-1])) and self._ends_with_mark(text[slice(*answers[-1])])
        return Rendered(text, tuple(contents or [None] * len(turns)), tuple(answers), closed, plain=False)

    def _with_system(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        if self.system == "keep" or turns[0].role != "system":
            return turns
        rest = turns[1:]
        if self.system == "fold":
            rest = (rest[0]._replace(content=f"{turns[0].content}\n\n{rest[0].content}"), *rest[1:])
        return rest

    def _apply(
        self, turns: tuple[Turn, ...], where: str = "", *, generation: bool = False, marks: bool = False
    ) -> tuple[str, list[Span]]:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        render: Any = render_jinja_template  # its annotations are behind what it returns
        try:
            texts, spans = render(
                [messages],
                chat_template=self.source,
                add_generation_prompt=generation,
                return_assistant_tokens_mask=marks,
                **self._variables,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            hint = " Take data.system=fold" if turns[0].role == "system" else " Take data.template=plain"
            before = f"{where}: " if where else ""
            raise InputError(f"{before}the chat template refuses this conversation ({reason(error)}).{hint}") from error
        return texts[0], [(start, end) for start, end in spans[0]] if marks else []

    def _whole_mark(self, text: str, span: Span) -> Span:
        """A marked answer from its first character to the end of the token that closes it, and no further."""
        start, end = span
        inside = [found.end() for found in self.added.finditer(text, start, end)]
        if inside and text[inside[-1] : end].isspace():
            return start, inside[-1]
        if inside and inside[-1] == end:
            return span
        closing = self._closing.match(text, end)
        return (start, closing.end()) if closing else span

    def _ends_with_mark(self, text: str) -> bool:
        return any(found.end() == len(text) for found in self.added.finditer(text))

    # -------------------------------------------------------------------------------------------- the skeleton

    def _skeleton(self, roles: tuple[str, ...]) -> _Skeleton | None:
        if roles not in self._skeletons:
            self._skeletons[roles] = self._make_skeleton(roles)
        return self._skeletons[roles]

    def _make_skeleton(self, roles: tuple[str, ...]) -> _Skeleton | None:
        names = [f"\ue000{index}\ue001" for index in range(len(roles))]
        turns = tuple(Turn(role, name) for role, name in zip(roles, names, strict=True))
        text, _ = self._apply(turns)
        if any(text.count(name) != 1 for name in names):
            return None  # a content is left out or repeated: nothing that a skeleton can say
        order = sorted(range(len(roles)), key=lambda index: text.index(names[index]))
        around, at = [], 0
        for index in order:
            start = text.index(names[index])
            around.append(text[at:start])
            at = start + len(names[index])
        around.append(text[at:])
        lead, close, closed = {}, {}, False
        for place, index in enumerate(order):
            if roles[index] == "assistant":
                lead[index] = self._lead(turns[:index], around[place])
                closing = self._closing.match(around[place + 1])
                close[index] = closing.end() if closing else 0
                closed = closing is not None
        return _Skeleton(tuple(order), tuple(around), lead, close, closed)

    def _lead(self, before: tuple[Turn, ...], opening: str) -> int:
        """How many characters of `opening`, which stands before an answer, the model writes itself.

        What the prompt for generation holds is given to it. Where a template takes no such prompt, white space is the
        model's (Llama 2: "[/INST] answer"), and a header is not.
        """
        with_prompt, without = self._apply(before, generation=True)[0], self._apply(before)[0]
        tail = with_prompt[_end_of_contents(with_prompt, len(before)) :]
        if opening.startswith(tail):
            rest = opening[len(tail) :]
            return len(rest) if with_prompt != without or rest.isspace() else 0
        return 0

    def opening(self) -> tuple[str, str]:
        """(what a question is followed by in use, what it is followed by when it has an answer)."""
        turns = (Turn("user", "\ue0000\ue001"), Turn("assistant", "\ue0001\ue001"))
        asked, answered = self._apply(turns[:1], generation=True)[0], self._apply(turns)[0]
        start = _end_of_contents(answered, 1)
        end = answered.find("\ue0001\ue001")
        return asked[_end_of_contents(asked, 1) :], answered[start : end if end >= 0 else len(answered)]

    def unknown_marks(self) -> list[str]:
        """Marks by which the template closes an answer although they are no tokens of this tokenizer."""
        skeleton = self._skeleton(("user", "assistant"))
        if skeleton is None or skeleton.closed:
            return []
        return [mark for mark in _MARK_LIKE.findall(skeleton.around[-1]) if not self.added.fullmatch(mark)]

    def end_mark(self) -> str | None:
        """The token that closes an answer, or None where the template has none."""
        skeleton = self._skeleton(("user", "assistant"))
        if skeleton is None or not skeleton.closed:
            return None
        return skeleton.around[-1][: skeleton.close[1]].strip()

    # -------------------------------------------------------------------------------------------- a row's own prefixes

    def _prefixes(self, turns: tuple[Turn, ...], text: str, where: str) -> list[Span]:
        answers = []
        for index, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            start = self._apply(turns[:index], where, generation=True)[0]
            end = self._apply(turns[: index + 1], where)[0]
            if not (end.startswith(start) and text.startswith(end)):
                before = f"{where}: " if where else ""
                raise InputError(
                    f"{before}the chat template renders what stands before an answer differently once it is answered, "
                    f"so the answer (turn {index}) cannot be told apart from it. Take data.template=plain"
                )
            found = [mark.end() for mark in self.added.finditer(end, len(start))]
            closed = bool(found) and (found[-1] == len(end) or end[found[-1] :].isspace())
            answers.append((len(start), found[-1] if closed else len(end)))
        return answers


def _end_of_contents(text: str, count: int) -> int:
    """Where the last of the first `count` placeholders ends; 0 where there is none."""
    return max(
        (text.find(name) + len(name) for index in range(count) if (name := f"\ue000{index}\ue001") in text), default=0
    )


def _walk(skeleton: _Skeleton, turns: tuple[Turn, ...], text: str) -> list[Span] | None:
    """The span of each content, when the text is the skeleton with these contents in it, trimmed or not; else None."""
    spans: list[Span] = [(0, 0)] * len(turns)
    if not text.startswith(skeleton.around[0]):
        return None
    at = len(skeleton.around[0])
    for index, following in zip(skeleton.order, skeleton.around[1:], strict=True):
        content = turns[index].content
        for form in (content, content.strip(), content.lstrip(), content.rstrip()):
            end = at + len(form)
            if text.startswith(form, at) and text.startswith(following, end):
                break
        else:
            return None
        spans[index] = (at, end)
        at = end + len(following)
    return spans if at == len(text) else None
