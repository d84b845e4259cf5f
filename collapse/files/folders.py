"""Folders that hold one checkpoint in several files, read with the readers of containers.py.

Hugging Face: config.json beside model.safetensors or pytorch_model.bin, whole or in shards named by an index.
open_clip: open_clip_config.json beside its weights.  torch.distributed.checkpoint (DCP): .metadata beside *.distcp.
Names inside an index or .metadata are untrusted: one that leaves the folder is an error.
"""

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

from collapse import InputError
from collapse.files import containers, limits
from collapse.files.containers import Contents
from collapse.files.descriptor import Descriptor, opened
from collapse.files.pickles import Stub, unpickle

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
CONFIGS = ("config.json", "preprocessor_config.json", "open_clip_config.json", "args.json")
OF_CLIPS = "video_preprocessor_config.json"  # of transformers, in the place of preprocessor_config.json


def read(path: Path) -> Contents:
    """Read a checkpoint, be it a file or a folder; `configs` has the JSON files beside the tensors.

    Raises InputError as containers.read does, and for a folder of no known kind or with several checkpoints.
    """
    if not path.is_dir():
        contents = containers.read(path)
        # config.json describes a file of the usual name, or the only one: beside others it proves nothing.
        alone = path.name in WEIGHTS or _only_checkpoint(path)
        contents.configs = _configs(path.parent, CONFIGS if alone else ("args.json",))
        return contents
    path = rooted(path)
    if (path / ".metadata").is_file():
        return _read_dcp(path)
    if (path / "latest").is_file() or any(path.glob("*mp_rank_*")):
        raise InputError(f"{path}: a DeepSpeed folder; run its zero_to_fp32.py and give the file that it writes")
    names = [name for name in WEIGHTS if (path / name).is_file()]
    if not names:
        raise InputError(f"{path}: a folder without a checkpoint ({', '.join(WEIGHTS)} or .metadata); give the file")
    weights = path / names[0]
    contents = _read_shards(weights) if weights.suffix == ".json" else containers.read(weights)
    contents.configs = _configs(path)
    contents.container = f"folder of {contents.container}"
    return contents


def rooted(path: Path) -> Path:
    """The folder itself, or the one in it where its modules.json (sentence-transformers) says that the network is.

    Raises InputError: modules.json is no JSON list, or names what lies outside the folder.
    """
    if not (path / "modules.json").is_file() or any((path / name).is_file() for name in WEIGHTS):
        return path
    first = next(iter(json_of(path / "modules.json", list)), None)
    name = first.get("path") if isinstance(first, dict) else None
    return inside(path, name) if name else path


def _only_checkpoint(path: Path) -> bool:
    return sum(p.suffix in (".ckpt", ".pth", ".pt", ".bin", ".safetensors") for p in path.parent.iterdir()) == 1


def _configs(folder: Path, names: Sequence[str] = CONFIGS) -> dict[str, Any]:
    configs = {name: json_of(folder / name, dict) for name in names if (folder / name).is_file()}
    if (
        "preprocessor_config.json" in names
        and "preprocessor_config.json" not in configs
        and (folder / OF_CLIPS).is_file()
    ):
        configs["preprocessor_config.json"] = json_of(folder / OF_CLIPS, dict)
    return configs


def json_of(path: Path, kind: type) -> Any:
    """The JSON object (kind dict) or list in a file. Raises InputError: no such file, no such JSON."""
    with opened(path) as source:
        if source.size > limits.JSON:
            raise InputError(f"{path}: {source.size} bytes of JSON; at most {limits.JSON} are read")
        data = source.read(0, source.size)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({containers.first_line(error)})") from error
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise InputError(f"{path}: holds a JSON {type(value).__name__}, expected {wanted}")
    return value


def inside(folder: Path, name: Any) -> Path:
    """A file of the folder itself, by the name that another file of it gives.

    Raises InputError: the name leaves the folder, itself or as a link.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or re.search(r"[/\\\0]", name):
        raise InputError(f"{folder}: names a file {name!r} outside its folder; refused")
    path = folder / name
    target = Path(os.path.realpath(path))
    if target.parent != Path(os.path.realpath(folder)) and not _huggingface_cache(path, target):
        raise InputError(f"{folder}: {name} is a link that leaves the folder; refused")
    return path


def _huggingface_cache(path: Path, target: Path) -> bool:
    """Its snapshots are links to ../../blobs/HASH of the same repository."""
    repository = os.path.realpath(path.parent.parent.parent)
    return target.parent.name == "blobs" and target.parent.parent == Path(repository)


def _read_shards(index: Path) -> Contents:
    manifest = json_of(index, dict)
    weight_map = manifest.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map")
    tree: dict[str, Any] = {}
    shards = {name: containers.read(inside(index.parent, name)) for name in sorted(set(map(str, weight_map.values())))}
    for name, contents in shards.items():
        if not isinstance(contents.tree, dict):
            raise InputError(f"{index.parent / name}: holds no tensors by name")
        wanted = {key for key, shard in weight_map.items() if shard == name}
        if missing := wanted - set(contents.tree):
            raise InputError(f"{index.parent / name}: {len(missing)} tensors of the index are missing in it")
        if superfluous := set(contents.tree) - wanted:
            raise InputError(
                f"{index.parent / name}: {len(superfluous)} tensors are in the shards but not in the index"
            )
        tree |= contents.tree
    _check_size(index, manifest.get("metadata"), tree)
    digest = _digest(contents.sha256 for contents in shards.values())
    foreign = sorted({name for contents in shards.values() for name in contents.foreign})
    return Contents(f"{len(shards)} shards", tree, digest, foreign)


def _check_size(index: Path, metadata: Any, tree: Mapping[str, Any]) -> None:
    """Raise InputError if the index counts other bytes: a shard of another save has the same names.

    Some writers count tensors that share their numbers once.
    """
    declared = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    tensors = [value for value in tree.values() if hasattr(value, "untyped_storage")]
    total = sum(t.numel() * t.element_size() for t in tensors)
    once = sum({t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
    if type(declared) in (int, float) and not once <= declared <= total:
        raise InputError(
            f"{index}: says that the tensors take {declared:.0f} bytes, and the shards hold {total}: one of them is "
            "of another save; fetch them again, or take total_size out of the index"
        )


def _digest(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _read_dcp(folder: Path) -> Contents:
    """Join the chunks of each tensor; .metadata is a pickle, read as data like any other."""
    entries, places, foreign = _dcp_index(folder / ".metadata")
    with ExitStack() as stack:
        parts = _Parts(folder, places, stack)
        tree = {name: parts.join(name, entry) for name, entry in entries.items() if not name.startswith("optim")}
        parts.apart()
        digest = _digest(file.sha256() for _, file in sorted(parts.files.items()))
    return Contents("distributed checkpoint", tree, digest, sorted(foreign))


Places = dict[tuple[str, tuple[int, ...]], dict[str, Any]]


def _dcp_index(path: Path) -> tuple[dict[str, dict[str, Any]], Places, set[str]]:
    """(description by tensor, where each chunk lies by tensor and offset, foreign names) of .metadata."""
    foreign: set[str] = set()
    try:
        with opened(path) as source:
            if source.size > limits.PICKLE:
                raise InputError(f"{source.size} bytes; at most {limits.PICKLE} are read")
            data = source.read(0, source.size)
        sizes = {"torch.Size": lambda size=(): tuple(size)}
        metadata = unpickle(io.BytesIO(data), len(data), sizes, {}, foreign)
        described, storage = metadata.state["state_dict_metadata"], metadata.state["storage_data"]
        places = {(k.state["fqn"], _whole(k.state.get("offset") or ())): v.state for k, v in storage.items()}
        entries = {n: e.state for n, e in described.items() if isinstance(e, Stub) and "chunks" in e.state}
        if not all(isinstance(name, str) for name in (*entries, *(fqn for fqn, _ in places))):
            raise InputError("a tensor whose name is no text")
    except (InputError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = containers.first_line(error).removeprefix(f"{path}: ")
        raise InputError(f"{path}: not the index of a distributed checkpoint ({reason})") from error
    return entries, places, foreign


def _whole(values: Any) -> tuple[int, ...]:
    """A tuple of whole numbers, at most 64, none below 0."""
    values = tuple(values)
    if len(values) > 64 or any(type(value) is not int or not 0 <= value < 1 << 62 for value in values):
        raise InputError("sizes or offsets that no tensor has")
    return values


class _Parts:
    """The chunks of a distributed checkpoint, each a torch file of its own inside a larger file."""

    def __init__(self, folder: Path, places: Places, stack: ExitStack) -> None:
        self.folder, self.places, self._stack = folder, places, stack
        self.files: dict[str, Descriptor] = {}  # open until the stack ends
        self.used: list[tuple[str, int, int]] = []

    def join(self, name: str, entry: dict[str, Any]) -> Any:
        """The tensor of a name, from its chunks. Raises InputError: they are not the whole, or overlap."""
        import torch

        try:
            size, chunks = _whole(entry["size"]), [chunk.state for chunk in entry["chunks"]]
            boxes = [(_whole(chunk["offsets"]), _whole(chunk["sizes"])) for chunk in chunks]
            if any(len(part) != len(size) for box in boxes for part in box):
                raise InputError("chunks of another number of axes")
        except (InputError, AttributeError, KeyError, TypeError) as error:
            raise self._wrong(f"tensor {name!r} is described in a way that is not known") from error
        parts = [self._chunk(name, offset) for offset, _ in boxes]
        if any(tuple(part.shape) != sizes for part, (_, sizes) in zip(parts, boxes, strict=True)):
            raise self._wrong(f"a part of tensor {name!r} has another shape than .metadata says")
        if not parts or sum(part.numel() for part in parts) != math.prod(size):
            raise self._wrong(f"tensor {name!r} {size} is not whole; are all .distcp files there?")
        if len(parts) == 1:
            return parts[0]
        tensor, covered = torch.empty(size, dtype=parts[0].dtype), torch.zeros(size, dtype=torch.bool)
        for part, (offset, sizes) in zip(parts, boxes, strict=True):
            box = tuple(slice(start, start + length) for start, length in zip(offset, sizes, strict=True))
            if tensor[box].shape != part.shape or bool(covered[box].any()):
                raise self._wrong(f"the parts of tensor {name!r} overlap or leave its shape {size}")
            tensor[box], covered[box] = part, True
        return tensor

    def _wrong(self, what: str) -> InputError:
        return InputError(f"{self.folder}: {what}")

    def _chunk(self, name: str, offset: tuple[int, ...]) -> Any:
        import torch

        place = self.places.get((name, offset))
        if place is None or place.get("transform_descriptors"):
            raise self._wrong(f"tensor {name!r} is stored in a way that is not known")
        file, start, length = place.get("relative_path"), place.get("offset"), place.get("length")
        if not isinstance(file, str) or type(start) is not int or type(length) is not int or length <= 0:
            raise self._wrong(f"tensor {name!r} has no place in a file")
        if file not in self.files:
            self.files[file] = self._stack.enter_context(opened(inside(self.folder, file)))
        self.used.append((file, start, start + length))
        _, tensor, _, _ = containers.parts_of(self.files[file].window(start, length))
        if not isinstance(tensor, torch.Tensor):
            raise self._wrong(f"tensor {name!r} in {file} is not a tensor")
        containers.require_own_numbers(f"{self.folder / file}: tensor {name!r}", tensor)
        return tensor

    def apart(self) -> None:
        """Raise InputError if two chunks share bytes: a few could stand for any number of tensors."""
        for (file, _, stop), (other, start, _) in pairwise(sorted(self.used)):
            if file == other and start < stop:
                raise self._wrong(f"two tensors share bytes of {file}; refused")
