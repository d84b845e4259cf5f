"""Files of embeddings: what is read, and that no file can do harm, end in a traceback or give a wrong answer."""

import json
import os

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr

from collapse import InputError, cli, spectrum
from collapse.files.arrays import open_array
from collapse.files.rows import blocks


def run(capsys, *arguments):
    code = cli.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def rows():
    return np.random.default_rng(0).standard_normal((600, 12)) / np.arange(1, 13)


@pytest.fixture
def stored(tmp_path, rows):
    """Writers of one array in each kind of file."""
    z = rows.astype(np.float32)

    def hdf5(path):
        with h5py.File(path, "w") as file:
            file["group/features"], file["labels"] = z, np.arange(len(z))

    def group(path):
        zarr.open_group(path, mode="w").create_array("features", data=z)

    wide = pa.table({f"c{i}": z[:, i] for i in range(z.shape[1])})
    fixed = pa.table({"z": pa.FixedSizeListArray.from_arrays(pa.array(z.ravel()), z.shape[1])})
    writers = {
        "a.h5": hdf5,
        "a.zarr": lambda path: zarr.save_array(path, z),
        "b.zarr": group,
        "lists.parquet": lambda path: pq.write_table(pa.table({"id": np.arange(len(z)), "z": list(z)}), path),
        "columns.parquet": lambda path: pq.write_table(wide, path),
        "fixed.parquet": lambda path: pq.write_table(fixed, path),
    }
    for name, write in writers.items():
        write(tmp_path / name)
    return tmp_path, list(writers), z


def test_arrays_of_other_formats_are_the_same_rows(stored, capsys):
    folder, names, z = stored
    for name in names:
        np.testing.assert_allclose(spectrum(folder / name).singular_values, spectrum(z).singular_values, rtol=1e-12)
        code, out, _ = run(capsys, "spectrum", folder / name, "--limit", 77, "--json")
        assert (code, json.loads(out)["n"]) == (0, 77)


def test_damaged_and_foreign_arrays_are_refused(stored, tmp_path):
    folder, _, z = stored
    for name in ("a.h5", "lists.parquet"):
        whole = (folder / name).read_bytes()
        for share in (0.02, 0.5, 0.99):
            (tmp_path / "cut").write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(InputError, match=r"truncated|damaged"):
                spectrum(tmp_path / "cut")
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["outside"] = h5py.ExternalLink(str(folder / "a.h5"), "group/features")
    with pytest.raises(InputError, match=r"no array|holds 0 arrays"):
        spectrum(f"{tmp_path / 'link.h5'}:outside")
    layout = h5py.VirtualLayout(z.shape, "f4")
    layout[:] = h5py.VirtualSource(folder / "a.h5", "group/features", z.shape)
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        file.create_virtual_dataset("features", layout)
    with pytest.raises(InputError, match="other files"):
        spectrum(tmp_path / "virtual.h5")
    pq.write_table(pa.table({"z": [[1.0, 2.0], [3.0]]}), tmp_path / "ragged.parquet")
    with pytest.raises(InputError, match="different lengths"):
        spectrum(tmp_path / "ragged.parquet")
    pq.write_table(pa.table({"z": [1.0, None, 2.0]}), tmp_path / "null.parquet")
    with pytest.raises(InputError, match="missing values"):
        spectrum(tmp_path / "null.parquet")
    pq.write_table(pa.table({"name": ["a", "b"]}), tmp_path / "words.parquet")
    with pytest.raises(InputError, match="no column of numbers"):
        spectrum(tmp_path / "words.parquet")


@pytest.mark.parametrize("change", ["shrinks", "is rewritten"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, change):
    path = tmp_path / "z.npy"
    np.save(path, np.random.default_rng(0).standard_normal((3000, 2000), dtype=np.float32))

    def batches(rows):
        for index, block in enumerate(blocks(rows)):
            yield block
            if index == 0 and change == "shrinks":
                os.truncate(path, 10_000_000)
            elif index == 0:
                os.utime(path, ns=(1, 1))

    with pytest.raises(InputError, match="changed while being read"), open_array(path) as (_, rows):
        spectrum(batches(rows))


def test_a_missing_library_is_named(stored, monkeypatch):
    folder, _, _ = stored
    for module, name in (("h5py", "a.h5"), ("zarr", "a.zarr"), ("pyarrow", "lists.parquet")):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(InputError, match=f"wants {module}.*pip install"):
            spectrum(folder / name)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lists_of_rows_and_batches_and_rows_by_name(tmp_path):
    z = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = tmp_path / "z.pt"
    for tree in (list(z), tuple(z.split(7)), {f"img{i}.jpg": row for i, row in enumerate(z)}):
        torch.save(
            [t.clone() for t in tree] if not isinstance(tree, dict) else {k: v.clone() for k, v in tree.items()}, path
        )
        found = spectrum(path)
        assert found.n == 60
        np.testing.assert_allclose(found.singular_values, spectrum(z).singular_values, rtol=1e-12)
    for tree in (
        [z[0].clone(), z[:, :4].clone()],
        {"a": z.clone(), "b": z[:9].clone()},
        [z[0].clone(), "x"],
        [z[:, :1]],
    ):
        torch.save(tree, path)
        with pytest.raises(InputError, match=r"z\.pt: "):
            spectrum(path)
