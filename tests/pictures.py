"""Encoded pictures of every kind that people have, and such as are made to hurt who decodes them; the same every time."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from compress.data.images import check_image, decode_image
from compress.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


def encoded(image: Image.Image, kind: str = "PNG", orientation: int = 0, **settings: Any) -> bytes:
    """Return an image in a format; `orientation` is EXIF's, 0 for none."""
    if orientation:
        exif = Image.Exif()
        exif[0x0112] = orientation
        settings["exif"] = exif
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def modes() -> dict[str, tuple[Image.Image, dict[str, Any]]]:
    """Return a picture of 35 × 25 pixels in every mode that a file can have, with what is to be said when it is saved."""
    random = np.random.default_rng(0)
    plain = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((35, 25), Image.Resampling.NEAREST)
    alpha = plain.convert("RGBA")
    alpha.putalpha(Image.fromarray(random.integers(0, 256, (25, 35), dtype=np.uint8)))
    grey, palette = plain.convert("L"), plain.convert("P", palette=Image.Palette.ADAPTIVE)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    return {
        "1": (plain.convert("1"), {}),
        "1 with tRNS": (plain.convert("1"), {"transparency": 1}),
        "L": (grey, {}),
        "L with tRNS": (grey, {"transparency": grey.getpixel((0, 0))}),
        "LA": (alpha.convert("LA"), {}),
        "P": (palette, {}),
        "P with tRNS": (palette, {"transparency": 0}),
        "P with tRNS for each colour": (palette, {"transparency": bytes(range(0, 250, 10))}),
        "PA": (alpha.convert("PA"), {}),
        "RGB": (plain, {}),
        "RGB with tRNS": (plain, {"transparency": plain.getpixel((0, 0))}),
        "RGBA": (alpha, {}),
        "RGBa": (alpha.convert("RGBa"), {}),
        "CMYK": (plain.convert("CMYK"), {}),
        "YCbCr": (plain.convert("YCbCr"), {}),
        "I;16": (deep, {}),
        "I;16 with tRNS": (deep, {"transparency": 257}),
        "F": (plain.convert("F"), {}),
    }


def matrix() -> dict[str, bytes]:
    """Return a picture in every mode, format and orientation that can be combined, by a name of its own."""
    found: dict[str, bytes] = {}
    for (mode, (image, settings)), kind, orientation in product(modes().items(), FORMATS, range(10)):
        try:
            found[f"{kind}, {mode}, orientation {orientation}"] = encoded(image, kind, orientation, **settings)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # this format has no such mode
    return found


def everyday(images: list[Image.Image]) -> Iterator[bytes]:
    """Give each picture in one of the ways in which a server and a careless reader see it differently, in turn.

    They are turned as EXIF says, partly transparent, of a palette with transparent colours, or several of these.
    """
    for number, image in enumerate(images):
        seen = image.convert("RGBA")
        shown = np.asarray(seen).copy()
        shown[..., 3][: shown.shape[0] // 3] = 0  # hidden by a reader that lays it on white, black or its own colours otherwise
        seen = Image.fromarray(shown)
        palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
        turned = 2 + number % 7
        match number % 6:
            case 0:
                yield encoded(image, "JPEG", turned, quality=95)
            case 1:
                yield encoded(seen, "PNG")
            case 2:
                yield encoded(palette, "PNG", transparency=bytes([0, 128, 255] * 20))
            case 3:
                yield encoded(palette, "GIF", transparency=0)
            case 4:
                yield encoded(seen.convert("LA"), "PNG", turned)
            case _:
                yield encoded(seen, "WEBP", turned, lossless=True)


def hostile() -> dict[str, tuple[bytes, str]]:
    """Return pictures that would take minutes or gigabytes, by what they do, each with words of what it is refused for."""
    wide = Image.new("1", (8192, 6145)).convert("RGB")
    packed = b"a\0\0" + _zeros(200_000_000)
    segment = b"\xff\xe1\xff\xffExif\0\0" + bytes(65_527)
    numbers = b"MM\0*\0\0\0\x08" + _table(">", [(0x0112, 3, 1, 6 << 16), (0x011A, 5, 1_000_000, 38)]) + bytes(8_000_000)
    dot = Image.new("RGB", (8, 8))
    jpeg, gif, bmp = (encoded(dot, kind) for kind in ("JPEG", "GIF", "BMP"))
    frame = gif.index(b"\x2c")
    progressive = encoded(Image.new("RGB", (4096, 4096)), "JPEG", progressive=True)
    last = progressive[progressive.rindex(b"\xff\xc4") : -2]
    pixels, tags, parts = "limit image_pixels", "limit image_tag_bytes", "limit image_parts"
    return {
        "PNG of 60,000 × 60,000": (png(60_000, 60_000), pixels),
        "PNG just above the limit": (png(8192, 6145), pixels),
        "BMP of 60,000 × 60,000": (bmp[:18] + struct.pack("<ii", 60_000, 60_000) + bmp[26:], pixels),
        "GIF's first frame beyond its screen": (gif[: frame + 5] + b"\xff" * 4 + gif[frame + 9 :], pixels),
        "WebP just above the limit": (
            encoded(wide, "WEBP", lossless=True, method=0, quality=0),
            pixels,
        ),
        "TIFF with one tile of 0.5 gigapixels": (tiff({322: (4, 1, 32_768), 323: (4, 1, 16_384)}, b""), pixels),
        "TIFF with a million strips": (tiff({273: (5, 1_000_000, 200)}, bytes(8_000_200)), tags),
        "PNG with a million numbers in EXIF": (png(8, 8, chunk(b"eXIf", numbers)), tags),
        "JPEG with EXIF in 200 segments": (
            jpeg[:2] + segment * 200 + jpeg[2:],
            "limit exif_segments",
        ),
        "JPEG of 300 scans": (progressive[:-2] + last * 300 + progressive[-2:], "limit jpeg_scan_pixels"),
        "JPEG with a million comments": (jpeg[:2] + b"\xff\xfe\0\2" * 1_000_000 + jpeg[2:], parts),
        "PNG with a million chunks": (png(8, 8, chunk(b"prVt", b"") * 1_000_000), parts),
        "GIF with a comment of a million blocks": (gif[:frame] + b"\x21\xfe" + b"\1a" * 1_000_000 + b"\0" + gif[frame:], parts),
        "60 MB": (png(8, 8) + bytes(60_000_000), "limit image_bytes"),
        "PNG with a text of 200 MB": (png(8, 8, chunk(b"zTXt", packed)), "Decompressed data too large"),
        "PNG with a colour profile of 200 MB": (
            png(8, 8, chunk(b"iCCP", b"a\0\0" + _zeros(200_000_000))),
            "Decompressed data too large",
        ),
        "PostScript, run by Ghostscript": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
            "none of PNG",
        ),
        "TGA, which vLLM takes and others do not": (encoded(dot, "TGA"), "none of PNG"),
        "an empty file": (b"", "it has no bytes); fetch the file again"),
        "PPM": (encoded(dot, "PPM"), "none of PNG"),
        "an icon": (encoded(dot, "ICO"), "none of PNG"),
    }


def large() -> dict[str, bytes]:
    """Return pictures that are allowed and take as much as any: of the largest size, or of many frames."""
    turned = b"MM\0*\0\0\0\x08" + _table(">", [(0x0112, 3, 1, 6 << 16)])
    small = [Image.new("RGB", (16, 16), (number % 256, number // 256, 0)) for number in range(300)]
    frame = encoded(small[0], "GIF")
    start = frame.index(b"\x2c")
    return {
        "PNG, turned, with transparency": png(8192, 6144, chunk(b"eXIf", turned), 6),
        "GIF of 200,000 frames": frame[:-1] + frame[start:-1] * 200_000 + b";",
        "WebP of 300 frames": encoded(small[0], "WEBP", save_all=True, append_images=small[1:]),
    }


def see(path: str) -> int:
    """Check and decode a file's picture; say what is wrong with it, and return 2 then."""
    data = Path(path).read_bytes()
    for look in (check_image, decode_image):
        try:
            look(data, "the picture")
        except DataError as error:
            sys.stdout.write(f"{error}\n")
            return 2
    return 0


def png(width: int, height: int, more: bytes = b"", colour: int = 2) -> bytes:
    """Return a PNG of zeros, with further chunks before them; `colour` is its type, 2 for RGB and 6 for RGBA."""
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    content = _zeros(height * (width * (4 if colour == 6 else 3) + 1)) if width * height <= 8192 * 6144 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiff(tags: dict[int, tuple[int, int, int]], data: bytes) -> bytes:
    """Return a TIFF of 4 × 4 pixels with tags of its own (type, count, value), and data behind its table."""
    usual = {256: (4, 1, 4), 257: (4, 1, 4), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 2), 277: (3, 1, 3)}
    tiled = {324: (4, 1, 200), 325: (4, 1, 48)} if 322 in tags else {278: (4, 1, 4), 279: (4, 1, 48)}
    return b"II*\0\x08\0\0\0" + _table("<", [(tag, *value) for tag, value in sorted((usual | tiled | tags).items())]) + data


def _table(order: str, rows: list[tuple[int, int, int, int]]) -> bytes:
    return struct.pack(f"{order}H", len(rows)) + b"".join(struct.pack(f"{order}HHII", *row) for row in rows) + bytes(4)


def _zeros(count: int) -> bytes:
    """Return so many zeros, compressed."""
    packer, step = zlib.compressobj(1), 1 << 20
    parts = [packer.compress(bytes(min(step, count - place))) for place in range(0, count, step)]
    return b"".join([*parts, packer.flush()])
