"""Answers by the real command: a prompt, a file, a conversation, several adapters, a combination.

pytest tests/test_generate.py
"""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import CHATML_SOURCE
from programs import run_program
from torch import nn

from lorafit import generate
from lorafit.adapter import load_adapter, read_config, read_record, save_adapter
from lorafit.combining import combine
from lorafit.config import compose
from lorafit.data import Encoder, Example, load_tokenizer
from lorafit.embedded import MODEL
from lorafit.evaluation import generate as continued
from lorafit.inject import attach_adapter, detach_adapter, inject_lora, lora_layers
from lorafit.loading import load_base_model

PROMPT = "What is the plural of cat?"
TOKENS = 6
SHORT = f"generate.max_new_tokens={TOKENS}"


def write_adapter(folder: Path, seed: int, base: str = "embedded", **options: Any) -> None:
    model = load_base_model(base, device="cpu")
    torch.manual_seed(seed)
    inject_lora(model, **({"rank": 2, "alpha": 4} | options))
    with torch.no_grad():
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora_B.weight, std=0.05)
    record = {"settings": {"model": {"name": base}, "data": {"template": "auto"}, "quant": None, "seed": 7}}
    save_adapter(model, folder, provenance=record)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of the embedded model that answer differently."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("law", "tax")):
        write_adapter(folder / name, seed)
    return {name: folder / name for name in ("law", "tax")}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def generated(*overrides: str) -> tuple[int, str, str, list[dict[str, Any]]]:
    code, out, err = run_program(generate, "hydra.run.dir=run", SHORT, *overrides)
    file = Path("run/generate.json")
    return code, out, err, json.loads(file.read_text())["answers"] if file.is_file() else []


def named(folders: dict[str, Path]) -> str:
    return "adapter={" + ", ".join(f"{name}: {folder}" for name, folder in folders.items()) + "}"


def expected(adapter: Path | None, prompt: str = PROMPT, **options: Any) -> str:
    """The answer by the functions that training measures with."""
    model = load_base_model("embedded", device="cpu")
    if adapter is not None:
        load_adapter(model, adapter)
    tokenizer: Any = load_tokenizer("embedded")
    encoder = Encoder(tokenizer)
    ids = encoder.encode_prompt(Example.of(prompt, "any answer"))
    [answer] = continued(
        model, [ids], max_new_tokens=TOKENS, end_ids=encoder.end_ids, pad_id=tokenizer.pad_token_id, **options
    )
    return tokenizer.decode(answer, skip_special_tokens=True)


def chatted(monkeypatch: pytest.MonkeyPatch, typed: str, *overrides: str) -> tuple[int, str, str, list[dict[str, Any]]]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    return generated("generate.chat=true", *overrides)


# --- a prompt -------------------------------------------------------------------------------------


def test_a_prompt_is_answered_as_training_measures_it_and_the_base_beside_it(two: dict[str, Path]) -> None:
    code, out, err, answers = generated(f"adapter={two['law']}", f"prompt='{PROMPT}'", "generate.base=true")
    assert code == 0, err
    assert [(answer["prompt"], answer["adapter"]) for answer in answers] == [(PROMPT, None), (PROMPT, "law")]
    assert [answer["answer"] for answer in answers] == [expected(None), expected(two["law"])]
    assert answers[0]["answer"] != answers[1]["answer"]
    assert all(0 < answer["tokens"] <= TOKENS and answer["seconds"] > 0 for answer in answers)
    assert out == f"base: {answers[0]['answer']}\nlaw: {answers[1]['answer']}\n"
    assert err == ""


def test_without_an_adapter_the_base_answers() -> None:
    code, out, err, answers = generated(f"prompt='{PROMPT}'")
    assert code == 0, err
    assert out == expected(None) + "\n" and [answer["adapter"] for answer in answers] == [None]


def test_several_adapters_answer_one_after_another(two: dict[str, Path]) -> None:
    code, out, err, answers = generated(f"adapter=[{two['law']},{two['tax']}]", f"prompt='{PROMPT}'")
    assert code == 0, err
    assert [answer["answer"] for answer in answers] == [expected(two["law"]), expected(two["tax"])]
    assert [answer["adapter"] for answer in answers] == ["law", "tax"]


def test_what_is_drawn_follows_from_the_seed(two: dict[str, Path]) -> None:
    drawing = (f"adapter={two['law']}", f"prompt='{PROMPT}'", "generate.temperature=1.5", "generate.top_p=0.9")
    runs = [generated(*drawing, f"seed={seed}")[3][0]["answer"] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    narrow = generated(*drawing[:3], "generate.top_p=1e-6")[3][0]["answer"]
    assert narrow == expected(two["law"])  # of the likeliest alone


def test_drawing_takes_the_models_probabilities_as_they_are() -> None:
    """Over many draws a first token comes as often as softmax(logits / temperature) says, whatever the model's own
    generation settings are."""
    model: Any = load_base_model("embedded", device="cpu").eval()
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 5.0
    ids = load_tokenizer("embedded")("The capital of").input_ids
    torch.manual_seed(0)
    settings: dict[str, Any] = {"max_new_tokens": 1, "end_ids": [10_000], "pad_id": 2}
    drawn = continued(model, [ids] * 2000, batch_size=500, temperature=2.0, **settings)
    counts = torch.bincount(torch.tensor([row[0] for row in drawn]), minlength=model.config.vocab_size) / 2000
    with torch.no_grad():
        wanted = (model(torch.tensor([ids])).logits[0, -1].float() / 2.0).softmax(-1)
    for token in wanted.topk(5).indices:
        share = float(wanted[token])
        assert abs(float(counts[token]) - share) < 4 * math.sqrt(share * (1 - share) / 2000) + 1e-3
    assert continued(model, [ids], **settings) == [[int(wanted.argmax())]]


def test_a_stream_is_the_answer_whole_characters_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of one character that come as several tokens are shown when the last has come; what would move the cursor
    is shown as what it is; markup is text."""
    tokenizer: Any = load_tokenizer("embedded")
    text = "naïve — 猫 [red]x[/red] \x1b[2J end"
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    monkeypatch.setattr("lorafit.evaluation.generate", _plays(tokens))
    shown: list[str] = []
    said = generate.said
    monkeypatch.setattr(generate, "said", lambda piece, style="": (shown.append(piece), said(piece, style))[1])
    code, out, err, [answer] = generated("prompt=x")
    assert code == 0, err
    assert answer["answer"] == text and answer["tokens"] == len(tokens)
    assert out == text.replace("\x1b", "<U+001B>") + "\n"
    assert not any("\ufffd" in piece for piece in shown) and len([piece for piece in shown if piece]) > 5


def _plays(tokens: list[int]) -> Any:
    def play(*_: Any, on_token: Any, **__: Any) -> list[list[int]]:
        for token in tokens:
            on_token(token)
        return [tokens]

    return play


def test_a_long_answer_in_a_pipe_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer: Any = load_tokenizer("embedded")
    text = "the cat is a word " * 40
    monkeypatch.setattr("lorafit.evaluation.generate", _plays(tokenizer(text, add_special_tokens=False).input_ids))
    code, out, err, [answer] = generated("prompt=x")
    assert code == 0 and out == answer["answer"] + "\n", err


# --- a file ---------------------------------------------------------------------------------------


def test_the_rows_of_a_file_choose_their_adapters_and_are_answered_as_alone(two: dict[str, Path]) -> None:
    other = "Name the capital of Denessa, please."
    rows = [
        {"prompt": PROMPT, "adapter": "tax"},
        {"prompt": PROMPT, "adapter": "law"},
        {"messages": [{"role": "user", "content": other}], "adapter": "law"},
        {"prompt": other, "adapter": None},
        {"prompt": other},
    ]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err, answers = generated(named(two), "generate.prompts=p.jsonl", "generate.batch_size=3")
    assert code == 0, err
    who = ["tax", "law", "law", None, "law", "tax"]
    assert [answer["adapter"] for answer in answers] == who
    for answer in answers:
        assert answer["answer"] == expected(two.get(answer["adapter"]), answer["prompt"])
        assert answer["seconds"] > 0
    assert answers[0]["answer"] != answers[1]["answer"]
    assert out.count(f"{PROMPT}\n") == 2 and "tax: " in out and "base: " in out


def test_a_text_file_holds_a_prompt_per_line(two: dict[str, Path]) -> None:
    Path("p.txt").write_text(f"{PROMPT}\n\nWho is Felix?\r\n", newline="")
    code, _, err, answers = generated(f"adapter={two['law']}", "generate.prompts=p.txt")
    assert code == 0, err
    assert [answer["prompt"] for answer in answers] == [PROMPT, "Who is Felix?"]
    assert [answer["answer"] for answer in answers] == [expected(two["law"], answer["prompt"]) for answer in answers]


def test_a_text_file_is_split_where_a_line_ends_and_nowhere_else() -> None:
    prompts = ["a\x0cb", "c\u2028d\x85e", "f\rg", "h"]
    Path("p").write_bytes(("\ufeff" + "\r\n".join(prompts)).encode())
    found = generate.read_prompts(compose(["generate.prompts=p"]), [])
    assert [example.prompt for example, _ in found] == prompts
    assert [example.where for example, _ in found] == ["p:1", "p:2", "p:3", "p:4"]


def test_an_adapter_with_trained_biases_is_answered_apart_from_the_others(
    two: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.serving import Adapters

    mixed: list[list[str | None]] = []
    original = Adapters.mixed
    monkeypatch.setattr(Adapters, "mixed", lambda self, rows: (mixed.append(rows), original(self, rows))[1])
    load = Adapters.load

    def with_biases(self: Any, name: str, folder: Any, **options: Any) -> None:
        load(self, name, folder, **options)
        if name == "law":
            norm = self.model.model.norm.weight
            self.get(name).biases["model.norm.weight"] = (norm, norm.detach().clone())

    Path("p.jsonl").write_text('{"prompt": "a", "adapter": "law"}\n{"prompt": "b", "adapter": "tax"}\n')
    plain = generated(named(two), "generate.prompts=p.jsonl")[3]
    assert mixed == [["law", "tax"]]
    monkeypatch.setattr(Adapters, "load", with_biases)
    code, _, err, answers = generated(named(two), "generate.prompts=p.jsonl")
    assert code == 0, err
    assert [answer["answer"] for answer in answers] == [answer["answer"] for answer in plain]
    assert len(mixed) == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", '{"prompt": "x", "adapter": "lwa"}\n', "p.jsonl:1: no adapter 'lwa'. There is law, tax. Did you"),
        ("p.jsonl", '{"question": "x"}\n', "p.jsonl:1: the row has neither 'prompt' nor 'messages'"),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}\n', "p.jsonl:1: the messages end with"),
        ("p.jsonl", '{"prompt": " "}\n', "p.jsonl:1: "),
        ("p.jsonl", '{"prompt": 1', "p.jsonl:1: "),
        ("p.jsonl", "", "generate.prompts: 'p.jsonl' holds no prompt"),
        ("p.txt", "\n \n", "generate.prompts: 'p.txt' holds no prompt"),
        ("p.json", "[]", "generate.prompts: 'p.json' is neither .txt, a prompt per line, nor .jsonl, a row"),
        ("p.parquet", "x", "generate.prompts: 'p.parquet' is neither .txt"),
        ("p.jsonk", "x", "generate.prompts: no file 'p.json'. Did you mean 'p.jsonk'?"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_before_anything_is_loaded(
    two: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, content: str, said: str
) -> None:
    monkeypatch.setattr(generate, "load_base", lambda _: pytest.fail("the model is loaded"))
    Path(name).write_text(content)
    asked = "p.json" if name == "p.jsonk" else name
    code, _, err, answers = generated(named(two), f"generate.prompts={asked}")
    assert code == 2 and answers == []
    assert err.startswith(f"lorafit generate: {said}") and err.count("\n") == 1


# --- a conversation -------------------------------------------------------------------------------


def chat_model(folder: Path, source: str = CHATML_SOURCE) -> Path:
    tokenizer: Any = load_tokenizer("embedded")
    tokenizer.chat_template = source
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / name).write_bytes((MODEL / name).read_bytes())
    return folder


def test_a_conversation_is_kept_and_what_the_model_reads_is_the_template_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = chat_model(tmp_path / "chat")
    read: list[list[int]] = []
    plays = _plays(load_tokenizer("embedded")(" the cat", add_special_tokens=False).input_ids)

    def play(_: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
        read.extend(prompts)
        return plays(**options)

    monkeypatch.setattr("lorafit.evaluation.generate", play)
    typed = "Who is Felix?\nAnd Ina?\n/new\nAnd Ina?\n"
    code, _, err, answers = chatted(monkeypatch, typed, f"model.name={folder}", "generate.system='Be brief.'")
    assert code == 0, err
    tokenizer: Any = load_tokenizer(str(folder))
    system = {"role": "system", "content": "Be brief."}
    first, again = ({"role": "user", "content": text} for text in ("Who is Felix?", "And Ina?"))
    answer = {"role": "assistant", "content": answers[0]["answer"]}
    for ids, messages in zip(read, ([system, first], [system, first, answer, again], [system, again]), strict=True):
        wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(ids) == wanted
    assert [answer["prompt"] for answer in answers] == ["Who is Felix?", "And Ina?", "And Ina?"]


def test_in_a_conversation_commands_choose_who_answers(two: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    typed = f"{PROMPT}\n/new\n/adapter tax\n{PROMPT}\n/new\n/base\n{PROMPT}\n"
    typed += "/adapter txa\n/adapter\n/hlp\n/help\n\n/quit\nno\n"
    code, out, err, answers = chatted(monkeypatch, typed, named(two))
    assert code == 0, err
    assert [answer["adapter"] for answer in answers] == ["law", "tax", None]
    assert [answer["answer"] for answer in answers] == [expected(two["law"]), expected(two["tax"]), expected(None)]
    assert "no adapter 'txa'. There is law, tax. Did you mean 'tax'?" in out
    assert "there is no command '/hlp'. Did you mean '/help'?" in out
    assert "/quit" in out and "base> " in out and "law> " in out


def test_a_conversation_that_grows_too_long_can_be_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err, answers = chatted(monkeypatch, f"{'word ' * 3000}\n{PROMPT}\n")
    assert code == 0, err
    assert "the model has room for" in out and "/new begins anew" in out
    assert [answer["prompt"] for answer in answers] == [PROMPT]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_not_text_is_left_out_and_the_conversation_goes_on(
    monkeypatch: pytest.MonkeyPatch, errors: str
) -> None:
    typed = f"{PROMPT}\n/new\n".encode() + b"caf\xe9\n/x\xff\n" + f"/new\n{PROMPT}\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8", errors=errors))
    code, out, err, answers = generated("generate.chat=true")
    assert code == 0, err
    assert [answer["prompt"] for answer in answers] == [PROMPT, PROMPT]
    assert out.count("the line has bytes that are not UTF-8, so it is left out") == 2


def test_stopping_a_conversation_leaves_what_was_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter([PROMPT])

    def typed(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("builtins.input", typed)
    code, _, _, answers = generated("generate.chat=true")
    assert code == 130 and [answer["answer"] for answer in answers] == [expected(None)]


# --- combining ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_a_combination_answers_and_is_saved_as_an_adapter_that_is_enough_alone(
    two: dict[str, Path], method: str
) -> None:
    options = (f"combine.method={method}", "combine.weights=[1.5,-0.5]")
    code, out, err, answers = generated(named(two), *options, f"prompt='{PROMPT}'", "out=sum")
    assert code == 0, err
    assert "saved in sum" in out and [answer["adapter"] for answer in answers] == ["combined"]
    assert read_config("sum").rank == (4 if method == "cat" else 2)
    assert read_record("sum")["combined"]["weights"] == [1.5, -0.5]

    model = load_base_model("embedded", device="cpu").eval()
    parts = []
    for folder in two.values():
        load_adapter(model, folder)
        parts.append(detach_adapter(model))
    attach_adapter(model, combine(parts, [1.5, -0.5], method))
    other = load_base_model("embedded", device="cpu").eval()
    load_adapter(other, "sum")
    ids = torch.arange(5, 30).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)
    again = generated("adapter=sum", f"prompt='{PROMPT}'")[3]
    assert again[0]["answer"] == answers[0]["answer"] == expected(Path("sum"))


def test_a_combination_can_be_saved_without_asking_anything(two: dict[str, Path]) -> None:
    code, out, err, answers = generated(named(two), "combine.method=svd", "combine.rank=1", "out=sum")
    assert code == 0 and answers == [], err
    assert read_record("sum")["combined"]["weights"] == [0.5, 0.5] and read_config("sum").rank == 1


# --- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "there is nothing to do: give prompt="),
        (["prompt=''"], "prompt is empty"),
        (["prompt=x", "generate.chat=true"], "prompt and generate.chat are given, and one of them"),
        (["prompt=x", "out=y"], "out belongs to a combination"),
        (["prompt=x", "combine.weights=[1]"], "combine.weights belongs to a combination"),
        (["prompt=x", "combine.rank=1"], "combine.rank belongs to a combination"),
        (["prompt=x", "combine.method=cat"], "combine.method: there is no adapter to combine"),
        (["prompt=x", "generate.system=y", "data.system=drop"], "generate.system: data.system=drop leaves"),
        (["prompt=x", "generate.max_new_tokens=100000"], "the prompt has 2 tokens and generate.max_new_tokens is"),
        (["prompt=x", "generate.temperature=-1"], "generate.temperature must be zero or a positive number"),
        (["prompt=x", "generate.top_p=0"], "generate.top_p must be in (0, 1]"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(overrides: list[str], said: str) -> None:
    code, _, err, answers = generated(*overrides)
    assert code == 2 and answers == []
    assert err.startswith(f"lorafit generate: {said}") and err.count("\n") == 1


@pytest.mark.parametrize("out", ["sum", "file", "file/sum", "/proc/sum", "", "LAW", "LAW/sum"])
def test_a_folder_that_cannot_be_new_is_refused_before_anything_is_loaded(
    two: dict[str, Path], monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.setattr(generate, "load_base", lambda _: pytest.fail("the model is loaded"))
    Path("sum").mkdir()
    Path("sum/notes").write_text("mine")
    Path("file").write_text("mine")
    out = out.replace("LAW", str(two["law"]))
    code, _, err, _ = generated(named(two), "combine.method=cat", f"out={out}")
    assert code == 2 and err.startswith("lorafit generate: out") and err.count("\n") == 1
    assert not (two["law"] / "sum").exists()
    assert Path("sum/notes").read_text() == Path("file").read_text() == "mine"


def test_the_adapter_of_another_base_is_refused_in_one_line(two: dict[str, Path], tmp_path: Path) -> None:
    folder = chat_model(tmp_path / "other")
    model = load_base_model(str(folder), device="cpu")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(folder)
    code, _, err, answers = generated(f"adapter={two['law']}", f"model.name={folder}", "prompt=x")
    assert code == 2 and answers == [] and err.count("\n") == 1
    assert "was trained on another base than" in err and "allow_other_base=true" in err
    code, _, err, answers = generated(
        f"adapter={two['law']}", f"model.name={folder}", "prompt=x", "allow_other_base=true"
    )
    assert code == 0 and len(answers) == 1, err


def test_the_encoder_is_that_of_training() -> None:
    encoder = generate.build_encoder(compose(["data.template=alpaca", "data.system=fold"]))
    assert encoder.plain.headings and encoder.plain.system == "fold"
