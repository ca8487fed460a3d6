"""What a stranger's folder or file asks for is not done, and hundreds of bad ones are refused in one message each.

pytest tests/test_hostile.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import PLANTED, AdapterLab, TooLong, bad_adapters, bad_configs, planted, try_config, watched
from programs import run_program
from transformers import LlamaForCausalLM

from lorafit import train
from lorafit.adapter.files import CONFIG, read_json
from lorafit.errors import InputError
from lorafit.files import require_regular
from lorafit.launch import _replay_sweep
from lorafit.module import find_optimizer
from lorafit.recorded import trusted_overrides

HOSTILE = [
    *("hydra.launcher._target_=os.system", "+hydra.job.env_set.X=1", "++hydra/launcher=x", "~hydra.callbacks"),
    *("hydra@x=y", "'hydra.searchpath'=[file:///x]", "Hydra.run.dir=/x", "--config-dir=/x", "-cd", "quant@hydra.x=nf4"),
    *("logger.name=${oc.env:HF_TOKEN}", "rank=${oc.decode:x}", "rank=${hydra:runtime.cwd}", "rank=${${x}:y}"),
    *("rank=${mul:${oc.env:X},2}", "rank=${ oc.env : X}", "rank", ""),
]
PLAIN = ["rank=8", "quant=nf4", "alpha=${mul:${rank},2}", "~callbacks.speed", "+lora/x=y", "data.path=[{path: a}]"]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_recorded_override_that_is_no_plain_setting_is_left_and_named(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trusted_overrides([*PLAIN, text], Path("run")) == PLAIN
    assert "not taken over from run" in capsys.readouterr().out


@pytest.mark.parametrize("given", [None, {"rank": 8}, "rank=8", [1], [["rank=8"]], ["rank=8"] * 1001])
def test_what_is_no_list_of_texts_is_refused(given: object) -> None:
    with pytest.raises(InputError, match="no list of texts"):
        trusted_overrides(given, Path("run"))


@pytest.mark.parametrize(
    "text", ["model.trust_remote_code=true", "++model.trust_remote_code=1", "model={trust_remote_code: 1}"]
)
def test_that_code_of_a_model_runs_is_never_taken_from_a_file(text: str) -> None:
    with pytest.raises(InputError, match="trust_remote_code=true again"):
        trusted_overrides([text], Path("run"))
    assert trusted_overrides([text], Path("run"), ["model.trust_remote_code=true"]) == []


def test_a_sweep_folder_gives_plain_settings_alone(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps([["-m", "rank=4,8", *HOSTILE]]))
    assert _replay_sweep([f"resume={tmp_path}"])[:2] == ["-m", "rank=4,8"]
    assert len(_replay_sweep([f"resume={tmp_path}"])) == 3


def test_a_pipe_or_a_device_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / CONFIG)
    with pytest.raises(InputError, match="is a pipe"):
        read_json(tmp_path, CONFIG)
    with pytest.raises(InputError, match="is a device"):
        require_regular("/dev/zero")


@pytest.mark.parametrize("name", ["lr_scheduler.StepLR", "swa_utils.update_bn", "lr_scheduler", "Optimizer.__init__"])
def test_a_target_that_is_no_optimizer_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="optimizer"):
        find_optimizer(f"torch.optim.{name}")


# --- hundreds of them -----------------------------------------------------------------------------


def test_bad_settings_are_refused_in_one_message_or_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cases = list(bad_configs(seed=0, count=210))
    by_program, composed = [case for case in cases if case.sure][:12], []
    with planted(tmp_path) as canary:
        for case in cases:
            if case not in by_program:
                composed.append(try_config(case))
        for case in by_program:
            with watched():
                code, out, err = run_program(train, "data.limit=1", "logger=none", *case.overrides)
            assert code == 2, (str(case), out, err)
            assert "Traceback" not in err
            assert err.strip()
        assert not canary.exists()
    assert not list(tmp_path.glob("outputs/*/*/adapter"))
    outcomes = Counter(composed)
    with capsys.disabled():
        print(f"\n{len(composed)} settings composed: {dict(outcomes)}; {len(by_program)} programs: all refused")
    assert len(by_program) == 12
    assert outcomes.keys() <= {"refused", "harmless"}
    assert outcomes["refused"] >= 170
    assert len(composed) + len(by_program) >= 200


def test_bad_adapters_are_refused_in_one_message_or_do_no_harm(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = AdapterLab(tmp_path, tiny_llama(num_hidden_layers=1))
    with planted(tmp_path) as canary:
        outcomes = Counter((case.kind, lab.try_adapter(case)) for case in bad_adapters(seed=0, count=475))
        assert not canary.exists()
    assert not (tmp_path / "executed").exists()
    total: Counter[str] = Counter()
    for (_, outcome), count in outcomes.items():
        total[outcome] += count
    with capsys.disabled():
        print(f"\n{total.total()} adapters: {dict(total)}")
    assert total.total() >= 450
    assert total.keys() <= {"refused", "harmless", "diverged"}
    assert total["refused"] >= 350
    assert all(outcomes[kind, "refused"] for kind, _ in outcomes)


def test_what_is_planted_is_noted_and_what_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with planted(tmp_path) as canary, pytest.raises(AssertionError, match=f"import of {PLANTED}"), watched():
        __import__(PLANTED)
    assert canary.exists()
    del sys.modules[PLANTED]
    with pytest.raises(AssertionError, match="subprocess"), watched():
        subprocess.run(["true"], check=True)
    with pytest.raises(AssertionError, match="compiled"), watched():
        compile(f"{PLANTED} = 1", "x", "exec")
    monkeypatch.setattr("hostile.SECONDS", 0.05)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TooLong), watched():
        (tmp_path / "pipe").read_bytes()
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
