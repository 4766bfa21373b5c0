"""Images of every color space and number of bits, from the file to the embedding."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from clip_prompt_peft.data import cache_image_embeds
from clip_prompt_peft.image_files import decode_image


SIZE = (8, 8)
RED, GREEN = PILImage.new("RGB", SIZE, (255, 0, 0)), PILImage.new("RGB", SIZE, (0, 255, 0))


def saved(image, **settings):
    buffer = io.BytesIO()
    image.save(buffer, **settings)
    return buffer.getvalue()


def png_of_16_bits(color):
    """A PNG with 16 bits for each color, which Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + np.array([color] * SIZE[0], dtype=">u2").tobytes()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *SIZE, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(row * SIZE[1])) + chunk(b"IEND", b"")


def tiff_of_16_bits(value, photometric):
    """A gray TIFF with 16 bits; photometric 0 means that white is 0, which Pillow does not write."""
    tags = [
        (256, SIZE[0]),
        (257, SIZE[1]),
        (258, 16),
        (259, 1),
        (262, photometric),
        (273, 118),
        (277, 1),
        (278, SIZE[1]),
    ]
    tags.append((279, 2 * SIZE[0] * SIZE[1]))
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, number, 0) for tag, number in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries
    return head.ljust(118, b"\0") + np.full(SIZE, value, dtype="<u2").tobytes()


def turned(image, **settings):
    """The image with a tag that says to turn it clockwise."""
    exif = PILImage.Exif()
    exif[0x0112] = 6
    return saved(image, exif=exif, **settings)


FRAMES = {"save_all": True, "append_images": [GREEN]}
FILES = {  # content, mode in which Pillow opens it, color
    "pages of a TIFF": (saved(RED, format="TIFF", **FRAMES), "RGB", (255, 0, 0)),
    "animated PNG": (saved(RED, format="PNG", **FRAMES), "RGB", (255, 0, 0)),
    "animated GIF": (saved(RED, format="GIF", **FRAMES), "P", (255, 0, 0)),
    "16 bits, white is 65535": (tiff_of_16_bits(51400, 1), "I;16", (200, 200, 200)),
    "16 bits, white is 0": (tiff_of_16_bits(65535 - 51400, 0), "I;16", (200, 200, 200)),
    "gray with a transparent value": (
        saved(PILImage.new("L", SIZE, 77), format="PNG", transparency=77),
        "L",
        (77, 77, 77),
    ),
    "animated WebP": (saved(RED, format="WEBP", lossless=True, **FRAMES), "RGB", (255, 0, 0)),
    "MPO": (saved(RED, format="MPO", quality=100, subsampling=0, **FRAMES), "RGB", (255, 0, 0)),
    "JPEG": (saved(RED, format="JPEG", quality=100, subsampling=0), "RGB", (255, 0, 0)),
    "CMYK JPEG": (saved(PILImage.new("CMYK", SIZE, (0, 255, 255, 0)), format="JPEG"), "CMYK", (255, 0, 0)),
    "LAB TIFF, white": (saved(PILImage.new("LAB", SIZE, (255, 128, 128)), format="TIFF"), "LAB", (255, 255, 255)),
    "LAB TIFF, gray": (saved(PILImage.new("LAB", SIZE, (137, 128, 128)), format="TIFF"), "LAB", (128, 128, 128)),
    "16-bit colors": (png_of_16_bits((65535, 25700, 0)), "RGB", (255, 100, 0)),
    "16 bits, big-endian": (
        saved(PILImage.frombytes("I;16B", SIZE, b"\xc8\xc8" * 64), format="TIFF"),
        "I;16B",
        (200, 200, 200),
    ),
    "palette with transparency": (
        saved(RED.convert("P"), format="PNG", transparency=RED.convert("P").getpixel((0, 0))),
        "P",
        (255, 0, 0),
    ),
    "gray with transparency": (saved(PILImage.new("LA", SIZE, (200, 0)), format="PNG"), "LA", (200, 200, 200)),
    "1 bit": (saved(PILImage.new("1", SIZE, 1), format="PNG"), "1", (255, 255, 255)),
}


WHITE_LEFT = np.array([[255, 255, 0, 0]] * 2)


@pytest.mark.parametrize(
    ("file_format", "kind"),
    [("PNG", np.uint8), ("PNG", np.uint16), *(("TIFF", kind) for kind in (np.uint8, np.uint16, np.int32, np.float32))],
)
def test_images_of_any_number_of_bits_are_turned(file_format, kind):
    values = (WHITE_LEFT * {np.uint16: 257, np.float32: 1 / 255}.get(kind, 1)).astype(kind)
    found = np.asarray(decode_image(turned(PILImage.fromarray(values), format=file_format)))
    assert np.array_equal(found[..., 0], np.rot90(WHITE_LEFT, -1))


@pytest.mark.parametrize("kind", FILES)
def test_colors(kind):
    content, mode, color = FILES[kind]
    assert PILImage.open(io.BytesIO(content)).mode == mode
    found = np.asarray(decode_image(content), dtype=int)
    assert np.abs(found - color).max() <= 2  # JPEG and LAB round


def test_embeddings_are_those_of_the_decoded_images(classifier, image_processor):
    def embeds(contents):
        features = Features({"image": Image(), "label": ClassLabel(names=list(classifier.class_names))})
        rows = {"image": [{"bytes": content, "path": None} for content in contents], "label": [0] * len(contents)}
        return cache_image_embeds(Dataset.from_dict(rows, features=features), classifier, image_processor)[:]

    contents = [content for content, _, _ in FILES.values()]
    plain = [saved(decode_image(content), format="PNG") for content in contents]
    assert torch.equal(embeds(contents)["image_embeds"], embeds(plain)["image_embeds"])
