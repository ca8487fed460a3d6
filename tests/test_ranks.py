"""lorafit.ranks finds the rank that was planted, recommends one that keeps the gain, and writes what it measured.

pytest tests/test_ranks.py
"""

from __future__ import annotations

import json
import logging
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import run_program
from torch import nn
from transformers import LlamaForCausalLM

import lorafit.ranks
import lorafit.train
from lorafit.adapter import load_adapter, read_record, save_adapter
from lorafit.build import build_data
from lorafit.config import compose
from lorafit.evaluation import evaluate_loss
from lorafit.inject import adapters_off, inject_lora, lora_layers, lora_state_dict
from lorafit.loading import load_base_model
from lorafit.measuring import retention_text
from lorafit.ranks import even_ranks, ranks_picture, ranks_tables, recommend, study, untried, verdict
from lorafit.spectrum import cut
from lorafit.terminal import human

TinyLlama = Callable[..., LlamaForCausalLM]
QUICK = (
    *("task.eval_examples=16", "task.generate_examples=1", "task.max_new_tokens=4", "task.samples=0"),
    *("data.batch_size=8", f"task.retention_path={Path(__file__).with_name('programs.py')}"),
)


@torch.no_grad()
def plant(model: nn.Module, rank: int, size: float = 0.05) -> None:
    """Give every LoRA layer an update of exactly this rank, its directions mixed through all of its factors."""
    for layer in lora_layers(model).values():
        used = min(rank, layer.rank)
        mixer = torch.linalg.qr(torch.randn(layer.rank, layer.rank)).Q
        B, A = torch.randn(layer.lora_B.out_features, used), torch.randn(used, layer.lora_A.in_features)
        layer.lora_B.weight.copy_(B @ mixer[:used] * size)
        layer.lora_A.weight.copy_(mixer[:used].T @ A / layer.lora_A.in_features**0.5)


def planted(folder: Path, rank: int = 3, **options: Any) -> Path:
    model = load_base_model("embedded")
    inject_lora(model, **({"rank": 8, "alpha": 16} | options))
    plant(model, rank)
    save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return planted(tmp_path_factory.mktemp("planted") / "three")


def ranks(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """(ranks.json, what was printed) of one run into `folder`."""
    code, out, err = run_program(lorafit.ranks, *QUICK, f"hydra.run.dir={folder}", *arguments)
    assert (code, err) == (0, "")
    return json.loads((folder / "ranks.json").read_text()), out


# -------------------------------------------------------------------------------------------------- arithmetic


def test_ranks_are_tried_in_even_steps_below_the_whole() -> None:
    assert even_ranks(64) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]
    assert even_ranks(5) == [1, 2, 3, 4]
    assert even_ranks(1) == []


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({1: 3.0, 2: 1.05, 4: 1.005, 8: 1.0}, 4),
        ({1: 1.001, 2: 1.0, 4: 1.0, 8: 1.0}, 1),
        ({1: 1.0, 2: 2.0, 4: 0.9, 8: 1.0}, 4),  # a lucky smaller rank does not count
        ({1: 3.0, 2: 3.0, 4: 3.0, 8: 1.0}, 8),
        ({1: 3.0, 2: math.nan, 4: 1.0, 8: 1.0}, 4),
        ({8: 1.0}, 8),
    ],
)
def test_recommended_is_the_smallest_rank_from_which_on_the_gain_is_kept(
    losses: dict[int, float], expected: int
) -> None:
    assert recommend(losses, base_loss=2.0, full_loss=1.0, kept=0.99) == expected


@pytest.mark.parametrize("base_loss", [1.0, 0.5, math.nan, math.inf])
def test_without_a_gain_no_rank_is_recommended_by_loss(base_loss: float) -> None:
    assert recommend({1: 1.0, 8: 1.0}, base_loss, 1.0, 0.99) is None
    assert untried({1: 1.0, 8: 1.0}, base_loss, 1.0, 0.99) is None


@pytest.mark.parametrize("needed", range(1, 65))
def test_bisecting_finds_the_rank_that_is_needed_whichever_it_is(needed: int) -> None:
    losses = {rank: 1.0 if rank >= needed else 1.5 for rank in [*even_ranks(64), 64]}
    while (rank := untried(losses, 2.0, 1.0, 0.99)) is not None:
        assert rank not in losses
        losses[rank] = 1.0 if rank >= needed else 1.5
    assert recommend(losses, 2.0, 1.0, 0.99) == needed
    assert len(losses) <= 16


# ------------------------------------------------------------------------------------------------------ a study


def fake_loss(model: Any, directions: int) -> Callable[[], float]:
    """2 for the base, and 1 for what has at least so many directions in its first layer."""

    def loss() -> float:
        layers = list(lora_layers(model).values())
        if not layers:
            return 2.0
        return 1.0 if int(torch.linalg.matrix_rank(layers[0].delta_weight(), rtol=1e-4)) >= directions else 1.8

    return loss


@pytest.mark.parametrize("options", [{}, {"variant": "rslora"}])
def test_a_study_measures_every_rank_on_the_model_and_leaves_it_as_it_was(
    tiny_llama: TinyLlama, options: dict[str, Any]
) -> None:
    model = tiny_llama()
    inject_lora(model, rank=16, alpha=32, **options)
    plant(model, 7)
    before = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    found = study(model, fake_loss(model, 5))
    assert {module["effective_rank"] for module in found["modules"].values()} == {7}
    assert found["recommended_rank"] == 5
    assert found["loss_by_rank"][4] == 1.8
    assert found["loss_by_rank"][5] == found["loss_by_rank"][16] == found["full_loss"] == 1.0
    assert list(found["loss_by_rank"]) == sorted(found["loss_by_rank"])
    assert (found["base_loss"], found["gains"]) == (2.0, True)
    parameters = sum(tensor.numel() for tensor in before.values())
    assert found["parameters"] == {"now": parameters, "recommended": parameters * 5 // 16}
    for name, module in found["modules"].items():
        assert len(module["energy"]) == module["rank"] == 16
        assert module["energy"][6] == pytest.approx(1.0, abs=1e-9)
        ranks_at = found["energy_ranks"]["0.9"]["ranks"]
        assert module["energy"][ranks_at[name] - 1] >= 0.9
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora_state_dict(model).items())


def test_layers_of_several_ranks_are_studied_under_the_highest(tiny_llama: TinyLlama) -> None:
    model = tiny_llama()
    inject_lora(model, rank=4, alpha=8, rank_pattern={"down_proj": 12}, target_modules=["down_proj", "embed_tokens"])
    plant(model, 3)
    found = study(model, fake_loss(model, 3))
    assert {name.rpartition(".")[2]: module["rank"] for name, module in found["modules"].items()} == {
        "down_proj": 12,
        "embed_tokens": 4,
    }
    assert {module["effective_rank"] for module in found["modules"].values()} == {3}
    assert found["recommended_rank"] == 3
    assert max(found["loss_by_rank"]) == 12


def test_an_adapter_that_gains_nothing_gets_its_largest_effective_rank_and_is_told_so(tiny_llama: TinyLlama) -> None:
    model = tiny_llama()
    inject_lora(model, rank=8, alpha=8)
    found = study(model, lambda: 1.5)  # all layers are still zero
    assert (found["gains"], found["recommended_rank"]) == (False, 1)
    plant(model, 6)
    found = study(model, lambda: 1.5)
    assert (found["gains"], found["recommended_rank"]) == (False, 6)
    assert "gains nothing" in verdict(found)
    assert ranks_tables(found)
    ET.fromstring(ranks_picture(found))


# ----------------------------------------------------------------------------------------------------- a picture


def test_the_picture_is_valid_and_needs_nothing_else(tiny_llama: TinyLlama) -> None:
    model = tiny_llama()
    inject_lora(model, rank=8, alpha=8)
    plant(model, 5)
    found = study(model, fake_loss(model, 3))
    found["modules"]["a<b>&\"c'.7.x"] = next(iter(found["modules"].values()))  # escaped
    picture = ranks_picture(found)
    root = ET.fromstring(picture)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", "")
    assert "prefers-color-scheme: dark" in picture
    names = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert names.count("circle") == len(found["loss_by_rank"])
    assert names.count("polyline") == 1 + len(found["modules"])
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"recommended: 3", "base 2", "whole 1"} <= set(words)
    left, top, width, height = map(float, root.attrib["viewBox"].split())
    for element in root.iter():
        assert left <= float(element.get("x", element.get("cx", 0))) <= width
        assert "nan" not in str(element.attrib)


def test_losses_that_are_not_finite_leave_a_valid_picture(tiny_llama: TinyLlama) -> None:
    model = tiny_llama()
    inject_lora(model, rank=4, alpha=4)
    plant(model, 2)
    for loss in (math.nan, math.inf):
        found = study(model, lambda loss=loss: loss)
        assert "nan" not in ranks_picture(found).lower().partition("<rect")[2]
        ET.fromstring(ranks_picture(found))
        assert ranks_tables(found)


# ----------------------------------------------------------------------------------------------------- a program


def test_a_planted_rank_is_found_through_the_program(adapter: Path, tmp_path: Path) -> None:
    found, out = ranks(tmp_path, f"adapter={adapter}")
    assert len(found["modules"]) == 28
    assert {module["effective_rank"] for module in found["modules"].values()} == {3}
    assert {module["rank"] for module in found["modules"].values()} == {8}
    assert found["recommended_rank"] <= 3
    assert found["loss_by_rank"]["3"] == pytest.approx(found["full_loss"], rel=1e-2)  # bfloat16
    assert found["loss_by_rank"]["8"] == found["full_loss"]
    assert "q_proj" in out
    assert "recommended" in out
    ET.parse(tmp_path / "ranks.svg")


def test_losses_are_those_of_the_data_of_the_run(adapter: Path, tmp_path: Path) -> None:
    found, _ = ranks(tmp_path, f"adapter={adapter}")
    data = build_data(compose([*QUICK]))
    data.setup()
    model: Any = load_base_model("embedded").eval()
    load_adapter(model, adapter)
    assert found["full_loss"] == pytest.approx(evaluate_loss(model, data.eval_batches())["loss"], rel=1e-6)
    with adapters_off(model):
        assert found["base_loss"] == pytest.approx(evaluate_loss(model, data.eval_batches())["loss"], rel=1e-6)
    cut(model, rank=2)
    assert found["loss_by_rank"]["2"] == pytest.approx(evaluate_loss(model, data.eval_batches())["loss"], rel=1e-2)


@pytest.mark.parametrize(
    ("options", "files"),
    [
        (["rank=2"], {"adapter_model.safetensors"}),
        ([], {"adapter_model.safetensors"}),
        (["energy=0.9", "save.dtype=int8"], {"adapter_model.int8.safetensors"}),
    ],
)
def test_the_smaller_adapter_is_what_was_measured(
    adapter: Path, tmp_path: Path, options: list[str], files: set[str]
) -> None:
    out = tmp_path / "small"
    found, printed = ranks(tmp_path / "run", f"adapter={adapter}", f"out={out}", *options)
    assert {path.name for path in out.glob("*.safetensors")} == files
    model: Any = load_base_model("embedded").eval()
    load_adapter(model, out)
    assert {name: layer.rank for name, layer in lora_layers(model).items()} == found["cut"]["ranks"]
    if "rank=2" in options:
        assert set(found["cut"]["ranks"].values()) == {2}
    if not options:
        assert set(found["cut"]["ranks"].values()) == {found["recommended_rank"]}
    parameters = sum(tensor.numel() for tensor in lora_state_dict(model).values())
    assert found["cut"]["parameters"] == parameters
    data = build_data(compose([*QUICK]))
    data.setup()
    loss = evaluate_loss(model, data.eval_batches())["loss"]
    assert found["cut"]["smaller"]["loss"] == pytest.approx(loss, rel=1e-6)
    record = read_record(out)
    assert record["metrics"]["after"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert record["metrics"]["before"]["loss"] == pytest.approx(found["base_loss"], rel=1e-6)
    assert record["cut_from"]["rank"] == 8
    assert record["cut_from"]["loss"] == pytest.approx(found["full_loss"], rel=1e-6)
    assert f"{loss:.4g}" in (out / "README.md").read_text()
    [weights] = out.glob("*.safetensors")
    assert found["cut"]["bytes"] == weights.stat().st_size
    share = f"{parameters / found['parameters']['now']:.0%} of the parameters"
    assert f"{share}, {human(weights.stat().st_size)})" in " ".join(printed.split())


def test_layers_of_several_ranks_and_embeddings_are_cut_and_read_back(tmp_path: Path) -> None:
    targets = ["q_proj", "down_proj", "embed_tokens"]
    source = planted(tmp_path / "a", rank=5, target_modules=targets, rank_pattern={"q_proj": 3}, variant="rslora")
    out = tmp_path / "small"
    found, _ = ranks(tmp_path / "run", f"adapter={source}", f"out={out}", "rank=4")
    model: Any = load_base_model("embedded").eval()
    load_adapter(model, out)
    kinds = {name.rpartition(".")[2]: layer.rank for name, layer in lora_layers(model).items()}
    assert kinds == {"q_proj": 3, "down_proj": 4, "embed_tokens": 4}
    assert found["cut"]["smaller"]["loss"] == pytest.approx(found["loss_by_rank"]["4"], rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out=OUT", "rank=9"], "rank=9 is above the adapter's own, which is 8"),
        (["out=OUT", "rank=2", "energy=0.9"], "rank=2 and energy=0.9 are two ways"),
        (["out=OUT", "energy=1.5"], "energy must be in (0, 1], got 1.5"),
        (["out=OUT", "rank=0"], "rank must be"),
        (["rank=2"], "rank=2 says how to cut the adapter, not where to"),
        (["energy=0.9"], "energy=0.9 says how to cut the adapter, not where to"),
        (["out=FULL"], "exists and is not empty"),
        (["out="], "out is empty"),
        (["out=FULL/file/small"], "cannot be made"),
        (["out=ADAPTER/small"], "which is read"),
        (["prompt=x"], "prompt belongs to generate; ranks does not take it"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    adapter: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    places = {"OUT": str(tmp_path / "out"), "FULL": str(tmp_path / "full"), "ADAPTER": str(adapter)}
    for word, place in places.items():
        arguments = [argument.replace(word, place) for argument in arguments]
    run = f"hydra.run.dir={tmp_path / 'run'}"
    code, _, err = run_program(lorafit.ranks, *QUICK, run, f"adapter={adapter}", *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_one_adapter_is_looked_at_and_it_has_to_be_there(adapter: Path, tmp_path: Path) -> None:
    run = f"hydra.run.dir={tmp_path / 'run'}"
    code, _, err = run_program(lorafit.ranks, run, f"adapter={{one: {adapter}, two: {adapter}}}")
    assert (code, "one adapter at a time, got 2" in err) == (2, True)
    code, _, err = run_program(lorafit.ranks, run)
    assert (code, "give adapter=DIR" in err) == (2, True)


def test_a_trained_adapter_of_rank_64_cut_to_what_is_recommended_loses_less_than_a_hundredth(tmp_path: Path) -> None:
    arguments = (
        "rank=64",
        "trainer.max_steps=20",
        "data.batch_size=8",
        "model.dtype=float32",
        "logger=none",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    options = (*QUICK[1:4], "task.eval_examples=24", QUICK[-1])
    code, _, err = run_program(lorafit.train, *arguments, *options)
    assert code == 0, err
    out = tmp_path / "small"
    code, _, err = run_program(
        lorafit.ranks, f"adapter={tmp_path / 'run' / 'adapter'}", f"out={out}", f"hydra.run.dir={tmp_path / 'ranks'}"
    )
    assert code == 0, err
    found = json.loads((tmp_path / "ranks" / "ranks.json").read_text())
    gain = found["base_loss"] - found["full_loss"]
    assert gain > 1
    assert found["recommended_rank"] <= 16
    model: Any = load_base_model("embedded", dtype="float32").eval()
    load_adapter(model, out)
    assert {layer.rank for layer in lora_layers(model).values()} == {found["recommended_rank"]}
    data = build_data(compose([*options, "data.batch_size=8"]))
    data.setup()
    lost = evaluate_loss(model, data.eval_batches())["loss"] - found["full_loss"]
    assert lost < 0.01 * gain
    record, source = read_record(out), read_record(tmp_path / "run" / "adapter")
    assert record["settings"] == source["settings"]
    assert record["cut_from"]["rank"] == 64


def test_a_long_text_to_measure_retention_on_is_no_cause_for_a_warning(tmp_path: Path) -> None:
    """The tokenizer warns of more tokens than the model reads at once; here they are read in windows."""
    long = tmp_path / "long.txt"
    long.write_text("one word after another. " * 2000)
    config = compose([f"task.retention_path={long}"])
    data = build_data(config)
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        tokens = retention_text(config, data)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert len(tokens[0]) > data.tokenizer.model_max_length
    assert not said
