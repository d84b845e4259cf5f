"""Load a checkpoint: read, find the encoder, choose its branch, build it, account for every other tensor."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from collapse import InputError
from collapse.arguments import known
from collapse.checkpoints import clips, forms, huggingface, own, sentences, sounds
from collapse.checkpoints import projector as projectors
from collapse.checkpoints.accounts import Account, Place, account, near, takes
from collapse.checkpoints.families import Family, find_roots, weights_of
from collapse.checkpoints.keys import Weights, branch_named, choose_branch, clean, merge_roots, named, parent
from collapse.checkpoints.plan import Clues, Overrides, Plan, build, refuse_flags
from collapse.checkpoints.preprocessing import hints, loss_temperature, own_facts, preprocessing
from collapse.checkpoints.projector import Projector
from collapse.checkpoints.report import Checkpoint
from collapse.checkpoints.settings import listed, printable, shown
from collapse.data.clips import Frames
from collapse.data.preprocessing import Preprocessing
from collapse.errors import warn
from collapse.files import folders
from collapse.files.containers import Contents, first_line
from collapse.files.pickles import uncollected
from collapse.models.backbones import make_backbone
from collapse.models.encoder import Encoder
from collapse.models.heads import Subvector
from collapse.models.meta import on_meta
from collapse.models.resnet import RESNETS


def load(path: str | PathLike | Mapping[str, Any], **options: Any) -> Encoder:
    """Read a checkpoint and return its encoder in eval mode, every weight loaded.

    path: a file, a folder, or timm:NAME or torchvision:NAME; FILE.py:NAME or PACKAGE.MODULE:NAME, code of your own
        that builds a torch.nn.Module, with weights=; or a state dict, or what holds one, as torch.load gives.
    options: fields of `Overrides`.

    Raises:
        InputError: no such file, not a checkpoint, no known layout, several encoders, a missing, superfluous or
            misshapen tensor, something that no tensor tells; the message says which and what to do.
        TypeError: an unknown keyword.

    Examples:
        >>> from torchvision.models import resnet18
        >>> net = load(resnet18().state_dict())
        >>> net.report["architecture"], net.report["feature_dim"], net.blocks[-1]
        ('resnet18', 512, 'layer4.1')
    """
    known("load", options, Overrides.__dataclass_fields__)
    net = loaded(path, **options)
    warn(net.report["warnings"])
    return net


def loaded(path: str | PathLike | Mapping[str, Any], **options: Any) -> Encoder:
    """What `load` gives, without a Python warning: of a larger result. Raises InputError: as `load`."""
    overrides = Overrides(**{k: os.fspath(v) if isinstance(v, PathLike) else v for k, v in options.items()})
    if not isinstance(path, Mapping) and own.is_named(os.fspath(path)):
        return own.network(os.fspath(path), overrides)
    if overrides.weights is not None:
        raise InputError("weights= are those of a network that FILE.py:NAME or PACKAGE.MODULE:NAME builds")
    where = STATE_DICT if isinstance(path, Mapping) else str(path)
    with uncollected():
        contents = Contents(STATE_DICT, path, "") if isinstance(path, Mapping) else _read(where)
        net = _network(path, where, contents, overrides)
    if isinstance(path, Mapping):
        net.report |= {"path": None, "sha256": None}
    return net


def _network(path: str | PathLike | Mapping[str, Any], where: str, contents: Contents, overrides: Overrides) -> Encoder:
    """The encoder of what was read, every weight loaded."""
    with naming(where), forms.classes_named(contents.foreign):
        facts = own_facts(contents.metadata, where)
        tensors = clean(contents.tree, where)
        stated = hints(contents.tree, contents.configs)
        if "architecture" in facts:
            stated["architecture"] = ("the header", True)
        clues = Clues(overrides, tensors, "", contents.container, contents.configs, stated, folder=_folder(path))
        header = facts.get("architecture", {})
        encoder = _own(header, tensors) if "arch" in header else find(tensors, clues)
        return _assemble(where, contents, tensors, encoder, build(encoder.plan), clues, facts)


def inspect(path: str | PathLike | Mapping[str, Any], **options: Any) -> Checkpoint:
    """What a checkpoint is, without images: architecture, branch, projector, preprocessing, where every tensor went.

    path, options: as for `load`.  Raises InputError, TypeError as `load` does.

    Examples:
        >>> from torchvision.models import resnet18
        >>> inspect(resnet18().state_dict()).keys["dropped_by"]
        {'classifier': 2}
    """
    known("inspect", options, Overrides.__dataclass_fields__)
    result = Checkpoint(**loaded(path, **options).report)
    warn(result.warnings)
    return result


STATE_DICT = "state dict"
MESSAGE_LIMIT, FOREIGN_LIMIT = 300, 200  # characters of a message and of a foreign name
SECOND = re.compile(r"(^|[._])(student|momentum|key|encoder_k|target_(network|net))([._]|$)")


@dataclass
class Found:
    """The encoder in a file: its root, those of other encoders and those of its copies, and what it is."""

    root: str
    roots: list[str]
    aliases: list[str]
    plan: Plan


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Put the file's name before what is wrong with it, in one line that ends.

    Raises InputError: whatever was wrong, with the file's name.
    """
    try:
        yield
    except InputError as error:
        message = printable(" ".join(str(error).splitlines())).removeprefix(f"{path}: ")
        if len(message) > MESSAGE_LIMIT:
            message = f"{message[: MESSAGE_LIMIT * 2 // 3]} ... {message[-MESSAGE_LIMIT // 3 :]}"
        raise InputError(f"{path}: {message}") from error


def _read(path: str) -> Contents:
    if path.startswith(("timm:", "torchvision:")) and not Path(path).exists():
        from collapse.checkpoints.library import pretrained

        return pretrained(path)
    return folders.read(Path(path))


def _folder(path: str | PathLike | Mapping[str, Any]) -> Path | None:
    """Where the file or folder of a checkpoint lies."""
    if isinstance(path, Mapping):
        return None
    place = Path(path)
    return place if place.is_dir() else place.parent


def _own(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Found:
    """The network that the header of this package's trainer names; its residual networks are found as all others."""
    from collapse.checkpoints import library

    arch = str(manifest["arch"])
    if arch != "mlp" and not (":" in arch and library.known(arch.removeprefix("timm:"))):
        raise InputError(f"its header names the network {shown(arch)}, which is not known here")
    try:
        make = partial(make_backbone, arch, int(manifest["image_size"]), (), tuple(map(int, manifest["planes"])))
        net = on_meta(make)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"its header names an impossible network ({first_line(error)})") from error
    mine = {key: tensor for key, tensor in tensors.items() if not key.startswith("projector.")}
    weights = Weights(mine, {key: (key,) for key in mine})
    return Found("", [""], [], Plan(arch, make, weights, int(net.width), Preprocessing(), library.axes(net)))  # type: ignore[arg-type]


def find(tensors: Mapping[str, Tensor], clues: Clues) -> Found:
    """The encoder that the caller wants, or the file's authors evaluate.

    Raises InputError: it is unclear which, or a pool that images have not.
    """
    if kind := sentences.kind(clues):
        return _from_transformers(kind, tensors, clues, sentences.plan)
    if kind := clips.kind(clues):
        return _from_transformers(kind, tensors, clues, clips.plan)
    if kind := sounds.kind(clues):
        return _from_transformers(kind, tensors, clues, sounds.plan)
    if clues.given.pool in ("max", "last"):
        raise InputError(f"pool= is {clues.given.pool!r}, expected cls or mean: the others are for encoders of texts")
    if kind := huggingface.kind(clues):
        return _from_transformers(kind, tensors, clues, huggingface.plan)
    families = find_roots(tensors)
    if not families:
        forms.refuse("", tensors)
        return _from_library(tensors, clues)
    all_roots, wanted = list(families), clues.given.branch
    roots = merge_roots(all_roots, tensors)
    if wanted is None:
        root = choose_branch(roots, tensors)
    else:
        root = branch_named(wanted, roots, [r for r in all_roots if r not in roots])
        roots = [r for r in all_roots if r == root or r in roots]
    clues.root = root
    forms.refuse(root, tensors)
    if wanted is None and len(roots) == 1 and SECOND.search(root):
        clues.notes.append(
            f"the only encoder in the file is {listed([named(root)])}, by its name not the one to evaluate"
        )
    plan = _in_family(root, families[root], tensors, clues)
    return Found(root, roots, [alias for alias in all_roots if alias not in roots], plan)


def _from_transformers(kind: str, tensors: Mapping[str, Tensor], clues: Clues, make: Any) -> Found:
    """The encoder that transformers builds of a folder's config.json."""
    forms.refuse("", [key for key in tensors if "pos_conv_embed" not in key])  # whose weight norm transformers knows
    refuse_flags(kind, clues)
    root, plan = make(kind, tensors, clues)
    if clues.given.branch is not None:
        branch_named(clues.given.branch, [root])
    clues.root = root
    return Found(root, [root], [], plan)


def _in_family(root: str, family: Family, tensors: Mapping[str, Tensor], clues: Clues) -> Plan:
    """The plan of an encoder: a library's network where somebody names one, else the family's."""
    arch, config = clues.given.arch, clues.configs.get("config.json", {}).get("architecture")
    if arch is not None and not _is_resnet(family, root, tensors, clues):
        config = arch
    elif config is None and clues.word("model") == clues.word("arch"):
        config = clues.word("arch")  # as timm's own training saves
    if isinstance(config, str):
        from collapse.checkpoints import library

        if library.known(config):
            refuse_flags(config, clues)
            says = clues.configs.get("config.json", {}) if arch is None else {}
            options = library.arguments(says, tensors, root, clues.given.pool, clues.notes)
            return library.plan_named(config, tensors, root, options)
        if config == arch:
            raise InputError(f"arch={shown(arch)}: neither timm nor torchvision has it; leave arch= out")
    elif not family.original and arch is None:
        from collapse.checkpoints import library

        if names := library.fitting(root, tensors):
            return library.identified(names, root, tensors, clues)
    clues.head_is_embedding, said = _head_is_embedding(root, family, tensors), len(clues.notes)
    try:
        return family.plan(weights_of(root, family, tensors), clues)
    except InputError:
        from collapse.checkpoints import library

        given = any(getattr(clues.given, name) for name in ("arch", "heads", "activation", "pool"))
        if not given and len(names := library.fitting(root, tensors)) == 1:
            del clues.notes[said:]  # of an attempt that failed
            return library.identified(names, root, tensors, clues)
        raise
    except (ArithmeticError, LookupError, RuntimeError) as error:
        raise InputError(f"the shapes under {listed([named(root)])} are of no network ({first_line(error)})") from error


def _is_resnet(family: Family, root: str, tensors: Mapping[str, Tensor], clues: Clues) -> bool:
    """Whether arch= names the family's residual network, or none of a library's with these tensors."""
    if not family.plan.__module__.endswith("resnet"):
        return False
    from collapse.checkpoints import library

    arch = str(clues.given.arch)
    if arch in RESNETS or not library.known(arch):
        return True
    try:
        return root not in library.roots_of(arch, tensors)
    except InputError:
        return True


def _head_is_embedding(root: str, family: Family, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the last linear map is no classifier: a projection beside it, or a projector that takes its output."""
    if any(root and parent(root) + key in tensors for key, _ in family.beside):
        return True
    head = tensors.get(f"{root}head.weight")
    if head is None or head.ndim != 2 or head.shape[0] == head.shape[1] or not root:
        return False
    first = re.compile(rf"{re.escape(parent(root))}proj\w*\.(0\.)?weight")
    return any(first.fullmatch(key) and t.ndim == 2 and t.shape[1] == head.shape[0] for key, t in tensors.items())


def _chosen(roots: list[str], tensors: Mapping[str, Tensor], clues: Clues) -> str:
    """The branch that the caller names, or the file's authors evaluate."""
    wanted = clues.given.branch
    return choose_branch(roots, list(tensors)) if wanted is None else branch_named(wanted, roots)


def _from_library(tensors: Mapping[str, Tensor], clues: Clues) -> Found:
    """The network that timm or torchvision has, for tensors that are of no family."""
    from collapse.checkpoints import library

    config = clues.configs.get("config.json", {}).get("architecture")
    name = clues.given.arch or next((n for n in (config, clues.word("arch")) if library.known(n)), None)
    if name is not None and not library.known(name):
        raise InputError(f"arch={shown(name)}: neither timm nor torchvision has it")
    if name is not None:
        refuse_flags(name, clues)
        says = clues.configs.get("config.json", {}) if clues.given.arch is None else {}
        options = library.arguments(says, tensors, "", clues.given.pool, clues.notes)
        roots = merge_roots(library.roots_of(name, tensors, options), tensors)
        root = _chosen(roots, tensors, clues)
        return Found(root, roots, [], library.plan_named(name, tensors, root, options))
    try:
        networks = library.search(tensors)
    except InputError as error:
        prefixes = sorted({key.rpartition(".")[0] for key in tensors}, key=lambda k: (len(k), k))[:20]
        contents = f"{len(tensors)} tensors under {', '.join(map(repr, prefixes))}" if tensors else "no tensors"
        raise InputError(f"no known layout: {contents}; {error}") from error
    root = _chosen(list(networks), tensors, clues)
    return Found(root, list(networks), [], library.identified(networks[root], root, tensors, clues))


def _assemble(
    path: str,
    contents: Contents,
    tensors: Mapping[str, Tensor],
    encoder: Found,
    built: tuple[nn.Module, set[str], list[str]],
    clues: Clues,
    facts: Mapping[str, Any],
) -> Encoder:
    root, plan, overrides = encoder.root, encoder.plan, clues.given
    backbone, taken, notes = built
    pixels, guesses, projector = plan.pixels, list[str](), None
    if isinstance(pixels, Preprocessing):
        projector = projectors.find(tensors, taken, root, plan.width, overrides.projector, overrides.projector_layers)
        pixels, guesses = preprocessing(pixels, facts, clues)
    elif isinstance(pixels, Frames):
        images, guesses = preprocessing(pixels.images, facts, clues)
        pixels = replace(pixels, images=images)
    used = {key for key in tensors if key in taken}
    gone = _account(tensors, used, projector, encoder, overrides)
    projected = projector.keys if projector and not projector.problem else set()
    chain: nn.Module | None = projector.chain if projector and not projector.problem else None
    described = {"dims": projector.dims, "prefix": projector.prefix} if projector and chain is not None else None
    if overrides.dim is not None:
        chain, described = _subvector(overrides.dim, plan.width, chain)
    report = {
        "path": path,
        "sha256": contents.sha256,
        "container": contents.container,
        "architecture": plan.architecture,
        "feature_dim": plan.width,
        "branch": named(root),
        "branches_left": sorted(named(other) for other in set(encoder.roots) - {root}),
        "projector": described,
        "preprocessing": pixels.as_dict(),
        "keys": {
            "loaded": len(used),
            "projector": len(projected),
            "dropped": sum(map(len, gone.dropped.values())),
            "unknown": len(gone.unknown),
            "dropped_by": {rule: len(keys) for rule, keys in gone.dropped.items()},
        },
        "foreign": [printable(name)[:FOREIGN_LIMIT] for name in contents.foreign],
        "warnings": clues.notes + guesses + notes + gone.notes + untrained(plan.weights.tensors),
        "projector_problem": projector.problem if projector else "",
        "temperature": loss_temperature(facts, clues.hints),
    }
    return Encoder(backbone, chain, pixels, report, plan.axes, plan.stem).eval()


def untrained(weights: Mapping[str, Tensor]) -> list[str]:
    """A warning if the running statistics of the batch norms were never updated."""
    means = [tensor for name, tensor in weights.items() if name.endswith("running_mean")]
    if means and all(bool((mean == 0).all()) for mean in means):
        return ["all batch norms have running mean 0: the network looks untrained"]
    return []


def _account(
    tensors: Mapping[str, Tensor], used: set[str], projector: Projector | None, encoder: Found, given: Overrides
) -> Account:
    """What became of the tensors that are not used; raises InputError for unknown ones that are not allowed."""
    root, width = encoder.root, encoder.plan.width
    broken = projector is not None and bool(projector.problem)
    taken = used | (projector.keys if projector else set())
    places = {tensors[key].data_ptr() for key in taken if tensors[key].numel()}
    rest = [key for key in tensors if key not in taken]
    again = {key for key in rest if tensors[key].data_ptr() in places}
    again |= {key for alias in encoder.aliases for key in rest if key.startswith(alias)}
    dims = projector.dims if projector and not broken else ()
    others = [other for other in encoder.roots if other != root]
    gone = account(rest, tensors, Place(root, others, width, dims, given.projector is not None), again)
    if projector is not None and broken:
        head = projector.prefix.rstrip(".")
        if head and head.startswith(root) and not takes(tensors, head, width):  # may be a part of the encoder
            gone.unknown += sorted(projector.keys)
        else:
            gone.dropped["projector that cannot be read"] = sorted(projector.keys)
            gone.notes.insert(0, f"the projector {listed([named(projector.prefix)])} is not read: {projector.problem}")
    heads = [key for key in gone.unknown if re.match(rf"({encoder.plan.heads})(\.|$)", key.removeprefix(root))]
    if heads:
        gone.dropped["head"] = heads
        gone.unknown = [key for key in gone.unknown if key not in heads]
    if gone.unknown:
        _unknown(gone, root, tensors, given.allow_unknown)
    return gone


def _unknown(gone: Account, root: str, tensors: Mapping[str, Tensor], allowed: bool) -> None:
    """Tensors that belong to nothing known: an error, or a warning at the caller's word."""
    first, close = gone.unknown[0], near(gone.unknown, root, tensors)
    if allowed:
        where = f"; {shown(close)} may well change what the encoder gives" if close else ""
        names = f"{len(gone.unknown)} tensors that belong to nothing known: {listed(gone.unknown)}"
        gone.notes.insert(0, f"left out by allow_unknown=True: {names}{where}")
        return
    if close:
        place = "within the encoder" if close.startswith(root) else "beside it, in another network"
        raise InputError(
            f"{len(gone.unknown)} tensors belong to nothing known, first {shown(close)} {place}: "
            "it may change what the encoder gives, or be a layout that is not read"
        )
    raise InputError(
        f"{len(gone.unknown)} tensors belong to nothing known, first {shown(first)}; "
        "if the encoder is right without them, give allow_unknown=True"
    )


def _subvector(dim: int, width: int, chain: nn.Module | None) -> tuple[nn.Module, dict[str, Any]]:
    """DirectCLR's projector (arXiv 2110.09348, section 6): the first entries of the representation."""
    if chain is not None:
        raise InputError('has a projector, so dim= means nothing; leave it out, or give projector="none"')
    if not 0 < dim <= width:
        raise InputError(f"dim={dim}: the representation has {width} entries")
    return Subvector(dim), {"dims": [width, dim], "prefix": ""}
