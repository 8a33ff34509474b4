"""Comparison of questions, images and texts for the check that calibration data does not leak into the evaluation."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from compress.data.images import decode_image

SHINGLE = 13
"""Words of a shingle, as in GPT-3's overlap analysis (arXiv 2005.14165, appendix C)."""

_APOSTROPHES = frozenset("'’ʼ`´")
"""Characters within words that are often omitted; other punctuation separates words."""

_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0") | {chr(code) for code in range(0xFE00, 0xFE10)}
"""Invisible characters outside of Unicode's format category: fillers, joiners, variation selectors."""

_PHASH_SIZE = 32
"""pHash: side of the scaled image, in pixels."""

_PHASH_FREQUENCIES = 8
"""pHash: the number of low frequencies in each direction."""

_MAX_BITS, _MAX_COLOUR = 10, 20
"""Largest differences of similar images: bits of the 64 of pHash, and the colour of any of 8 × 8 fields in any channel, of 255.

Copies of the demo's 112-pixel scenes as JPEG, of quality 50 or larger or smaller by half, are at most 17 apart; the nearest scenes
that differ are 29 apart, though their luminance may be the same bit by bit.
"""

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""The base of the polynomial hash of a shingle: odd, with irregular bits (2^64 divided by the golden ratio)."""


@dataclass(frozen=True)
class ImageFingerprint:
    """The exact and perceptual hashes of a decoded image."""

    pixels: str
    """The SHA-256 of its size and pixels."""

    hashed: NDArray[np.uint8]
    """64 bits of pHash, then 8 × 8 mean colours."""


class _NormalizedCharacters(dict[int, str]):
    """A translation table that removes invisible characters and turns separators into spaces, filled on demand."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category == "Cf" or character in _APOSTROPHES or character in _INVISIBLE:
            self[code] = ""
        else:
            self[code] = " " if category[0] in "PZC" else character
        return self[code]


_CHARACTERS = _NormalizedCharacters()


def words_of(text: str) -> list[str]:
    """Return a text's normalized words: NFKC, case-folded, without punctuation and invisible characters."""
    # normalized again, since folding case may leave a text that is not in NFKC
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(_CHARACTERS).split()


def fingerprint_of(image: bytes, name: str) -> ImageFingerprint:
    """Return the fingerprint of an encoded image.

    Raises:
        DataError: it cannot be decoded; `name` identifies it in the message.
    """
    decoded = decode_image(image, name)
    # with the size: images of other proportions may have the same bytes (one colour)
    pixels = hashlib.sha256(f"{decoded.width}x{decoded.height}:".encode() + decoded.tobytes())
    return ImageFingerprint(pixels.hexdigest(), np.concatenate([_phash(decoded), _colours(decoded)]))


def are_similar(image: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which of the hashes `others` [images, bytes] are of images similar to `image`, by its hash [bytes]."""
    bits = np.unpackbits(image[:8] ^ others[:, :8], axis=1).sum(axis=1)
    # uint8 differences would wrap around
    colours = np.abs(image[8:].astype(np.int16) - others[:, 8:]).max(axis=1)
    return (bits <= _MAX_BITS) & (colours <= _MAX_COLOUR)


def _phash(image: Image.Image) -> NDArray[np.uint8]:
    """Return which of the lowest frequencies of an image's luminance are above their median (pHash, hackerfactor.com 2011)."""
    small = np.asarray(image.convert("L").resize((_PHASH_SIZE, _PHASH_SIZE), Image.Resampling.LANCZOS), dtype=np.float64)
    positions, frequencies = np.arange(_PHASH_SIZE), np.arange(_PHASH_FREQUENCIES)[:, None]
    cosines = np.cos(np.pi * (2 * positions + 1) * frequencies / (2 * _PHASH_SIZE))
    spectrum = (cosines @ small @ cosines.T).ravel().round(6)  # so that rounding errors of the products do not decide
    # without the first coefficient, the mean brightness, which is far larger than the others
    return np.packbits(spectrum > np.median(spectrum[1:]))


def _colours(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=np.uint8).ravel()


class WordHashes:
    """Maps words to 64-bit hashes, cached by word."""

    def __init__(self) -> None:
        self._hashes = dict[str, int]()

    def of(self, words: Sequence[str]) -> NDArray[np.uint64]:
        """Return each word's hash."""
        for word in words:
            if word not in self._hashes:
                # not hash(), which is salted anew in each process
                self._hashes[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return np.fromiter((self._hashes[word] for word in words), np.uint64, len(words))


def shingles(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the hash of each run of `SHINGLE` consecutive words, by its first word; empty for shorter texts."""
    count = max(0, len(words) - SHINGLE + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(SHINGLE):
        # modulo 2^64 by overflow, as numpy's uint64 does it: 13 multiplications per word and no text is built
        hashes = hashes * _FACTOR + words[offset : offset + count]
    return hashes
