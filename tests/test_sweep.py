"""A job of a sweep is the same run as the job alone; what is done stays done, what was begun goes on.

pytest tests/test_sweep.py

All sweeps here run in this process, as under LORAFIT_IN_PROCESS; tests/test_supervisor.py has those that are killed.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import functools
import gc
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.experimental.callback import Callback
from hypothesis import given, settings, strategies as st
from programs import run_program
from transformers import LlamaConfig, LlamaForCausalLM

from lorafit import launch, sweep, train, training
from lorafit.adapter import load_adapter
from lorafit.build import build_data, load_module
from lorafit.checkpoint import load_checkpoint
from lorafit.config import CONF, Config, compose
from lorafit.embedded import MODEL
from lorafit.errors import DivergedError, InputError, MemoryExhausted, Stopped
from lorafit.evaluation import evaluate_loss
from lorafit.files import write_json
from lorafit.inject import lora_layers
from lorafit.loading import load_base_model
from lorafit.module import FinetuneModule
from lorafit.spectrum import cut
from lorafit.supervisor import Roll
from lorafit.sweep import Job, Shared, alone, recorded_result

TINY = (
    *(
        "trainer.max_steps=4",
        "trainer.val_check_interval=2",
        "trainer.log_every_n_steps=1",
        "trainer.accelerator=cpu",
        "data.batch_size=4",
    ),
    *("task.generate_examples=4", "task.eval_examples=8", "task.max_new_tokens=4", "task.samples=0"),
    *("task.retention_path=general.txt", "callbacks=none", "logger=none"),
)
TIMED = ("per_second", "seconds", "peak_bytes")  # what depends on when and where a run was


def program(*arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python -m lorafit.train`, in this process."""
    return run_program(train, *TINY, *arguments)


@functools.cache
def _composed(*overrides: str) -> Config:
    return compose([*TINY, *overrides])


def tiny(*overrides: str) -> Config:
    """The configuration of those overrides."""
    return copy.deepcopy(_composed(*overrides))


def done(*arguments: str) -> str:
    """What a command printed that did all it was asked to."""
    code, out, err = program(*arguments)
    assert code == 0, err
    return out


def prepare(folder: Path) -> Path:
    (folder / "general.txt").write_text("Bees tell each other where flowers are by dancing on the comb.")
    return folder


@pytest.fixture(autouse=True, scope="module")
def little_to_look_through() -> Iterator[None]:
    """After each job what it left is collected; what is there before has nothing to be collected."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(prepare(tmp_path))


@pytest.fixture(autouse=True)
def shared(monkeypatch: pytest.MonkeyPatch) -> Shared:
    """What the jobs of one test have in common, and those of no other."""
    monkeypatch.setattr(train, "_SHARED", Shared())
    return train._SHARED


def metrics_of(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "metrics.json").read_text())


def statuses(folder: str | Path) -> dict[str, str]:
    return {path.parent.name: metrics_of(path.parent)["status"] for path in Path(folder).glob("*/metrics.json")}


def numbers(folder: str | Path) -> dict[str, Any]:
    """All of metrics.json but for times and the peak of the process."""

    def plain(values: dict[str, Any]) -> dict[str, Any]:
        return {
            key: plain(value) if isinstance(value, dict) else value
            for key, value in values.items()
            if not any(word in key for word in TIMED)
        }

    return plain(metrics_of(folder))


def curve(folder: str | Path) -> list[dict[str, Any]]:
    """What a run has logged but for times; memory is measured anew when a run goes on."""
    rows = [json.loads(line) for line in (Path(folder) / "history.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in row.items() if not any(word in key for word in TIMED)} for row in rows]
    return [row for row in kept if not any(key.startswith("memory/") for key in row)]


def products(folder: str | Path) -> dict[str, bytes]:
    """The files that a run is for, byte for byte."""
    folder = Path(folder)
    return {path.name: path.read_bytes() for path in (*(folder / "adapter").iterdir(), folder / "samples.jsonl")}


def assert_same(one: str | Path, other: str | Path) -> None:
    mine, theirs = products(one), products(other)
    assert {"adapter_config.json", "lorafit.json", "samples.jsonl"} <= set(mine) and len(mine) >= 5
    assert {name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)} == set()
    assert numbers(one) == numbers(other)
    assert curve(one) == curve(other) and len(curve(one)) >= metrics_of(one)["speed"]["steps"]


def at_step(patch: pytest.MonkeyPatch, act: Callable[[FinetuneModule, int], object]) -> list[tuple[int, int]]:
    """Call `act(module, step)` before every training step of this process; returns the list of (rank, step) so far."""
    seen: list[tuple[int, int]] = []
    step = FinetuneModule.training_step

    def wrapped(self: FinetuneModule, *arguments: Any) -> Any:
        seen.append((next(iter(lora_layers(self.model).values())).rank, self.trainer.global_step))
        act(self, len(seen))
        return step(self, *arguments)

    patch.setattr(FinetuneModule, "training_step", wrapped)
    return seen


def terminate(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# ------------------------------------------------------------------------------------------ the same job as alone

# in their order: each runs over the base that all before it have used
KINDS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "nf4": ("quant=nf4",),
    "int8": ("quant=int8",),
    "dropout": ("dropout=0.3",),
    "two-layers": ("target_modules=[q_proj,v_proj]",),
    "embedding": ("target_modules=[embed_tokens,o_proj]",),
    "biases": ("bias=all", "model.dtype=float32", "model.name=biased", "data.path=embedded"),
    "after-biases": ("model.dtype=float32", "model.name=biased", "data.path=embedded"),
    "head": ("modules_to_save=[lm_head]",),
    "recomputed": ("model.checkpointing=full",),
    "selective": ("model.checkpointing=selective",),
    "nf4-recomputed": ("quant=nf4", "model.checkpointing=full", "dropout=0.3"),
    "diverged": ("optimizer.lr=1e30",),
    "refused": ("target_modules=[q_porj]",),
    "packed": ("data.packing=true", "data.max_length=64"),
    "another-seed": ("seed=7", "dropout=0.1"),
    "small-adapter": ("adapter_dtype=int8", "save.dtype=float32"),
    "accumulated": ("trainer.accumulate_grad_batches=2", "lora/variant=rslora"),
    "nf4-again": ("quant=nf4", "rank=2"),
    "last": ("rank=2",),
}
ENDS = {"diverged": DivergedError, "refused": InputError}
BASES = 4  # bfloat16, nf4, int8, and the one with biases


def biased(folder: Path) -> None:
    """The embedded model with biases in its attention, which are not zero, in `folder`/biased."""
    config = LlamaConfig.from_pretrained(MODEL, attention_bias=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "biased")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / "biased")


def ended(run: Callable[[], object]) -> type[BaseException] | None:
    """The kind of error with which a run ended."""
    try:
        run()
    except (InputError, DivergedError) as error:
        return type(error)
    return None


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shared]:
    """The kinds one after another, each as a sweep runs it, over what they share."""
    folder = prepare(tmp_path_factory.mktemp("jobs"))
    biased(folder)
    shared = Shared()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "_SHARED", shared)
        for name, overrides in KINDS.items():
            config, job = tiny("rank=4", *overrides), folder / name
            job.mkdir()
            assert ended(lambda: train.run_job(config, job, folder, None)) is ENDS.get(name), name  # noqa: B023
    return folder, shared


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_after_others_leaves_what_it_leaves_alone(jobs: tuple[Path, Shared], kind: str) -> None:
    job = jobs[0] / kind
    if "model.name=biased" in KINDS[kind]:
        biased(Path())
    config = tiny("rank=4", *KINDS[kind])
    assert ended(lambda: train.run(config, Path("alone"))) is ENDS.get(kind)
    if kind == "refused":
        assert metrics_of(job)["status"] == "failed" and not Path("alone/metrics.json").exists()
    elif kind == "diverged":
        assert metrics_of(job)["status"] == "diverged" and numbers("alone") == numbers(job)
    else:
        assert metrics_of(job)["status"] == "completed"
        assert_same(job, "alone")


def test_each_base_is_loaded_once_for_all_jobs(jobs: tuple[Path, Shared]) -> None:
    assert jobs[1].loads == BASES < len(KINDS)


def test_a_grid_over_one_base_loads_it_once_and_measures_it_once(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, measured = [], []
    load, measure = sweep.load_base, training.measure
    monkeypatch.setattr(sweep, "load_base", lambda config: loaded.append(config.rank) or load(config))
    monkeypatch.setattr(training, "measure", lambda *arguments: measured.append(1) or measure(*arguments))
    done("-m", "rank=1,2,4", "trainer.max_steps=1", "hydra.sweep.dir=all")
    assert loaded == [1] and shared.loads == 1
    assert len(measured) == 1 + 3  # the base once, then each adapter
    assert len({json.dumps(metrics_of(job.parent)["before"]) for job in Path("all").glob("*/metrics.json")}) == 1


# --------------------------------------------------------------------------------------------- what jobs share


def use(shared: Shared, config: Config) -> Any:
    """Put an adapter over a base that is lent, as a run does; the base."""
    model = shared.base(config)
    load_module(config, model)
    return model


@torch.no_grad()
def _change_a_weight(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.add_(1.0)


@torch.no_grad()
def _change_a_norm(model: Any) -> None:
    model.model.norm.weight.mul_(1.01)


def _leave_a_hook(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda *_: None)


def _leave_a_pre_hook(model: Any) -> None:
    model.register_forward_pre_hook(lambda *_: None)


def _change_the_config(model: Any) -> None:
    model.config.use_cache = not model.config.use_cache


def _replace_a_module(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()


def _replace_a_parameter(model: Any) -> None:
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.detach().clone())


def _replace_a_forward(model: Any) -> None:
    layer = model.model.layers[0]
    layer.forward = layer.forward


def _take_a_layer_away(model: Any) -> None:
    del model.model.layers[-1]


def _break_it(model: Any) -> None:
    del model.model


DAMAGES = [
    *(_change_a_weight, _change_a_norm, _leave_a_hook, _leave_a_pre_hook, _change_the_config, _replace_a_module),
    *(_replace_a_parameter, _replace_a_forward, _take_a_layer_away, _break_it),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_base_that_a_job_has_damaged_is_loaded_anew(
    damage: Callable[[Any], None], quant: str, request: pytest.FixtureRequest
) -> None:
    if damage is _change_a_weight and quant == "nf4":
        damage = _change_a_norm  # a packed weight is not added to
    shared, config = Shared(), tiny("rank=2", f"quant={quant}")
    first = use(shared, config)
    shared.give_back()
    assert shared.base(config) is first and shared.loads == 1  # whole, it is lent again
    damage(first)
    shared.give_back()
    second = shared.base(config)
    assert second is not first and shared.loads == 2
    fresh = load_base_model("embedded", quant=None if quant == "none" else quant, device="cpu").state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in second.state_dict().items())


def test_what_a_run_does_to_its_base_is_undone(tiny_ids: torch.Tensor) -> None:
    biased(Path())
    options = ("bias=all", "model.checkpointing=full", "modules_to_save=[lm_head]", "dropout=0.1")
    shared, config = Shared(), tiny("rank=2", "model.name=biased", "data.path=embedded", *options)
    model = shared.base(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    with torch.no_grad():
        logits = model(tiny_ids).logits
    load_module(config, model).train()
    assert is_recomputed(model)
    model(tiny_ids).logits.float().sum().backward()
    shared.give_back()

    assert shared.base(config) is model and shared.loads == 1
    assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    assert not any(module.training for module in model.modules()) and not is_recomputed(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == set()
    with torch.no_grad():
        assert torch.equal(model(tiny_ids).logits, logits)


def is_recomputed(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.fixture
def tiny_ids() -> torch.Tensor:
    return torch.tensor([[5, 6, 7, 8]])


def test_other_settings_of_the_base_are_another_base_and_those_of_the_adapter_are_not() -> None:
    shared = Shared()
    same = "rank=2 alpha=3 dropout=0.1 optimizer.lr=1 seed=3 model.checkpointing=full model.fused=off model.compile=off"
    for overrides in ("rank=4", same, f"{same} rank=1 bias=all modules_to_save=[lm_head]"):
        shared.base(tiny(*overrides.split()))
        shared.give_back()
    assert shared.loads == 1
    others = ("quant=nf4", "quant=nf4 quant.block_size=128", "model.dtype=float32", "model.attention=eager")
    for number, overrides in enumerate(others, start=2):
        shared.base(tiny(*overrides.split()))
        shared.give_back()
        assert shared.loads == number
    for seed in (1, 2):  # here the seed draws the weights
        shared.base(tiny("model.init=random", f"seed={seed}"))
        shared.give_back()
    assert shared.loads == len(others) + 3


def test_idle_bases_are_dropped_when_memory_is_short_the_one_used_longest_ago_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = [2**60]
    monkeypatch.setattr(sweep, "_free_bytes", lambda config: free[0])
    shared = Shared()
    plain, nf4, single = tiny(), tiny("quant=nf4"), tiny("model.dtype=float32")

    def lend(*configs: Config) -> int:
        before = shared.loads
        for config in configs:
            shared.base(config)
            shared.give_back()
        return shared.loads - before

    assert lend(plain, nf4, single) == 3
    assert lend(nf4, plain, single) == 0  # there is room for all
    size = {key: base.bytes for key, base in shared._bases.items()}
    weights = sum(value.numel() * value.element_size() for value in load_base_model("embedded").parameters())
    assert size[sweep._base_key(plain)] >= weights and len(size) == 3
    # room for what is used and the two others but for a byte: the one used longest ago, nf4, has to go
    idle = size[sweep._base_key(plain)] + size[sweep._base_key(nf4)]
    free[0] = math.ceil(idle / sweep.IDLE_SHARE) - 4
    assert lend(single) == 0
    assert list(shared._bases) == [sweep._base_key(plain), sweep._base_key(single)]
    free[0] = 0
    assert lend(plain) == 0 and list(shared._bases) == [sweep._base_key(plain)]  # what is asked for itself is kept
    assert lend(nf4) == 1 and list(shared._bases) == [sweep._base_key(nf4)]


def test_data_is_read_once_and_anew_where_its_file_or_its_settings_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(sweep, "build_data", lambda config: read.append(1) or build_data(config))
    rows = [json.dumps({"prompt": f"Question {i}", "completion": f"{i}"}) + "\n" for i in range(40)]
    file = Path("rows.jsonl")
    file.write_text("".join(rows))
    shared, config = Shared(), tiny(f"data.path={file}", "rank=2")
    first = shared.data(config)
    second = shared.data(tiny(f"data.path={file}", "rank=4", "quant=nf4", "optimizer.lr=1"))
    assert len(read) == 1 and second is not first and second.train_sequences is first.train_sequences
    assert shared.data(tiny(f"data.path={file}", "data.max_length=64")) and len(read) == 2
    assert shared.data(tiny(f"data.path={file}", "seed=1")) and len(read) == 3
    shared.data(config)
    file.write_text("".join(rows[:30]))
    assert len(shared.data(config).train_sequences) < len(first.train_sequences) and len(read) == 5


def test_what_the_base_gave_is_asked_for_once_for_each_base_data_and_task() -> None:
    asked: list[int] = []

    def measure() -> dict[str, list[int]]:
        asked.append(1)
        return {"loss": [len(asked)]}

    shared = Shared()
    for overrides in (("rank=2",), ("rank=4", "optimizer.lr=1"), ("trainer.max_steps=9",)):
        result = shared.measured(tiny(*overrides), measure)
        assert result == {"loss": [1]}
        result["loss"].append(7)  # of the caller alone
    for number, override in enumerate(("quant=nf4", "task.generate_examples=5", "data.max_length=64"), start=2):
        assert shared.measured(tiny(override), measure) == {"loss": [number]}
    shared.forget()
    assert shared.measured(tiny("rank=2"), measure) == {"loss": [5]}


# ------------------------------------------------------------------------------------------------ called again


def stamps(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every file that a job has written; Hydra writes its own anew, and opens the log."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".hydra" not in path.parts and path.name not in ("train.log", ".lock", "multirun.yaml")
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ranks 2 and 4, dropout in both, that nothing disturbed; to be looked at, not called again."""
    folder = prepare(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "_SHARED", Shared())
        done("-m", "rank=2,4", "dropout=0.1", "trainer.checkpoint_every_n_steps=1", "hydra.sweep.dir=all")
    return folder / "all"


SWEEP = ("-m", "rank=2,4", "dropout=0.1", "trainer.checkpoint_every_n_steps=1", "hydra.sweep.dir=all")


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy of that sweep to be called again."""
    folder = tmp_path / "all"
    subprocess.run(["cp", "-a", whole, folder], check=True)
    return folder


@pytest.mark.parametrize("command", [SWEEP, ("resume=all",)], ids=["the same command", "resume"])
def test_finished_jobs_are_not_run_again(
    finished: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stamps(finished)
    assert "rank=2/adapter/adapter_model.safetensors" in before and "rank=4/metrics.json" in before
    monkeypatch.setattr(train, "_recorded", lambda *_: pytest.fail("a finished job was run"))
    out = done(*command)
    assert out.count("done already: held-out loss") == 2
    assert stamps(finished) == before


def test_a_finished_sweep_is_answered_without_torch(finished: Path) -> None:
    # in a process of its own: torch is in this one
    text = "import sys; from lorafit import train; train.main(); print('torch' in sys.modules)"
    command = [sys.executable, "-c", text, *TINY, *SWEEP]
    env = os.environ | {"LORAFIT_IN_PROCESS": "1"}
    process = subprocess.run(command, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("done already") == 2 and process.stdout.endswith("False\n")


def test_more_values_add_jobs_and_keep_those_that_are_there(finished: Path) -> None:
    before = stamps(finished)
    out = done(*SWEEP, "rank=2,4,1")
    assert out.count("done already") == 2 and "rank=1" in out
    after = stamps(finished)
    jobs = [name for name in before if name != "sweep.json"]  # which holds both commands now
    assert {name: after[name] for name in jobs} == {name: before[name] for name in jobs}
    assert statuses(finished) == {f"rank={rank}": "completed" for rank in (1, 2, 4)}


@pytest.mark.parametrize(
    ("step", "command"),
    [(1, SWEEP), (3, ("resume=all",)), (7, SWEEP)],
    ids=["after its first step", "in the middle", "in its second job"],
)
def test_a_sweep_that_was_stopped_goes_on_and_ends_as_the_undisturbed_one(
    whole: Path, step: int, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        seen = at_step(patch, lambda module, count: count == step and terminate())
        code, _, err = program(*SWEEP)
    assert code == 143 and err.count("stopped by SIGTERM") == 1 and "Traceback" not in err
    assert "\nThe sweep goes on with: python -m lorafit.train " in err and err.count("\n") == 2
    stopped, taken = f"rank={seen[-1][0]}", seen[-1][1] + 1
    assert len(seen) == step and statuses("all")[stopped] == "interrupted"
    assert load_checkpoint(Path("all") / stopped / "checkpoints" / "last.ckpt")["global_step"] == taken
    ended = {name: stamp for name, stamp in stamps(Path("all")).items() if not name.startswith(stopped)}

    monkeypatch.setattr(train, "_SHARED", Shared())  # as in another process
    with monkeypatch.context() as patch:
        again = at_step(patch, lambda *_: None)
        done(*command)
    assert len(seen) + len(again) == 8  # no step was taken twice
    for rank in (2, 4):
        assert_same(whole / f"rank={rank}", f"all/rank={rank}")
    after = stamps(Path("all"))
    assert {name: after[name] for name in ended} == ended


@pytest.mark.parametrize(
    "step",
    [2, 4],
    ids=["in the middle", "at its last step"],
)
def test_a_validation_that_was_due_when_the_sweep_was_stopped_is_not_lost(
    whole: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, lambda module, count: count == step and terminate())
        assert program(*SWEEP)[0] == 143
    done(*SWEEP)
    assert products(whole / "rank=2") == products("all/rank=2")
    assert curve(whole / "rank=2") == curve("all/rank=2")


def test_a_job_that_was_stopped_at_its_last_step_still_says_what_memory_it_took(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, lambda module, count: count == 4 and terminate())
        assert program(*SWEEP)[0] == 143
    done(*SWEEP)
    memory = metrics_of("all/rank=2")["memory"]
    assert memory["peak_bytes"] > sum(memory[f"{part}_bytes"] for part in ("weights", "adapter", "optimizer")) > 0
    assert numbers("all/rank=2")["memory"] == numbers(whole / "rank=2")["memory"]


def test_a_job_that_was_stopped_before_its_first_checkpoint_begins_anew(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise Stopped(signal.SIGTERM)  # at once, as by a second signal: nothing is saved

    with monkeypatch.context() as patch:
        at_step(patch, die)
        assert program(*SWEEP)[0] == 143
    assert statuses("all") == {"rank=2": "interrupted"}
    assert not Path("all/rank=2/checkpoints/last.ckpt").exists()
    done(*SWEEP)
    assert_same(whole / "rank=2", "all/rank=2")


def test_a_job_that_failed_is_run_anew(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: FinetuneModule, count: int) -> None:
        if count == 1:
            raise KeyError("a bug")

    with monkeypatch.context() as patch:
        at_step(patch, fail)
        assert program(*SWEEP)[0] == 1
    assert statuses("all") == {"rank=2": "failed", "rank=4": "completed"}
    out = done(*SWEEP)
    assert out.count("done already") == 1
    for rank in (2, 4):
        assert_same(whole / f"rank={rank}", f"all/rank={rank}")


@pytest.mark.parametrize(
    ("kind", "code"), [(DivergedError, 3), (MemoryExhausted, 4)], ids=lambda value: getattr(value, "status", value)
)
def test_a_job_that_diverged_or_had_no_memory_is_told_again_and_not_run_again(
    finished: Path, kind: type[DivergedError], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(finished / "rank=2" / "metrics.json", metrics_of("all/rank=2") | {"status": kind.status, "error": "why"})
    before = stamps(finished)
    monkeypatch.setattr(train, "_recorded", lambda *_: pytest.fail("a job was run"))
    ended, _, err = program(*SWEEP)
    assert ended == code and "Traceback" not in err
    summary = err.partition("lorafit train: ")[2].splitlines()
    assert summary[0] == "1 of 2 jobs failed:"
    assert summary[1].startswith("  rank=2: why (recorded earlier; remove ") and summary[1].endswith(" to run it anew)")
    assert stamps(finished) == before


def test_a_folder_with_a_job_of_other_settings_is_refused_by_name_and_stays(finished: Path) -> None:
    before = stamps(finished)
    code, _, err = program(*SWEEP, "dropout=0.2")
    assert code == 2 and "Traceback" not in err
    assert all(f"all/rank={rank} holds a run of other settings" in err for rank in (2, 4))
    assert stamps(finished) == before


def test_an_unreadable_metrics_file_is_as_none(finished: Path, whole: Path) -> None:
    (finished / "rank=2" / "metrics.json").write_text('{"status": "comp')
    (finished / "rank=2" / "checkpoints" / "last.ckpt").unlink()
    done(*SWEEP)
    assert_same(whole / "rank=2", "all/rank=2")


@pytest.mark.parametrize("text", ["[]", "null", "", '{"status"'])
def test_metrics_that_are_none_are_empty(text: str) -> None:
    Path("metrics.json").write_text(text)
    assert sweep.read_metrics(Path()) == {} and recorded_result(tiny(), Path(), None) is None


def test_two_processes_at_one_job_are_one_too_many(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "LOCK_SECONDS", 0.2)
    before = stamps(finished)
    with (finished / "rank=2" / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, out, err = program(*SWEEP)
    assert code == 2 and "another process is at work in" in err and "rank=2: wait for it" in err
    assert out.count("done already") == 1 and stamps(finished) == before  # the other job is free
    assert done(*SWEEP).count("done already") == 2


def test_a_lock_is_waited_for_while_its_owner_ends_and_let_go_of_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyError), alone(tmp_path):
        raise KeyError
    owner = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)\n"
            "print('here', flush=True); time.sleep(1)",
            str(tmp_path / ".lock"),
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert owner.stdout is not None and owner.stdout.readline() == b"here\n"
        with alone(tmp_path):
            assert owner.wait() == 0
    finally:
        owner.kill()
        owner.wait()


# ------------------------------------------------------------------------------------------- jobs that go wrong


def test_whatever_goes_wrong_in_a_job_is_recorded_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: dict[int, Exception] = {
        3: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        5: KeyError("a bug"),
    }

    def fail(module: FinetuneModule, _: int) -> None:
        rank = next(iter(lora_layers(module.model).values())).rank
        if rank in errors:
            raise errors[rank]
        if rank == 2:
            module.optimizers().param_groups[0]["lr"] = 1e30

    with monkeypatch.context() as patch:
        at_step(patch, fail)
        code, out, err = program("-m", "rank=1,2,3,0,5,4", "hydra.sweep.dir=all")
    assert code == 3  # of the first that failed
    ended = {name: metrics_of(f"all/{name}") for name in statuses("all")}
    assert {name: metrics["status"] for name, metrics in ended.items()} == {
        "rank=1": "completed",
        "rank=2": "diverged",
        "rank=3": "out_of_memory",
        "rank=0": "failed",
        "rank=5": "failed",
        "rank=4": "completed",
    }
    assert "finite" in ended["rank=2"]["error"] or "nan" in ended["rank=2"]["error"]
    assert "data.batch_size" in ended["rank=3"]["error"]
    assert ended["rank=5"]["error"] == "KeyError: 'a bug'"
    assert ended["rank=0"]["error"] == "rank must be a positive integer, got 0"
    assert err.count("Traceback") == 1 and "KeyError: 'a bug'" in err  # a bug shows itself, once

    summary = err.partition("lorafit train: ")[2].splitlines()
    assert summary[0] == "4 of 6 jobs failed:"
    assert [line.partition(":")[0].strip() for line in summary[1:]] == ["rank=2", "rank=3", "rank=0", "rank=5"]
    assert summary[3] == "  rank=0: rank must be a positive integer, got 0"
    assert not [path for path in Path("all").iterdir() if path.name.startswith(".roll")]

    # after all of that the last job is what it is by itself
    done("rank=4", "hydra.run.dir=alone")
    assert_same("all/rank=4", "alone")


def test_a_sweep_whose_only_job_failed_says_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = program("-m", "target_modules=[q_porj]", "hydra.sweep.dir=all")
    assert code == 2 and err.splitlines()[-1].startswith("lorafit train: ") and "'q_porj' matches no" in err
    [job] = statuses("all")
    assert metrics_of(f"all/{job}")["status"] == "failed" and "'q_porj' matches no" in metrics_of(f"all/{job}")["error"]


# -------------------------------------------------------------------------------------------------- the ladder


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_the_ladder_is_what_the_adapter_cut_to_each_rank_measures(quant: str) -> None:
    options = (f"quant={quant}", "rank_pattern={down_proj: 3}", "optimizer.lr=0.02")
    done("rank=5", "ladder=[4,1,2,9]", *options, "hydra.run.dir=run")
    done("rank=5", *options, "hydra.run.dir=plain")
    metrics = metrics_of("run")
    ladder = metrics["ladder"]
    assert list(ladder["losses"]) == list(ladder["parameters"]) == ["1", "2", "4", "5"]  # 9 is above its own

    assert ladder["losses"]["5"] == metrics["after"]["loss"]
    data = build_data(tiny())
    data.setup()
    for rank in (1, 2, 4):
        model = load_base_model("embedded", quant=None if quant == "none" else quant, device="cpu")
        load_adapter(model, Path("run/adapter"))
        cut(model, rank=rank)
        loss = evaluate_loss(model, data.eval_batches())["loss"]
        assert ladder["losses"][str(rank)] == pytest.approx(loss, rel=1e-6)
    assert len(set(ladder["losses"].values())) == 4

    # rank x (in + out) of each layer, of which down_proj has 3 at most
    sizes = 4 * (4 * (128 + 128) + 2 * (128 + 384)), 4 * (384 + 128)
    assert ladder["parameters"] == {str(r): r * sizes[0] + min(r, 3) * sizes[1] for r in (1, 2, 4, 5)}
    assert ladder["parameters"]["5"] == metrics["model"]["parameters_trainable"]

    # and the run is the same as without it
    changed = {name for name in products("run") if products("run")[name] != products("plain")[name]}
    assert changed == {"lorafit.json"}  # which holds the settings
    assert {k: v for k, v in numbers("run").items() if k not in ("ladder", "config_sha256")} == {
        k: v for k, v in numbers("plain").items() if k != "config_sha256"
    }


# ------------------------------------------------------------------------------------------------------- halving

RATES = ("0.0001", "0.001", "0.003", "0.01")
THROUGH = ("dropout=0.1", "trainer.max_steps=8", "trainer.val_check_interval=3")
HALVING = (
    *("-m", f"optimizer.lr={','.join(RATES)}", "hydra.sweep.dir=all", "halving.factor=2", "halving.first=0.25"),
    *THROUGH,
)


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A sweep over four rates: 2, 4, 8 steps; (its folder, what it printed)."""
    folder = prepare(tmp_path_factory.mktemp("halved"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "_SHARED", Shared())
        return folder / "all", done(*HALVING)


def rungs_of(folder: Path) -> dict[str, dict[str, float]]:
    return {job.parent.name: metrics_of(job.parent).get("rungs", {}) for job in folder.glob("*/metrics.json")}


def test_at_each_rung_the_better_half_goes_on(halved: tuple[Path, str]) -> None:
    folder, out = halved
    rungs = rungs_of(folder)
    names = {f"optimizer.lr={rate}" for rate in RATES}
    first = {name: values["0.25"] for name, values in rungs.items()}
    assert set(first) == names
    second = {name: values["0.5"] for name, values in rungs.items() if "0.5" in values}
    assert set(second) == set(sorted(first, key=first.__getitem__)[:2])
    best = min(second, key=second.__getitem__)
    assert statuses(folder) == {name: "completed" if name == best else "interrupted" for name in names}
    for name, ended in rungs.items():
        steps = 8 if name == best else 4 if name in second else 2
        assert metrics_of(folder / name)["speed"]["steps"] == steps
        assert load_checkpoint(folder / name / "checkpoints" / "last.ckpt")["global_step"] == steps
        assert max(float(share) for share in ended) == min(steps / 8, 0.5)
        if name != best:
            assert metrics_of(folder / name)["error"].startswith("halving: ")
            assert not (folder / name / "adapter").exists()
    assert out.count("halving: ") == 2 and "halving: 2 of 4 jobs go on" in out and "halving: 1 of 2 jobs go on" in out


def test_a_survivor_of_halving_is_the_job_that_ran_through(halved: tuple[Path, str]) -> None:
    folder, _ = halved
    [name] = [name for name, status in statuses(folder).items() if status == "completed"]
    done(name, *THROUGH, "hydra.run.dir=through")
    assert products(folder / name) == products("through")
    mine, theirs = numbers(folder / name), numbers("through")
    assert set(mine.pop("rungs")) == {"0.25", "0.5"} and mine == theirs
    assert curve(folder / name) == curve("through")


def test_a_validation_that_was_due_when_halving_looked_is_not_lost() -> None:
    due = ("trainer.max_steps=4", "trainer.val_check_interval=1")
    done(*HALVING, "optimizer.lr=0.001,0.01", *due)
    [name] = [name for name, status in statuses("all").items() if status == "completed"]
    done(name, *THROUGH, *due, "hydra.run.dir=through")
    assert curve(f"all/{name}") == curve("through")


def test_halving_called_again_trains_nothing_and_keeps_its_losses(
    halved: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["cp", "-a", halved[0], tmp_path / "all"], check=True)
    before = stamps(Path("all"))
    monkeypatch.setattr(train, "_recorded", lambda *_: pytest.fail("a job was run"))
    out = done(*HALVING)
    assert [line for line in out.splitlines() if line.startswith("halving")] == [
        line for line in halved[1].splitlines() if line.startswith("halving")
    ]
    assert stamps(Path("all")) == before


def test_halving_that_was_stopped_twice_chooses_as_it_would_have(
    halved: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0
    for step, code in ((5, 143), (7, 143), (99, 0)):  # in its first round, in its second
        monkeypatch.setattr(train, "_SHARED", Shared())
        with monkeypatch.context() as patch:
            seen = at_step(patch, lambda module, count: count == step and terminate())  # noqa: B023
            assert program(*HALVING)[0] == code
        taken += len(seen)
    assert taken == 4 * 2 + 2 * 2 + 4  # no step was taken twice
    assert rungs_of(Path("all")) == rungs_of(halved[0])
    for name, status in statuses(halved[0]).items():
        mine, theirs = numbers(f"all/{name}"), numbers(halved[0] / name)
        assert mine | {"memory": None} == theirs | {"memory": None}
        if status == "completed":
            assert products(f"all/{name}") == products(halved[0] / name)


def test_the_jobs_that_halving_stopped_can_be_finished_without_it(
    halved: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["cp", "-a", halved[0], tmp_path / "all"], check=True)
    seen = at_step(monkeypatch, lambda *_: None)
    done(*HALVING, "halving.factor=null")
    assert len(seen) == 6 + 6 + 4
    assert set(statuses("all").values()) == {"completed"}
    done(f"optimizer.lr={RATES[0]}", *THROUGH, "hydra.run.dir=through")
    assert products(f"all/optimizer.lr={RATES[0]}") == products("through")


def test_a_job_that_diverges_while_halving_does_not_go_on() -> None:
    code, _, err = program(*HALVING, "optimizer.lr=1e+30,0.01")
    assert code == 3 and "1 of 2 jobs failed" in err
    assert statuses("all") == {
        "optimizer.lr=1e+30": "diverged",
        "optimizer.lr=0.01": "completed",
    }
    assert set(rungs_of(Path("all"))["optimizer.lr=0.01"]) == {"0.25"}  # no rival is left


@given(
    st.lists(st.one_of(st.none(), st.floats(0, 9), st.just(math.inf)), min_size=1, max_size=9),
    st.integers(2, 5),
    st.sampled_from([0.05, 0.1, 0.125, 0.3, 0.5, 0.9]),
)
@settings(max_examples=60, deadline=None)
def test_halving_takes_the_best_of_each_rung_by_brute_force(
    losses: list[float | None], factor: int, first: float
) -> None:
    """With jobs that only tell a loss, which crosses those of the others as they train; None is a job that fails."""

    def loss(number: int, until: float | None) -> float | None:
        start = losses[number]
        return None if start is None else start * math.cos(number * (1 if until is None else until))

    def run_all() -> None:
        for number in range(len(losses)):
            if jobs.among is None or number in jobs.among:
                asked.append((number, jobs.until))
                result = loss(number, jobs.until)
                told = {"error": "it failed", "exit_code": 3} if result is None else {"objective": result}
                roll.write(jobs.rung, number, {"name": f"job {number}", "ended": True} | told)

    asked: list[tuple[int, float | None]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        roll, jobs = Roll.begin(folder), launch.Jobs(train.run, train.run_job)
        failing = contextlib.nullcontext() if None not in losses else pytest.raises(SystemExit)
        with contextlib.redirect_stderr(io.StringIO()), failing:
            launch._run_jobs("train", launch._Plan(folder, True, factor, first), jobs, roll, run_all)

    expected: list[tuple[int, float | None]] = []
    going, share = list(range(len(losses))), first
    while True:
        expected += [(number, share) for number in going]
        known = {number: value for number in going if (value := loss(number, share)) is not None}
        finite = sorted((value, number) for number, value in known.items() if math.isfinite(value))
        going = sorted(number for _, number in finite[: math.ceil(len(finite) / factor)])
        share *= factor
        if share >= 1 or len(going) <= 1:
            break
    assert asked == expected + [(number, None) for number in going]
    assert ("halving: " in out.getvalue()) == (sum(value is not None and math.isfinite(value) for value in losses) > 1)


@pytest.mark.parametrize(("until", "stop"), [(None, None), (0.125, 31), (0.5, 125), (0.001, 1), (0.999, None)])
def test_a_share_of_the_steps_is_one_step_or_more_and_less_than_all(until: float | None, stop: int | None) -> None:
    assert Job(Path(), until).steps(250) == stop
    assert Job(Path(), until).steps(1) is None


def test_jobs_too_short_to_be_looked_at_early_are_finished_and_compared_by_their_end() -> None:
    done("-m", "rank=1,2", "trainer.max_steps=1", "halving.factor=2", "hydra.sweep.dir=all")
    assert statuses("all") == {"rank=1": "completed", "rank=2": "completed"}


# ------------------------------------------------------------------------------------ what Hydra and users are told


class Told(Callback):
    """A callback of Hydra that remembers what each job returned."""

    returned: dict[int, Any] = {}

    def on_job_end(self, config: Any, job_return: Any, **_: Any) -> None:
        Told.returned[job_return.hydra_cfg.hydra.job.num] = job_return.return_value


def test_hydra_is_told_the_held_out_loss_of_each_job_done_already_or_not() -> None:
    callback = "+hydra.callbacks.told._target_=test_sweep.Told"
    for _ in range(2):
        Told.returned.clear()
        code, _, err = program("-m", "optimizer.lr=0.001,1e+30,0.01", callback, "hydra.sweep.dir=all")
        assert code == 3, err
        losses = [metrics_of(f"all/optimizer.lr={rate}")["after"]["loss"] for rate in ("0.001", "0.01")]
        assert Told.returned == {0: losses[0], 1: math.inf, 2: losses[1]}


FILES = {
    "rank": {f"rank={rank}": {"rank": rank} for rank in (4, 8, 16, 32)},
    "rank_by_quant": {
        f"rank={rank},quant={quant}": {"rank": rank, "quant": None if quant == "none" else quant}
        for rank in (4, 8, 16, 32)
        for quant in ("none", "nf4")
    },
    "targets": {
        f"lora.target_modules={name}": {"target_modules": modules}
        for name, modules in {
            "qv": ["q_proj", "v_proj"],
            "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "mlp": ["gate_proj", "up_proj", "down_proj"],
            "all_linear": "all_linear",
        }.items()
    },
    "rank_ladder": {"rank=16": {"rank": 16, "ladder": [1, 2, 3, 4, 6, 8, 12]}},
    "halving": {
        f"rank={rank},optimizer.lr={rate}": {"rank": rank, "lr": float(rate), "factor": 2}
        for rank in (4, 8, 16, 32)
        for rate in ("0.0001", "0.0003", "0.001", "0.003")
    },
}


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "sweep").glob("*.yaml")))
def test_a_file_of_conf_sweep_runs_its_jobs_in_folders_of_their_names(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Config] = {}

    def run_job(config: Config, folder: Path, sweep: Path, until: float | None) -> float:
        seen[folder.name] = config
        assert folder.parent.resolve() == sweep.resolve() == Path("all").resolve()
        return 0.0

    def plan(*arguments: Any) -> Any:
        made = planned(*arguments)
        made.factor = None  # here each job is run once
        return made

    planned = launch._plan
    monkeypatch.setattr(launch, "_plan", plan)
    monkeypatch.setattr(train, "run_job", run_job)
    done(f"sweep={name}", "hydra.sweep.dir=all")
    told = {
        folder: {
            "rank": config.rank,
            "quant": config.quant and config.quant.type,
            "target_modules": config.target_modules,
            "ladder": config.ladder,
            "lr": config.optimizer["lr"],
            "factor": config.halving.factor,
        }
        for folder, config in seen.items()
    }
    defaults = tiny()
    usual = {"rank": defaults.rank, "quant": None, "target_modules": "all_linear", "ladder": None, "factor": None}
    usual["lr"] = defaults.optimizer["lr"]
    assert told == {folder: usual | differs for folder, differs in FILES[name].items()}


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "sweep").glob("*.yaml")))
def test_a_file_of_conf_sweep_opens_with_its_command(name: str) -> None:
    head = [line for line in (CONF / "sweep" / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert any(f"python -m lorafit.train sweep={name}" in line for line in head)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("halving.factor=1", "halving.factor must be 2 or more"),
        ("halving.first=1.5", "halving.first must be a share"),
        ("ladder=[0]", "ladder must be a list of different ranks"),
        ("ladder=[2,2]", "ladder must be a list of different ranks"),
    ],
)
def test_wrong_settings_of_a_sweep_are_named(override: str, said: str) -> None:
    code, _, err = program("-m", "rank=2,4", override, "hydra.sweep.dir=all")
    assert code == 2 and said in err and "Traceback" not in err
    assert statuses("all") == {"rank=2": "failed", "rank=4": "failed"}
    assert all(said in metrics_of(f"all/rank={rank}")["error"] for rank in (2, 4))


def test_resume_of_a_folder_that_does_not_say_what_was_swept_is_refused() -> None:
    Path("all").mkdir()
    Path("all/sweep.json").write_text("{}\n")
    code, _, err = program("resume=all")
    assert code == 2 and "does not say what was swept" in err


# ------------------------------------------------------------------------------------------- what people do to folders


@pytest.mark.parametrize("content", [None, "{broken"], ids=["removed", "damaged"])
def test_a_job_whose_metrics_are_gone_is_still_known_by_its_settings(finished: Path, content: str | None) -> None:
    path = finished / "rank=2" / "metrics.json"
    path.unlink() if content is None else path.write_text(content)
    code, _, err = program(*SWEEP, "dropout=0.3")
    assert code == 2 and "rank=2 holds a run of other settings (dropout is 0.1 there, 0.3 here)" in err


def test_a_job_without_its_adapter_is_not_done(finished: Path, whole: Path) -> None:
    shutil.rmtree(finished / "rank=2" / "adapter")
    assert done(*SWEEP).count("done already") == 1
    assert_same(whole / "rank=2", "all/rank=2")


def test_a_checkpoint_of_unknown_settings_is_not_gone_on_with(finished: Path, whole: Path) -> None:
    (finished / "rank=2" / "metrics.json").unlink()
    shutil.rmtree(finished / "rank=2" / ".hydra")
    done(*SWEEP[:2], "dropout=0.3", "hydra.sweep.dir=other")
    shutil.copy("other/rank=2/checkpoints/last.ckpt", finished / "rank=2" / "checkpoints")  # as of another run
    done(*SWEEP)
    assert_same(whole / "rank=2", "all/rank=2")


def test_damaged_checkpoints_are_one_message_with_a_way_out(finished: Path) -> None:
    path = finished / "rank=2" / "metrics.json"
    write_json(path, metrics_of("all/rank=2") | {"status": "interrupted"})
    (finished / "rank=2" / "checkpoints" / "last.ckpt").write_bytes(b"xx")
    code, _, err = program(*SWEEP)
    assert code == 0 and "it goes on from the checkpoint before" in err
    write_json(path, metrics_of("all/rank=2") | {"status": "interrupted"})
    for checkpoint in (finished / "rank=2" / "checkpoints").glob("*.ckpt"):
        checkpoint.write_bytes(b"xx")
    code, _, err = program(*SWEEP)
    assert code == 2 and "Traceback" not in err and "last.ckpt cannot be read as a checkpoint" in err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["-m", "sweep=rank,targets"], "give 'sweep=[rank,targets]' for both at once"),
        (["-m", "rank=2,4", "resume=all/rank=2"], "resume=RUN goes on with one run, and this command sweeps"),
    ],
)
def test_what_would_sweep_otherwise_than_meant_is_refused(finished: Path, overrides: list[str], said: str) -> None:
    before = stamps(finished)
    code, _, err = program(*overrides)
    assert code == 2 and said in err and err.count("\n") == 1
    assert stamps(finished) == before


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["-m", "rank=5", "trainer.max_steps=4"], "rank=5"),
        (["sweep=rank", "rank=5", "trainer.max_steps=4"], "rank=5"),
        (["sweep=targets", "lora/target_modules=qv"], "lora.target_modules=qv"),
    ],
)
def test_a_sweep_of_one_value_names_its_folder_as_one_of_several_does(
    overrides: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(train, "run_job", lambda config, folder, sweep, until: seen.append(folder.name) or 1.0)
    done(*overrides, "hydra.sweep.dir=one")
    assert seen == [name]


def test_a_job_folder_is_reported_by_its_name_as_it_is(finished: Path) -> None:
    from lorafit import report

    code, out, err = run_program(report, "all/rank=2")
    assert code == 0, err
    assert (finished / "rank=2" / "report.html").is_file() and "is the only choice" in out
    said = run_program(report, "all/rank=3")[2]
    assert "there is no such folder. Did you mean" in said and "'all/rank=4'" in said
