"""One process at a time in a folder: a file that only one can make, whose time of change is a sign of life.

It needs nothing but O_EXCL, which every file system has, those of a network too; flock is not everywhere.
"""

import fcntl
import json
import os
import stat
import time
from datetime import datetime, timezone
from pathlib import Path
from secrets import token_hex
from typing import Any

from collapse import InputError

BEAT = 20  # seconds between two signs of life
SILENT = 600  # seconds without one after which a process of another machine counts as gone
LONGEST = 4096  # bytes of a lock
WRITING = 10  # seconds that a lock may be empty: it is being written


class Lock:
    """FOLDER/.lock, made by this process alone; it goes with `release`, and is stale once this process is gone.

    On this machine that is known at once, of another one after `SILENT` seconds.
    Raises InputError: another process holds it. OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self._pid, self._beaten = folder / ".lock", os.getpid(), time.monotonic()
        holder = {"pid": self._pid, "host": os.uname().nodename, "place": _place(), "start": _process(self._pid)}
        since = datetime.now(timezone.utc).isoformat(" ", "seconds")
        self._text = json.dumps({**holder, "since": since, "token": token_hex(8)})
        if not self._make():
            self._remove_stale()
            if not self._make():
                raise InputError(self._held(_read(self.path), 0.0))

    def _make(self) -> bool:
        """Whether the file is now this process's."""
        try:
            number = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(number, self._text.encode())
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        finally:
            os.close(number)
        return True

    def _remove_stale(self) -> None:
        """Remove the lock of a process that is gone; one process at a time judges and removes."""
        claim = self.path.with_name(".lock.claim")
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644))
        except FileExistsError as error:
            if time.time() - claim.stat().st_mtime > 60:  # its maker was killed
                claim.unlink(missing_ok=True)
            raise InputError(f"{self.path.parent}: another process is starting in it; try again") from error
        try:
            text = _read(self.path)
            if text is not None:
                age = claim.stat().st_mtime - self.path.stat().st_mtime  # by the clock of the file system alone
                if _lives(self.path, text, age):
                    raise InputError(self._held(text, age))
                self.path.unlink()
        finally:
            claim.unlink(missing_ok=True)

    def _held(self, text: str | None, age: float) -> str:
        holder = _holder(text or "")
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        since = f"since {holder['since']}, " if "since" in holder else ""
        return (
            f"{self.path.parent}: {who} is training in it ({since}last sign of life {max(age, 0):.0f} s ago); "
            f"wait, choose another RUN, or remove {self.path} if that process is gone"
        )

    def beat(self) -> None:
        """Give a sign of life where the last is `BEAT` seconds old. Raises InputError as `check` does."""
        if time.monotonic() - self._beaten > BEAT:
            self.check()

    def check(self) -> None:
        """Give a sign of life. Raises InputError: another process has taken the folder over."""
        self._beaten = time.monotonic()
        text = _read(self.path)
        if text is None and self._make():  # somebody removed it, and nobody took it
            return
        if text != self._text:
            holder = _holder(text or "")
            who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
            raise InputError(f"{self.path.parent}: {who} has taken it over; this one stops, the last save is kept")
        os.utime(self.path)

    def release(self) -> None:
        """Let others have the folder. Raises InputError: the lock is no regular file any more."""
        if os.getpid() == self._pid and _read(self.path) == self._text:
            self.path.unlink(missing_ok=True)


def _read(path: Path) -> str | None:
    """What a lock says, if there is one. Raises InputError: it is no regular file, which alone a lock is."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot be read as the lock of a run ({error.strerror}); remove it") from error
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise InputError(f"{path}: is no regular file, and no lock of a run; remove it")
        return os.read(number, LONGEST).decode(errors="replace")
    finally:
        os.close(number)


def _holder(text: str) -> dict[str, Any]:
    """What a lock says; that of version 1 is "PID on HOST"."""
    pid, _, host = text.partition(" on ")
    if pid.isdigit() and host:
        return {"pid": int(pid), "host": host.strip()}
    try:
        holder = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    kinds = {"pid": int, "host": str, "place": str, "since": str}
    known = isinstance(holder, dict) and all(type(holder.get(name, kind())) is kind for name, kind in kinds.items())
    return holder if known and 0 < holder.get("pid", 0) < 1 << 31 and holder.get("host") else {}


def _lives(path: Path, text: str, age: float) -> bool:
    """Whether the process that made the lock is there, as far as can be known."""
    holder = _holder(text)
    if not holder:
        return age < WRITING
    if "place" not in holder:
        return _flocked(path)
    if holder["place"] != _place():
        return age < SILENT
    return _process(holder["pid"]) in ("runs", holder.get("start"))


def _flocked(path: Path) -> bool:
    """Whether a process of version 1, which locked the file itself and never removed it, has it."""
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no flock here, so version 1 could not run
            return False
    return False


def _place() -> str:
    """Where process ids mean the same: this machine since it started, and its space of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{os.uname().nodename} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return os.uname().nodename


def _process(pid: int) -> str:
    """When a process began, which no later one of its number has in common; "gone", or "runs" where nothing tells."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "gone" if fields[0] in "ZX" else fields[19]
    except (FileNotFoundError, ProcessLookupError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:
        pass
    return "runs"
