"""Values that a caller gives: each is checked by one function, before any work, by the name of its argument."""

import math
import sys
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from collapse.errors import InputError

DEVICES = "auto, cpu or cuda[:i]"


def is_number(text: str) -> bool:
    """Whether a text is a number as `float` reads it."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def whole(name: str, value: Any, least: int) -> None:
    """Raise InputError unless value is a whole number of at least `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < least:
        raise InputError(f"{name}= is {_shown(value)}, expected a whole number of at least {least}")


def whole_or_none(least: int, **values: Any) -> None:
    """Raise InputError unless each value is None or a whole number of at least `least`."""
    for name, value in values.items():
        if value is not None:
            whole(name, value, least)


def share(name: str, value: Any) -> None:
    """Raise InputError unless 0 <= value < 1."""
    if not _number(value) or not 0 <= value < 1:
        raise InputError(f"{name}= is {_shown(value)}, expected a number from 0 to below 1")


def positive(name: str, value: Any) -> None:
    """Raise InputError unless value is a finite number above 0."""
    if not _number(value) or not 0 < value < math.inf:
        raise InputError(f"{name}= is {_shown(value)}, expected a finite number above 0")


def pair(name: str, value: Any) -> None:
    """Raise InputError unless value is None or two finite numbers in rising order."""
    two = value is None or (isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_number, value)))
    if not two or (value is not None and not -math.inf < value[0] < value[1] < math.inf):
        raise InputError(f"{name}= is {_shown(value)}, expected two finite numbers in rising order")


def choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raise InputError unless value is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise InputError(f"{name}= is {_shown(value)}, expected {' or '.join(allowed)}")


def flag(name: str, value: Any) -> None:
    """Raise InputError unless value is true or false."""
    if value is not True and value is not False and type(value).__name__ not in ("bool", "bool_"):
        raise InputError(f"{name}= is {_shown(value)}, expected True or False")


def known(function: str, given: Iterable[str], names: Collection[str], own: Collection[str] = ()) -> None:
    """Raise TypeError, as Python does, for a keyword that is not one of `names`, with what is near.

    own: the function's own keywords, which may be meant too.
    """
    for name in given:
        if name not in names:
            near = get_close_matches(name, [*names, *own], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


def device_of(name: Any) -> str:
    """The device to run on: "auto" is CUDA where it is, else the CPU; an absent one is an error, never a fallback.

    Raises InputError: no such device.
    """
    import torch

    text = "auto" if name is None else str(name)
    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if text == "cpu":
        return text
    kind, _, index = text.partition(":")
    if kind != "cuda" or (":" in text and not index.isdigit()):
        raise InputError(f"device= is {_shown(text)}, expected {DEVICES}")
    if int(index or 0) >= torch.cuda.device_count():
        raise InputError(f"device={text}: there are {torch.cuda.device_count()} CUDA devices here")
    return text


def is_module(value: Any) -> bool:
    """Whether value is a torch.nn.Module, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def _number(value: Any) -> bool:
    return not isinstance(value, bool) and hasattr(value, "__float__") and not isinstance(value, str)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"
