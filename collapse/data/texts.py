"""Texts for a network: pieces of words by number, as many as the network reads, and where a text ends."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from collapse import InputError


@dataclass(frozen=True)
class Words:
    """How a network wants its texts; what `Preprocessing` is to images.

    tokenizer: tokenizers.Tokenizer.  max_length: pieces of a text that are read, marks of its ends included.
    vocabulary: pieces that the network knows.  prompt: put before each text.  lowercase: first of all.
    pooling: how the pieces become one vector.  padding: the number of the piece that fills up.
    path: the tokeniser's folder, for errors.
    """

    tokenizer: Any = field(repr=False)
    max_length: int
    vocabulary: int
    pooling: str
    prompt: str = ""
    lowercase: bool = False
    padding: int = 0
    path: str = ""

    takes = "texts"

    def __call__(self, text: str) -> Tensor:
        """One text as the network takes it: (2, t) int64, pieces and ones."""
        return self.batch([text])[0][0]

    def batch(self, texts: Sequence[str], first: int = 0) -> tuple[Tensor, int]:
        """((n, 2, t) int64: pieces, and 1 where there is one; how many of the texts are longer than max_length).

        first: the number of the first text, for an error.

        Raises InputError: a text without a piece, or with one that the tokeniser or the network does not know.
        """
        texts = [self.prompt + (text.lower() if self.lowercase else text) for text in texts]
        try:
            encodings = self.tokenizer.encode_batch(texts)
        except Exception as error:  # a vocabulary without the pieces that it names itself
            raise InputError(f"{self.path}: the tokeniser takes no such texts ({str(error)[:200]})") from error
        made = torch.zeros(
            len(encodings), 2, max((len(encoding.ids) for encoding in encodings), default=0), dtype=torch.int64
        )
        made[:, 0] = self.padding
        for row, encoding in enumerate(encodings):
            if not encoding.ids:
                raise InputError(f"text {first + row + 1}: gives no piece of a word; leave it out")
            made[row, :, : len(encoding.ids)] = torch.tensor([encoding.ids, [1] * len(encoding.ids)])
        largest = int(made[:, 0].max())
        if largest >= self.vocabulary:
            raise InputError(
                f"{self.path}: the tokeniser gives piece {largest}, and the network knows {self.vocabulary}; "
                "are both of one folder?"
            )
        return made, sum(bool(encoding.overflowing) for encoding in encodings)

    def normalize(self, pieces: Tensor) -> Tensor:
        """The pieces, of any shape, as they are."""
        return pieces

    def as_dict(self) -> dict[str, Any]:
        """For a report."""
        return {
            "max_length": self.max_length,
            "pooling": self.pooling,
            "prompt": self.prompt,
            "lowercase": self.lowercase,
        }
