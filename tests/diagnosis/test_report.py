"""The page about a checkpoint: its numbers are those of the calls, it stands alone, its headline follows a rule."""

import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from processes import ended
from torch import nn

import collapse
from collapse import cli
from collapse.diagnosis import onepage


class Read(HTMLParser):
    """Tables as rows of texts, titles of dots, and whatever a page would fetch."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.titles, self.fetched, self.open, self.headline = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.open.append((tag, given.get("class", "") or ""))
        self.fetched += [given[k] for k in ("src", "href") if given.get(k) and not given[k].startswith("data:")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("meta", "img", "br", "link"):
            self.open.pop()

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        tags = [tag for tag, _ in self.open]
        if tags and tags[-1] in ("td", "th"):
            self.rows[-1].append(data)
        if tags and tags[-1] == "title" and "svg" in tags:
            self.titles.append(data)
        if any("headline" in kind for _, kind in self.open):
            self.headline += data


def network(rank=8):
    torch.manual_seed(0)
    last = nn.Linear(24, 8, bias=False)
    with torch.no_grad():
        last.weight[:] = torch.randn(8, rank) @ torch.randn(rank, 24)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 24), nn.Tanh(), last).eval()


def images(n=200):
    return torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(1))


HOW = {"views": 2, "crop": 12}


@pytest.fixture
def made(tmp_path):
    other = collapse.spectrum(np.random.default_rng(0).standard_normal((300, 8)))
    other.save(tmp_path / "before.json")
    path = collapse.report(network(), images(), tmp_path / "page.html", against=[tmp_path / "before.json"], **HOW)
    return path, Read(path.read_text()), other


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_its_numbers_are_those_of_the_calls(made):
    _, page, other = made
    found = collapse.spectrum(network(), images())
    rows = {row[0]: row[1:] for row in page.rows if row}
    for name in ("effective_rank", "rankme", "stable_rank", "mean_cosine"):
        assert rows[name][:2] == [f"{found.metrics()[name]:.4g}", f"{other.metrics()[name]:.4g}"]
    told = [t for t in page.titles if t.startswith("this network: singular value")]
    values = [float(t.split(" is ")[1]) for t in told]
    np.testing.assert_allclose(values, found.singular_values, rtol=1e-3)
    assert any(f"effective rank {found.effective_rank:.2f}" in title for title in page.titles)
    layers = collapse.layer_spectra(network(), images())
    assert [row[0] for row in page.rows if row and row[0] in layers][: len(layers)] == list(layers)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_needs_nothing_else(made):
    path, page, _ = made
    assert page.fetched == []
    text = path.read_text()
    assert "of <code>collapse references</code>." in text
    assert not re.search(r"https?://|@import|url\(", text.replace("http://www.w3.org", ""))
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
HOVER = """<script>
const dot = document.querySelectorAll("svg.spectrum circle")[2], box = dot.getBoundingClientRect();
const where = {clientX: (box.left + box.right) / 2, clientY: (box.top + box.bottom) / 2, bubbles: true};
document.querySelector("svg.spectrum").dispatchEvent(new MouseEvent("mousemove", where));
const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
document.body.dataset.said = `${document.getElementById("value").textContent}; wider than its window: ${wide}`;
</script>"""


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_numbers_and_reads_the_value_under_the_mouse(made, tmp_path, width):
    """In Chromium, where there is one; else the page as it is written."""
    path, page, _ = made
    (tmp_path / "hovered.html").write_text(path.read_text().replace("</body>", f"{HOVER}</body>"))
    call = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},900", "--dump-dom", (tmp_path / "hovered.html").as_uri()]  # fmt: skip
    text = ended(call).stdout if BROWSER else path.read_text()
    shown = Read(text)
    assert shown.headline.split() == page.headline.split() != []
    assert {row[0]: row[1:] for row in shown.rows if row}["effective_rank"] == next(
        row[1:] for row in page.rows if row and row[0] == "effective_rank"
    )
    assert shown.titles == page.titles
    if BROWSER:
        (said,) = re.findall(r'data-said="(.*?)"', text)
        assert said == f"{page.titles[2]}; wider than its window: false"


@pytest.mark.parametrize(
    ("net", "n", "colour", "words"),
    [
        (network(), 200, "green", "No dimensional collapse: 0 of 8"),
        (network(6), 200, "amber", "Some dimensions are collapsed: 2 of 8"),
        (network(4), 200, "amber", "4 of 8"),
        (network(3), 200, "red", "Dimensional collapse: 5 of 8"),
        (network(1), 200, "red", "Complete collapse: effective rank 1.0 of 8"),
        (network(), 8, "unknown", "Cannot tell: 8 images can show at most 7 of 8 directions. "),
        (network(), 9, "green", "No dimensional collapse"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_headline_follows_its_rule(tmp_path, net, n, colour, words):
    text = collapse.report(net, images(n), tmp_path / "page.html", **HOW).read_text()
    assert f'class="headline {colour}"' in text
    assert words.strip() in Read(text).headline


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_command_writes_the_page_and_keeps_what_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(432, 5))\n"
    )
    from PIL import Image

    (tmp_path / "images").mkdir()
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{index}.png")
    call = ["report", "own.py:build", "images", "--out", "page.html", "--crop", "12", "--views", "2", "--workers", "0"]
    assert cli.main(call) == 0
    said = capsys.readouterr()
    assert said.out.split() == Read((tmp_path / "page.html").read_text()).headline.split()
    assert said.err == "wrote page.html\n"
    assert "collapse diagnose own.py:build images --views 2" in (tmp_path / "page.html").read_text()
    before = (tmp_path / "page.html").read_bytes()
    assert cli.main(call) == 2
    assert "exists and is kept" in capsys.readouterr().err
    for wrong, message in [(["--out", "page.png"], "a report is .html"), (["--against", "own.py"], "own.py")]:
        assert cli.main([*call, "--force", *wrong]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "page.html").read_bytes() == before


def test_an_iterator_is_refused_for_it_is_read_twice(tmp_path):
    with pytest.raises(collapse.InputError, match="an iterator can be read once"):
        collapse.report(network(), iter([images()]), tmp_path / "page.html")


def test_names_are_shown_as_text(tmp_path):
    s = collapse.spectrum(np.random.default_rng(0).standard_normal((30, 3)))
    assert "<b>" not in onepage.drawn({"<b>": s})


def test_an_array_and_a_call_without_images_are_told_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("z.npy", np.eye(4))
    (tmp_path / "images").mkdir()
    told = (
        "collapse: z.npy: is an array; layers and causes need the network and its images. "
        "For the array: collapse spectrum z.npy --plot spectrum.png\n"
    )
    for call in (["report", "z.npy", "--out", "p.html"], ["report", "z.npy", "images", "--out", "p.html"],
                 ["diagnose", "z.npy"]):  # fmt: skip
        assert cli.main(call) == 2
        assert capsys.readouterr().err == told
    assert cli.main(["report", "own.py:build", "--out", "p.html"]) == 2
    assert capsys.readouterr().err == "collapse: IMAGES: none are given; a report takes IMAGES\n"
