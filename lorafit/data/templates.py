"""From a conversation to text, and where in that text each turn stands.

A `Rendered` text knows, to the character, the content of every turn and the span of every answer: from the place
where the model takes over from the prompt to the end of the mark that closes its turn. Nothing about labels is guessed
from tokens.

`ChatTemplate` is the tokenizer's own template. What it puts around an answer is found once per pattern of roles, with
placeholders for the contents: an answer begins where the prompt for generation ends, and ends with the mark behind it;
{% generation %} marks, where there are any, say it more closely. The text of a row is then held against that skeleton
from its first character to its last. So a template that moves the system text to the last question (Mistral) or dresses
up the last answer alone (Qwen3) is read rightly. Where a template rewrites contents (Qwen3 leaves out old thoughts),
the row is rendered again with a placeholder for each answer in turn, and what stands around that must stand around the
answer too. What neither explains is refused, never guessed.

`PlainTemplate` is for models without one: the turns, a line break after each question, an end token after each answer.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from lorafit.data.formats import Turn
from lorafit.errors import InputError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_MOST_SECONDS = 20  # for one conversation, which takes a thousandth of one
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
# what looks like the mark of a turn in text, whether or not the tokenizer knows it
_MARK_LIKE = re.compile(r"<\|[^<>|\s]+\|>|</?[a-z]+(?:_[a-z]+)+>|</?s>|\[/?[A-Z_]+\]")


class Unusable(InputError):
    """A template is at fault, whatever the conversation: no other row is tried with it."""


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


def with_system(turns: tuple[Turn, ...], system: str) -> tuple[Turn, ...]:
    """The turns, with what becomes of a system turn: "keep", "fold" (it goes before the first question), or "drop"."""
    if system == "keep" or turns[0].role != "system":
        return turns
    rest = turns[1:]
    if system == "fold":
        rest = (rest[0]._replace(content=f"{turns[0].content}\n\n{rest[0].content}"), *rest[1:])
    return rest


class PlainTemplate:
    """Questions and answers one after another. headings: under Alpaca's headings `### Instruction:`, `###
    Response:`. system: see `with_system`."""

    def __init__(self, end: str, *, headings: bool = False, system: str = "keep") -> None:
        self.end, self.headings, self.system = end, headings, system

    def render(self, turns: tuple[Turn, ...], where: str = "") -> Rendered:
        """The text of a conversation; a single answer is rendered as it is."""
        turns = with_system(turns, self.system)
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
    """What a template puts around the contents of one pattern of roles. `order[i]` is the turn whose content stands
    between `around[i]` and `around[i + 1]`; both are empty where a content is repeated. `lead[turn]` and
    `close[turn]` are what of the text before and behind an answer's content belongs to it, `behind[turn]` is all that
    stands behind it up to the next content."""

    order: tuple[int, ...]
    around: tuple[str, ...]
    lead: dict[int, str]
    close: dict[int, str]
    behind: dict[int, str]


class ChatTemplate:
    """A tokenizer's own chat template.

    system: what becomes of a system turn, see `with_system`. Raises InputError when the tokenizer has none, or one that
    is no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, system: str = "keep") -> None:
        if not tokenizer.chat_template:
            raise InputError("data.template=chat: the tokenizer has no chat template. Take data.template=plain")
        try:
            self.source: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise InputError(f"data.template=chat: {reason(error)}") from error
        if not isinstance(self.source, str):
            raise InputError(
                f"the chat template of the tokenizer is {type(self.source).__name__}, where text belongs: correct it, "
                "or take data.template=plain"
            )
        _require_no_powers(self.source)
        self.system = system
        self.marked = bool(_MARKS.search(self.source))
        self._variables = dict(tokenizer.special_tokens_map)
        self.added = tuple(
            sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        )
        self._closing = re.compile(rf"\s*(?:{'|'.join(map(re.escape, self.added)) or '(?!)'})")
        self._skeletons: dict[tuple[str, ...], _Skeleton | None] = {}

    # -------------------------------------------------------------------------------------------- a conversation

    def render(self, turns: tuple[Turn, ...], where: str = "") -> Rendered:
        """The text of a conversation that ends with an answer; raises InputError for one that the template refuses or
        in which its answers cannot be told from the rest."""
        turns = with_system(turns, self.system)
        text, _ = self._apply(turns, where)
        skeleton = self._skeleton(tuple(turn.role for turn in turns))
        contents = None if skeleton is None else _walk(skeleton, turns, text)
        if skeleton is None:
            answers = self._as_marked(turns)
        elif contents is None:
            answers = self._one_by_one(skeleton, turns, text)
        else:
            answers = [
                (contents[index][0] - len(lead), contents[index][1] + len(skeleton.close[index]))
                for index, lead in skeleton.lead.items()
            ]
        if answers is None:
            before = f"{where}: " if where else ""
            if skeleton is None and (absent := self._left_out(turns)):
                hint = "data.system=fold, or drop" if absent == "system" else "data.template=plain"
                raise InputError(f"{before}the chat template leaves out the {absent} text. Take {hint}")
            raise InputError(
                f"{before}the chat template changes the answers of this conversation, or what stands around them, so "
                "that they cannot be told from the rest. Take data.template=plain"
            )
        closed = text.endswith(self.added, *answers[-1])
        return Rendered(text, tuple(contents or [None] * len(turns)), tuple(answers), closed, plain=False)

    def _apply(
        self, turns: tuple[Turn, ...], where: str = "", *, generation: bool = False, marks: bool = False
    ) -> tuple[str, list[Span]]:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        render: Any = render_jinja_template  # its annotations are behind what it returns
        try:
            with _limited():
                texts, spans = render(
                    [messages],
                    chat_template=self.source,
                    add_generation_prompt=generation,
                    return_assistant_tokens_mask=marks,
                    **self._variables,
                )
        except _Endless:
            raise Unusable(
                f"the chat template of the tokenizer takes more than {_MOST_SECONDS} seconds for one conversation: "
                "correct it, or take data.template=plain"
            ) from None
        except TemplateSyntaxError as error:
            raise Unusable(
                f"the chat template of the tokenizer cannot be read ({reason(error)}): correct it, or take "
                "data.template=plain"
            ) from error
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            hint = " Take data.system=fold" if turns[0].role == "system" else " Take data.template=plain"
            before = f"{where}: " if where else ""
            raise InputError(f"{before}the chat template refuses this conversation ({reason(error)}).{hint}") from error
        except (RecursionError, MemoryError) as error:
            raise InputError(
                f"the chat template of the tokenizer never comes to its end ({type(error).__name__}): correct it, or "
                "take data.template=plain"
            ) from None
        return texts[0], [(start, end) for start, end in spans[0]] if marks else []

    # -------------------------------------------------------------------------------------------- the skeleton

    def _skeleton(self, roles: tuple[str, ...]) -> _Skeleton | None:
        """None where a content is left out, or the template's marks are around other text than the answers."""
        if roles not in self._skeletons:
            self._skeletons[roles] = self._make_skeleton(roles)
        return self._skeletons[roles]

    def _make_skeleton(self, roles: tuple[str, ...]) -> _Skeleton | None:
        turns = tuple(Turn(role, _placeholder(index)) for index, role in enumerate(roles))
        text, marks = self._apply(turns, marks=self.marked)
        found = list(_PLACEHOLDER.finditer(text))
        order = tuple(int(place[1]) for place in found)
        edges = [0, *(edge for place in found for edge in place.span()), len(text)]
        around = tuple(text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))
        answers = [index for index, role in enumerate(roles) if role == "assistant"]
        if set(order) != set(range(len(roles))):
            return None
        lead, close, behind = {}, {}, {}
        for number, index in enumerate(answers):
            place = order.index(index)
            start, end = found[place].span()
            before, behind[index] = around[place], around[place + 1]
            lead[index] = self._lead(turns[:index], before)
            closing = self._closing.match(behind[index])
            close[index] = closing[0] if closing else ""
            if len(marks) == len(answers):
                first, last = marks[number]
                if not first <= start < end <= last:
                    return None
                # of a mark around the header too, the header is still given by the prompt
                lead[index] = min(lead[index], text[first:start], key=len)
                close[index] = max(close[index], text[end:last].rstrip(), key=len)
        once = len(order) == len(roles)
        return _Skeleton(order if once else (), around if once else (), lead, close, behind)

    def _lead(self, before: tuple[Turn, ...], opening: str) -> str:
        """What of `opening`, which stands before an answer, the model writes itself.

        What the prompt for generation holds is given to it. Where a template takes no such prompt, white space is the
        model's (Llama 2: "[/INST] answer"), and a header is not.
        """
        with_prompt, without = self._apply(before, generation=True)[0], self._apply(before)[0]
        tail = _behind_contents(with_prompt)
        if opening.startswith(tail):
            rest = opening[len(tail) :]
            return rest if with_prompt != without or rest.isspace() else ""
        return ""

    def opening(self) -> tuple[str, str]:
        """(what a question is followed by in use, what it is followed by when it has an answer)."""
        turns = (Turn("user", _placeholder(0)), Turn("assistant", _placeholder(1)))
        asked, answered = self._apply(turns[:1], generation=True)[0], self._apply(turns)[0]
        return _behind_contents(asked), _behind_contents(answered.partition(_placeholder(1))[0])

    def lead(self) -> str:
        """What the model writes before an answer as the template has it, such as the marks of an empty thought."""
        skeleton = self._skeleton(("user", "assistant"))
        return "" if skeleton is None else skeleton.lead[1]

    def unknown_marks(self) -> list[str]:
        """Marks by which the template closes an answer although they are no tokens of this tokenizer."""
        skeleton = self._skeleton(("user", "assistant"))
        if skeleton is None or skeleton.close[1].endswith(self.added):
            return []
        return [mark for mark in _MARK_LIKE.findall(skeleton.behind[1]) if mark not in self.added]

    def end_mark(self) -> str | None:
        """The token that closes an answer, or None where the template has none."""
        skeleton = self._skeleton(("user", "assistant"))
        if skeleton is None or not skeleton.close[1].endswith(self.added):
            return None
        return skeleton.close[1].strip()

    # -------------------------------------------------------------------------------------------- other rows

    def _one_by_one(self, skeleton: _Skeleton, turns: tuple[Turn, ...], text: str) -> list[Span] | None:
        """The answers of a row whose contents the template rewrites: what stands around each, when a placeholder is
        in its place, must stand around it in the text too."""
        answers = []
        for index, lead in skeleton.lead.items():
            name, close = _placeholder(index), skeleton.close[index]
            other, _ = self._apply((*turns[:index], turns[index]._replace(content=name), *turns[index + 1 :]))
            before, found, behind = other.partition(name)
            before, behind = before.removesuffix(lead), behind.removeprefix(close)
            start, end = len(before), len(text) - len(behind)
            if not found or start > end or not (text.startswith(before) and text.endswith(close + behind)):
                return None
            answers.append((start, end))
        return answers

    def _left_out(self, turns: tuple[Turn, ...]) -> str | None:
        """The role of the first turn whose content is not in the text."""
        named = tuple(turn._replace(content=_placeholder(index)) for index, turn in enumerate(turns))
        text, _ = self._apply(named)
        return next((turn.role for turn in named if turn.content not in text), None)

    def _as_marked(self, turns: tuple[Turn, ...]) -> list[Span] | None:
        """What {% generation %} marks say, wherever they are: the checks hold it against the answers."""
        marks = self._apply(turns, marks=True)[1] if self.marked else []
        return marks if len(marks) == sum(turn.role == "assistant" for turn in turns) else None


class _Endless(BaseException):
    """A template has taken its time. Like KeyboardInterrupt it is no Exception, so that nothing swallows it."""


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raise _Endless within the context once it has computed for _MOST_SECONDS; in the main thread, which alone may.

    A template comes with a model and may be a stranger's. Its sandbox keeps it from everything but time. The clock is
    the process's own, so that one that sleeps, or is stopped, loses nothing by it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _Endless

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _require_no_powers(source: str) -> None:
    """Raise InputError for a template with `**`: of 9**9**9 nothing can stop the computing, not even a signal, and it
    is computed before the template is used."""
    with contextlib.suppress(TemplateError):  # which is said when it is used
        if any(kind == "operator" and value == "**" for _, kind, value in Environment().lex(source)):
            raise InputError(
                "the chat template of the tokenizer computes powers (**), which no conversation needs, and which may "
                "take for ever: correct it, or take data.template=plain"
            )


def _placeholder(index: int) -> str:
    return f"\ue000{index}\ue001"


def _behind_contents(text: str) -> str:
    """What stands behind the last placeholder."""
    return text[max((found.end() for found in _PLACEHOLDER.finditer(text)), default=0) :]


def _walk(skeleton: _Skeleton, turns: tuple[Turn, ...], text: str) -> list[Span] | None:
    """The span of each content, when the text is the skeleton with these contents in it, trimmed or not; else None."""
    if not skeleton.order or not text.startswith(skeleton.around[0]):
        return None
    spans: list[Span] = [(0, 0)] * len(turns)
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
