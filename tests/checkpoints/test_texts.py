"""Encoders of texts: each as transformers computes it, one text at a time; files of texts; what is refused."""

import json

import layouts_texts
import numpy as np
import pytest
import torch
from layouts_texts import FROM_PADDING, ROWS, TEXTS, alone, modules, network, pooling, tokeniser

import collapse
from collapse import InputError, cli
from collapse.checkpoints.sentences import DECODERS, ENCODERS

KINDS = [(kind, False) for kind in ENCODERS] + [(kind, True) for kind in DECODERS]


def off(rows, expected):
    """The largest deviation of a row, in mean distances from the mean."""
    expected = np.asarray(expected)
    spread = np.linalg.norm(expected - expected.mean(0), axis=1).mean()
    return float(np.linalg.norm(rows - expected, axis=1).max() / spread)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tokeniser(folder)
    network(folder, "bert")
    return folder


@pytest.mark.parametrize("one", ROWS, ids=lambda one: one.write.__name__)
def test_embeddings_of_texts_are_those_of_the_project(tmp_path, one):
    reference = one.write(tmp_path)
    with torch.no_grad():
        assert off(collapse.embed(tmp_path, TEXTS, batch_size=3), reference(TEXTS)) < 1e-4
    report = collapse.inspect(tmp_path)
    assert report.keys["unknown"] == 0
    assert report.preprocessing["max_length"] == 24


@pytest.mark.parametrize(("kind", "decoder"), KINDS)
def test_every_kind_is_computed_as_by_transformers(tmp_path, kind, decoder):
    tokeniser(tmp_path, decoder)
    network(tmp_path, kind, **({"pad_token_id": 1} if kind in FROM_PADDING else {}))
    pooled = (lambda hidden: hidden[-1]) if decoder else (lambda hidden: hidden.mean(0))
    assert off(collapse.embed(tmp_path, TEXTS), alone(tmp_path, pooled)(TEXTS)) < 1e-4


WAYS = {
    "cls_token": lambda h: h[0],
    "max_tokens": lambda h: h.amax(0),
    "mean_sqrt_len_tokens": lambda h: h.sum(0) / len(h) ** 0.5,
    "weightedmean_tokens": lambda h: (h * torch.arange(1.0, len(h) + 1)[:, None]).sum(0) / sum(range(len(h) + 1)),
    "lasttoken": lambda h: h[-1],
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_pool(bert, way):
    modules(bert, "Transformer", "Pooling")
    pooling(bert, way)
    assert off(collapse.embed(bert, TEXTS), alone(bert, WAYS[way])(TEXTS)) < 1e-4
    (bert / "modules.json").unlink()


def test_configs_of_earlier_versions_give_the_same(tmp_path):
    tokeniser(tmp_path, decoder=True)
    network(tmp_path, "qwen2", rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    expected = alone(tmp_path, lambda hidden: hidden[-1])(TEXTS)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("rope_parameters")["rope_theta"] == 50
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": 50.0}))
    assert off(collapse.embed(tmp_path, TEXTS), expected) < 1e-4


def test_other_networks_around_the_encoder_are_told(tmp_path):
    from transformers import AutoModelForMaskedLM, BertConfig

    tokeniser(tmp_path)
    AutoModelForMaskedLM.from_config(BertConfig(**layouts_texts.SMALL, vocab_size=400)).save_pretrained(tmp_path)
    report = collapse.inspect(tmp_path)
    assert report.keys["dropped"] > 3
    assert report.branch == "bert"
    assert off(collapse.embed(tmp_path, TEXTS), alone(tmp_path, lambda hidden: hidden.mean(0))(TEXTS)) < 1e-4


def test_a_network_in_a_folder_of_its_own_and_the_newer_words_for_pooling(tmp_path):
    modules(tmp_path, "Transformer", "Pooling")
    entries = json.loads((tmp_path / "modules.json").read_text())
    entries[0]["path"] = "0_Transformer"
    (tmp_path / "modules.json").write_text(json.dumps(entries))
    inner = tmp_path / "0_Transformer"
    tokeniser(inner)
    network(inner, "bert")
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps({"embedding_dimension": 32, "pooling_mode": "max"}))
    prompts = {"prompts": {"query": "A man "}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    expected = alone(inner, lambda hidden: hidden.amax(0))([f"A man {text}" for text in TEXTS])
    assert off(collapse.embed(tmp_path, TEXTS), expected) < 1e-4


def test_a_vocabulary_of_words_is_read_without_a_tokenizer_json(tmp_path, bert):
    words = json.loads((bert / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(words, key=words.get)) + "\n")
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((bert / name).read_bytes())
    np.testing.assert_array_equal(collapse.embed(tmp_path, TEXTS), collapse.embed(bert, TEXTS))


def test_every_layer_is_pooled_as_the_representation_is(bert):
    found = collapse.layer_spectra(bert, TEXTS, batch_size=2)
    assert list(found) == ["net.encoder.layer.0", "net.encoder.layer.1", "representation"]
    np.testing.assert_allclose(
        found["net.encoder.layer.1"].singular_values[:4], found["representation"].singular_values[:4], rtol=1e-4
    )
    pieces = collapse.load(bert).preprocess.batch(TEXTS)[0][:, 1].sum(1)
    some = collapse.layer_spectra(bert, TEXTS, layers=["net.encoder.layer.0"], positions=5)
    assert some["net.encoder.layer.0"].n == int(pieces.clamp(max=5).sum())  # no padding among the rows


def test_files_of_texts(tmp_path, bert):
    expected = collapse.embed(bert, TEXTS)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*TEXTS[:2], "", *TEXTS[2:]]).encode())
    lines = [json.dumps({"id": "x", "review": text, "stars": 3}) for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    rows = "".join(f'{i},"{text}"\n' for i, text in enumerate(TEXTS))
    (tmp_path / "a.csv").write_text(f"id,text\n{rows}")
    for source in ("a.txt", "a.jsonl:review", "b.jsonl", "a.csv:text", "a.csv"):
        np.testing.assert_array_equal(collapse.embed(bert, str(tmp_path / source)), expected)
    s = collapse.spectrum(bert, tmp_path / "a.txt", limit=4)
    assert s.images == {"path": str(tmp_path / "a.txt"), "count": 4,
                        "skipped": [{"path": f"{tmp_path / 'a.txt'}:3", "why": "blank"}]}  # fmt: skip
    assert "1 of 4 texts are longer than 24 pieces and were cut" in s.warnings
    assert "1 blank lines were skipped" in s.warnings
    assert collapse.spectrum(bert, tmp_path / "a.txt", sample=3, seed=1).n == 3


REFUSED = {
    "x.jsonl": ('{"a": "x", "b": "y"}', r"which holds the texts\? name it, as x.jsonl:NAME; there are \['a', 'b'\]"),
    "x.jsonl:c": ('{"a": "x"}', "line 1: has no field 'c'"),
    "x.jsonl:a": ('{"a": 1}', "line 1: a JSON int where a text is wanted"),
    "y.jsonl": ('{"a": "x"}\n{"a"', "line 2: is no JSON"),
    "x.csv:c": ("a,b\n1,2\n", "has no column 'c'"),
    "y.csv": ("text,b\n1,2\n3\n", "line 3: 1 fields, where the first has 2"),
    "x.txt": ("\n \n", "holds no text"),
    "y.txt": (b"\xff\xfe", "no text in UTF-8"),
    "x.png": ("a", "is no file of texts"),
    "absent.txt": (None, "no such file"),
}


@pytest.mark.parametrize("source", REFUSED)
def test_files_that_are_refused(tmp_path, bert, source):
    content, message = REFUSED[source]
    if content is not None:
        (tmp_path / source.partition(":")[0]).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        collapse.embed(bert, str(tmp_path / source))


CHANGES = {
    "config.json": [({"auto_map": {"AutoModel": "modeling_x.X"}}, "code of its own"),
                    ({"num_hidden_layers": 99}, "num_hidden_layers is 99"), ({"vocab_size": 1 << 30}, "vocab_size"),
                    ({"hidden_size": 64}, "not those of|missing or misshapen"),
                    ({"model_type": [0]}, "no known layout"), ({"num_attention_heads": 5}, "no bert can be of these")],
    "tokenizer_config.json": [({"truncation_side": "up"}, "truncation_side"),
                              ({"add_eos_token": True, "eos_token": "!"}, "puts no '!' at the end")],
    "sentence_bert_config.json": [({"max_seq_length": 1}, "at most"), ({"max_seq_length": -1}, "max_seq_length is -1")],
    "modules.json": [([{"type": "a.Transformer"}], "expected Transformer -> Pooling"), ({}, "expected a list"),
                     ([{"type": "x.CNN"}], "a module 'CNN', which is not read"),
                     ([{"type": "a.Transformer", "path": ""}, {"type": "x.Pooling", "path": "../p"}], "outside")],
    "tokenizer.json": [({"model": {}}, "is no tokeniser"),
                       ({"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "?"}}, "is no tokeniser"),
                       ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+b"}}}, "a group repeats")],
}  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), [(n, *case) for n, cases in CHANGES.items() for case in cases])
def test_folders_that_are_refused(tmp_path, bert, name, change, message):
    for path in bert.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    old = json.loads((tmp_path / name).read_text()) if (tmp_path / name).exists() else {}
    (tmp_path / name).write_text(json.dumps(change if isinstance(change, list) or not change else {**old, **change}))
    with pytest.raises(InputError, match=message):
        collapse.embed(tmp_path, TEXTS)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([1, 2], {}, "entry 0 is a int"),
        (torch.zeros(3, 3, 8, 8), {}, "entry 0 is a Tensor"),
        (["one"], {}, "1 text; a covariance"),
        (TEXTS, {"crop": 32}, "crop=: an encoder of texts"),
        (TEXTS, {"heads": 2}, "heads="),
    ],
)
def test_calls_that_are_refused(bert, texts, options, message):
    with pytest.raises(InputError, match=message):
        collapse.spectrum(bert, texts, **options)


def test_a_dense_that_does_not_follow_its_pooling_is_refused(tmp_path):
    layouts_texts.dense(tmp_path)
    pooling(tmp_path, "cls_token")
    with pytest.raises(InputError, match=r"modules\.json: a Dense of 64 numbers follows 32"):
        collapse.embed(tmp_path, TEXTS)


def test_embeddings_that_are_no_numbers_are_told(tmp_path, bert):
    tokeniser(tmp_path)
    net = network(tmp_path, "bert")
    with torch.no_grad():
        net.encoder.layer[0].output.dense.weight[0, 0] = 3e38
    net.save_pretrained(tmp_path)
    with pytest.warns(collapse.CollapseWarning, match="5 of 5 embeddings hold NaN or infinity, the first is row 1"):
        rows = collapse.embed(tmp_path, TEXTS)
    assert not np.isfinite(rows).all(1).any()
    with pytest.raises(InputError, match="row 0, column 0 is NaN or infinite"):
        collapse.spectrum(tmp_path, TEXTS)


def test_an_image_encoder_takes_no_texts():
    with pytest.raises(InputError, match=r"texts\.csv:a: are texts, and the network takes images"):
        collapse.embed(torch.nn.Flatten(), "texts.csv:a")


def test_a_tokeniser_without_a_piece_for_a_text(tmp_path):
    tokeniser(tmp_path, decoder=True)
    network(tmp_path, "qwen2", vocab_size=40)
    with pytest.raises(InputError, match="text 2: gives no piece"):
        collapse.embed(tmp_path, ["a", ""])
    with pytest.raises(InputError, match="the network knows 40"):
        collapse.embed(tmp_path, TEXTS)


def test_the_commands_take_texts(tmp_path, bert, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(TEXTS)))
    assert cli.main(["spectrum", str(bert), "a.csv:text", "--layer", "all", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 3
    assert cli.main(["embed", str(bert), "a.csv:text", "--out", "z.npy"]) == 0
    np.testing.assert_array_equal(np.load("z.npy"), collapse.embed(bert, TEXTS))
    assert (tmp_path / "z.txt").read_text().split() == ["2", "3", "4", "5", "6"]
    assert cli.main(["compare", str(bert), "z.npy", "--images", "a.csv:text", "--out", "c.json"]) == 0
    first, second = collapse.Comparison.load("c.json").rows
    assert first["effective_rank"] == pytest.approx(second["effective_rank"], rel=1e-5)
    assert cli.main(["embed", str(bert), "a.csv:text", "--out", "a.csv"]) == 2
    capsys.readouterr()
    assert cli.main(["spectrum", str(bert), "a.csv", "--pooling", "last"]) == 0
    assert cli.main(["report", str(bert), "a.csv", "--out", "r.html"]) == 0
    assert "effective rank" in (tmp_path / "r.html").read_text()


def doubled(text, rng):
    """A view: a word of the text once more."""
    words = text.split()
    words.insert(rng.integers(len(words) + 1), words[rng.integers(len(words))])
    return " ".join(words)


def test_a_diagnosis_of_texts_takes_the_callers_views(tmp_path, bert, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [f"{text} {number}" for number in range(4) for text in TEXTS]
    found = collapse.diagnose(bert, texts, augmentations=doubled, views=3, batch_size=8)
    again = [[doubled(text, np.random.default_rng([0, n, v])) for v in range(3)] for n, text in enumerate(texts)]
    (tmp_path / "views.jsonl").write_text("\n".join(map(json.dumps, again)))
    same = collapse.diagnose(bert, views_file="views.jsonl")
    assert found.provenance["images"]["count"] == same.provenance["images"]["count"] == 20
    assert found.provenance["views"] == same.provenance["views"] == 3
    for one, other in zip(found.blocks, same.blocks, strict=True):
        np.testing.assert_allclose(one.signal_fraction, other.signal_fraction, atol=1e-3)
    equal = collapse.diagnose(bert, views_file=[[text, text] for text in texts]).blocks[-1].signal_fraction
    assert np.nanmin(equal[:10]) > 0.999
    mixed = collapse.diagnose(bert, views_file=list(zip(texts, texts[7:] + texts[:7], strict=True))).blocks[-1]
    assert np.nanmean(mixed.signal_fraction[:10]) < 0.3
    assert cli.main(["diagnose", str(bert), "--views-file", "views.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"]["count"] == 20
    (tmp_path / "a.txt").write_text("\n".join(texts))
    monkeypatch.setattr("collapse.diagnosis.onepage.sections", lambda found: [])  # its drawings, which take seconds
    assert cli.main(["report", str(bert), "a.txt", "--views-file", "views.jsonl", "--out", "r.html"]) == 0
    assert "Diagnosis" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": TEXTS}, "has no views of its own"),
        ({"images": TEXTS, "views_file": [["a", "b"]]}, "leave one out"),
        ({"views_file": [["a", "b"], ["c"]]}, "entry 2 has 1 views"),
        ({"views_file": "v.jsonl"}, "line 1: a JSON str, expected a list"),
        ({"images": TEXTS, "augmentations": lambda text, rng: 3}, "gives a int of text 1"),
        ({"images": TEXTS, "augmentations": "digits"}, "no function of one of the texts"),
    ],
)
def test_views_that_are_refused(tmp_path, bert, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v.jsonl").write_text('"a"')
    with pytest.raises(InputError, match=message):
        collapse.diagnose(bert, **options)
