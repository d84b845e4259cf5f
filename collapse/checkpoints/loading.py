"""Load a checkpoint: read, find the encoder, choose its branch, build it, account for every other tensor."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from collapse import InputError
from collapse.checkpoints import projector as projectors
from collapse.checkpoints.encoder import Encoder
from collapse.checkpoints.families import Family, find_roots, weights_of
from collapse.checkpoints.keys import Weights, choose_branch, clean, explain, merge_roots, named, parent
from collapse.checkpoints.plan import Clues, Overrides, Plan, build, frame
from collapse.checkpoints.preprocessing import hints, own_facts, preprocessing
from collapse.files import folders
from collapse.files.containers import Contents, first_line
from collapse.images import Preprocessing
from collapse.models import Subvector, make_backbone


def load(path: str | PathLike, **known: Any) -> Encoder:
    """Read a checkpoint and return its encoder in eval mode, every weight loaded.

    path: a file, a folder, or timm:NAME or torchvision:NAME.  known: fields of `Overrides`.

    Raises:
        InputError: no such file, not a checkpoint, no known layout, several encoders, a missing, superfluous or
            misshapen tensor, something that no tensor tells; the message says which and what to do.
    """
    if unknown := set(known) - set(Overrides.__dataclass_fields__):
        raise InputError(
            f"load: no option {', '.join(sorted(unknown))}; there are {', '.join(Overrides.__dataclass_fields__)}"
        )
    overrides, path = Overrides(**known), str(path)
    contents = _read(path)
    with about(path):
        facts = own_facts(contents.metadata, path)
        tensors = clean(contents.tree, path)
    with about(path):
        found = hints(contents.tree, contents.configs) | ({"architecture": True} if "architecture" in facts else {})
        clues = Clues(overrides, tensors, "", contents.container, contents.configs, found)
        own = facts.get("architecture", {})
        encoder = _own(own, tensors) if "arch" in own else find(path, tensors, clues)
    built = build(encoder.plan, path)
    return _assemble(path, contents, tensors, encoder, built, clues, facts)


SECOND = re.compile(r"(^|[._])(student|momentum|key|encoder_k|target_(network|net))([._]|$)")


@dataclass
class Found:
    """The encoder in a file: its root, those of other encoders and those of its copies, and what it is."""

    root: str
    roots: list[str]
    aliases: list[str]
    plan: Plan


@contextmanager
def about(path: str) -> Iterator[None]:
    """Put the file's name before what is wrong with it."""
    try:
        yield
    except InputError as error:
        message = " ".join(str(error).splitlines())  # names in a file may be anything
        raise InputError(message if message.startswith(path) else f"{path}: {message}") from error


def _read(path: str) -> Contents:
    if path.startswith(("timm:", "torchvision:")) and not Path(path).exists():
        from collapse.checkpoints.library import pretrained

        return pretrained(path)
    return folders.read(Path(path))


def _own(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Found:
    """The network that the header of this package's trainer names; its residual networks are found as all others."""
    from collapse.checkpoints import library

    arch = str(about["arch"])
    if arch != "mlp" and not (":" in arch and library.known(arch.removeprefix("timm:"))):
        raise InputError(f"its header names the network {arch!r}, which is not known here")
    try:
        make = partial(make_backbone, arch, int(about["image_size"]), (), tuple(map(int, about["planes"])))
        net = frame(make)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"its header names an impossible network ({error})") from error
    mine = {key: tensor for key, tensor in tensors.items() if not key.startswith("projector.")}
    weights = Weights(mine, {key: (key,) for key in mine})
    return Found("", [""], [], Plan(arch, make, weights, int(net.width), Preprocessing(), library.axes(net)))  # type: ignore[arg-type]


def find(path: str, tensors: Mapping[str, Tensor], clues: Clues) -> Found:
    """The encoder that the caller wants, or the file's authors evaluate."""
    families = find_roots(tensors)
    if not families:
        return _from_library(path, tensors, clues)
    all_roots = list(families)
    roots = merge_roots(all_roots, tensors)
    wanted = clues.given.branch
    if wanted is not None and wanted.rstrip(".") in map(named, all_roots):
        roots = [r for r in all_roots if named(r) == wanted.rstrip(".") or r in roots]
    clues.root = root = choose_branch(path, roots, wanted, tensors)
    if wanted is None and len(roots) == 1 and SECOND.search(root):
        clues.notes.append(f"the only encoder in the file is {named(root)}, by its name not the one to evaluate")
    plan = _in_family(root, families[root], tensors, clues)
    return Found(root, roots, [alias for alias in all_roots if alias not in roots], plan)


def _in_family(root: str, family: Family, tensors: Mapping[str, Tensor], clues: Clues) -> Plan:
    """The plan of an encoder: a library's network where somebody names one, else the family's."""
    arch, config = clues.given.arch, clues.configs.get("config.json", {}).get("architecture")
    if arch is not None and not family.plan.__module__.endswith("resnet"):
        config = arch
    elif config is None and isinstance(clues.hint("model"), str) and clues.hint("model") == str(clues.hint("arch")):
        config = clues.hint("arch")  # as timm's own training saves
    if isinstance(config, str):
        from collapse.checkpoints import library

        if library.known(config):
            return library.plan_named(config, tensors, root)[1]
        if config == arch:
            raise InputError(f"--arch {arch}: neither timm nor torchvision has it; leave --arch out")
    clues.head_is_embedding = _head_is_embedding(root, family, tensors)
    try:
        return family.plan(weights_of(root, family, tensors), clues)
    except (ArithmeticError, LookupError, RuntimeError) as error:
        raise InputError(f"the shapes under {named(root)} are of no network ({first_line(error)})") from error


def _head_is_embedding(root: str, family: Family, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the last linear map is no classifier: a projection beside it, or a projector that takes its output."""
    if any(root and parent(root) + key in tensors for key, _ in family.beside):
        return True
    head = tensors.get(f"{root}head.weight")
    if head is None or head.ndim != 2 or head.shape[0] == head.shape[1] or not root:
        return False
    first = re.compile(rf"{re.escape(parent(root))}proj\w*\.(0\.)?weight")
    return any(first.fullmatch(key) and t.ndim == 2 and t.shape[1] == head.shape[0] for key, t in tensors.items())


def _from_library(path: str, tensors: Mapping[str, Tensor], clues: Clues) -> Found:
    """The network that timm or torchvision has, for tensors that are of no family."""
    from collapse.checkpoints import library

    config = clues.configs.get("config.json", {}).get("architecture")
    name = clues.given.arch or next((n for n in (config, clues.hint("arch")) if library.known(n)), None)
    if name is not None and not library.known(name):
        raise InputError(f"--arch {name}: neither timm nor torchvision has it")
    if name is not None:
        root, plan = library.plan_named(name, tensors)
        return Found(root, [root], [], plan)
    try:
        found = library.search(tensors)
    except InputError as error:
        prefixes = sorted({key.rpartition(".")[0] for key in tensors}, key=lambda k: (len(k), k))[:20]
        held = f"{len(tensors)} tensors under {', '.join(map(repr, prefixes))}" if tensors else "no tensors"
        raise InputError(f"no known layout: {held}; {error}") from error
    root = choose_branch(path, list(found), clues.given.branch, tensors)
    if len(found[root]) > 1:
        listed = ", ".join(found[root][:8])
        raise InputError(f"{len(found[root])} networks of timm and torchvision have its tensors, {listed}; give --arch")
    plan = library.plan(found[root][0], root, tensors)
    clues.notes.append(f"identified as {plan.architecture} by its tensors alone")
    return Found(root, list(found), [], plan)


def _assemble(
    path: str,
    contents: Contents,
    tensors: Mapping[str, Tensor],
    found: Found,
    built: tuple[nn.Module, set[str], list[str]],
    clues: Clues,
    facts: Mapping[str, Any],
) -> Encoder:
    root, plan, overrides = found.root, found.plan, clues.given
    backbone, taken, notes = built
    with about(path):
        projector = projectors.find(tensors, taken, root, plan.width, overrides.projector, overrides.projector_layers)
        pixels, guesses = preprocessing(plan.pixels, facts, clues)
    used = {key for key in tensors if key in taken}
    projected = projector.keys if projector else set()
    rest = [key for key in tensors if key not in used and key not in projected]
    dropped, unknown = _account(rest, used | projected, tensors, found)
    if projector and projector.problem:
        dropped["projector that cannot be read"], projected = sorted(projected), set()
        notes = [*notes, f"the projector {named(projector.prefix)} is not read: {projector.problem}"]
    if unknown and not overrides.allow_unknown:
        raise InputError(
            f"{path}: {len(unknown)} tensors belong to nothing known, first {unknown[0]!r}; "
            "if the encoder is right without them, give --allow-unknown"
        )
    chain: nn.Module | None = projector.chain if projector and not projector.problem else None
    described = {"dims": projector.dims, "prefix": projector.prefix} if projector and chain is not None else None
    if overrides.dim is not None:
        chain, described = _subvector(path, overrides.dim, plan.width, chain)
    report = {
        "path": path,
        "sha256": contents.sha256,
        "container": contents.container,
        "architecture": plan.architecture,
        "feature_dim": plan.width,
        "branch": named(root),
        "branches_left": sorted(named(other) for other in set(found.roots) - {root}),
        "projector": described,
        "preprocessing": pixels.as_dict(),
        "keys": {
            "loaded": len(used),
            "projector": len(projected),
            "dropped": sum(map(len, dropped.values())),
            "unknown": len(unknown),
            "dropped_by": {rule: len(keys) for rule, keys in dropped.items()},
        },
        "foreign": contents.foreign,
        "warnings": clues.notes + guesses + notes + untrained(plan.weights.tensors),
        "projector_problem": projector.problem if projector else "",
    }
    return Encoder(backbone, chain, pixels, report, plan.axes, plan.stem).eval()


def untrained(weights: Mapping[str, Tensor]) -> list[str]:
    """A warning if the running statistics of the batch norms were never updated."""
    means = [tensor for name, tensor in weights.items() if name.endswith("running_mean")]
    if means and all(bool((mean == 0).all()) for mean in means):
        return ["all batch norms have running mean 0: the network looks untrained"]
    return []


def _account(
    rest: list[str], used: set[str], tensors: Mapping[str, Tensor], found: Found
) -> tuple[dict[str, list[str]], list[str]]:
    """({rule: keys it drops}, keys that no rule knows) of all tensors that are not used."""
    places = {tensors[key].data_ptr() for key in used if tensors[key].numel()}
    again = {key for key in rest if tensors[key].data_ptr() in places}
    again |= {key for alias in found.aliases for key in rest if key.startswith(alias)}
    return explain(rest, found.root, [other for other in found.roots if other != found.root], again)


def _subvector(path: str, dim: int, width: int, chain: nn.Module | None) -> tuple[nn.Module, dict[str, Any]]:
    """DirectCLR's projector (arXiv 2110.09348, section 6): the first entries of the representation."""
    if chain is not None:
        raise InputError(f"{path}: has a projector, so --dim means nothing; leave it out, or give --projector none")
    if not 0 < dim <= width:
        raise InputError(f"{path}: --dim {dim}: the representation has {width} entries")
    return Subvector(dim), {"dims": [width, dim], "prefix": ""}
