"""Folders that hold one checkpoint in several files, read with the readers of containers.py.

Hugging Face: config.json beside model.safetensors or pytorch_model.bin, whole or in shards named by an index.
open_clip: open_clip_config.json beside its weights.  torch.distributed.checkpoint (DCP): .metadata beside *.distcp.
Names inside an index or .metadata are untrusted: one that leaves the folder is an error.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from collapse import InputError
from collapse.files import containers
from collapse.files.containers import Contents, Stub

JSON_LIMIT = 64 << 20  # bytes of an index or a config
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
CONFIGS = ("config.json", "preprocessor_config.json", "open_clip_config.json", "args.json")


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
    if (path / ".metadata").is_file():
        return _read_dcp(path)
    if (path / "latest").is_file() or any(path.glob("*mp_rank_*")):
        raise InputError(f"{path}: a DeepSpeed folder; run its zero_to_fp32.py and give the file that it writes")
    found = [name for name in WEIGHTS if (path / name).is_file()]
    if not found:
        raise InputError(f"{path}: a folder without a checkpoint ({', '.join(WEIGHTS)} or .metadata); give the file")
    weights = path / found[0]
    contents = _read_shards(weights) if weights.suffix == ".json" else containers.read(weights)
    contents.configs = _configs(path)
    contents.container = f"folder of {contents.container}"
    return contents


def _only_checkpoint(path: Path) -> bool:
    return sum(p.suffix in (".ckpt", ".pth", ".pt", ".bin", ".safetensors") for p in path.parent.iterdir()) == 1


def _configs(folder: Path, names: Sequence[str] = CONFIGS) -> dict[str, Any]:
    return {name: _json(folder / name) for name in names if (folder / name).is_file()}


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > JSON_LIMIT:
        raise InputError(f"{path}: {path.stat().st_size} bytes of JSON; at most {JSON_LIMIT} are read")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path}: not readable as JSON ({containers.first_line(error)})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def inside(folder: Path, name: Any) -> Path:
    """A file of the folder itself, by the name that another file of it gives."""
    if not isinstance(name, str) or not name or name in (".", "..") or re.search(r"[/\\\0]", name):
        raise InputError(f"{folder}: names a file {name!r} outside its folder; refused")
    path = folder / name
    if path.resolve().parent != folder.resolve() and not _huggingface_cache(path):
        raise InputError(f"{folder}: {name} is a link that leaves the folder; refused")
    return path


def _huggingface_cache(path: Path) -> bool:
    """Its snapshots are links to ../../blobs/HASH of the same repository."""
    target = path.resolve()
    return target.parent.name == "blobs" and target.parent.parent == path.parent.parent.parent.resolve()


def _read_shards(index: Path) -> Contents:
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map")
    tree: dict[str, Any] = {}
    shards = {name: containers.read(inside(index.parent, name)) for name in sorted(set(map(str, weight_map.values())))}
    for name, contents in shards.items():
        wanted = {key for key, shard in weight_map.items() if shard == name}
        if missing := wanted - set(contents.tree):
            raise InputError(f"{index.parent / name}: {len(missing)} tensors of the index are missing in it")
        tree |= contents.tree
    if superfluous := set(tree) - set(weight_map):
        raise InputError(f"{index}: {len(superfluous)} tensors are in the shards but not in the index")
    digest = _digest(contents.sha256 for contents in shards.values())
    foreign = sorted({name for contents in shards.values() for name in contents.foreign})
    return Contents(f"{len(shards)} shards", tree, digest, foreign)


def _digest(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _read_dcp(folder: Path) -> Contents:
    """Join the chunks of each tensor; .metadata is a pickle, read with stubs like any other."""
    path = folder / ".metadata"
    foreign: set[str] = set()
    try:
        with open(path, "rb") as file:
            metadata = containers.stub_pickle(foreign).load(file)
        entries, storage = vars(metadata)["state_dict_metadata"], vars(metadata)["storage_data"]
        places = {(vars(k)["fqn"], tuple(vars(k).get("offset") or ())): vars(v) for k, v in storage.items()}
    except Exception as error:  # an untrusted pickle can fail in any way, and each is the file's fault
        raise InputError(
            f"{path}: not the index of a distributed checkpoint ({containers.first_line(error)})"
        ) from error
    files: dict[str, bytes] = {}
    tree = {}
    for name, entry in entries.items():
        if not (isinstance(entry, Stub) and "chunks" in vars(entry)) or str(name).startswith("optim"):
            continue
        try:
            tree[str(name)] = _join(folder, str(name), vars(entry), places, files)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: tensor {name!r} is described in a way that is not known") from error
    digest = _digest(containers.sha256(folder / name) for name in sorted(files))
    return Contents("distributed checkpoint", tree, digest, sorted(foreign))


def _join(folder: Path, name: str, entry: Mapping[str, Any], places: Mapping[Any, Any], files: dict[str, bytes]) -> Any:
    import torch

    size, chunks = tuple(entry["size"]), [vars(chunk) for chunk in entry["chunks"]]
    boxes = [(tuple(chunk["offsets"]), tuple(chunk["sizes"])) for chunk in chunks]
    parts = [(offset, sizes, _chunk(folder, name, offset, places, files)) for offset, sizes in boxes]
    if any(tuple(part.shape) != sizes for _, sizes, part in parts):
        raise InputError(f"{folder}: a part of tensor {name!r} has another shape than .metadata says")
    if sum(part.numel() for _, _, part in parts) != torch.Size(size).numel():
        raise InputError(f"{folder}: tensor {name!r} {size} is not whole; are all .distcp files there?")
    if len(parts) == 1:
        return parts[0][2]
    whole = torch.empty(size, dtype=parts[0][2].dtype)
    covered = torch.zeros(size, dtype=torch.bool)
    for offset, sizes, part in parts:
        box = tuple(slice(start, start + length) for start, length in zip(offset, sizes, strict=True))
        if whole[box].shape != part.shape or bool(covered[box].any()):
            raise InputError(f"{folder}: the parts of tensor {name!r} overlap or leave its shape {size}")
        whole[box], covered[box] = part, True
    return whole


def _chunk(folder: Path, name: str, offset: tuple[int, ...], places: Mapping[Any, Any], files: dict[str, bytes]) -> Any:
    import torch

    place = places.get((name, offset))
    if place is None or place.get("transform_descriptors"):
        raise InputError(f"{folder}: tensor {name!r} is stored in a way that is not known")
    file = place["relative_path"]
    if file not in files:
        path = inside(folder, file)
        containers.require_file(path)
        files[file] = path.read_bytes()
    start, length = place["offset"], place["length"]
    data = files[file][start : start + length]
    if not isinstance(start, int) or start < 0 or len(data) != length:
        raise InputError(f"{folder / file}: truncated: tensor {name!r} ends behind its end")
    tensor, _ = containers.unpickle(io.BytesIO(data), f"{folder / file}: tensor {name!r} cannot be read")
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{folder / file}: tensor {name!r} is not a tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(f"{folder / file}: tensor {name!r} is larger than what the file stores for it")
    return tensor
