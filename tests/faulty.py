"""Programs of lorafit in processes of their own, to be stopped, killed and starved; without their seconds of imports.

    child = forked(["rank=4", f"hydra.run.dir={folder}"], before=pausing("lorafit.adapter:save_adapter", "save"))
    child.until("save")                     # it stands there now
    os.kill(child.pid, signal.SIGTERM)
    child.go()                              # it goes on from there
    code, out, err = child.wait(60)

The first call starts a server: a process that has imported everything and has neither threads nor tensors, so that it
can be forked (PyTorch's autograd cannot, once it has run). Each program runs in a fork of it, in a process group of its
own, with the environment and the working folder of its caller. Server and children end with the process that asked.

`before` is called in the child before the program: a function of a module that can be imported, or a functools.partial
of one. There it may patch what it likes, and call `tell(word)` or `pause(word)`. exit code: as of a shell's `$?`, but
minus the signal where the process died by one.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import functools
import importlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_IMPORTED = ("lorafit.train", "lorafit.callbacks", "lorafit.callbacks.wandb", "lorafit.module", "lorafit.datamodule")
_IMPORTED += ("lorafit.adapter", "lorafit.retention", "lorafit.resuming", "lorafit.tables", "lorafit.memory", "wandb")
_IMPORTED += ("lorafit.fastpath", "lorafit.data", "lorafit.data.checks", "lorafit.spectrum", "lorafit.machine")
_IMPORTED += ("lightning.pytorch.loggers", "transformers", "transformers.models.llama.modeling_llama", "rich.console")
_told: socket.socket | None = None  # in a child: where the caller listens


class Child:
    """A program that runs. pid: of its process, which leads a process group."""

    def __init__(self, request: dict[str, Any], address: str, folder: Path) -> None:
        self._folder = folder
        self._said: list[str] = []
        self._code: int | None = None
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        sent = pickle.dumps(request)
        self._socket.sendall(len(sent).to_bytes(8, "little") + sent)
        self._rest = b""
        self.pid = int(self._word("pid", 60))

    def until(self, word: str, timeout: float = 60) -> None:
        """Wait until the program has told this word; TimeoutError where it does not, or ends before."""
        deadline = time.monotonic() + timeout
        while word not in self._said:
            self._read(deadline, f"it has not come to {word!r}")
            if self._code is not None and word not in self._said:
                self._fail(f"it ended ({self._code}) before it came to {word!r}")

    def go(self) -> None:
        """Let a program go on that pauses."""
        self._socket.sendall(b".")

    def wait(self, timeout: float = 60) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of the program. One that has not ended in time is killed, and TimeoutError says
        where it stood."""
        deadline = time.monotonic() + timeout
        while self._code is None:
            self._read(deadline, f"it has not ended in {timeout:g} s")
        self._socket.close()
        return self._code, self.text("out"), self.text("err")

    def text(self, which: str) -> str:
        """What stands on "out" or "err" so far."""
        return (self._folder / which).read_text(errors="replace")

    def left_behind(self) -> list[int]:
        """The processes of its group that still run."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            except (OSError, ValueError):
                continue
            if int(group) == self.pid and state != "Z":
                found.append(int(stat.parent.name))
        return found

    def _word(self, kind: str, timeout: float) -> str:
        deadline = time.monotonic() + timeout
        while True:
            for said in self._said:
                if said.startswith(f"{kind} "):
                    return said.partition(" ")[2]
            self._read(deadline, f"no {kind}")

    def _read(self, deadline: float, failing: str) -> None:
        ready, _, _ = select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            self._fail(failing)
        got = self._socket.recv(65536)
        if not got:
            self._fail("its server is gone")
        *lines, self._rest = (self._rest + got).split(b"\n")
        for line in lines:
            text = line.decode()
            if text.startswith("ended "):
                self._code = int(text[6:])
            else:
                self._said.append(text)

    def _fail(self, why: str) -> None:
        if self._code is None:
            os.kill(self.pid, signal.SIGUSR2)  # it tells where it stands
            time.sleep(0.5)
        self._socket.close()  # the server kills its group
        raise TimeoutError(f"{why}\n{self.text('out')[-3000:]}\n{self.text('err')[-6000:]}")


def forked(
    arguments: Sequence[str], before: Callable[[], object] | None = None, *, program: str = "lorafit.train"
) -> Child:
    """Start `python -m PROGRAM arguments` in a fork of the server."""
    address, home = _server()
    folder = Path(tempfile.mkdtemp(dir=home))
    for name in ("out", "err"):  # a child may be killed before it has opened them
        (folder / name).touch()
    request = {
        "program": program,
        "arguments": list(arguments),
        "before": pickle.dumps(before),  # unpickled in the child: the server is to import nothing of the tests
        # not the W&B service of this process, where a test has started one: it is not the program's to break
        "environment": {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
        | {"OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "1"},
        "path": sys.path,
        "cwd": os.getcwd(),
        "out": str(folder / "out"),
        "err": str(folder / "err"),
    }
    return Child(request, address, folder)


# ------------------------------------------------------------------------------------------- called in a child


def tell(word: str) -> None:
    """Say a word to `Child.until`."""
    if _told is not None:
        _told.sendall(f"{word}\n".encode())


def pause(word: str) -> None:
    """Say a word and stand still until `Child.go`; signals are handled meanwhile."""
    tell(word)
    if _told is not None:
        _told.recv(1)


def pausing(place: str, word: str, times: Iterable[int] = (1,), after: bool = False) -> Callable[[], None]:
    """A `before` that pauses where "module:Name.of.callable" is called the first time (or those times), before it or
    after it."""
    return functools.partial(_pause_at, place, word, tuple(times), after)


def failing(place: str, number: int, matching: str = "", times: int = 10**9) -> Callable[[], None]:
    """A `before` that makes calls of "module:Name.of.callable" raise OSError(number), so many times: those of whose
    first argument the text holds `matching`."""
    return functools.partial(_fail_at, place, number, matching, times)


def both(*hooks: Callable[[], object]) -> Callable[[], None]:
    """A `before` that is several."""
    return functools.partial(_all, hooks)


def _all(hooks: Sequence[Callable[[], object]]) -> None:
    for hook in hooks:
        hook()


def _place(place: str) -> tuple[Any, str]:
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *holders, name = path.split(".")
    for holder in holders:
        owner = getattr(owner, holder)
    return owner, name


def _pause_at(place: str, word: str, times: tuple[int, ...], after: bool) -> None:
    owner, name = _place(place)
    inner, calls = getattr(owner, name), 0

    @functools.wraps(inner)
    def paused(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        here = calls in times
        if here and not after:
            pause(word)
        result = inner(*args, **kwargs)
        if here and after:
            pause(word)
        return result

    setattr(owner, name, paused)


def _fail_at(place: str, number: int, matching: str, times: int) -> None:
    owner, name = _place(place)
    inner, left = getattr(owner, name), times

    @functools.wraps(inner)
    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if left and matching in str(args[:1]):
            left -= 1
            raise OSError(number, os.strerror(number), *map(str, args[:1]))
        return inner(*args, **kwargs)

    setattr(owner, name, failing)


def without_roots_rights() -> None:
    """A `before` for root, whom permissions do not hinder: take CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH away."""
    if os.geteuid() != 0:
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, sets) == 0:
        sets[0] &= ~0b110  # effective
        sets[1] &= ~0b110  # permitted
        if libc.capset(header, sets) == 0:
            return
    raise OSError(ctypes.get_errno(), "capset")


# --------------------------------------------------------------------------------------------------- the server

_serving: tuple[subprocess.Popen[bytes], str, Path] | None = None


def _server() -> tuple[str, Path]:
    global _serving
    if _serving is None or _serving[0].poll() is not None:
        keeper = tempfile.TemporaryDirectory(prefix="lorafit-faulty-")
        home = Path(keeper.name)
        address = str(home / "socket")
        environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(
            [sys.executable, str(HERE / "faulty.py"), address],
            stdin=subprocess.PIPE,  # it ends where this is closed
            stdout=subprocess.PIPE,
            env=environment,
            process_group=0,
        )
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError("the server of tests/faulty.py has not started")
        _serving = process, address, home
        atexit.register(_end, process, keeper)
    return _serving[1], _serving[2]


def _end(process: subprocess.Popen[bytes], keeper: tempfile.TemporaryDirectory[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait(20)
    keeper.cleanup()


def _serve(address: str) -> None:
    sys.path.insert(0, str(HERE.parent))
    for name in _IMPORTED:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # watchers are not waited for
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which nohup and a shell's & have programs ignore
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.write(1, b"ready\n")
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _watch(connection)
            os._exit(0)
        connection.close()


def _watch(connection: socket.socket) -> None:
    """Run one child; kill it when its caller is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size = int.from_bytes(_exactly(connection, 8), "little")
    request = pickle.loads(_exactly(connection, size))
    # the caller's bytes are for the child, which reads them itself
    pid = os.fork()
    if pid == 0:
        _child(request, connection)
    handle = os.pidfd_open(pid)
    connection.sendall(f"pid {pid}\n".encode())
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.register(connection, select.POLLRDHUP)
    while True:
        ready = {number for number, _ in poll.poll()}
        if connection.fileno() in ready:
            _kill_group(pid)
            return
        if handle in ready:
            _, status = os.waitpid(pid, 0)
            try:
                connection.sendall(f"ended {os.waitstatus_to_exitcode(status)}\n".encode())
                poll.unregister(handle)
                poll.poll()  # until the caller hangs up
            except OSError:
                pass
            _kill_group(pid)
            return


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _exactly(connection: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        part = connection.recv(size - len(got))
        if not part:
            os._exit(0)
        got += part
    return got


def _child(request: dict[str, Any], connection: socket.socket) -> None:
    global _told
    os.setpgid(0, 0)
    out, err = (os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) for name in ("out", "err"))
    null = os.open(os.devnull, os.O_RDONLY)
    for there, number in ((null, 0), (out, 1), (err, 2)):
        os.dup2(there, number)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False, buffering=1)
    faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=True)
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None  # the server may have asked where it is before the caller's environment said so
    os.chdir(request["cwd"])
    sys.path[:] = [str(HERE), *request["path"]]
    sys.argv = [request["program"].replace(".", " "), *request["arguments"]]
    sys.modules["faulty"] = sys.modules["__main__"]
    _told = connection
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # the temporary folders of the server are not its own
    atexit.unregister(importlib.import_module("wandb.sdk.data_types._private").MEDIA_TMP.cleanup)
    code: int = 1
    try:
        hook = pickle.loads(request["before"])
        if hook is not None:
            hook()
        importlib.import_module(request["program"]).main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
    try:  # as an interpreter ends
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])
