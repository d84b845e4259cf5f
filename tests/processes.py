"""Other programs, ended with all that they started: what is left would hold the output open, or a core, for ever."""

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import traceback
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


def byte(reader, seconds=60):
    """The next byte of a pipe; b"" where none comes, as from a fork that has died while its pipe is open here."""
    ready, _, _ = select.select([reader], [], [], seconds)
    return os.read(reader, 1) if ready else b""
