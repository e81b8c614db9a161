"""Breaks files in the ways that files break, and in the ways that somebody breaks them on purpose; seeded."""

import re
import struct
import zlib


EXTREME_BYTES = (0x00, 0x01, 0x7F, 0x80, 0xFF)
EXTREME_INTEGERS = (0, 1, 2, 255, 256, 4095, 9000, 20000, 0x7FFF, 0x8000, 0xFFFF, 10**6, 0x7FFFFFFF, 0xFFFFFFFF)
JPEG_SIZE_MARKERS = b"\xc0\xc1\xc2"  # baseline, extended and progressive
ORIENTATION_TAG = 0x0112


def mutate_bytes(rng, content, others):
    """`content` after one to four mutations; the `others` are files that parts are taken of."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content = rng.choice(BYTE_MUTATIONS)(rng, bytes(content), others)
    return bytes(content)


def flip_bits(rng, content, others):
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 4, 32)) if content else 0):
        content[_place(rng, content)] ^= 1 << rng.randrange(8)
    return content


def replace_run(rng, content, others):
    start, end = _block(rng, content)
    byte = rng.choice(EXTREME_BYTES)
    run = bytes([byte]) * (end - start) if rng.random() < 0.5 else rng.randbytes(end - start)
    return content[:start] + run + content[end:]


def truncate(rng, content, others):
    return content[: rng.randrange(len(content) + 1)]


def remove_block(rng, content, others):
    start, end = _block(rng, content)
    return content[:start] + content[end:]


def repeat_block(rng, content, others):
    start, end = _block(rng, content)
    return content[:end] + content[start:end] * rng.choice((1, 1, 8)) + content[end:]


def insert_block(rng, content, others):
    place = _place(rng, content)
    return content[:place] + rng.randbytes(rng.choice((1, 2, 16, 256))) + content[place:]


def splice(rng, content, others):
    """The beginning of one file and the end of another."""
    other = rng.choice(others)
    return content[: rng.randrange(len(content) + 1)] + other[rng.randrange(len(other)) :]


def replace_integer(rng, content, others):
    """An extreme integer where a header may have a size, a count or an offset."""
    kind = rng.choice(("B", "<H", ">H", "<I", ">I"))
    size = struct.calcsize(kind)
    if len(content) < size:
        return content
    place = min(_place(rng, content), len(content) - size)
    value = rng.choice(EXTREME_INTEGERS) & (256**size - 1)
    return content[:place] + struct.pack(kind, value) + content[place + size :]


def replace_number(rng, content, others):
    """A number in text, such as the sizes of a PPM file."""
    numbers = list(re.finditer(rb"\d+", content[:256]))
    if not numbers:
        return content
    number = rng.choice(numbers)
    new = rng.choice((b"0", b"-1", b"1e9", b"99999999999999999999", b"", *(b"%d" % n for n in EXTREME_INTEGERS)))
    return content[: number.start()] + new + content[number.end() :]


def change_structure(rng, content, others):
    """A change that keeps the rest of the file readable, and so gets through to the code behind the parser."""
    if content.startswith(b"\x89PNG"):
        return _change_png(rng, content)
    if content.startswith(b"\xff\xd8"):
        return _change_jpeg(rng, content)
    if content.startswith((b"II*\0", b"MM\0*")):
        return _change_tiff(rng, content)
    if content.startswith((b"GIF8", b"BM")):
        kind, place = ("<H", rng.choice((6, 8))) if content.startswith(b"GIF8") else ("<i", rng.choice((18, 22, 28)))
        return _put(content, place, kind, rng.choice(EXTREME_INTEGERS))
    return replace_integer(rng, content, others)


BYTE_MUTATIONS = (
    flip_bits,
    replace_run,
    truncate,
    remove_block,
    repeat_block,
    insert_block,
    splice,
    replace_integer,
    replace_number,
    change_structure,
    change_structure,
    change_structure,
)


def _place(rng, content):
    """A place, often in the header: most of a file is pixels."""
    length = len(content) if rng.random() < 0.5 else min(len(content), 64)
    return rng.randrange(max(length, 1))


def _block(rng, content):
    start = _place(rng, content)
    return start, min(len(content), start + rng.choice((1, 2, 4, 16, 64, 1024)))


def _put(content, place, kind, value):
    size = struct.calcsize(kind)
    if len(content) < place + size:
        return content
    low = value & (256**size - 1)
    return content[:place] + struct.pack(kind.upper(), low) + content[place + size :]


def _change_png(rng, content):
    """Changes, repeats, removes or moves chunks, and writes their checksums anew."""
    chunks, place = [], 8
    while place + 12 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    if not chunks:
        return content
    index = rng.randrange(len(chunks))
    name, data = chunks[index]
    change = rng.choice(("header", "header", "data", "pixels", "repeat", "remove", "shuffle", "name"))
    if change == "header" and chunks[0][0] == b"IHDR" and len(chunks[0][1]) == 13:
        header = chunks[0][1]
        field = rng.choice(
            (0, 4, 8, 9, 10, 11, 12)
        )  # width, height, depth, color type, compression, filter, interlace
        kind = ">I" if field < 8 else "B"
        chunks[0] = (b"IHDR", _put(header, field, kind, rng.choice((*EXTREME_INTEGERS, 3, 4, 6, 8, 16))))
    elif change == "data":
        chunks[index] = (name, bytes(rng.choice((flip_bits, truncate, replace_run))(rng, data, ())))
    elif change == "pixels":
        pixels = b"".join(data for name, data in chunks if name == b"IDAT")
        try:
            pixels = zlib.decompress(pixels)
        except zlib.error:
            return content
        pixels = zlib.compress(bytes(rng.choice((flip_bits, truncate, replace_run, repeat_block))(rng, pixels, ())))
        chunks = [chunk for chunk in chunks if chunk[0] not in (b"IDAT", b"IEND")]
        chunks += [(b"IDAT", pixels), (b"IEND", b"")]
    elif change == "repeat":
        chunks.insert(rng.randrange(len(chunks) + 1), chunks[index])
    elif change == "remove":
        del chunks[index]
    elif change == "shuffle":
        rng.shuffle(chunks)
    elif change == "name":
        chunks[index] = (rng.choice((b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"eXIf", b"acTL", b"fcTL")), data)
    return content[:8] + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def _change_jpeg(rng, content):
    """Changes the size, or an entry of the EXIF data, or puts one of a random kind in."""
    change = rng.choice(("size", "size", "components", "exif"))
    if change == "exif":
        kind, value = rng.choice((1, 2, 3, 4, 5, 7, 12, 99)), rng.choice((*range(10), *EXTREME_INTEGERS))
        count = rng.choice((1, 1, 1, 0, 0xFFFFFFFF))
        entry = struct.pack(">HHII", ORIENTATION_TAG, kind, count, value << 16 & 0xFFFFFFFF if kind == 3 else value)
        exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + entry + bytes(4)
        return content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:]
    for marker in JPEG_SIZE_MARKERS:
        place = content.find(bytes((0xFF, marker)))
        if place >= 0:
            if change == "components":
                return _put(content, place + 9, "B", rng.choice((0, 1, 2, 3, 4, 255)))
            return _put(content, place + rng.choice((5, 7)), ">H", rng.choice(EXTREME_INTEGERS))
    return content


def _change_tiff(rng, content):
    """Changes an entry of the first directory: its tag, type, count or value."""
    order = "<" if content.startswith(b"II") else ">"
    if len(content) < 8:
        return content
    (directory,) = struct.unpack(f"{order}I", content[4:8])
    if len(content) < directory + 2:
        return content
    (entries,) = struct.unpack(f"{order}H", content[directory : directory + 2])
    entry = directory + 2 + 12 * rng.randrange(max(entries, 1))
    place, kind = rng.choice(((0, "H"), (2, "H"), (4, "I"), (8, "I"), (8, "H")))
    values = (*EXTREME_INTEGERS, *range(2, 17), 256, 257, 262, 273, 277, 278, 32773, ORIENTATION_TAG)
    return _put(content, entry + place, order + kind, rng.choice(values))
