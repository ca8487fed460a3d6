"""A program of lorafit as its command runs it, in the process of the test."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def logging_kept() -> Iterator[None]:
    """Hydra sets up logging for each job; afterwards it is as it was."""
    root, failure = logging.getLogger(), logging.getLogger("lorafit.failure")
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        for handler in {*root.handlers, *failure.handlers} - set(handlers):
            handler.close()
        root.handlers[:], failure.handlers[:] = handlers, []
        root.setLevel(level)


def run_program(module: Any, *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python -m lorafit.NAME arguments`. module: lorafit.NAME."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch, logging_kept():
        patch.setattr(sys, "argv", [module.__name__.replace(".", " "), *arguments])
        patch.setenv("HYDRA_FULL_ERROR", "1")
        patch.setenv("LORAFIT_IN_PROCESS", "1")  # the jobs of a sweep as well
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                module.main()
            except SystemExit as end:
                assert isinstance(end.code, int)
                code = end.code
    return code, out.getvalue(), err.getvalue()
