"""The benchmark: results are compared before times are, a wrong system gets no ratio, what is not measured is named.

pytest tests/test_bench.py
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from programs import run_program

from lorafit import bench, bench_table, machine, peers, schema
from lorafit.bench import cases, make_source, measure_alone, measure_together, prepare, run_child, shape_options
from lorafit.bench_table import SETTINGS, add_ratios, add_speed, comparisons, kept_rounds, make_rows, spread
from lorafit.peers import Case, Source, Trainee, make_batch

CPU = torch.device("cpu")
SCRIPTS = Path(bench.__file__).parent.parent / "scripts"
LENGTH = 40


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The tiny shape as a model folder."""
    return make_source("tiny", LENGTH, 0, tmp_path_factory.mktemp("source"))


def batch_of(rows: int = 2, masked: float = 0.0) -> dict[str, torch.Tensor]:
    return make_batch(512, rows, LENGTH, masked, 0, CPU)


def request_of(source: Source, given: list[Case], rounds: int = 0) -> dict[str, Any]:
    return {
        "cases": [dataclasses.asdict(case) for case in given],
        "source": dataclasses.asdict(source),
        "device": "cpu",
        "batch": {"rows": 2, "length": LENGTH, "masked": 0.0, "seed": 0},
        "warmup": 1,
        "rounds": rounds,
        "seconds": 60.0,
        "reference": "",
    }


def answered_here(request: Mapping[str, Any], timeout: float | None = None, command: Any = None) -> dict[str, Any]:
    """`run_child` without the child: what a process would answer, a number of seconds sooner."""
    done = {"together": measure_together, "alone": measure_alone}[request["do"]](request)
    return json.loads(json.dumps(done))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "run_child", answered_here)


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change what a system builds: spoil("peft", change) with change(trainee) -> trainee."""

    def spoiled(system: str, change: Callable[[Trainee], Trainee]) -> None:
        right = peers._BUILDERS[system]
        monkeypatch.setitem(peers._BUILDERS, system, lambda *arguments: change(right(*arguments)))

    return spoiled


# ------------------------------------------------------------------------------------------------ the program


def command(folder: Path, *more: str) -> tuple[int, str, str]:
    shared = ["bench.shape=tiny", f"bench.length={LENGTH}", "bench.steps=3", "bench.warmup=1", "model.compile=off"]
    return run_program(bench, *shared, "trainer.accelerator=cpu", f"hydra.run.dir={folder}", *more)


def test_one_command_compares_measures_and_writes(in_process: None, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    settings = "bench.settings=[bf16,nf4_checkpointing,nf4_vs_bf16,head_loss]"
    code, shown, errors = command(tmp_path, settings, "bench.systems=[lorafit,peft,unsloth,transformers]")
    assert code == 0, errors
    found = json.loads((tmp_path / "bench.json").read_text())
    rows = {(row["setting"], row["label"]): row for row in found["rows"]}
    measured = [row for row in rows.values() if row["status"] == "measured"]
    assert len(measured) == len(rows) - 2 and len(rows) == 4 + 5 + 2 + 2  # all but unsloth
    for row in measured:
        assert row["tokens_per_second"] == pytest.approx(2 * LENGTH / row["seconds"]["median"])
        assert row["peak_bytes"] > 0 and 0 < row["share_of_matmul_rate"] < 1
        assert max(row["gradient_errors"].values()) < 0.02 and row["loss_error"] < 0.01
        other = rows[row["setting"], row["compared_with"]]
        assert row["speed_ratio"] == pytest.approx(row["tokens_per_second"] / other["tokens_per_second"])
        assert row["memory_ratio"] == pytest.approx(row["peak_bytes"] / other["peak_bytes"])
    for name in ("bf16", "nf4_checkpointing"):
        two = [rows[name, label] for label in ("peft", "peft bfloat16 adapters")]
        faster = max(two, key=lambda row: row["tokens_per_second"])
        assert {row["compared_with"] for row in measured if row["setting"] == name} == {faster["label"]}
        assert rows[name, "unsloth"]["status"] == "not installed" and rows[name, "unsloth"]["speed_ratio"] is None
    assert rows["nf4_vs_bf16", "lorafit nf4"]["compared_with"] == "lorafit bf16"
    assert rows["nf4_checkpointing", "lorafit full"]["recomputed_share"] >= 0.25
    assert rows["nf4_checkpointing", "lorafit selective"]["recomputed_share"] < 0.1
    assert rows["head_loss", "lorafit compile=off"]["compared_with"] == "transformers"
    assert found["machine"]["load"] >= 0 and "load" in shown
    assert found["machine"]["cpu"] and found["machine"]["threads"] == torch.get_num_threads()
    assert all(rate > 1e8 for pair in found["machine"]["matmul_flops_per_second"].values() for rate in pair)
    assert "not installed" in shown and "unsloth is not installed here" in " ".join(shown.split())
    for name in ("bf16", "nf4_checkpointing", "nf4_vs_bf16", "head_loss"):
        assert SETTINGS[name].title in shown


def test_models_too_large_to_lie_side_by_side_are_timed_each_by_itself(
    in_process: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(bench, "WRITTEN", 0)
    monkeypatch.setitem(bench.SHAPES, "tiny", bench.SHAPES["tiny"] | {"num_hidden_layers": 3})
    code, _, errors = command(tmp_path, "bench.systems=[lorafit,peft]", "bench.settings=[nf4]", "bench.memory=false")
    assert code == 0, errors
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert len(rows) == 3
    for row in rows:
        assert row["status"] == "measured" and row["timed"] == "alone" and row["speed_ratio_quartiles"] is None
        assert row["speed_ratio"] > 0 and row["memory_ratio"] > 0
        # compared in two layers, measured in three
        assert max(row["gradient_errors"].values()) < 0.015
        assert row["adapter_weights"] == 3 * 16 * (4 * (128 + 128) + 3 * (128 + 256))


def test_a_child_process_answers_or_says_why_not(source: Source) -> None:
    case = Case("transformers", "transformers", part="head")
    found = run_child(request_of(source, [case]) | {"do": "alone"})
    assert found["peak_bytes"] > 0 and found["supervised_tokens"] == 2 * (LENGTH - 1)
    found = run_child(request_of(source, [dataclasses.replace(case, system="nobody")]) | {"do": "alone"})
    assert found["failed"] == "exit code 1: KeyError: 'nobody'"


def test_a_child_that_takes_too_long_or_is_killed_is_told_with_what_it_had_written() -> None:
    write = "import json, os, sys, time; r = json.load(sys.stdin); open(r['answer'], 'w').write('{\"first\": 1}'); "
    found = run_child({"do": "together"}, timeout=5, command=("-c", write + "time.sleep(60)"))
    assert found == {"first": 1, "failed": "took longer than 5 seconds"}
    found = run_child({"do": "together"}, command=("-c", write + "os.kill(os.getpid(), 9)"))
    assert found == {"first": 1, "failed": "killed by signal 9"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench.shape=smal"], "Did you mean 'small'"),
        (["bench.settings=[nf5]"], "Did you mean 'nf4'"),
        (["bench.settings=[]"], "bench.settings must name at least one"),
        (["bench.systems=[pefft]"], "Did you mean 'peft'"),
        (["bench.systems=all"], "bench.systems must be auto or a list"),
        (["bench.masked=1"], "bench.masked must be in [0, 1)"),
        (["bench.steps=0"], "bench.steps must be a positive integer"),
        (["bench.length=1"], "bench.length must be an integer above 1"),
        (["bench.tolerance=0"], "bench.tolerance must be a positive number"),
        (["bench.sped=1"], "bench.sped"),
        (["dropout=0.1"], "dropout must be 0"),
        (["quant=nf4"], "bench.settings says which weights are quantized"),
        (["lora/target_modules=qv"], "target_modules must be all_linear"),
        (["model.checkpointing=full"], "bench.settings says what is checkpointed"),
        (["out=x"], "out belongs to"),
    ],
)
def test_what_cannot_be_compared_ends_with_exit_code_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    code, _, errors = run_program(bench, f"hydra.run.dir={tmp_path}", *arguments)
    assert code == 2 and words in errors, errors


def test_the_names_in_the_schema_are_those_of_the_program() -> None:
    assert schema.BENCH_SHAPES == tuple(bench.SHAPES)
    assert set(schema.BENCH_SETTINGS) == set(SETTINGS)
    assert schema.BENCH_SYSTEMS == peers.SYSTEMS
    assert set(peers.SYSTEMS) == set(peers._BUILDERS) | set(peers._HEADS)


def test_a_model_that_is_no_llama_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path / "gpt2")
    code, _, errors = command(tmp_path / "run", f"bench.shape={tmp_path / 'gpt2'}")
    assert code == 2 and "a gpt2 model cannot be compared" in errors


# ------------------------------------------------------------------------------------------------ what is compared


@pytest.mark.parametrize("quant", [False, True])
@pytest.mark.parametrize("system", ["lorafit", "peft", "trl", "litgpt"])
def test_every_system_computes_what_plain_differentiation_does(source: Source, system: str, quant: bool) -> None:
    pytest.importorskip(system)
    if system == "litgpt" and quant:
        pytest.skip("litgpt is compared in 16 bits")
    for masked in (0.0, 0.5):
        batch, case = batch_of(masked=masked), Case(system, system, quant=quant)
        right = peers.reference(case, source, batch)
        assert len(right.gradients) == 2 * 7 * 2 and right.loss == pytest.approx(math.log(512), rel=0.05)
        trainee, found = prepare(case, source, batch, right)
        assert trainee is not None, found
        # bfloat16 rounds by up to 2^-9, some dozens of times
        assert max(found["gradient_errors"].values()) < 0.015 and found["loss_error"] < 0.01
        before = {name: part.parameter.detach().clone() for name, part in trainee.parts.items()}
        trainee.step(batch)
        assert all(not torch.equal(before[name], part.parameter) for name, part in trainee.parts.items())


def test_the_reference_is_the_closed_form_for_a_head() -> None:
    source = Source(config=shape_options("tiny", LENGTH))
    batch = batch_of(masked=0.5)
    right = peers.reference(Case("lorafit", "lorafit", part="head"), source, batch)
    model = peers.HeadAlone(source, batch, torch.float32)
    hidden, weight, labels = model.hidden.detach().double(), model.lm_head.weight.double(), batch["labels"]
    p = (hidden @ weight.T).softmax(-1)
    counted = labels.roll(-1, 1) != -100
    counted[:, -1] = False
    targets = labels.roll(-1, 1).clamp(min=0)
    loss = -p.gather(-1, targets.unsqueeze(-1)).log().squeeze(-1)[counted].mean()
    # d/dx of -log softmax(W x)[t] is Wᵀ (p - onehot(t))
    gradient = (p - torch.nn.functional.one_hot(targets, 512)) @ weight * counted.unsqueeze(-1) / counted.sum()
    assert right.loss == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(right.gradients["hidden"], gradient.float(), rtol=1e-4, atol=1e-7)


def test_errors_of_a_and_b_are_told_apart() -> None:
    right = {"x.lora_A": torch.tensor([3.0, 4.0]), "x.lora_B": torch.tensor([300.0, 400.0])}
    found = {"x.lora_A": torch.tensor([0.0, 4.0]), "x.lora_B": torch.tensor([300.0, 405.0])}
    assert peers.gradient_errors(found, right) == {"lora_A": pytest.approx(0.6), "lora_B": pytest.approx(0.01)}
    assert peers.gradient_errors(found | {"x.lora_A": torch.tensor([math.nan, 4.0])}, right)["lora_A"] == math.inf
    assert set(peers.gradient_errors({"x.lora_A": found["x.lora_A"]}, right).values()) == {math.inf}


def one_wrong_gradient(trainee: Trainee) -> Trainee:
    part, backward = trainee.parts["model.layers.1.mlp.up_proj.lora_A"], trainee.backward

    def wrong(batch: Any) -> torch.Tensor:
        loss = backward(batch)
        assert part.parameter.grad is not None
        part.parameter.grad.mul_(1.5)
        return loss

    return Trainee(trainee.parts, wrong)


def wrong_loss(trainee: Trainee) -> Trainee:
    return Trainee(trainee.parts, lambda batch: trainee.backward(batch) * 1.05)


@pytest.mark.parametrize(("change", "word"), [(one_wrong_gradient, "lora_A"), (wrong_loss, "loss")])
def test_a_system_that_computes_something_else_differs_and_gets_no_ratio(
    in_process: None, spoil: Callable[..., None], tmp_path: Path, change: Any, word: str
) -> None:
    pytest.importorskip("peft")
    spoil("lorafit", change)
    systems = ["bench.systems=[lorafit,peft]", "bench.settings=[bf16]", "bench.memory=false"]
    code, shown, errors = command(tmp_path, *systems)
    assert code == 0, errors
    found = json.loads((tmp_path / "bench.json").read_text())
    wrong, *others = found["rows"]
    assert wrong["label"] == "lorafit compile=off" and wrong["status"] == "differs" and word in wrong["reason"]
    assert wrong["speed_ratio"] is None and wrong["compared_with"] is None and not found["comparisons"]
    assert [row["status"] for row in others] == ["measured", "measured"]
    assert "differs" in shown


@pytest.mark.parametrize("quant", [False, True])
def test_what_a_step_recomputes_is_counted_exactly(source: Source, quant: bool) -> None:
    pytest.importorskip("peft")
    config, batch = source.model_config(), batch_of()
    width, inner = config.hidden_size, config.intermediate_size
    weights = config.num_hidden_layers * (4 * width**2 + 3 * width * inner)
    assert peers.base_weights(config) == weights
    shares = {}
    for checkpointing in ("none", "full"):
        case = Case("peft", "peft", quant=quant, checkpointing=checkpointing)
        shares[checkpointing] = peers.recomputed_share(peers.build(case, source, batch), batch, config, 16)
    # queries, keys and values of the first block pass no gradient on; checkpointing wants one for every input
    assert shares["none"] == pytest.approx(-3 * width**2 / weights)
    assert shares["full"] == pytest.approx(1.0)


@pytest.mark.parametrize(("said", "done"), [("full", "none"), ("none", "full"), ("selective", "full")])
def test_checkpointing_that_is_not_what_it_is_said_to_be_is_caught(source: Source, said: str, done: str) -> None:
    pytest.importorskip("peft")
    right = peers._BUILDERS["peft"]
    with pytest.MonkeyPatch.context() as patch:
        lie: Any = lambda case, *rest: right(dataclasses.replace(case, checkpointing=done), *rest)  # noqa: E731
        patch.setitem(peers._BUILDERS, "peft", lie)
        case = Case("peft", "peft", checkpointing=said)
        trainee, found = prepare(case, source, batch_of(), None)
    assert trainee is None and f"checkpointing is said to be {said}" in found["failed"]


def test_a_system_that_fails_leaves_the_others_measured(source: Source) -> None:
    given = [Case("litgpt", "litgpt", quant=True), Case("lorafit", "lorafit", quant=True)]
    found = measure_together(request_of(source, given, rounds=3))
    assert "failed" in found["cases"]["litgpt"]
    assert list(found["seconds"]) == ["lorafit"] and len(found["seconds"]["lorafit"]) == 3


@pytest.mark.parametrize("quant", [False, True])
def test_a_model_made_on_the_device_layer_by_layer_is_the_same_quantized_or_not(quant: bool) -> None:
    from lorafit.quant import dequantize, is_quantized, linear_layers

    source = Source(config=shape_options("tiny", LENGTH), seed=3)
    plain = peers.random_model(source, False, CPU)
    model = peers.random_model(source, quant, CPU)
    assert all(is_quantized(layer) == (quant and name != "lm_head") for name, layer in linear_layers(model).items())
    layers = linear_layers(plain)
    for name, layer in linear_layers(model).items():
        wide = layers[name].weight.float()
        off = (dequantize(layer).float() - wide).norm() / wide.norm()
        # NF4 with blocks of 64 is about 9 % off a normal distribution (QLoRA, section 2)
        assert 0.08 < off < 0.1 if quant and name != "lm_head" else off == 0
        assert wide.std() == pytest.approx(0.02, rel=0.1)
    batch = batch_of()
    assert model(input_ids=batch["input_ids"]).logits.isfinite().all()


# ------------------------------------------------------------------------------------------------ what samples mean


def row_of(label: str, system: str, rounds: list[float], peak: int, status: str = "measured") -> dict[str, Any]:
    known = {"label": label, "system": system, "rounds": rounds, "peak_bytes": peak, "status": status}
    return dict.fromkeys(bench_table._NUMBERS) | known | {"timed": "interleaved", "part": "step", "setting": "bf16"}


MODEL = {"base": 1000, "head": 100, "num_hidden_layers": 2, "attention_width": 8}


def test_ratios_are_those_of_the_medians_to_the_faster_of_two() -> None:
    rows = [
        row_of("lorafit", "lorafit", [1.0, 2.0, 1.0, 4.0, 1.0], 300),
        row_of("peft", "peft", [3.0, 5.0, 3.0, 9.0, 3.0], 900),
        row_of("peft bfloat16 adapters", "peft", [2.0, 3.0, 2.0, 8.0, 2.0], 600),
        row_of("trl", "trl", [4.0, 4.0, 4.0, 4.0, 4.0], 1200),
        row_of("wrong", "litgpt", [0.1] * 5, 1, status="differs"),
    ]
    for row in rows:
        row |= {"adapter_weights": 50, "supervised_tokens": 60, "matmul_rates": [1e6, 3e6]}
        add_speed(row, MODEL, tokens=64, length=32)
    add_ratios(rows, "peft")
    assert [row["tokens_per_second"] for row in rows] == [64.0, 64 / 3, 32.0, 16.0, 640.0]
    assert [row["speed_ratio"] for row in rows] == [2.0, pytest.approx(2 / 3), 1.0, 0.5, None]
    assert [row["memory_ratio"] for row in rows] == [0.5, 1.5, 1.0, 2.0, None]
    assert {row["compared_with"] for row in rows[:4]} == {"peft bfloat16 adapters"}
    # round by round: 2, 1.5, 2, 2, 2
    assert rows[0]["speed_ratio_quartiles"] == [2.0, 2.0]
    flops = 4 * 1000 * 64 + 4 * 100 * 60 + 6 * 50 * 64 + 6 * 2 * 64 * 32 * 8
    assert rows[0]["share_of_matmul_rate"] == pytest.approx(flops / 1.0 / 2e6)
    found = {one["against"]: one for one in comparisons(rows)}
    assert set(found) == {"peft bfloat16 adapters", "trl"}
    assert (found["trl"]["speed_ratio"], found["trl"]["memory_ratio"]) == (4.0, 0.25)


def test_without_anything_to_compare_with_there_is_no_ratio() -> None:
    rows = [row_of("lorafit", "lorafit", [1.0], 10)]
    rows[0] |= {"tokens_per_second": 1.0}
    add_ratios(rows, "peft")
    assert rows[0]["speed_ratio"] is None and comparisons(rows) == []


def test_a_round_in_which_somebody_was_held_up_is_dropped_for_all_and_told() -> None:
    seconds = {"a": [1.0, 1.1, 0.9, 3.1, 1.0], "b": [5.0, 5.0, 16.0, 5.0, 5.0]}
    assert kept_rounds(seconds) == [0, 1, 4]
    both = [Case("lorafit", "a"), Case("peft", "b")]
    found = {"adapter_weights": 1, "recomputed_share": 0.0}
    timed = {"seconds": seconds, "cases": {"a": found, "b": found}, "matmul_rates": [1.0, 1.0], "supervised_tokens": 1}
    rows = make_rows("bf16", both, {"a": None, "b": None}, timed, {}, 0.03)
    assert [row["rounds"] for row in rows] == [[1.0, 1.1, 1.0], [5.0, 5.0, 5.0]]
    assert [row["dropped"] for row in rows] == [2, 2]


def test_the_spread_is_the_median_with_quartiles() -> None:
    samples = [4.0, 1.0, 3.0, 2.0, 5.0]
    assert spread(samples) == {"median": 3.0, "low": 2.0, "high": 4.0, "min": 1.0, "max": 5.0}
    assert spread([2.0, 1.0]) == {"median": 1.5, "low": 1.0, "high": 2.0, "min": 1.0, "max": 2.0}


def test_everybody_takes_a_step_in_turn_until_the_time_is_up() -> None:
    order: list[str] = []
    steps = {name: (lambda name=name: order.append(name) or 0.5) for name in "abc"}  # type: ignore[misc]
    assert bench.interleave(steps, 4, 60.0) == {name: [0.5] * 4 for name in "abc"}
    assert order == list("abc") * 4
    assert len(bench.interleave(steps, 100, 0.0)["a"]) == 3


def test_the_settings_hold_the_rows_that_are_to_be_compared() -> None:
    systems = list(peers.SYSTEMS)
    labels = {name: [case.label for case in cases(name, systems, "auto", 8, 16)] for name in SETTINGS}
    peft = ["peft", "peft bfloat16 adapters"]
    assert labels["bf16"] == ["lorafit", "lorafit compile=off", *peft, "trl", "unsloth", "litgpt"]
    assert labels["nf4_checkpointing"] == ["lorafit selective", "lorafit full", *peft, "trl", "unsloth"]
    assert labels["head_loss"] == ["lorafit", "lorafit compile=off", "transformers"]
    for name, setting in SETTINGS.items():
        for case in cases(name, systems, "off", 8, 16):
            assert (case.rank, case.alpha, case.compile) == (8, 16, "off")
            if name != "nf4_vs_bf16":
                assert case.quant == setting.quant
            assert (case.checkpointing != "none") == setting.checkpointing


# ------------------------------------------------------------------------------------------------ the machine


def test_rates_are_work_over_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1.0, 3.0, 3.0, 8.0])  # calls of 1, 2 and 5 seconds
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    assert machine.matmul_rate(CPU, torch.float32, size=64, seconds=1.0) == 2 * 64**3 / 2.0


def test_the_memory_of_a_step_is_what_it_takes_above_the_idle() -> None:
    class Step:
        def step(self, batch: Any) -> None:
            torch.ones(64 * 2**20, dtype=torch.uint8)

    found = bench.step_memory(Step(), {"input_ids": torch.zeros(1)}, 1)  # type: ignore[arg-type]
    if sys.platform != "linux":
        pytest.skip("the peak of a process can be reset on Linux alone")
    assert found["peak_bytes"] == pytest.approx(64 * 2**20, rel=0.1)


# ------------------------------------------------------------------------------------------------ the scripts


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Load a script; run its main with arguments, its child processes in this one."""

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)

        def answered(request: Mapping[str, Any], timeout: float | None = None, command: Any = None) -> dict[str, Any]:
            if command is None:
                return answered_here(request)
            answer = tmp_path / "answer.json"
            monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(dict(request) | {"answer": str(answer)})))
            module.child()
            return json.loads(answer.read_text())

        monkeypatch.setattr(module, "run_child", answered)
        return module

    yield load


def test_the_gpu_benchmark_is_rehearsed_on_the_cpu(
    script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    module, out = script("gpu_bench"), tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu_bench", "--rehearse", "--no-tests", "--out", str(out), "--only", "nf4"])
    assert module.main() == 0
    found = json.loads(out.read_text())
    assert {(row["system"], row["length"]) for row in found["rows"]} == {
        (system, length) for system in ("lorafit", "peft") for length in (40, 80)
    }
    for row in found["rows"]:
        assert "failed" not in row and row["tokens_per_second"] > 0 and row["peak_bytes"] > 0 and row["speed_ratio"] > 0
    errors = [max(one["gradient_errors"].values()) for one in found["compared"]["tiny"].values()]
    assert len(errors) == 3 and max(errors) < 0.015
    # on a CPU nothing is paged, and it says so
    assert found["paging"]["paged_bytes"] == 0 and found["paging"]["state_bytes"] > 0


def test_out_of_memory_at_one_length_leaves_the_other_rows(
    script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = script("gpu_bench")
    whole = module.step_memory

    def runs_out(trainee: Any, batch: Any, warmup: int) -> Any:
        if batch["input_ids"].shape[1] == 40:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(trainee, batch, warmup)

    monkeypatch.setattr(module, "step_memory", runs_out)
    case = Case("lorafit", "lorafit", quant=True, checkpointing="selective")
    rows = module.measure(module.REHEARSAL, "name", "tiny", case, module.Clock(5), tmp_path)
    assert rows[0]["failed"] == "out of memory: CUDA out of memory." and "tokens_per_second" not in rows[0]
    assert rows[1]["tokens_per_second"] > 0


def test_the_gpu_benchmark_says_that_there_is_no_gpu(
    script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script("gpu_bench")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_bench"])
    assert module.main() == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_growth_is_fitted_and_drawn(
    script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = script("plot_scaling")
    line = module.fit([1.0, 2.0, 3.0], [5.0, 7.0, 9.0])
    assert line == {"slope": pytest.approx(2.0), "intercept": pytest.approx(3.0), "residual": pytest.approx(0.0)}
    assert module.fit([0.0, 1.0, 2.0], [0.0, 3.0, 0.0])["residual"] == pytest.approx(2 / 3)
    sizes = ["--tokens", "40", "80", "--vocabularies", "512", "1024", "--length", "40", "--shape", "tiny"]
    monkeypatch.setattr(sys, "argv", ["plot_scaling", *sizes, "--rounds", "1", "--out", str(tmp_path / "scaling")])
    module.main()
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert [point["tokens"] for point in found["tokens"]["points"]] == [40, 80]
    assert [point["vocabulary"] for point in found["vocabulary"]["points"]] == [512, 1024]
    assert all(statistics.median(point["rounds"]) == point["seconds"] for point in found["tokens"]["points"])
    drawn = ElementTree.parse(tmp_path / "scaling.svg")
    assert len(drawn.findall(".//{http://www.w3.org/2000/svg}circle")) == 8
