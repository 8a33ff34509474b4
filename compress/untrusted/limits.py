"""The sizes and times past which foreign input is refused, each settable by an environment variable (docs/limits.md)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache

from compress.errors import UsageError

PREFIX = "COMPRESS_LIMIT_"
"""What the environment variables begin with; the field's name in capitals follows."""


@dataclass(frozen=True)
class Limits:
    """How much of anything that comes from outside is taken in; more is one error that names the limit.

    They are settings of the machine, not of a recipe, since a recipe may come from outside too, and shape no result: what
    is within them is read the same whatever they are.
    """

    json_bytes: int = 64_000_000
    """Bytes of one JSON file or safetensors header. The largest tokenizers have 35 MB, the index of 100,000 tensors 10 MB."""

    json_items: int = 5_000_000
    """Commas and brackets in one of them, about its values: each takes up to 72 bytes of memory from 2 of text. The largest
    tokenizers have 1.5 million."""

    json_depth: int = 64
    """Objects and lists within one another in JSON or YAML. Configs nest 5 deep; Python's own parsers give up at about 1,000."""

    integer_digits: int = 309
    """Digits of an integer: as many as the largest 64-bit float has. Tokenizers write 10^30 for "no limit"."""

    yaml_bytes: int = 256_000
    """Bytes of one recipe or other YAML text, which takes a second for 100,000. Recipes have 1,000 to 5,000."""

    yaml_values: int = 20_000
    """Values of a YAML text, those that an alias stands for counted each time. Recipes have 30 to 300."""

    tensors: int = 150_000
    """Tensors of a checkpoint. Experts held one by one make 100,000 in the largest published models."""

    buffer_bytes: int = 256_000_000
    """Bytes of what a model computes from its config alone, as rotary frequencies and position numbers. They take kilobytes."""

    template_bytes: int = 1_000_000
    """Bytes of one chat template. The longest published ones have 20,000."""

    trial_seconds: int = 3
    """Seconds of CPU that a chat template or the patterns of a config get when they are tried. They take milliseconds."""

    trial_bytes: int = 512_000_000
    """Memory of the process in which they are tried."""

    image_pixels: int = 50_331_648
    """Pixels of one image, by its header, and of a tile of a TIFF: 8192 × 6144, which phones call 50 megapixels. Decoding takes
    up to four copies of 4 bytes a pixel, 0.9 GB at the limit; vLLM refuses more than 178,956,970."""

    image_bytes: int = 50_000_000
    """Bytes of one encoded image: a sharp photograph of 60 megapixels as JPEG has about as many. A server is sent 4/3 of it."""

    image_tag_bytes: int = 1_000_000
    """Bytes of the numbers in an image's TIFF or EXIF tags, texts and plain bytes not counted: each number becomes an object of
    some 100 bytes. A TIFF of 50 megapixels in strips of one row has 49 KB."""

    exif_segments: int = 64
    """Pieces of EXIF data in one JPEG or AVIF; one is usual, and one for each further picture behind the first."""

    image_parts: int = 500_000
    """In how many parts an image's file is read: chunks, segments and blocks of its headers; a PNG of 50 MB has 20,000."""

    jpeg_scan_pixels: int = 2_000_000_000
    """Pixels times scans of one JPEG: each scan goes over all pixels again. Photographs have 1 to 10 scans, and 39 are left for
    the largest."""

    rows_file_bytes: int = 500_000_000
    """Bytes of one JSONL or JSON file of questions or texts, which is held in memory. LLaVA's 150,000 conversations have 229 MB."""

    rows: int = 1_000_000
    """Rows of one JSONL, JSON or parquet file, or lines of one text. The training split of VQA v2 has 443,757 questions."""

    row_values: int = 1_000_000
    """Values within one row of JSON: a row of 64 MB could hold 20 million empty lists, which take a hundred times its bytes."""

    line_bytes: int = 64_000_000
    """Bytes of one line of text or JSONL, or of one entry of a JSON list: an image in base64 is a third larger than its file."""

    text_bytes: int = 100_000_000
    """Bytes of the text of one perplexity task, which is tokenized as a whole. wikitext-2's test text has 1.3 MB."""

    question_characters: int = 100_000
    """Characters of one question, answer or option: more than any model here takes."""

    question_answers: int = 10_000
    """Answers, and options, of one question. VQA v2 has ten answers to each, MMMU at most nine options."""

    id_characters: int = 1_000
    """Characters of one question's id, which stands in every message and report. Paths and digests have 20 to 200."""

    question_images: int = 100
    """Images of one question. MMMU's have seven."""

    parquet_group_bytes: int = 500_000_000
    """Bytes, unpacked, of the columns that are read of one row group of a parquet file, by what the file declares."""

    parquet_group_values: int = 10_000_000
    """Values of one column in one row group, those within lists counted: repeated ones take next to no bytes in the file."""

    parquet_chunks: int = 200_000
    """Columns times row groups of one parquet file, each of which has an entry in its footer."""

    answer_bytes: int = 33_554_432
    """Bytes of one answer of a server, unpacked. Scores of 8,192 tokens with the 20 likeliest of each have 13 MB."""

    answer_values: int = 4_000_000
    """Values in one answer's JSON: in Python one takes a hundred bytes and more. The scores above hold 660,000."""

    answer_characters: int = 1_024
    """Characters of a model's answer for each token that it was asked for. The longest tokens that are known have a few hundred."""

    head_bytes: int = 65_536
    """Bytes of the head of one HTTP answer, and of what follows its last chunk. Servers allow 8 to 64 KiB."""

    stream_bytes: int = 4_096
    """Bytes of one streamed answer for each token that it was asked for. vLLM sends about 250."""

    event_bytes: int = 65_536
    """Bytes of one event in a stream."""

    reply_bytes: int = 536_870_912
    """Bytes of one reply of onnxruntime-genai's process. Whole distributions of 320 tokens over 256,000 have 437 MB."""

    log_bytes: int = 16_777_216
    """Bytes that are read of a server's log to find out why it ended: the first half and the last of so many."""

    hub_seconds: int = 600
    """Seconds in which the part of a file on a hub must have come that a plan reads, a header of up to 100 MB."""

    def set_by(self, name: str) -> str:
        """Return how a message tells which limit was met and how it is raised."""
        return f"limit {name} = {getattr(self, name):,}, set by {PREFIX}{name.upper()}"


def limits() -> Limits:
    """Return the limits as the environment sets them.

    Raises:
        UsageError: a variable with the prefix names no limit, or holds no positive whole number.
    """
    return _read(tuple((name, os.environ[name]) for name in sorted(os.environ) if name.startswith(PREFIX)))


@cache
def _read(settings: tuple[tuple[str, str], ...]) -> Limits:
    known = {PREFIX + field.name.upper(): field.name for field in fields(Limits)}
    values: dict[str, int] = {}
    for name, value in settings:
        if name not in known:
            raise UsageError(f"{name}: there is no such limit; the limits are {_listed(known)}")
        if not (value.isascii() and value.isdigit() and int(value) > 0):
            raise UsageError(f"{name}: must be a whole number above 0 (got {value!r})")
        values[known[name]] = int(value)
    return Limits(**values)


def _listed(known: Mapping[str, str]) -> str:
    return ", ".join(known)
