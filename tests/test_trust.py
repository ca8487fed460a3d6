"""Models, data and run folders of strangers: what is planted in them ends in one message, and nothing of it is done.

pytest tests/test_trust.py
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import run_program
from safetensors.torch import load_file

import lorafit.report
import lorafit.train
from lorafit import embedded
from lorafit.callbacks.history import history_rows
from lorafit.callbacks.wandb import _known_id
from lorafit.data import load_tokenizer, read_rows
from lorafit.data.formats import Example
from lorafit.data.sources import fields
from lorafit.data.templates import ChatTemplate, Unusable
from lorafit.data.tokens import Encoder
from lorafit.errors import InputError
from lorafit.loading import load_base_model, resolve
from lorafit.merging.base import open_base
from lorafit.merging.folder import unmerge_folder
from lorafit.quant import base_report
from lorafit.sweep import read_metrics, recorded_sha256

DEEP = "[" * 100_000
SECONDS = 30  # after which something hangs


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """What waits for ever is a fault, and is ended."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"nothing came of it in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that planted code would make."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "planted code was executed"


class Bomb:
    """A pickle that makes a file when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def model(llama_folder: Path) -> Path:
    """A model folder with the tokenizer of the embedded model."""
    for path in embedded.MODEL.glob("*token*"):
        shutil.copy(path, llama_folder)
    return llama_folder


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def replace_by_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def replace_by_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def replace_by_link(path: Path, target: str | Path = "/etc/hostname") -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def index(model: Path, name: str) -> None:
    """An index that says of every tensor that it lies in the file `name`."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model.parent / "elsewhere.safetensors").write_bytes((model / "model-00001-of-00001.safetensors").read_bytes())
    places = dict.fromkeys(tensors, name)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def code(model: Path) -> None:
    """A class of model that lies in the folder."""
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (model / "evil.py").write_text(f"open({str(model.parent / 'executed')!r}, 'w')\n")
    change(model / "config.json", auto_map=names, model_type="evil")


def pickled(model: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Bomb(model.parent / "executed")))


def header(model: Path, length: int) -> None:
    (model / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")


def nested(path: Path) -> None:
    path.write_text('{"a":' * 100_000)


MODELS: dict[str, Callable[[Path], object]] = {
    "config is a pipe": lambda model: replace_by_pipe(model / "config.json"),
    "config is a folder": lambda model: replace_by_folder(model / "config.json"),
    "config is a device": lambda model: replace_by_link(model / "config.json", "/dev/zero"),
    "config is a link": lambda model: replace_by_link(model / "config.json"),
    "config is nested": lambda model: nested(model / "config.json"),
    "config is large": lambda model: os.truncate(model / "config.json", 1 << 30),
    "config is a list": lambda model: (model / "config.json").write_text("[]"),
    "config is of a type": lambda model: change(model / "config.json", hidden_size="many"),
    "config is of a size": lambda model: change(model / "config.json", hidden_size=-64),
    "config has a billion layers": lambda model: change(model / "config.json", num_hidden_layers=10**9),
    "config asks for a kernel": lambda model: change(model / "config.json", attn_implementation="somebody/kernel"),
    "config asks for code": code,
    "config asks for quantization": lambda model: change(model / "config.json", quantization_config={"a": 1}),
    "generation is a pipe": lambda model: replace_by_pipe(model / "generation_config.json"),
    "generation is nested": lambda model: nested(model / "generation_config.json"),
    "weights are a pipe": lambda model: replace_by_pipe(model / "model.safetensors"),
    "weights are a link": lambda model: replace_by_link(model / "model.safetensors"),
    "weights are pickled": lambda model: pickled(model, "pytorch_model.bin"),
    "weights are pickled as pt": lambda model: pickled(model, "model.pt"),
    "weights are a pickle by another name": lambda model: pickled(model, "model.safetensors"),
    "weights claim a header of 2^60 bytes": lambda model: header(model, 1 << 60),
    "index is a pipe": lambda model: (index(model, "x"), replace_by_pipe(model / "model.safetensors.index.json")),
    "index goes out": lambda model: index(model, "../elsewhere.safetensors"),
    "index goes out from the root": lambda model: index(model, str(model.parent / "elsewhere.safetensors")),
    "index is nested": lambda model: (index(model, "x"), nested(model / "model.safetensors.index.json")),
    "an adapter lies in it": lambda model: (model / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/etc"})
    ),
}


@pytest.mark.parametrize("attack", MODELS)
def test_a_hostile_model_folder_is_refused_before_anything_of_it_is_done(attack: str, model: Path) -> None:
    MODELS[attack](model)
    with pytest.raises(InputError) as raised:
        load_base_model(str(model))
    assert len(str(raised.value)) < 1000 and "\n" not in str(raised.value)
    # a merge reads no generation_config.json
    with contextlib.nullcontext() if attack == "generation is nested" else pytest.raises(InputError):
        open_base(str(model), load_whole=lambda _: load_base_model(str(model)))


TOKENIZERS: dict[str, Callable[[Path], object]] = {
    "tokenizer is a pipe": lambda model: replace_by_pipe(model / "tokenizer.json"),
    "tokenizer is a link": lambda model: replace_by_link(model / "tokenizer.json"),
    "tokenizer is nested": lambda model: nested(model / "tokenizer.json"),
    "tokenizer is no tokenizer": lambda model: (model / "tokenizer.json").write_text("[1]"),
    "settings are a pipe": lambda model: replace_by_pipe(model / "tokenizer_config.json"),
    "settings are nested": lambda model: nested(model / "tokenizer_config.json"),
    "settings are a list": lambda model: (model / "tokenizer_config.json").write_text("[1]"),
    "template is a device": lambda model: replace_by_link(model / "chat_template.jinja", "/dev/zero"),
    "templates are elsewhere": lambda model: (model / "additional_chat_templates").symlink_to("/etc"),
    "tokenizer is a class of the folder": lambda model: (
        (model / "evil.py").write_text(f"open({str(model.parent / 'executed')!r}, 'w')\n"),
        (model / "tokenizer.json").unlink(),
        change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="T"),
    ),
}


@pytest.mark.parametrize("attack", TOKENIZERS)
def test_hostile_files_of_a_tokenizer_are_refused(attack: str, model: Path) -> None:
    TOKENIZERS[attack](model)
    with pytest.raises(InputError) as raised:
        load_tokenizer(str(model))
    assert len(str(raised.value)) < 1000


def test_a_model_folder_out_of_the_cache_of_the_hub_is_read_through_its_links(model: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--a--b"
    snapshot = home / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for path in model.iterdir():
        path.rename(home / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert resolve(str(snapshot)) == str(snapshot)
    assert load_tokenizer(str(snapshot)).eos_token_id is not None


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
CALLS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
TEMPLATES = {
    "nested loops": LOOP,
    "calls that double": CALLS,
    "calls without an end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a power": "{{ 9**9**9 }}",
    "a power that is asked for": "{% set a = messages | length + 9 %}{{ a**a**a }}",
    "a text that fits nowhere": "{{ 'a' * 10**17 }}".replace("10**17", "1" + "0" * 17),
    "a range that is too long": "{% for a in range(999999999) %}{% endfor %}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['os'].system('touch executed') }}",
    "code": "{{ lipsum.__globals__['os'].system('touch executed') }}",
    "the code of a function": "{{ cycler.__init__.__globals__.os.system('touch executed') }}",
    "by a filter": "{{ ('' | attr('__class__')).mro() }}",
    "by format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "a division by zero": "{{ 1 / 0 }}",
    "a file": "{% include '/etc/hostname' %}",
    "no template": "{% for %}",
}


@pytest.mark.parametrize("attack", TEMPLATES)
def test_a_hostile_chat_template_is_refused_in_bounded_time(attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.data.templates._MOST_SECONDS", 0.3)
    tokenizer = copy.deepcopy(load_tokenizer("embedded"))
    tokenizer.chat_template = TEMPLATES[attack] + "{{ messages[0].content }}"
    with pytest.raises(InputError) as raised:
        ChatTemplate(tokenizer).opening()
    assert len(str(raised.value)) < 1000
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0


@pytest.mark.parametrize(("source", "said"), [(LOOP, "takes more than 0.3 seconds"), ("{% for %}", "cannot be read")])
def test_a_template_that_is_at_fault_is_tried_once_whatever_the_number_of_rows(
    source: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, apply = [], ChatTemplate._apply

    def counted(*given: Any, **named: Any) -> Any:
        tried.append(1)
        return apply(*given, **named)

    tokenizer = copy.deepcopy(load_tokenizer("embedded"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    encoder = Encoder(tokenizer, template="chat")
    monkeypatch.setattr("lorafit.data.templates._MOST_SECONDS", 0.3)
    monkeypatch.setattr(ChatTemplate, "_apply", counted)
    assert encoder.chat is not None
    encoder.chat.source = source
    with pytest.raises(Unusable, match=said):
        encoder.encode_all([Example.of("a", "b")] * 50)
    assert len(tried) == 1


@pytest.mark.parametrize("template", [12, True, ["a"]])
def test_a_chat_template_that_is_no_text_is_refused(template: Any) -> None:
    tokenizer = copy.deepcopy(load_tokenizer("embedded"))
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="chat template"):
        ChatTemplate(tokenizer)


# ------------------------------------------------------------------------------------------------ data


def saved(folder: Path) -> Path:
    """A data set as `datasets` saves it, of one row."""
    import datasets

    datasets.Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}).save_to_disk(str(folder))
    return folder


def other_file(folder: Path, name: str) -> None:
    other = saved(folder.parent / "other")
    next(other.glob("*.arrow")).rename(folder.parent / "other.arrow")
    change(saved(folder) / "state.json", _data_files=[{"filename": name}])


def picture(path: Path, target: str) -> None:
    """A parquet file that says of a column that it holds pictures, and of the picture that it is another file."""
    import pyarrow
    import pyarrow.parquet

    features = {"prompt": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}
    table = pyarrow.table({"prompt": ["a"], "image": [{"bytes": None, "path": target}]})
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(about), path)


def dictionary(folder: Path, name: str) -> None:
    saved(folder.parent / "other")
    folder.mkdir()
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))


DATA: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a pipe": ("x.jsonl", replace_by_pipe),
    "a device": ("x.jsonl", lambda path: replace_by_link(path, "/dev/zero")),
    "a folder of the name": ("x.jsonl", Path.mkdir),
    "a nested list": ("x.json", lambda path: path.write_text(DEEP)),
    "a nested line": ("x.jsonl", lambda path: path.write_text('{"prompt":' + DEEP)),
    "a nested cell": ("x.tsv", lambda path: path.write_text('a\tb\n"' + DEEP)),
    "a pickle": ("x.pkl", lambda path: path.write_bytes(pickle.dumps(Bomb(path.parent / "executed")))),
    "a pickle as parquet": ("x.parquet", lambda path: path.write_bytes(pickle.dumps(Bomb(path.parent / "executed")))),
    "a pickle as arrow": (
        "x",
        lambda path: next(saved(path).glob("*.arrow")).write_bytes(pickle.dumps(Bomb(path.parent / "executed"))),
    ),
    "a script": (
        "x",
        lambda path: (path.mkdir(), (path / "x.py").write_text("open('executed', 'w')"), (path / "a.txt").touch()),
    ),
    "a script by itself": ("x.py", lambda path: path.write_text("open('executed', 'w')")),
    "a folder with a pipe": ("x", lambda path: (path.mkdir(), os.mkfifo(path / "a.jsonl"))),
    "a folder with a link": ("x", lambda path: (path.mkdir(), (path / "a.jsonl").symlink_to("/etc/hostname"))),
    "a folder with a link above": ("x", lambda path: (path.mkdir(), (path / "a").symlink_to("/etc"))),
    "a saved set that names a file above": ("x", lambda path: other_file(path, "../other.arrow")),
    "a saved set that names a file": ("x", lambda path: other_file(path, str(path.parent / "other.arrow"))),
    "a saved set with a pipe": ("x", lambda path: replace_by_pipe(next(saved(path).glob("*.arrow")))),
    "a saved set with a state that is a pipe": ("x", lambda path: replace_by_pipe(saved(path) / "state.json")),
    "a saved set with a link": ("x", lambda path: replace_by_link(next(saved(path).glob("*.arrow")))),
    "a saved set of another folder": ("x", lambda path: dictionary(path, "../other")),
    "a saved set of splits that are numbers": ("x", lambda path: dictionary(path, 7)),  # type: ignore[arg-type]
    "a saved set that is nested": ("x", lambda path: (saved(path) / "state.json").write_text(DEEP)),
    "a saved set of no kind": ("x", lambda path: change(saved(path) / "state.json", _data_files=7)),
    "a saved set of a strange kind": (
        "x",
        lambda path: change(saved(path) / "dataset_info.json", features={"prompt": {"_type": "os.system"}}),
    ),
}


@pytest.mark.parametrize("attack", DATA)
def test_hostile_data_are_refused(attack: str, tmp_path: Path) -> None:
    name, plant = DATA[attack]
    plant(tmp_path / name)
    with pytest.raises(InputError) as raised:
        for row in read_rows(str(tmp_path / name)):
            fields(row)
    assert len(str(raised.value)) < 1000


def test_a_picture_in_a_table_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    picture(tmp_path / "x.parquet", str(tmp_path / "pipe"))
    (row,) = read_rows(str(tmp_path / "x.parquet"))
    assert fields(row)["prompt"] == "a" and fields(row)["image"]["path"] == str(tmp_path / "pipe")


def test_the_program_says_what_is_wrong_in_one_message(model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for given in (["data.path=rows.jsonl"], [f"model.name={model}", "data.path=good.jsonl"]):
        if len(given) > 1:
            replace_by_pipe(model / "config.json")
        code, _, err = run_program(lorafit.train, *given, "trainer.max_steps=1", "logger=csv")
        assert code == 2 and "Traceback" not in err and len(err.splitlines()) <= 2, err


# ------------------------------------------------------------------------------------------------ run folders

_NAMES = [f"k{number}" for number in range(60)]
BOMB = "a: &a [x, x]\nk0: &k0 [*a, *a]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip(_NAMES, _NAMES[1:], strict=False)
)
LIST_BOMB = "- &a [x, x]\n- &k0 [*a, *a]\n" + "".join(
    f"- &{new} [*{old}, *{old}]\n" for old, new in zip(_NAMES, _NAMES[1:], strict=False)
)
OVERRIDES: dict[str, str] = {
    "a text": "rank=4",
    "a mapping": "rank: 4",
    "numbers": "- 1\n- 2",
    "an object": "- !!python/object/apply:os.system ['touch executed']",
    "a name": "!!python/name:os.system",
    "no YAML": "- [",
    "nested": DEEP,
    "a bomb": LIST_BOMB,
    "10 MB": "- rank=4\n" * 1_200_000,
    "code of a model": "- model.trust_remote_code=true",
    "bytes": "- !!binary aaaa",
}


@pytest.mark.parametrize("attack", OVERRIDES)
def test_hostile_overrides_of_a_run_are_refused(attack: str, tmp_path: Path) -> None:
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / ".hydra" / "overrides.yaml").write_text(OVERRIDES[attack])
    code, _, err = run_program(lorafit.train, "resume=run", "trainer.max_steps=1", "logger=csv")
    assert code == 2 and "Traceback" not in err and err.count("\n") <= 2, err


METRICS: dict[str, str] = {
    "a list": "[]",
    "nested": DEEP,
    "types": json.dumps({"status": ["completed"], "rungs": 7, "config_sha256": 3, "after": "x"}),
    "rungs": json.dumps({"status": "completed", "rungs": {"0.5": "x", "0.25": [1], "0.1": 2.5}, "after": []}),
    "no numbers": '{"rungs": {"0.5": NaN, "0.25": Infinity}, "after": {"loss": "much"}}',
    "a number that is too long": '{"rungs": {"0.5": ' + "9" * 5000 + "}}",
}


@pytest.mark.parametrize("attack", METRICS)
def test_what_metrics_say_is_of_its_kind_or_left_out(attack: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(METRICS[attack])
    found = read_metrics(tmp_path)
    assert isinstance(found.get("status", ""), str) and isinstance(found.get("config_sha256", ""), str)
    assert isinstance(found.get("after", {}), dict)
    assert all(isinstance(loss, float) for loss in found.get("rungs", {}).values())
    assert recorded_sha256(tmp_path) is None
    if attack == "rungs":
        assert found["rungs"] == {"0.1": 2.5}


def test_settings_that_name_one_another_without_end_say_nothing(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "resolved.yaml").write_text(BOMB)
    assert recorded_sha256(tmp_path) is None
    (tmp_path / ".hydra" / "resolved.yaml").write_text("a: &a [*a]\n")
    assert recorded_sha256(tmp_path) is None


def test_pipes_in_a_run_folder_are_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    for name in ("metrics.json", ".hydra/resolved.yaml", "run.json", "history.jsonl"):
        os.mkfifo(tmp_path / name)
    assert read_metrics(tmp_path) == {} and recorded_sha256(tmp_path) is None
    assert _known_id(tmp_path, going_on=True) is None
    with pytest.raises(InputError, match="is a pipe"):
        history_rows(tmp_path, 10)


@pytest.mark.parametrize("value", ["../../x", "a/b", "*", "", "a" * 100, 7, ["a"], None])
def test_an_id_that_is_none_of_a_run_is_forgotten(value: object, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"id": value, "exit_code": None}))
    assert _known_id(tmp_path, going_on=True) is None
    (tmp_path / "run.json").write_text(json.dumps({"id": "1a2b3c4d", "exit_code": None}))
    assert _known_id(tmp_path, going_on=True) == "1a2b3c4d"


def test_a_history_is_read_as_far_as_it_is_one(tmp_path: Path) -> None:
    rows = ['{"step": 1}', '{"step": "2"}', "7", DEEP, '{"step": 3}']
    (tmp_path / "history.jsonl").write_text("\n".join(rows))
    assert history_rows(tmp_path, 10) == [{"step": 1}]


@pytest.mark.parametrize("text", ["{}", "7", DEEP, "[7]", "[[7]]", '[["rank=4", {}]]', "", '{"-1": ["rank=4"]}'])
def test_a_sweep_that_does_not_say_what_was_swept_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(text)
    code, _, err = run_program(lorafit.train, "resume=sweep")
    assert code == 2 and "Traceback" not in err and err.count("\n") <= 2, err


@pytest.mark.parametrize("link", ["rank=2", "rank=2/train.log", "a/b/.hydra", "multirun.yaml"])
def test_a_sweep_is_not_written_through_a_link_out_of_its_folder(link: str, tmp_path: Path) -> None:
    elsewhere, path = tmp_path / "elsewhere", tmp_path / "sweep" / link
    path.parent.mkdir(parents=True)
    (tmp_path / "sweep" / "sweep.json").write_text("[]")
    if link == "rank=2":
        (elsewhere / "checkpoints").mkdir(parents=True)
    else:
        elsewhere.write_text("somebody's")
    path.symlink_to(elsewhere)
    code, _, err = run_program(lorafit.train, "-m", "rank=2,4", "hydra.sweep.dir=sweep", "trainer.max_steps=1")
    assert code == 2 and f"{f'sweep/{link}'!r} is a link out of the folder" in err, err
    if elsewhere.is_dir():
        assert [path.name for path in elsewhere.iterdir()] == ["checkpoints"]
    else:
        assert elsewhere.read_text() == "somebody's"


def test_a_job_is_not_run_through_a_link_and_other_links_are_nobodys_business(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("rank=2", "data"):
        (tmp_path / "sweep").mkdir(exist_ok=True)
        (tmp_path / "sweep" / name).symlink_to(tmp_path / "elsewhere")
    code, _, err = run_program(lorafit.train, "-m", "rank=2,x", "hydra.sweep.dir=sweep", "trainer.max_steps=1")
    assert code == 2 and "sweep/rank=2' is a link out of the folder" in err and "sweep/data" not in err, err
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} <= {"train.log", ".lock"}


# ------------------------------------------------------------------------------------------------ merged folders


def test_what_a_merge_copies_is_never_what_a_link_leads_to(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (model / "tokenizer.model").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="link out of the folder"):
        open_base(str(model), load_whole=lambda _: None)


@pytest.mark.parametrize("name", ["config.json", "lorafit.json", "undo.lorafit", "model.safetensors", "tokenizer.json"])
def test_a_merged_folder_is_not_waited_for_and_not_left(name: str, model: Path, tmp_path: Path) -> None:
    for plant in (replace_by_pipe, replace_by_link):
        plant(model / name)
        with pytest.raises(InputError, match="is a pipe|link out of the folder"):
            unmerge_folder(model, tmp_path, "0", tmp_path / "out", 1 << 30)
        assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ copies and reports


@pytest.mark.parametrize("plant", [replace_by_pipe, replace_by_folder, replace_by_link, nested])
def test_a_quantized_copy_that_is_none_is_passed_over(
    plant: Callable[[Path], object], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lorafit.copies.SMALLEST", 0)
    first = load_base_model(str(model), quant="nf4", device="cpu", cache=True)
    (path,) = tmp_path.glob("cache/models/*/*.safetensors")
    plant(path)
    second = load_base_model(str(model), quant="nf4", device="cpu", cache=True)
    assert base_report(second).copy is None
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_report_over_a_hostile_folder_names_what_it_leaves_out(tmp_path: Path) -> None:
    for name, plant in {"pipe": replace_by_pipe, "nested": nested, "link": replace_by_link}.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        plant(tmp_path / "runs" / name / "metrics.json")
    code, out, err = run_program(lorafit.report, "runs")
    assert code == 2 and "Traceback" not in out + err
