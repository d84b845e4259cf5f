"""What is written: inputs stay, files are whole, sets belong together, and every failure is one line."""

import copy
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from processes import children, code_of
from safetensors.torch import save_file

import collapse
from collapse import InputError, Spectrum, cli, plots, results
from collapse.data.images import Images
from collapse.results import outputs
from collapse.spectra import load_results

ROOT = Path(__file__).parents[2]


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of the command, in this process."""
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def forked(arguments, stdout=None, stderr=None, before=None, closed=()):
    """(exit code, stderr) of the command in a fork of this process with descriptors of its own; 70 for a traceback."""

    def act():
        os.dup2(os.open(stderr, os.O_WRONLY) if stderr else said.fileno(), 2)
        os.dup2(os.open(stdout or os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
        for number in closed:
            os.close(number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)
        if before:
            before()
        code = cli.main([str(a) for a in arguments])
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        return code

    # A file and not a pipe: of a pipe, one would wait for the end of all that the command has started.
    with tempfile.TemporaryFile() as said:
        code = code_of(processes.forked(act, seconds=120))
        said.seek(0)
        return code, said.read().decode(errors="replace")


def tree(folder):
    """Every file below a folder: name -> digest of its bytes, or where a link leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture
def z(tmp_path):
    path = tmp_path / "z.npy"
    np.save(path, np.random.default_rng(0).standard_normal((500, 12)).astype(np.float32) / np.arange(1, 13))
    return path


def picture(path, color=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (color, 0, 0)).save(path)


@pytest.fixture
def inputs(tmp_path, z):
    """One of everything that a command reads, in a folder."""
    rows = np.load(z)
    np.savez(tmp_path / "z.npz", a=rows, b=rows)
    spectrum = collapse.spectrum(rows, vectors=True)
    spectrum.save(tmp_path / "a.json")
    spectrum.save(tmp_path / "b.json")
    for index in range(3):
        picture(tmp_path / f"photos/{index}.png", index)
    picture(tmp_path / "elsewhere/far.png")
    (tmp_path / "photos/link.png").symlink_to(tmp_path / "elsewhere/far.png")
    (tmp_path / "list.txt").write_text("photos/0.png\nelsewhere/far.png\n")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "photos/0.png", "inner/0.png")
    (tmp_path / "hub").mkdir()
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "hub/model.safetensors")
    (tmp_path / "hub/config.json").write_text("{}")
    (tmp_path / "dcp").mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (tmp_path / "dcp" / name).write_bytes(b"0")
    (tmp_path / "store.zarr/c").mkdir(parents=True)
    (tmp_path / "store.zarr/zarr.json").write_text("{}")
    (tmp_path / "store.zarr/c/0").write_bytes(b"0")
    (tmp_path / "run").mkdir()
    for name in ("config.json", "encoder.safetensors", "spectra.npz", "metrics.jsonl"):
        (tmp_path / "run" / name).write_bytes(b"0")
    for split in ("train", "val"):
        picture(tmp_path / f"data/{split}/class/0.png")
    (tmp_path / "recipe.json").write_text("{}")
    os.link(z, tmp_path / "hard.npy")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "soft.npy").symlink_to(z)
    os.link(tmp_path / "photos/1.png", tmp_path / "hard.png")
    return tmp_path


DESTROYERS = {
    "itself": "spectrum z.npy --out z.npy",
    "itself by another spelling": "spectrum z.npy --out photos/../z.npy",
    "a hard link to it": "spectrum z.npy --out hard.npy",
    "a symbolic link to it": "spectrum z.npy --out soft.npy",
    "what a symbolic link leads to": "spectrum soft.npy --out z.npy",
    "the file of FILE:KEY": "spectrum z.npz:a --out z.npz",
    "the vectors beside the output": "spectrum z.npz:a --out z.json --vectors",
    "the provenance of rows": "spectrum z.npy --out z.json",
    "a plot": "spectrum z.npy --plot z.npy",
    "a zip of images": "spectrum hub images.zip --out images.zip",
    "a zip of which a folder is read": "spectrum hub images.zip/inner --out images.zip",
    "a list of images, beside the rows": "embed hub list.txt --out list.npy",
    "a list of images": "spectrum hub list.txt --out list.txt",
    "an image of a list": "spectrum hub list.txt --plot elsewhere/far.png",
    "an image of a folder": "spectrum hub photos --plot photos/0.png",
    "an image that is not there yet": "spectrum hub photos --plot photos/new.png",
    "an image to which a link in the folder leads": "spectrum hub photos --plot elsewhere/far.png",
    "a hard link to an image": "spectrum hub photos --plot hard.png",
    "weights in a folder": "spectrum hub photos --out hub/model.safetensors",
    "a config in a folder": "inspect hub --out hub/config.json",
    "a config beside a file": "inspect hub/model.safetensors --out hub/config.json",
    "a part of a distributed checkpoint": "inspect dcp --out dcp/__0_0.distcp",
    "a chunk of a zarr array": "spectrum store.zarr --out store.zarr/c/0",
    "a new file in a zarr array": "spectrum store.zarr:a --out store.zarr/c/1",
    "a run's configuration": "inspect run/encoder.safetensors --out run/config.json",
    "a run's spectra": "spectrum run/encoder.safetensors photos --out run/spectra.json --vectors",
    "a result that is compared": "compare a.json b.json --out b.json",
    "the vectors of a result": "compare a.json b.json --out a.npz",
    "compared images": "compare hub run --images photos --plot photos/0.png",
    "a recipe": "diagnose hub photos --augmentation recipe.json --out recipe.json",
    "diagnosed weights": "diagnose hub photos --report hub/model.safetensors",
    "an image of a data set": "knn hub --data data --out data/val/class/0.png",
    "probed weights": "probe hub/model.safetensors --data data --out hub/model.safetensors",
    "a zip of a data set": "probe hub --data images.zip --out images.zip",
}  # fmt: skip


@pytest.mark.parametrize("what", DESTROYERS)
def test_no_command_writes_over_what_it_reads(what, inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    if "provenance" in what:
        (inputs / "z.json").write_text('{"files": {"z.npy": {"sha256": "0", "size": 1}}}')
    before = tree(inputs)
    code, out, err = run(capsys, *DESTROYERS[what].split(), "--force")
    assert (code, out) == (2, "")
    assert "is the input" in err, err
    assert err.count("\n") == 1
    assert tree(inputs) == before


@pytest.mark.parametrize(("command", "message"), {
    "spectrum z.npy --out r.png --plot r.png": "--out and --plot are one file; name two",
    "spectrum z.npy --out r.npz --vectors": "--out and --vectors are one file; name two",
    "spectrum z.npy --out photos/../r.pdf --plot r.pdf": "--out and --plot are one file; name two",
    "diagnose hub photos --out r.html --report r.html": "--out and --report are one file; name two",
    "spectrum z.npy --out new/folder/r.json": "there is no folder new/folder; make it: mkdir -p new/folder",
    "spectrum z.npy --plot new/r.png": "there is no folder new; make it: mkdir -p new",
    "embed hub photos --out new/r.npy": "there is no folder new; make it: mkdir -p new",
    "spectrum z.npy --out /dev/null": "/dev/null: is the system's, not a regular file",
    "spectrum z.npy --out /dev/stdout": "/dev/stdout: is the system's, not a regular file",
    "spectrum z.npy --plot /dev/fd/1.png": "is the system's, not a regular file",
    "spectrum z.npy --out pipe": "pipe: is not a regular file",
    f"spectrum z.npy --out {'x' * 300}.json": "cannot be written (File name too long)",
    "spectrum z.npy --vectors --layer all --out r.json": "and one --layer",
    "train --data data --out data/train": "is the input, or part of it: data/train is read",
    "train --data data --out elsewhere --preset elsewhere/config.json": "config.json: is the input",
}.items())  # fmt: skip
def test_outputs_that_cannot_be_are_refused_before_any_work(command, message, inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    (inputs / "elsewhere/config.json").write_text("{}")
    before = tree(inputs)
    code, out, err = run(capsys, *command.split(), *([] if command.startswith("train") else ["--force"]))
    assert (code, out) == (2, ""), err
    assert message in err
    assert err.count("\n") == 1
    assert tree(inputs) == before


def test_results_may_lie_in_folders_that_are_read(inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    for place in ("photos/z.json", "hub/z.json", "z.txt", "config.json"):
        assert run(capsys, "spectrum", "z.npy", "--out", place)[0] == 0
    for force in ([], ["--force"]):  # the natural name, and once more
        assert run(capsys, "spectrum", "z.npy", "--out", "z.json", *force)[0] == 0
    Path("digits").mkdir()  # a preset's name too
    assert "is the input" not in run(capsys, "train", "--data", "data", "--preset", "digits", "--out", "digits/run")[2]
    Path("hub/spectra.npz").write_bytes(b"")
    assert "is the input" not in run(capsys, "spectrum", "hub/model.safetensors", "photos", "--vectors", "--out",
                                     "hub/spectra.json", "--force")[2]  # fmt: skip
    assert "is the input" not in run(capsys, "inspect", "hub", "--out", "hub/inspected.json")[2]


def test_a_result_of_python_spares_its_source_too(inputs, monkeypatch):
    monkeypatch.chdir(inputs)
    before = tree(inputs)
    for path in ("z.json", Path("z.npz")):
        with pytest.raises(InputError, match="is the input"):
            collapse.spectrum("z.npz:a", vectors=True).save(path)
    assert tree(inputs) == before


def leave(path, pid):
    """What a writer of `path` with this number would leave."""
    with outputs.atomic_write(path) as partial:
        name = partial.name.replace(f"-{os.getpid()}-", f"-{pid}-")
        path.with_name(name).write_text("half")
    return path.with_name(name)


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    path, other = tmp_path / "a.json", tmp_path / "b.json"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone, mine = leave(path, dead.pid), leave(path, os.getpid())
    name = leave(path, dead.pid).name
    target, host = name.split("-")[1:3]
    kept = [
        leave(path, os.getppid()),  # it lives
        leave(other, dead.pid),  # of another target
        tmp_path / name.replace(host, "0" * 8),  # of another machine
        tmp_path / name.replace(".collapse", ".other"),
        tmp_path / f".collapse-{target}",
    ]
    for file in kept:
        file.write_text("theirs")
    linked = tmp_path / name.replace(name[-21:-5], "f" * 16)
    linked.symlink_to(kept[0])
    with outputs.atomic_write(path) as first, outputs.atomic_write(path) as second:
        assert first != second
        first.write_text("one")
        second.write_text("two")
        assert not gone.exists()
        assert not mine.exists()
    assert path.read_text() == "one"
    assert all(file.exists() for file in [*kept, linked])
    assert {file.name for file in tmp_path.iterdir()} == {path.name, *(file.name for file in [*kept, linked])} - {
        other.name
    } | ({other.name} if other.exists() else set())


def test_a_killed_command_leaves_no_file_for_ever(tmp_path, z):
    out = tmp_path / "s.json"
    program = (
        "import os, signal, sys; from pathlib import Path; from collapse.results.outputs import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as partial: os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, out]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".collapse-*"))) == 1
    assert cli.main(["spectrum", str(z), "--out", str(out)]) == 0
    assert not list(tmp_path.glob(".collapse-*"))


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    path, victim = tmp_path / "a.json", tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(outputs.secrets, "token_hex", lambda size: "0" * 2 * size)
    with outputs.atomic_write(path) as partial:
        partial.write_text("")
    path.unlink()
    partial.symlink_to(victim)
    with pytest.raises(InputError, match="cannot be written"):
        results.save_text(path, "new")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    "name", ["x" * 250 + ".json", "é" * 125 + ".json", "x." + "y" * 253, b"caf\xe9.json", "a\nb.json"]
)
def test_any_name_can_be_written(name, tmp_path, z, capsys, monkeypatch):
    path = tmp_path / os.fsdecode(name)
    monkeypatch.setattr(sys, "argv", ["collapse", "--out", str(path)])
    code, out, err = run(capsys, "spectrum", z, "--out", path, "--json")
    assert code == 0, err
    assert path.read_text() == out
    for word in json.loads(out)["command"]:
        word.encode()  # Unicode, without halves of pairs
    assert Spectrum.load(path).n == 500
    assert path.suffix != ".json" or run(capsys, "compare", path, z)[0] == 0


def test_names_that_are_not_utf8_are_shown_and_written(tmp_path, z, capsys):
    odd = tmp_path / os.fsdecode(b"caf\xe9\x1b[31m.npy")
    os.rename(z, odd)
    out, plot = tmp_path / "s.json", tmp_path / "s.pdf"
    code, text, err = run(capsys, "spectrum", odd, "--out", out, "--plot", plot)
    assert code == 0, err
    assert r"caf\udce9\x1b[31m.npy" in text
    assert json.loads(out.read_bytes())["source"]["path"].endswith(r"caf\udce9" + "\x1b[31m.npy")
    assert plot.read_bytes().startswith(b"%PDF")
    code, _, err = run(capsys, "spectrum", odd.with_suffix(".npz"))
    assert (code, err.count("\x1b")) == (2, 0)


@pytest.mark.parametrize("name", ["a$b$", r"$\frac$", "_x", "a\nb", "\udce9", "\x1b"])
def test_a_label_shows_a_name_as_it_is(name, tmp_path):
    result = replace(collapse.spectrum(np.random.default_rng(0).standard_normal((60, 4))), source={"path": name})
    ax = result.plot()
    assert ax.get_legend().get_texts()[0].get_text().strip() == results.printable(name).replace("$", r"\$")
    plots.save_figure(ax.figure, tmp_path / "figure")


def test_a_plot_keeps_the_dots_of_its_name(tmp_path, z, capsys):
    (tmp_path / "a.png").write_text("mine")
    assert run(capsys, "spectrum", z, "--plot", tmp_path / "a.0.5.png")[0] == 0
    assert (tmp_path / "a.0.5.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.png").read_text() == "mine"


# ---------------------------------------------------------------- sets of files


def test_a_result_names_its_vectors_and_stale_ones_are_not_taken(inputs, capsys, monkeypatch):
    monkeypatch.chdir(inputs)
    document = json.loads(Path("a.json").read_text())
    vectors = Path("a.npz").read_bytes()
    assert document["files"] == {"a.npz": {"sha256": hashlib.sha256(vectors).hexdigest(), "size": len(vectors)}}
    assert "% of the variance" in run(capsys, "compare", "a.json", "b.json")[1]
    for name in ("json", "npz"):
        Path(f"a.{name}").rename(f"moved.{name}")
    assert Spectrum.load("moved.json").vectors is not None
    # Another result's vectors.
    Path("moved.npz").write_bytes(vectors[:-30] + b"0" + vectors[-29:])
    code, _, err = run(capsys, "compare", "moved.json", "b.json")
    assert code == 2
    assert "moved.npz: is not the file that moved.json was written with" in err
    # A result without vectors, over one with them.
    assert run(capsys, "spectrum", "z.npy", "--raw", "--out", "b.json", "--force")[0] == 0
    code, out, err = run(capsys, "compare", "b.json", "z.npz:a")
    assert code == 0
    assert "% of the variance" not in out
    assert "warning: b.npz beside b.json is not named by it" in err
    assert Path("b.npz").exists()
    # A result whose vectors are gone.
    Path("moved.npz").unlink()
    assert Spectrum.load("moved.json").vectors is None


def stop_at_replacement(number, patch):
    """Let the process be interrupted at its `number`-th replacement of a file."""
    real, seen = os.replace, []

    def replace(*paths):
        seen.append(paths)
        if len(seen) == number:
            raise KeyboardInterrupt
        real(*paths)

    patch.setattr(os, "replace", replace)


def test_a_kill_between_two_files_of_a_result_is_noticed(inputs, capsys, monkeypatch):
    monkeypatch.chdir(inputs)
    call = ["spectrum", "z.npz:a", "--raw", "--vectors", "--out", "a.json", "--force"]
    before = Path("a.json").read_bytes()
    with monkeypatch.context() as patch:
        stop_at_replacement(2, patch)
        assert run(capsys, *call)[0] == 130
    assert Path("a.json").read_bytes() == before
    with pytest.raises(InputError, match="measure again"):
        Spectrum.load("a.json")
    assert run(capsys, *call, "--json")[0] == 0
    assert Spectrum.load("a.json").vectors is not None
    assert not list(inputs.glob(".collapse-*"))


def test_what_is_printed_is_what_is_written_with_vectors(inputs, capsys, monkeypatch):
    monkeypatch.chdir(inputs)
    _, out, _ = run(capsys, "spectrum", "z.npz:a", "--vectors", "--out", "new.json", "--json")
    assert out == Path("new.json").read_text()
    assert list(json.loads(out)["files"]) == ["new.npz"]


def embed(capsys, resnet18, photos, out, *flags):
    call = ["embed", resnet18, photos, "--out", out, "--resize", 32, "--crop", 32, "--workers", 0, *flags]
    return run(capsys, *call)


def test_a_kill_between_two_files_of_embeddings_is_noticed(tmp_path, resnet18, photos, capsys, monkeypatch):
    out = tmp_path / "e.npy"
    assert embed(capsys, resnet18, photos, out)[0] == 0
    document = json.loads((tmp_path / "e.json").read_text())
    for name, about in document["files"].items():
        content = (tmp_path / name).read_bytes()
        assert about == {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    assert list(document["files"]) == ["e.npy", "e.txt"]
    assert "beside it" not in run(capsys, "spectrum", out)[1]
    with monkeypatch.context() as patch:
        stop_at_replacement(2, patch)
        assert embed(capsys, resnet18, photos, out, "--limit", 20, "--force")[0] == 130
    assert np.load(out).shape == (20, 512)
    assert "warning: e.json beside it describes another e.npy" in run(capsys, "spectrum", out)[2]
    assert any("e.json beside it" in note for note in collapse.spectrum(out).warnings)
    (tmp_path / "e.json").write_text('{"images": []}')  # somebody's own
    assert "beside it" not in run(capsys, "spectrum", out)[1]


def test_figures_are_replaced_together(tmp_path, monkeypatch):
    for suffix in (".png", ".pdf"):
        (tmp_path / f"f{suffix}").write_text("old")
    fig, _ = plots.figure()
    real = type(fig).savefig

    def fail(self, path, **options):
        if options["format"] == "pdf":
            raise OSError(28, "No space left on device")
        real(self, path, **options)

    monkeypatch.setattr(type(fig), "savefig", fail)
    with pytest.raises(InputError, match="No space left"):
        plots.save_figure(fig, tmp_path / "f")
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["old", "old"]


# ---------------------------------------------------------------- streams and disks


WARNED = {"warning: preprocessing is not in the fil", "warning: 24 rows in 512 dimensions: at m"}


@pytest.fixture
def small(tmp_path, resnet18, photos, z):
    """A short call of each command that reads a checkpoint or results."""
    collapse.spectrum(z).save(tmp_path / "s.json")
    sizes = ["--resize", 32, "--crop", 32, "--workers", 0]
    return {
        "spectrum": ["spectrum", z],
        "compare": ["compare", tmp_path / "s.json", z],
        "inspect": ["inspect", resnet18],
        "embed": ["embed", resnet18, photos, "--out", tmp_path / "e.npy", "--force", *sizes],
        "images": ["spectrum", resnet18, photos, *sizes],
    }


def test_output_that_cannot_be_printed_is_one_line(small, tmp_path):
    for name, call in small.items():
        code, err = forked(call, stdout="/dev/full")
        assert (code, err) == (2, "collapse: standard output: cannot be written (No space left on device)\n"), name
        code, err = forked([*call, "--json"], closed=[1])
        assert code == 2, err
        assert re.fullmatch("collapse: standard output: is closed.*\n", err), name
        assert forked(call, closed=[2])[0] == 0, name
    out = tmp_path / "kept.json"
    assert forked([*small["spectrum"], "--out", out], stdout="/dev/full")[0] == 2
    assert json.loads(out.read_text())["n"] == 500
    assert forked(["spectrum", "absent.npy"], stderr="/dev/full")[0] == 2
    assert forked(["--help"], stdout="/dev/full")[0] == 2


def test_a_reader_that_leaves_is_no_error(small):
    for name, call in small.items():
        reader, writer = os.pipe()
        os.close(reader)
        code, err = forked(call, before=lambda end=writer: os.dup2(end, 1))
        os.close(writer)
        assert code == 0, name
        assert {line[:40] for line in err.splitlines()} <= WARNED, name  # on standard error, as for any reader


@pytest.mark.parametrize("redirect", [">/dev/full", ">&-", "2>&-", ">&- 2>&-", "2>/dev/full", "<&-"])
def test_python_itself_has_nothing_to_add_at_its_end(redirect, z):
    call = f"{sys.executable} -m collapse spectrum {z} {redirect}"
    done = subprocess.run(["sh", "-c", call], capture_output=True, text=True, timeout=120)
    assert done.returncode == (2 if redirect.startswith(">") else 0), done.stderr
    assert done.stderr.count("\n") == (1 if redirect in (">/dev/full", ">&-") else 0)


def limited(size):
    """Files may have `size` bytes: a disk that fills."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("size", "workers", "flags"), [(20_000, 0, []), (20_000, 2, ["--batch-size", "2"]), (5_000, 2, [])]
)
def test_embeddings_on_a_full_disk_end_in_one_line(size, workers, flags, tmp_path, resnet18, photos):
    call = ["embed", resnet18, photos, "--out", tmp_path / "e.npy", "--resize", 32, "--crop", 32, "--workers", workers]
    code, err = forked([*call, *flags], before=limited(size))
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.startswith("collapse: ")]
    assert len(lines) == 1
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_an_error_that_is_kept_keeps_no_process(resnet18, photos):
    def act():
        limited(5_000)()
        try:
            collapse.spectrum(resnet18, photos, resize=32, crop=32, workers=2)
        except InputError as error:
            return 10 * ("no memory to share" in str(error)) + len(children(os.getpid()))

    assert code_of(processes.forked(act)) == 10


def test_a_table_is_not_lost_with_its_plot(tmp_path, z, capsys):
    out = tmp_path / "s.json"
    reader, writer = os.pipe()
    code, err = forked(
        ["spectrum", z, "--out", out, "--plot", tmp_path / "s.png"],
        before=lambda: (limited(6_000)(), os.dup2(writer, 1)),
    )
    os.close(writer)
    with open(reader) as file:
        assert "effective_rank" in file.read()
    refused = f"collapse: {tmp_path}/s.png: cannot be written (File too large)\n"
    assert (code, err) == (2, f"wrote {out}\n{refused}")
    assert json.loads(out.read_text())["n"] == 500
    assert {path.name for path in tmp_path.iterdir()} == {"z.npy", "s.json"}


def test_a_file_that_appears_while_a_command_works_is_kept(tmp_path, z, capsys, monkeypatch):
    out, plot = tmp_path / "s.json", tmp_path / "s.png"
    work = cli.spectrum._measured

    def meanwhile(*arguments):
        for path in (out, plot):
            path.write_text("another's")
        return work(*arguments)

    monkeypatch.setattr("collapse.commands.spectrum._measured", meanwhile)
    code, text, err = run(capsys, "spectrum", z, "--out", out, "--plot", plot)
    assert (code, err.count("\n")) == (2, 1)
    assert "has appeared meanwhile and is kept" in err
    assert "effective_rank" in text
    assert out.read_text() == plot.read_text() == "another's"
    assert run(capsys, "spectrum", z, "--out", out, "--plot", plot, "--force")[0] == 0


def test_commands_print_in_one_place_alone():
    for path in (ROOT / "collapse/commands").glob("*.py"):
        assert path.read_text().count("print(") == (path.name == "terminal.py"), path


def test_errors_of_the_machine_are_lines_and_bugs_are_not(z, capsys, monkeypatch):
    for error, code in ((MemoryError(), 2), (OSError(5, "Input/output error", "some/file"), 2)):
        monkeypatch.setattr(
            "collapse.commands.spectrum._measured", lambda *a, error=error: (_ for _ in ()).throw(error)
        )
        assert run(capsys, "spectrum", z)[0] == code
    monkeypatch.setattr("collapse.commands.spectrum._measured", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(capsys, "spectrum", z)


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(("call", "message"), {
    "spectrun z.npy": "invalid choice: 'spectrun' .*; did you mean spectrum\\?; see collapse --help",
    "spectrum z.npy --thershold 0.1": "unrecognized argument .--thershold.; did you mean --threshold",
    "spectrum z.npy --thershold=0.1": "did you mean --threshold\\?; see collapse spectrum --help",
    "knn c.pth --data d --worker-count 3": "did you mean --workers\\?; see collapse knn --help",
    "spectrum z.npy --metric rankme": "argument '--metric'; see collapse spectrum --help",
    "spectrum z.npy a b": "unrecognized argument 'b'; see collapse spectrum --help",
    "spectrum z.npy --method covarianz": "did you mean covariance\\?; see collapse spectrum --help",
    "spectrum z.npy --limit 1": "--limit: '1' is not a number of at least 2; see collapse spectrum --help",
    "compare z.npy z.npy --limit 1": "--limit: '1' is not a number of at least 2; see collapse compare --help",
    "spectrum c.pth one --workers 0": "holds 1 image; a covariance needs at least 2",
}.items())  # fmt: skip
def test_a_slip_of_the_pen_is_told_what_is_near(call, message, tmp_path, z, resnet18, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "one/a.png")
    (tmp_path / "c.pth").symlink_to(resnet18)
    code, out, err = run(capsys, *call.split())
    assert (code, out) == (2, "")
    assert re.search(message, err), err
    assert err.count("\n") == 1


def test_one_source_three_times_is_three_rows(capsys, z):
    code, out, _ = run(capsys, "compare", z, z, z, "--json")
    assert code == 0
    names = [row["name"] for row in json.loads(out)["rows"]]
    assert len(set(names)) == 3


def test_rows_without_variance_compare_without_directions(tmp_path, capsys, z):
    constant = tmp_path / "constant.json"
    collapse.spectrum(np.ones((10, 12)), vectors=True).save(constant)
    assert run(capsys, "spectrum", z, "--vectors", "--out", tmp_path / "s.json")[0] == 0
    code, out, err = run(capsys, "compare", constant, tmp_path / "s.json", "--json")
    assert code == 0, err
    assert json.loads(out)["subspaces"] == []


def test_a_finished_run_without_its_log_is_summed_up(tmp_path, capsys):
    from collapse.commands.training import _finish_run
    from collapse.training.result import trained

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "encoder.safetensors").touch()
    options = cli.parser().parse_args(["train", "--data", "d", "--out", str(folder)])
    contents = [
        None,
        b"",
        b"{not json}\n",
        b"[1]\n",
        b'{"step": 3, "epoch": 1}\n',
        b'{"step": 3, "epoch": 1, "epoch_loss": 2}\n',
    ]
    for content in contents:
        if content is not None:
            (folder / "metrics.jsonl").write_bytes(content)
        _finish_run(options, trained(folder))
        assert capsys.readouterr().out.startswith(f"{folder}: ")
    options.json = True
    _finish_run(options, trained(folder))
    assert json.loads(capsys.readouterr().out)["step"] == 3
    (folder / "spectra.npz").write_bytes(b"PK\3\4 damaged")
    _finish_run(options, trained(folder))
    out, err = capsys.readouterr()
    assert "spectra.npz: damaged; spectrum.png is not drawn" in err
    assert json.loads(out)["step"] == 3


# ---------------------------------------------------------------- lists of images

ODD = ["plain.png", "two\nlines.png", " space.png", '"quoted".png', "tab\t.png", "é.png", "\u2028.png", b"caf\xe9.png",
       "back\\slash.png", "\\n.png", "car\rriage.png", "\x85next.png"]  # fmt: skip


def test_a_list_gives_back_every_name(tmp_path, resnet18, capsys):
    folder = tmp_path / "images"
    for index, name in enumerate(ODD):
        picture(folder / os.fsdecode(name), index)
    assert embed(capsys, resnet18, folder, tmp_path / "z.npy")[0] == 0
    listed = (tmp_path / "z.txt").read_bytes()
    assert listed.decode().count("\n") == len(ODD)
    assert json.loads((tmp_path / "z.json").read_bytes())["images"]["count"] == len(ODD)
    (folder / "z.txt").write_bytes(listed)
    assert Images(folder / "z.txt").names == Images(folder).names
    assert set(map(os.fsencode, Images(folder).names)) == {os.fsencode(name) for name in ODD}
    code, out, err = run(
        capsys, "spectrum", resnet18, folder / "z.txt", "--resize", 32, "--crop", 32, "--workers", 0, "--json"
    )
    assert code == 0, err
    assert json.loads(out)["n"] == len(ODD)


def test_embeddings_of_nothing_name_an_image(tmp_path, resnet18, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"none")
    code, _, err = embed(capsys, resnet18, folder, tmp_path / "z.npy")
    assert code == 2
    assert f"none of its images can be read, first {folder}/a.png" in err
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


# ---------------------------------------------------------------- what is read back


def places(value, path=()):
    """Every place in a document, by its keys."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(item, (*path, index))


def changed(document, path, change):
    """A copy of the document in which the value at a place is changed, or taken out."""
    made = copy.deepcopy(document)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    if change is DROPPED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = change
    return made


DROPPED = object()
NUMBERS = [-1, 0, 1, 1.5, 1e308, 1e303, -1e-3, 10**300, 10**500, 2**64]
VALUES = [None, True, False, *NUMBERS, "text", "", [], [[]], {}, {"a": 1}, [1, "a"], DROPPED]


def right(spectrum):
    """Whether a spectrum that was read means something."""
    values = np.concatenate([spectrum.singular_values, spectrum.moments])
    assert values.dtype == np.float64
    assert np.isfinite(values).all()
    assert (values >= 0).all()
    assert (np.diff(spectrum.singular_values) <= 0).all()
    assert len(spectrum.moments) == spectrum.dim
    assert type(spectrum.n) is int
    assert spectrum.n >= 2
    assert 0 <= spectrum.threshold < 1
    assert spectrum.name
    assert cli.spectrum.report(spectrum)


def test_2000_mutants_of_a_result_are_right_or_refused(tmp_path):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((60, 4)) / np.arange(1, 5)
    document = json.loads(collapse.spectrum(z, jackknife=5).to_json())
    document["command"] = ["collapse", "spectrum", "z.npy"]  # not that of the tests, which is of any length
    document["images"] = {"path": "photos", "count": 60, "skipped": [{"path": "a.png", "why": "cut"}]}
    document["files"] = {"s.npz": {"sha256": "0", "size": 3}}
    right(Spectrum.from_json(json.dumps(document)))
    mutants = [changed(document, path, value) for path in places(document) if path for value in VALUES]
    path, refused, seen = tmp_path / "m.json", 0, set()
    for mutant in [*mutants, *VALUES[:-1], "collapse.spectrum/1"]:
        path.write_text(json.dumps(mutant))
        try:
            for spectrum in load_results(path):
                if repr(spectrum) not in seen:
                    right(spectrum)
                seen.add(repr(spectrum))
        except InputError as error:
            refused += str(path) in str(error)
    assert len(mutants) > 2000
    assert refused > 1400


def test_damaged_text_of_a_result_is_refused(tmp_path, capsys):
    text = collapse.spectrum(np.random.default_rng(0).standard_normal((60, 4))).to_json()
    path = tmp_path / "m.json"
    cases = [text[: len(text) // 2], "", "[" * 100_000, '{"a":' * 100_000, text.replace("60", "6" * 5000, 1), "nul\0",
             text.replace('"n": 60', '"n": NaN'), text.replace('"floor": ', '"floor": 1e999, "x": '),
             text.replace('"n": 60', '"n": 60, "n": 61'), text.encode("utf-16"), b"\xff" + text.encode()]  # fmt: skip
    for case in cases:
        path.write_bytes(case if isinstance(case, bytes) else case.encode())
        code, _, err = run(capsys, "compare", path, path)
        assert code == 2
        assert err.count("\n") == 1
        assert str(path) in err
    with open(path, "wb") as file:
        file.truncate(1 << 30)
    assert "bytes of JSON; at most" in run(capsys, "compare", path, path)[2]


def test_cut_unsorted_and_impossible_values_are_named(tmp_path):
    result = collapse.spectrum(np.random.default_rng(0).standard_normal((60, 4)))
    document = json.loads(result.to_json())
    values = document["singular_values"]
    cases = {
        "3 singular values for 4 dimensions": {"singular_values": values[:3]},
        r"singular_values\[1\] is larger": {"singular_values": values[::-1]},
        r"moments\[0\] is null": {"moments": [None, *document["moments"][1:]]},
        r"singular_values\[3\] is -1": {"singular_values": [*values[:3], -1]},
        "n is 1, expected at least 2": {"n": 1},
        "method 'svd'": {"method": "svd"},
    }
    for message, change in cases.items():
        with pytest.raises(InputError, match=message):
            Spectrum.from_json(json.dumps({**document, **change}))
    lying = Spectrum.from_json(json.dumps({**document, "metrics": {"effective_rank": 1e9}}))
    assert lying.metrics() == result.metrics()


def test_a_later_version_is_refused_by_its_name(tmp_path):
    document = json.loads(collapse.spectrum(np.random.default_rng(0).standard_normal((60, 4))).to_json())
    path = tmp_path / "s.json"
    for schema in ("collapse.spectrum/2", "collapse.spectrum/10", "collapse.spectra/2"):
        path.write_text(json.dumps({**document, "schema": schema, "layers": [document]}))
        with pytest.raises(InputError, match=f"schema {schema} is of a later version than this one"):
            load_results(path)
    for schema in ("collapse.spectrum/0", "collapse.spectrum/x", "collapse.embeddings/1", "", 1, None, []):
        path.write_text(json.dumps({**document, "schema": schema}))
        with pytest.raises(InputError, match=r"expected collapse\.spectrum/1"):
            load_results(path)
    arrays = tmp_path / "r.npz"
    results.save_result(arrays, {"schema": "collapse.experiment/2"}, a=np.zeros(2))
    with pytest.raises(InputError, match=r"schema collapse\.experiment/2 is of a later version"):
        results.load_result(arrays)


def test_every_document_is_in_the_table():
    written = set()
    for path in [*ROOT.glob("collapse/**/*.py"), *ROOT.glob("experiments/**/*.py")]:
        written |= set(re.findall(r"\"collapse\.[a-z]+/\d+\"", path.read_text()))
    table = (ROOT / "docs/results.md").read_text()
    for schema in written | {'"collapse.probe/1"', '"collapse.knn/1"'}:
        assert f"`{schema[1:-1].removeprefix('collapse.')}`" in table, schema


def test_side_files_of_a_result_are_read_as_anybodys(inputs, monkeypatch):
    monkeypatch.chdir(inputs)

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, ("ran",))

    made = np.empty(1, object)
    made[0] = Bomb()
    cases = [b"", b"PK\5\6" + bytes(18), Path("a.npz").read_bytes()[:-40]]
    np.savez("objects.npz", vectors=made, meta=np.array('{"schema": "collapse.vectors/1"}'))
    np.savez("wide.npz", vectors=np.eye(3), meta=np.array('{"schema": "collapse.vectors/1"}'))
    np.savez("bare.npz", vectors=np.eye(12))
    np.savez("nan.npz", vectors=np.full((12, 12), np.nan), meta=np.array('{"schema": "collapse.vectors/1"}'))
    cases += [Path(f"{name}.npz").read_bytes() for name in ("objects", "wide", "bare", "nan")]
    document = json.loads(Path("a.json").read_text())
    for content in cases:
        Path("a.npz").write_bytes(content)
        named = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        Path("a.json").write_text(json.dumps({**document, "files": {"a.npz": named}}))
        with pytest.raises(InputError, match=r"a\.npz"):
            Spectrum.load("a.json")
    assert not Path("ran").exists()
