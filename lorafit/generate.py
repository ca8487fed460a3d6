"""Answer prompts with a model and its adapters.

    python -m lorafit.generate adapter=RUN/adapter prompt="What is the plural of cat?"
    python -m lorafit.generate adapter=RUN/adapter prompt="…" generate.base=true     what the base says as well
    python -m lorafit.generate adapter=RUN/adapter generate.prompts=FILE             a prompt per line, or jsonl
    python -m lorafit.generate adapter=RUN/adapter generate.chat=true                a conversation in the terminal
    python -m lorafit.generate 'adapter={law: A, tax: B}' generate.prompts=FILE      rows choose: {"prompt", "adapter"}
    python -m lorafit.generate 'adapter=[A,B]' combine.method=cat 'combine.weights=[1,-0.5]' out=DIR
    python -m lorafit.generate model.name=NAME prompt="…"                            a base without an adapter

A prompt goes through the encoder that the adapter was trained with, and is never cut. Several adapters share one base;
prompts of a file are answered in batches in which each row has its own adapter.

Leaves generate.json. Exit codes: 0 done, 2 wrong input, 130 and 143 stopped by a signal (generate.json holds what was
answered).
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.build import BASE, adapter_folders, load_base, refuse_foreign
from lorafit.config import Config, settings_to_record
from lorafit.errors import InputError, did_you_mean, near_path
from lorafit.launch import start

if TYPE_CHECKING:
    from lorafit.data import Encoder, Example, Turn
    from lorafit.serving import Adapters

COMBINED = "combined"
ROWS, TEXT = (".jsonl", ".ndjson"), (".txt", "")  # suffixes of a file of prompts
ANSWER = "."  # stands where the answer will come: an example has one
COMMANDS = {
    "/new": "forget the conversation",
    "/adapter": "NAME: answer with this adapter from now on; without a name, list them",
    "/base": "answer with the base alone from now on",
    "/help": "this list",
    "/quit": "end (so does the end of the input)",
}


def main() -> None:
    start("generate", run)


@dataclass
class Request:
    """One prompt and who answers it; then the answer."""

    prompt: str
    ids: list[int]
    adapter: str | None
    answer: str = ""
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Session:
    """A model with its adapters, and how it answers."""

    config: Config
    adapters: Adapters
    encoder: Encoder
    terminal: Any
    defaults: list[str | None]
    answered: list[Request] = field(default_factory=list)

    @property
    def model(self) -> Any:
        return self.adapters.model

    def record(self) -> dict[str, Any]:
        """generate.json."""
        keys = ("prompt", "adapter", "answer", "tokens", "seconds")
        return {"answers": [{key: getattr(request, key) for key in keys} for request in self.answered]}


def run(config: Config, folder: Path) -> None:
    """Answer what is asked, print it and write generate.json."""
    import torch

    from lorafit.files import write_json
    from lorafit.merging import require_new
    from lorafit.terminal import console
    from lorafit.trainer import quiet_libraries

    refuse_foreign(config, "generate")
    quiet_libraries()
    require_something_to_do(config)
    folders = adapter_folders(config) if config.adapter is not None else {}
    if config.out is not None:
        require_new(config.out, outside_of=list(folders.values()))
    encoder = build_encoder(config)
    examples = read_prompts(config, [*folders, *([COMBINED] if config.combine.method else [])])
    session = Session(config, load_adapters(config, folders), encoder, console(), [next(iter(folders), None)])
    if config.combine.method is not None:
        combine_adapters(session, folders)
        session.defaults = [COMBINED]
    elif len(folders) > 1:
        session.defaults = list(folders)
    torch.manual_seed(config.seed)
    try:
        if config.generate.chat:
            chat(session)
        else:
            answer_all(session, requests(session, examples))
    finally:
        write_json(folder / "generate.json", session.record())


def require_something_to_do(config: Config) -> None:
    """Raise InputError where nothing is asked, and where keys do not go together; nothing is loaded yet."""
    options, combining = config.generate, config.combine.method is not None
    asked = [
        name
        for name, given in (
            ("prompt", config.prompt is not None),
            ("generate.prompts", options.prompts is not None),
            ("generate.chat", options.chat),
        )
        if given
    ]
    if len(asked) > 1:
        raise InputError(f"{' and '.join(asked)} are given, and one of them is answered: leave the others out")
    if not asked and not (combining and config.out is not None):
        raise InputError(
            'there is nothing to do: give prompt="…", generate.prompts=FILE or generate.chat=true'
            + (", or out=DIR to save the combination" if combining else "")
        )
    if config.prompt is not None and not config.prompt.strip():
        raise InputError("prompt is empty: give the text that the model is to answer")
    if not combining:
        for key, value in (("out", config.out), ("combine.weights", config.combine.weights)):
            if value is not None:
                raise InputError(f"{key} belongs to a combination: choose combine.method=linear, cat or svd")
        if config.combine.rank is not None:
            raise InputError("combine.rank belongs to a combination: choose combine.method=svd")
    elif config.adapter is None:
        raise InputError("combine.method: there is no adapter to combine: give 'adapter=[A,B]'")
    if options.system is not None and config.data.system == "drop":
        raise InputError(
            "generate.system: data.system=drop leaves every system text out. Take data.system=keep or fold"
        )


# ------------------------------------------------------------------------------------------------ what goes in


def build_encoder(config: Config) -> Encoder:
    """The encoder that training has, with the model's own tokenizer; a prompt is never cut."""
    from lorafit.data import Encoder, load_tokenizer

    tokenizer = load_tokenizer(
        config.model.name, trust_remote_code=config.model.trust_remote_code, revision=config.model.revision
    )
    data = config.data
    return Encoder(tokenizer, template=data.template, max_length=data.max_length, system=data.system)


def load_adapters(config: Config, folders: dict[str, Path]) -> Adapters:
    """The base with every adapter that the command names beside it."""
    from lorafit.serving import Adapters

    adapters = Adapters(load_base(config).eval())
    for name, folder in folders.items():
        adapters.load(name, folder, allow_other_base=config.allow_other_base)
    return adapters


def read_prompts(config: Config, names: Sequence[str]) -> list[tuple[Example, list[str | None] | None]]:
    """(what is asked, by which adapter: None for those of the command) for each prompt of the command or its file."""
    from lorafit.data import Turn

    if config.prompt is not None:
        return [(as_example([Turn("user", config.prompt)], config.generate.system), None)]
    if config.generate.prompts is None:
        return []
    path = Path(config.generate.prompts)
    if not path.is_file():
        raise InputError(f"generate.prompts: no file {str(path)!r}.{near_path(str(path))}")
    if path.suffix.lower() not in (*ROWS, *TEXT):
        raise InputError(
            f"generate.prompts: {str(path)!r} is neither .txt, a prompt per line, nor .jsonl, a row per line: "
            "write it as one of them"
        )
    if path.suffix.lower() in ROWS:
        found = [row_prompt(row, config.generate.system, names) for row in _rows(path)]
    else:
        try:
            # at "\n" alone, as jsonl is: a prompt may hold U+2028 or a form feed
            lines = path.read_bytes().decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"generate.prompts: {str(path)!r} is not UTF-8 text ({error.reason})") from None
        found = [
            (as_example([Turn("user", line.removesuffix("\r"))], config.generate.system, f"{path}:{number}"), None)
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    if not found:
        raise InputError(f"generate.prompts: {str(path)!r} holds no prompt")
    return found


def _rows(path: Path) -> Iterator[Any]:
    from lorafit.data import read_rows

    return read_rows(path) if path.stat().st_size else iter(())


def row_prompt(row: Any, system: str | None, names: Sequence[str]) -> tuple[Example, list[str | None] | None]:
    """A row of a file: {"prompt"} or {"messages"}, and perhaps {"adapter"}, null for the base."""
    from lorafit.data import Formatter
    from lorafit.data.sources import Row, fields

    values = fields(row)
    messages = values.get("messages", values.get("prompt"))
    if messages is None:
        raise InputError(f"{row.where}: the row has neither 'prompt' nor 'messages' to answer")
    if not isinstance(messages, list):
        messages = [{"role": "user", "content": messages}]
    last = messages[-1] if messages and isinstance(messages[-1], dict) else {}
    if last.get("role", last.get("from")) in ("assistant", "gpt", "model"):
        raise InputError(f"{row.where}: the messages end with the assistant's, so there is nothing to answer")
    whole = [*messages, {"role": "assistant", "content": ANSWER}]
    turns = Formatter("chat")(Row(row.where, {"messages": whole})).turns[:-1]
    adapter = None
    if "adapter" in values:
        name = values["adapter"]
        if name is not None and name not in names:
            known = f"There is {', '.join(names)}." if names else "The command names none: adapter=DIR."
            hint = did_you_mean(name, names) if isinstance(name, str) else ""
            raise InputError(f"{row.where}: no adapter {name!r}. {known}{hint}")
        adapter = [name]
    return as_example(turns, system, row.where), adapter


def as_example(turns: Sequence[Turn], system: str | None, where: str = "") -> Example:
    """A conversation up to where the answer comes. `system` goes before one that has no system text of its own."""
    from lorafit.data import Example, Turn

    first = [Turn("system", system)] if system and (not turns or turns[0].role != "system") else []
    return Example((*first, *turns, Turn("assistant", ANSWER)), where)


def requests(session: Session, examples: Sequence[tuple[Example, list[str | None] | None]]) -> list[Request]:
    """Each prompt for each adapter that is to answer it, the base first where it is asked as well."""
    found = []
    for example, names in examples:
        ids = prompt_ids(session, example)
        who = session.defaults if names is None else names
        if session.config.generate.base and None not in who:
            who = [None, *who]
        found += [Request(example.prompt, ids, name) for name in who]
    return found


def prompt_ids(session: Session, example: Example) -> list[int]:
    """The tokens of a prompt; InputError where the model has no room for them and an answer."""
    ids = session.encoder.encode_prompt(example)
    room = getattr(session.model.config.get_text_config(), "max_position_embeddings", None)
    wanted = len(ids) + session.config.generate.max_new_tokens
    if isinstance(room, int) and wanted > room:
        at = f"{example.where}: " if example.where else ""
        raise InputError(
            f"{at}the prompt has {len(ids):,} tokens and generate.max_new_tokens is "
            f"{session.config.generate.max_new_tokens:,}, and the model has room for {room:,}: shorten one of them"
        )
    return ids


# ------------------------------------------------------------------------------------------------ combining


def combine_adapters(session: Session, folders: dict[str, Path]) -> None:
    """Make one adapter out of those of the command, and save it where `out` says."""
    from rich.markup import escape

    from lorafit.adapter import save_adapter
    from lorafit.combining import combine
    from lorafit.terminal import visible

    options, adapters = session.config.combine, session.adapters
    if COMBINED in folders:
        raise InputError(f"adapter: {COMBINED!r} is what the combination is called: give the adapter another name")
    weights = options.weights or [1 / len(folders)] * len(folders)
    assert options.method is not None
    parts = [adapters.get(name) for name in folders]
    adapters.add(COMBINED, combine(parts, weights, options.method, options.rank))
    if session.config.out is None:
        return
    adapters.use(COMBINED)
    save_adapter(
        session.model,
        session.config.out,
        provenance={
            "combined": {
                "method": options.method,
                "weights": weights,
                "rank": options.rank,
                "adapters": {name: str(folder) for name, folder in folders.items()},
            },
            "settings": settings_to_record(session.config),
        },
        dtype=session.config.save.dtype,
    )
    text = f"{options.method} of {', '.join(folders)}: saved in {session.config.out}"
    session.terminal.print(escape(visible(text)), soft_wrap=True)


# ------------------------------------------------------------------------------------------------ answers


def answer_all(session: Session, asked: list[Request]) -> None:
    """Answer all requests: those of one prompt as they come, those of several in batches."""
    if len({tuple(request.ids) for request in asked}) == 1:
        for request in asked:
            session.terminal.print(label(request, asked), end="", soft_wrap=True)
            answer(session, request)
        return
    names = {request.adapter for request in asked}
    # of an adapter with trained biases no row can be mixed with others
    apart = any(name is not None and session.adapters.get(name).biases for name in names)
    for group in [[one for one in asked if one.adapter == name] for name in names] if apart else [asked]:
        answer_batches(session, group)
    for request in asked:
        session.terminal.print(said(f"{request.prompt}\n", "bold"), end="", soft_wrap=True)
        session.terminal.print(label(request, asked), said(f"{request.answer}\n"), sep="", soft_wrap=True)
    session.answered += asked


def answer_batches(session: Session, asked: list[Request]) -> None:
    """Fill in the answers of requests, each batch mixed of their adapters; seconds are those of its batch."""
    names = {request.adapter for request in asked}
    if len(names) == 1:
        session.adapters.use(asked[0].adapter)

    @contextlib.contextmanager
    def around(rows: list[int]) -> Iterator[None]:
        began = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if len(names) > 1:
                stack.enter_context(session.adapters.mixed([asked[row].adapter for row in rows]))
            yield
        for row in rows:
            asked[row].seconds = round(time.perf_counter() - began, 3)

    found = _generate(session, [request.ids for request in asked], around=around)
    for request, answer in zip(asked, found, strict=True):
        request.answer, request.tokens = _text(session, answer), len(answer)


def answer(session: Session, request: Request) -> None:
    """Answer one request, shown as it comes."""
    shown, tokens = "", list[int]()

    def show(token: int) -> None:
        nonlocal shown
        tokens.append(token)
        text = _text(session, tokens)
        # the bytes of one character may come as several tokens: until the last has come it is no character
        if not text.endswith("\ufffd") and text.startswith(shown):
            session.terminal.print(said(text[len(shown) :]), end="", soft_wrap=True)
            shown = text

    session.adapters.use(request.adapter)
    session.answered.append(request)
    began = time.perf_counter()
    try:
        _generate(session, [request.ids], on_token=show)
    finally:
        request.answer, request.tokens = _text(session, tokens), len(tokens)
        request.seconds = round(time.perf_counter() - began, 3)
        session.terminal.print(said(request.answer[len(shown) :]), soft_wrap=True)


def _generate(session: Session, prompts: list[list[int]], **how: Any) -> list[list[int]]:
    from lorafit.evaluation import generate

    options = session.config.generate
    pad_id: Any = session.encoder.tokenizer.pad_token_id
    return generate(
        session.model,
        prompts,
        max_new_tokens=options.max_new_tokens,
        end_ids=session.encoder.end_ids,
        pad_id=pad_id,
        batch_size=options.batch_size,
        temperature=options.temperature,
        top_p=options.top_p,
        **how,
    )


def _text(session: Session, tokens: list[int]) -> str:
    tokenizer: Any = session.encoder.tokenizer
    return tokenizer.decode(tokens, skip_special_tokens=True)


def said(text: str, style: str = "") -> Any:
    """A text of somebody for the terminal, with nothing in it that moves the cursor or is taken for markup."""
    from rich.text import Text

    from lorafit.terminal import visible

    return Text(visible(text), style=style)


def label(request: Request, asked: Sequence[Request]) -> Any:
    """Who answers, where there are several."""
    if len({other.adapter for other in asked}) == 1:
        return said("")
    return said(f"{BASE if request.adapter is None else request.adapter}: ", "dim")


# ------------------------------------------------------------------------------------------------ chat


def chat(session: Session) -> None:
    """Answer what is typed until the input ends; the conversation is kept."""
    from lorafit.data import Turn
    from lorafit.terminal import visible

    name = session.defaults[0]
    turns: list[Turn] = []
    if isinstance(sys.stdin, io.TextIOWrapper):
        # what cannot be decoded comes as surrogates: an error would lose what was read ahead with it
        sys.stdin.reconfigure(errors="surrogateescape")
    session.terminal.print("/help lists what else can be typed.", style="dim")
    while True:
        try:
            line = input(f"{visible(name or BASE)}> ").strip()
            line.encode()
        except EOFError:
            session.terminal.print()
            return
        except UnicodeError:
            text = "the line has bytes that are not UTF-8, so it is left out: type it again"
            session.terminal.print(said(text, "red"), soft_wrap=True)
            continue
        if line.startswith("/"):
            command, _, rest = line.partition(" ")
            if command == "/quit":
                return
            name, turns = _command(session, command, rest.strip(), name, turns)
        elif line:
            example = as_example([*turns, Turn("user", line)], session.config.generate.system)
            try:
                request = Request(line, prompt_ids(session, example), name)
            except InputError as error:
                session.terminal.print(said(f"{error}. /new begins anew", "red"), soft_wrap=True)
                continue
            answer(session, request)
            # an empty answer is no turn that a conversation could hold
            turns += [Turn("user", line), Turn("assistant", request.answer)] if request.answer.strip() else []


def _command(
    session: Session, command: str, rest: str, name: str | None, turns: list[Turn]
) -> tuple[str | None, list[Turn]]:
    """(adapter, conversation) after a command."""
    names = session.adapters.names
    if command == "/new":
        return name, []
    if command == "/base":
        return None, turns
    if command == "/help":
        text = "\n".join(f"{key:9} {what}" for key, what in COMMANDS.items())
    elif command != "/adapter":
        text = f"there is no command {command!r}.{did_you_mean(command, COMMANDS) or ' /help lists them.'}"
    elif rest in names:
        return rest, turns
    elif rest:
        text = f"no adapter {rest!r}. There is {', '.join(names) or 'none'}.{did_you_mean(rest, names)}"
    else:
        text = "\n".join(f"{'*' if other == name else ' '} {other}" for other in names) or "no adapter is loaded"
    session.terminal.print(said(text), soft_wrap=True)
    return name, turns


if __name__ == "__main__":
    main()
