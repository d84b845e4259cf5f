"""The command `collapse`: arguments -> one call -> text, JSON or a file.

Exit 0 done, 2 bad input, 3 a gate that was not passed, 130 interrupted; 1 is a bug.
"""

import argparse
import gc
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from traceback import clear_frames
from typing import Any, NoReturn

from collapse import CollapseWarning, GateError, InputError, __version__
from collapse.arguments import is_number
from collapse.commands import checkpoint, diagnose, spectrum, training
from collapse.commands.shared import FLAGS, together, with_flags
from collapse.commands.terminal import INTERRUPTED, interrupt, show, tell, wait

BEGINS = 5  # letters


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise InputError instead of ending the process."""
        raise InputError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but what a command does not know is refused by its own parser, with what is near."""
        words = _joined(sys.argv[1:] if args is None else args)
        parsed, unknown = super().parse_known_args(words, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            self.error(f"unrecognized argument {unknown[0]!r}{_near(flag, self._option_string_actions)}")
        return parsed, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            listed = f"invalid choice: {value!r} (choose from {', '.join(known)})"
            raise argparse.ArgumentError(action, listed + _near(str(value), known))

    def _print_message(self, message: str, file: Any = None) -> None:
        show(message)  # of --help and --version


class _Help(argparse.HelpFormatter):
    """The example as one line, which can be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example: ") else super()._fill_text(text, width, indent)


def _usage(command: argparse.ArgumentParser) -> str:
    """What must be given; the flags have a list of their own below."""
    words = [command.prog, "[FLAGS]"]
    for action in command._actions:
        name = str(action.metavar or action.dest)
        if action.required and action.option_strings:
            words.append(f"{action.option_strings[0]} {name if action.metavar else name.upper()}")
        elif not action.option_strings:
            words.append(
                {"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} [{name} ...]"}.get(str(action.nargs), name)
            )
    return " ".join(words)


def _joined(words: Iterable[str]) -> list[str]:
    """The numbers behind --mean and --std as one word each, so that what follows them is no number of theirs."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1].partition("=")[0] in ("--mean", "--std") and is_number(word):
            joined[-1] += f" {word}" if "=" in joined[-1] else f"={word}"
        else:
            joined.append(word)
    return joined


def _near(word: str, known: Iterable[str]) -> str:
    """The known word that differs by a slip, or begins alike; dashes alone make no two flags alike."""
    bare, word = {candidate.lstrip("-"): candidate for candidate in known}, word.lstrip("-")
    matches = get_close_matches(word, bare, 1, cutoff=0.7) or [
        candidate for candidate in bare if word[:BEGINS] == candidate[:BEGINS]
    ]
    return f"; did you mean {bare[matches[0]]}?" if matches else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 of an InputError, 3 of a GateError, 130 when interrupted."""
    # Idle OpenMP threads that spin slow small matrices a hundredfold on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _open_streams()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow; this call then ends the process
        from argcomplete import autocomplete

        autocomplete(parser())
    INTERRUPTED.clear()
    before, unraised = signal.signal(signal.SIGINT, interrupt), sys.unraisablehook
    # An interrupt that comes while Python clears up is told there, and kept in INTERRUPTED.
    sys.unraisablehook = lambda unraisable: None if INTERRUPTED.is_set() else unraised(unraisable)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CollapseWarning)  # a command says them in its own way
            options = parser().parse_args(arguments)
            wait("collapse: loading ...")
            with together(options):
                options.run(options)
        return 0
    except SystemExit as end:  # of --help and --version
        return int(end.code or 0)
    except KeyboardInterrupt as stop:
        _let_go(stop)
        return _end("interrupted", 130)
    except GateError as error:
        return _end(str(error), 3)
    except Exception as error:
        text = explained(error)
        if text is None:
            raise
        return _end(text, 2)
    finally:
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = unraised


def explained(error: Exception) -> str | None:
    """The line for an error of the input or the machine; None for a bug."""
    if isinstance(error, InputError):
        return with_flags(str(error))
    if isinstance(error, OSError):
        return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    if isinstance(error, MemoryError):
        return f"not enough memory ({error or 'here'}); give fewer rows or columns, or a machine with more"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not loaded for arrays
        return "the device has not enough memory; give a smaller --batch-size, or another --device"
    return None


def _let_go(stop: BaseException) -> None:
    """Free what the interrupted calls hold while nobody hears of a library's half-made objects, as torch's loaders."""
    clear_frames(stop.__traceback__)
    stop.__traceback__ = stop.__context__ = None
    gc.collect()


def _end(text: str, code: int) -> int:
    """Say why the command ends, in one line."""
    tell(f"collapse: {' '.join(text.split())}")
    return code


def _open_streams() -> None:
    """Take the numbers of streams that are closed, so that no file gets one; errors then have somewhere to go."""
    for number in range(3):
        with suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)  # the lowest free number
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = _Parser(
        prog="collapse",
        description="Measure dimensional collapse (arXiv 2110.09348).",
        epilog="example: collapse spectrum embeddings.npy        (`collapse COMMAND --help` says more)",
        formatter_class=_Help,
    )
    root.add_argument("--version", action="version", version=f"collapse {__version__}")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    spectrum.add_spectrum(commands)
    spectrum.add_compare(commands)
    spectrum.add_references(commands)
    checkpoint.add_inspect(commands)
    checkpoint.add_embed(commands)
    diagnose.add_diagnose(commands)
    diagnose.add_report(commands)
    training.add_train(commands)
    training.add_probe(commands)
    training.add_knn(commands)
    for command in commands.choices.values():
        command.usage, command.formatter_class = _usage(command), _Help
        FLAGS.update(flag[2:].replace("-", "_") for flag in command._option_string_actions if flag[:2] == "--")
    return root
