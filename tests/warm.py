"""A process that has imported torch and the pipeline once, and is forked for each command that a test starts.

The import takes seconds, a fork milliseconds. `Popen` is subprocess.Popen, but a command `python -c …` or `python -m …`
becomes a fork of the server of this test process. It has the environment, directory, files and signal handlers that a
new process would have, ends as one ends, and is forked while nothing but the main thread runs. What such a process
starts itself is forked beforehand too: the ranks of `accelerate launch`, and the fork server of worker processes.

Two differences remain: all of them hash strings alike, and psutil shows the command line of the server.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import inspect
import io
import json
import os
import re
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import util
from pathlib import Path
from typing import Any, NoReturn

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
_ROOT = Path(__file__).parent.parent
_PRELOADED = (
    "accelerate.commands.launch", "torch.distributed.run", "torch.utils.tensorboard", "torch._inductor",
    "pipeline.train", "pipeline.sample", "pipeline.shard", "pipeline.index", "pipeline.verify", "pipeline.plan",
    "pipeline.doctor", "pipeline.cli", "pipeline.data.shards.index_tars", "tests.launch",
)  # fmt: skip
_AT_IMPORT = re.compile("PYTHON|OMP_|MKL_|LD_|LC_|LANG|CUDA_|TORCH_|MALLOC_|HF_")
"""Variables that are read when Python starts or torch is imported: another value needs a new process."""
_LAUNCHER = "accelerate.commands.launch"
_PR_SET_NAME = 15
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@dataclass
class Call:
    """What a forked process is to run, and with what."""

    kind: str
    """`-c` or `-m`."""
    program: str
    """Code, or the name of a module."""
    arguments: list[str]
    environment: dict[str, str]
    directory: str
    new_session: bool = False
    unbuffered: bool = False
    passed: list[int] | None = None
    """Numbers of the open files, besides 0, 1 and 2, that it has."""
    blocked: list[int] | None = None
    """Signals that it starts with blocked."""
    name: str | None = None
    """As psutil shows it."""


def parse(command: list[str]) -> tuple[str, str, list[str], bool] | None:
    """Kind, program, arguments and whether output is unbuffered, of `python [-u] [-B] -c|-m …`; None of another."""
    words, unbuffered = [*map(str, command)], False
    if words[0] != sys.executable:
        return None
    for i, word in enumerate(words[1:], 1):
        if word in ("-c", "-m"):
            return word, words[i + 1], words[i + 2 :], unbuffered
        if word not in ("-u", "-B"):
            return None
        unbuffered |= word == "-u"
    return None


# --- in the test process ---


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """A process forked from the server where the command allows it, a new one otherwise."""

    _connection: socket.socket | None = None

    def _execute_child(self, *arguments: Any) -> None:
        given = inspect.signature(subprocess.Popen._execute_child).bind(self, *arguments).arguments  # type: ignore[attr-defined]
        environment = dict(os.environ if given["env"] is None else given["env"])
        parsed = None if given["shell"] or given["preexec_fn"] else parse(given["args"])
        if parsed is None or _at_import(environment) != _at_import(_server_environment()):
            super()._execute_child(*arguments)  # type: ignore[misc]
            return
        kind, program, words, unbuffered = parsed
        directory, session = str(given["cwd"] or os.getcwd()), bool(given["start_new_session"])
        call = Call(kind, program, words, environment, directory, session, unbuffered)
        ends = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        self._connection, theirs = socket.socketpair()
        with theirs:
            files = [theirs.fileno(), *(number if end == -1 else end for number, end in enumerate(ends))]
            socket.send_fds(_server(), [b"."], files)
        self._connection.sendall(_packed(asdict(call)))
        self.pid = _received(self._connection)["pid"]
        self._child_created = True
        names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in names))  # type: ignore[attr-defined]

    def _wait(self, timeout: float | None) -> int:
        if self._connection is None:
            return super()._wait(timeout)  # type: ignore[misc,no-any-return]
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self._handle_exitstatus(_received(self._connection)["status"])  # type: ignore[attr-defined]
            self._connection.close()
        return self.returncode

    def _internal_poll(self, _deadstate: int | None = None) -> int | None:
        if self._connection is None:
            return super()._internal_poll(_deadstate)  # type: ignore[misc,no-any-return]
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._wait(0)
        return None


def run(command: list[str], *, timeout_s: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return its output, as subprocess.run does."""
    with Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            out, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


@cache
def _server() -> socket.socket:
    """The server of this process; it ends when the socket is closed, so with this process."""
    ours, theirs = socket.socketpair()
    with theirs:
        code = f"from tests.warm import serve; serve({theirs.fileno()})"
        subprocess.Popen([sys.executable, "-c", code], cwd=_ROOT, stdin=subprocess.DEVNULL, env=_server_environment(),
                         pass_fds=[theirs.fileno()], start_new_session=True)  # fmt: skip
    return ours


@cache
def _server_environment() -> dict[str, str]:
    return dict(ENVIRONMENT)


def _at_import(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if _AT_IMPORT.match(name)}


def _packed(message: dict[str, Any]) -> bytes:
    data = json.dumps(message).encode()
    return struct.pack("!Q", len(data)) + data


def _received(connection: socket.socket) -> dict[str, Any]:
    (size,) = struct.unpack("!Q", _exactly(connection, 8))
    return dict(json.loads(_exactly(connection, size)))


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError("the other end is gone")
        data += part
    return data


# --- in the server ---


def serve(control: int) -> None:
    """Import everything, then fork for each request; in a forked process, run what was asked for."""
    for module in _PRELOADED:
        __import__(module)
    # A module that is run with -m is not yet imported in a new process.
    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning, "runpy")
    gc.collect()
    gc.freeze()
    handlers = {
        number: signal.signal(number, signal.SIG_IGN) for number in _STOP_SIGNALS
    }  # a test may send them to all
    call = _serve(socket.socket(fileno=control))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if call is not None:
        _live(call)


def _serve(control: socket.socket) -> Call | None:
    """Fork for each request. In the forked process, what it is to run; in the server, at its end, None."""
    running: dict[int, tuple[int, socket.socket]] = {}  # descriptor of a process → its number, and who waits for it
    while True:
        ready, _, _ = select.select([control, *running], [], [])
        for descriptor in ready:
            if descriptor is not control:
                pid, waiting = running.pop(descriptor)
                status = os.waitpid(pid, 0)[1]
                os.close(descriptor)
                with waiting, contextlib.suppress(OSError):  # nobody may be there any more
                    waiting.sendall(_packed({"status": status}))
                continue
            _, received, _, _ = socket.recv_fds(control, 1, 4)
            if not received:
                return None
            connection, *files = received
            waiting = socket.socket(fileno=connection)
            call = Call(**_received(waiting))
            begun, entered = os.pipe()  # the caller may signal the group of the process as soon as it knows its number
            pid = os.fork()
            if pid == 0:
                if call.new_session:
                    os.setsid()
                os.close(begun)
                os.close(entered)
                waiting.detach()
                control.detach()
                for _, other in running.values():
                    other.detach()
                _take_files([(file, number) for number, file in enumerate(files)])
                return call
            os.close(entered)
            os.read(begun, 1)  # the end of the pipe
            for file in (begun, *files):
                os.close(file)
            running[os.pidfd_open(pid)] = pid, waiting
            waiting.sendall(_packed({"pid": pid}))


# --- in a forked process ---


class Blank:
    """A process forked beforehand, which waits to be told what it is, or for the end of its parent."""

    def __init__(self, connection: int, pid: int) -> None:
        self._connection, self.pid = connection, pid

    def become(self, call: Call) -> int:
        """Have it run a call; its number."""
        with socket.socket(fileno=self._connection) as connection:
            if call.passed:
                socket.send_fds(connection, [b"."], call.passed)
            else:
                connection.sendall(b".")
            connection.sendall(_packed(asdict(call)))
        return self.pid


def _fork_blank() -> Blank:
    """A blank; the blank itself never returns from here."""
    ours, theirs = socket.socketpair()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        return Blank(ours.detach(), pid)
    ours.detach()
    _close_all_but({theirs.fileno()})
    handlers = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # it is not yet there for anybody
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _, received, _, _ = socket.recv_fds(theirs, 1, 16)
    try:
        call = Call(**_received(theirs))
    except EOFError:
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, call.blocked or [])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    theirs.detach()
    _take_files(list(zip(received, call.passed or ())))
    _live(call)


def _live(call: Call) -> NoReturn:
    """Be what a call asks for, and end as Python does, but for taking its modules apart, which takes a second."""
    code: object = 0
    try:
        _enter(call)
        _execute(call)
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        trace = error.__traceback__
        while trace and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        code = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        code = 120
    os._exit((code or 0) & 0xFF)


def _enter(call: Call) -> None:
    os.chdir(call.directory)
    os.environ.clear()
    os.environ.update(call.environment)
    if call.new_session and os.getsid(0) != os.getpid():
        os.setsid()
    if call.name:
        ctypes.CDLL(None).prctl(_PR_SET_NAME, call.name.encode())
    tempfile.tempdir = None
    _open_standard_streams(unbuffered=call.unbuffered or bool(os.environ.get("PYTHONUNBUFFERED")))
    _read_fsspec_settings()
    is_launcher = call.kind == "-m" and call.program == _LAUNCHER
    blanks = [_fork_blank() for _ in range(_processes(call.arguments) if is_launcher else 1)]
    if is_launcher:
        subprocess.Popen._execute_child = _starting_ranks(blanks)  # type: ignore[attr-defined]
    else:
        util.spawnv_passfds = _starting_fork_server(blanks)  # type: ignore[attr-defined]


def _execute(call: Call) -> None:
    sys.argv = [call.kind if call.kind == "-c" else call.program, *call.arguments]
    if call.kind == "-c":
        sys.path[0] = ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(call.program, "<string>", "exec"), main.__dict__)
    else:
        sys.path[0] = call.directory
        runpy.run_module(call.program, run_name="__main__", alter_sys=True)


def _processes(arguments: list[str]) -> int:
    return int(arguments[arguments.index("--num_processes") + 1])


def _starting_ranks(blanks: list[Blank]) -> Any:
    """Popen's way to start a process, for a launcher: the ranks are blanks."""
    original = subprocess.Popen._execute_child  # type: ignore[attr-defined]

    def execute_child(self: Any, *arguments: Any) -> None:
        given = inspect.signature(original).bind(self, *arguments).arguments
        parsed = parse(given["args"]) if not given["shell"] else None
        inherits = all(given[name] == -1 for name in ("p2cread", "c2pwrite", "errwrite"))
        if not (blanks and parsed and inherits):
            original(self, *arguments)
            return
        kind, program, words, unbuffered = parsed
        environment = dict(given["env"] or os.environ)
        call = Call(
            kind, program, words, environment, os.getcwd(), bool(given["start_new_session"]), unbuffered,
            name=f"rank {environment.get('RANK', '0')}",
        )  # fmt: skip
        self.pid = blanks.pop().become(call)
        self._child_created = True

    return execute_child


def _starting_fork_server(blanks: list[Blank]) -> Any:
    """The same for multiprocessing: its fork server is a blank. Its resource tracker imports nothing."""
    original = util.spawnv_passfds  # type: ignore[attr-defined]

    def spawnv_passfds(path: Any, arguments: list[str], passed: list[int]) -> int:
        parsed = parse(list(map(os.fsdecode, arguments)))
        if not (blanks and parsed and "multiprocessing.forkserver" in parsed[1]):
            return int(original(path, arguments, passed))
        blocked = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
        call = Call("-c", parsed[1], [], dict(os.environ), os.getcwd(), passed=list(passed), blocked=blocked)
        return blanks.pop().become(call)

    return spawnv_passfds


def _open_standard_streams(*, unbuffered: bool) -> None:
    """Standard streams as a new process has them: the server's have forgotten whether they are a terminal's."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        old = getattr(sys, f"__{name}__")
        binary: Any = open(number, f"{mode}b", buffering=0 if unbuffered and number else -1, closefd=False)  # noqa: SIM115
        stream = io.TextIOWrapper(
            binary, encoding=old.encoding, errors=old.errors, line_buffering=number == 2 or os.isatty(number),
            write_through=unbuffered and number > 0,
        )  # fmt: skip
        stream.mode = mode  # type: ignore[misc]
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _read_fsspec_settings() -> None:
    if settings := sys.modules.get("fsspec.config"):
        settings.conf.clear()
        settings.set_conf_files(settings.conf_dir, settings.conf)
        settings.set_conf_env(settings.conf)


def _take_files(files: list[tuple[int, int]]) -> None:
    """Have open files under these numbers (from, to), 0, 1 and 2 unless they are among them, and no others."""
    high = [(os.dup2(file, 900 + i), number) for i, (file, number) in enumerate(files)]
    for file, number in high:
        os.dup2(file, number)
    _close_all_but({number for _, number in high})


def _close_all_but(numbers: set[int]) -> None:
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number not in numbers:
            with contextlib.suppress(OSError):
                os.close(number)
