"""Tokenisers: tokenizer.json, or BERT's vocab.txt, read as data by the package tokenizers, which fetches nothing.

A pattern in tokenizer.json with a group that repeats is refused, since a short text could keep it busy for ever.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from collapse import InputError
from collapse.files import limits
from collapse.files.containers import first_line
from collapse.files.descriptor import opened

REPEATED = re.compile(r"(?<!\\)\)[*+{]")
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def read(folder: Path, config: dict[str, Any]) -> Any:
    """The tokenizers.Tokenizer of a folder, without padding or truncation; config: its tokenizer_config.json.

    Raises InputError: the package is missing, no such file, one that is damaged or not read.
    """
    path = next((folder / name for name in ("tokenizer.json", "vocab.txt") if (folder / name).is_file()), None)
    if path is None:
        raise InputError(
            f"{folder}: has no tokenizer.json or vocab.txt; write one with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers"
        )
    with opened(path) as file:
        if file.size > limits.JSON:
            raise InputError(f"{path}: {file.size} bytes; at most {limits.JSON} are read")
        data = file.read(0, file.size)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is no UTF-8") from error
    made = _of_json(path, text, config) if path.suffix == ".json" else _of_words(path, text, config)
    made.no_padding()
    made.no_truncation()
    return made


def _of_json(path: Path, text: str, config: dict[str, Any]) -> Any:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({first_line(error)})") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: holds no JSON object")
    for pattern in _patterns({name: part for name, part in document.items() if name not in ("model", "added_tokens")}):
        if not isinstance(pattern, str) or len(pattern) > limits.PATTERN or REPEATED.search(pattern):
            raise InputError(f"{path}: a pattern in which a group repeats, which could run for ever; refused")
    normalizer = document.get("normalizer")
    if isinstance(normalizer, dict) and normalizer.get("type") == "BertNormalizer":
        _as_configured(normalizer, config)
        text = json.dumps(document)
    return _made(path, lambda tokenizers: tokenizers.Tokenizer.from_str(text))


def _as_configured(normalizer: dict[str, Any], config: dict[str, Any]) -> None:
    """tokenizer_config.json's word on case and accents counts, as in transformers."""
    for ours, theirs in (
        ("lowercase", "do_lower_case"),
        ("strip_accents", "strip_accents"),
        ("handle_chinese_chars", "tokenize_chinese_chars"),
    ):
        if isinstance(config.get(theirs), bool):
            normalizer[ours] = config[theirs]


def _patterns(value: Any, depth: int = 0) -> Iterator[Any]:
    """Every regular expression below a part of tokenizer.json."""
    if depth > 20:
        raise InputError("tokenizer.json: nested without end; refused")
    if isinstance(value, dict):
        if "Regex" in value:
            yield value["Regex"]
        for part in value.values():
            yield from _patterns(part, depth + 1)
    elif isinstance(value, list):
        for part in value:
            yield from _patterns(part, depth + 1)


def _of_words(path: Path, text: str, config: dict[str, Any]) -> Any:
    """BERT's tokeniser of a list of pieces of words, one a line."""
    words = {word: index for index, word in enumerate(text.removesuffix("\n").split("\n"))}
    missing = [word for word in BERT if word not in words]
    if missing:
        raise InputError(f"{path}: is no vocabulary of BERT, has no {missing[0]}; a tokenizer.json is wanted beside it")
    lower = config.get("do_lower_case", True)
    options = {"strip_accents": config.get("strip_accents"), "lowercase": lower is not False}
    return _made(
        path, lambda tokenizers: tokenizers.implementations.BertWordPieceTokenizer(vocab=words, **options)._tokenizer
    )


def _made(path: Path, make: Any) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(f"{path}: is read by the package tokenizers; pip install tokenizers") from error
    try:
        made = make(tokenizers)
        made.encode("a \U0010fffd")  # some fail only at a character that they do not know
        return made
    except BaseException as error:  # what is wrong in a file may end in a panic, which is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        first = str(error).partition("\n")[0][:200]
        raise InputError(f"{path}: is no tokeniser ({first})") from error
