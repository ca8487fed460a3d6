"""Bad settings and bad adapters, as a stranger makes them, and what becomes of a command that is given one.

    for case in bad_configs(seed=0, count=500):
        outcome = try_config(case)                   # "refused" or "harmless"; anything else is raised
    lab = AdapterLab(folder, model)
    for case in bad_adapters(seed=0, count=450):
        outcome = lab.try_adapter(case)              # the same, or "diverged"

A case may take twenty seconds, and nothing that it names may run: a module lies ready to be imported that would leave a
file behind, and programs that are started, planted text that is compiled and planted modules that are imported are
noted.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import random
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load, save
from transformers import LlamaForCausalLM

from lorafit.adapter import CONFIG, PROVENANCE, WEIGHTS, load_adapter, save_adapter
from lorafit.adapter.files import ROUNDED, sha256_of
from lorafit.config import compose, settings_to_record, typed
from lorafit.errors import DivergedError, InputError
from lorafit.explain import config_groups, schema_keys
from lorafit.inject import adapter_modules, inject_lora, lora_state_dict
from lorafit.schema import Config, to_dict
from lorafit.weights import FileWeights

# --- nothing runs, nothing hangs ------------------------------------------------------------------

PLANTED = "planted_canary"  # a module that is never imported, a text that is never compiled
SECONDS = 20.0  # for one case; the slowest take one or two
_STARTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "subprocess.Popen",
    "pty.spawn",
)
_MODULES = (PLANTED, "antigravity", "this")
_noted: list[str] | None = None  # what the case at hand has run; None between cases


class TooLong(BaseException):
    """A case did not come to its end in time. No Exception, so that nothing takes it for an error of the file."""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _noted is None:
        return
    if event in _STARTS:
        _noted.append(f"{event} {arguments!r:.200}")
    elif event == "import" and str(arguments[0]).partition(".")[0] in _MODULES:
        _noted.append(f"import of {arguments[0]}")
    elif event == "compile" and PLANTED in str(arguments[0]):
        _noted.append(f"compiled {arguments[0]!r:.200}")
    elif event == "exec" and PLANTED in (*arguments[0].co_names, *map(str, arguments[0].co_consts)):
        _noted.append(f"executed {arguments[0]!r:.200}")


def _too_long(*_: object) -> NoReturn:
    raise TooLong(f"it takes longer than {SECONDS} s")


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Raise AssertionError where what is done inside runs what was planted, and TooLong where it does not end."""
    global _noted
    if not getattr(sys, "lorafit_hostile", False):
        sys.addaudithook(_hook)  # for good: a hook cannot be taken away
        sys.lorafit_hostile = True  # type: ignore[attr-defined]
    before = signal.signal(signal.SIGALRM, _too_long)
    noted = _noted = []
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        _noted = None
    assert not noted, noted


@contextlib.contextmanager
def planted(folder: Path) -> Iterator[Path]:
    """The module stands ready to be imported. Given is the file that would be there if it were."""
    canary = folder / "executed"
    (folder / f"{PLANTED}.py").write_text(f"open({str(canary)!r}, 'w').close()\nrun = print\n")
    sys.path.insert(0, str(folder))
    try:
        yield canary
    finally:
        sys.path.remove(str(folder))


def one_message(error: Exception) -> None:
    """What is said to the user is a message, not a page, and no traceback."""
    said = str(error)
    assert said, "it says nothing"
    assert "Traceback" not in said, said
    assert len(said) < 20_000, f"{len(said)} characters: {said[:300]}"


# --- settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BadConfig:
    """overrides: of a command. sure: whether they cannot work; others may turn out to be harmless."""

    overrides: tuple[str, ...]
    sure: bool = False

    def __str__(self) -> str:
        return " ".join(text if len(text) <= 120 else f"{text[:80]}…({len(text)})" for text in self.overrides)


_TARGETS = (
    *("os.system", "builtins.exec", "subprocess.Popen", f"{PLANTED}.run", "hydra.utils.instantiate", "torch.optim"),
    *("torch.optim.lr_scheduler.LambdaLR", "torch.optim..Adam", ".torch.optim.Adam", "torch.optim.adam.os.system"),
    *("torch.optim.__dict__", "torch.load", "bitsandbytes.optim.os.system", "antigravity", "''", "null", "[os.system]"),
    *("{_target_:os.system}", "3", "true", "torch.optim.AdamW\x00", "'torch.optim.Adam w'", "ｔorch.optim.AdamW"),
    '\'__import__("os").system("x")\'',
)
_INTERPOLATIONS = (
    *("${oc.env:LORAFIT_NOT_SET}", "${oc.env:}", "${oc.env}", "${oc.decode:'[1,'}", "${oc.decode:'{a'}"),
    *("${oc.create:${rank}}", "${oc.select:}", "${hydra:runtime.nowhere}", "${hydra:}", "${hydra:job.num}"),
    *("${not_there}", "${.}", "${..}", "${....rank}", "${rank.a.b}", "${}", "${", "${rank", "$}", "${${}}", "}${"),
    *(
        "${eval:1+1}",
        f"${{{PLANTED}:1}}",
        "${mul:}",
        "${mul:a,b}",
        "${mul:1,2,3}",
        "${embedded_or:a}",
        "${oc.deprecated:x}",
    ),
    *(
        "${job_folder:1,2}",
        "${oc.dict.values:rank}",
        "${now:%Q%f}",
        "${python_version:x}",
        "${mul:${mul:${mul:2,3},x},4}",
    ),
)
_NUMBERS = (
    *("1e400", "-1e400", "1" + "0" * 400, "-1" + "0" * 400, "9" * 5000, "nan", "-inf", "inf", "1e-400", "0x10", "1_0"),
    *("0", "-1", "-0.0", "2147483648", "18446744073709551616", "0.1", "1e3", "1e308", "00", "+5", "١٢"),
)
_TEXTS = (
    *("x", "''", "' '", "\x00", "a\x00b", "\ud800", "'\ud83d'", "\u202e", "'\r\n'", "🦙", "é", "'\\''", '"', "'", "\\"),
    *(
        "[",
        "]",
        "{",
        "}",
        "[" * 3000,
        "{a:" * 300,
        "[[[[1]]]]",
        "[" * 60 + "]" * 60,
        "(",
        "choice(",
        "range(1,5)",
        "glob(*)",
    ),
    *(
        "choice(1,2)",
        "sort(3,1)",
        "1,2",
        "a,b",
        "str([1,2])",
        "int(x)",
        "json_str({a:1})",
        "extend_list(1)",
        ",",
        "=",
        "a=b",
    ),
    *(
        "x" * 100_000,
        "../" * 2000,
        "%s%n{0}",
        "<script>",
        "$(touch x)",
        "`touch x`",
        "; rm",
        "-1,",
        "!!python/object:x",
    ),
    *(
        "../../x",
        "/etc/passwd",
        "/dev/zero",
        "file:///etc",
        "~root",
        "~nobody_at_all/x",
        "//x",
        ".",
        "..",
        "/",
        "a/b/c",
        "con",
    ),
)
_KINDS = (
    *(
        "null",
        "true",
        "false",
        "[]",
        "{}",
        "[1]",
        "[null]",
        "[[1],[2]]",
        "{a:1}",
        "{a:{b:[1,{c:2}]}}",
        "[a,[b]]",
        "{1:2}",
    ),
    *(
        "{_target_:os.system}",
        "[{_target_:os.system,_args_:[x]}]",
        "{true:false}",
        "{null:1}",
        "1.5",
        "abc",
        "'1'",
        "???",
    ),
)
_GROUPS = (
    "",
    "nothing",
    "../../../etc/passwd",
    "../x",
    "/etc/hostname",
    ".",
    "..",
    "nf4/../nf4",
    "a b",
    "é",
    "[a,b]",
    "{a:1}",
)

# what is wrong however one looks at it
_SURE = (
    *(f"optimizer._target_={target}" for target in _TARGETS),
    *(f"{key}={text}" for key in ("rank", "data.batch_size", "trainer.max_steps") for text in _INTERPOLATIONS[:18]),
    *(
        f"{key}={value}"
        for key in ("rank", "dropout", "optimizer.lr")
        for value in ("-1e400", "nan", "-1", "[1]", "x", "true")
    ),
    *(f"{key}=os.system" for key in ("_target_", "model._target_", "hydra._target_", "trainer.callbacks._target_")),
    *(f"+{key}._target_=os.system" for key in ("x", "model", "trainer", "data", "callbacks", "lora", "scheduler")),
    *(f"++{key}={PLANTED}.run" for key in ("model._target_", "_target_", "logger._target_", "hydra_._target_")),
    *(
        "+x={_target_: os.system, _args_: [x]}",
        "x=1",
        "Rank=8",
        "rank.x=1",
        "~rank",
        "~model",
        "~model.name",
        "~x",
        "rank",
    ),
    *(
        "",
        "=",
        "=8",
        "rank==8",
        "rank= ",
        "+",
        "++",
        "~",
        "+=1",
        "@=1",
        "a@b=c",
        "model@x=embedded",
        "rank=8=",
        "\x00=\x00",
    ),
    *("rank=${rank}", "alpha=${rank} rank=${alpha}", "model=${model}", "rank=" + "[" * 100_000, "rank=" + "9" * 5000),
    *(
        "data.path=\x00",
        "data.path=../../x",
        "data.path=\ud800.jsonl",
        "data.path=[]x",
        "data.path={path: 3}",
        "data.path=''",
    ),
    *("model.name=../../x", "model.name=/etc/passwd", "model.name=\x00", "model.name=a/b/c", "model.name=/dev/zero"),
    *(
        "data.path=[{path: {path: x}}]",
        "data.path=/" + "x" * 5000,
        "model.name=./" + "y" * 300,
        "resume=/" + "z" * 5000,
    ),
    *(
        "adapter=../../x",
        "adapter=[]",
        "adapter={}",
        "adapter=[[x]]",
        "adapter=/" + "x" * 5000,
        "adapter=\x00",
        "adapter=3",
    ),
    *(
        "quant=../nf4",
        "quant=/etc/passwd",
        "model=../../../x",
        "experiment=../../../../etc/hostname",
        "lora/rank=../high",
    ),
    *(
        "nothing/at/all=x",
        "lora/nothing=high",
        "quant=[nf4,fp4",
        "quant=nf4 quant.type=${oc.env:HOME}",
        "quant=[]",
        "sweep=''",
    ),
    *("hydra/launcher=nothing", "hydra/nothing=x", "hydra.nothing=1", "hydra.run=1", "hydra.searchpath=3"),
    *("seed=4294967296", "seed=" + "9" * 400, "max_kl=nan", "energy=2", "ladder=[0]", "ladder=[a]", "report.kept=nan"),
    *(
        "rank_pattern=[1]",
        "rank_pattern={a: x}",
        "alpha_pattern={a: nan}",
        "rank_pattern={[: 1}",
        "target_modules=[[q]]",
    ),
    *(
        "target_modules=[]",
        "target_modules=3",
        "modules_to_save={a: 1}",
        "bias=true",
        "variant=dora",
        "model.dtype=int4",
    ),
    *("merge.max_shard_size=1e9", "bench.shape=../../x", "data.columns=[a]", "data.columns={x: y}", "data.allow=[x]"),
    *("optimizer.betas=[1]", "optimizer.betas=x", "optimizer.eps=0", "optimizer.lr={a: 1}", "optimizer=[]"),
    *(
        "task.retention_path=/",
        "trainer.devices=[0]",
        "trainer.accelerator=tpu9",
        "scheduler.warmup=-1",
        "logger.mode=live",
    ),
)


def _worse(rng: random.Random, text: str) -> str:
    """The text with some of its signs changed, as a slip or a generator of junk leaves them."""
    signs = "=+~@:/.,'\"\\[]{}()$%\x00\x1b\n\t é\ud800🦙0-"
    letters = list(text)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(letters) + 1)
        what = rng.random()
        if what < 0.4 or not letters[at : at + 1]:
            letters.insert(at, rng.choice(signs))
        elif what < 0.7:
            letters[at] = rng.choice(signs)
        else:
            del letters[at]
    return "".join(letters)


def bad_configs(seed: int, count: int) -> Iterator[BadConfig]:
    """`count` cases: first those that cannot work, then keys with values of another kind, groups that are none, texts
    with wrong signs, and several of them in one command."""
    rng = random.Random(seed)
    keys, groups = sorted(schema_keys(Config)), sorted(config_groups())
    values = (*_NUMBERS, *_TEXTS, *_KINDS, *_INTERPOLATIONS)
    # a text of the list may hold two overrides
    sure = [
        BadConfig(tuple(text.split(" ")) if " rank=" in text or " quant." in text else (text,), True) for text in _SURE
    ]
    rng.shuffle(sure)

    def one() -> str:
        what, prefix = rng.random(), rng.choice(["", "", "", "", "+", "++", "~"])
        key = rng.choice(keys)
        if what < 0.45:
            return f"{prefix}{key}={rng.choice(values)}"
        if what < 0.55:
            return f"{rng.choice(groups)}={rng.choice(_GROUPS)}"
        if what < 0.62:
            return f"{prefix}{key}.{rng.choice(['_target_', 'x', '0', '__class__'])}={rng.choice(_TARGETS)}"
        if what < 0.67:
            return f"hydra{rng.choice('/.')}{rng.choice(['launcher', 'sweeper', 'x'])}._target_={rng.choice(_TARGETS)}"
        if what < 0.72:
            return "".join(
                chr(rng.choice([rng.randrange(128), rng.randrange(0xD000, 0x20000)])) for _ in range(rng.randrange(40))
            )
        return _worse(
            rng, rng.choice([f"{key}={rng.choice(values)}", rng.choice(_SURE[:40]), f"{rng.choice(groups)}=nf4"])[:300]
        )

    for number in range(count):
        if number < len(sure):
            yield sure[number]
        else:
            yield BadConfig(tuple(one() for _ in range(rng.choice([1, 1, 1, 2, 4]))))


def try_config(case: BadConfig) -> str:
    """Compose the settings: "refused" or "harmless"."""
    with watched():
        try:
            compose(case.overrides)
        except InputError as error:
            one_message(error)
            return "refused"
    assert not case.sure, "it was taken"
    return "harmless"


# --- adapters -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BadAdapter:
    """kind: what is wrong with the folder; seed: of what is drawn for it."""

    kind: str
    seed: int


# as often as they stand here
_WRONGS = (
    *("bit", "bit", "cut", "config", "config", "config", "config text", "record", "record", "record text"),
    *("header", "header", "header text", "tensor", "tensor", "tensor", "place", "place"),
)


def bad_adapters(seed: int, count: int) -> Iterator[BadAdapter]:
    """`count` cases: of bits and ends of the three files, values and texts of both JSONs and of the header of the
    weights, tensors, and what lies in a file's place."""
    for number in range(count):
        yield BadAdapter(_WRONGS[number % len(_WRONGS)], seed * 1_000_003 + number)


def _raw(rng: random.Random) -> bytes:
    """A text in the place of a JSON value, of any kind."""
    deep = rng.choice([30, 300, 900, 2000, 100_000])
    return rng.choice(
        [
            *(
                b"null",
                b"true",
                b"-1",
                b"0",
                b"1.5",
                b"2147483648",
                b"1e400",
                b"-1e400",
                b"NaN",
                b"-Infinity",
                b"[]",
                b"{}",
            ),
            *(b"1" + b"0" * 400, b"9" * 5000, b"18446744073709551616", b"1152921504606846976", b"-9223372036854775809"),
            *(
                b'""',
                b'" "',
                b'"x"',
                b'"\\u0000"',
                b'"\\ud800"',
                b'"\\u202e\\r\\n"',
                b'"../../x"',
                b'"/etc/passwd"',
                b'"/dev/zero"',
            ),
            *(
                b'"' + b"x" * 100_000 + b'"',
                b'"("',
                b'"a{99999999999}"',
                b'"(((a*)*)*)*!"',
                b'"${oc.env:HOME}"',
                b'"[^\\\\"',
            ),
            *(
                f'"{PLANTED}.run"'.encode(),
                b'"!!python/object/apply:os.system [x]"',
                b'{"_target_": "os.system"}',
                '"é🦙"'.encode(),
            ),
            *(
                b"[" * deep + b"]" * deep,
                b'{"a":' * deep + b"1" + b"}" * deep,
                b"[" * deep,
                b"[" + b"1," * 20_000 + b"1]",
            ),
            *(
                b'{"a": 1, "a": 2}',
                b'{"": 1}',
                b"[null]",
                b'[""]',
                b'["q_proj", 3]',
                b"[[1]]",
                b'{"q_proj": null}',
                b"\xff",
                b"",
                b"'x'",
            ),
        ]
    )


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested dicts and lists."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from _places(item, (*path, key))


def _junk_at(rng: random.Random, value: Any) -> bytes:
    """The JSON of `value` with something else in one of its places: another value, none, or another name."""
    value = copy.deepcopy(value)
    # any place as likely as another would mostly be one of the deepest
    every = list(_places(value))
    depth = rng.choice(sorted({len(place) for place in every}))
    *above, key = rng.choice([place for place in every if len(place) == depth])
    owner = value
    for step in above:
        owner = owner[step]
    what = rng.random()
    if what < 0.1:
        del owner[key]
    elif what < 0.2 and isinstance(owner, dict):
        owner[
            rng.choice([f"{key}x", "", "a\nb", "\ud800", "_target_", "use_dora", "auto_map", "trust_remote_code"])
        ] = owner.pop(key)
    else:
        owner[key] = "HERE"
    return json.dumps(value).encode().replace(b'"HERE"', _raw(rng), 1)


def _text(rng: random.Random, content: bytes) -> bytes:
    """Something else than the JSON that was there."""
    return rng.choice(
        [
            *(
                _raw(rng),
                _raw(rng),
                content * 2,
                content.decode().encode("utf-16"),
                b"\xef\xbb\xbf" + content,
                content + b"\0",
            ),
            *(
                bytes(4096),
                rng.randbytes(500),
                b"[" + content + b"]",
                content.replace(b'"', b"'"),
                content + b"// x",
                b"\n" * 1000,
            ),
            *(content.replace(b":", b": NaN,", 1), b"PK\x03\x04" + content, b"\x80\x04cos\nsystem\n(S'touch x'\ntR."),
        ]
    )


def _split(content: bytes) -> tuple[Any, bytes]:
    """(header, the rest) of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _bad_tensors(rng: random.Random, content: bytes) -> bytes:
    """The file with tensors of another shape, dtype, value or name, or with others."""
    tensors, metadata = load(content), _split(content)[0].get("__metadata__")
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice(sorted(tensors))
        tensor = tensors.pop(name)
        what = rng.choice(["shape", "dtype", "value", "name", "more", "less", "metadata"])
        if what == "shape":
            changed = [tensor.flatten(), tensor[None], torch.cat([tensor[None]] * 2), tensor.sum()]
            tensor = rng.choice([*changed, *([tensor.T, tensor[:-1], tensor[..., :0]] if tensor.dim() == 2 else ())])
        elif what == "dtype":
            kinds = (torch.float64, torch.float16, torch.int8, torch.int64, torch.bool, torch.uint8, torch.float8_e5m2)
            tensor = tensor.float().to(rng.choice([*kinds, torch.bfloat16]))
        elif what == "value":
            tensor = torch.full_like(tensor.float(), rng.choice([float("nan"), float("inf"), -float("inf"), 3e38, 0.0]))
            if rng.random() < 0.5:
                tensor.view(-1)[1:] = 0
        elif what == "name":
            ends = (".weight", ".default.weight", "\n", "", ".scales", "\ud7ff", ".base_layer.weight", "/../../x")
            name = rng.choice(
                [name.removesuffix(".weight") + rng.choice(ends), name.replace(".", "/"), name[10:], name.upper()]
            )
        elif what == "more":
            ends = (".base_layer.weight", ".bias", ".lora_magnitude_vector", ".x" * 5000, ".__class__")
            tensors[name.partition(".lora_")[0] + rng.choice(ends)] = torch.ones(rng.choice([0, 3, 64]))
        elif what == "less":
            continue
        else:
            text = _raw(rng).decode(errors="replace")
            metadata = rng.choice([{}, {"format": text}, {"lorafit.rounding": text}, {"format": "pt", text: "x"}])
        tensors[name] = tensor.contiguous()
    return save({name: tensor.clone() for name, tensor in tensors.items()}, metadata)


def _bad_header(rng: random.Random, content: bytes) -> bytes:
    """The file with a header whose length or places are not those of its tensors."""
    length = int.from_bytes(content[:8], "little")
    claims = (
        2**60,
        2**64 - 1,
        2**31,
        0,
        1,
        7,
        length - 1,
        length + 1,
        length * 2,
        len(content),
        len(content) - 8,
        10**8,
    )
    if rng.random() < 0.5:
        return rng.choice(claims).to_bytes(8, "little") + content[8:]
    header, rest = _split(content)
    rounding = json.loads(header.get("__metadata__", {}).get("lorafit.rounding", "null"))
    if rounding is not None and rng.random() < 0.5:
        header["__metadata__"]["lorafit.rounding"] = _junk_at(rng, rounding).decode(errors="replace")
    else:
        entry = header[rng.choice(sorted(name for name in header if name != "__metadata__"))]
        first, last = entry["data_offsets"]
        wrong = (
            [last, first],
            [first, last + 4],
            [-4, last - first - 4],
            [0, 2**60],
            [first + 1, last + 1],
            [first],
            [first, last, 0],
        )
        entry["data_offsets"] = rng.choice(
            [*wrong, [0, last - first], [float(first), last], [str(first), last], [2**63, 2**63 + last - first]]
        )
        if rng.random() < 0.3:
            entry["data_offsets"] = [first, last]
            sizes = entry["shape"]
            entry["shape"] = rng.choice(
                [[2**60, 0], [-1, *sizes], [*map(float, sizes)], [math.prod(sizes)], [1] * 5000 + sizes, [2**62, 4, 0]]
            )
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


class AdapterLab:
    """Good adapters of a tiny Llama, and what becomes of the same Llama when a bad one of them is loaded."""

    def __init__(self, folder: Path, model: LlamaForCausalLM) -> None:
        self.folder, self.model = folder / "adapter", model
        self.outside = folder / "outside"
        self.outside.mkdir()
        self.values = to_dict(compose([]))
        self.good: list[dict[str, bytes]] = []
        options: tuple[tuple[str, dict[str, Any]], ...] = (
            ("float32", {"rank_pattern": {"q_proj": 2}, "modules_to_save": ["lm_head"]}),
            *(
                ("float32", {"target_modules": ["q_proj", "v_proj"]}),
                ("nf4", {}),
                ("int8", {"alpha_pattern": {"q_proj": 2}}),
            ),
        )
        for number, (dtype, given) in enumerate(options):
            trained = copy.deepcopy(model)
            inject_lora(trained, rank=4, alpha=8, **given)
            for tensor in lora_state_dict(trained).values():
                torch.nn.init.normal_(tensor, std=0.02)
            provenance = {"settings": settings_to_record(compose([])), "metrics": {"loss": 1.0}}
            save_adapter(trained, folder / f"good{number}", base_model="embedded", provenance=provenance, dtype=dtype)
            self.good.append({path.name: path.read_bytes() for path in (folder / f"good{number}").iterdir()})
        for name in (CONFIG, PROVENANCE, WEIGHTS):  # for links to lead to
            (self.outside / name).write_bytes(self.good[0][name])

    def write(self, case: BadAdapter) -> str:
        """Make the folder anew with the bad adapter in it. The name of its weights."""
        rng = random.Random(case.seed)
        files = dict(rng.choice(self.good))
        weights = next(name for name in files if name in (WEIGHTS, *ROUNDED.values()))
        names, kind = [CONFIG, PROVENANCE, weights], case.kind.partition(" ")[0]
        changes: dict[str, Callable[[], tuple[str, bytes]]] = {
            "bit": lambda: self._flipped(rng, files, rng.choice(names)),
            "cut": lambda: self._cut(rng, files, rng.choice(names)),
            "config": lambda: (CONFIG, _junk_at(rng, json.loads(files[CONFIG]))),
            "record": lambda: (PROVENANCE, _junk_at(rng, json.loads(files[PROVENANCE]))),
            "config text": lambda: (CONFIG, _text(rng, files[CONFIG])),
            "record text": lambda: (PROVENANCE, _text(rng, files[PROVENANCE])),
            "header": lambda: (weights, _bad_header(rng, files[weights])),
            "header text": lambda: (weights, self._header_text(rng, files[weights])),
            "tensor": lambda: (weights, _bad_tensors(rng, files[weights])),
        }
        if kind != "place":
            changed, files[changed] = changes[case.kind]()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
        if kind == "place":
            self._put(rng, rng.choice(names))
        elif changed == weights and rng.random() < 0.9:
            # otherwise the hash alone would find every fault
            record = json.loads(files[PROVENANCE])
            record["weights"]["sha256"] = sha256_of(self.folder / weights)
            (self.folder / PROVENANCE).write_text(json.dumps(record))
            if rng.random() < 0.3:
                (self.folder / PROVENANCE).unlink()
        return weights

    def _flipped(self, rng: random.Random, files: dict[str, bytes], name: str) -> tuple[str, bytes]:
        content = bytearray(files[name])
        # half of them in the header, where a file of weights has one
        end = rng.choice([len(content), min(len(content), 2000)])
        for _ in range(rng.choice([1, 1, 8, 100])):
            content[rng.randrange(end)] ^= 1 << rng.randrange(8)
        return name, bytes(content)

    def _cut(self, rng: random.Random, files: dict[str, bytes], name: str) -> tuple[str, bytes]:
        return name, files[name][: rng.choice([0, 1, 7, 8, 9, rng.randrange(len(files[name])), len(files[name]) - 1])]

    def _header_text(self, rng: random.Random, content: bytes) -> bytes:
        header, rest = _split(content)
        text = rng.choice([_junk_at(rng, header), _text(rng, json.dumps(header).encode())])
        return len(text).to_bytes(8, "little") + text + rest

    def _put(self, rng: random.Random, name: str) -> None:
        """Something else than a file where the file was."""
        path, content = self.folder / name, (self.folder / name).read_bytes()
        path.unlink()
        what = rng.randrange(10)
        if what == 0:
            os.mkfifo(path)
        elif what == 1:
            path.mkdir()
        elif what == 2:
            with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(self.folder):
                server.bind(name)
        elif what == 3:
            path.symlink_to("/dev/zero")
        elif what == 4:
            path.symlink_to(name)
        elif what == 5:
            path.symlink_to(rng.choice(["../nothing", "/proc/self/environ", "/dev/stdin", "/etc/passwd"]))
        elif what in (6, 7):
            target = self.outside / name
            path.symlink_to(target if what == 6 else Path("..") / self.outside.name / name)
        elif what == 8:
            (self.folder / "beside").write_bytes(content)  # a link within the folder is no fault
            path.symlink_to("beside")
        else:
            pickled = b"cos\nsystem\n(S'touch executed'\ntR."
            (self.folder / "adapter_model.bin").write_bytes(pickled)
            path.with_name(rng.choice([WEIGHTS, *ROUNDED.values()])).write_bytes(pickled)

    def try_adapter(self, case: BadAdapter) -> str:
        """Load the adapter, and read what it says of its base and its data: "refused", "harmless" or "diverged"."""
        weights = self.write(case)
        model, outcome = copy.deepcopy(self.model), "harmless"
        with watched():
            try:
                load_adapter(model, self.folder)
            except InputError as error:
                outcome = "refused"
                one_message(error)
            except DivergedError as error:
                outcome = "diverged"
                one_message(error)
            if case.kind.startswith(("record", "place")):
                try:
                    typed_with(self.values, self.folder)
                except InputError as error:
                    outcome = "refused"
                    one_message(error)
            if case.kind.startswith(("bit", "cut", "header", "place")):  # as a file of a model's weights is read
                try:
                    tensors = FileWeights([self.folder / weights])
                    for name in tensors:
                        tensors[name].make()
                except InputError as error:
                    one_message(error)
        if adapter_modules(model):
            assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in lora_state_dict(model).values())
        else:  # as it was before
            before = self.model.state_dict()
            assert outcome != "harmless"
            assert all(parameter.requires_grad for parameter in model.parameters())
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        return outcome


def typed_with(values: dict[str, Any], folder: Path) -> None:
    """The settings of a command that names the adapter and says nothing else."""
    from omegaconf import OmegaConf

    from lorafit.explain import explain
    from lorafit.schema import check

    try:
        config = typed(OmegaConf.create(values | {"adapter": str(folder)}), [f"adapter={folder}"])
    except InputError:
        raise
    except Exception as error:  # as `compose` does
        raise InputError(explain(error, [])) from error
    check(config)
