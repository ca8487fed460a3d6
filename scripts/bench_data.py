"""How fast text becomes tokens, against `datasets.map`, and how much memory a stream takes.

    python scripts/bench_data.py --out bench_data.json                      both, on the data in the package
    python scripts/bench_data.py --model FOLDER --data train.jsonl          another tokenizer, other rows
    python scripts/bench_data.py --only memory

Speed: `read_corpus` without a cache reads, renders the template, labels the answers and keeps the tokens. Against it
`datasets.map` with the same tokenizer: "text" tokenizes the rendered texts in batches and nothing else; "labels" does
the same work as lorafit, as one would write it (the tokens of prompt and answer, and of the prompt alone, whose number
is masked). The sides alternate, so that a slow moment hits all of them; reported are the medians.

Memory: the largest resident memory of `python -m lorafit.train data.streaming=true` over a small file and over one a
hundred times as long, with the same number of steps, of which the long one reads several hundred megabytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lorafit.data import Encoder, Formatter, load_tokenizer, parse_sources, read_corpus, read_rows

MAX_LENGTH = 512


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    packages = ("lorafit", "tokenizers", "transformers", "datasets", "torch")
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "date": str(date.today()),
    }


# ------------------------------------------------------------------------------------------------ speed


def repeated_rows(source: str, rows: int, folder: Path) -> Path:
    """A file of so many rows: those of the source as messages, over and over, each with a number of its own."""
    formatter, made = Formatter(), []
    for row in read_rows(source):
        turns = formatter(row).turns
        if len(turns) > 1:  # a text of its own has no prompt to mask
            made.append([{"role": turn.role, "content": turn.content} for turn in turns])
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for index in range(rows):
            first, *rest = made[index % len(made)]
            messages = [first | {"content": f"{index}. {first['content']}"}, *rest]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


# runs once: (tokens, seconds)
Side = Callable[[], tuple[int, float]]


def lorafit_side(path: Path, name: str) -> Side:
    def run() -> tuple[int, float]:
        began = time.perf_counter()
        encoder = Encoder(load_tokenizer(name), max_length=MAX_LENGTH)
        corpus = read_corpus(parse_sources(str(path)), encoder, eval_fraction=0.01)
        return len(corpus.train.ids) + len(corpus.held_out.ids), time.perf_counter() - began

    return run


def datasets_side(path: Path, name: str, processes: int, *, labels: bool) -> Side:
    import datasets

    datasets.disable_progress_bars()

    def run() -> tuple[int, float]:
        began = time.perf_counter()
        tokenizer: Any = load_tokenizer(name)
        chat = tokenizer.chat_template is not None

        def texts(messages: list[dict[str, str]]) -> tuple[str, str]:
            """The prompt as text, and the whole."""
            if chat:
                prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
                return prompt, tokenizer.apply_chat_template(messages, tokenize=False)
            prompt = "".join(f"{message['content']}\n" for message in messages[:-1])
            return prompt, prompt + messages[-1]["content"] + tokenizer.eos_token

        def only_text(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            return {"input_ids": tokenizer(rows["text"], add_special_tokens=False)["input_ids"]}

        def with_labels(row: dict[str, Any]) -> dict[str, Any]:
            prompt, whole = texts(row["messages"])
            ids = tokenizer(whole, add_special_tokens=False)["input_ids"][:MAX_LENGTH]
            masked = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            return {"input_ids": ids, "labels": [-100] * min(masked, len(ids)) + ids[masked:]}

        with tempfile.TemporaryDirectory() as cache:
            rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
            options: dict[str, Any] = {"num_proc": processes if processes > 1 else None, "load_from_cache_file": False}
            if labels:
                done = rows.map(with_labels, remove_columns=rows.column_names, **options)
            else:
                rendered = [{"text": texts(messages)[1]} for messages in rows["messages"]]
                rows = datasets.Dataset.from_list(rendered)
                began = time.perf_counter()  # neither reading nor rendering counts here
                done = rows.map(only_text, batched=True, remove_columns=["text"], **options)
            seconds = time.perf_counter() - began
            return sum(len(ids) for ids in done["input_ids"]), seconds

    return run


def speed(name: str, source: str, rows: int, rounds: int) -> list[dict[str, Any]]:
    """Tokens per second of each side: the medians of so many rounds."""
    with tempfile.TemporaryDirectory() as folder:
        path = repeated_rows(source, rows, Path(folder))
        sides: dict[str, Side] = {"lorafit: all of it": lorafit_side(path, name)}
        for labels in (False, True):
            for processes in (1, 2):
                what = f"datasets.map: {'labels' if labels else 'text alone'}, num_proc={processes}"
                sides[what] = datasets_side(path, name, processes, labels=labels)
        found: dict[str, list[float]] = {side: [] for side in sides}
        tokens: dict[str, int] = {}
        for number in range(rounds + 1):
            for side, run in sides.items():
                tokens[side], seconds = run()
                if number:  # the first round warms up
                    found[side].append(seconds)
                print(f"  {side}: {tokens[side] / seconds:,.0f} tokens/s", file=sys.stderr)
    return [
        {
            "side": side,
            "tokens": tokens[side],
            "seconds": [round(value, 3) for value in seconds],
            "tokens_per_second": round(tokens[side] / statistics.median(seconds)),
        }
        for side, seconds in found.items()
    ]


# ------------------------------------------------------------------------------------------------ memory


@contextmanager
def file_of(megabytes: int) -> Iterator[Path]:
    """Rows of 2 kB, of which one in a hundred has an answer: reading is what takes the time, and not training.

    The texts that are trained are few, and the same in a file of any size: torch keeps something for every shape of a
    batch that it has met, and that is not what is measured here.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, note = Path(folder) / "rows.jsonl", "by the sea " * 180
        with path.open("w") as file:
            for number in itertools.takewhile(lambda _: file.tell() < megabytes * 1_000_000, itertools.count()):
                row = {"prompt": f"what is {number // 100 % 90}?", "completion": "" if number % 100 else "a town"}
                file.write(json.dumps(row | {"note": note}) + "\n")
        yield path


def peak_of_run(megabytes: int, steps: int) -> dict[str, Any]:
    """The largest resident memory of one streaming run, and how much of the file it read."""
    with file_of(megabytes) as path, tempfile.TemporaryDirectory() as folder:
        overrides = {
            "data.path": path,
            "data.streaming": "true",
            "data.window": 4096,
            "data.on_bad_row": "skip",
            "data.batch_size": 32,
            "trainer.max_steps": steps,
            "trainer.accelerator": "cpu",
            "task.eval_examples": 16,
            "task.generate_examples": 0,
            "task.samples": 0,
            "hydra.run.dir": folder,
        }
        command = [sys.executable, "-m", "lorafit.train", *(f"{key}={value}" for key, value in overrides.items())]
        began = time.perf_counter()
        alone = os.environ | {"OMP_NUM_THREADS": "1"}  # threads of their own would add to the memory as they like
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=alone)
        error = process.stderr.read() if process.stderr else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"the run over {megabytes} MB failed:\n{error}")
        data = json.loads((Path(folder) / "metrics.json").read_text())["data"]
        rows = data["train_examples"] + data["skipped_rows"]
        return {
            "file_mb": round(path.stat().st_size / 1e6),
            "peak_mb": round(usage.ru_maxrss / 1024),
            "rows_read": rows,
            "read_mb": round(rows * path.stat().st_size / sum(1 for _ in path.open("rb")) / 1e6),
            "seconds": round(time.perf_counter() - began, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="whose tokenizer")
    parser.add_argument("--data", default="embedded", help="a file of rows, repeated")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120, help="of the streaming runs")
    parser.add_argument("--only", choices=("speed", "memory"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(), "arguments": {**vars(arguments), "out": None}}
    print(f"{report['machine']['cpu']}, {report['machine']['cores']} cores, load {report['machine']['load_average']}")
    if arguments.only != "memory":
        report["speed"] = speed(arguments.model, arguments.data, arguments.rows, arguments.rounds)
        for line in report["speed"]:
            print(f"{line['side']:42} {line['tokens_per_second']:>12,} tokens/s  ({line['tokens']:,} tokens)")
    if arguments.only != "speed":
        report["memory"] = [peak_of_run(megabytes, arguments.steps) for megabytes in (20, 2000)]
        for line in report["memory"]:
            print(
                f"streaming over {line['file_mb']:>5,} MB: peak {line['peak_mb']:,} MB, {line['read_mb']:,} MB read in "
                f"the first epoch, {line['seconds']} s"
            )
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    if "memory" in report and abs(report["memory"][1]["peak_mb"] - report["memory"][0]["peak_mb"]) > 300:
        raise SystemExit("memory grew with the file by more than 300 MB")


if __name__ == "__main__":
    main()
