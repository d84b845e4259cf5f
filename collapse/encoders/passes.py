"""Forward passes: the embeddings of images, at one layer or at several, and what of them is rounding."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from collapse import InputError
from collapse.data.preprocessing import Preprocessing
from collapse.encoders.processes import in_order
from collapse.models.encoder import Encoder, LayerHooks, Module, given_by

PRECISIONS = ("float32", "bf16")


@torch.inference_mode()
def embed(
    net: nn.Module,
    batches: Iterable[Tensor],
    preprocess: Any,
    device: str = "cpu",
    precision: str = "float32",
) -> Iterator[Tensor]:
    """Outputs of `net` in eval mode, (b, d) float32 on `device`, for batches of pixels (b, 3, h, w) uint8, in order.

    An empty batch stays empty, whatever the network.

    precision: "float32", or "bf16" for autocast and channels_last: faster on a GPU, and three digits instead of seven.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from collapse.models.encoder import Module
        >>> net = Module(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)))
        >>> pixels = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
        >>> [tuple(rows.shape) for rows in embed(net, [pixels, pixels], net.preprocess)]
        [(4, 5), (4, 5)]
    """
    net = _ready(net, device, precision)
    dtype = next((p.dtype for p in net.parameters()), torch.float32)
    for pixels in batches:
        if not len(pixels):
            yield pixels
            continue
        x = entered(preprocess, pixels, device, dtype)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            rows = net(x)
        yield rows.float()


def entered(preprocess: Any, batch: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """A batch (n, ...) as a network takes it, on its device; numbers of pieces of words stay whole.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from collapse.models.encoder import Module
        >>> net = Module(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)))
        >>> pixels = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
        >>> x = entered(net.preprocess, pixels, "cpu", torch.float64)
        >>> tuple(x.shape), x.dtype
        ((4, 3, 2, 2), torch.float64)
    """
    x = preprocess.normalize(batch.to(device, non_blocking=True))
    return x.to(dtype) if x.is_floating_point() else x


def _ready(net: Any, device: str, precision: str) -> Any:
    flat = all(parameter.ndim < 5 for parameter in net.parameters())  # a clip's kernels have no such layout
    layout = torch.channels_last if precision == "bf16" and flat else torch.preserve_format
    return net.to(device, memory_format=layout).eval()


@torch.inference_mode()
def embed_layers(
    net: Encoder,
    names: Sequence[str],
    batches: Iterable[Tensor],
    device: str = "cpu",
    positions: int = 0,
    seed: int = 0,
    precision: str = "float32",
) -> Iterator[dict[str, Tensor]]:
    """Rows of several layers, {name: (n, d)} on `device`, for batches of pixels (b, 3, h, w) uint8; one pass for all.

    names: "representation", "projector" and modules of the backbone.  Of an empty batch the dict is empty.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from collapse.models.encoder import Module
        >>> net = Module(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)))
        >>> pixels = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
        >>> (rows,) = embed_layers(net, ["1", "representation"], [pixels])
        >>> {name: tuple(z.shape) for name, z in rows.items()}
        {'1': (4, 5), 'representation': (4, 5)}
    """
    net = _ready(net, device, precision)
    dtype = next((p.dtype for p in net.parameters()), torch.float32)
    hooks = LayerHooks(net, [n for n in names if n not in ("representation", "projector")], positions, seed)
    try:
        for pixels in batches:
            if not len(pixels):
                yield {}
                continue
            x = entered(net.preprocess, pixels, device, dtype)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
                rows = {"representation": net(x)}
                if "projector" in names and net.projector is not None:
                    rows["projector"] = net.projector(rows["representation"])
            rows |= hooks.rows
            yield {name: rows[name] for name in names}
    finally:
        hooks.remove()


def rounding(net: Encoder, names: Sequence[str], pixels: Tensor, normalize: bool, **options: Any) -> dict[str, NDArray]:
    """The rounding errors of some rows of each layer, {name: (n, d)} float64.

    A network adds up millions of roundings, of which the dtype of its output does not tell.  So the pixels go through
    twice, in the precision of `options` (those of `embed_layers`) and in float64.  The weights must be float32.

    pixels: (n, 3, h, w) uint8.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from collapse.models.encoder import Module
        >>> net = Module(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)))
        >>> pixels = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
        >>> errors = rounding(net, ["representation"], pixels, normalize=False)
        >>> errors["representation"].shape, bool(abs(errors["representation"]).max() < 1e-6)
        ((4, 5), True)
    """
    (single,) = embed_layers(net, names, [pixels], **options)
    try:
        net.double()
        (double,) = embed_layers(net, names, [pixels], **{**options, "precision": "float32"})
    finally:
        net.float()  # the weights were float32: exact both ways
    errors = {}
    for name in names:
        pair = [z[name].double() for z in (single, double)]
        if normalize:
            pair = [torch.nn.functional.normalize(z) for z in pair]
        errors[name] = (pair[0] - pair[1]).cpu().numpy()
    return errors


def is_single(net: nn.Module) -> bool:
    """Whether all numbers of a network are float32, so that `rounding` brings them back as they were.

    Examples:
        >>> from torch import nn
        >>> is_single(nn.Linear(2, 2)), is_single(nn.Linear(2, 2).double())
        (True, False)
    """
    dtypes = [t.dtype for t in (*net.parameters(), *net.buffers()) if t.is_floating_point() or t.is_complex()]
    return all(dtype == torch.float32 for dtype in dtypes)


def errors_of(
    net: Encoder, names: Sequence[str], pixels: Tensor, normalize: bool, passes: Mapping[str, Any]
) -> tuple[dict[str, NDArray], list[str]]:
    """(rounding of some rows by layer, warnings), arguments as for `rounding`: {name: (n, d)} float64.

    There is nothing of a network that is not float32, or runs in nothing else.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from collapse.models.encoder import Module
        >>> net = Module(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).double())
        >>> pixels = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
        >>> errors_of(net, ["representation"], pixels, False, {})
        ({}, [])
    """
    if not is_single(net):
        return {}, []
    try:
        return rounding(net, names, pixels, normalize, **passes), []
    except (RuntimeError, InputError) as error:
        if isinstance(error, torch.OutOfMemoryError) or not isinstance(net, Module):
            raise
        return {}, ["the network does not run in float64: the floor does not know what its passes round"]


def readable(net: Encoder, rows: Tensor, **options: Any) -> set[str]:
    """The blocks that run, once or more, and give features of each of the `rows`, (n, 3, h, w), every time.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from collapse.models.encoder import Module
        >>> net = Module(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)))
        >>> pixels = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
        >>> readable(net, pixels)
        {'1'}
    """
    fit: dict[str, bool] = {}

    def see(module: nn.Module, inputs: Any, output: Any, name: str) -> None:
        output = given_by(net, output)
        good = isinstance(output, Tensor) and output.ndim in (2, 3, 4) and len(output) == len(rows)
        fit[name] = good and fit.get(name, True)

    hooks = [net.backbone.get_submodule(name).register_forward_hook(partial(see, name=name)) for name in net.blocks]
    try:
        for _ in embed_layers(net, ["representation"], [rows], **options):
            pass
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name, good in fit.items() if good}


def features(
    net: nn.Module, batches: Iterable[Tensor], preprocess: Preprocessing, device: str, distributed: bool = False
) -> NDArray:
    """All embeddings in one array, (n, d) float32; of every process's batches, if they are shared.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from collapse.models.encoder import Module
        >>> net = Module(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)))
        >>> pixels = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
        >>> features(net, [pixels, pixels], net.preprocess, "cpu").shape
        (8, 5)
    """
    rows = in_order(embed(net, batches, preprocess, device), distributed)
    return np.concatenate([z.cpu().numpy() for z in rows])
