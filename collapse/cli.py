"""The command `collapse`: arguments -> one call -> text, JSON or a file. Exit 0 done, 2 bad input, 130 interrupted."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from collapse import InputError, __version__
from collapse.commands import checkpoint, diagnose, spectrum, training
from collapse.commands.shared import INTERRUPTED, interrupt


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise InputError instead of ending the process."""
        raise InputError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    # Idle OpenMP threads that spin slow small matrices a hundredfold on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow; this call then ends the process
        from argcomplete import autocomplete

        autocomplete(parser())
    INTERRUPTED.clear()
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        options = parser().parse_args(arguments)
        options.run(options)
        sys.stdout.flush()
    except InputError as error:
        print(f"collapse: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("collapse: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output has left (as `head` does); python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    finally:
        signal.signal(signal.SIGINT, before)
    return 0


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = _Parser(prog="collapse", description="Measure dimensional collapse (arXiv 2110.09348).")
    root.add_argument("--version", action="version", version=f"collapse {__version__}")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    spectrum.add_spectrum(commands)
    spectrum.add_compare(commands)
    checkpoint.add_inspect(commands)
    checkpoint.add_embed(commands)
    diagnose.add_diagnose(commands)
    training.add_train(commands)
    training.add_probe(commands)
    training.add_knn(commands)
    return root
