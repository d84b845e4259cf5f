"""Damaged files of every format give an answer or one line; and the fuzzer sees what it is there to see."""

import io
import json
import pickle
import pickletools
import sys
import tarfile
import zipfile
from pathlib import Path
from random import Random

import fuzz_mutants as mutants
import fuzz_pickles
import fuzz_pictures
import fuzz_seeds
import fuzz_zips
import numpy as np
import pytest
from fuzz_mutants import INTEGERS, Mutant
from PIL import Image
from processes import ended

HERE = Path(__file__).parent


def program(text, *words):
    """Run another process with the tests' modules; one that forks wants no threads of other tests."""
    call = [sys.executable, *(["-c", text] if text else [str(HERE / "fuzz.py")]), *map(str, words)]
    return ended(call, 900, cwd=HERE.parents[1])


def test_five_thousand_mutants_are_answers_or_one_line(tmp_path):
    ended = program("", "--quick", "--count", 5000, "--processes", 1, "--out", tmp_path / "fuzz.json", "--shrink", 0)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    found = json.loads((tmp_path / "fuzz.json").read_text())
    assert found["mutants"] == 5000
    assert found["failures"] == found["failing_cases"] == 0
    assert found["cases"] == len(list((HERE / "cases").glob("*.json"))) > 0
    assert set(found["formats"]) == {name for name, kind in fuzz_seeds.FORMATS.items() if kind.quick}
    for name, counts in found["formats"].items():
        assert counts["answers"] + counts["refusals"] == counts["mutants"] >= 5000 // len(found["formats"]), name
        assert counts["answers"] > 0, name


# What a reader might do, and how the engine calls it.
READERS = """
import ctypes, faulthandler, importlib, os, pickle, socket, subprocess, sys, time
from pathlib import Path
import numpy as np, torch
from safetensors.numpy import save_file
from collapse import InputError
from fuzz_engine import Mutant, alone
from fuzz_targets import TARGETS, require

def refuse(text):
    raise InputError(text)

def swallow(path):
    try:
        eval("1 + 1")
    except BaseException:
        pass

READERS = {
    "answer": lambda path: path.read_bytes(),
    "answer whether there is a driver": lambda path: torch.cuda.is_available(),
    "refusal": lambda path: refuse(f"{path}: damaged"),
    "names no file": lambda path: refuse("damaged"),
    "refusal in several lines, which InputError joins": lambda path: refuse(f"{path}: damaged\\nby somebody"),
    "refusal in a long line, which InputError cuts": lambda path: refuse(f"{path}: " + "a" * 20_000),
    "wrong answer": lambda path: require(False, "no such thing"),
    "KeyError": lambda path: {}["key"],
    "MemoryError": lambda path: bytearray(1 << 36),
    "memory": lambda path: len(b"x" * (60 << 20)),
    "hang": lambda path: [0 for _ in iter(int, 1)],
    "hang that waits": lambda path: os.open(path.parent / "pipe", os.O_RDONLY),
    "killed by -24": lambda path: sum(range(1 << 60)),
    "killed by -11": lambda path: faulthandler._sigsegv(),
    "forbidden eval": lambda path: eval("1 + 1"),
    "forbidden exec": lambda path: exec("a = 1"),
    "forbidden eval that is swallowed": swallow,
    "forbidden module": lambda path: importlib.import_module("antigravity"),
    "forbidden pickle": lambda path: pickle.loads(pickle.dumps(Path)),
    "forbidden program": lambda path: subprocess.run(["true"]),
    "forbidden fork": lambda path: os.fork(),
    "forbidden shell": lambda path: os.system("true"),
    "forbidden socket": lambda path: socket.socket(),
    "forbidden library": lambda path: ctypes.CDLL(None),
    "forbidden write": lambda path: open("here", "w"),
    "forbidden write beside it": lambda path: path.with_name("b").write_text(""),
    "forbidden write by torch": lambda path: torch.save({}, "here"),
    "forbidden write that Python does not see": lambda path: save_file({"a": np.ones(1)}, "here"),
    "forbidden read": lambda path: open("/etc/passwd"),
    "forbidden removal": lambda path: path.unlink(),
    "forbidden renaming": lambda path: path.rename(path.with_name("b")),
    "forbidden folder": lambda path: path.with_name("b").mkdir(),
}
import fuzz_engine
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
fuzz_engine.WALL, fuzz_engine.MEMORY = 5.0, 50 << 20
for name, reader in READERS.items():
    def call(path, reader=reader):
        return reader(path)
    TARGETS["bad"] = call
    print(f"{name}: {alone('bad', Mutant('x', {'x': b'y', 'pipe': 'fifo'}, '')).kind}")
"""


TWICE = """
import argparse, json
from pathlib import Path
import fuzz, fuzz_targets
options = argparse.Namespace(seed=5, count=60, processes=2, shrink=0)
fuzz.BUILD, fuzz.CHUNK = Path(FOLDER), 10
first = fuzz.fuzz(options, ["preset"])
chunks = sorted(first.done)
first.done -= {1, 4}  # as if the run had been killed before these two were written down
first.formats["preset"]["mutants"] -= 20
first.save()
second = fuzz.fuzz(options, ["preset"])
print(json.dumps([chunks, sorted(second.done), second.formats["preset"]["mutants"]]))
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """What both say, in one program: loading the readers is most of its time."""
    start = f"import sys; sys.path.insert(0, {str(HERE)!r}); FOLDER = {str(tmp_path_factory.mktemp('twice'))!r}"
    ended = program(f"{start}\n{TWICE}\n{READERS}")
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_a_run_goes_on_where_it_was_and_counts_nothing_twice(engine):
    assert json.loads(engine[0]) == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], 60]


def test_the_engine_sees_all_that_a_reader_may_not_do(engine):
    seen = dict(line.split(": ") for line in engine[1:])
    assert len(seen) == 32
    for name, kind in seen.items():
        assert name == kind or name.startswith(f"{kind} "), (name, kind)


def files(name, tmp_path):
    fuzz_seeds.make(name, tmp_path / name)
    return [mutants.read_folder(place) for place in sorted((tmp_path / name).iterdir())]


@pytest.mark.parametrize("name", ["npy", "npz", "torch zip", "image png", "result", "shards"])
def test_a_mutant_is_a_function_of_its_number_and_is_not_its_seed(tmp_path, name):
    seed = files(name, tmp_path)[0]
    made = [mutants.mutate("x", seed, Random(number)) for number in range(80)]
    assert made == [mutants.mutate("x", seed, Random(number)) for number in range(80)]
    assert sum(mutant.files != seed for mutant in made) > 70
    assert len({str(mutant.files) for mutant in made}) > 65


def test_edits_inside_a_format_leave_the_rest_sound(tmp_path):
    content = files("npz", tmp_path)[0]["stored.npz"]
    with (
        zipfile.ZipFile(io.BytesIO(content)) as before,
        zipfile.ZipFile(io.BytesIO(fuzz_zips.build(fuzz_zips.parse(content), align=True))) as after,
    ):
        assert after.testzip() is None
        assert {n: after.read(n) for n in after.namelist()} == {n: before.read(n) for n in before.namelist()}
    program = pickle.dumps([{"a": (1, 2.5)}, "text"], 2)
    assert fuzz_pickles.parse(program + program + b"rest")[2] == [b"rest"]
    assert b"".join(fuzz_pickles.parse(program)[0]) == program


def count_sound(edit, content, read, tries=60):
    """How many of some edits a strict reader still takes."""
    found = 0
    for number in range(tries):
        data, _ = edit(content, Random(number))
        try:
            read(data)
        except Exception:
            continue
        found += data != content
    return found


def test_checksums_are_mended_so_that_edits_reach_the_readers_behind_them(tmp_path):
    png = files("image png", tmp_path)[0]["photos/a.png"]
    assert count_sound(fuzz_pictures.png, png, lambda data: Image.open(io.BytesIO(data)).verify()) > 5
    members = lambda data: tarfile.TarFile(fileobj=io.BytesIO(data)).getmembers()
    tar = files("shards", tmp_path)[0]["set/train-0.tar"]
    assert count_sound(mutants.tar_edit, tar, members) > 15
    npy = files("npy", tmp_path)[0]["a.npy"]
    read_header = lambda data: np.lib.format.read_array_header_1_0(io.BytesIO(data[8:]))
    assert count_sound(mutants.npy_edit, npy, read_header) > 15
    archive = files("npz", tmp_path / "b")[0]["stored.npz"]
    edit = lambda data, rng: fuzz_zips.edit(data, rng, mutants.inner, INTEGERS)
    assert count_sound(edit, archive, lambda data: zipfile.ZipFile(io.BytesIO(data)).testzip()) > 15
    program = pickle.dumps({"a": [1, "b"], "c": (2.5, None)}, 2)
    assert count_sound(fuzz_pickles.edit, program, lambda data: list(pickletools.genops(data))) > 15


def test_what_is_no_file_is_put_in_its_place_and_read_back_from_a_case(tmp_path):
    from fuzz_engine import pack, unpack

    made = Mutant("a", {"a/b.png": b"x" * 1000, "c": "fifo", "d": "dir", "e": "link /etc/passwd"}, "odd")
    assert unpack(pack(made, "images", "why"))[0] == made
    mutants.write_folder(made.files, tmp_path / "case")
    assert (tmp_path / "case/a/b.png").read_bytes() == b"x" * 1000
    assert (tmp_path / "case/c").is_fifo()
    assert (tmp_path / "case/d").is_dir()
    assert (tmp_path / "case/e").readlink() == Path("/etc/passwd")


TALK = """
import os, time
import fuzz_engine
from fuzz_engine import Job, run_jobs
def work(job, seed, seeds, pipe):
    if job.number:
        time.sleep(2)  # it says nothing while another says much
    for index in range(job.start, job.stop):
        os.write(pipe, b"%d\\n" % index)
        time.sleep(0.002)
fuzz_engine._work, fuzz_engine.KILL = work, 30.0
jobs = iter([Job(0, "a", 0, 800), Job(1, "a", 0, 3)])
print([job.failures for job in run_jobs(jobs, 0, {"a": []}, 2)])
"""


def test_a_process_that_is_silent_beside_one_that_talks_is_no_hang():
    ended = program(f"import sys; sys.path.insert(0, {str(HERE)!r})\n{TALK}")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "[[], []]"
