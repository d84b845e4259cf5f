"""Tables of text: the numbers that are meant, or one line that says why not."""

import csv
import json

import numpy as np
import pytest

import collapse

Z = np.random.default_rng(0).normal(size=(300, 12))


def same(path, z=Z, key=""):
    np.testing.assert_allclose(
        collapse.spectrum(f"{path}{key}").singular_values, collapse.spectrum(z).singular_values, rtol=1e-9
    )


def table(path, head, rows, **how):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, **how).writerows([*([head] if head else []), *rows])
    return path


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("blocks", [16 << 20, 12 * 8 * 7])
def test_a_table_of_numbers_alone(tmp_path, monkeypatch, blocks):
    monkeypatch.setattr("collapse.files.limits.BLOCK", blocks)
    np.savetxt(tmp_path / "vectors.tsv", Z, delimiter="\t", fmt="%.17g")
    same(tmp_path / "vectors.tsv")
    same(table(tmp_path / "windows.csv", None, Z.tolist(), lineterminator="\r\n"))
    same(table(tmp_path / "mark.csv", [f"\ufefff{i}" if not i else f"f{i}" for i in range(12)], Z.tolist()), Z)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ids_and_labels_beside_the_numbers_are_left_out_and_said(tmp_path):
    head = ["id", "label", *[f"f{i}" for i in range(12)]]
    path = table(tmp_path / "t.csv", head, [[f"img{i}", i % 3, *row] for i, row in enumerate(Z.tolist())])
    same(path)
    same(path, Z[:, 10:], ":f1?")
    notes = collapse.spectrum(path).warnings
    assert any("the 12 columns f0 to f11 are read, and not id, label" in note for note in notes)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_json_lines(tmp_path):
    path = tmp_path / "out.jsonl"
    lines = [
        {"id": i, "response": {"body": {"data": [{"index": 0, "embedding": row}]}}} for i, row in enumerate(Z.tolist())
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    same(path)
    path.write_text("".join(json.dumps({"a": row, "b": row[:3]}) + "\n" for row in Z.tolist()))
    same(path, Z[:, :3], ":b")
    with pytest.raises(collapse.InputError, match=r"a, b"):
        collapse.spectrum(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "x,y\n", "column of numbers|holds no row"),
        ("a.csv", "id,0.5,0.6\n1,2,3\n", "neither all names nor all numbers"),
        ("a.csv", "1,2\n3\n", "line 2: 1 fields, where the first line has 2"),
        ("a.csv", "1,2\n3,four\n", "line 2: 'four' is no number"),
        ("a.csv", "1,2\n3,\n", "line 2: '' is no number"),
        ("a.csv", "a,b\n1,2\n3,4\n", "nothing says which of the columns a, b"),
        ("a.csv", "1;2\n3;4\n", "neither all names|column of numbers|nothing says"),
        ("a.csv", "f0,f1\n1,nan\n2,3\n", "NaN or infinite"),
        ("a.jsonl", "{}\n", "line 1: holds no list of numbers"),
        ("a.jsonl", '{"a": [1, 2]}\n{"a": [1]}\n', "line 2: 1 numbers, where the first has 2"),
        ("a.jsonl", '{"a": [1, 2]}\n{"b": [1, 2]}\n', "line 2: has no list of numbers at 'a'"),
        ("a.jsonl", '{"a": [1, 2]}\n[[[\n', "line 2: is no JSON"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1: is no JSON"),
        ("a.jsonl", f"[1, 2]\n[3, {10**400}]\n", "NaN or infinite"),
    ],
)
def test_what_is_no_table_of_numbers_is_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(collapse.InputError, match=message) as caught:
        collapse.spectrum(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    for bad in (b"1,2\n\xff\xfe,3\n", b'1,"2\n' + b"3" * (17 << 20)):
        (tmp_path / "a.csv").write_bytes(bad)
        with pytest.raises(collapse.InputError, match=r"no text in UTF-8|line of over|line \d+: field larger"):
            collapse.spectrum(tmp_path / "a.csv")


def test_lists_of_no_numbers_are_refused(tmp_path):
    from pyarrow import feather, parquet, table

    empty = table({"embeddings": [[], [], []]}).cast(table({"embeddings": [[0.5]]}).schema)
    parquet.write_table(empty, tmp_path / "a.parquet")
    feather.write_feather(empty, str(tmp_path / "a.feather"))
    for name in ("a.parquet", "a.feather"):
        with pytest.raises(collapse.InputError, match=rf"{name}: lists of no numbers"):
            collapse.spectrum(tmp_path / name)
