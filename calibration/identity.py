"""What makes two questions, images or texts the same to the check that calibration does not leak into the evaluation."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from compress.pictures import decode_image

SHINGLE = 13
"""How many words in a row are compared: GPT-3's authors looked for as many (arXiv 2005.14165, appendix C)."""

_APOSTROPHES = frozenset("'’ʼ`´")
"""What stands within a word and is often left out; other punctuation divides words."""

_UNSEEN = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0") | {chr(code) for code in range(0xFE00, 0xFE10)}
"""What nobody sees and Unicode does not count among the format characters: fillers, joiners, variation selectors."""

_HASHED, _KEPT = 32, 8
"""pHash: sides in pixels of what is transformed, and how many frequencies of each direction are kept."""

_NEAR_BITS, _NEAR_COLOUR = 10, 20
"""How far apart two images may be that look the same: bits of 64, and the most of any of 64 fields in any colour, of 255.

Copies of the demo's 112-pixel scenes as JPEG, of quality 50 or larger or smaller by half, are at most 17 apart; the nearest scenes
that differ are 29 apart, though their luminance may be the same bit by bit.
"""

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""An odd number with irregular bits, by whose powers the words of a shingle are added up."""


@dataclass(frozen=True)
class Looks:
    """What an image shows: `pixels`, the SHA-256 of its size and decoded pixels; `hashed`, 64 bits of pHash and 8 × 8 colours."""

    pixels: str
    hashed: NDArray[np.uint8]


class _Letters(dict[int, str]):
    """What each character stands for where words are compared; worked out when it is first met."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        category = unicodedata.category(letter)
        if category == "Cf" or letter in _APOSTROPHES or letter in _UNSEEN:
            self[code] = ""
        else:
            self[code] = " " if category[0] in "PZC" else letter
        return self[code]


_LETTERS = _Letters()


def words_of(text: str) -> list[str]:
    """Return a text's words: compatible characters made one (NFKC), without case, punctuation and what is not seen."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(_LETTERS).split()


def looks_of(image: bytes, name: str) -> Looks:
    """Return what an encoded image shows, as a model is shown it.

    Raises:
        DataError: it cannot be decoded; `name` says which it is.
    """
    picture = decode_image(image, name)
    pixels = hashlib.sha256(f"{picture.width}x{picture.height}:".encode() + picture.tobytes())
    return Looks(pixels.hexdigest(), np.concatenate([_phash(picture), _colours(picture)]))


def alike(one: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which of the `others` [images, bytes] look like the one."""
    bits = np.unpackbits(one[:8] ^ others[:, :8], axis=1).sum(axis=1)
    colours = np.abs(one[8:].astype(np.int16) - others[:, 8:]).max(axis=1)
    return (bits <= _NEAR_BITS) & (colours <= _NEAR_COLOUR)


def _phash(picture: Image.Image) -> NDArray[np.uint8]:
    """Return which of the lowest frequencies of an image's luminance are above their median (pHash, hackerfactor.com 2011)."""
    small = np.asarray(picture.convert("L").resize((_HASHED, _HASHED), Image.Resampling.LANCZOS), dtype=np.float64)
    places, frequencies = np.arange(_HASHED), np.arange(_KEPT)[:, None]
    cosines = np.cos(np.pi * (2 * places + 1) * frequencies / (2 * _HASHED))
    spectrum = (cosines @ small @ cosines.T).ravel().round(6)  # so that the last bits of a product do not decide
    return np.packbits(spectrum > np.median(spectrum[1:]))


def _colours(picture: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(picture.resize((8, 8), Image.Resampling.BOX), dtype=np.uint8).ravel()


class WordHashes:
    """Gives each word 64 bits, and works them out once."""

    def __init__(self) -> None:
        self._known = dict[str, int]()

    def of(self, words: Sequence[str]) -> NDArray[np.uint64]:
        """Return each word's bits."""
        for word in words:
            if word not in self._known:
                self._known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return np.fromiter((self._known[word] for word in words), np.uint64, len(words))


def shingles(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the hash of each `SHINGLE` words in a row, by the first of them; none where there are fewer."""
    count = max(0, len(words) - SHINGLE + 1)
    found = np.zeros(count, dtype=np.uint64)
    for place in range(SHINGLE):
        found = found * _FACTOR + words[place : place + count]
    return found
