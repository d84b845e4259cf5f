"""Files of tensors that were made to run code, to lie, or to take the machine: each is data or one line, and quick."""

import contextlib
import io
import os
import pickle
import struct
import time
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import collapse
from collapse import InputError
from collapse.files import containers, folders, ndarrays
from collapse.files.descriptor import opened
from collapse.files.pickles import Stub, unpickle
from collapse.files.zips import Zip


def refused(path, message, read=containers.read):
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def records_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rezip(path, records, **how):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data, **how)


def with_pickle(path, program, tree=None):
    """A torch file whose data.pkl is `program`, its storages as they were."""
    torch.save({"w": torch.ones(4)} if tree is None else tree, path)
    rezip(path, {name: program if name.endswith("/data.pkl") else data for name, data in records_of(path).items()})
    return path


def legacy(path, program, keys=()):
    head = [pickle.dumps(value, 2) for value in (containers.LEGACY_MAGIC, containers.LEGACY_PROTOCOL, {})]
    path.write_bytes(b"".join(head) + program + pickle.dumps(list(keys), 2))
    return path


# Two archives in one file


def test_an_archive_that_two_readers_see_differently_is_refused(tmp_path):
    path, program = tmp_path / "both.zip", io.BytesIO()
    for number in (0, 1):
        rezip(tmp_path / f"{number}.zip", {"a/data.pkl": b"\x80\x02K" + bytes([number]) + b"."})
    first, second = ((tmp_path / f"{number}.zip").read_bytes() for number in (0, 1))
    end = first.rfind(b"PK\x05\x06")
    # The last end record gives the place of the first archive's directory; the second's lies right before it.
    path.write_bytes(first[:end] + second[:-6] + first[-6:])
    assert zipfile.ZipFile(path).read("a/data.pkl")[3] == 1
    refused(path, "two directories")
    program.write(second)
    with zipfile.ZipFile(program, "a") as archive:
        archive.writestr("b", b"")
    path.write_bytes(b"0" * 7 + program.getvalue())  # as a zip appended to another file
    refused(path, "not a checkpoint|two directories")


def edit_record(data, name, **values):
    """Change fields of a record in the directory: by offset in its entry."""
    place = data.find(b"PK\x01\x02")
    fields = {"flags": (8, "<H"), "method": (10, "<H"), "crc": (16, "<L"), "packed": (20, "<L"), "size": (24, "<L"),
              "header": (42, "<L")}  # fmt: skip
    while place >= 0:
        long, extra, comment = struct.unpack_from("<3H", data, place + 28)
        if data[place + 46 : place + 46 + long].endswith(name):
            for field, value in values.items():
                struct.pack_into(fields[field][1], data, place + fields[field][0], value)
            return data
        place = data.find(b"PK\x01\x02", place + 46 + long + extra + comment)
    raise AssertionError(name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": 8}, "compressed records"),
        ({"method": 99}, "compressed records"),
        ({"flags": 1}, "encrypted"),
        ({"size": 8}, "two sizes|has 8 bytes where"),
        ({"header": 0}, "shares bytes|its header differs"),
        ({"packed": 1 << 31}, "behind the directory|shares bytes"),
        ({"crc": 1}, "checksum"),
    ],
)
def test_a_record_is_what_the_directory_says_or_refused(tmp_path, values, message):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(100)}, path)
    path.write_bytes(edit_record(bytearray(path.read_bytes()), b"data/0", **values))
    refused(path, message)


def test_two_records_of_one_name_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(2)}, path)
    name = next(name for name in records_of(path) if name.endswith("data/0"))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, bytes(8))
    refused(path, "two records are called")


def test_a_file_that_is_written_to_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(2)}, path)

    def rewrite():
        with opened(path):
            path.write_bytes(path.read_bytes() + b"0")

    with pytest.raises(InputError, match="changed while being read"):
        rewrite()
    with opened(path) as source:  # another file under the same name is not seen at all
        before = source.read(0, source.size)
        torch.save({"w": torch.zeros(2)}, tmp_path / "y.pt")
        os.replace(tmp_path / "y.pt", path)
        assert source.read(0, source.size) == before


def test_a_zip_of_64_bit_sizes_and_one_of_many_records_are_read(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive, archive.open("a", "w", force_zip64=True) as record:
        record.write(b"text")
    with zipfile.ZipFile(path, "a") as archive:
        for index in range(70_000):
            archive.writestr(f"b/{index}", b"")
    with opened(path) as source:
        archive = Zip(source)
        assert len(archive.records) == 70_001
        assert archive.read(archive.records["a"], 10) == b"text"


# Pickles


def program(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def run(data, known=None, persistent=None):
    foreign: set[str] = set()
    return unpickle(io.BytesIO(data), len(data), known or {}, {}, foreign, persistent), foreign


@pytest.mark.parametrize("protocol", range(6))
def test_data_comes_back_as_pickle_itself_gives_it(protocol):
    tree = {
        "numbers": [0, 1, -1, 255, 256, 70000, -(2**31), 2**40, 2**300, True, False, None, 0.1, float("inf"), -0.0],
        "text": ["", "a'\"\\b\n", "é\ud800", "x" * 300],
        "bytes": [b"", b"\xff" * 300],
        "nested": {"tuple": (), "of": (1, (2, (3, (4,)))), 5: {6.5: [[]]}, (1, "a"): "key", None: 1},
        "order": OrderedDict([("b", 1), ("a", 2)]),
        "again": [],
    }
    tree["again"] += [tree["nested"], tree["nested"]]
    found, foreign = run(pickle.dumps(tree, protocol))
    assert found == tree
    assert found["again"][0] is found["nested"]
    assert foreign == set()
    assert run(pickle.dumps([bytearray(b"ab"), {1, 2}, frozenset([3])], 5))[0] == [b"ab", [1, 2], [3]]


@pytest.mark.parametrize("protocol", range(6))
def test_numpy_arrays_come_back_from_their_bytes(protocol):
    arrays = [np.arange(6).reshape(2, 3), np.arange(6.0).reshape(2, 3).T, np.arange(3).astype(">i2"), np.zeros((0, 4)),
              np.array(3, np.uint8), np.array([1j]), np.array([True, False])]  # fmt: skip
    found, foreign = run(pickle.dumps([*arrays, np.float32(0.5)], protocol), ndarrays.names())
    assert found.pop() == 0.5
    assert foreign == set()
    for array, pickled in zip(arrays, found, strict=True):
        np.testing.assert_array_equal(pickled.array, array)
        assert pickled.array.dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
    for wrong in (np.array(["a"]), np.array([object()]), np.zeros(2, [("a", "f4")]), np.array([0], "M8[s]")):
        with pytest.raises(InputError, match="not numbers"):
            run(pickle.dumps(wrong, protocol), ndarrays.names())


def test_a_huge_memo_index_takes_no_memory():
    value, _ = run(program(b"N", b"r", struct.pack("<I", 2**32 - 1)))
    assert value is None


def nested(levels):
    """A tuple of twice the same tuple of twice the same ...: a few bytes whose hash, text and length never end."""
    return b"K\x01" + b"2\x86" * levels


@pytest.mark.parametrize("kind", ["key", "str", "set", "frozenset", "complex", "name"])
def test_nothing_is_hashed_or_written_out_that_shares_its_parts(kind):
    deep = nested(60)
    ends = {
        "key": b"}" + deep + b"Ns",
        "str": b"c__builtin__\nstr\n" + deep + b"\x85R",
        "set": b"c__builtin__\nset\n" + b"]" + deep + b"a\x85R",
        "frozenset": b"c__builtin__\nfrozenset\n(" + deep + b"l\x85R",
        "complex": b"c__builtin__\ncomplex\n" + deep + b"\x85R",
        "name": deep + text("x") + b"\x93",
    }
    start = time.process_time()
    with pytest.raises(InputError, match="a name is no text") if kind == "name" else contextlib.nullcontext():
        run(program(ends[kind]))
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "code",
    [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"\x97", b"N\x98", b"\xff", b"N0N0N00", b"(((u", b"h\x05",
     b"X\xff\xff\xff\xff", b"\x8e" + b"\xff" * 8, b"\x8b\xff\xff\xff\x7f", b"L" + b"9" * 5000 + b"L\n", b"I1",
     b"c\xff\n", b"NNR", b"]NNs", b"NNa", b"}(Nu", b"Pabc\n", b"NQ", b"S'abc\n", b"Vabc", b"\x80\x09", b"\x86"],
    ids=repr,
)  # fmt: skip
def test_a_program_that_data_has_no_use_for_is_refused(code):
    with pytest.raises(InputError):
        run(program(code))


def test_copies_of_one_thing_are_counted():
    items = b"](" + b"K\x00K\x01\x86" * 2000 + b"e"
    again = b"q\x00" + b"(ccollections\nOrderedDict\nh\x00\x85Rl0" * 4000
    with pytest.raises(InputError, match="again and again"):
        run(program(items + again))


def test_a_known_name_is_not_changed_by_a_pickle(tmp_path):
    # BUILD with a slot state is setattr, here on Counter, a class of Python's own.
    build = b"ccollections\nCounter\nN}X\x06\x00\x00\x00updateNs\x86b"
    before = Counter.update
    containers.read(with_pickle(tmp_path / "x.pt", program(build)))
    assert Counter.update is before
    assert Counter("aab") == {"a": 2, "b": 1}


def test_a_dict_of_a_class_of_its_own_keeps_its_items():
    value, foreign = run(pickle.dumps(Mapped(a=1), 4))
    assert isinstance(value, Stub)
    assert value.state == {"a": 1, "lr": 0.1}
    assert containers.state_of(value) == value.state
    assert foreign == {f"{__name__}.Mapped"}


class Mapped(dict):
    """As easydict and omegaconf have it: items, and attributes of the instance."""

    def __init__(self, **items):
        super().__init__(**items)
        self.lr = 0.1


def test_an_id_of_another_kind_than_a_storage_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = b"((" + text("module") + b"ctorch.nn\nLinear\n" + text("a.py") + text("class Linear: pass") + b"tQl"
    for path in (with_pickle(tmp_path / "z.pt", program(source)), legacy(tmp_path / "l.pt", program(source))):
        refused(path, "'module' with its source code")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l.pt", "z.pt"]


def storage(name, numel, kind="FloatStorage"):
    number = b"\x8a\x08" + struct.pack("<q", numel)
    return b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(name) + text("cpu") + number + b"tQ"


def tensor(stored, offset, size, stride):
    def numbers(values):
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", v) for v in values) + b"t"

    rest = b"\x89ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + stored
        + numbers([offset])[1:-1]
        + numbers(size)
        + numbers(stride)
        + rest
        + b"tR"
    )


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (5,), (1,)), (1, (4,), (1,)), (0, (2, 2), (3, 1)), (-1, (1,), (1,)), (0, (-1,), (1,)), (0, (2,), (-1,)),
     (0, (1 << 62,), (0,)), (0, (1 << 40, 1 << 40), (0, 0)), (0, (2,), (1, 1)), (5, (0,), (1,)), (4, (1,), (1,)),
     (0, (1,) * 65, (1,) * 65)],
)  # fmt: skip
def test_a_tensor_never_leaves_its_storage(tmp_path, offset, size, stride):
    path = with_pickle(tmp_path / "x.pt", program(tensor(storage("0", 4), offset, size, stride)))
    refused(path, "refused")


def test_a_shape_is_a_short_list_of_numbers(tmp_path):
    many = tensor(storage("1", 1 << 20), 0, (1 << 20,), (1,))  # iterating over a tensor takes seconds
    twice = b"2\x86" * 64  # a pair of the same pair, and so on: 2^64 numbers to show
    for size in (many, b"K\x01" + twice, b"X\x02\x00\x00\x0012", b"N", b"}", b"K\x04"):
        source = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage("0", 4) + b"K\x00" + size + size + b"\x89NtR"
        path = with_pickle(tmp_path / "x.pt", program(source), {"w": torch.ones(4), "v": torch.ones(1 << 20)})
        refused(path, "no short list of numbers")


def test_a_storage_has_the_bytes_that_it_declares(tmp_path):
    path, whole = tmp_path / "x.pt", (0, (4,), (1,))
    assert torch.equal(containers.read(with_pickle(path, program(tensor(storage("0", 4), *whole)))).tree, torch.ones(4))
    for wrong, message in [
        (storage("0", 5), "has 16 bytes where 20"),
        (storage("0", 1 << 40), "has 16 bytes where"),
        (storage("0", 4, "DoubleStorage"), "has 16 bytes where 32"),
        (storage("7", 4), "has 0 bytes where 16"),
        (storage("../data.pkl", 4), "expected a number"),
        (storage("0", -1), "refused"),
        (storage("0", 4, "QInt8Storage"), "holds a quantised tensor"),
    ]:
        refused(with_pickle(path, program(tensor(wrong, *whole))), message)
    two = b"(" + tensor(storage("0", 4), *whole) + tensor(storage("0", 2, "LongStorage"), 0, (1,), (1,)) + b"l"
    refused(with_pickle(path, program(two)), "two types or lengths")


def test_a_legacy_file_declares_no_more_than_it_has(tmp_path):
    path = tmp_path / "x.pt"
    refused(legacy(path, program(tensor(storage("0", 1 << 40), 0, (1,), (1,))), ["0"]), "larger storages than the file")
    refused(legacy(path, program(tensor(storage("0", 4), 0, (4,), (1,)))), "list of storages")
    refused(legacy(path, program(tensor(storage("0", 4), 0, (4,), (1,))), ["0"]), "truncated")
    whole = legacy(path, program(tensor(storage("0", 4), 0, (4,), (1,))), ["0"]).read_bytes()
    path.write_bytes(whole + struct.pack("<q4f", 4, 1, 2, 3, 4))
    assert containers.read(path).tree.tolist() == [1, 2, 3, 4]
    path.write_bytes(whole + struct.pack("<q8f", 8, *range(8)))
    refused(path, "another size than declared")


def test_the_code_of_a_script_is_not_read_and_its_storages_are_whole(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.warns((FutureWarning, DeprecationWarning)):
        torch.jit.script(torch.nn.Linear(3, 2)).save(path)
    records = records_of(path)
    data = next(name for name in records if name.endswith("data/0"))
    rezip(path, {**records, data: b""})
    refused(path, "has 0 bytes where")
    rezip(path, {**records, data.replace("data/0", "data/x"): b"0" * 100})
    assert containers.read(path).container == "TorchScript archive"


def test_an_expanded_tensor_is_no_weight_and_no_embedding(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"z": torch.zeros(1).expand(10**11)}, path)
    assert path.stat().st_size < 2000
    with pytest.raises(InputError, match="larger than what the file stores"):
        containers.require_own_numbers("z", containers.read(path).tree["z"])


# safetensors


def safe(path, header, data=b""):
    raw = header if isinstance(header, bytes) else repr(header).replace("'", '"').encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(start=0, stop=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "size"),
    [({"a": entry(stop=4)}, 4), ({"a": entry(0, 8), "b": entry(4, 12)}, 12), ({"a": entry(4, 12)}, 12),
     ({"a": entry()}, 16), ({"a": entry()}, 4), ({"a": entry(shape=(-2,))}, 8), ({"a": entry(shape=(True, 2))}, 8),
     ({"a": entry(0, 0, (0, 1 << 63))}, 0), ({"a": entry(dtype="F31")}, 8), ({"a": 3}, 8), (b"[1]", 0),
     (b'{"a": 1, "a": 1}', 0), (b'{"a": ' + b"[" * 100000, 0), (b'{"__metadata__": {"a": 1}}', 0),
     (b'{"\xff": 1}', 0), ({"a": {**entry(), "data_offsets": [0]}}, 8)],
)  # fmt: skip
def test_a_safetensors_header_that_does_not_fit_is_refused(tmp_path, header, size):
    path = safe(tmp_path / "x.safetensors", header, bytes(size))
    if path.read_bytes()[8:9] == b"{":
        refused(path, "safetensors|dtype")
    else:
        refused(path, "not a checkpoint")


def test_safetensors_are_read_as_their_library_wrote_them(tmp_path):
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
             torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16)  # fmt: skip
    tensors = {str(kind): torch.arange(6).view(2, 3).to(kind) for kind in kinds}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors")
    tree = containers.read(tmp_path / "x.safetensors").tree
    assert set(tree) == set(tensors)
    for name, tensor in tensors.items():
        assert tree[name].dtype == tensor.dtype
        assert tree[name].shape == tensor.shape
        assert tree[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))


# Distributed checkpoints


@pytest.fixture
def distributed(tmp_path):
    from torch.distributed import checkpoint

    folder = tmp_path / "dcp"
    tensors = {"w": torch.arange(64.0), "v": torch.arange(64.0)}
    with pytest.warns(UserWarning, match="torch.distributed"):
        checkpoint.save(tensors, checkpoint_id=folder)
    return folder


@pytest.mark.filterwarnings("ignore")
def test_a_chunk_of_a_distributed_checkpoint_is_a_plain_tensor_file(distributed, tmp_path):
    part = next(distributed.glob("*.distcp"))
    whole = part.read_bytes()
    assert torch.equal(folders.read(distributed).tree["w"], torch.arange(64.0))
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(whole), 40):
        part.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            tree = folders.read(distributed).tree
        except InputError:
            continue
        assert torch.equal(tree["w"], torch.arange(64.0))
        assert torch.equal(tree["v"], torch.arange(64.0))


@pytest.mark.filterwarnings("ignore")
def test_chunks_may_not_share_bytes(distributed):
    metadata = (distributed / ".metadata").read_bytes()
    stored = pickle.loads(metadata)
    places = list(stored.storage_data)
    first, second = places[0], places[1]
    stored.storage_data[second] = stored.storage_data[first]
    (distributed / ".metadata").write_bytes(pickle.dumps(stored))
    refused(distributed, "share bytes", folders.read)


@pytest.mark.filterwarnings("ignore")
def test_a_script_in_a_chunk_is_not_run(distributed, tmp_path):
    script, part = tmp_path / "script.pt", next(distributed.glob("*.distcp"))
    torch.jit.script(torch.nn.Linear(64, 1)).save(script)
    stored = pickle.loads((distributed / ".metadata").read_bytes())
    for place in stored.storage_data.values():
        place.offset, place.length = 0, script.stat().st_size
    (distributed / ".metadata").write_bytes(pickle.dumps(stored))
    part.write_bytes(script.read_bytes())
    refused(distributed, "is not a tensor", folders.read)


# The machine

BOMBS = {
    "a memo index": lambda path: with_pickle(path, program(b"Nr" + struct.pack("<I", 2**32 - 1))),
    "a string": lambda path: with_pickle(path, program(b"X" + struct.pack("<I", 2**32 - 1))),
    "a raw pickle": lambda path: path.write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40)) and path,
    "a storage": lambda path: with_pickle(path, program(tensor(storage("0", 1 << 33), 0, (1,), (1,)))),
    "deflated zeros": lambda path: deflated(path),
    "a script's record": lambda path: script_bomb(path),
    **{
        f"millions of {what}": lambda path, code=code: with_pickle(path, program(code * 3_100_000))
        for what, code in {"lists": b"]", "marks": b"(", "remembered dicts": b"}\x94"}.items()
    },
    "a safetensors header": lambda path: path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}") and path,
}


def deflated(path):
    torch.save({"w": torch.zeros(1 << 26)}, path)
    rezip(path, records_of(path), compress_type=zipfile.ZIP_DEFLATED)
    return path


def script_bomb(path):
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{folder}/constants.pkl", b"")
        archive.writestr(f"{folder}/data/x", bytes(1 << 28), zipfile.ZIP_DEFLATED)
    return path


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_takes_neither_memory_nor_time(tmp_path, kind, in_child):
    path = BOMBS[kind](tmp_path / "x.pt")

    def read():
        with contextlib.suppress(InputError):
            containers.read(path)

    in_child(read, seconds=5)


def twice(source, levels=60):
    """A mapping that holds the one before it twice, and so on: small in the file, and without end for who walks it."""
    for level in range(levels):
        here = bytes([level])
        source += b"q" + here + b"0}" + text("a") + b"h" + here + b"s" + text("b") + b"h" + here + b"s"
    return source


@pytest.mark.parametrize("leaf", ["a tensor", "a number"])
def test_a_tree_that_holds_itself_twice_is_refused_in_time(tmp_path, leaf):
    held = twice(tensor(storage("0", 4), 0, (4,), (1,)) if leaf == "a tensor" else b"K\x01")
    path = with_pickle(tmp_path / "x.pt", program(b"}" + text("args") + held + b"s"))
    read = collapse.load  # imported on first use
    began = time.process_time()
    refused(path, "holds more than 40000 tensors|nested without end", read)
    assert time.process_time() - began < 5
