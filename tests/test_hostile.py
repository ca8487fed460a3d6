"""What a stranger's folder or file asks for is not done.

pytest tests/test_hostile.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

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
