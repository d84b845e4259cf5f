"""numpy arrays inside pickles, rebuilt from their bytes: the names that numpy writes, for `pickles.unpickle`."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import InputError

NUMBERS = re.compile(r"[biufc](1|2|4|8|16)")


class Kind:
    """A dtype while its pickle is read: the letter and size first, the order of bytes with the state."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name, self.order = name, "|"

    def setstate(self, state: Any) -> None:
        """numpy's (version, order, ...)."""
        order = state[1]
        self.order = order.decode("latin-1") if isinstance(order, bytes) else order

    def dtype(self) -> np.dtype:
        """Raises InputError for anything but numbers."""
        if not isinstance(self.name, str) or not NUMBERS.fullmatch(self.name) or self.order not in ("<", ">", "|", "="):
            name = repr(self.name[:20]) if isinstance(self.name, str) else type(self.name).__name__
            raise InputError(f"an array of dtype {name}, which is not numbers; refused")
        return np.dtype(self.order.replace("|", "") + self.name)


class Pickled:
    """An array while its pickle is read; `array` is there when its state was set."""

    def __init__(self, *_: Any) -> None:
        self.array: NDArray | None = None

    def setstate(self, state: Any) -> None:
        """numpy's (version, shape, dtype, whether in Fortran's order, bytes). Raises InputError: as `rebuilt`."""
        shape, kind, fortran, data = state[-4:]
        self.array = rebuilt(data, kind, shape, "F" if fortran else "C")


def rebuilt(data: Any, kind: Any, shape: Any, order: Any = "C") -> NDArray:
    """The array of these bytes, of any shape. Raises InputError: no numbers, or not as many bytes as the shape has."""
    data = data.encode("latin-1") if isinstance(data, str) else data
    if not isinstance(kind, Kind) or not isinstance(data, bytes) or not isinstance(shape, tuple):
        raise InputError("an array that is not numbers; refused")
    dtype = kind.dtype()
    if len(shape) > 32 or any(type(n) is not int or n < 0 for n in shape):
        raise InputError("an array of an impossible shape; refused")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise InputError(f"an array of shape {shape} with {len(data)} bytes; truncated or damaged")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> Pickled:
    made = Pickled()
    made.array = rebuilt(data, kind, shape, order)
    return made


def _scalar(kind: Any, data: Any) -> Any:
    return rebuilt(data, kind, ()).item()


def names() -> dict[str, Callable[..., Any]]:
    """Functions by "module.name"; each array becomes a `Pickled`, each scalar a number of Python."""
    made: dict[str, Callable[..., Any]] = {"numpy.dtype": Kind, "numpy.ndarray": Pickled}
    for core in ("numpy.core", "numpy._core"):
        made |= {f"{core}.multiarray._reconstruct": Pickled, f"{core}.multiarray.scalar": _scalar}
        made[f"{core}.numeric._frombuffer"] = _from_buffer
    return made
