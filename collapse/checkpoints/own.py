"""A network of the user's own: a module as it is, or what FILE.py:NAME or PACKAGE.MODULE:NAME builds.

The user names the code, on the command line or in a call; no file that is read can.  Weights come from a state dict,
read as every other checkpoint is, and each tensor of the network must be found there.
"""

import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from collapse import InputError
from collapse.checkpoints.keys import branch_named, clean, named, plain
from collapse.checkpoints.plan import Overrides
from collapse.data.preprocessing import Preprocessing
from collapse.files import folders
from collapse.models.encoder import Encoder, Module

PLACE = re.compile(r"(?P<file>.+\.py)|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
OTHERS = ("arch", "projector", "projector_layers", "heads", "activation", "dim", "stem_padding", "maxpool")


def is_named(source: str) -> bool:
    """Whether a source is FILE.py:NAME or PACKAGE.MODULE:NAME, and no file of that name is there."""
    place, colon, name = source.rpartition(":")
    if not colon or not name.isidentifier() or Path(source).exists() or place in ("timm", "torchvision"):
        return False
    match = PLACE.fullmatch(place)
    if match is None or match["file"]:
        return match is not None
    return not Path(place).exists() and _there(place)


def _there(module: str) -> bool:
    """Whether Python would find a module; a package above it is imported for that."""
    with _from_here():
        try:
            return importlib.util.find_spec(module) is not None
        except (ImportError, AttributeError, ValueError):
            return False


class _from_here:
    """The working folder is looked at first, as by `python -m`."""

    def __init__(self, folder: str = "") -> None:
        self.folder = folder

    def __enter__(self) -> None:
        sys.path.insert(0, self.folder)

    def __exit__(self, *error: Any) -> None:
        if self.folder in sys.path:
            sys.path.remove(self.folder)


def network(source: str, given: Overrides) -> Encoder:
    """The network that FILE.py:NAME or PACKAGE.MODULE:NAME builds, with `given.weights`, in eval mode.

    NAME is a torch.nn.Module, or a function or class that is called without arguments and gives one.

    Raises InputError: no such file or name, the code fails, no module comes of it, a tensor is not in the weights, or
    a flag that says how the layouts of others are read.
    """
    odd = next((name for name in OTHERS if getattr(given, name) is not None), None)
    if odd is not None:
        raise InputError(f"{source}: {odd}= says how checkpoints of known layouts are read; leave it out")
    net = _built(source)
    pixels = {name: getattr(given, name) for name in ("resize", "crop", "interpolation", "mean", "std")}
    chosen = {name: value for name, value in pixels.items() if value is not None}
    preprocess = Preprocessing(**{"resize": None, "crop": None, "mean": None, "std": None, **chosen})
    report: dict[str, Any] = {
        "path": source, "sha256": None, "container": "Python", "architecture": source, "feature_dim": None,
        "branch": "(top)", "branches_left": [], "projector": None, "preprocessing": preprocess.as_dict(),
        "keys": {"loaded": 0, "projector": 0, "dropped": 0, "unknown": 0, "dropped_by": {}}, "foreign": [],
        "warnings": [], "projector_problem": "",
    }  # fmt: skip
    if given.weights is None:
        report["warnings"].append("no weights= are given: the network is measured as its code builds it")
    else:
        report |= _filled(net, given.weights, given.branch)
    encoder = Module(net, preprocess, report, given.pool).eval()
    encoder.report["feature_dim"] = _width(encoder, given.crop or given.resize or 224)
    return encoder


def _width(net: Encoder, side: int) -> int | None:
    """How wide its representation of an image is; None if it takes no image of three channels and this side."""
    with torch.no_grad(), suppress(InputError):
        return net(torch.zeros(1, 3, side, side)).shape[1]
    return None


def _built(source: str) -> nn.Module:
    place, _, name = source.rpartition(":")
    module = _ran(source, lambda: _file(place) if place.endswith(".py") else _module(place))
    if not hasattr(module, name):
        callables = ", ".join(n for n, value in vars(module).items() if callable(value) and n[0] != "_")
        raise InputError(f"{source}: {place} has no {name}; it has {callables[:200] or 'nothing to call'}")
    made = getattr(module, name)
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise InputError(f"{source}: is a {type(made).__name__}, expected a function that builds a torch.nn.Module")
        made = _ran(source, made)
    if not isinstance(made, nn.Module):
        raise InputError(f"{source}: gives a {type(made).__name__}, expected a torch.nn.Module")
    return made


def _ran(source: str, work: Callable[[], Any]) -> Any:
    """What the user's code gives. Raises InputError: it fails; the line says where."""
    try:
        return work()
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        last = next((frame for frame in reversed(frames) if not frame.filename.startswith("<")), frames[-1])
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(f"{source}: fails ({what}, at {last.filename}:{last.lineno})") from error


def _file(place: str) -> ModuleType:
    path = Path(place).resolve()
    if not path.is_file():
        raise InputError(f"{place}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{place}: is no Python file")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # as dataclasses and pickles of its classes want it
    try:
        with _from_here(str(path.parent)):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(path.stem)
        if before is not None:
            sys.modules[path.stem] = before
        raise
    return module


def _module(place: str) -> ModuleType:
    with _from_here():
        return importlib.import_module(place)


def _filled(net: nn.Module, path: str, branch: str | None) -> dict[str, Any]:
    """Load the weights; what the report says of them."""
    contents = folders.read(Path(path))
    tensors = clean(contents.tree, path)
    wanted = {name: tensor for name, tensor in net.state_dict().items() if isinstance(tensor, Tensor)}
    if not wanted:
        raise InputError(f"{path}: the network has no tensors to fill; leave weights= out")
    root = _root({plain(name): tensor for name, tensor in wanted.items()}, tensors, path, branch)
    chosen = {name: tensors[root + plain(name)] for name in wanted}
    net.load_state_dict(chosen)
    rest = sorted(tensors.keys() - {root + plain(name) for name in wanted})
    return {
        "path": path,
        "sha256": contents.sha256,
        "container": contents.container,
        "branch": named(root),
        "foreign": list(contents.foreign),
        "keys": {
            "loaded": len(chosen), "projector": 0, "dropped": len(rest), "unknown": 0,
            "dropped_by": {"not of the network": len(rest)} if rest else {},
        },
    }  # fmt: skip


def _root(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: str, branch: str | None) -> str:
    """The prefix below which every tensor of the network lies, in its shape."""
    first = next(iter(wanted))
    ends = [key.removesuffix(first) for key in tensors if key == first or key.endswith(f".{first}")]
    roots = [root for root in ends if not _missing(wanted, tensors, root)]
    if not roots:
        closest = min(ends, key=lambda root: len(_missing(wanted, tensors, root)), default="")
        missing = _missing(wanted, tensors, closest)
        raise InputError(
            f"{path}: {len(missing)} of the network's {len(wanted)} tensors are not there in their shapes, "
            f"first {closest}{missing[0]} {tuple(wanted[missing[0]].shape)}"
        )
    if branch is not None:
        return branch_named(branch, roots)
    if len(roots) > 1:
        listed = ", ".join(named(root) for root in roots)
        raise InputError(f"{path}: {len(roots)} networks in it fit, {listed}; give branch=")
    return roots[0]


def _missing(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], root: str) -> list[str]:
    absent = torch.empty(0, 0, 0, 0, 0, 0)
    return [name for name, tensor in wanted.items() if tensors.get(root + name, absent).shape != tensor.shape]
