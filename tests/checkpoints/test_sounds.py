"""Encoders of sounds: each as transformers computes it, one sound at a time; files of sounds; what is refused."""

import json

import layouts_sounds
import numpy as np
import pytest
import torch
from layouts_sounds import RATE, ROWS, sounds, waves
from scipy.io import wavfile
from test_texts import off

import collapse
from collapse import InputError, cli
from collapse.checkpoints.sounds import WAVES
from collapse.files import sounds as files


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wav2vec2")
    return folder, waves(folder, "wav2vec2")


@pytest.mark.parametrize("one", ROWS, ids=lambda one: one.write.__name__)
def test_embeddings_of_sounds_are_those_of_the_project(tmp_path, one):
    reference = one.write(tmp_path)
    given = sounds()
    assert off(collapse.embed(tmp_path, given), reference(given)) < 1e-4
    report = collapse.inspect(tmp_path)
    assert report.keys["unknown"] == 0
    assert report.preprocessing["sampling_rate"] == RATE
    assert len(collapse.layer_spectra(tmp_path, given)) == 3


@pytest.mark.parametrize("kind", WAVES)
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_every_kind_that_takes_samples(tmp_path, kind, norm):
    more = {} if kind == "data2vec-audio" else {"feat_extract_norm": norm, "do_stable_layer_norm": norm == "layer"}
    reference = waves(tmp_path, kind, **more)
    assert off(collapse.embed(tmp_path, sounds()), reference(sounds())) < 1e-4


def written(folder, rate=RATE):
    """The sounds as 16-bit WAV files, and what these hold."""
    held = []
    for number, samples in enumerate(sounds(rate)):
        whole = np.round(samples * 32767).astype(np.int16)
        wavfile.write(folder / f"{number}.wav", rate, whole)
        held.append(whole / np.float32(32768))
    return held


def test_files_of_every_width_give_the_same(tmp_path):
    samples = sounds()[0]
    kinds = {
        "a": samples,
        "b": np.round(samples * 32767).astype(np.int16),
        "c": np.round(samples * 2147480000).astype(np.int32),
        "d": np.round(samples * 127 + 128).astype(np.uint8),
        "e": samples.astype(np.float64),
    }
    for name, held in kinds.items():
        wavfile.write(tmp_path / f"{name}.wav", RATE, held)
        rate, found = files.read(tmp_path / f"{name}.wav")
        assert rate == RATE
        np.testing.assert_allclose(found, samples, atol={"b": 1e-4, "d": 1e-2}.get(name, 1e-6))
    wavfile.write(tmp_path / "two.wav", RATE, np.stack([samples, -samples / 2], 1))
    np.testing.assert_allclose(files.read(tmp_path / "two.wav")[1], samples / 4, atol=1e-6)


def test_a_rate_is_made_the_networks(tmp_path, heard):
    t = np.arange(48_000) / 48_000
    high = files.resampled(np.sin(2 * np.pi * 1000 * t).astype(np.float32), 48_000, RATE)
    expected = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    np.testing.assert_allclose(high[100:-100], expected[100:-100], atol=2e-3)
    for rate in (48_000, 11_025):
        held = written(tmp_path, rate)
        expected = heard[1]([files.resampled(one, rate, RATE) for one in held])
        assert off(collapse.embed(heard[0], tmp_path), expected) < 1e-4


def test_flac_is_read_by_soundfile(tmp_path, heard, monkeypatch):
    import soundfile

    held = written(tmp_path)
    rows = collapse.embed(heard[0], tmp_path)
    for number, samples in enumerate(held):
        soundfile.write(tmp_path / f"{number}.flac", samples, RATE, subtype="PCM_16")
        (tmp_path / f"{number}.wav").unlink()
    np.testing.assert_array_equal(collapse.embed(heard[0], tmp_path), rows)
    (tmp_path / "0.flac").write_bytes((tmp_path / "0.flac").read_bytes()[:300])
    assert len(collapse.embed(heard[0], tmp_path)) == 4
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(InputError, match="pip install soundfile"):
        collapse.embed(heard[0], tmp_path)


BAD = {
    "text.wav": (b"a text", "is no WAV or FLAC by its first bytes"),
    "ogg.flac": (b"OggS" + bytes(60), "is no WAV or FLAC by its first bytes"),
    "cut.wav": (b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0", "is no WAV that can be read"),
    "nothing.wav": (b"", "is empty"),
    "channels.wav": (
        b"RIFF\x2c\0\0\0WAVEfmt \x10\0\0\0\1\0\0\0\x80\x3e\0\0\0\0\0\0\0\0\x10\0data\4\0\0\0abcd",
        "is no WAV",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_sound_is_skipped_and_told(tmp_path, heard, name):
    content, why = BAD[name]
    written(tmp_path)
    (tmp_path / name).write_bytes(content)
    (tmp_path / "notes.txt").write_text("a")
    found = collapse.spectrum(heard[0], tmp_path)
    assert found.n == 5
    assert [entry["path"] for entry in found.images["skipped"]] == [str(tmp_path / name)]
    assert why in found.images["skipped"][0]["why"]
    assert "1 files are no sounds by their names, first 'notes.txt'; left out" in found.warnings
    with pytest.raises(InputError, match=why):
        collapse.spectrum(heard[0], tmp_path, strict=True)


def test_long_and_short_sounds(tmp_path, heard):
    layouts_sounds.ast(tmp_path)
    rows = collapse.layer_spectra(tmp_path, sounds(seconds=(1, 2, 0.5)), layers=["representation"])["representation"]
    assert "2 of 3 sounds are longer than 0.655 s and were cut" in rows.warnings
    with pytest.raises(InputError, match="sound 2: 30 samples at 16000 a second; the network takes 165 or more"):
        collapse.embed(heard[0], [np.ones(4000, np.float32), np.ones(30, np.float32)])


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([np.ones(4000, np.int16)], {}, "expected .t,. float in -1..1"),
        ([np.full(4000, np.nan)], {}, "NaN"),
        (torch.ones(3, 2, 4000), {}, r"shape \(2, 4000\)"),
        ([np.ones(4000, np.float32)], {"pool": "cls"}, "pool=: an encoder of sounds"),
        ("absent", {}, "is no folder of sounds"),
    ],
)
def test_calls_that_are_refused(heard, given, options, message):
    with pytest.raises(InputError, match=message):
        collapse.spectrum(heard[0], given, **options)


def test_features_that_cannot_be_are_refused(tmp_path):
    layouts_sounds.whisper(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    about = json.loads(path.read_text())
    for change, message in (
        ({"sampling_rate": 0}, "sampling_rate is 0"),
        ({"n_fft": "a"}, "n_fft is 'a'"),
        ({"hop_length": -3}, "hop_length is -3"),
        ({"feature_size": 7}, "takes no sounds"),
    ):
        path.write_text(json.dumps({**about, **change}))
        with pytest.raises(InputError, match=message):
            collapse.load(tmp_path)


def test_values_of_which_no_network_can_be_are_refused(tmp_path):
    layouts_sounds.whisper(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": 9999}))
    with pytest.raises(InputError, match="no whisper can be of these values"):
        collapse.load(tmp_path)


def test_the_older_names_of_the_weight_norm_are_read(tmp_path):
    from safetensors.torch import load_file, save_file

    reference = waves(tmp_path, "hubert")
    held = load_file(tmp_path / "model.safetensors")
    names = {".parametrizations.weight.original0": ".weight_g", ".parametrizations.weight.original1": ".weight_v"}
    old = {}
    for key, tensor in held.items():
        end = next((end for end in names if key.endswith(end)), None)
        old[f"hubert.{key.removesuffix(end or '')}{names.get(end, '')}"] = tensor
    assert "hubert.encoder.pos_conv_embed.conv.weight_g" in old
    save_file({**old, "lm_head.weight": torch.ones(9, 32)}, tmp_path / "model.safetensors", {"format": "pt"})
    assert off(collapse.embed(tmp_path, sounds()), reference(sounds())) < 1e-4
    assert collapse.inspect(tmp_path).keys["dropped"] == 1


def test_fused_clap_is_the_same_whatever_chance_says(tmp_path):
    reference = layouts_sounds.clap(tmp_path, fusion=True)
    assert off(collapse.embed(tmp_path, sounds()), reference(sounds())) < 1e-4
    long = sounds(seconds=(2.5, 1.7))
    np.testing.assert_array_equal(
        collapse.embed(tmp_path, long), collapse.embed(tmp_path, [one[:RATE] for one in long])
    )


def quieter(samples, rng):
    return samples * rng.uniform(0.2, 1) + 0.01 * rng.standard_normal(len(samples)).astype(np.float32)


def test_a_diagnosis_and_the_commands(tmp_path, heard, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    held = written(tmp_path / "in")
    net = str(heard[0])
    found = collapse.diagnose(net, "in", augmentations=quieter, views=2)
    assert found.provenance["images"]["count"] == 5
    for number, samples in enumerate(held):
        for view in range(2):
            made = quieter(samples.copy(), np.random.default_rng([0, number, view]))
            wavfile.write(f"{number}_{view}.wav", RATE, made.astype(np.float32))
    (tmp_path / "views.jsonl").write_text("\n".join(json.dumps([f"{n}_0.wav", f"{n}_1.wav"]) for n in range(5)))
    assert cli.main(["diagnose", net, "--views-file", "views.jsonl", "--out", "d.json"]) == 0
    same = collapse.Diagnosis.load("d.json")
    for one, other in zip(found.blocks, same.blocks, strict=True):
        np.testing.assert_allclose(one.signal_fraction, other.signal_fraction, atol=1e-3)
    assert cli.main(["embed", net, "in", "--out", "z.npy"]) == 0
    assert (tmp_path / "z.txt").read_text().split() == [f"{n}.wav" for n in range(5)]
    assert cli.main(["spectrum", net, "in", "--layer", "all"]) == 0
    assert cli.main(["report", net, "in", "--out", "r.html"]) == 0
    assert cli.main(["embed", net, "in", "--out", "in/0.wav"]) == 2
    capsys.readouterr()
