"""Other programs, ended with all that they started: what is left would hold the output open, or a core, for ever."""

import contextlib
import logging
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from functools import partial
from pathlib import Path


def ended(call, seconds=600, **options):
    """How the program ended and what it said. At its limit it is killed with all below it, and what it said is told."""
    words = [str(word) for word in call]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process, late = subprocess.Popen(words, stdout=out, stderr=err, **options), False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
            kill(process.pid)
            process.wait()
        said = [file.seek(0) or file.read() for file in (out, err)]
    assert not late, f"{words[:8]} took over {seconds} s\n{said[0][-2000:]}\n{said[1][-4000:]}"
    return subprocess.CompletedProcess(words, process.returncode, *said)


def scripted(path, *words, seconds=600, **options):
    """As `ended`, of a script of Python in a fork of this process: what is loaded here is not loaded again."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = begun(path, *words, files=(out, err), seconds=seconds + 60, **options)
        watched = os.pidfd_open(pid)
        late = not select.select([watched], [], [], seconds)[0]
        os.close(watched)
        if late:
            kill(pid)
        code = code_of(pid)
        said = [file.seek(0) or file.read() for file in (out, err)]
    assert not late, f"{path} {words[:8]} took over {seconds} s\n{said[0][-2000:]}\n{said[1][-4000:]}"
    return subprocess.CompletedProcess([path, *words], code, *said)


def begun(path, *words, files, cwd=".", env=None, seconds=600):
    """The number of a fork that runs a script; it writes to two files, as its standard output and error."""
    return forked(partial(_run, str(path), [str(word) for word in words], files, cwd, env), seconds=seconds)


def _run(path, words, files, cwd, env):
    for number, (name, file) in enumerate(zip(("stdout", "stderr"), files, strict=True), 1):
        os.dup2(file.fileno(), number)
        setattr(sys, name, open(number, "w", buffering=number - 1 or -1, closefd=False))  # noqa: SIM115
    os.chdir(cwd)
    os.environ.update(env or {})
    sys.argv, sys.path[:0] = [path, *words], [str(Path(path).parent)]
    _forget_pytest()
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _forget_pytest():
    """Warnings and logs go where they would in a program of its own."""
    logging.root.handlers.clear()
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    warnings.showwarning = lambda *about: sys.stderr.write(warnings.formatwarning(*about[:4]))


def kill(pid):
    """Kill a process and those that it and they have started."""
    below = children(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in below:
        kill(child)


def children(pid):
    """The numbers of the processes that a process has started."""
    return [int(stat.parent.name) for stat in Path("/proc").glob("[0-9]*/stat") if parent(stat) == pid]


def parent(stat):
    """The parent's number in a /proc/PID/stat; 0 of a process that has just ended."""
    with contextlib.suppress(OSError):
        return int(stat.read_text().rpartition(")")[2].split()[1])
    return 0


def forked(act, *arguments, seconds=60):
    """The number of a fork that does something and ends with the code that this returns; 70 after an exception."""
    if pid := os.fork():
        return pid
    code = 70
    try:
        signal.alarm(seconds)  # what hangs is ended by it
        code = act(*arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        for child in children(os.getpid()):
            kill(child)  # Python would end them, had it come to its own end
        os._exit(code or 0)


def code_of(pid):
    """The code with which a fork ends; negative if by a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def together(folder, *acts, world=2):
    """The exit codes of forks that can meet, of several acts digit by digit; `folder` keeps their words."""
    ports = [socket.socket() for _ in acts]
    for port in ports:
        port.bind(("127.0.0.1", 0))
    numbers = [str(port.getsockname()[1]) for port in ports]
    for port in ports:
        port.close()

    def run(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
        sys.stdout, sys.stderr = (open(folder / f"{name}{rank}", "w") for name in ("out", "err"))  # noqa: SIM115
        codes = []
        try:
            for act, number in zip(acts, numbers, strict=True):
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=number)
                codes.append(act(rank) or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
        return sum(code * 10**place for place, code in enumerate(codes))

    return [code_of(pid) for pid in [forked(run, rank, seconds=120) for rank in range(world)]]


def byte(reader, seconds=60):
    """The next byte of a pipe; b"" where none comes, as from a fork that has died while its pipe is open here."""
    ready, _, _ = select.select([reader], [], [], seconds)
    return os.read(reader, 1) if ready else b""
