"""The program: one command from an adapter to a plain model folder, a refusal that writes nothing, and the way back.

pytest tests/test_merge.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from programs import run_program
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafit import merge
from lorafit.adapter import save_adapter
from lorafit.embedded import MODEL
from lorafit.inject import inject_lora, lora_layers
from lorafit.loading import load_base_model


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = load_base_model("embedded", quant="nf4", device="cpu")
    inject_lora(model, rank=4, alpha=8)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B.weight, std=0.02)
    folder = tmp_path_factory.mktemp("run") / "adapter"
    save_adapter(model, folder)
    return folder


def command(adapter: Path, folder: Path, *more: str) -> tuple[int, str, str]:
    shared = ["quant=nf4", "model=embedded", "task.eval_examples=8", "logger=none", "trainer.accelerator=cpu"]
    arguments = [f"adapter={adapter}", *shared, f"hydra.run.dir={folder / 'run'}", *more]
    return run_program(merge, *arguments)


def test_the_nearest_candidate_is_written_and_undone(adapter: Path, tmp_path: Path) -> None:
    code, shown, errors = command(adapter, tmp_path, f"out={tmp_path / 'out'}")
    assert code == 0, errors
    found = json.loads((tmp_path / "run" / "merge.json").read_text())
    by_name = {row["name"]: row for row in found["candidates"]}
    assert list(by_name) == ["original", "dequantized", "requantized"] and found["tokens"] > 0
    assert found["chosen"] == "dequantized" == min(by_name, key=lambda name: by_name[name]["kl"])
    assert by_name["dequantized"]["top1_agreement"] >= 0.999
    assert "dequantized ← taken" in shown and "live adapter" in shown
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16 and len(AutoTokenizer.from_pretrained(tmp_path / "out")) > 1000
    record = json.loads((tmp_path / "out" / "lorafit.json").read_text())
    assert record["merged_from"] == str(adapter) and record["candidate"] == "dequantized"
    code, shown, errors = command(adapter, tmp_path, f"merge.unmerge={tmp_path / 'out'}", f"out={tmp_path / 'back'}")
    assert code == 0, errors
    words = "the base as training held it (nf4, dequantized and rounded to 16 bits), not the checkpoint embedded"
    assert words in " ".join(shown.split()) and words in (tmp_path / "back" / "README.md").read_text()
    found = json.loads((tmp_path / "run" / "merge.json").read_text())
    assert found["is"] == words and found["candidate"] == "dequantized" and found["bytes"] > 0


def test_original_chosen_by_hand_and_undone_is_the_checkpoint(adapter: Path, tmp_path: Path) -> None:
    code, _, errors = command(adapter, tmp_path, f"out={tmp_path / 'out'}", "merge.candidate=original", "max_kl=10")
    assert code == 0, errors
    code, _, errors = command(adapter, tmp_path, f"merge.unmerge={tmp_path / 'out'}", f"out={tmp_path / 'back'}")
    assert code == 0, errors
    assert "the weights of the checkpoint embedded" in (tmp_path / "back" / "README.md").read_text()
    before, after = load_file(MODEL / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_merge_that_costs_too_much_is_refused_and_writes_nothing(adapter: Path, tmp_path: Path) -> None:
    more = ["max_kl=0", "merge.candidate=requantized"]
    code, shown, errors = command(adapter, tmp_path, f"out={tmp_path / 'out'}", *more)
    assert "requantized ← nearest" in shown and "taken" not in shown
    assert errors.startswith("lorafit merge: requantized is")
    assert code == 2 and len(errors.strip().splitlines()) == 1
    assert "max_kl is 0" in errors and "nothing was written" in errors
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "run" / "merge.json").read_text())["chosen"] == "requantized"


def test_a_folder_that_is_missing_or_taken_is_refused_at_once(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    bad = (tmp_path, tmp_path / "file" / "out", "/proc/foo", "", adapter / "out")
    for more in ([], *([f"out={out}"] for out in bad)):
        code, _, errors = command(adapter, tmp_path, *more)
        assert code == 2 and "out" in errors and len(errors.strip().splitlines()) == 1


def test_another_quant_than_the_adapter_was_trained_over_is_said_and_recorded(adapter: Path, tmp_path: Path) -> None:
    trained = tmp_path / "adapter"
    shutil.copytree(adapter, trained)
    record = json.loads((trained / "lorafit.json").read_text()) if (trained / "lorafit.json").exists() else {}
    (trained / "lorafit.json").write_text(json.dumps(record | {"quant": {"type": "nf4"}}))
    more = [f"out={tmp_path / 'out'}", "quant=none", "max_kl=10", "allow_other_base=true"]
    code, shown, errors = command(trained, tmp_path, *more)
    assert code == 0, errors
    sentence = "The adapter was trained over nf4 and is measured over none."
    assert sentence in " ".join(shown.split()) and sentence in (tmp_path / "out" / "README.md").read_text()
    for path in (tmp_path / "run" / "merge.json", tmp_path / "out" / "lorafit.json"):
        assert json.loads(path.read_text())["trained_over"] == {"quant": "nf4", "now": "none"}
    assert merge.trained_over(trained, {"type": "nf4"}) is None
    assert merge.trained_over(trained, {"type": "nf4", "block_size": 128})["quant"].startswith("nf4 (")  # type: ignore[index]
