"""The command, end to end: answers, files, and one clear line for whatever is wrong."""

import contextlib
import fcntl
import io
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import models, transforms

import collapse
from collapse import Spectrum, cli
from collapse.commands.terminal import progress, tell, wait


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of the command, in this process."""
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def command(*arguments, **options):
    """The command in a process of its own."""
    options = {"capture_output": True, "text": True, "timeout": 120, **options}
    return subprocess.run([sys.executable, "-m", "collapse", *map(str, arguments)], **options)


@pytest.fixture
def z(tmp_path):
    path = tmp_path / "z.npy"
    np.save(path, np.random.default_rng(0).standard_normal((500, 12)).astype(np.float32) / np.arange(1, 13))
    return path


def covariance_values(z):
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    return np.linalg.svd(np.cov(z.T), compute_uv=False)


def features(net, folder):
    """Embeddings of all images under a folder by torchvision's own transforms, one by one, names in byte order."""
    transform = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*"))
    net.fc = nn.Identity()
    with torch.no_grad():
        rows = [net.eval()(transform(Image.open(folder / n).convert("RGB"))[None]) for n in names]
    return torch.cat(rows).double().numpy()


def test_a_torchvision_checkpoint_gives_numpys_spectrum_of_torchvisions_features(capsys, resnet18, photos, tmp_path):
    out, plot = tmp_path / "s.json", tmp_path / "s.png"
    code, text, _ = run(
        capsys, "spectrum", resnet18, photos, "--json", "--out", out, "--plot", plot, "--workers", 2, "--batch-size", 5
    )
    assert code == 0
    document = json.loads(text)
    assert text == out.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")
    net = models.resnet18()
    net.load_state_dict(torch.load(resnet18))
    expected = covariance_values(features(net, photos))
    measured, floor = np.array(document["singular_values"]), document["floor"]
    above = measured > floor
    assert above.sum() == 23
    np.testing.assert_allclose(measured[above], expected[above], rtol=1e-4)
    assert document["schema"] == "collapse.spectrum/1"
    assert document["source"]["kind"] == "checkpoint"
    assert document["source"]["architecture"] == "resnet18"
    assert document["source"]["layer"] == "representation"
    assert document["images"] == {"path": str(photos), "count": 24, "skipped": []}
    assert (document["n"], document["dim"], document["l2_normalized"]) == (24, 512, True)
    assert Spectrum.from_json(text).dim == 512


def test_a_real_cifar_checkpoint_on_real_images(capsys, shared, tmp_path):
    with zipfile.ZipFile(shared / "data/tiny-imagenet-10.zip") as archive:
        names = sorted(n for n in archive.namelist() if "/train/" in n and not n.endswith("/"))
        for name in names:
            archive.extract(name, tmp_path)
    checkpoint = shared / "checkpoints/resnet20-12fca82f.th"
    code, text, _ = run(capsys, "spectrum", checkpoint, tmp_path / "tiny-imagenet-10/train", "--json")
    assert code == 0
    document = json.loads(text)
    assert (document["n"], document["dim"]) == (200, 64)
    assert document["source"]["preprocessing"]["resize"] == 32
    inside = f"{shared}/data/tiny-imagenet-10.zip/tiny-imagenet-10/train"
    again = json.loads(run(capsys, "spectrum", checkpoint, inside, "--json", "--workers", 0)[1])
    assert again["singular_values"] == document["singular_values"]


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_every_array_file_gives_the_spectrum_of_its_rows(capsys, tmp_path, z, suffix):
    rows, path = np.load(z), (tmp_path / "rows").with_suffix(suffix)
    if suffix == ".npy":
        np.save(path, np.asfortranarray(rows.astype(">f4")))
    elif suffix == ".npz":
        np.savez(path, embeddings=rows, labels=np.zeros(3))
    elif suffix == ".pt":
        torch.save({"features": torch.tensor(rows), "epoch": 3}, path)
    else:
        save_file({"a": torch.tensor(rows), "b": torch.zeros(2, 2)}, path)
    source = f"{path}:a" if suffix == ".safetensors" else path
    code, text, err = run(capsys, "spectrum", source, "--json")
    assert code == 0, err
    document = json.loads(text)
    assert document["source"]["kind"] == "array"
    assert document["source"]["path"] == str(source)
    np.testing.assert_allclose(document["singular_values"], covariance_values(rows.astype(float)), rtol=1e-6)


def test_flags_change_what_they_say(capsys, z):
    read = lambda *flags: json.loads(run(capsys, "spectrum", z, "--json", *flags)[1])
    raw = read("--raw")
    np.testing.assert_allclose(raw["singular_values"], np.linalg.eigvalsh(np.cov(np.load(z).T))[::-1], rtol=1e-6)
    assert not raw["l2_normalized"]
    assert read("--limit", "40")["n"] == 40
    assert read("--method", "qr")["method"] == "qr"
    assert read("--threshold", "0.5")["metrics"]["collapsed_dimensions"] > 0


def test_the_text_report_says_what_was_measured(capsys, z):
    code, text, _ = run(capsys, "spectrum", z)
    assert code == 0
    for part in ("500 embeddings of 12 dimensions, L2-normalised", "effective_rank", "rankme", "is rounding"):
        assert part in text


def bad_calls(folder, z, resnet18, photos):
    """(what the line says, the arguments) of everything that a user may get wrong."""
    rows = np.load(z)
    rows[7, 3] = np.nan
    np.save(folder / "nan.npy", rows)
    # numpy writes objects as a pickle only when told to: this is the file that must be refused.
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(folder / "cube.npy", np.zeros((3, 4, 5)))
    np.save(folder / "one.npy", np.zeros((1, 4)))
    np.save(folder / "text.npy", np.array([["a", "b"]]))
    np.savez(folder / "two.npz", a=np.eye(3), b=np.eye(3))
    (folder / "cut.npy").write_bytes(z.read_bytes()[:2000])
    (folder / "cut.npz").write_bytes((folder / "two.npz").read_bytes()[:200])
    (folder / "text.pth").write_text("this is not a checkpoint at all")
    torch.save({"encoder": {"weight": torch.zeros(3, 3)}}, folder / "unknown.pth")
    tensors = torch.load(resnet18)
    torch.save({k: v for k, v in tensors.items() if k != "layer4.0.conv1.weight"}, folder / "partial.pth")
    (folder / "empty").mkdir()
    (folder / "corrupt").mkdir()
    for name in ("a.png", "c.png"):
        Image.new("RGB", (40, 40)).save(folder / "corrupt" / name)
    (folder / "corrupt/b.png").write_bytes((folder / "corrupt/a.png").read_bytes()[:60])
    shutil.copytree(folder / "corrupt", folder / "mostly")
    (folder / "mostly/a.png").write_bytes(b"")
    yield "absent.pth: no such file", ["absent.pth", photos]
    yield "absent.npy: no such file", ["absent.npy"]
    yield "not a checkpoint", [folder / "text.pth", photos]
    yield "no known layout", [folder / "unknown.pth", photos]
    yield "1 of 120 tensors of resnet18 are missing", [folder / "partial.pth", photos]
    yield "holds resnet18, not resnet50", [resnet18, photos, "--arch", "resnet50"]
    yield "holds no image", [resnet18, folder / "empty"]
    yield "no such folder or zip", [resnet18, folder / "absent"]
    yield "b.png: not a readable image", [resnet18, folder / "corrupt", "--workers", 2, "--strict"]
    yield "2 of 3 images cannot be read", [resnet18, folder / "mostly", "--workers", 0]
    yield "row 7, column 3 is NaN", [folder / "nan.npy"]
    yield "Python objects", [folder / "objects.npy"]
    yield "shape (3, 4, 5), expected (n, d)", [folder / "cube.npy"]
    yield "1 rows; a covariance needs at least 2", [folder / "one.npy"]
    yield "not real numbers", [folder / "text.npy"]
    yield "truncated", [folder / "cut.npy"]
    yield "truncated", [folder / "cut.npz"]
    yield "holds 2 arrays (a, b); name one", [folder / "two.npz"]
    yield "no array 'c'", [f"{folder / 'two.npz'}:c"]
    yield "looks like a checkpoint; give the images", [resnet18]
    yield "no 'layer9'", [resnet18, photos, "--layer", "layer9"]
    yield "has no projector", [resnet18, photos, "--layer", "projector"]
    yield "CUDA devices here", [resnet18, photos, "--device", "cuda:99"]
    yield "expected auto, cpu or cuda", [resnet18, photos, "--device", "tpu"]
    yield "'-3' is not a number", [z, "--limit=-3"]
    yield "'2' is not a number in 0..1", [z, "--threshold", "2"]
    yield "'x' is not a number", [resnet18, photos, "--workers", "x"]
    yield "invalid choice", [z, "--method", "svd"]
    yield "a plot is .png or .pdf", [z, "--plot", folder / "s.jpg"]
    yield "is the input", [z, "--out", z, "--force"]
    yield "is a folder", [z, "--out", folder, "--force"]
    yield "required: SOURCE", []
    yield "--layer wants a checkpoint", [z, "--layer", "projector"]


def test_bad_input_is_one_line_exit_2_and_nothing_written(capsys, tmp_path, z, resnet18, photos):
    calls = list(bad_calls(tmp_path, z, resnet18, photos))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    for message, arguments in calls:
        out = [] if "--out" in map(str, arguments) else ["--out", tmp_path / "out.json"]
        code, text, err = run(capsys, "spectrum", *arguments, *out)
        assert code == 2, (message, err)
        assert text == ""
        assert err.startswith("collapse: ")
        assert err.count("\n") == 1
        assert message in err
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before, message


def test_existing_files_are_kept_without_force(capsys, tmp_path, z):
    out = tmp_path / "old.json"
    out.write_text("mine")
    code, _, err = run(capsys, "spectrum", z, "--out", out)
    assert code == 2
    assert "--force" in err
    assert out.read_text() == "mine"
    assert run(capsys, "spectrum", z, "--out", out, "--force")[0] == 0
    assert json.loads(out.read_text())["n"] == 500


def test_the_command_runs_as_a_module_and_prints_json_alone(z):
    result = command("spectrum", z, "--json")
    assert result.returncode == 0
    assert json.loads(result.stdout)["command"][1:] == ["spectrum", str(z), "--json"]
    assert command("--version").stdout.startswith("collapse 0.")
    assert "example: collapse spectrum" in command("spectrum", "--help").stdout
    wrong = command("spectra")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1


def test_output_into_a_closed_pipe_is_no_error(z):
    process = subprocess.Popen(
        [sys.executable, "-m", "collapse", "spectrum", str(z), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) != 1


def test_an_interrupt_ends_with_130_and_leaves_no_file(tmp_path, resnet18):
    images = tmp_path / "images"
    images.mkdir()
    for index in range(400):
        Image.new("RGB", (32, 32), (index % 256, 0, 0)).save(images / f"{index}.png")
    call = [sys.executable, "-m", "collapse", "spectrum", resnet18, images, "--out", tmp_path / "s.json"]
    terminal, end = pty.openpty()  # a bar is drawn for a terminal only
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen([str(word) for word in call], stderr=end, stdout=subprocess.DEVNULL)
    os.close(end)
    seen = b""
    while b"images/s" not in seen:  # the work has begun
        seen += os.read(terminal, 1)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # how a terminal says that its other end is closed
        while chunk := os.read(terminal, 1 << 12):
            seen += chunk
    os.close(terminal)
    assert process.wait(60) == 130
    assert b"interrupted" in seen
    assert b"Traceback" not in seen
    assert [p.name for p in tmp_path.iterdir()] == ["images"]


def test_the_result_does_not_depend_on_batches_and_workers(capsys, resnet18, photos):
    read = lambda *flags: json.loads(run(capsys, "spectrum", resnet18, photos, "--json", *flags)[1])
    one, other = read("--batch-size", "24", "--workers", "0"), read("--batch-size", "5", "--workers", "2")
    above = np.array(one["singular_values"]) > one["floor"]
    np.testing.assert_allclose(
        np.array(one["singular_values"])[above], np.array(other["singular_values"])[above], rtol=1e-4
    )


def test_arrays_need_no_torch(z):
    program = (
        "import sys, collapse.cli; collapse.cli.main(['spectrum', sys.argv[1]]); sys.exit('torch' in sys.modules and 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, z], stdout=subprocess.DEVNULL, timeout=60).returncode == 0


def test_inspect_tells_where_every_tensor_went(resnet18, capsys, tmp_path):
    code, out, _ = run(capsys, "inspect", resnet18, "--json", "--out", tmp_path / "r.json")
    assert code == 0
    document = json.loads(out)
    assert document == json.loads((tmp_path / "r.json").read_text())
    assert document["schema"] == "collapse.checkpoint/1"
    assert (document["architecture"], document["feature_dim"], document["projector"]) == ("resnet18", 512, None)
    assert document["keys"]["dropped_by"] == {"classifier": 2}
    assert document["keys"]["loaded"] + 2 == len(torch.load(resnet18))
    code, out, _ = run(capsys, "inspect", resnet18)
    assert "2 as classifier" in out
    assert run(capsys, "inspect", resnet18, "--out", tmp_path / "r.json")[0] == 2


def test_embed_writes_the_rows_of_the_images_that_can_be_read(resnet18, photos, capsys, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(photos, folder)
    broken = next(path for path in (folder / "class0").iterdir() if path.stem == "04")
    broken.write_bytes(b"no image")
    call = ["embed", resnet18, folder, "--out", tmp_path / "z.npy", "--resize", 40, "--crop", 32, "--batch-size", 5]
    code, out, _ = run(capsys, *call, "--workers", 0)
    assert code == 0
    assert "23 x 512; 1 images were skipped" in out
    z, names = np.load(tmp_path / "z.npy"), (tmp_path / "z.txt").read_text().splitlines()
    assert (z.shape, z.dtype, len(names)) == ((23, 512), np.float32, 23)
    net = collapse.load(resnet18, resize=40, crop=32)
    for index in (0, 4, 22):
        with torch.no_grad(), Image.open(folder / names[index]) as image:
            one = net(net.preprocess(image)[None])[0]
        np.testing.assert_allclose(z[index], one, rtol=1e-4, atol=1e-5)
    document = json.loads((tmp_path / "z.json").read_text())
    assert (document["shape"], document["images"]["skipped"][0]["path"]) == ([23, 512], str(broken))
    assert collapse.spectrum(tmp_path / "z.npy").n == 23
    assert run(capsys, *call)[0] == 2
    assert run(capsys, *call[:4], tmp_path / "y.npy", "--strict", "--workers", 0)[0] == 2
    assert not list(tmp_path.glob("*y.*"))


def complete(line, tmp_path):
    """What the shell is offered after `line`."""
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "offers")}
    env = {**os.environ, "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", **asked}
    script = "import sys; sys.argv = ['collapse']; from collapse.cli import main; main()"
    subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, check=True, timeout=60)
    return [offer.strip() for offer in (tmp_path / "offers").read_text().splitlines()]


def test_the_shell_completes_commands_flags_values_and_files(tmp_path):
    (tmp_path / "weights.pth").touch()
    assert complete("collapse sp", tmp_path) == ["spectrum"]
    assert complete("collapse spectrum --me", tmp_path) == ["--method", "--mean"]
    assert complete("collapse spectrum --method ", tmp_path) == ["auto", "covariance", "qr", "float32"]
    assert complete("collapse inspect wei", tmp_path) == ["weights.pth"]


def test_numbers_of_channels_end_where_what_follows_is_none():
    flags = ["--mean", "0.5", "-1", "2e0", "--std", "1", "1", "1"]
    for words in (["spectrum", *flags, "net.pth", "photos"], ["spectrum", "net.pth", "photos", *flags]):
        found = cli.parser().parse_args(words)
        assert (found.mean, found.std, str(found.source)) == ([0.5, -1, 2], [1, 1, 1], "net.pth")
    with pytest.raises(collapse.InputError, match=r"argument --mean: 'net\.pth' is no number"):
        cli.parser().parse_args(["spectrum", "--mean", "net.pth", "photos"])
    assert cli.parser().parse_args(["spectrum", "net.pth", "--mean=.1 .2"]).mean == [0.1, 0.2]


@pytest.mark.parametrize(("delay", "shown"), [(0, "0/64"), (60, "")])
def test_the_bar_of_images_is_there_before_the_first_batch_is_done(monkeypatch, delay, shown):
    """A diagnosis looks at its first batch several times, which took 40 s of silence with a ResNet-50."""
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    next(progress(iter([range(64)]), "images", 64, delay))
    assert shown in screen.getvalue()
    assert bool(screen.getvalue()) == bool(shown)


def test_a_terminal_says_at_once_that_it_loads_and_clears_it_for_what_comes(monkeypatch):
    """Torch alone took 6 s of silence, and a refusal as long."""
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    wait("loading ...")
    assert screen.getvalue() == ""  # a file is no terminal
    screen.isatty = lambda: True
    wait("loading ...")
    tell("wrote z.json")
    tell("wrote z.png")
    assert screen.getvalue() == f"loading ...\r{' ' * 11}\rwrote z.json\nwrote z.png\n"
