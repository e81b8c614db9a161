"""Seed files of the image fuzzer: scikit-image's bundled pictures, small ones in every format that PIL writes."""

import io
from functools import cache
from pathlib import Path

import numpy as np
import skimage
from PIL import Image


FOLDER = Path(skimage.__file__).parent / "data"
FULL_SIZE = (
    "no_time_for_that_tiny.gif",
    "multipage.tif",
    "multipage_rgb.tif",
    "rocket.jpg",
    "chelsea.png",
    "horse.png",
)
SMALL = ("astronaut.png", "camera.png", "coffee.png", "logo.png", "rocket.jpg")

# Format, mode and options of `Image.save`
ENCODINGS = (
    ("PNG", "RGB", {}),
    ("PNG", "RGBA", {}),
    ("PNG", "LA", {}),
    ("PNG", "P", {}),
    ("PNG", "1", {}),
    ("PNG", "I;16", {}),
    ("PNG", "RGB", {"save_all": True}),
    ("JPEG", "RGB", {}),
    ("JPEG", "L", {"progressive": True}),
    ("JPEG", "CMYK", {}),
    ("MPO", "RGB", {"save_all": True}),
    ("GIF", "P", {"save_all": True}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGBA", {"lossless": True}),
    ("WEBP", "RGB", {"save_all": True}),
    ("AVIF", "RGB", {}),
    ("JPEG2000", "RGB", {}),
    ("TIFF", "RGB", {}),
    ("TIFF", "RGB", {"save_all": True, "compression": "tiff_lzw"}),
    ("TIFF", "CMYK", {"compression": "tiff_adobe_deflate"}),
    ("TIFF", "RGB", {"compression": "jpeg"}),
    ("TIFF", "I;16", {}),
    ("TIFF", "F", {"compression": "packbits"}),
    ("TIFF", "1", {"compression": "group4"}),
    ("BMP", "RGB", {}),
    ("BMP", "P", {}),
    ("DIB", "RGB", {}),
    ("PPM", "RGB", {}),
    ("PPM", "L", {}),
    ("PPM", "I;16", {}),
    ("ICO", "RGBA", {"sizes": [(48, 48), (16, 16)]}),
    ("ICNS", "RGBA", {}),
    ("TGA", "RGB", {"compression": "tga_rle"}),
    ("PCX", "RGB", {}),
    ("SGI", "RGB", {}),
    ("DDS", "RGBA", {}),
    ("BLP", "P", {}),
    ("SPIDER", "F", {}),
    ("QOI", "RGB", {}),
    ("IM", "RGB", {}),
    ("XBM", "1", {}),
    ("MSP", "1", {}),
)


def _encode(image, format, mode, options):
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    if options.get("save_all"):
        options = options | {"append_images": [image.rotate(180)]}
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@cache
def seed_files():
    """The files' contents, the whole pictures last."""
    files = []
    for number, (format, mode, options) in enumerate(ENCODINGS):
        picture = Image.open(FOLDER / SMALL[number % len(SMALL)])
        picture.thumbnail((80, 80))
        files.append(_encode(picture.convert("RGBA" if "A" in mode else "RGB"), format, mode, options))
    return files + [(FOLDER / name).read_bytes() for name in FULL_SIZE]
