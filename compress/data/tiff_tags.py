"""The size of the numbers in the tags of a TIFF file, or of EXIF data, which have the same layout; from their tables alone."""

from __future__ import annotations

import struct

_SIZES = {3: 2, 4: 4, 5: 8, 6: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of one value of each type that becomes an object in memory; texts and plain bytes (1, 2 and 7) stay what they are."""

_TABLES = (0x8769, 0x8825, 0xA005)
"""Tags with the offset of a further table: of EXIF, of GPS and of interoperability."""

_OFFSETS = {3: "H", 4: "L", 13: "L", 16: "Q", 18: "Q"}
"""The struct format of each type that a further table's offset may have; a short one leaves the rest of its field unused."""

_DEEPEST = 3


def numeric_bytes(data: bytes, start: int = 0) -> int:
    """Return how many bytes the numbers have of the TIFF data that begin at `start`, in the first table and those it points to.

    Whatever is broken counts 0. Layout: TIFF 6.0, section 2, and BigTIFF.
    """
    order = "<" if data[start : start + 2] == b"II" else ">"
    try:
        (version,) = struct.unpack_from(f"{order}H", data, start + 2)
        big = version == 43
        (first,) = struct.unpack_from(f"{order}Q" if big else f"{order}L", data, start + (8 if big else 4))
    except struct.error:
        return 0
    entry = struct.Struct(f"{order}HHQ8s" if big else f"{order}HHL4s")
    count = struct.Struct(f"{order}Q" if big else f"{order}H")
    total, waiting = 0, [first]
    # a fixed number of rounds, because tables may point at each other in a circle
    for _ in range(_DEEPEST):
        found = [_read_table(data, start + place, count, entry) for place in waiting]
        total += sum(numbers for numbers, _ in found)
        waiting = [place for _, places in found for place in places]
    return total


def _read_table(data: bytes, place: int, count: struct.Struct, entry: struct.Struct) -> tuple[int, list[int]]:
    """Return how many bytes a table's numbers have, and where further tables are; where one is named twice, its first place."""
    if place + count.size > len(data):
        return 0, []
    (entries,) = count.unpack_from(data, place)
    rows = memoryview(data)[place + count.size :]
    # the count comes from the file: no more entries than there are bytes for
    rows = rows[: min(entries, len(rows) // entry.size) * entry.size]
    total, tables = 0, dict[int, int]()
    for tag, kind, values, value in entry.iter_unpack(rows):
        total += values * _SIZES.get(kind, 0)
        if tag in _TABLES:
            offset = struct.Struct(f"{entry.format[0]}{_OFFSETS.get(kind, '')}")
            if 0 < offset.size <= len(value):
                tables.setdefault(tag, offset.unpack_from(value)[0])
    return total, list(tables.values())
