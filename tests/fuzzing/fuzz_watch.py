"""What a reader does while it reads, by Python's audit events: everything that it may never do is stopped and named."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import collapse

# What no reader of a file needs: other programs, the network, code of the file, other files changed.
NEVER = (
    "code.__new__", "ctypes.", "ensurepip.", "fcntl.", "ftplib.", "http.", "imaplib.", "marshal.dump",
    "os.chflags", "os.chmod", "os.chown", "os.exec", "os.fork", "os.kill", "os.link", "os.mkdir", "os.posix_spawn",
    "os.putenv", "os.remove", "os.rename", "os.rmdir", "os.setxattr", "os.spawn", "os.startfile", "os.symlink",
    "os.system", "os.truncate", "os.unsetenv", "os.utime", "pickle.", "poplib.", "pty.", "shutil.", "signal.pthread",
    "smtplib.", "socket.", "sqlite3.", "subprocess.", "sys.setprofile", "sys.settrace", "syslog.", "telnetlib.",
    "tempfile.", "urllib.", "webbrowser.",
)  # fmt: skip
# An open RUN is locked, and its own files are replaced; both only in the folder that is given for it.
IN_OUTPUT = ("fcntl.flock", "os.mkdir", "os.remove", "os.rename", "os.truncate", "tempfile.")
LIBRARIES = {
    "collapse", "h5py", "numcodecs", "numpy", "PIL", "pyarrow", "safetensors", "scipy", "soundfile", "timm",
    "tokenizers", "torch", "torchvision", "transformers", "zarr",
}  # fmt: skip
STANDARD = os.path.dirname(os.__file__)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PROGRAMS = tuple(
    {
        os.path.realpath(place)
        for place in (sys.prefix, sys.base_prefix, Path(__file__).parents[2], Path(collapse.__file__).parent)
    }
)
SYSTEM = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/usr/share/zoneinfo", "/etc/localtime")


class Forbidden(BaseException):
    """A reader did what no reader may; no `except Exception` of a reader catches it."""


class _Watch:
    """The one hook of this process (Python has no way to take one off): off but within `watched`."""

    def __init__(self) -> None:
        self.on, self.hooked, self.readable, self.writable = False, False, (), ()
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        self.on = False  # what the hook itself does is not looked at
        try:
            problem = self._problem(event, arguments)
        finally:
            self.on = True
        if problem:
            self.seen.append(problem)
            raise Forbidden(problem)

    def _problem(self, event: str, arguments: tuple) -> str:
        if event == "open":
            return self._opened(*arguments)
        if event == "import":
            return self._imported(arguments[0])
        if event in ("exec", "compile"):
            return self._executed(event, arguments)
        if not event.startswith(NEVER) or (event == "os.kill" and arguments[1] == 0):  # 0: is the process there?
            return ""
        if event.startswith("ctypes.") and any(name.endswith("/torch/cuda/__init__.py") for name in _callers(4)):
            return ""  # is there a driver?
        inside = event.startswith(IN_OUTPUT) and all(
            self._within(value, self.writable, _itself)
            for value in arguments
            if isinstance(value, (str, bytes, os.PathLike))
        )
        return "" if inside and self.writable else f"{event} {arguments!r:.100}"

    def _opened(self, path: object, mode: object, flags: int) -> str:
        if isinstance(path, int):
            return ""
        writes = flags & WRITES or (isinstance(mode, str) and set(mode) & set("wax+"))
        meant = (
            _itself if flags & os.O_EXCL else os.path.realpath
        )  # an exclusive open makes a file, and follows no link
        if writes and self._within(path, (*self.writable, os.devnull), meant):
            return ""
        # Links in a folder of images may lead anywhere: they are the user's.
        if not writes and self._within(path, (*self.readable, *self.writable, *PROGRAMS, *SYSTEM), os.path.abspath):
            return ""
        return f"open {path!r:.100} {mode or flags}"

    @staticmethod
    def _within(path: Any, places: tuple[str, ...], meant: Callable[[str], str] = os.path.realpath) -> bool:
        real = meant(os.fsdecode(path))
        return any(real == place or real.startswith(place.rstrip("/") + "/") for place in places)

    @staticmethod
    def _imported(module: str) -> str:
        """A name that stands in the code of a library is its own; one that is computed may come from a file."""
        top = module.partition(".")[0]
        computed = any(name.endswith(("importlib/__init__.py", "/pickle.py")) for name in _callers(3))
        own = top in sys.stdlib_module_names and not computed
        return "" if own or top in LIBRARIES else f"import {module}"

    @staticmethod
    def _executed(event: str, arguments: tuple) -> str:
        """A module's own file may run as it is imported, a dataclass may write its __init__; ast.parse runs none."""
        callers = _callers(6)
        if any(name.startswith("<frozen importlib") for name in callers):
            return _computed(getattr(arguments[0], "co_filename", ""))
        makers = ("/ast.py",) if event == "compile" else ("/dataclasses.py", "/collections/__init__.py")
        makers = (*makers, "/collections/__init__.py", "/dataclasses.py", "/typing.py")  # annotations
        return (
            "" if any(name.endswith(makers) for name in callers[:2]) else f"{event} {arguments!r:.100} in {callers[0]}"
        )


def _computed(file: str) -> str:
    """A module of Python's own that runs because of importlib.import_module, which raises no event of its own."""
    above = [name for name in _callers(20) if not name.startswith("<frozen importlib")]
    asked = bool(above) and above[0].endswith("importlib/__init__.py")
    return f"import {file}" if asked and file.startswith(STANDARD) and "site-packages" not in file else ""


def _itself(path: str) -> str:
    """Where a name really lies, be it that of a link."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def _callers(count: int) -> list[str]:
    """The files of the innermost frames outside this one."""
    frame, found = sys._getframe(1), []
    while frame is not None and len(found) < count:
        if frame.f_code.co_filename != __file__:
            found.append(frame.f_code.co_filename)
        frame = frame.f_back  # type: ignore[assignment]
    return found


WATCH = _Watch()


@contextmanager
def watched(readable: Path, writable: Path | None = None) -> Iterator[list[str]]:
    """Stop what a reader may never do: reading outside of `readable`, writing outside of `writable`, and NEVER.

    Yields the list of what was stopped.  What happens raises `Forbidden` where it happens.
    """
    if not WATCH.hooked:
        sys.addaudithook(WATCH)
        WATCH.hooked = True
    WATCH.readable = (os.path.abspath(readable), os.path.realpath(readable))
    WATCH.writable = (os.path.realpath(writable),) if writable else ()
    WATCH.seen, WATCH.on = [], True
    try:
        yield WATCH.seen
    finally:
        WATCH.on = False
