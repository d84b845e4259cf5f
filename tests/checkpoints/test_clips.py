"""Encoders of clips: each as transformers computes it; arrays, folders of frames, and what is refused."""

import layouts_clips
import layouts_sounds
import layouts_texts
import numpy as np
import pytest
import torch
from layouts_clips import FRAMES, ROWS, SIZE
from PIL import Image
from test_texts import off

import collapse
from collapse import InputError, cli


def clips(frames=FRAMES):
    """(5, frames, 3, h, w) uint8."""
    return torch.randint(
        0, 256, (5, frames, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def written(folder, frames=FRAMES, size=SIZE):
    """Folders of frames, of which every other one is in `clips`."""
    held = clips()
    for number, clip in enumerate(held):
        (folder / f"c{number}").mkdir(parents=True)
        for place in range(2 * frames - 1):
            pixels = clip[place // 2].permute(1, 2, 0).numpy()
            Image.fromarray(pixels if place % 2 == 0 else pixels * 0).save(folder / f"c{number}/{place:03d}.png")
    return held


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videomae")
    return folder, layouts_clips.videomae(folder)


@pytest.mark.parametrize("one", ROWS, ids=lambda one: one.write.__name__)
def test_embeddings_of_clips_are_those_of_the_project(tmp_path, one):
    reference = one.write(tmp_path)
    with torch.no_grad():
        expected = reference(clips() / 255)
    assert off(collapse.embed(tmp_path, clips(), batch_size=32), expected) < 1e-4
    report = collapse.inspect(tmp_path)
    assert report.keys["unknown"] == 0
    assert report.preprocessing["frames"] == FRAMES
    assert (report.preprocessing["crop"], report.preprocessing["mean"]) == (SIZE, (0.485, 0.456, 0.406))
    assert len(collapse.layer_spectra(tmp_path, clips().numpy())) == 3


def test_a_pretrained_videomae_is_the_mean_of_its_patches(tmp_path):
    reference = layouts_clips.videomae(tmp_path, fine_tuned=False)
    with torch.no_grad():
        assert off(collapse.embed(tmp_path, clips()), reference(clips() / 255)) < 1e-4


def test_clips_texts_and_sounds_go_through_bf16(tmp_path, seen):
    exact = collapse.embed(seen[0], clips())
    assert 1e-4 < off(collapse.embed(seen[0], clips(), precision="bf16"), exact) < 0.3
    for kind, given in (
        (layouts_texts.bare_encoder, layouts_texts.TEXTS),
        (layouts_sounds.wave, layouts_sounds.sounds()),
    ):
        (tmp_path / kind.__name__).mkdir()
        kind(tmp_path / kind.__name__)
        exact = collapse.embed(tmp_path / kind.__name__, given)
        assert 1e-4 < off(collapse.embed(tmp_path / kind.__name__, given, precision="bf16"), exact) < 0.3


def test_folders_of_frames_are_clips(tmp_path, seen, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held = written(tmp_path / "in")
    rows = collapse.embed(seen[0], held)
    np.testing.assert_allclose(collapse.embed(seen[0], "in"), rows, atol=1e-5)
    (tmp_path / "in/c3/000.png").write_bytes(b"no image")
    for place in range(1, 5):
        (tmp_path / f"in/c1/{place:03d}.png").unlink()
    found = collapse.spectrum(seen[0], "in")
    assert found.n == 3
    assert [entry["path"] for entry in found.images["skipped"]] == ["in/c1", "in/c3"]
    assert found.images["skipped"][0]["why"] == "3 frames; the network takes 4"
    assert cli.main(["embed", str(seen[0]), "in", "--out", "z.npy"]) == 0
    assert (tmp_path / "z.txt").read_text().split() == ["c0", "c2", "c4"]
    np.testing.assert_allclose(np.load("z.npy"), rows[[0, 2, 4]], atol=1e-5)
    assert collapse.spectrum(seen[0], "in", limit=3).n == 2
    assert cli.main(["report", str(seen[0]), "in", "--out", "r.html"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (torch.zeros(3, 3, SIZE, SIZE), {}, r"clips: a batch of shape"),
        (torch.zeros(3, 6, 3, SIZE, SIZE), {}, "takes no clips of 6 x 3 x 32 x 32"),
        (torch.zeros(3, 4, 3, SIZE, SIZE), {"pool": "cls"}, "pool=: an encoder of clips"),
        ("flat", {}, "a folder is one clip"),
    ],
)
def test_calls_that_are_refused(tmp_path, seen, monkeypatch, given, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save("flat/a.png")
    with pytest.raises(InputError, match=message):
        collapse.spectrum(seen[0], given, **options)


def test_a_diagnosis_is_not_made_of_clips(seen):
    with pytest.raises(InputError, match="an encoder of clips has no views yet"):
        collapse.diagnose(seen[0], clips())


def test_what_lies_around_v_jepa_is_told(tmp_path):
    import transformers

    config = transformers.VJEPA2Config(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, crop_size=SIZE, frames_per_clip=FRAMES,
        pred_hidden_size=48, pred_num_attention_heads=4, pred_num_hidden_layers=1, num_pooler_layers=1,
    )  # fmt: skip
    transformers.VJEPA2ForVideoClassification(config).save_pretrained(tmp_path)
    report = collapse.inspect(tmp_path)
    assert report.keys["unknown"] == 0
    assert report.keys["dropped"] > 10
