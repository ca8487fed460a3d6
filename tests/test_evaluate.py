"""What evaluate measures is what training measured, by the real command; the base beside every adapter.

pytest tests/test_evaluate.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import run_program
from torch import nn

from lorafit import evaluate, train
from lorafit.adapter import save_adapter
from lorafit.embedded import MODEL
from lorafit.inject import inject_lora, lora_layers
from lorafit.loading import load_base_model

# little to measure on, so that a test is a few seconds
LITTLE = ("task.eval_examples=8", "task.generate_examples=4", "task.samples=2", "task.max_new_tokens=4")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short real run, which measured on little."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    text = folder.parent / "other.txt"
    text.write_text("The capital of Wenessa is Istgate. The merchants of Wenessa sell pottery.")
    code, _, err = run_program(
        train,
        *("experiment=smoke", "logger=none", "trainer.max_steps=20", "data.limit=200", "data.eval_fraction=0.1"),
        *(*LITTLE, f"task.retention_path={text}", f"hydra.run.dir={folder}"),
    )
    assert code == 0, err
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the same base that was not trained by a run."""
    model = load_base_model("embedded", device="cpu")
    torch.manual_seed(0)
    inject_lora(model, rank=2, alpha=4)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora_B.weight, std=0.05)
    folder = tmp_path_factory.mktemp("adapters") / "drawn"
    save_adapter(model, folder)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def evaluated(*overrides: str) -> tuple[int, str, str, dict[str, Any], list[dict[str, Any]]]:
    code, out, err = run_program(evaluate, "hydra.run.dir=run", *overrides)
    found = json.loads(Path("run/evaluate.json").read_text()) if code == 0 else {}
    lines = Path("run/samples.jsonl").read_text().splitlines() if code == 0 else []
    return code, out, err, found, [json.loads(line) for line in lines]


def test_the_adapter_alone_says_what_to_measure_and_the_numbers_are_those_of_its_training(trained: Path) -> None:
    code, out, err, found, samples = evaluated(f"adapter={trained / 'adapter'}")
    assert code == 0, err
    metrics = json.loads((trained / "metrics.json").read_text())
    assert found["adapter_off"] == metrics["before"]
    assert found["adapter_on"] == pytest.approx(metrics["after"], rel=1e-6)
    assert found["retention"] == pytest.approx(metrics["retention"], rel=1e-6)
    assert found["adapter_on"]["loss"] < found["adapter_off"]["loss"]
    assert (found["adapter"], found["eval_examples"]) == ("first", 8) and "adapters" not in found
    assert samples == [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()]
    assert "adapter off" in out and "adapter on" in out and err == ""


def test_several_adapters_are_measured_over_one_base_each_as_alone(trained: Path, other: Path) -> None:
    first, second = trained / "adapter", other
    code, out, err, found, samples = evaluated(f"adapter=[{first},{second}]")
    assert code == 0, err
    assert list(found["adapters"]) == ["first", "drawn"]
    assert found["adapters"]["first"] == found["adapter_on"] | {"retention": found["retention"]}
    assert "drawn" in out
    settings = ("data.limit=200", "data.eval_fraction=0.1", *LITTLE, f"task.retention_path={trained.parent}/other.txt")
    alone = evaluated(f"adapter={second}", *settings)
    assert alone[0] == 0, alone[2]
    assert found["adapters"]["drawn"] == alone[3]["adapter_on"] | {"retention": alone[3]["retention"]}
    assert found["adapter_off"] == alone[3]["adapter_off"]
    for row, lone in zip(samples, alone[4], strict=True):
        assert set(row["adapters"]) == {"first", "drawn"}
        assert row["after"] == row["adapters"]["first"] and row["adapters"]["drawn"] == lone["after"]


def test_an_adapter_whose_loss_is_not_finite_is_measured_and_named(other: Path, tmp_path: Path) -> None:
    """Every number of it is finite."""
    model = load_base_model("embedded", device="cpu")
    inject_lora(model, rank=2, alpha=4)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_A.weight.fill_(1e30)
            layer.lora_B.weight.fill_(1e30)
    save_adapter(model, tmp_path / "huge")
    code, out, err, *_ = evaluated(f"adapter=[{other},{tmp_path / 'huge'}]", *LITTLE)
    assert code == 3 and "with huge the held-out loss is not finite" in err and "Traceback" not in out + err
    measured = json.loads(Path("run/evaluate.json").read_text())["adapters"]
    assert measured["drawn"]["loss"] > 0 and measured["huge"]["loss"] is None


def test_other_rows_can_be_measured_on(trained: Path) -> None:
    rows = [{"prompt": f"Say {word}.", "completion": word} for word in ("cat", "dog", "tin")]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err, found, samples = evaluated(f"adapter={trained / 'adapter'}", "data.eval_path=rows.jsonl")
    assert code == 0, err
    assert found["eval_examples"] == 3 and [row["reference"] for row in samples] == ["cat", "dog", "tin"]


def test_the_base_of_another_model_is_refused_before_anything_is_measured(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_base_model("embedded", device="cpu")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path / "model")
    for file in MODEL.glob("tokenizer*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(evaluate, "measure", lambda *_: pytest.fail("something is measured"))
    code, _, err, *_ = evaluated(f"adapter={trained / 'adapter'}", f"model.name={tmp_path / 'model'}")
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("lorafit evaluate: adapter ") and "was trained on another base" in err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [([], "adapter is not set: give adapter=DIR"), (["adapter=nowhere"], "nowhere")],
)
def test_without_an_adapter_there_is_nothing_to_evaluate(overrides: list[str], said: str) -> None:
    code, _, err, *_ = evaluated(*overrides)
    assert code == 2 and said in err and err.count("\n") == 1
