"""Memory that runs out: what is told, what is recorded, and paged state that is paged again.

pytest tests/test_exhausted.py
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import numpy as np
import planted
import pytest
import torch
from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
from programs import run_program
from torch import nn

from lorafit import train
from lorafit.config import Config, compose, to_dict
from lorafit.embedded import MODEL
from lorafit.errors import InputError, MemoryExhausted
from lorafit.exhausted import LOADING, MEASURING, TRAINING, OutOfMemory, advice, is_killed_reader
from lorafit.memory import is_out_of_memory, page_again
from lorafit.schema import flat

RUN = (
    *("task.generate_examples=1", "task.samples=0", "task.eval_examples=8", "task.retention_path=general.txt"),
    *("callbacks.progress=false", "trainer.accelerator=cpu", "logger=none", "rank=2", "trainer.max_steps=3"),
    *("data.batch_size=6", "data.limit=64", "hydra.run.dir=run"),
)
ACTIVATIONS = ("activations", "weights", "adapter", "evaluation")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("general.txt").write_text("Bees tell each other where flowers are by dancing on the comb.")


def metrics() -> dict[str, Any]:
    return json.loads(Path("run/metrics.json").read_text())


def overrides(setting: str) -> list[str]:
    """What of a piece of advice is pasted into a command."""
    return re.sub(r" \(.*\)$", "", setting).split()


def told_settings(said: str) -> list[str]:
    """The settings that a message advises."""
    return re.sub(r"\. The run goes on .*", "", said.partition("best first: ")[2].strip()).split("; ")


# ------------------------------------------------------------------------------------------------ three settings


CHOICES = {
    "data.batch_size": (1, 7),
    "trainer.on_oom": ("stop", "halve"),
    "model.checkpointing": ("none", "selective", "full", "offload"),
    "quant": ("none", "nf4", "int8"),
    "optimizer": ("adamw", "paged_adamw_8bit", "lion_8bit"),
    "rank": (1, 16),
    "data.max_length": (2, 512),
    "bias": ("none", "all"),
    "data.num_workers": (0, 2),
    "task.generate_examples": (0, 8),
    "model.attention": ("auto", "eager"),
}


def differing(one: Config, other: Config) -> set[str]:
    left, right = (flat(to_dict(config)) for config in (one, other))
    return {key for key in {*left, *right} if left.get(key) != right.get(key)}


def test_whatever_the_run_three_settings_are_told_that_it_takes_and_does_not_have() -> None:
    draw = random.Random(1)
    smallest = [f"{key}={values[-1] if key == 'model.checkpointing' else values[0]}" for key, values in CHOICES.items()]
    smallest += ["trainer.on_oom=halve", "quant=nf4", "optimizer=paged_adamw_8bit", "task.samples=0"]
    runs = [smallest, *([f"{key}={draw.choice(values)}" for key, values in CHOICES.items()] for _ in range(5))]
    for given in runs:
        config, tried = compose(given), set()
        for cuda, killed, first in itertools.product(
            (False, True), {False, config.data.num_workers > 0}, (ACTIVATIONS, ACTIVATIONS[::-1])
        ):
            three = advice(config, first, cuda=cuda, killed=killed)
            assert len(three) == len(set(three)) == 3, given
            for setting in set(three) - tried:
                tried.add(setting)
                values = overrides(setting)
                keys = {value.partition("=")[0] for value in values}
                kept = [value for value in given if value.partition("=")[0] not in keys]
                changed = differing(config, compose([*kept, *values]))
                assert all(any(name.split(".")[0] == key.split(".")[0] for name in changed) for key in keys), setting


@pytest.mark.parametrize("rows", range(2, 13))
def test_the_smaller_batch_that_is_advised_has_as_many_rows_in_a_step(rows: int) -> None:
    config = compose([f"data.batch_size={rows}", "trainer.accumulate_grad_batches=5"])
    smaller = compose(overrides(advice(config, ACTIVATIONS, cuda=True, killed=False)[0]))
    assert smaller.data.batch_size < rows
    assert smaller.data.batch_size * smaller.trainer.accumulate_grad_batches == rows * 5


def test_what_is_largest_is_lowered_first() -> None:
    memory = OutOfMemory(compose(), {}, Path("none"))
    memory.doing = TRAINING
    parts = {"weights": 10, "quant_state": 1, "adapter": 2, "gradient": 2, "optimizer": 4}
    expected = {
        30: ["data.batch_size=16", "trainer.on_oom=halve", "model.checkpointing=selective"],
        9: ["quant=nf4", "data.batch_size=16", "trainer.on_oom=halve"],
    }
    for rest, settings in expected.items():
        three = advice(memory.config, memory._first(parts, rest), cuda=True, killed=False)
        assert [overrides(setting)[0] for setting in three] == settings
    three = advice(memory.config, memory._first(parts | {"optimizer": 40}, 9), cuda=True, killed=False)
    assert three[:2] == ["optimizer=paged_adamw_8bit", "rank=8"]


def test_a_run_that_halves_by_itself_is_not_told_to_take_smaller_batches() -> None:
    three = advice(compose(["trainer.on_oom=halve"]), ACTIVATIONS, cuda=False, killed=False)
    assert three == ["model.checkpointing=selective", "model.checkpointing=full", "data.max_length=256"]


def test_what_is_told_fits_what_the_run_was_doing() -> None:
    memory = OutOfMemory(compose(), {}, Path("none"))
    for doing, best in ((LOADING, "quant=nf4"), (MEASURING, "data.eval_batch_size=16")):
        memory.doing = doing
        assert advice(memory.config, memory._first({}, 1), cuda=True, killed=False)[0] == best


# ------------------------------------------------------------------------------------------------ whole runs


def test_a_batch_that_does_not_fit_ends_with_4_and_says_what_used_it_and_three_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import lorafit.module

    monkeypatch.setattr(lorafit.module, "supervised_loss", lorafit.module.supervised_loss)  # put back afterwards
    planted.out_of_memory(5)
    code, _, err = run_program(train, *RUN)
    assert code == 4 and "Traceback" not in err
    assert "while training (CUDA out of memory. Tried to allocate 2.00 GiB)" in err
    recorded = metrics()
    assert recorded["status"] == "out_of_memory" and recorded["error"] in err
    three = told_settings(err)
    assert len(three) == 3
    run = compose([value for value in RUN if not value.startswith("hydra")])
    for setting in three:
        again = [value for value in RUN if not value.startswith(("hydra", overrides(setting)[0].partition("=")[0]))]
        assert differing(run, compose([*again, *overrides(setting)]))

    memory, model = recorded["memory"], stored_bytes()
    assert 0 < memory["weights_bytes"] - model < 1024  # the frequencies of the positions
    assert memory["gradient_bytes"] == memory["optimizer_bytes"] == 0
    assert memory["adapter_bytes"] == 4 * recorded["model"]["parameters_trainable"]
    sizes = [float(number) for number in re.findall(r"([\d.]+) MiB", err.partition("It held")[2])]
    assert sizes == sorted(sizes, reverse=True) and f"weights {model / 2**20:.1f} MiB" in err

    code, _, err = run_program(train, *RUN[:-2], "hydra.run.dir=smaller", *overrides(three[0]))
    assert code == 0, err


def stored_bytes() -> int:
    """Of the weights in the embedded model's file, which are in bfloat16."""
    from safetensors import safe_open

    with safe_open(str(Path(MODEL) / "model.safetensors"), "pt") as file:
        return sum(2 * file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


def test_a_process_that_reads_data_and_is_killed_ends_with_4_and_advises_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import lorafit.data.loader

    rows = lorafit.data.loader._Rows
    monkeypatch.setattr(rows, "__getitem__", rows.__getitem__)  # put back afterwards
    planted.killed_worker()
    code, _, err = run_program(train, *RUN, "data.num_workers=2")
    assert code == 4 and "Traceback" not in err and "was killed" in err
    assert told_settings(err)[0] == "data.num_workers=0"
    assert metrics()["status"] == "out_of_memory"


@pytest.mark.parametrize(
    ("place", "doing", "advised"),
    [
        ("lorafit.sweep.load_base", "loading the base", "quant=nf4"),
        ("lorafit.training.measure", "measuring", "data.eval_batch_size=3"),
        ("lorafit.adapter.save_adapter", "saving the adapter", "optimizer=adamw_8bit"),
    ],
)
def test_memory_that_runs_out_beside_the_training_ends_with_4_as_well(
    place: str, doing: str, advised: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(place, full)
    code, _, err = run_program(train, *RUN)
    assert code == 4 and "Traceback" not in err and f"out of memory while {doing} (MemoryError)" in err
    assert told_settings(err)[0] == advised and len(told_settings(err)) == 3
    assert metrics()["status"] == "out_of_memory" and metrics()["memory"]["peak_bytes"] > 0
    assert (f"resume={Path('run').absolute()}" in err) == (
        doing == "saving the adapter"
    )  # there is a checkpoint to go on from


# ------------------------------------------------------------------------------------------------ which errors


def raised(work: Any) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        work()
    return caught.value


def test_out_of_memory_is_known_under_its_names() -> None:
    for work in (lambda: torch.empty(2**60), lambda: np.empty(2**55), lambda: bytearray(2**62)):
        assert is_out_of_memory(raised(work))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
    for other in (KeyError("a bug"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("memory format")):
        assert not is_out_of_memory(other)


def test_a_reader_that_was_asked_to_end_did_not_run_out_of_memory() -> None:
    def lost(name: str) -> RuntimeError:
        error = RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly")
        error.__cause__ = RuntimeError(f"DataLoader worker (pid 7) is killed by signal: {name}. ")
        return error

    assert is_killed_reader(lost("Killed")) and is_killed_reader(
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    )
    assert is_killed_reader(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "))
    assert not is_killed_reader(lost("Terminated")) and not is_killed_reader(RuntimeError("worker exited"))


def test_an_error_is_told_once_and_other_errors_are_left_as_they_are() -> None:
    memory = OutOfMemory(compose(["trainer.accelerator=cpu"]), {}, Path("none"))
    memory.model = nn.Linear(4, 4)
    with pytest.raises(MemoryExhausted) as caught, memory.told(), memory.told():
        raise MemoryExhausted("out of memory: a single example of 9 tokens does not fit")
    assert str(caught.value).count("best first") == 1 and "a single example of 9 tokens does not fit" in str(
        caught.value
    )
    assert memory.model is None  # a sweep goes on, and needs what the job held
    for error in (InputError("data.path: out of memory.jsonl is empty"), KeyError("a bug")):
        assert raised(lambda error=error: planted_in(memory, error)) is error


def planted_in(memory: OutOfMemory, error: Exception) -> None:
    with memory.told():
        raise error


# ------------------------------------------------------------------------------------------------ paged again


class OnDevice:
    """As much of a parameter on a CUDA device as bitsandbytes looks at to make its state."""

    device = torch.device("cuda", 0)

    def __init__(self, *shape: int) -> None:
        self.shape = torch.Size(shape)

    def numel(self) -> int:
        return self.shape.numel()


def paged(*shape: int, dtype: torch.dtype, device: torch.device) -> Any:
    buffer: Any = torch.full(shape, 7, dtype=dtype)
    buffer.is_paged, buffer.page_deviceid = True, device.index
    return buffer


@pytest.fixture
def managed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """bitsandbytes with pageable memory that any machine has; what it knows to be paged."""
    monkeypatch.setattr(bitsandbytes.functional, "get_paged", paged)
    monkeypatch.setattr(bitsandbytes.functional, "fill", lambda buffer, value: buffer.fill_(value))
    known: list[torch.Tensor] = []
    monkeypatch.setattr(bitsandbytes.functional.GlobalPageManager.get_instance(), "paged_tensors", known)
    return known


def restored(optimizer: Any, parameter: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    values = torch.arange(parameter.numel()).remainder(251)
    state = {name: (values + 1).to(dtype).view(parameter.shape) for name in ("state1", "state2")}
    optimizer.state[parameter] = state | {"absmax1": torch.ones(parameter.numel() // 256 + 1), "step": 3}
    return dict(optimizer.state[parameter])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_restored_state_is_paged_as_a_fresh_optimizer_would_and_keeps_its_values(
    dtype: torch.dtype, managed: list[torch.Tensor]
) -> None:
    optimizer: Any = PagedAdamW8bit([nn.Parameter(torch.zeros(4))])
    large, small = OnDevice(400, 250), OnDevice(333, 300)  # 100,000 elements, and a few less
    before = restored(optimizer, large, dtype)
    restored(optimizer, small, dtype)
    page_again(optimizer)
    after = optimizer.state[large]
    for name in ("state1", "state2"):
        assert after[name].is_paged and after[name].dtype == dtype and torch.equal(after[name], before[name])
        assert not hasattr(optimizer.state[small][name], "is_paged")
    assert after["absmax1"] is before["absmax1"] and after["step"] == 3
    assert [id(tensor) for tensor in managed] == [id(after["state1"]), id(after["state2"])]
    page_again(optimizer)
    assert len(managed) == 2 and optimizer.state[large]["state1"] is managed[0]


def test_an_optimizer_that_does_not_page_keeps_its_state_where_it_is(managed: list[torch.Tensor]) -> None:
    optimizer: Any = AdamW8bit([nn.Parameter(torch.zeros(4))])
    large = OnDevice(400, 250)
    before = restored(optimizer, large, torch.uint8)
    page_again(optimizer)
    page_again(torch.optim.AdamW([nn.Parameter(torch.zeros(4))]))
    assert not managed and optimizer.state[large]["state1"] is before["state1"]
