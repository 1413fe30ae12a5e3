"""CLIP's tokens, with placeholders for the words that textual inversion learns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 49_408  # CLIP's tokens; the rows of learned words have the ids from here on
START = 49_406
END = 49_407  # also fills a prompt up to its length, as in Stable Diffusion v1


@cache
def byte_pairs() -> Any:
    """CLIP's byte-pair encoding, which open_clip brings along; texts are put in lower case."""
    from open_clip.tokenizer import SimpleTokenizer  # takes a few seconds to import

    return SimpleTokenizer(clean="lower")


def whole_word(word: str) -> str:
    """A pattern of a word; where it begins or ends with a letter, it is no part of a longer one."""
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w$", word) else ""
    return before + re.escape(word) + after


class Tokenizer:
    """Makes token ids of prompts, in which each learned word has ids of its own.

    CLIP would split "<new1>" into <, new, 1 and >. So placeholders are cut out of the text before
    anything else, and only the text between them is encoded.
    """

    def __init__(self, length: int, words: Mapping[str, int] | None = None) -> None:
        """`length` is the number of tokens of a prompt, 77 for Stable Diffusion.

        `words` maps each learned word, such as "<new1>", to the number of its vectors. The ids of
        the first one start at VOCABULARY, those of the next one follow.
        """
        self.length = length
        self.ids: dict[str, list[int]] = {}
        first = VOCABULARY
        for word, count in (words or {}).items():
            self.ids[word] = list(range(first, first + count))
            first += count
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(whole_word(word) for word in longest_first))

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start, end and filling."""
        if not self.ids:
            return byte_pairs().encode(text)
        ids = []
        position = 0
        for match in self.pattern.finditer(text):
            ids += byte_pairs().encode(text[position : match.start()])
            ids += self.ids[match.group()]
            position = match.end()
        return ids + byte_pairs().encode(text[position:])

    def is_too_long(self, text: str) -> bool:
        """Whether the end of the text is cut off."""
        return len(self.encode(text)) > self.length - 2

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Ids, int64 (texts, length): start, text, end, and the end again up to the length.

        A text that is too long loses its last tokens.
        """
        rows = []
        for text in texts:
            ids = [START, *self.encode(text)[: self.length - 2], END]
            rows.append(ids + [END] * (self.length - len(ids)))
        return torch.tensor(rows)
