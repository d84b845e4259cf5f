"""The folder of a run: one process at a time, versions, damage; nothing that it holds is lost in silence."""

import fcntl
import json
import os
import shutil
import sys
import threading
import time
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import byte, code_of, forked
from safetensors.torch import load_file

from collapse import InputError, cli
from collapse.data.labelled import of_arrays, open_data
from collapse.recipes.config import make_config
from collapse.training import lock
from collapse.training.lock import Lock
from collapse.training.network import resolve
from collapse.training.run import SCHEMA, Run, log_line, spectra_of
from collapse.training.train import Options, train

ROOT = Path(__file__).parents[2]
V1 = ROOT / "tests/training/run_v1"  # at step 12 of 27: made by the code of version 1, as run_v1/README.md says
DIGITS = {"blocks": (1, 1), "planes": (8, 16), "batch_size": 128, "dim": 8}
TINY = make_config("digits", **{**DIGITS, "batch_size": 40}, epochs=2)
SOME = Options(save_every=2, log_every=1, spectrum_every=2, knn_every=0)


@pytest.fixture(scope="module")
def sets():
    train_set, val = (open_data("sklearn:digits", split) for split in ("train", "val"))
    return tuple(of_arrays(part.images.pixels[:160], part.labels[:160]) for part in (train_set, val))


@pytest.fixture(scope="module")
def unbroken(sets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    list(train(folder, TINY, *sets, SOME))
    return folder


@pytest.fixture
def half(sets, tmp_path):
    """A run of 8 steps whose process was killed after step 5: saved at 4, measured at 2 and 4."""
    running = train(tmp_path / "half", TINY, *sets, SOME)
    for _ in range(5):
        next(running)
    running.close()
    return tmp_path / "half"


def steps(folder):
    return [log_line(line)["step"] for line in (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)]


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    return bytes(content)


# One process at a time.


def contend(folder, start, tried, leave):
    """The exit code of a process that wants the folder: 0 it has it, 2 it was refused."""
    os.read(start[0], 1)
    code = 0
    try:
        Lock(folder)
    except InputError:
        code = 2
    os.write(tried[1], b".")
    os.read(leave[0], 1)  # nobody leaves before both have tried
    return code


@pytest.mark.parametrize("left", [False, True])
def test_one_of_two_that_start_at_once_has_the_folder(tmp_path, left):
    """Twenty races: from an empty folder, or from the lock of a process that is gone."""
    for race in range(10):
        folder, pipes, pids = tmp_path / str(race), [os.pipe() for _ in range(3)], []
        folder.mkdir()
        if left:
            held = {"pid": 1, "host": os.uname().nodename, "place": lock._place(), "start": "none"}
            (folder / ".lock").write_text(json.dumps(held))
        for _ in range(2):
            pids.append(forked(contend, folder, *pipes))
        start, tried, leave = pipes
        os.write(start[1], b"..")
        assert byte(tried[0]) + byte(tried[0]) == b".."
        os.write(leave[1], b"..")
        assert sorted(map(code_of, pids)) == [0, 2], race
        for number in [end for pipe in pipes for end in pipe]:
            os.close(number)


def test_who_holds_a_folder_is_named_and_it_is_free_again(tmp_path):
    held = Lock(tmp_path)
    with pytest.raises(
        InputError, match=rf"process {os.getpid()} on .* is training in it \(since .* ago\); wait, choose"
    ):
        Lock(tmp_path)
    held.release()
    assert not list(tmp_path.iterdir())
    Lock(tmp_path).release()


def test_a_sign_of_life_is_given_and_a_silent_other_machine_counts_as_gone(tmp_path, monkeypatch):
    held = Lock(tmp_path)
    path = tmp_path / ".lock"
    elsewhere = json.dumps({**json.loads(path.read_text()), "place": "another machine"})
    old = time.time() - lock.SILENT
    os.utime(path, (old - 60, old - 60))
    held.beat()
    assert path.stat().st_mtime < old  # too early for a new sign
    monkeypatch.setattr(lock, "BEAT", -1)
    held.beat()
    assert path.stat().st_mtime > old + lock.SILENT / 2
    path.write_text(elsewhere)
    with pytest.raises(InputError, match="has taken it over; this one stops"):
        held.beat()
    held.release()
    assert path.read_text() == elsewhere  # another's
    os.utime(path, (old + 60, old + 60))
    with pytest.raises(InputError, match=r"last sign of life 5[34]\d s ago"):
        Lock(tmp_path)
    os.utime(path, (old - 60, old - 60))
    Lock(tmp_path).release()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": "x", "host": "y"}', "\udcff"])
def test_a_lock_that_says_nothing_is_one_being_written_and_then_stale(tmp_path, text):
    path = tmp_path / ".lock"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="another process is training in it"):
        Lock(tmp_path)
    os.utime(path, (time.time() - 60,) * 2)
    Lock(tmp_path).release()


def test_a_removed_lock_is_made_again_and_a_number_given_anew_is_another_process(tmp_path):
    held = Lock(tmp_path)
    text = (tmp_path / ".lock").read_text()
    (tmp_path / ".lock").unlink()
    held.check()
    assert (tmp_path / ".lock").read_text() == text
    (tmp_path / ".lock").write_text(json.dumps({**json.loads(text), "start": "1"}))
    Lock(tmp_path).release()


def test_the_lock_of_version_1_is_held_as_long_as_its_process(tmp_path):
    with open(tmp_path / ".lock", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"{os.getpid()} on {os.uname().nodename}")
        file.flush()
        with pytest.raises(InputError, match=f"process {os.getpid()} on "):
            Lock(tmp_path)
    Lock(tmp_path).release()


def test_a_claim_left_by_a_killed_process_does_not_stay(tmp_path):
    (tmp_path / ".lock").write_text("")
    os.utime(tmp_path / ".lock", (0, 0))
    claim = tmp_path / ".lock.claim"
    claim.write_text("")
    with pytest.raises(InputError, match="another process is starting"):
        Lock(tmp_path)
    os.utime(claim, (time.time() - 61,) * 2)
    with pytest.raises(InputError, match="try again"):
        Lock(tmp_path)
    Lock(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_without_flock_runs_are_locked_all_the_same(tmp_path, monkeypatch):
    def absent(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", absent)
    run = Run(tmp_path, {}, {})
    with pytest.raises(InputError, match="is training in it"):
        Run(tmp_path, {}, {})
    run.close()
    Run(tmp_path, {}, {}).close()


# Versions.


@pytest.fixture
def old(tmp_path):
    folder = tmp_path / "v1"
    shutil.copytree(V1, folder)
    (folder / "README.md").unlink()
    (folder / "unbroken.safetensors").unlink()
    (folder / ".lock").write_text("7 on nowhere")  # which version 1 leaves
    return folder


def test_a_run_of_version_1_goes_on_to_what_version_1_made(old, capsys):
    config = make_config("digits", epochs=3, **DIGITS)
    sets = [open_data("sklearn:digits", split) for split in ("train", "val")]
    list(train(old, config, *sets, Options(save_every=4, log_every=3, spectrum_every=5, held=100, knn_every=1)))
    made, theirs = load_file(old / "encoder.safetensors"), load_file(V1 / "unbroken.safetensors")
    assert made.keys() == theirs.keys()
    elsewhere = "other last digits" in capsys.readouterr().err  # another torch or processor than the stored run's
    for name, tensor in theirs.items():
        torch.testing.assert_close(made[name], tensor, rtol=1e-2 if elsewhere else 0, atol=1e-3 if elsewhere else 0)
    assert steps(old)[:6] == [3, 5, 6, 9, 10, 12]
    assert steps(old)[-1] == 27
    assert spectra_of(old / "spectra.npz")["steps"].tolist() == [5, 10, 15, 20, 25, 27]
    stored = json.loads((old / "config.json").read_text())
    assert stored["schema"] == f"collapse.run/{SCHEMA}"
    assert stored["config"] == resolve(config).as_dict()
    assert stored["versions"]["dimensional-collapse"] == "0.1.0"
    assert torch.load(old / "resume.pt", weights_only=True)["schema"] == SCHEMA


def test_an_old_run_is_taken_to_have_the_same_images_where_only_their_names_are_known(tmp_path, capsys):
    wanted, former = {"images": 3, "digest": "contents", "held_digest": None}, {"digest": "names", "held_digest": None}
    Run(tmp_path, {}, {**wanted, "digest": "names"}).close()
    with pytest.raises(InputError, match="digest = names, not contents"):
        Run(tmp_path, {}, wanted, former=former)
    edited(tmp_path / "config.json", lambda d: d.update(schema="collapse.run/1"))
    with pytest.raises(InputError, match="digest = names, not contents"):
        Run(tmp_path, {}, wanted, former={"digest": "other names"})
    Run(tmp_path, {}, wanted, former=former).close()
    assert "version 1 kept names and labels of the images; their contents were not checked" in capsys.readouterr().err
    assert json.loads((tmp_path / "config.json").read_text())["data"] == wanted
    Run(tmp_path, {}, wanted, former=former).close()
    assert capsys.readouterr().err == ""


def edited(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_value_that_did_not_exist_is_its_default(half, sets, unbroken):
    edited(half / "config.json", lambda d: [d["config"].pop(name) for name in ("zero_init", "negatives", "eta")])
    with pytest.raises(InputError, match="zero_init = True, not False"):  # digits change that default
        list(train(half, TINY, *sets, SOME))
    edited(half / "config.json", lambda d: d["config"].update(zero_init=False))
    list(train(half, TINY, *sets, SOME))
    assert (half / "encoder.safetensors").read_bytes() == (unbroken / "encoder.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="collapse.run/9"), r"by a later version of collapse \(0.9.0, schema 9\); install"),
        (lambda d: d.update(schema="other/1"), "not a run of collapse"),
        (lambda d: d["config"].update(wavelets=3), "wavelets is not known to this version of collapse; 0.9.0 wrote it"),
        (lambda d: d.pop("data"), "cannot be read"),
        (lambda d: d.update(config=[]), "cannot be read"),
    ],
)
def test_a_configuration_of_the_future_is_refused_by_name(half, sets, change, message):
    edited(half / "config.json", lambda d: d["versions"].update({"dimensional-collapse": "0.9.0"}))
    edited(half / "config.json", change)
    before = {path.name: path.read_bytes() for path in half.iterdir()}
    with pytest.raises(InputError, match=message):
        list(train(half, TINY, *sets, SOME))
    assert {path.name: path.read_bytes() for path in half.iterdir()} == before


def restated(folder, change):
    """The folder's state changed and signed anew."""
    run = Run(folder, {}, {})
    state = run.load()
    change(state)
    real, run_module = torch.save, sys.modules["collapse.training.run"]
    try:
        run_module.torch.save = lambda content, file: real({**content, **state}, file)
        run.save(state)
    finally:
        run_module.torch.save = real
    run.close()


def test_a_state_of_the_future_is_refused_and_its_environment_may_say_more(half, sets, capsys):
    restated(half, lambda state: state["environment"].update(weather="fine"))
    running = train(half, TINY, *sets, SOME)
    next(running)
    running.close()
    assert "weather fine, now not known: same data and schedule" in capsys.readouterr().err
    restated(half, lambda state: state["optimizer"].pop("state"))
    with pytest.raises(InputError, match=r"resume\.pt: does not fit its config\.json"):
        list(train(half, TINY, *sets, SOME))
    restated(half, lambda state: state.update(schema=3, version="0.9.0"))
    with pytest.raises(InputError, match=r"resume\.pt: written by a later version of collapse \(0\.9\.0, schema 3\)"):
        list(train(half, TINY, *sets, SOME))


# Damage.


def finish(half, sets, unbroken, capsys):
    """Train to the end; what was said. The weights are those of a run that nothing happened to."""
    list(train(half, TINY, *sets, SOME))
    assert (half / "encoder.safetensors").read_bytes() == (unbroken / "encoder.safetensors").read_bytes()
    return capsys.readouterr().err


@pytest.mark.parametrize("kind", ["flipped", "cut", "empty", "text", "pickle", "folded", "array"])
def test_damaged_spectra_are_kept_aside_and_the_run_goes_on(half, sets, unbroken, capsys, kind):
    path = half / "spectra.npz"
    stored = spectra_of(path)
    if kind == "flipped":
        damage(path)
    elif kind in ("cut", "empty", "text"):
        path.write_bytes({"cut": path.read_bytes()[:-30], "empty": b"", "text": b"no array"}[kind])
    elif kind == "pickle":
        np.savez(path, **stored, odd=np.array([object()], dtype=object))
    elif kind == "folded":
        np.savez(path, **{**stored, "embedding": stored["embedding"][:1]})
    else:
        with open(path, "wb") as file:
            np.save(file, stored["steps"])
    content = path.read_bytes()
    assert "spectra.npz: damaged; kept as spectra.damaged-1.npz" in finish(half, sets, unbroken, capsys)
    assert (half / "spectra.damaged-1.npz").read_bytes() == content
    assert spectra_of(path)["steps"].tolist() == [6, 8]


def test_packed_spectra_are_read_and_kept(half, sets, unbroken, capsys):
    stored = spectra_of(half / "spectra.npz")
    np.savez_compressed(half / "spectra.npz", **stored)
    assert finish(half, sets, unbroken, capsys) == ""
    found = spectra_of(half / "spectra.npz")
    assert np.array_equal(found["embedding"][: len(stored["steps"])], stored["embedding"])


def test_lost_spectra_are_missed(half, sets, unbroken, capsys):
    (half / "spectra.npz").unlink()
    assert "spectra.npz: spectra are missing" in finish(half, sets, unbroken, capsys)
    assert spectra_of(half / "spectra.npz")["steps"].tolist() == [6, 8]


@pytest.mark.parametrize("kind", ["flipped", "lost", "binary"])
def test_a_damaged_log_is_kept_aside_and_its_whole_lines_stay(half, sets, unbroken, capsys, kind):
    path = half / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = b"\xff" + lines[1][1:]
    if kind == "lost":
        path.unlink()
    else:
        path.write_bytes(b"".join(lines) if kind == "flipped" else b"\x00" * len(b"".join(lines)))
    said = finish(half, sets, unbroken, capsys)
    if kind == "lost":
        assert "metrics.jsonl: lines are missing" in said
    else:
        assert "metrics.jsonl: damaged; kept as metrics.damaged-1.jsonl" in said
        assert (half / "metrics.damaged-1.jsonl").exists()
    assert steps(half) == ([1, 3, 4] if kind == "flipped" else []) + [5, 6, 7, 8]


def test_a_damaged_state_never_takes_the_place_of_the_whole_one(half, sets, unbroken, capsys):
    content = damage(half / "resume.pt")
    running = train(half, TINY, *sets, SOME)
    for _ in range(3):  # to step 5; it saved at 4
        next(running)
    running.close()
    assert "resume.pt: damaged; kept as resume.damaged-1.pt; the state before it is taken" in capsys.readouterr().err
    assert (half / "resume.damaged-1.pt").read_bytes() == content
    (half / "resume.pt").unlink()  # killed between two renames
    assert finish(half, sets, unbroken, capsys) == ""


@pytest.mark.parametrize("kind", ["flipped", "cut", "another's"])
def test_a_finished_run_whose_encoder_is_damaged_writes_it_again(unbroken, sets, tmp_path, capsys, kind):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    path = folder / "encoder.safetensors"
    right = path.read_bytes()
    path.write_bytes(right[:-40] if kind == "cut" else right[:-40] + b"\x3f" * 40)
    assert "encoder.damaged-1.safetensors; it is written again" in finish(folder, sets, unbroken, capsys)
    path.write_bytes(right[:-40])
    (folder / "resume.pt").unlink()
    with pytest.raises(InputError, match=r"encoder\.safetensors: damaged, and no state is left"):
        list(train(folder, TINY, *sets, SOME))


def test_a_finished_run_needs_no_state(unbroken, sets, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    damage(folder / "resume.pt")
    assert list(train(folder, TINY, *sets, SOME)) == []
    (folder / "resume.pt").unlink()
    assert list(train(folder, TINY, *sets, SOME)) == []


def test_the_command_says_what_a_finished_run_has_lost(tmp_path, capsys):
    flags = "--preset digits --data sklearn:digits --workers 0 --device cpu --blocks 1 1 --planes 8 16 --batch-size 400"
    call = ["train", *flags.split(), "--epochs", "1", "--dim", "8", "--held", "50", "--out", str(tmp_path / "run")]
    assert cli.main(call) == 0
    damage(tmp_path / "run/spectra.npz")
    (tmp_path / "run/spectrum.png").write_bytes(b"no picture")
    capsys.readouterr()
    assert cli.main(call) == 0
    out, err = capsys.readouterr()
    assert "spectra.npz: damaged; spectrum.png is not drawn" in err
    assert "1 epochs, 2 steps: loss" in out
    for content in (b"", b"\x00\n", None):
        (tmp_path / "run/metrics.jsonl").write_bytes(content) if content is not None else (
            tmp_path / "run/metrics.jsonl"
        ).unlink()
        assert cli.main(call) == 0
        out, err = capsys.readouterr()
        assert "metrics.jsonl: absent or damaged; the run is finished" in err
        assert "finished" in out


def test_an_interrupted_run_says_that_the_same_command_goes_on(tmp_path, sets, capsys):
    asked = iter([0, 0, 2])
    options = Options(stop=lambda: next(asked))
    with pytest.raises(KeyboardInterrupt):
        list(train(tmp_path, TINY, *sets, options))
    assert capsys.readouterr().err == f"{tmp_path}: saved at step 3; the same command goes on from it\n"


# Saves behind the steps.


def test_a_save_behind_the_steps_is_of_the_step_it_was_asked_at(tmp_path, monkeypatch):
    begun, go = threading.Event(), threading.Event()
    real = torch.save

    def slow(*arguments):
        begun.set()
        assert go.wait(60)
        real(*arguments)

    monkeypatch.setattr(torch, "save", slow)
    run, weights = Run(tmp_path, {}, {}, behind=True), torch.zeros(5)
    run.save({"step": 1, "network": {"w": weights}, "window": [0.5]})
    assert begun.wait(60)
    weights += 1  # the next step, while the first state is being written
    assert not (tmp_path / "resume.pt").exists()
    go.set()
    run.save({"step": 2, "network": {"w": weights}, "window": []})  # waits for the first
    run.close()
    states = [torch.load(tmp_path / name, weights_only=True) for name in ("resume.prev.pt", "resume.pt")]
    assert [(s["step"], s["network"]["w"].tolist()) for s in states] == [(1, [0.0] * 5), (2, [1.0] * 5)]


def test_a_save_that_fails_behind_the_steps_ends_the_run_at_the_next(tmp_path, monkeypatch):
    run = Run(tmp_path, {}, {}, behind=True)
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    run.save({"step": 1})
    with pytest.raises(InputError, match="No space left"):
        run.settle()
    run.close()
    assert not (tmp_path / ".lock").exists()


def test_a_run_that_saves_behind_its_steps_dies_and_goes_on_as_any(half, sets, unbroken, monkeypatch, capsys):
    monkeypatch.setattr(Run, "__init__", partialmethod(always_behind, Run.__init__))
    assert finish(half, sets, unbroken, capsys) == ""


def always_behind(self, init, folder, config, data, behind, former):
    init(self, folder, config, data, True, former)


@pytest.mark.parametrize(
    "odd", [{"start": ...}, {"pid": 1 << 40}, {"pid": "7"}, {"host": 3}, {"place": []}, {"since": {}}]
)
def test_a_lock_that_lacks_something_is_stale_once_it_is_old(tmp_path, odd):
    about = {"pid": os.getpid(), "host": "x", "place": lock._place(), "start": lock._process(os.getpid()), "since": ""}
    about = {name: value for name, value in {**about, **odd}.items() if value is not ...}
    path = tmp_path / ".lock"
    path.write_text(json.dumps(about))
    os.utime(path, (time.time() - lock.SILENT,) * 2)
    taken = Lock(tmp_path)
    assert "token" in json.loads(path.read_text())
    taken.release()
    assert not path.exists()


def test_a_lock_that_is_no_file_is_one_line_and_left_alone(tmp_path):
    (tmp_path / "secret").write_text("a secret")
    for make in (lambda path: path.symlink_to(tmp_path / "secret"), os.mkfifo, os.mkdir):
        make(tmp_path / ".lock")
        with pytest.raises(InputError, match=r"\.lock: (cannot be read as|is no regular file)") as caught:
            Lock(tmp_path)
        assert "secret" not in str(caught.value).replace(str(tmp_path), "")
        assert os.path.lexists(tmp_path / ".lock")
        (tmp_path / ".lock").rmdir() if make is os.mkdir else (tmp_path / ".lock").unlink()
