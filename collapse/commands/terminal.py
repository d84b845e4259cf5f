"""What a command puts on a terminal: results, lines on standard error, bars, and a word while it loads."""

import os
import sys
import threading
from collections.abc import Generator, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from collapse import InputError

T = TypeVar("T")
INTERRUPTED = threading.Event()
_waiting: list[str] = []  # what stands on the terminal until something else is shown


def interrupt(number: int, frame: Any) -> None:
    """The handler of SIGINT while a command runs."""
    INTERRUPTED.set()
    raise KeyboardInterrupt


def wait(text: str) -> None:
    """A word on standard error, if that is a terminal, that stands there until anything else is shown."""
    if sys.stderr is not None and sys.stderr.isatty():
        with suppress(OSError, UnicodeEncodeError):
            sys.stderr.write(text)
            sys.stderr.flush()
            _waiting.append(text)


def _clear() -> None:
    while _waiting:
        with suppress(OSError):
            sys.stderr.write(f"\r{' ' * len(_waiting.pop())}\r")
            sys.stderr.flush()


def show(text: str) -> None:
    """Print, with escapes for what the terminal's encoding or nobody can show; a reader that has left wants no more.

    Raises InputError: standard output is closed, or takes no more.
    """
    from collapse.results import printable

    _clear()
    if sys.stdout is None:
        raise InputError("standard output: is closed, so the result cannot be printed; give --out FILE, or open it")
    try:
        coded = printable(text).encode(sys.stdout.encoding or "utf-8", "backslashreplace")
        sys.stdout.write(coded.decode(sys.stdout.encoding or "utf-8"))
        sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise InputError(f"standard output: cannot be written ({error.strerror or error})") from error


def tell(text: str) -> None:
    """A line on standard error, if it can be written."""
    from collapse.results import printable

    _clear()
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def _discard(stream: Any) -> None:
    """Let what a stream still holds go nowhere; python would complain of it at its end."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def progress(batches: Iterable[T], unit: str, total: int | None, delay: float = 0) -> Generator[T, None, None]:
    """Pass batches on, with a bar on stderr, if that is a terminal, that counts their rows.

    delay: seconds before it shows at all; without, it stands there while the first batch is made and looked at.
    """
    from tqdm import tqdm

    if not delay:
        _clear()
    with tqdm(total=total, unit=f" {unit}", dynamic_ncols=True, delay=delay, disable=None) as bar:
        for batch in batches:
            if INTERRUPTED.is_set():  # python drops an interrupt that comes while it clears up an object
                raise KeyboardInterrupt
            yield batch
            bar.update(len(batch))  # type: ignore[arg-type]
