"""`lorafit NAME …` and `python -m lorafit NAME …`: the programs behind one name.

Each is also `python -m lorafit.NAME …`. A program is a module of that name with a `main()`; it sees
the overrides after its name as its own command line.
"""

from __future__ import annotations

import importlib
import sys

from lorafit.errors import InputError, did_you_mean

PROGRAMS = {
    "train": "fine-tune a model; leaves a run folder with the adapter and what it achieved",
    "merge": "put an adapter into the weights by the way that costs least, or take it out again",
    "evaluate": "measure held-out data with the adapter on and off",
    "generate": "answer a prompt, a file of prompts or a chat, with one adapter, several or none",
    "ranks": "how much rank an adapter uses, and what cutting it down costs",
    "audit": "show which tokens and which modules train would train; refuse what would fail in silence",
    "report": "what the runs of a sweep say together: one page, a table, a recommendation",
    "bench": "step time and memory against peft, TRL, litgpt and unsloth, measured in one run",
}


def _usage() -> str:
    width = max(map(len, PROGRAMS))
    lines = [f"  {name:{width}}  {what}" for name, what in PROGRAMS.items()]
    return "\n".join(
        [
            "lorafit NAME [key=value …]",
            "",
            *lines,
            "",
            "lorafit NAME --help shows what a program can be told.",
        ]
    )


def main() -> None:
    """Hand the command line to the program that its first word names."""
    name, *overrides = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(_usage())
        return
    if name not in PROGRAMS:
        hint = did_you_mean(name, PROGRAMS) or f" There is {', '.join(PROGRAMS)}."
        print(f"lorafit: no program {name!r}.{hint}", file=sys.stderr)
        sys.exit(InputError.exit_code)
    sys.argv = [f"lorafit {name}", *overrides]
    importlib.import_module(f"lorafit.{name}").main()


if __name__ == "__main__":
    main()
