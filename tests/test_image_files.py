"""One function decodes an image for all callers, and processors run in bounded memory."""

import io
import os
import socket
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import PngImagePlugin
from transformers import CLIPImageProcessor, SiglipImageProcessor

from clip_prompt_peft.data import UnreadableImageError, with_pixel_values
from clip_prompt_peft.image_files import decode_image, process_images


VALUES = np.array([[0, 1, 100], [127, 254, 255]], dtype=np.uint8)
WIDE = {  # type of the values, and the factor that makes them of 8-bit values
    "16 bits": (np.uint16, 257),
    "16 bits, shifted": (np.uint16, 256),
    "32 bits of 8": (np.int32, 1),
    "32 bits of 16": (np.int32, 257),
    "float to 1": (np.float32, 1 / 255),
    "float to 255": (np.float32, 1),
    "float to 65535": (np.float32, 257),
}


def saved(image, **settings):
    buffer = io.BytesIO()
    image.save(buffer, **settings)
    return buffer.getvalue()


@pytest.fixture(params=WIDE)
def wide(request):
    kind, factor = WIDE[request.param]
    return PILImage.fromarray((VALUES.astype(np.float64) * factor).astype(kind))


def same_in_the_example(content, tmp_path):
    """What the example that needs no library makes of the file."""
    file = tmp_path / "image"
    file.write_bytes(content)
    source = (ROOT / "examples" / "classify_onnx.py").read_text()
    scope = {}
    exec(source[: source.index("if len(sys.argv)")].replace("import onnxruntime\n", ""), scope)
    return scope["read"](file)


def test_images_of_more_than_8_bits_have_the_values_of_the_same_image_in_8_bits(wide, tmp_path):
    content = saved(wide, format="TIFF")
    expected = np.stack([VALUES] * 3, axis=-1)
    for image in (content, wide, PILImage.open(io.BytesIO(content)), same_in_the_example(content, tmp_path)):
        assert np.array_equal(np.asarray(decode_image(image)), expected)


def test_png_files_of_16_bits_keep_their_upper_bits(tmp_path):
    content = saved(PILImage.fromarray(VALUES.astype(np.uint16) * 257), format="PNG")
    assert np.array_equal(np.asarray(decode_image(content))[..., 1], VALUES)
    assert np.array_equal(np.asarray(same_in_the_example(content, tmp_path))[..., 1], VALUES)


def test_a_dark_16_bit_image_is_not_made_brighter_but_told():
    dark = PILImage.fromarray(np.array([[0, 4095]], dtype=np.uint16))
    with pytest.warns(UserWarning, match="no value above 4095"):
        assert decode_image(dark).getpixel((1, 0)) == (15, 15, 15)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_image(PILImage.fromarray(np.zeros((2, 2), dtype=np.uint16)))


def png_of_16_bit_colors(values):
    """A PNG file of (H, W, 3) 16-bit values, which Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def tiff_of_16_bits(values, sign=1):
    """An uncompressed TIFF file of (H, W, C) 16-bit values; `sign` is 2 if they are signed."""
    height, width, channels = values.shape
    data, at = values.astype("<u2").tobytes(), 8
    bits = b"\x10\0" * channels
    where = at + len(data)
    one = channels == 1
    tags = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, 16 if one else where), (259, 3, 1, 1),
        (262, 3, 1, 1 if one else 2), (273, 4, 1, at), (277, 3, 1, channels), (278, 4, 1, height),
        (279, 4, 1, len(data)), (339, 3, 1, sign),
    ]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", where + len(bits)) + data + bits + directory


@pytest.mark.parametrize("make", [png_of_16_bit_colors, tiff_of_16_bits])
@pytest.mark.parametrize("high", [255, 4095, 65535])
def test_dark_16_bit_colors_are_told_as_gray_values_are(make, high, tmp_path):
    content = make(np.linspace(0, high, 4 * 4 * 3).reshape(4, 4, 3).astype(np.uint16))
    (tmp_path / "a").write_bytes(content)
    for given in (content, tmp_path / "a", PILImage.open(io.BytesIO(content))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert max(top for _, top in decode_image(given).getextrema()) == high >> 8
        assert ["no value above 4095" in str(one.message) for one in caught] == [True] * (high < 4096)


def test_signed_16_bit_values_are_told_and_dark_8_bit_colors_are_not():
    content = tiff_of_16_bits(np.array([[[0], [32767]]], np.uint16), sign=2)
    with pytest.warns(UserWarning, match="signed 16-bit.*half as bright"):
        assert decode_image(content).getpixel((1, 0)) == (127, 127, 127)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_image(saved(PILImage.new("RGB", (2, 2), (3, 3, 3)), format="PNG"))


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, -5]], np.int32),
        np.array([[0, 70000]], np.int32),
        np.array([[0, 4095]], np.int32),
        np.array([[0, np.nan]], np.float32),
        np.array([[0, np.inf]], np.float32),
        np.array([[-1, 1]], np.float32),
        np.array([[0, 3]], np.float32),
    ],
    ids=str,
)
def test_values_of_an_unknown_range_are_refused_with_file_mode_and_range(tmp_path, values):
    PILImage.fromarray(values).save(tmp_path / "scan.tif")
    with pytest.raises(UnreadableImageError, match=r"scan\.tif.*range from .* \(mode '[IF]'\)"):
        decode_image(tmp_path / "scan.tif")
    with pytest.raises(SystemExit, match="do not say which value is white"):
        same_in_the_example((tmp_path / "scan.tif").read_bytes(), tmp_path)


def test_rotation_palettes_transparency_and_frames_are_treated_alike(tmp_path):
    red_left = PILImage.new("RGB", (4, 2))
    red_left.paste("red", (0, 0, 2, 2))
    exif = PILImage.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    rotated = saved(red_left, format="PNG", exif=exif)
    transparent = saved(PILImage.new("RGBA", (2, 2), (9, 8, 7, 0)), format="PNG")
    animated = saved(
        PILImage.new("RGB", (2, 2), "red"), format="GIF", save_all=True, append_images=[PILImage.new("RGB", (2, 2))]
    )
    for content, size, color in (
        (rotated, (2, 4), (255, 0, 0)),
        (transparent, (2, 2), (9, 8, 7)),
        (animated, (2, 2), (255, 0, 0)),
        (saved(PILImage.new("CMYK", (2, 2), (0, 255, 255, 0)), format="TIFF"), (2, 2), (255, 0, 0)),
        (saved(PILImage.new("1", (2, 2), 1), format="PNG"), (2, 2), (255, 255, 255)),
    ):
        for image in (decode_image(content), same_in_the_example(content, tmp_path)):
            assert (image.mode, image.size, image.getpixel((1, 0))) == ("RGB", size, color)


def test_what_pillow_refuses_is_told_with_the_reason(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("note", "x" * (2 << 20), zip=True)
    for content, message in (
        (saved(PILImage.new("RGB", (2, 2)), format="PNG", pnginfo=text), "metadata are too long"),
        (saved(PILImage.new("1", (20_000, 20_000)), format="PNG"), "too many pixels"),
        (saved(PILImage.new("RGB", (99, 99)), format="BMP")[:900], "it is damaged"),
        (b"", "it is damaged, or no image"),
    ):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(UnreadableImageError, match=rf"Cannot read '.*a\.png': .*{message}"):
            decode_image(tmp_path / "a.png")
    with pytest.raises(UnreadableImageError, match="nowhere.png': No such file"):
        decode_image(tmp_path / "nowhere.png")
    with pytest.raises(UnreadableImageError, match="directory"):
        decode_image(tmp_path)


@pytest.mark.parametrize(
    ("ending", "settings"), [("jpg", {}), ("jpg", {"progressive": True}), ("png", {}), ("webp", {}), ("gif", {})]
)
@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_files_that_are_cut_off_are_named(tmp_path, ending, settings, share):
    noise = np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)
    file = tmp_path / f"holiday.{ending}"
    PILImage.fromarray(noise).save(file, **settings)
    content = file.read_bytes()
    decode_image(file)
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UnreadableImageError, match=f"Cannot read '.*holiday.{ending}': it is damaged"):
        decode_image(file)


def test_the_ending_of_a_file_does_not_matter(tmp_path):
    PILImage.new("RGB", (4, 4), "red").save(tmp_path / "photo.JPG", format="PNG")
    assert decode_image(tmp_path / "photo.JPG").getpixel((0, 0)) == (255, 0, 0)
    (tmp_path / "page.png").write_text("<html>Sign in</html>")
    with pytest.raises(UnreadableImageError, match="page.png': it is a web page; download"):
        decode_image(tmp_path / "page.png")


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_is_no_file_is_not_waited_for(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # names of sockets must be short
    if kind == "pipe":
        os.mkfifo("a.png")
    else:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("a.png")
    with pytest.raises(UnreadableImageError, match="Cannot read 'a.png': it is a pipe, a socket or a device"):
        decode_image("a.png")
    dataset = with_pixel_values(dataset_of([{"bytes": None, "path": "a.png"}]), CLIPImageProcessor())
    with pytest.raises(UnreadableImageError, match="a.png': it is a pipe"):
        dataset[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_file_without_permission_is_named(tmp_path):
    PILImage.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(UnreadableImageError, match="a.png': Permission denied"):
        decode_image(tmp_path / "a.png")


def dataset_of(rows):
    features = Features({"image": Image(), "label": ClassLabel(names=["cat"])})
    plain = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "label": features["label"]})
    dataset = Dataset.from_dict({"image": rows, "label": [0] * len(rows)}, features=plain)
    return dataset.cast(features)


def test_rows_without_an_image_are_counted(image_processor):
    good = {"bytes": saved(PILImage.new("RGB", (2, 2)), format="PNG"), "path": None}
    dataset = dataset_of([good, None, {"bytes": b"", "path": None}, good])
    with pytest.raises(UnreadableImageError, match=r"2 of 4 rows hold no image.*: 1, 2\."):
        with_pixel_values(dataset, image_processor)
    assert len(with_pixel_values(dataset.select([3, 0]), image_processor)[:]["pixel_values"]) == 2


@pytest.mark.parametrize("path", ["nowhere.png", ".", "http://127.0.0.1:9/a.png"])
def test_a_path_without_an_image_is_named(image_processor, path):
    dataset = with_pixel_values(dataset_of([{"bytes": None, "path": path}]), image_processor)
    with pytest.raises(UnreadableImageError, match=f"Cannot read '{path}'"):
        dataset[0]


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000), (3, 1001), (50_000, 1), (1, 1)])
def test_the_center_of_an_elongated_image_is_that_of_the_whole(size):
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    ramp = np.linspace(0, 255, size[0] * size[1]).astype(np.uint8).reshape(size[1], size[0])
    image = decode_image(PILImage.fromarray(ramp))
    expected = processor([image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(process_images(processor, [image])["pixel_values"], expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("processor", [CLIPImageProcessor(), SiglipImageProcessor()], ids=["clip", "siglip"])
def test_images_of_usual_shapes_are_processed_bit_for_bit_as_before(processor):
    rng = np.random.default_rng(0)
    for width, height in ((64, 48), (30, 480), (301, 20)):
        image = PILImage.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        expected = processor([image], return_tensors="pt")["pixel_values"]
        assert torch.equal(process_images(processor, [image])["pixel_values"], expected)


def test_a_processor_gets_a_bounded_part_of_an_elongated_image():
    seen = []

    class Recording(CLIPImageProcessor):
        def __call__(self, images, **kwargs):
            seen.extend(image.size for image in images)
            return super().__call__(images, **kwargs)

    process_images(Recording(), [PILImage.new("RGB", (50_000, 1)), PILImage.new("RGB", (3, 1001))])
    assert seen == [(16, 1), (3, 49)]
