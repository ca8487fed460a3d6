"""Bad settings and bad adapters, as a stranger makes them, and what becomes of a command that is given one.

    for case in bad_configs(seed=0, count=500):
        outcome = try_config(case)                   # "refused" or "harmless"; anything else is raised
    lab = AdapterLab(folder)
    for case in bad_adapters(seed=0, count=450):
        outcome = lab.try_adapter(case)              # the same, or "diverged"

A case may take ten seconds, and nothing that it names may run: a module lies ready to be imported that would leave a
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
SECONDS = 10.0  # for one case
_STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn")
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
    "'__import__(\"os\").system(\"x\")'",
)
_INTERPOLATIONS = (
    *("${oc.env:LORAFIT_NOT_SET}", "${oc.env:}", "${oc.env}", "${oc.decode:'[1,'}", "${oc.decode:'{a'}"),
    *("${oc.create:${rank}}", "${oc.select:}", "${hydra:runtime.nowhere}", "${hydra:}", "${hydra:job.num}"),
    *("${not_there}", "${.}", "${..}", "${....rank}", "${rank.a.b}", "${}", "${", "${rank", "$}", "${${}}", "}${"),
    *("${eval:1+1}", f"${{{PLANTED}:1}}", "${mul:}", "${mul:a,b}", "${mul:1,2,3}", "${embedded_or:a}", "${oc.deprecated:x}"),
    *("${job_folder:1,2}", "${oc.dict.values:rank}", "${now:%Q%f}", "${python_version:x}", "${mul:${mul:${mul:2,3},x},4}"),
)
_NUMBERS = (
    *("1e400", "-1e400", "1" + "0" * 400, "-1" + "0" * 400, "9" * 5000, "nan", "-inf", "inf", "1e-400", "0x10", "1_0"),
    *("0", "-1", "-0.0", "2147483648", "18446744073709551616", "0.1", "1e3", "1e308", "00", "+5", "١٢"),
)
_TEXTS = (
    *("x", "''", "' '", "\x00", "a\x00b", "\ud800", "'\ud83d'", "\u202e", "'\r\n'", "🦙", "é", "'\\''", '"', "'", "\\"),
    *("[", "]", "{", "}", "[" * 3000, "{a:" * 300, "[[[[1]]]]", "[" * 60 + "]" * 60, "(", "choice(", "range(1,5)", "glob(*)"),
    *("choice(1,2)", "sort(3,1)", "1,2", "a,b", "str([1,2])", "int(x)", "json_str({a:1})", "extend_list(1)", ",", "=", "a=b"),
    *("x" * 100_000, "../" * 2000, "%s%n{0}", "<script>", "$(touch x)", "`touch x`", "; rm", "-1,", "!!python/object:x"),
    *("../../x", "/etc/passwd", "/dev/zero", "file:///etc", "~root", "~nobody_at_all/x", "//x", ".", "..", "/", "a/b/c", "con"),
)
_KINDS = (
    *("null", "true", "false", "[]", "{}", "[1]", "[null]", "[[1],[2]]", "{a:1}", "{a:{b:[1,{c:2}]}}", "[a,[b]]", "{1:2}"),
    *("{_target_:os.system}", "[{_target_:os.system,_args_:[x]}]", "{true:false}", "{null:1}", "1.5", "abc", "'1'", "???"),
)
_GROUPS = ("", "nothing", "../../../etc/passwd", "../x", "/etc/hostname", ".", "..", "nf4/../nf4", "a b", "é", "[a,b]", "{a:1}")

# what is wrong however one looks at it
_SURE = (
    *(f"optimizer._target_={target}" for target in _TARGETS),
    *(f"{key}={text}" for key in ("rank", "data.batch_size", "trainer.max_steps") for text in _INTERPOLATIONS[:18]),
    *(f"{key}={value}" for key in ("rank", "dropout", "optimizer.lr") for value in ("-1e400", "nan", "-1", "[1]", "x", "true")),
    *(f"{key}=os.system" for key in ("_target_", "model._target_", "hydra._target_", "trainer.callbacks._target_")),
    *(f"+{key}._target_=os.system" for key in ("x", "model", "trainer", "data", "callbacks", "lora", "scheduler")),
    *(f"++{key}={PLANTED}.run" for key in ("model._target_", "_target_", "logger._target_", "hydra_._target_")),
    *("+x={_target_: os.system, _args_: [x]}", "x=1", "Rank=8", "rank.x=1", "~rank", "~model", "~model.name", "~x", "rank"),
    *("", "=", "=8", "rank==8", "rank= ", "+", "++", "~", "+=1", "@=1", "a@b=c", "model@x=embedded", "rank=8=", "\x00=\x00"),
    *("rank=${rank}", "alpha=${rank} rank=${alpha}", "model=${model}", "rank=" + "[" * 100_000, "rank=" + "9" * 5000),
    *("data.path=\x00", "data.path=../../x", "data.path=\ud800.jsonl", "data.path=[]x", "data.path={path: 3}", "data.path=''"),
    *("model.name=../../x", "model.name=/etc/passwd", "model.name=\x00", "model.name=a/b/c", "model.name=/dev/zero"),
    *("data.path=[{path: {path: x}}]", "data.path=/" + "x" * 5000, "model.name=./" + "y" * 300, "resume=/" + "z" * 5000),
    *("adapter=../../x", "adapter=[]", "adapter={}", "adapter=[[x]]", "adapter=/" + "x" * 5000, "adapter=\x00", "adapter=3"),
    *("quant=../nf4", "quant=/etc/passwd", "model=../../../x", "experiment=../../../../etc/hostname", "lora/rank=../high"),
    *("nothing/at/all=x", "lora/nothing=high", "quant=[nf4,fp4", "quant=nf4 quant.type=${oc.env:HOME}", "quant=[]", "sweep=''"),
    *("hydra/launcher=nothing", "hydra/nothing=x", "hydra.nothing=1", "hydra.launcher=x", "hydra.run=1", "hydra.searchpath=3"),
    *("seed=4294967296", "seed=" + "9" * 400, "max_kl=nan", "energy=2", "ladder=[0]", "ladder=[a]", "report.kept=nan"),
    *("rank_pattern=[1]", "rank_pattern={a: x}", "alpha_pattern={a: nan}", "rank_pattern={[: 1}", "target_modules=[[q]]"),
    *("target_modules=[]", "target_modules=3", "modules_to_save={a: 1}", "bias=true", "variant=dora", "model.dtype=int4"),
    *("merge.max_shard_size=1e9", "bench.shape=../../x", "data.columns=[a]", "data.columns={x: y}", "data.allow=[x]"),
    *("optimizer.betas=[1]", "optimizer.betas=x", "optimizer.eps=0", "optimizer.lr={a: 1}", "optimizer=[]", "optimizer={}"),
    *("task.retention_path=/", "trainer.devices=[0]", "trainer.accelerator=tpu9", "scheduler.warmup=-1", "logger.mode=live"),
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
    sure = [BadConfig(tuple(text.split(" ")) if " rank=" in text or " quant." in text else (text,), True) for text in _SURE]
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
            return "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0xD000, 0x20000)])) for _ in range(rng.randrange(40)))
        return _worse(rng, rng.choice([f"{key}={rng.choice(values)}", rng.choice(_SURE[:40]), f"{rng.choice(groups)}=nf4"])[:300])

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
