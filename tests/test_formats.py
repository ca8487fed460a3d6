"""Layouts: the same conversation in any of them is the same example, and a row that does not fit says why.

pytest tests/test_formats.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafit.data import Example, Formatter, Turn, read_rows
from lorafit.data.formats import COLUMNS, FORMATS, REQUIRED
from lorafit.data.sources import Row
from lorafit.errors import InputError

ASK, ANSWER = "What is 1+1?", "It is 2."
QUESTION = (Turn("user", ASK), Turn("assistant", ANSWER))
WITH_SYSTEM = (Turn("system", "Be brief."), *QUESTION)
LONG = (*WITH_SYSTEM, Turn("user", "And 2+2?"), Turn("assistant", "4"))


def messages(turns: tuple[Turn, ...], **roles: str) -> list[dict[str, Any]]:
    return [{"role": roles.get(turn.role, turn.role), "content": turn.content} for turn in turns]


def shares(turns: tuple[Turn, ...], assistant: str = "gpt") -> list[dict[str, Any]]:
    names = {"user": "human", "assistant": assistant}
    return [{"from": names.get(turn.role, turn.role), "value": turn.content} for turn in turns]


def parts(turns: tuple[Turn, ...]) -> list[dict[str, Any]]:
    """Contents in two parts each, as OpenAI's format may have them."""
    return [
        {
            "role": turn.role,
            "content": [{"type": "text", "text": turn.content[:3]}, {"type": "text", "text": turn.content[3:]}],
        }
        for turn in turns
    ]


def read(row: Any, **options: Any) -> Example:
    return Formatter(**options)(Row("a.jsonl:7", row if isinstance(row, bytes) else json.dumps(row).encode()))


def refused(row: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(row, **options)
    return str(caught.value)


# (layout, what it gives, its name, other names of its fields)
LAYOUTS: list[tuple[dict[str, Any], tuple[Turn, ...], str, dict[str, str]]] = [
    ({"instruction": ASK, "output": ANSWER}, QUESTION, "alpaca", {}),
    ({"instruction": ASK, "input": "", "output": ANSWER}, QUESTION, "alpaca", {}),
    ({"instruction": ASK, "input": None, "output": ANSWER, "system": ""}, QUESTION, "alpaca", {}),
    ({"instruction": ASK, "output": ANSWER, "system": "Be brief."}, WITH_SYSTEM, "alpaca", {}),
    ({"instruction": "", "input": ASK, "output": ANSWER}, QUESTION, "alpaca", {}),
    ({"conversations": shares(QUESTION)}, QUESTION, "sharegpt", {}),
    ({"conversations": shares(QUESTION), "system": "Be brief."}, WITH_SYSTEM, "sharegpt", {}),
    ({"conversations": shares(LONG)}, LONG, "sharegpt", {}),
    ({"conversations": shares(LONG, "model")}, LONG, "sharegpt", {}),
    ({"conversations": messages(LONG)}, LONG, "sharegpt", {}),
    ({"id": 3, "conversations": shares(LONG, "chatgpt"), "text": "x"}, LONG, "sharegpt", {}),
    ({"messages": messages(QUESTION)}, QUESTION, "chat", {}),
    ({"messages": messages(LONG)}, LONG, "chat", {}),
    ({"messages": messages(LONG, system="developer")}, LONG, "chat", {}),
    ({"messages": parts(LONG)}, LONG, "chat", {}),
    ({"messages": shares(LONG)}, LONG, "chat", {}),
    ({"messages": [turn | {"weight": 1, "name": "x"} for turn in messages(LONG)]}, LONG, "chat", {}),
    ({"prompt": ASK, "completion": ANSWER}, QUESTION, "prompt_completion", {}),
    ({"prompt": ASK, "completion": ANSWER, "system": "Be brief."}, WITH_SYSTEM, "prompt_completion", {}),
    ({"question": ASK, "answer": ANSWER}, QUESTION, "question_answer", {}),
    ({"q": ASK, "a": ANSWER}, QUESTION, "prompt_completion", {"prompt": "q", "completion": "a"}),
    ({"q": ASK, "a": ANSWER, "s": "Be brief."}, WITH_SYSTEM, "prompt_completion",
     {"prompt": "q", "completion": "a", "system": "s"}),
    ({"q": ASK, "a": ANSWER}, QUESTION, "question_answer", {"question": "q", "answer": "a"}),
    ({"t": ASK, "c": "", "r": ANSWER}, QUESTION, "alpaca", {"instruction": "t", "input": "c", "output": "r"}),
    ({"dialog": messages(LONG)}, LONG, "chat", {"messages": "dialog"}),
    ({"dialog": shares(LONG)}, LONG, "sharegpt", {"conversations": "dialog"}),
    ({"text": ANSWER}, (Turn("assistant", ANSWER),), "text", {}),
    ({"body": ANSWER, "text": "no"}, (Turn("assistant", ANSWER),), "text", {"text": "body"}),
    ({"prompt": "", "completion": ANSWER}, (Turn("assistant", ANSWER),), "prompt_completion", {}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "turns", "name", "columns"), LAYOUTS)
def test_a_layout_is_told_by_looking_and_by_its_name_and_gives_the_conversation(
    row: dict[str, Any], turns: tuple[Turn, ...], name: str, columns: dict[str, str]
) -> None:
    looking = Formatter(columns=columns)
    found = looking(Row("a.jsonl:7", json.dumps(row).encode()))
    assert (found.turns, found.where, looking.format) == (turns, "a.jsonl:7", name)
    assert read(row, format=name, columns=columns) == found
    # rows of the `datasets` library are mappings
    assert Formatter(columns=columns)(Row("a.jsonl:7", row)) == found


def test_every_layout_is_among_those_tried() -> None:
    assert {name for _, _, name, _ in LAYOUTS} == set(FORMATS) - {"auto"}
    assert len({Example(turns).key() for _, turns, _, _ in LAYOUTS}) == 4


def test_a_prompt_of_messages_is_not_learned_and_its_completion_is() -> None:
    row = {"prompt": messages(LONG[:-1]), "completion": messages(LONG[-1:])}
    turns = read(row).turns
    assert [turn._replace(trained=True) for turn in turns] == list(LONG)
    assert [turn.content for turn in turns if turn.role == "assistant" and turn.trained] == ["4"]
    assert read(row | {"completion": "4"}).turns == turns
    assert read({"prompt": row["prompt"][1:], "completion": "4", "system": "Be brief."}).turns[:1] == LONG[:1]


@pytest.mark.parametrize("no", [{"weight": 0}, {"weight": 0.0}, {"weight": False}, {"train": False}])
def test_an_answer_of_weight_0_is_context_and_not_learned(no: dict[str, Any]) -> None:
    first, second = read({"messages": [*messages(LONG[1:2]), messages(LONG)[2] | no, *messages(LONG[3:])]}).turns[1::2]
    assert (first.trained, second.trained) == (False, True)


def test_the_input_of_alpaca_follows_its_instruction() -> None:
    assert read({"instruction": "Add.", "input": "1 2", "output": "3"}).prompt == "Add.\n\n1 2"


@pytest.mark.parametrize(
    ("written", "text"),
    [("2", "2"), ("1.10", "1.10"), ("1e5", "1e5"), ("0.30000000000000001", "0.30000000000000001"), ("-7", "-7"),
     ("123456789012345678901234567890", "123456789012345678901234567890"), ('"007"', "007"), ('" a "', " a "),
     ('"\\ud83d\\ude42"', "🙂"), ('"a\\u0000b"', "a\0b"), ('"</s>"', "</s>")],
)  # fmt: skip
def test_an_answer_is_the_text_that_stands_in_the_file(written: str, text: str) -> None:
    assert read(f'{{"prompt": "p", "completion": {written}}}'.encode()).completion == text


def test_columns_that_are_not_read_are_listed() -> None:
    formatter = Formatter(columns={"prompt": "q", "completion": "a"})
    formatter(Row("a:1", {"q": "p", "a": "c", "system": "", "prompt": "no", "score": 3}))
    assert formatter.unused == ["prompt", "score"]


def test_the_first_row_that_has_a_layout_decides_for_the_file() -> None:
    formatter = Formatter()
    for row, said in ((b"{", "a:1: the line is not JSON"), (b'{"x": 1}', "a:1: no format fits the fields 'x'")):
        with pytest.raises(InputError, match=said):
            formatter(Row("a:1", row))
    formatter(Row("a:2", {"question": "p", "answer": "c"}))
    with pytest.raises(InputError, match="a:3: the row has no field 'question'.*one layout; here they are read as qu"):
        formatter(Row("a:3", {"text": "c"}))


# --- what does not fit ----------------------------------------------------------------------------

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}


def chat(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


WRONG: list[tuple[Any, str]] = [
    ({"prompt": "p", "completion": None}, "field 'completion' must be text, it is null"),
    ({"prompt": "p", "completion": True}, "field 'completion' must be text, it is bool"),
    ({"prompt": "p", "completion": ["c"]}, "field 'completion' must be text, it is list"),
    ({"prompt": {"a": "p"}, "completion": "c"}, "field 'prompt' must be text, it is dict"),
    ({"prompt": ["p"], "completion": "c"}, "prompt[0]: a turn must be an object with role and content, it is str"),
    ({"prompt": [], "completion": "c"}, "turn 1 is the assistant's at the beginning"),
    ({"prompt": [BOT], "completion": "c"}, "turn 1 is the assistant's at the beginning"),
    ({"prompt": "p", "completion": " \n"}, "the completion (field 'completion') is empty"),
    ({"question": " ", "answer": "a"}, "field 'question' is empty, so the answer has no question"),
    ({"instruction": "", "input": "", "output": "a"}, "field 'instruction' is empty"),
    ({"prompt": "", "completion": "c", "system": "s"}, "the prompt is empty, but there is a system text"),
    ({"text": ""}, "the completion (field 'text') is empty"),
    ({"input": "p", "target": "c"}, "no format fits the fields 'input', 'target'. If one answers the other, 'data.col"),
    ({}, "no format fits the fields none"),
    ({"messages": None}, "messages must be a list of turns, it is null"),
    ({"messages": {}}, "messages must be a list of turns, it is dict"),
    ({"conversations": "Hi"}, "conversations must be a list of turns, it is str"),
    (chat(), "the conversation has no turn that could be trained"),
    (chat(SYSTEM), "the conversation has no turn that could be trained"),
    (chat([USER], BOT), "messages[0]: a turn must be an object with role and content, it is list"),
    (chat(USER), "the conversation ends with the user's turn, which nothing answers"),
    (chat(USER, BOT, USER), "the conversation ends with the user's turn"),
    (chat(USER, USER, BOT), "turn 2 is the user's after one of the user"),
    (chat(USER, BOT, BOT), "turn 3 is the assistant's after one of the assistant"),
    (chat(SYSTEM, BOT), "turn 2 is the assistant's at the beginning"),
    (chat(USER, SYSTEM, BOT), "turn 2 is the system's after one of the user"),
    (chat(SYSTEM, SYSTEM, USER, BOT), "turn 2 is the system's at the beginning"),
    (chat(USER, {"role": "tool", "content": "4"}, BOT),
     "the role 'tool' is none of system, user, assistant (or human, gpt, model). Tool calls are not read."),
    (chat({"role": "User", "content": "Hi"}, BOT), "Did you mean 'user'?"),
    (chat({"role": ["user"], "content": "Hi"}, BOT), "messages[0]: the role ['user'] is none of"),
    (chat({"role": None, "content": "Hi"}, BOT), "messages[0]: the role None is none of"),
    (chat({"content": "Hi"}, BOT), "a turn needs role and content, or from and value; this one has 'content'"),
    (chat({}, BOT), "this one has none"),
    (chat({"role": "user", "value": "Hi"}, BOT), "a turn needs role and content; this one has 'role', 'value'"),
    (chat({"from": "human", "content": "Hi"}, BOT), "a turn needs from and value; this one has 'from', 'content'"),
    (chat(USER, BOT | {"content": None}), "messages[1]: content must be text, it is null"),
    (chat(USER, BOT | {"content": {"text": "a"}}), "messages[1]: content must be text, it is dict"),
    (chat(USER, BOT | {"content": ""}), "messages[1]: the turn of the assistant is empty"),
    (chat(USER, BOT | {"content": []}), "messages[1]: of content in parts only {type: text, text: …} is read"),
    (chat(USER | {"content": [{"type": "image_url", "image_url": "x"}]}, BOT), "messages[0]: of content in parts only"),
    (chat(USER | {"content": ["Hi"]}, BOT), "messages[0]: of content in parts only"),
    (chat(USER | {"content": [{"type": "text", "text": None}]}, BOT), "messages[0]: of content in parts only"),
    (chat(USER, BOT | {"content": None, "tool_calls": [{}]}),
     "messages[1]: 'tool_calls' is not read, and the turn would be trained without it"),
    *((chat(USER, BOT | {key: "x"}), f"messages[1]: {key!r} is not read")
      for key in ("function_call", "reasoning_content", "reasoning", "thinking", "images", "audio")),
    *((chat(USER, BOT | {"weight": weight}), "messages[1]: weight must be 0 or 1")
      for weight in (2, -1, 0.5, "0", [0], {})),
    (chat(USER, BOT | {"weight": 0}), "every answer has weight 0, so nothing of this row would be trained"),
    (b'{"prompt": "p", "completion": "\\ud800"}', "the text of the assistant is not valid Unicode"),
    (b'{"prompt": "\\udc00\\ud800", "completion": "c"}', "the text of the user is not valid Unicode"),
    (b'{"prompt": "p", "completion": 1e999}', "field 'completion' must be text, it is"),
    (b'{"prompt": "p", "completion": NaN}', "the line is not JSON (NaN is no number of JSON)"),
    (b'{"prompt": "p", "completion": "c", "prompt": "q"}',
     "the line is not JSON (the name 'prompt' stands twice in an object)"),
    (b'{"messages": [{"role": "user", "role": "assistant", "content": "c"}]}', "the name 'role' stands twice"),
    (b"[1]", "a row must be a JSON object, this is list"),
    (b'{"prompt": "p\xff"}', "the line is not UTF-8 (byte 0xff at position 13)"),
    (b'{"prompt": "p', "the line is not JSON (Unterminated string"),
    (b"[" * 100_000, "the line is not JSON that can be read (it is nested too deeply)"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "said"), WRONG)
def test_a_row_that_does_not_fit_is_told_its_place_and_its_fault(row: Any, said: str) -> None:
    message = refused(row)
    assert message.startswith("a.jsonl:7: ") and said in message


@pytest.mark.parametrize(
    "value",
    [b"bytes", (1, 2), {1, 2}, object(), Path("a"), 1j, float("nan"), float("-inf"), memoryview(b"")],
    ids=lambda value: type(value).__name__,
)
def test_a_value_that_is_no_text_is_never_spelled_out_as_one(value: Any) -> None:
    turn = {"role": "user", "content": value}
    said = chat(turn, BOT), chat(USER, BOT | {"weight": value})
    for row in ({"prompt": "p", "completion": value}, {"text": value}, *said):
        with pytest.raises(InputError, match="a.parquet: row 3: .*must be"):
            Formatter()(Row("a.parquet: row 3", row))


def test_a_message_stays_short_whatever_the_row_holds() -> None:
    deep: Any = "x"
    for _ in range(400):
        deep = [deep]
    many = {f"field {index}": 0 for index in range(10_000)}
    for row in (
        *(chat({"role": role, "content": "Hi"}, BOT) for role in ("x" * 1_000_000, deep, many)),
        *(chat(USER, BOT | {"weight": weight}) for weight in ("x" * 1_000_000, deep, many)),
        *(chat(many), many, {"x" * 1_000_000: 0}),
    ):
        assert 0 < len(refused(row)) < 2000
    assert len(refused(many, columns={"text": "body"})) < 2000


def test_a_field_that_columns_names_must_be_there() -> None:
    row = {"question": "p", "answer": "c"}
    message = refused(row, columns={"prompt": "question", "completion": "anser"})
    assert message.startswith("a.jsonl:7: the row has no field 'anser'; it has 'question', 'answer'.")
    assert "Did you mean 'answer'?" in message
    assert "no field 'rules'" in refused(row, columns={"prompt": "question", "completion": "answer", "system": "rules"})


def test_a_row_longer_than_is_allowed_is_refused_before_it_is_tokenized() -> None:
    assert len(read({"text": "a" * 10}, max_characters=10).completion) == 10
    message = refused({"text": "a" * 11}, max_characters=10)
    assert "the row has 11 characters, more than the 10 that data.max_length allows for" in message
    assert "the row has 11 characters" in refused(chat(USER | {"content": "a" * 6}, BOT), max_characters=10)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "alpacca"}, "data.format must be one of .* got 'alpacca'. Did you mean 'alpaca'"),
        ({"columns": {"promt": "q"}}, "data.columns has no entry 'promt'. Did you mean 'prompt'"),
        ({"columns": {"prompt": "q"}}, "names no whole layout"),
        ({"columns": {"prompt": "q", "completion": 3}}, "data.columns.completion must be the name of a column, got 3"),
        ({"columns": {"prompt": ["q"], "completion": "a"}}, "data.columns.prompt must be the name of a column"),
        ({"columns": {"prompt": "q", "completion": "a", "text": "t"}}, "prompt_completion has the fields"),
        ({"format": "chat", "columns": {"text": "t"}}, "the format chat has the fields messages, not 'text'"),
    ],
)
def test_a_choice_that_does_not_exist_is_told_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Formatter(**options)


def test_columns_may_name_every_field_of_every_layout() -> None:
    assert {name for names in REQUIRED.values() for name in names} <= set(COLUMNS)


# --- what an example says of itself ---------------------------------------------------------------


def test_an_example_shows_its_question_and_its_answer() -> None:
    assert (Example(QUESTION).prompt, Example(QUESTION).completion) == (ASK, ANSWER)
    assert Example(LONG).prompt == f"system: Be brief.\nuser: {ASK}\nassistant: {ANSWER}\nuser: And 2+2?"
    assert Example.of(ASK, ANSWER).turns == QUESTION
    assert (Example.of("", ANSWER).prompt, Example.of("", ANSWER).turns) == ("", (Turn("assistant", ANSWER),))


def test_the_key_sees_the_conversation_and_not_its_place_or_its_edges() -> None:
    keys = {Example(turns, where).key() for turns in (QUESTION, WITH_SYSTEM, LONG) for where in ("a:1", "b:2")}
    assert len(keys) == 3 and all(0 <= key < 2**64 for key in keys)
    assert Example.of(ASK, f" {ANSWER}\n").key() == Example(QUESTION).key()
    assert Example.of("a", "b").key() != Example.of("ab", "").key() != Example.of("", "ab").key()


def test_positions_are_even_and_those_of_one_prompt_are_the_same() -> None:
    positions = [Example.of(f"question {index}", "a").position() for index in range(2000)]
    for tenth in range(10):  # 200 expected, standard deviation 13.4
        assert 130 < sum(tenth / 10 <= position < (tenth + 1) / 10 for position in positions) < 270
    assert Example.of(ASK, "a").position() == Example.of(ASK, "b", "elsewhere").position()
    assert Example.of("", "a").position() != Example.of("", "b").position()


@pytest.mark.parametrize("name", ["gsm8k/test.jsonl", "mts-dialog/validation.csv", "banking77/test.csv"])
def test_real_data_sets_are_read_to_the_last_row(name: str) -> None:
    file = Path(__file__).parents[2] / "shared" / "data" / name
    if not file.is_file():
        pytest.skip("the real data is not here")
    columns = {
        "mts-dialog": {"prompt": "dialogue", "completion": "section_text"},
        "banking77": {"prompt": "text", "completion": "category"},
    }.get(file.parent.name)
    formatter = Formatter(columns=columns)
    examples = [formatter(row) for row in read_rows(file)]
    assert len(examples) == {"gsm8k": 1319, "mts-dialog": 100, "banking77": 3080}[file.parent.name]
    assert all(len(example.turns) == 2 for example in examples)
