"""What every script of experiments/ shares: flags, the result file, and the figure drawn from that file alone."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from collapse import InputError, plots
from collapse.results import Tolerance, change, load_result, save_result

Arrays = dict[str, NDArray]
Meta = dict[str, Any]
Found = tuple[Meta, Arrays]
ROUNDING = Tolerance()


def main(
    script: str,
    simulate: Callable[..., tuple[Meta, Arrays]],
    report: Callable[[Meta, Arrays], str],
    draw: Callable[[Meta, Arrays], Any],
    tolerance: Tolerance = ROUNDING,
) -> None:
    """Simulate, save, print the report, draw: the whole of a script NAME.py in experiments/ or a folder of it.

    Flags are simulate's keyword arguments (name, type and default), --out, --plot-only and --anew.  The result goes to
    experiments/results/NAME.npz and the figure to figures/NAME.png and .pdf; with --out FILE.npz both go there.
    What is there already is kept, see `settle`, and reported and drawn, if the new result is the same but for rounding.

    Args:
        script: the script's __file__.
        simulate: keywords -> (what to say about the result, arrays of any shapes by name).
        report: (meta, arrays) -> the lines to print.
        draw: (meta, arrays) -> a matplotlib figure.
        tolerance: what another processor may change.
    """
    path, module = Path(script).resolve(), sys.modules[simulate.__module__]
    root = next(folder for folder in path.parents if folder.name == "experiments").parent
    options = vars(_parser(module.__doc__ or path.stem, simulate).parse_args())
    out, plot_only, anew = (options.pop(name) for name in ("out", "plot_only", "anew"))
    result = out or root / f"experiments/results/{path.stem}.npz"
    with ending(path.name):
        if not plot_only:
            if sys.stderr.isatty():
                tell(f"{path.name}: simulating; --help says how long it takes")
            meta, arrays = simulate(**options)
            if not out:
                result.parent.mkdir(exist_ok=True)
            new: Found = {"config": options, **meta}, arrays
            stored = load_result(result) if result.exists() and not anew else None
            settle(result, new, stored, tolerance, lambda: save_result(result, new[0], **arrays))
        show(load_result(result), report, draw, out.with_suffix("") if out else root / "figures" / path.stem)


def settle(path: Path, new: Found, stored: Found | None, tolerance: Tolerance, write: Callable[[], Any]) -> None:
    """Keep the file at `path` if the new result is what it has stored but for rounding; else `write`.

    new, stored: (meta, arrays of any shapes by name).  One line on standard error says which, how far they are apart,
    and where, if it is further than `tolerance`.
    """
    shown, differs = min(os.path.relpath(path), str(path), key=len), ""
    if stored is not None:
        largest = change(new, stored, tolerance)
        if largest.rounding:
            tell(f"kept {shown}: agrees to {largest.share:.0e}; rounding may make it {largest.allowed:.0e}")
            return
        differs = f": {largest.where}, by {largest.share:.0e}; rounding may make it {largest.allowed:.0e}"
    write()
    tell(f"wrote {shown}{differs}")


@contextmanager
def ending(name: str) -> Iterator[None]:
    """An InputError within is one line that begins with the script's `name`, and exit code 2; an interrupt is 130."""
    try:
        yield
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def show(results: Sequence[Any], report: Callable[..., str], draw: Callable[..., Any], figure: Path) -> None:
    """What report(*results) says, printed; what draw(*results) draws, as `figure`.png and .pdf."""
    say(report(*results))
    with plots.style():
        drawn = draw(*results)
    figure.parent.mkdir(exist_ok=True)
    plots.save_figure(drawn, figure)
    tell(f"wrote {min(os.path.relpath(figure), str(figure), key=len)}.png and .pdf")


def tell(text: str) -> None:
    """A line on standard error, beside the numbers that `say` prints."""
    print(text, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Print lines; a reader that has left, as `head`, wants no more, and the work goes on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # else Python complains of it at its end
        os.close(nowhere)


def _parser(doc: str, simulate: Callable[..., Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, parameter in signature(simulate).parameters.items():
        default = parameter.default
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"default {default}"
        )
    parser.add_argument("--out", type=Path, metavar="FILE.npz", help="write the result there and the figure beside it")
    parser.add_argument("--plot-only", action="store_true", help="draw again from the saved result")
    parser.add_argument("--anew", action="store_true", help="write the result even where it agrees with the saved one")
    return parser
