"""Networks without memory for their weights."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

VALUES = frozenset(("normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_", "fill_", "zero_"))  # set them


class _NoValues(TorchFunctionMode):
    """Where tensors have no memory, drawing their first values is most of the time that a network takes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if getattr(func, "__name__", "") in VALUES and (given := args[0] if args else named["tensor"]).is_meta:
            return given
        return func(*args, **named)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """The network without memory for its weights, or with it where its code cannot do without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"), _NoValues():
                return make()
        except (NotImplementedError, RuntimeError):  # it computes with tensors as it is made
            return make()
