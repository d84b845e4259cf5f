"""Sentences of README and docs are short: at most 30 words, and on a page at most a tenth have over 22."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST, LONG, SHARE = 30, 22, 0.1
NOT_PROSE = (
    r"(?s)```.*?```",  # code
    r"(?m)^ {4,}\S.*$",
    r"(?m)^\|.*$",  # tables
    r"(?m)^#+ .*$",  # headings
    r"(?m)^::: .*$",  # names of the reference
    r"!\[[^\]]*\]\([^)]*\)",  # pictures
)


def sentences(text):
    """The sentences of a page's prose; a piece of code counts as one word, and an item of a list ends where it ends."""
    for pattern in NOT_PROSE:
        text = re.sub(pattern, " ", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    blocks = re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", text)
    found = [s for block in blocks for s in re.split(r"(?<=[.!?:])[*_]*\s+(?=[*_]*[A-Z(0-9])", " ".join(block.split()))]
    return [s for s in found if len(s.split()) > 2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_short(page):
    found = sentences(page.read_text())
    too_long = [s for s in found if len(s.split()) > MOST]
    assert not too_long, f"{len(too_long)} sentences of over {MOST} words, as: {too_long[0]}"
    long = [s for s in found if len(s.split()) > LONG]
    assert len(long) <= max(1, SHARE * len(found)), f"{len(long)} of {len(found)} have over {LONG} words, as: {long[0]}"


def test_the_measure_sees_a_long_sentence_and_leaves_code_alone():
    assert [
        len(s.split()) for s in sentences("One two three. " + "Word " * 31 + "end.\n\n```\n" + "x " * 99 + "\n```")
    ] == [3, 32]
    assert sentences("| " + "cell " * 40 + "|\n") == []
    assert len(sentences("- One two three\n- four five six. Seven eight nine")) == 3
