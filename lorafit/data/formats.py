"""Rows as conversations: whatever layout people keep their data in, one form comes out.

    alpaca              instruction, input, output (and system)
    sharegpt            conversations: [{from: human, value: …}, {from: gpt, value: …}] (and system)
    chat                messages: [{role: system, content: …}, {role: user, …}, {role: assistant, …}, …]
    prompt_completion   prompt, completion: texts, or lists of messages (and system)
    question_answer     question, answer
    text                text: all of it is learned

The same conversation in any of them is the same `Example`, and so gives the same tokens. The layout is told from the
first row, or named; `columns` gives its fields other names. A row that does not fit is an error that names its place
and its fault: dropping it in silence would train something else.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lorafit.data.sources import Row, fields, listed, near_columns, shown
from lorafit.errors import InputError, did_you_mean

# what a layout needs, and what it may have
REQUIRED = {
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "chat": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
    "text": ("text",),
}
OPTIONAL = {"alpaca": ("input", "system"), "sharegpt": ("system",), "prompt_completion": ("system",)}
FORMATS = ("auto", *REQUIRED)
COLUMNS = tuple(dict.fromkeys(name for names in (*REQUIRED.values(), *OPTIONAL.values()) for name in names))
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), "assistant"),
}
# what a message may say beside its content, and would be lost
_UNREAD = (
    *("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"),
    *("image", "images", "video", "videos", "audio", "audios"),
)


class Turn(NamedTuple):
    """What one side says. role: system, user or assistant; trained: whether an answer is to be learned."""

    role: str
    content: str
    trained: bool = True


@dataclass(frozen=True)
class Example:
    """A conversation, and where its row stands. It ends with an answer; one that is a single answer is plain text."""

    turns: tuple[Turn, ...]
    where: str = ""

    @classmethod
    def of(cls, prompt: str, completion: str, where: str = "") -> Example:
        """One question and its answer; without a prompt, plain text."""
        return cls((*([Turn("user", prompt)] if prompt else []), Turn("assistant", completion)), where)

    @property
    def prompt(self) -> str:
        """What stands before the last answer, for a person: the question, or the conversation with its roles."""
        before = self.turns[:-1]
        if len(before) == 1:
            return before[0].content
        return "\n".join(f"{turn.role}: {turn.content}" for turn in before)

    @property
    def completion(self) -> str:
        """The last answer."""
        return self.turns[-1].content

    def key(self) -> int:
        """A hash of the conversation: equal for duplicates, whatever layout they came in."""
        text = "\x1e".join(f"{turn.role}\x1f{turn.content.strip()}" for turn in self.turns)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")

    def position(self) -> float:
        """Where in [0, 1) the first question falls by its hash, system text included: those below a fraction are held
        out.

        So the choice does not depend on the order of the file, survives appended rows, and never parts two rows of one
        prompt, nor the beginnings of one conversation.
        """
        start = list(itertools.takewhile(lambda turn: turn.role != "assistant", self.turns)) or self.turns
        digest = hashlib.sha256("\x1e".join(turn.content.strip() for turn in start).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


class Formatter:
    """Turns the rows of one source into examples.

    format: one of FORMATS; "auto" is decided by the first row. columns: other names for the layout's fields, as in
    ``{prompt: question, completion: answer}`` or ``{messages: dialog}``; they also say which layout it is.
    max_characters: a row with more text than that is refused. After the first row `format` is the layout's name and
    `unused` lists the columns that are not read. Raises InputError for a name that does not exist.
    """

    def __init__(
        self, format: str = "auto", columns: Mapping[str, str] | None = None, *, max_characters: int | None = None
    ) -> None:
        if format not in FORMATS:
            known = ", ".join(FORMATS)
            raise InputError(f"data.format must be one of {known}, got {format!r}.{did_you_mean(format, FORMATS)}")
        self.format, self.columns, self.max_characters = format, dict(columns or {}), max_characters
        self.unused: list[str] = []
        self._told = False
        if self.columns:
            self._name_by_columns()

    def _name_by_columns(self) -> None:
        for name, own in self.columns.items():
            if name not in COLUMNS:
                raise InputError(f"data.columns has no entry {name!r}.{did_you_mean(name, COLUMNS)} {_columns_help()}")
            if not isinstance(own, str):
                raise InputError(f"data.columns.{name} must be the name of a column, got {own!r}")
        if self.format == "auto":
            for format, required in REQUIRED.items():
                if set(required) <= self.columns.keys():
                    self.format = format
                    break
            else:
                raise InputError(f"data.columns={self.columns} names no whole layout. {_columns_help()}")
        known = (*REQUIRED[self.format], *OPTIONAL.get(self.format, ()))
        if strange := sorted(set(self.columns) - set(known)):
            raise InputError(
                f"data.columns: the format {self.format} has the fields {', '.join(known)}, not {strange[0]!r}"
            )

    def __call__(self, row: Row) -> Example:
        """The example of a row; raises InputError that names its place."""
        values, where = fields(row), row.where
        if self.format == "auto":
            self.format = _recognise(values, where)
        if not self._told:
            self._told = True
            read = {self.columns.get(name, name) for name in (*REQUIRED[self.format], *OPTIONAL.get(self.format, ()))}
            self.unused = [str(name) for name in values if name not in read and str(name).strip()]
        turns = self._turns(values, where)
        length = sum(len(turn.content) for turn in turns)
        if self.max_characters is not None and length > self.max_characters:
            raise InputError(
                f"{where}: the row has {length:,} characters, more than the {self.max_characters:,} that "
                "data.max_length allows for. Cut it into several rows, or raise data.max_length"
            )
        for turn in turns:
            try:
                turn.content.encode()
            except UnicodeEncodeError as error:  # JSON can spell half of a character
                raise InputError(
                    f"{where}: the text of the {turn.role} is not valid Unicode ({error.reason})"
                ) from None
        return Example(turns, where)

    def _turns(self, values: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
        def field(name: str) -> Any:
            own = self.columns.get(name, name)
            if own not in values:
                raise InputError(
                    f"{where}: the row has no field {own!r}; it has {listed(values)}."
                    f"{near_columns(own, map(str, values))} {self._expected()}"
                )
            return values[own]

        def text(name: str) -> str:
            return _text(field(name), f"{where}: field {self.columns.get(name, name)!r}")

        def optional(name: str) -> str:
            own = self.columns.get(name, name)
            if name in self.columns and own not in values:
                field(name)  # asked for by name, so it has to be there
            return "" if values.get(own) is None else _text(values[own], f"{where}: field {own!r}")

        if self.format == "text":
            return _answered([], text("text"), where, "text")
        if self.format in ("chat", "sharegpt"):
            name = REQUIRED[self.format][0]
            turns = _messages(field(name), f"{where}: {self.columns.get(name, name)}")
            if self.format == "sharegpt" and (system := optional("system")).strip():
                turns.insert(0, Turn("system", system))
            return _conversation(turns, where)
        if self.format == "prompt_completion" and isinstance(field("prompt"), list):
            before = _messages(field("prompt"), f"{where}: {self.columns.get('prompt', 'prompt')}")
            answer = field("completion")
            after = (
                _messages(answer, f"{where}: {self.columns.get('completion', 'completion')}")
                if isinstance(answer, list)
                else [Turn("assistant", text("completion"))]
            )
            # of a prompt nothing is learned, whoever says it
            turns = [turn._replace(trained=False) for turn in before] + after
            if (system := optional("system")).strip():
                turns.insert(0, Turn("system", system))
            return _conversation(turns, where)
        asked, answered = REQUIRED[self.format]
        prompt, completion = text(asked), text(answered)
        if self.format == "alpaca" and (context := optional("input")).strip():
            prompt = f"{prompt}\n\n{context}" if prompt.strip() else context
        if not prompt.strip() and self.format != "prompt_completion":  # there an empty prompt says: plain text
            raise InputError(
                f"{where}: field {self.columns.get(asked, asked)!r} is empty, so the answer has no question"
            )
        turns = [Turn("user", prompt)] if prompt.strip() else []
        system = optional("system") if self.format in ("alpaca", "prompt_completion") else ""
        if system.strip():
            if not turns:
                raise InputError(f"{where}: the prompt is empty, but there is a system text")
            turns.insert(0, Turn("system", system))
        return _answered(turns, completion, where, self.columns.get(answered, answered))

    def _expected(self) -> str:
        if self.columns:
            names = ", ".join(f"{name}: NAME" for name in REQUIRED[self.format])
            return f"Choose fields with 'data.columns={{{names}}}'"
        return (
            f"The rows of a source have one layout; here they are read as {self.format}. Name files of several layouts "
            f"one by one, 'data.path=[A, B]'. {_columns_help()}"
        )


def _columns_help() -> str:
    return "Say which fields hold what: 'data.columns={prompt: NAME, completion: NAME}', {messages: NAME}, {text: NAME}"


def _recognise(values: Mapping[str, Any], where: str) -> str:
    conversations = values.get("conversations")
    if isinstance(conversations, list) and conversations and isinstance(conversations[0], Mapping):
        # both names are in use for both kinds of message
        return "sharegpt"
    for format in ("chat", "alpaca", "prompt_completion", "question_answer", "text"):
        if all(name in values for name in REQUIRED[format]):
            return format
    if "conversations" in values:
        return "sharegpt"
    if len(texts := [name for name, value in values.items() if isinstance(value, str)]) == 2:
        hint = f"If one answers the other, 'data.columns={{prompt: {texts[0]}, completion: {texts[1]}}}'"
    else:
        hint = _columns_help()
    raise InputError(f"{where}: no format fits the fields {listed(values)}. {hint}")


def _text(value: Any, what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        kind = "null" if value is None else type(value).__name__
        raise InputError(f"{what} must be text, it is {kind}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{what} must be text, it is {value}")
    return str(value)


def _answered(turns: list[Turn], completion: str, where: str, field: str) -> tuple[Turn, ...]:
    if not completion.strip():
        raise InputError(f"{where}: the completion (field {field!r}) is empty, so nothing of this row would be trained")
    return (*turns, Turn("assistant", completion))


def _messages(value: Any, what: str) -> list[Turn]:
    if not isinstance(value, list):
        kind = "null" if value is None else type(value).__name__
        raise InputError(f"{what} must be a list of turns, it is {kind}")
    return [_message(item, f"{what}[{index}]") for index, item in enumerate(value)]


def _message(item: Any, what: str) -> Turn:
    if not isinstance(item, Mapping):
        raise InputError(f"{what}: a turn must be an object with role and content, it is {type(item).__name__}")
    pair = next((pair for pair in (("role", "content"), ("from", "value")) if pair[0] in item), None)
    if pair is None or pair[1] not in item:
        wanted = "role and content, or from and value" if pair is None else f"{pair[0]} and {pair[1]}"
        raise InputError(f"{what}: a turn needs {wanted}; this one has {listed(item)}")
    role = item[pair[0]]
    if not isinstance(role, str) or role not in _ROLES:
        hint = did_you_mean(role, _ROLES) if isinstance(role, str) else ""
        if role in ("tool", "function", "observation", "function_call", "ipython"):
            hint = " Tool calls are not read."
        raise InputError(
            f"{what}: the role {shown(role)} is none of system, user, assistant (or human, gpt, model).{hint}"
        )
    for name in _UNREAD:
        if item.get(name):
            raise InputError(f"{what}: {name!r} is not read, and the turn would be trained without it")
    content = item[pair[1]]
    if isinstance(content, list):  # the parts of OpenAI's format
        parts = [part if isinstance(part, Mapping) else {} for part in content]
        if not content or any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in parts):
            raise InputError(f"{what}: of content in parts only {{type: text, text: …}} is read")
        content = "".join(part["text"] for part in parts)
    content = _text(content, f"{what}: {pair[1]}")
    if not content.strip():
        raise InputError(f"{what}: the turn of the {_ROLES[role]} is empty")
    weight = next((item[name] for name in ("weight", "train") if item.get(name) is not None), 1)
    if weight not in (0, 1):  # True and False too
        raise InputError(f"{what}: weight must be 0 or 1, got {shown(weight)}")
    return Turn(_ROLES[role], content, bool(weight))


def _conversation(turns: list[Turn], where: str) -> tuple[Turn, ...]:
    """The turns, when they are a conversation: perhaps a system text, then user and assistant in turn to an answer."""
    talk = turns[1:] if turns and turns[0].role == "system" else turns
    if not talk:
        raise InputError(f"{where}: the conversation has no turn that could be trained")
    for index, turn in enumerate(talk):
        expected = ("user", "assistant")[index % 2]
        if turn.role != expected:
            place = len(turns) - len(talk) + index
            before = f"after one of the {talk[index - 1].role}" if index else "at the beginning"
            raise InputError(
                f"{where}: turn {place + 1} is the {turn.role}'s {before}, where the {expected}'s was to come: "
                "user and assistant speak in turn"
            )
    if talk[-1].role != "assistant":
        raise InputError(f"{where}: the conversation ends with the user's turn, which nothing answers")
    if not any(turn.trained for turn in talk if turn.role == "assistant"):
        raise InputError(f"{where}: every answer has weight 0, so nothing of this row would be trained")
    return tuple(turns)
