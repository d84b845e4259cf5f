"""What comes in as numpy goes out as numpy, what comes in as torch goes out as torch; inside, all is float64 torch."""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collapse import InputError

Array = Any  # a numpy array, torch tensor or list for the caller; a float64 tensor inside
Floats = NDArray[np.floating]
P = ParamSpec("P")


def same_kind(function: Callable[P, Any]) -> Callable[P, Any]:
    """Call `function` with arrays, lists and all that it declares an Array as float64 tensors.

    It gives numpy back unless one of them was a tensor. Tensors stay on the device of the first one, and gradients flow
    through.
    Raises InputError, with the argument's name, for what is not a real array or holds NaN or infinity.
    """

    declared = signature(function)

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Any:
        named = declared.bind(*args, **kwargs)
        given = [value for value in named.arguments.values() if isinstance(value, Tensor)]
        device = given[0].device if given else torch.device("cpu")
        for name, value in named.arguments.items():
            if declared.parameters[name].annotation is Array or isinstance(value, (Tensor, np.ndarray, list, tuple)):
                named.arguments[name] = _float64(name, value, device)
        result = function(*named.args, **named.kwargs)
        return result if given else _to_numpy(result)

    return wrapped


def _float64(name: str, value: Any, device: torch.device) -> Tensor:
    try:
        tensor = torch.as_tensor(value if isinstance(value, Tensor) else np.asarray(value, dtype=np.float64, order="C"))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: is not an array of real numbers ({error})") from error
    if tensor.is_complex():
        raise InputError(f"{name}: holds complex numbers; give real ones")
    if not (finite := torch.isfinite(tensor)).all():
        first = (~finite).nonzero()[0].tolist()
        raise InputError(f"{name}: entry {first} of shape {tuple(tensor.shape)} is NaN or infinite")
    return tensor.to(device, torch.float64)


def _to_numpy(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(_to_numpy(part) for part in result)
    return result.numpy() if result.ndim else np.float64(result.item())


def check_positive(name: str, value: float) -> None:
    """Raise InputError unless 0 < value < infinity."""
    if not 0 < value < float("inf"):
        raise InputError(f"{name}: got {value}, expected a positive finite number")


def check_share(name: str, value: float) -> None:
    """Raise InputError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise InputError(f"{name}: got {value}, expected a share, at least 0 and below 1")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise InputError unless value is one of choices."""
    if value not in choices:
        raise InputError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")


def check_shapes(**arrays: tuple[Tensor | Floats, tuple[str, ...]]) -> None:
    """Raise InputError unless each array has its axes, and axes of one name have one length.

    arrays: by name, an array of any shape and the names of its axes, as W=(W, ("m", "d")).
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, (array, axes) in arrays.items():
        if array.ndim != len(axes):
            raise InputError(f"{name}: got shape {tuple(array.shape)}, expected ({', '.join(axes)})")
        for axis, size in zip(axes, array.shape, strict=True):
            expected, owner = sizes.setdefault(axis, (size, name))
            if size != expected:
                raise InputError(f"{name}: got shape {tuple(array.shape)}, but {axis} = {expected} in {owner}")


def check_not_negative(**arrays: Tensor) -> None:
    """Raise InputError, with the name and the entry, if an entry is below zero; arrays of any shape."""
    for name, array in arrays.items():
        if (array < 0).any():
            entry = int((array.flatten() < 0).nonzero()[0, 0])
            raise InputError(f"{name}: entry {entry} is {float(array.min()):g}, below zero")


def check_entries(**arrays: Tensor) -> None:
    """Raise InputError, with the name and the entry, unless all entries of each (K,) are above zero."""
    for name, array in arrays.items():
        if not (array > 0).all():
            raise InputError(f"{name}: entry {int((array <= 0).nonzero()[0, 0])} is not positive; leave it out")


def check_times(t: Tensor | Floats) -> None:
    """Raise InputError unless t is (T,) ascending times, at least one."""
    if t.ndim != 1 or not len(t) or not (t[1:] > t[:-1]).all():
        raise InputError(f"t: got shape {tuple(t.shape)}, expected (T,) ascending times, the first of them the start")


def total_variance(c0: Tensor, ce: Tensor) -> Tensor:
    """c0 + ce, (K,). Raises InputError: a direction has none."""
    c = c0 + ce
    if not c.all():
        raise InputError(f"c0, ce: direction {int((c == 0).nonzero()[0, 0])} has no variance at all; leave it out")
    return c


def check_depth(depth: int) -> None:
    """Raise InputError unless depth is a whole number of layers."""
    if depth < 1 or depth != int(depth):
        raise InputError(f"depth: got {depth}, expected a whole number of layers, at least 1")


def check_decay(weight_decay: float) -> None:
    """Raise InputError unless 0 <= weight_decay < infinity."""
    if not 0 <= weight_decay < float("inf"):
        raise InputError(f"weight_decay: got {weight_decay}, expected a finite number, at least 0")
