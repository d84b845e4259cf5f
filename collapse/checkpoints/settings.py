"""Values of configs, arguments, hyper-parameters and flags, which may be anything: each is checked by one function.

Every function takes the place of a value (file and key, or flag) and the value; it returns None for None, and raises
InputError, which names both, for what cannot be.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from collapse import InputError

SIDE_LIMIT = 4096  # pixels that a config may ask for
NAME_LIMIT = 80  # characters of a name or value in a message
MEANS, STDS = (-10.0, 10.0), (1e-6, 10.0)  # of pixels in 0..1


def printable(text: str) -> str:
    """The text on one line, without what a terminal would obey."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def shown(value: Any) -> str:
    """A value of a stranger for a message: one short line, whatever it is."""
    if isinstance(value, str):
        text = printable(value)
        return repr(text if len(text) <= NAME_LIMIT else f"{text[: NAME_LIMIT // 2]}...{text[-NAME_LIMIT // 2 :]}")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if abs(value) < 10**20 else "a huge number"
    if value is None or isinstance(value, (bool, float)):
        return str(value)
    if isinstance(value, (list, tuple)) and len(value) <= 3 and all(isinstance(v, (int, float, str)) for v in value):
        return f"[{', '.join(map(shown, value))}]"
    return f"a {type(value).__name__}"


def listed(names: Collection[str], limit: int = 6) -> str:
    """Names for a message, the first few of many."""
    first = [shown(name)[1:-1] for name in list(names)[:limit]]
    return ", ".join([*first, *([f"and {len(names) - limit} more"] if len(names) > limit else [])])


def number(place: str, value: Any, low: float, high: float) -> float | None:
    """A number in low..high. Raises InputError: it is none."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise InputError(f"{place} is {shown(value)}, expected a number in {low:g}..{high:g}")
    return float(value)


def whole_number(place: str, value: Any, low: int, high: int) -> int | None:
    """A whole number in low..high. Raises InputError: it is none."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{place} is {shown(value)}, expected a whole number in {low}..{high}")
    return value


def flag(place: str, value: Any) -> bool | None:
    """True or false; 1 and 0 are. Raises InputError: it is neither."""
    if value is None:
        return None
    if not isinstance(value, (bool, int)) or value not in (0, 1):
        raise InputError(f"{place} is {shown(value)}, expected true or false")
    return bool(value)


def text(place: str, value: Any) -> str | None:
    """A name. Raises InputError: it is none."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise InputError(f"{place} is {shown(value)}, expected a name")
    return value


def choice(place: str, value: Any, allowed: Collection[Any]) -> Any:
    """One of a few values. Raises InputError: it is another."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value not in allowed:
        raise InputError(f"{place} is {shown(value)}, expected {' or '.join(map(str, allowed))}")
    return value


def triple(place: str, value: Any, limits: tuple[float, float]) -> tuple[float, ...] | None:
    """Three numbers, one a channel, each in the limits: a list, or its text. Raises InputError: they are not."""
    if value is None:
        return None
    numbers = read_text(value)
    if not isinstance(numbers, (list, tuple)) or len(numbers) != 3:
        raise InputError(f"{place} is {shown(value)}, expected 3 numbers")
    checked = tuple(number(place, entry, *limits) for entry in numbers)
    if None in checked:
        raise InputError(f"{place} is {shown(value)}, expected 3 numbers")
    return tuple(entry for entry in checked if entry is not None)


def channels(place: str, value: Any, limits: tuple[float, float]) -> None:
    """Raise InputError unless it is None, or 1 to 64 numbers in the limits, one a channel."""
    if value is None:
        return
    if not isinstance(value, (list, tuple)) or not 0 < len(value) <= 64:
        raise InputError(f"{place} is {shown(value)}, expected a number for each channel")
    if any(number(place, entry, *limits) is None for entry in value):
        raise InputError(f"{place} is {shown(value)}, expected numbers")


def read_text(value: Any) -> Any:
    """The list that a text writes down ("(0.5, 0.5, 0.5)"), or the value as it is."""
    if not isinstance(value, str) or len(value) > 200:
        return value
    try:
        return json.loads(f"[{value.strip('()[] ')}]")
    except ValueError:
        return value


def side(place: str, value: Any) -> int | None:
    """Pixels: 224, [224, 224], {"shortest_edge": 224} or {"height": 224, "width": 224}.

    Raises InputError: another value, such as two sides that differ.
    """
    if isinstance(value, Mapping):
        value = value.get("shortest_edge") or (value.get("height"), value.get("width"))
    if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1] is not None:
        value = value[0]
    return whole_number(place, value, 1, SIDE_LIMIT)
