"""Embeddings in the other forms that programs leave them in: folders of parts, MATLAB, pickles, Arrow, nested names."""

import json
import pickle
import warnings
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pandas
import pyarrow
import pytest
import scipy.io
import torch
from pyarrow import feather, ipc, parquet
from safetensors.torch import save_file
from torchvision.models import resnet18

import collapse
from collapse import InputError, cli
from collapse.files.arrays import open_array

Z = np.random.default_rng(0).normal(size=(24, 5))
F = Z.astype(np.float32)


def rows(source):
    with open_array(Path(source)) as (about, found):
        blocks = [found] if hasattr(found, "shape") else list(found)
        z = np.concatenate([np.asarray(block, np.float64) for block in blocks])
    return z, about


def pickled(path, tree, protocol=4):
    path.write_bytes(pickle.dumps(tree, protocol))
    return path


def parts(folder, write, count=12):
    folder.mkdir(parents=True)
    for number in range(count):
        write(folder / f"emb_{number}", Z[2 * number : 2 * number + 2])
    return folder


def vectors(folder, write):
    folder.mkdir()
    for number, z in enumerate(Z):
        write(folder / f"seq{number}", z)
    return folder


def h5(path, z):
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        file["features"], file["coords"] = z, np.arange(2 * len(z)).reshape(-1, 2)


def matlab_73(path):
    """As MATLAB writes it: a user block, matrices by their columns, their class beside them."""
    with h5py.File(path, "w", userblock_size=512) as file:
        file["z"] = Z.T
        file["z"].attrs["MATLAB_class"] = np.bytes_("double")
        file["#refs#/a"] = np.zeros((3, 3))
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\0\2IM")
    return path


def mat(path, **options):
    others = {"names": np.array(["a", "b"], object), "flag": np.array([[True]]), "about": {"x": 1.0}, "c": Z + 1j}
    scipy.io.savemat(path, {"z": Z, **others}, **options)
    return path


def table(z=F):
    columns = {"id": np.arange(len(z)), "emb": pyarrow.FixedSizeListArray.from_arrays(z.reshape(-1), z.shape[1])}
    return pyarrow.table(columns)


def arrow(path, write):
    with write(str(path), table().schema) as file:
        file.write_table(table(), max_chunksize=7)
    return path


def wide(path, compression):
    frame = pandas.DataFrame(F, columns=[f"feat_{k}" for k in range(5)])
    frame["kind"] = pandas.Categorical(list("ab") * 12)
    feather.write_feather(frame, path, compression=compression, chunksize=9)
    return path


def saved(path, tree):
    torch.save(tree, path)
    return path


T = torch.from_numpy(Z)
FORMS = {
    "parts of numpy": lambda p: parts(p / "x", lambda path, z: np.save(path.with_suffix(".npy"), z)),
    "parts of npz": lambda p: parts(p / "x", lambda path, z: np.savez(path.with_suffix(".npz"), z)),
    "parts of HDF5": lambda p: parts(p / "x", h5),
    "a vector a file": lambda p: vectors(p / "x", lambda path, z: np.save(path.with_suffix(".npy"), z)),
    "a vector a torch file": lambda p: vectors(
        p / "x", lambda path, z: saved(path.with_suffix(".pt"), {"label": "a", "mean": {33: torch.from_numpy(z)}})
    ),
    "MATLAB": lambda p: mat(p / "x.mat"),
    "MATLAB, packed": lambda p: mat(p / "x.mat", do_compression=True),
    "MATLAB 7.3": lambda p: matlab_73(p / "x.mat"),
    "pickle of an array": lambda p: pickled(p / "x.pkl", Z),
    "pickle of protocol 2": lambda p: pickled(p / "x.pkl", np.asfortranarray(Z), 2),
    "pickle of rows by name": lambda p: pickled(p / "x.pickle", {f"{k}.jpg": z for k, z in enumerate(Z)}),
    "pickle of arrays by name": lambda p: pickled(p / "x.pkl", {"features": Z, "labels": np.arange(24)}, 5),
    "pickle of lists": lambda p: pickled(p / "x.pkl", Z.tolist()),
    "pickle of lists by name": lambda p: pickled(p / "x.pkl", {"paths": ["a"] * 24, "emb": Z.tolist()}),
    "feather, lz4": lambda p: wide(p / "x.feather", "lz4"),
    "feather, zstd": lambda p: wide(p / "x.feather", "zstd"),
    "arrow stream": lambda p: arrow(p / "x.arrow", ipc.new_stream),
    "arrow file": lambda p: arrow(p / "x.arrow", ipc.new_file),
    "rows and labels": lambda p: saved(p / "x.pt", (T, torch.arange(24))),
    "rows, labels, names": lambda p: saved(p / "x.pt", {"x": T, "y": torch.arange(24), "names": ["a"] * 24}),
    "maps of one position": lambda p: np.save(p / "x.npy", Z[:, :, None, None]) or p / "x.npy",
    "torch maps of one position": lambda p: saved(p / "x.pt", T[:, :, None, None]),
    "a nested name": lambda p: f"{saved(p / 'x.pt', {'a': {'b': {33: T}}, 'c': T[:3]})}:a.b.33",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_same_rows_are_read_from_every_form(tmp_path, form):
    z, about = rows(FORMS[form](tmp_path))
    np.testing.assert_allclose(z, Z, rtol=1e-6)
    assert len(about["sha256"]) == 64


def test_a_folder_of_parts_is_in_the_order_of_its_numbers_and_says_so(tmp_path):
    place = FORMS["parts of numpy"](tmp_path)  # emb_10 is after emb_9
    _, about = rows(place)
    assert about["warnings"] == [f"12 files of {place} are read as one array, emb_0.npy to emb_11.npy"]
    found = collapse.spectrum(place, normalize=False)
    assert found == collapse.spectrum(place, normalize=False)
    np.testing.assert_allclose(found.singular_values, collapse.spectrum(Z, normalize=False).singular_values)
    assert collapse.spectrum(place, limit=9).source["sha256"] == found.source["sha256"]
    np.save(place / "emb_3.npy", Z[:2])
    assert collapse.spectrum(place).source["sha256"] != found.source["sha256"]


REFUSED = {
    "a checkpoint's folder": (
        {"config.json": b"{}", "a.safetensors": b"x"},
        "holds config.json: a checkpoint, give the",
    ),
    "nothing": ({"readme.md": b"x"}, "holds no file of an array; arrays are read from .npy"),
    "two kinds": ({"a.npy": b"x", "a.h5": b"x"}, "holds .h5 and .npy; put what belongs together"),
    "two series": (
        {f"{name}_{k}.npy": b"x" for name in ("img", "text") for k in (0, 1)},
        "holds img_#.npy and text_#.npy",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_folder_that_is_no_single_array_is_refused(tmp_path, kind, capsys):
    files, message = REFUSED[kind]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        rows(tmp_path)
    assert cli.main(["spectrum", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_parts_of_other_widths_and_files_of_other_things_are_refused_by_name(tmp_path):
    place = FORMS["parts of numpy"](tmp_path)
    np.save(place / "emb_5.npy", Z[:, :4])
    with pytest.raises(InputError, match=r"emb_5\.npy: 4 dimensions, where emb_0\.npy has 5"):
        rows(place)
    scipy.io.savemat(tmp_path / "c.mat", {"c": Z + 1j, "s": scipy.sparse.csc_matrix(Z)})
    with pytest.raises(InputError, match=r"c\.mat: holds no array"):
        rows(tmp_path / "c.mat")
    with h5py.File(tmp_path / "only.h5", "w") as file:
        file["coords"] = np.arange(20.0).reshape(10, 2)
    with pytest.raises(InputError, match="holds only 'coords', which is no embedding by its name; if it is"):
        rows(tmp_path / "only.h5")
    assert rows(f"{tmp_path / 'only.h5'}:coords")[0].shape == (10, 2)
    parquet.write_table(pyarrow.table({"label": np.arange(9)}), tmp_path / "l.parquet")
    with pytest.raises(InputError, match="nothing says which of the columns label are the embedding"):
        rows(tmp_path / "l.parquet")
    (tmp_path / "list.json").write_text('{"embeddings": [[1, 2], [3, 4]]}')
    with pytest.raises(InputError, match=r"is not a checkpoint .*; arrays are read from \.npy, \.npz"):
        rows(tmp_path / "list.json")
    saved(tmp_path / "seq.pt", {"label": "a", "mean_representations": {33: T[0]}})
    with pytest.raises(InputError, match=r"shape \(5,\), expected \(n, d\)"):
        rows(f"{tmp_path / 'seq.pt'}:mean_representations.33")
    frame = pandas.DataFrame(Z)
    frame.to_pickle(tmp_path / "frame.pkl")
    with pytest.raises(InputError, match=r"frame\.pkl: holds no tensor of embeddings"):
        rows(tmp_path / "frame.pkl")


class Evil:
    def __reduce__(self):
        return eval, ("1/0",)


def test_nothing_in_a_pickle_is_called(tmp_path):
    z, about = rows(pickled(tmp_path / "x.pkl", {"features": Z, "how": Evil()}))
    np.testing.assert_array_equal(z, Z)
    assert about["foreign"] == ["builtins.eval"]
    with pytest.raises(InputError, match="no tensor of embeddings"):
        rows(pickled(tmp_path / "y.pkl", Evil()))
    with pytest.raises(InputError, match=r"z\.pkl: "):
        rows(pickled(tmp_path / "z.pkl", np.array([{}, 1], object)))


@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_mat_is_one_line(tmp_path, packed):
    data, rng = mat(tmp_path / "x.mat", do_compression=packed).read_bytes(), np.random.default_rng(0)
    read = 0
    for _ in range(200):
        changed = bytearray(data)
        changed[rng.integers(124, len(data))] = rng.integers(256)
        (tmp_path / "x.mat").write_bytes(bytes(changed) if rng.random() < 0.8 else data[: rng.integers(20, len(data))])
        with suppress(InputError):  # anything else is a failure
            z, _ = rows(tmp_path / "x.mat")
            assert not packed or np.array_equal(z, Z)  # there is a checksum
            read += 1
    assert read < 180
    assert packed or read > 20


def test_a_quantised_tensor_is_refused_by_name(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to take them out
        z = torch.quantize_per_tensor(torch.from_numpy(F), 0.1, 0, torch.qint8)
        weights = {**resnet18().state_dict(), "layer1.0.conv1.weight": z}
        saved(tmp_path / "q.pt", z)
        saved(tmp_path / "net.pt", weights)
    for name, read in (("q.pt", rows), ("net.pt", collapse.inspect)):
        with pytest.raises(
            InputError, match=rf"{name}: .*holds a quantised tensor \(torch\.QInt8Storage\); dequantise it"
        ):
            read(tmp_path / name)


def test_a_stale_shard_with_the_right_names_is_refused(tmp_path):
    weights = resnet18().state_dict()
    names = list(weights)
    parts = {"model-00001-of-00002.safetensors": names[:60], "model-00002-of-00002.safetensors": names[60:]}
    for file, keys in parts.items():
        save_file({key: weights[key].contiguous() for key in keys}, tmp_path / file)
    size = sum(t.numel() * t.element_size() for t in weights.values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": {key: file for file, keys in parts.items() for key in keys},
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert collapse.inspect(tmp_path).architecture == "resnet18"
    save_file({key: weights[key].half().contiguous() for key in names[60:]}, tmp_path / list(parts)[1])
    with pytest.raises(
        InputError, match=f"says that the tensors take {size} bytes, and the shards hold .*: one of them"
    ):
        collapse.inspect(tmp_path)
