"""Streams: the same batches with any number of workers, resumed at any place, and memory that does not grow.

pytest tests/test_stream.py
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafit.callbacks import Checkpoints, SkipNonFinite, StepMetrics, StopOnSignal
from lorafit.checkpoint import load_checkpoint
from lorafit.data import Encoder, StreamLoader, load_tokenizer, parse_sources
from lorafit.data.formats import Formatter
from lorafit.data.sources import read_rows
from lorafit.datamodule import FinetuneDataModule
from lorafit.errors import InputError, Stopped
from lorafit.module import FinetuneModule
from lorafit.trainer import build_trainer, quiet_libraries

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than there are cores
]
TOKENIZER = load_tokenizer("embedded")
COUNT, WINDOW = 43, 10
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "packing": {"packing": True},
    "padding_free": {"padding_free": True},
    "packing, padding_free": {"packing": True, "padding_free": True},
    "by length": {"group_by_length": True},
}


def word(index: int) -> str:
    """A number in letters, so that a token of the tokenizer is never more than one of them."""
    return "".join("abcdefghij"[int(digit)] for digit in str(index))


def row(index: int) -> dict[str, str]:
    return {"prompt": f"q {word(index)}", "completion": " ".join([word(index)] * (1 + index % 7))}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "a.jsonl", *(row(index) for index in range(COUNT)))


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in rows))
    return path


def stream(path: Any, *, length: int = 20, max_length: int = 64, **options: Any) -> StreamLoader:
    settings = {"batch_size": 3, "pad_id": 0, "window": WINDOW, "seed": 5} | options
    encoder = Encoder(TOKENIZER, max_length=max_length)
    return StreamLoader(parse_sources(path), encoder, length=length, **settings)


def key(batch: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.tolist() for name, value in batch.items()}


def batches(loader: StreamLoader, count: int | None = None) -> list[dict[str, Any]]:
    return [key(batch) for batch in itertools.islice(loader, count)]


def epoch_length(path: Any, **options: Any) -> int:
    """Batches in an epoch: how many there are when the second one begins."""
    loader = stream(path, length=10**6, **options)
    return sum(1 for _ in itertools.takewhile(lambda _: loader.epoch == 0, loader))


def rows_of(found: list[dict[str, Any]]) -> Counter[str]:
    """How often each prompt comes up: examples are told apart by where their places begin anew, or by their row."""
    prompts: Counter[str] = Counter()
    for batch in found:
        for number, ids in enumerate(batch["input_ids"]):
            ends = [at for at, token in enumerate(ids) if token == TOKENIZER.eos_token_id]
            start = 0
            for end in ends:
                text = TOKENIZER.decode(ids[start : end + 1])
                if "q " in text:
                    prompts[text.split("\n")[0].strip()] += 1
                start = end + 1
            assert ends, f"row {number} holds no whole example"
    return prompts


# --- the same batches -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_any_number_of_workers_hands_out_the_same_batches(data: Path, options: dict[str, Any]) -> None:
    """Over more than two epochs, of five windows each, the last a short one."""
    length = 2 * epoch_length(data, **options) + 3
    expected = batches(stream(data, length=length, **options))
    assert len(expected) == length
    for workers in (1, 3):
        assert batches(stream(data, length=length, num_workers=workers, **options)) == expected


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_it_goes_on_exactly_where_another_stood(data: Path, options: dict[str, Any]) -> None:
    length = 2 * epoch_length(data, **options) + 3
    expected = batches(stream(data, length=length, **options))
    first = stream(data, length=length, **options)
    states = [json.dumps(first.state_dict())] + [json.dumps(first.state_dict()) for _ in first]
    assert len(states) == length + 1
    for position, state in enumerate(states):
        second = stream(data, length=length, **options)
        second.load_state_dict(json.loads(state))
        assert batches(second) == expected[position:]


@pytest.mark.parametrize(("workers", "others"), [(2, 0), (0, 2), (3, 1)])
def test_it_goes_on_with_another_number_of_workers(data: Path, workers: int, others: int) -> None:
    options = {"packing": True, "length": 25}
    expected = batches(stream(data, **options))
    for position in (1, 9, 14, 22):  # in the first and the last window, and in the second epoch
        first = stream(data, num_workers=workers, **options)
        seen = batches(first, position)
        second = stream(data, num_workers=others, **options)
        second.load_state_dict(first.state_dict())
        assert seen + batches(second) == expected
        assert second.state_dict()["report"]["rows"] == COUNT == second.examples  # counted once, before or after


def test_it_goes_on_after_it_was_left_in_the_middle(data: Path) -> None:
    expected, loader = batches(stream(data)), stream(data)
    assert batches(loader, 4) + batches(loader, 9) + batches(loader) == expected
    assert batches(loader) == []


@pytest.mark.parametrize("length", [1, 4, 33])
def test_its_length_is_exact(data: Path, length: int) -> None:
    loader = stream(data, length=length)
    assert len(loader) == length == len(batches(loader))


def test_it_draws_nothing_from_the_global_generator(data: Path) -> None:
    before = torch.get_rng_state()
    batches(stream(data)), batches(stream(data, num_workers=1))
    assert torch.equal(torch.get_rng_state(), before)


# --- which rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [MODES["plain"], MODES["packing"], MODES["by length"]], ids=str)
def test_every_row_comes_up_once_an_epoch_but_for_those_held_out(data: Path, options: dict[str, Any]) -> None:
    examples = [Formatter()(found) for found in read_rows(data)]
    held_out = {example.prompt for example in examples if example.position() < 0.3}
    assert 3 < len(held_out) < 25
    options = options | {"eval_fraction": 0.3}
    epoch = epoch_length(data, **options)
    found = batches(stream(data, length=2 * epoch, **options))
    once = Counter({example.prompt: 1 for example in examples if example.prompt not in held_out})
    assert rows_of(found[:epoch]) == once == rows_of(found[epoch:])
    assert found[:epoch] != found[epoch:]


def test_a_window_is_shuffled_and_windows_stay_in_order(data: Path) -> None:
    found = batches(stream(data, length=COUNT, batch_size=1))
    order = [next(iter(rows_of([batch]))) for batch in found]
    prompts = [row(index)["prompt"] for index in range(COUNT)]
    for start in range(0, COUNT, WINDOW):
        part = slice(start, start + WINDOW)
        assert sorted(order[part]) == sorted(prompts[part]) and order[part] != prompts[part]
    whole = range(0, COUNT - WINDOW, WINDOW)
    ways = {tuple(prompts.index(prompt) - start for prompt in order[start : start + WINDOW]) for start in whole}
    assert len(ways) == len(whole)  # each in a way of its own


@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_share_the_rows_and_no_row_falls_to_two(data: Path, replicas: int) -> None:
    seen: Counter[str] = Counter()
    for replica in range(replicas):
        options = {"replica": replica, "replicas": replicas}
        length = epoch_length(data, **options)
        found = batches(stream(data, length=length, **options))
        seen += rows_of(found)
        assert batches(stream(data, length=length, num_workers=2, **options)) == found
    assert seen == Counter({row(index)["prompt"]: 1 for index in range(COUNT)})


def test_a_replica_that_no_window_falls_to_says_so(data: Path) -> None:
    with pytest.raises(InputError, match="to process 3 of 3 .* lower data.window"):
        batches(stream(data, window=30, replica=2, replicas=3))


def test_sources_are_mixed_by_weight_until_each_has_ended_once(tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", *({"prompt": f"x {word(i)}", "completion": "a"} for i in range(10)))
    many = write(tmp_path / "many.jsonl", *({"prompt": f"y {word(i)}", "completion": "b"} for i in range(300)))
    sources = [{"path": str(few), "weight": 1}, {"path": str(many), "weight": 3}]
    loader = stream(sources, length=10**6, window=64)
    kinds: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    for batch in itertools.takewhile(lambda _: loader.epoch == 0, loader):
        for ids in batch["input_ids"].tolist():
            prompt = TOKENIZER.decode(ids).split("\n")[0].strip()
            kinds[prompt[0]] += 1
            rows[prompt] += 1
    assert set(rows) == {f"x {word(i)}" for i in range(10)} | {f"y {word(i)}" for i in range(300)}
    assert 2 < kinds["y"] / kinds["x"] < 4.5  # 3 expected
    # a small source comes up again only when all of it has
    times = [rows[f"x {word(i)}"] for i in range(10)]
    assert min(times) > 5 and max(times) - min(times) <= 1


# --- bad rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_bad_row_is_one_message_that_names_it_also_from_a_worker(tmp_path: Path, workers: int) -> None:
    path = write(tmp_path / "a.jsonl", *(row(index) for index in range(25)), "{broken", row(26))
    loader, seen = stream(path, num_workers=workers), []
    with pytest.raises(InputError) as caught:
        seen += batches(loader)
    message = str(caught.value)
    assert f"{path}:26: the line is not JSON" in message and "\n" not in message and "Traceback" not in message
    assert loader.handed_out == 8  # the two windows before it


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_further_on_is_one_message_that_names_it(tmp_path: Path, workers: int) -> None:
    write(tmp_path / "a.jsonl", *(row(index) for index in range(25)))
    (tmp_path / "b.csv").write_text("prompt,prompt,completion\nx,y,z\n")
    with pytest.raises(InputError) as caught:
        batches(stream(tmp_path, num_workers=workers))
    assert "b.csv:1: the header names 'prompt' twice" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_that_are_skipped_are_counted_once(tmp_path: Path, workers: int) -> None:
    rows: list[Any] = [row(index) for index in range(30)]
    rows[3], rows[17], rows[29] = "{broken", {"prompt": "x"}, {"prompt": "y", "completion": ""}
    path = write(tmp_path / "a.jsonl", *rows)
    options = {"on_bad_row": "skip", "num_workers": workers, "window": 5}
    loader = stream(path, length=3 * epoch_length(path, **options), **options)
    found = batches(loader)
    assert loader.epoch == 2
    assert (loader.report.rows, loader.report.skipped, loader.examples) == (30, 3, 27)
    assert [text.split(": ")[0] for text in loader.report.bad_rows] == [f"{path}:{n}" for n in (4, 18, 30)]
    assert loader.tokens == sum(batch["tokens"] for batch in found) / 3
    assert (
        loader.supervised_tokens
        == sum(label != -100 for batch in found for labels in batch["labels"] for label in labels) / 3
    )


def test_data_without_a_row_to_train_is_an_error_and_no_endless_loop(tmp_path: Path, data: Path) -> None:
    with pytest.raises(InputError, match="no row of the data has a token to train"):
        batches(stream(data, max_length=2))
    with pytest.raises(InputError, match="no row of the data has a token to train"):
        batches(stream(data, eval_fraction=1.0, packing=True, group_by_length=True))


def test_windows_in_which_all_rows_are_bad_or_held_out_are_passed_over(tmp_path: Path) -> None:
    rows = ["{broken"] * 12 + [row(1)] + ["{broken"] * 12 + [row(2)]
    path = write(tmp_path / "a.jsonl", *rows)
    found = batches(stream(path, length=4, window=4, on_bad_row="skip", num_workers=2))
    assert rows_of(found) == {row(1)["prompt"]: 2, row(2)["prompt"]: 2}


# --- memory ---------------------------------------------------------------------------------------


class Counted(StreamLoader):
    """Counts the windows that were read, in whichever process."""

    counter = multiprocessing.Value("i", 0)

    def read(self, rows: list[Any]) -> Any:
        with self.counter.get_lock():
            self.counter.value += 1
        return super().read(rows)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_at_most_one_window_a_worker_is_read_ahead(data: Path, workers: int) -> None:
    encoder = Encoder(TOKENIZER, max_length=64)
    Counted.counter.value = 0
    loader = Counted(parse_sources(data), encoder, length=99, batch_size=5, pad_id=0, window=5, num_workers=workers)
    for number, _ in enumerate(itertools.islice(loader, 3), start=1):  # a batch is a window here
        time.sleep(0.3 if workers else 0)
        assert Counted.counter.value <= number + workers


PEAK = """
import sys
from lorafit.data import Encoder, StreamLoader, load_tokenizer, parse_sources

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

encoder = Encoder(load_tokenizer("embedded"), max_length=2048)
for path, rows in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    loader = StreamLoader(parse_sources(path), encoder, length=10**6, batch_size=8, pad_id=0, window=200)
    next(iter(loader))
    loader.load_state_dict(loader.state_dict() | {"window": rows // 200 - 1, "position": 0})
    for batch in loader:  # the last window, for which all of the file is read
        if loader.epoch:
            break
    print(peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Peak resident memory over 5 MB and then over 100 MB, both read from end to end."""
    block = (json.dumps({"prompt": "q", "completion": "It is a town by the sea. " * 40}) + "\n") * 1000
    arguments = []
    for megabytes in (5, 100):
        path = tmp_path / f"{megabytes}.jsonl"
        blocks = -(-megabytes * 10**6 // len(block))
        with path.open("w") as file:
            file.writelines(itertools.repeat(block, blocks))
        arguments += [str(path), str(1000 * blocks)]
        assert path.stat().st_size >= megabytes * 10**6
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = map(float, done.stdout.split())
    assert 0 <= large - small < 20


# --- in a trainer ---------------------------------------------------------------------------------


def train(
    folder: Path, path: Path, *, stop: int | None = None, resume: Path | None = None, **options: Any
) -> tuple[list[tuple[int, float]], dict[str, Tensor], dict[str, Any]]:
    """Ten steps of two batches over packed rows, with dropout: (losses, adapter, the data's statistics)."""
    torch.manual_seed(123 if resume is None else 321)  # what a resumed run drew before is not what the first one drew
    quiet_libraries()
    data = FinetuneDataModule(
        str(path), batch_size=2, eval_limit=4, eval_fraction=0.1, packing=True, max_length=40, **options
    )
    made = FinetuneModule(rank=4, alpha=8, dropout=0.1, device="cpu", optimizer_args={"lr": 1e-2})
    checkpoints, metrics = Checkpoints(folder), StepMetrics()
    signals = StopOnSignal(checkpoints)

    class Stop(SkipNonFinite):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            super().on_train_batch_end(trainer, *rest)
            if trainer.global_step == stop:
                signals.stopping.asked.append(15)

    data.setup()
    trainer = build_trainer(
        folder,
        batches=len(data.train_dataloader()),
        max_steps=10,
        accumulate_grad_batches=2,
        val_check_interval=3,
        accelerator="cpu",
        callbacks=[Stop(), metrics, checkpoints, signals],
    )
    try:
        trainer.fit(made, data, ckpt_path=str(resume) if resume else None)
        assert stop is None
    except Stopped:
        assert stop is not None
    return metrics.losses, {name: value.clone() for name, value in made.state_dict().items()}, data.statistics()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [True, False], ids=["streamed", "in memory"])
def test_a_resumed_run_over_packed_rows_is_the_unbroken_one_bit_for_bit(
    tmp_path: Path, data: Path, streaming: bool, workers: int
) -> None:
    options = {"streaming": True, "stream_batches": 20, "window": 9} if streaming else {}
    options["num_workers"] = workers
    losses, adapter, counted = train(tmp_path / "whole", data, **options)
    began, _, _ = train(tmp_path / "first", data, stop=3, **options)
    last = tmp_path / "first" / "last.ckpt"
    state = load_checkpoint(last)
    [stood] = state["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert state["global_step"] == 3 and stood["position"] > 0 and stood["epoch"] == 0  # in the middle of an epoch
    assert not streaming or stood["window"] > 0
    ended, resumed, counted_again = train(tmp_path / "second", data, resume=last, **options)
    assert len(losses) == 10 and began + ended == losses
    assert all(torch.equal(resumed[name], value) for name, value in adapter.items())
    assert counted_again == counted and counted["streaming"] == streaming


def test_answers_that_a_later_window_loses_are_told_while_it_trains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = [row(index) for index in range(20)]
    long = [{"prompt": "q", "completion": "word " * 80}] * 20
    path = write(tmp_path / "b.jsonl", *short, *long)
    batches(stream(path, length=10, max_lost=0.2))
    said = [record for record in caplog.records if "lose their answer to data.max_length=64" in record.getMessage()]
    assert len(said) == 1 and "data.max_lost is 0.2" in said[0].getMessage()
    caplog.clear()
    batches(stream(path, length=10))
    assert not caplog.records
