"""Files of tensors: what is read, what is refused, and that nothing in a file is ever run."""

import argparse
import contextlib
import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from collapse import InputError
from collapse.files import containers


class Runs:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def payloads(canary: Path):
    """Objects whose unpickling would write the canary file."""
    import builtins
    import os
    import subprocess

    text = f"open({str(canary)!r}, 'w').close()"
    yield Runs(os.system, f"touch {canary}")
    yield Runs(builtins.eval, text)
    yield Runs(builtins.exec, text)
    yield Runs(subprocess.call, ["touch", str(canary)])
    yield Runs(open, str(canary), "w")
    yield Runs(Path(canary).touch)
    yield Runs(getattr, Path(canary), "touch")
    yield Runs(torch.save, {}, str(canary))


@pytest.mark.parametrize("zipped", [True, False])
def test_no_pickle_is_executed_and_its_names_are_reported(tmp_path, zipped):
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    for payload in payloads(canary):
        tree = {"state_dict": {"w": torch.ones(2)}, "payload": payload}
        torch.save(tree, path, _use_new_zipfile_serialization=zipped)
        contents = containers.read(path)
        assert not canary.exists()
        assert contents.foreign
        assert torch.equal(contents.tree["state_dict"]["w"], torch.ones(2))


def test_a_pickle_cannot_change_what_it_is_given(tmp_path):
    # BUILD with a slot state is setattr: here on the function that rebuilds tensors.
    program = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00__defaults__NstbX\x01\x00\x00\x00a\x86."
    before = torch._utils._rebuild_tensor_v2.__defaults__
    path = tmp_path / "evil.pth"
    torch.save({"w": torch.ones(1)}, path)
    with zipfile.ZipFile(path) as source:
        records = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w") as target:
        for name, data in records.items():
            target.writestr(name, program if name.endswith("data.pkl") else data)
    with contextlib.suppress(InputError):
        containers.read(path)
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before


def test_foreign_objects_do_not_hide_the_tensors(tmp_path):
    extras = {
        "args": argparse.Namespace(arch="resnet50"),
        "where": PurePosixPath("/a"),
        "scalar": np.float64(3.0),
        "array": np.ones(3),
        "model": torch.nn.Linear(2, 2),
        "order": OrderedDict(a=1),
    }
    path = tmp_path / "a.pt"
    torch.save({"state_dict": {"w": torch.arange(3.0)}, **extras}, path)
    contents = containers.read(path)
    assert contents.container == "torch zip"
    assert torch.equal(contents.tree["state_dict"]["w"], torch.arange(3.0))
    assert "argparse.Namespace" in contents.foreign
    assert contents.tree["args"].state["arch"] == "resnet50"


def test_the_same_tensors_come_back_from_every_container(tmp_path):
    tensors = {"a": torch.randn(3, 4), "half": torch.randn(5).half(), "bf": torch.randn(5).bfloat16()}
    paths = {name: tmp_path / name for name in ("torch zip", "torch legacy pickle", "safetensors")}
    torch.save(tensors, paths["torch zip"])
    torch.save(tensors, paths["torch legacy pickle"], _use_new_zipfile_serialization=False)
    save_file(tensors, paths["safetensors"], {"note": "kept"})
    for container, path in paths.items():
        contents = containers.read(path)
        assert contents.container == container
        assert all(torch.equal(contents.tree[key], value) for key, value in tensors.items())
    assert contents.metadata == {"note": "kept"}


def _files(tmp_path):
    plain, legacy, safe = (tmp_path / name for name in ("plain.pt", "legacy.pt", "safe.safetensors"))
    tensors = {"a": torch.randn(40, 40)}
    torch.save(tensors, plain)
    torch.save(tensors, legacy, _use_new_zipfile_serialization=False)
    save_file(tensors, safe)
    return plain, legacy, safe


def test_a_truncated_file_is_one_error_wherever_it_ends(tmp_path):
    for path in _files(tmp_path):
        whole = path.read_bytes()
        for share in np.linspace(0, 0.999, 25):
            path.write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(InputError) as caught:
                containers.read(path)
            assert str(caught.value).startswith(str(path))
            assert "\n" not in str(caught.value)


def test_a_flipped_byte_in_a_zip_never_goes_unseen(tmp_path):
    path = _files(tmp_path)[0]
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    truth = torch.load(path)["a"]
    for position in rng.integers(0, len(whole), 60):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(flipped))
        try:
            tree = containers.read(path).tree
        except InputError:
            continue
        assert torch.equal(tree["a"], truth)  # padding, or a field that nothing reads


def _zip(path, records, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def test_every_other_kind_of_file_is_named(tmp_path):
    path = tmp_path / "x.pth"
    cases = {
        "no such file": None,
        "empty": b"",
        "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid",
        "HTML": b"<!DOCTYPE html><html>",
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(30),
        "numpy": b"\x93NUMPY" + bytes(30),
        "not a checkpoint": b"just some text that is long enough",
        "header of": struct.pack("<Q", 1 << 40) + b"{" + bytes(30),
    }
    for message, data in cases.items():
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(InputError, match=message):
            containers.read(path)
    with pytest.raises(InputError, match="folder"):
        containers.read(tmp_path)
    with pytest.raises(InputError):
        containers.read(path / "below")
    _zip(path, {"a/constants.pkl": b"", "a/data.pkl": b""})
    with pytest.raises(InputError, match="TorchScript"):
        containers.read(path)
    _zip(path, {"a/other": b""})
    with pytest.raises(InputError, match=r"without data\.pkl"):
        containers.read(path)
    _zip(path, {"a/data.pkl": bytes(100000)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="compressed"):
        containers.read(path)


def test_a_raw_pickle_is_refused_without_running_it(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "raw.pkl"
    for payload in payloads(canary):
        buffer = io.BytesIO()
        pickle.Pickler(buffer, 2).dump({"w": payload})
        path.write_bytes(buffer.getvalue())
        with pytest.raises(InputError):
            containers.read(path)
        assert not canary.exists()


def test_a_fifo_does_not_hang(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="regular"):
        containers.read(tmp_path / "pipe")


def test_a_lying_safetensors_header_is_refused(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    path = tmp_path / "lies.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(InputError, match="damaged"):
        containers.read(path)
