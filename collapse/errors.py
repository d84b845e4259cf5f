"""What is wrong, as one error, and what a reader should know, as one kind of warning."""

import os
import sys
import warnings
from collections.abc import Iterable

LONGEST = 5000  # characters of a message; the longest path has 4096
ESCAPES = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}
_HERE = os.path.dirname(__file__) + os.sep


class InputError(ValueError):
    """Bad input: what is wrong, where, and what to do, in one line. The command prints it and exits with 2.

    The line names an argument of the library as `name=`; the command shows it as its flag, --name.  Control characters,
    as in the name of a file, are shown as escapes; of a text without end, the beginning and the end are shown.

    Examples:
        >>> from collapse import metrics
        >>> metrics.uniformity([1.0, 2.0])
        Traceback (most recent call last):
            ...
        collapse.errors.InputError: embeddings: got shape (2,), expected (n, d), neither of them 0
    """

    def __init__(self, *texts: str) -> None:
        super().__init__(*map(_line, texts))


def _line(text: str) -> str:
    line = text.translate(ESCAPES)
    return line if len(line) <= LONGEST else f"{line[: LONGEST * 3 // 4]} ... {line[-LONGEST // 5 :]}"


class GateError(Exception):
    """A metric lies beyond a bound that was asked for, in one line. The command prints it and exits with 3.

    Examples:
        >>> raise GateError("effective_rank is 3.1, below 10")
        Traceback (most recent call last):
            ...
        collapse.errors.GateError: effective_rank is 3.1, below 10
    """


class CollapseWarning(UserWarning):
    """What a reader should know before using a number; the result lists the same sentences.

    Examples:
        >>> import warnings
        >>> import numpy as np
        >>> import collapse
        >>> with warnings.catch_warnings(record=True) as told:
        ...     warnings.simplefilter("always", collapse.CollapseWarning)
        ...     s = collapse.spectrum(np.eye(3, 5))
        >>> [str(one.message) for one in told], str(told[0].message) in s.warnings
        (['3 rows in 5 dimensions: at most 2 singular values are not zero'], True)
    """


def warn(notes: Iterable[str]) -> None:
    """Each note as a CollapseWarning, at the line outside of this package that called into it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame, level = frame.f_back, level + 1
    for note in notes:
        warnings.warn(note, CollapseWarning, stacklevel=level)
