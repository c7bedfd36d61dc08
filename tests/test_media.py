import base64
import io
import json
import math
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from urllib.parse import quote

import av
import numpy as np
import pytest
from kimi_native import media
from kimi_native.media import MediaError, MediaItem, MediaProcessor, prompt_text
from kimi_native.tiny_config import PREPROCESSOR_CONFIG
from PIL import Image

PROCESSOR = MediaProcessor()


@pytest.fixture
def picture(rng):
    """uint8 [30, 41, 3]"""
    return rng.integers(0, 256, (30, 41, 3), np.uint8)


def saved(image, format, **options):
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def movie(frames, format="matroska", codec="ffv1", pixels="bgr0", rate=2, **options):
    """The bytes of a video of uint8 [frames, h, w, 3]; ffv1 in bgr0 loses nothing."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return file.getvalue()


def pixels_of(item):
    """uint8 [t, gh * p, gw * p, 3], patches put together again one by one."""
    t, gh, gw = item.grid
    p = math.isqrt(item.patches.shape[1] // 3)
    out = np.empty((t, gh * p, gw * p, 3), np.uint8)
    patches = iter(item.patches)
    for frame in out:
        for row in range(gh):
            for column in range(gw):
                patch = next(patches).reshape(3, p, p)
                for channel in range(3):
                    frame[row * p : (row + 1) * p, column * p : (column + 1) * p, channel] = patch[channel]
    assert next(patches, None) is None
    return out


def image_pixels(source, height, width):
    """uint8 [height, width, 3], what is not padding of an image."""
    pixels = pixels_of(PROCESSOR.image(source))[0]
    assert not pixels[height:].any() and not pixels[:, width:].any()
    return pixels[:height, :width]


# settings


def write_settings(folder, changes):
    config = PREPROCESSOR_CONFIG | {"media_proc_cfg": PREPROCESSOR_CONFIG["media_proc_cfg"] | changes}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def test_published_settings_are_the_defaults(tmp_path):
    assert MediaProcessor.from_folder(tmp_path) == PROCESSOR
    assert MediaProcessor.from_folder(write_settings(tmp_path, {})) == PROCESSOR
    assert PREPROCESSOR_CONFIG["media_proc_cfg"] == json.loads(json.dumps(vars(PROCESSOR)))


def test_settings_are_read(tmp_path):
    changes = {"in_patch_limit": 64, "sample_fps": 1, "image_mean": [0, 0.25, 1.0], "image_std": [1, 2.0, 0.5]}
    processor = MediaProcessor.from_folder(write_settings(tmp_path, changes))
    assert processor == replace(
        PROCESSOR, in_patch_limit=64, sample_fps=1, image_mean=(0, 0.25, 1.0), image_std=(1, 2.0, 0.5)
    )
    assert processor.image(np.zeros((300, 200, 3), np.uint8)).grid == (1, 10, 8)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("in_patch_limit", 0),
        ("in_patch_limit", True),
        ("in_patch_limit_each_frame", "4096"),
        ("patch_limit_on_one_side", 512.0),
        ("patch_size", None),
        ("patch_size", 2**31),
        ("temporal_merge_kernel_size", -4),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", 0.5),
        ("image_mean", [0.5, 0.5, float("nan")]),
        ("image_std", [0.5, 0.5, 0]),
        ("image_std", ["a", "b", "c"]),
        ("sample_fps", 0),
        ("sample_fps", float("inf")),
        ("sample_fps", False),
        ("merge_kernel_size", 4),
        ("merge_kernel_size", [2, 2]),
        ("fixed_output_tokens", 64),
        ("in_patch_limit_video", 100000),
        ("max_num_frames_each_video", 8),
        ("timestamp_mode", "mm:ss"),
        ("resample", "lanczos"),
    ],
)
def test_settings_that_cannot_be_honoured(tmp_path, key, value):
    with pytest.raises(MediaError, match=rf"preprocessor_config\.json: media_proc_cfg\.{key} is .*expected"):
        MediaProcessor.from_folder(write_settings(tmp_path, {key: value}))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "None"),
        ("{}", "None"),
        ('{"media_proc_cfg": []}', r"\[\]"),
    ],
)
def test_broken_preprocessor_config(tmp_path, text, found):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(MediaError, match=rf"preprocessor_config\.json: .*{found}.*expected an? (JSON )?object"):
        MediaProcessor.from_folder(tmp_path)


# resizing and patches


@pytest.mark.parametrize(
    ("size", "limit", "resized", "grid", "patches", "tokens"),
    [
        ((224, 224), 16384, (224, 224), (16, 16), 256, 64),
        ((640, 480), 16384, (640, 480), (36, 46), 1656, 414),
        ((1024, 768), 16384, (1024, 768), (56, 74), 4144, 1036),
        ((1920, 1080), 16384, (1920, 1080), (78, 138), 10764, 2691),
        ((3000, 3000), 16384, (1794, 1794), (130, 130), 16900, 4225),
        ((4032, 3024), 16384, (2069, 1551), (112, 148), 16576, 4144),
        ((10, 10), 16384, (10, 10), (2, 2), 4, 1),
        ((20000, 100), 16384, (7168, 35), (4, 512), 2048, 512),
        ((1920, 1080), 4096, (1196, 672), (48, 86), 4128, 1032),
        ((640, 360), 4096, (640, 360), (26, 46), 1196, 299),
        # sides of one pixel, and transposed
        ((1, 1), 16384, (1, 1), (2, 2), 4, 1),
        ((100, 20000), 16384, (35, 7168), (512, 4), 2048, 512),
        ((1, 20000), 16384, (1, 7168), (512, 2), 1024, 256),
        ((20000, 1), 4096, (7168, 1), (2, 512), 1024, 256),
    ],
)
def test_sizes(size, limit, resized, grid, patches, tokens):
    width, height = size
    white = np.broadcast_to(np.uint8(255), (height, width, 3))
    if limit == PROCESSOR.in_patch_limit:
        item = PROCESSOR.image(white)
    else:
        (item,) = PROCESSOR.video(white[None])
    assert PROCESSOR.resized(width, height, limit) == resized
    assert item.grid == (1, *grid) and item.patches.shape == (patches, 588) and item.tokens == tokens
    expected = np.zeros((grid[0] * 14, grid[1] * 14, 3), np.uint8)
    expected[: resized[1], : resized[0]] = 255
    assert np.array_equal(pixels_of(item)[0], expected)


def keys(x):
    x = abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resize_rows(pixels, size):
    """The stated rule along axis 0, in float64 weights rounded to integers: uint8 [n, ...] -> [size, ...]."""
    n = len(pixels)
    if n == size:
        return pixels
    scale = n / size
    filter_scale = max(scale, 1.0)
    support = 2 * filter_scale
    out = np.empty((size, *pixels.shape[1:]), np.uint8)
    for i in range(size):
        centre = (i + 0.5) * scale
        first, end = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), n)
        weights = keys((np.arange(first, end) - centre + 0.5) / filter_scale)
        weights = weights / np.cumsum(weights)[-1] * 2**22
        weights = np.trunc(weights + np.copysign(0.5, weights)).astype(np.int64)
        total = np.tensordot(weights, pixels[first:end].astype(np.int64), 1)
        out[i] = np.clip((total + 2**21) >> 22, 0, 255)
    return out


def resize(pixels, width, height):
    return resize_rows(resize_rows(pixels.swapaxes(0, 1), width).swapaxes(0, 1), height)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((41, 30), (17, 13)),
        ((41, 30), (40, 29)),
        ((41, 30), (41, 11)),
        ((41, 30), (7, 30)),
        ((41, 30), (1, 1)),
        ((41, 30), (97, 64)),
        ((41, 30), (60, 9)),
        ((1, 300), (1, 7)),
        ((640, 3), (35, 1)),
        ((257, 129), (128, 64)),
    ],
)
@pytest.mark.parametrize("content", ["random", "extreme", "smooth"])
def test_pillow_resizes_by_the_stated_rule(rng, old, new, content):
    shape = (old[1], old[0], 3)
    if content == "smooth":
        pixels = np.linspace(0, 255, math.prod(shape)).astype(np.uint8).reshape(shape)
    else:
        pixels = rng.integers(0, 256, shape, np.uint8) if content == "random" else rng.choice(np.uint8([0, 255]), shape)
    columns = Image.fromarray(pixels).resize((new[0], old[1]), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(columns.resize(new, Image.Resampling.BICUBIC)), resize(pixels, *new))


@pytest.mark.parametrize("shape", [(120, 90), (91, 173), (2, 400), (300, 1), (270, 129), (330, 54)])
def test_image_is_shrunk_padded_and_cut_by_the_stated_rule(rng, shape):
    """In the last two shapes Pillow 13 would shrink rows before columns."""
    pixels = rng.integers(0, 256, (*shape, 3), np.uint8)
    processor = replace(PROCESSOR, in_patch_limit=12, patch_limit_on_one_side=8)
    width, height = processor.resized(shape[1], shape[0], 12)
    item = processor.image(pixels)
    found = pixels_of(item)[0]
    assert np.array_equal(found[:height, :width], resize(pixels, width, height))
    assert not found[height:].any() and not found[:, width:].any()
    assert found.shape == (-(-height // 28) * 28, -(-width // 28) * 28, 3)


def test_order_within_a_patch():
    pixels = np.arange(2 * 28 * 28 * 3).reshape(28, 56, 3).astype(np.uint8)
    patches = PROCESSOR.image(pixels).patches
    for row, column, channel, y, x in [(0, 0, 0, 0, 0), (0, 1, 2, 3, 5), (1, 2, 1, 13, 0), (1, 3, 0, 7, 13)]:
        assert patches[row * 4 + column, channel * 196 + y * 14 + x] == pixels[row * 14 + y, column * 14 + x, channel]


def test_normalised(rng):
    item = PROCESSOR.image(rng.integers(0, 256, (28, 42, 3), np.uint8))
    assert item.levels.shape == (3, 256) and item.levels.dtype == np.float32
    assert item.levels[0, 0] == -1 and item.levels[0, 255] == 1 and np.array_equal(item.levels[0], item.levels[2])
    found = item.normalised(1, 5)
    assert found.dtype == np.float32 and found.shape == (4, 588)
    assert np.array_equal(found, ((item.patches[1:5] / 255).astype(np.float32) - np.float32(0.5)) * np.float32(2))


def test_normalised_by_channel():
    processor = replace(PROCESSOR, image_mean=(0.0, 0.25, 0.5), image_std=(1.0, 0.5, 0.25))
    item = processor.image(np.full((28, 28, 3), 255, np.uint8))
    assert np.array_equal(item.normalised(0, 4)[:, ::196], np.tile(np.float32([1, 1.5, 2]), (4, 1)))


def test_digest(picture):
    item = PROCESSOR.image(picture)
    changed = picture.copy()
    changed[3, 3, 0] ^= 1
    others = [
        PROCESSOR.image(changed),
        MediaItem("image", item.patches, (1, 2, 8), item.levels),
        replace(PROCESSOR, image_mean=(0.0, 0.5, 0.5)).image(picture),
    ]
    assert item.digest == PROCESSOR.image(Image.fromarray(picture)).digest == PROCESSOR.video(picture[None])[0].digest
    assert len(item.digest) == 32 and len({item.digest, *(other.digest for other in others)}) == 4


# sources of images


def test_sources_of_an_image(tmp_path, picture):
    data = saved(Image.fromarray(picture), "PNG")
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    sources = [
        *(path, str(path), data, Image.open(path), Image.fromarray(picture), picture, picture[:, ::-1][:, ::-1]),
        np.dstack([picture, picture[..., 0]]),
        "data:image/png;base64," + base64.b64encode(data).decode(),
        "DATA:;base64," + quote(base64.b64encode(data).decode()),
        "data:image/png," + quote(data),
    ]
    for source in sources:
        item = PROCESSOR.image(source)
        assert (item.kind, item.grid, item.timestamp, item.tokens) == ("image", (1, 4, 4), None, 4)
        assert item.patches.dtype == np.uint8
        assert item.digest == PROCESSOR.image(picture).digest
    assert np.array_equal(image_pixels(picture[..., 1], 30, 41), np.dstack([picture[..., 1]] * 3))


@pytest.mark.parametrize("scheme", ["http", "https", "HTTPS", "ftp", "s3", "file"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_remote_media_are_refused(kind, scheme):
    with pytest.raises(MediaError, match=rf"{scheme}://host/a.png: nothing is fetched from elsewhere, expected a path"):
        getattr(PROCESSOR, kind)(f"{scheme}://host/a.png")


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_8_bits_become_rgb_as_pillow_does_it(picture, mode):
    image = Image.fromarray(picture).convert("RGB" if mode == "LAB" else mode)
    if mode == "LAB":
        image = Image.merge("LAB", image.split())
    if mode in ("LA", "PA", "RGBA"):
        image.putalpha(Image.fromarray(picture[..., 0]))
    assert image.mode == mode
    before = image.tobytes()
    assert np.array_equal(image_pixels(image, 30, 41), np.asarray(image.convert("RGB")))
    assert image.mode == mode and image.tobytes() == before


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(("TIFF", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB")),
        *(("JPEG", mode) for mode in ("L", "RGB", "CMYK")),
        *(("BMP", mode) for mode in ("1", "L", "P", "RGB")),
        *(("GIF", mode) for mode in ("L", "P")),
        *(("WEBP", "RGBA"), ("PPM", "RGB"), ("TGA", "RGBA"), ("ICO", "RGBA"), ("JPEG2000", "RGB")),
    ],
)
def test_formats(picture, format, mode):
    image = Image.fromarray(picture).convert("RGB" if mode == "LAB" else mode)
    if mode == "LAB":
        image = Image.merge("LAB", image.split())
    data = saved(image, format, **({"sizes": [(41, 30)]} if format == "ICO" else {}))
    with Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(opened.convert("RGB"))
    assert np.array_equal(image_pixels(data, 30, 41), expected)


def test_palette_with_transparency(picture):
    image = Image.fromarray(picture).quantize(16)
    data = saved(image, "PNG", transparency=bytes(range(0, 256, 16)))
    assert np.array_equal(image_pixels(data, 30, 41), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
def test_16_bits_of_grey_keep_their_high_byte(rng, mode):
    values = rng.integers(0, 2**16, (20, 30), np.uint16)
    values[0, :4] = 0, 255, 256, 65535
    if mode == "I":
        image = Image.fromarray(values.astype(np.int32))
    else:
        image = Image.frombytes(mode, (30, 20), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    expected = np.dstack([values >> 8] * 3)
    assert image.mode == mode and np.array_equal(image_pixels(image, 20, 30), expected)
    for format in {"I;16": ("PNG", "TIFF", "PPM"), "I;16B": ("TIFF",)}.get(mode, ()):
        assert np.array_equal(image_pixels(saved(image, format), 20, 30), expected)


def test_pixels_of_unknown_range_are_refused():
    with pytest.raises(MediaError, match="PIL image: has floating-point pixels"):
        PROCESSOR.image(Image.new("F", (2, 2)))
    for value in (-1, 65536):
        with pytest.raises(MediaError, match=f"has pixels from {value} to {value}, expected 0 to 65535"):
            PROCESSOR.image(Image.new("I", (2, 2), value))


# stored pixels of an upright image, by EXIF orientation
STORED = {
    1: lambda u: u,
    2: lambda u: u[:, ::-1],
    3: lambda u: u[::-1, ::-1],
    4: lambda u: u[::-1],
    5: lambda u: u.swapaxes(0, 1),
    6: lambda u: np.rot90(u, 1),  # to be turned clockwise
    7: lambda u: u[::-1, ::-1].swapaxes(0, 1),
    8: lambda u: np.rot90(u, -1),
    9: lambda u: u,  # unknown
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation(picture, orientation, format):
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation](picture)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(image, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    assert np.array_equal(image_pixels(data, 30, 41), picture)
    assert np.array_equal(image_pixels(Image.open(io.BytesIO(data)), 30, 41), picture)


@pytest.mark.parametrize(("format", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_first_frame_of_an_animation(format, options):
    first, second = (Image.new("RGB", (20, 10), colour) for colour in ("red", "blue"))
    data = saved(first, format, save_all=True, append_images=[second], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.array_equal(image_pixels(data, 10, 20), np.asarray(first))


# hostile images


def png_header(width, height):
    """The bytes of a small PNG that says it is this large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(9460, 9460), (20000, 20000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bomb(size):
    with pytest.raises(MediaError, match=rf"bytes: cannot be read .*{math.prod(size)} pixels.*expected an image"):
        PROCESSOR.image(png_header(*size))


def truncated_jpeg(part):
    data = saved(Image.effect_noise((64, 64), 50), "JPEG")
    return data[: int(len(data) * part)]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello, this is text\n" * 50,
        truncated_jpeg(0.02),
        truncated_jpeg(0.5),
        truncated_jpeg(0.95),
        png_header(64, 64),
        saved(Image.new("RGB", (64, 64)), "TIFF")[:100],
        saved(Image.new("RGB", (64, 64)), "WEBP")[:40],
        saved(Image.new("RGB", (64, 64)), "GIF")[:40],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n",
    ],
    ids=lambda data: repr(data[:8]),
)
def test_damaged_image(tmp_path, data):
    path = tmp_path / "broken.jpg"
    path.write_bytes(data)
    for source in (data, path, "data:image/jpeg;base64," + base64.b64encode(data).decode()):
        with pytest.raises(MediaError, match=r"^(\d+ bytes|.*broken\.jpg|data URL .*base64): .*expected an image"):
            PROCESSOR.image(source)


def test_random_damage_is_an_error_or_an_image(rng):
    image = Image.effect_noise((40, 40), 50).convert("RGB")
    for format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000", "ICO", "TGA", "PPM"):
        whole = np.frombuffer(saved(image, format), np.uint8)
        for _ in range(20):
            data = whole.copy()
            data[rng.integers(0, min(len(data), 400), 5)] = rng.integers(0, 256, 5)
            try:
                item = PROCESSOR.image(data.tobytes())
            except MediaError:
                continue
            assert item.patches.shape == (math.prod(item.grid), 588)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint16),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.array([[None]]),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_wrong_array(array):
    with pytest.raises(MediaError, match=r"array: is \w+ \[.*\], expected uint8 \[h, w\]"):
        PROCESSOR.image(array)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "source is a NoneType, expected a path"),
        ([1], "source is a list, expected a path"),
        ("no such file.png", "no such file.png: is no file"),
        ("a" * 10_000, r"^a{200}: is no file"),
        ("a\0b", "is no file"),
        ("/", "/: is no file"),
        ("data:image/png;base64", "data URL .*: has no comma"),
        ("data:image/png;base64,AAA*", r"data URL data:image/png;base64: is not base64"),
        ("data:,", "data URL data:: is in no format"),
    ],
)
def test_no_source_of_an_image(source, message):
    with pytest.raises(MediaError, match=message):
        PROCESSOR.image(source)


def test_image_without_pixels():
    with pytest.raises(MediaError, match="PIL image: is 0x5, expected at least one pixel"):
        PROCESSOR.image(Image.new("RGB", (0, 5)))


# sampling of videos


def numbered(count, height=28, width=28):
    """uint8 [count, height, width, 3]: frame i has the value i everywhere."""
    return np.repeat(np.arange(count, dtype=np.uint8), height * width * 3).reshape(count, height, width, 3)


def shown(items):
    """The numbers of the frames in each chunk."""
    return [pixels_of(item)[:, 0, 0, 0].tolist() for item in items]


@pytest.mark.parametrize(
    ("count", "fps", "frames", "times"),
    [
        (1, 2, [[0]], ["00:00:00.000"]),
        (2, 2, [[0, 1]], ["00:00:00.000"]),
        (3, 2, [[0, 1, 2]], ["00:00:00.000"]),
        (5, 2, [[0, 1, 2, 3], [4]], ["00:00:00.000", "00:00:02.000"]),
        (5, None, [[0, 1, 2, 3], [4]], ["00:00:00.000", "00:00:02.000"]),
        (5, 1, [[0, 1, 2, 3], [4]], ["00:00:00.000", "00:00:04.000"]),  # all there are
        (3, 30, [[0]], ["00:00:00.000"]),  # 0.2 frames, at least one
        (5, 4, [[0, 4]], ["00:00:00.000"]),  # 2.5 frames, half to even
        (7, 4, [[0, 2, 4, 6]], ["00:00:00.000"]),  # 3.5 frames
        (6, 4, [[0, 2, 5]], ["00:00:00.000"]),  # frame 2.5, half to even
        (150, 30, [[0, 17, 33, 50], [66, 83, 99, 116], [132, 149]], ["00:00:00.000", "00:00:02.200", "00:00:04.400"]),
        (100, 29.97, [[0, 16, 33, 50], [66, 82, 99]], ["00:00:00.000", "00:00:02.202"]),
        (5, 4 / 3661.5, [[0, 1, 2, 3], [4]], ["00:00:00.000", "01:01:01.500"]),
        (5, 4 / 86400, [[0, 1, 2, 3], [4]], ["00:00:00.000", "00:00:00.000"]),
        (5, 4 / 90061.25, [[0, 1, 2, 3], [4]], ["00:00:00.000", "01:01:01.250"]),
        (5, 4 / 8.2, [[0, 1, 2, 3], [4]], ["00:00:00.000", "00:00:08.199"]),  # as floating point has it
        (5, 1e-300, [[0, 1, 2, 3], [4]], None),
    ],
)
def test_sampling(count, fps, frames, times):
    items = PROCESSOR.video(numbered(count), fps)
    assert shown(items) == frames
    assert times is None or [item.timestamp for item in items] == times
    for item, chunk in zip(items, frames, strict=True):
        assert item.kind == "video" and item.grid == (len(chunk), 2, 2) and item.tokens == 1


def test_settings_of_sampling():
    processor = replace(PROCESSOR, sample_fps=1, temporal_merge_kernel_size=2)
    assert shown(processor.video(numbered(9), 3)) == [[0, 4], [8]]


def test_frames_are_resized_to_their_own_limit(rng):
    frames = rng.integers(0, 256, (2, 90, 120, 3), np.uint8)
    processor = replace(PROCESSOR, in_patch_limit_each_frame=12)
    (item,) = processor.video(frames)
    width, height = processor.resized(120, 90, 12)
    for found, frame in zip(pixels_of(item), frames, strict=True):
        assert np.array_equal(found[:height, :width], resize(frame, width, height))
        assert not found[height:].any() and not found[:, width:].any()


def test_prompt_text(picture):
    image = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"
    video = "<|media_begin|>video<|media_content|><|media_pad|><|media_end|>"
    assert prompt_text([PROCESSOR.image(picture)]) == image
    assert prompt_text(PROCESSOR.video(numbered(5))) == f"00:00:00.000{video}00:00:02.000{video}"
    assert prompt_text([]) == ""


# video files


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_lossless_video(rng, count):
    frames = rng.integers(0, 256, (count, 30, 40, 3), np.uint8)
    found, expected = PROCESSOR.video(movie(frames)), PROCESSOR.video(frames)
    assert [(i.grid, i.timestamp, i.digest) for i in found] == [(i.grid, i.timestamp, i.digest) for i in expected]


@pytest.mark.parametrize(
    ("format", "codec", "pixels"),
    [
        ("mp4", "libx264", "yuv420p"),
        ("mp4", "mpeg4", "yuv420p"),
        ("mov", "libx264", "yuv420p"),
        ("matroska", "libx264", "yuv420p"),
        ("webm", "libvpx", "yuv420p"),
        ("webm", "libvpx-vp9", "yuv420p"),
        ("gif", "gif", "rgb8"),
    ],
)
def test_formats_of_videos(tmp_path, format, codec, pixels):
    """75 frames at 25 a second, each brighter than the one before; libx264 does not store them in their order."""
    data = movie(numbered(75, 48, 64) * 3, format, codec, pixels, rate=25)
    items = PROCESSOR.video(data)
    assert [item.grid for item in items] == [(4, 4, 6), (2, 4, 6)]
    assert [item.timestamp for item in items] == ["00:00:00.000", "00:00:02.359"]  # 59 / 25 in floating point
    levels = [pixels_of(item)[:, 20, 20, 0] / 3 for item in items]
    assert np.abs(np.concatenate(levels) - [0, 15, 30, 44, 59, 74]).max() < (12 if format == "gif" else 2)
    path = tmp_path / "concat:clip"
    path.write_bytes(data)
    url = "data:video/mp4;base64," + base64.b64encode(data).decode()
    for source in (path, str(path), url):
        assert [item.digest for item in PROCESSOR.video(source)] == [item.digest for item in items]


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        ((1, 0, 0, 1), lambda frames: frames),
        ((0, 1, -1, 0), lambda frames: np.rot90(frames, -1, (1, 2))),
        ((-1, 0, 0, -1), lambda frames: np.rot90(frames, 2, (1, 2))),
        ((0, -1, 1, 0), lambda frames: np.rot90(frames, 1, (1, 2))),
    ],
)
def test_rotation_of_a_video(matrix, turned):
    """A camera's mp4 says in its track header how to turn it: x to (a, b), y to (c, d), y pointing down."""
    frames = np.zeros((2, 56, 84, 3), np.uint8)
    frames[:, :28, :28] = 255
    data = bytearray(movie(frames, "mp4", "libx264", "yuv420p"))
    start = data.index(b"tkhd") + 44
    assert struct.unpack_from(">9i", data, start) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", data, start, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (item,) = PROCESSOR.video(bytes(data))
    assert np.array_equal(pixels_of(item) > 128, turned(frames) > 128)


def test_packets_that_show_no_frame():
    """WebM may hold VP8 frames that are only referred to: the frames are counted, not the packets."""
    source = av.open(io.BytesIO(movie(numbered(12, 48, 64) * 8, "webm", "libvpx", "yuv420p", rate=4)))
    file = io.BytesIO()
    with source, av.open(file, "w", format="webm") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                data = bytearray(bytes(packet))
                data[0] &= 0xEF if number in (3, 7) else 0xFF  # show_frame
                copy = av.Packet(bytes(data))
                copy.pts, copy.dts, copy.time_base, copy.stream = packet.pts, packet.dts, packet.time_base, stream
                copy.is_keyframe = packet.is_keyframe
                container.mux(copy)
    with av.open(io.BytesIO(file.getvalue())) as container:
        assert len(list(container.decode(video=0))) == 10
    chunks = PROCESSOR.video(file.getvalue())
    # of 10 frames at 4 a second the indices 0, 2, 4 (4.5 to even), 7 (6.75), 9: without numbers 3 and 7
    assert [item.grid[0] for item in chunks] == [4, 1]
    assert np.round(np.concatenate([pixels_of(i)[:, 20, 20, 0] for i in chunks]) / 8).tolist() == [0, 2, 5, 9, 11]


# folders of frames


def test_folder_of_frames(tmp_path):
    frames = numbered(6)
    for name, frame in zip(("f00.png", "f01.PNG", "f02.bmp", "f03.png", "f10.png", "f2.png"), frames, strict=True):
        Image.fromarray(frame).save(tmp_path / name)
    (tmp_path / "f001.txt").write_text("no frame")
    (tmp_path / ".f0.png").write_text("no frame")
    for source in (tmp_path, str(tmp_path)):
        for fps in (None, 2, 4):
            found, expected = PROCESSOR.video(source, fps), PROCESSOR.video(frames, fps)
            assert [(i.timestamp, i.digest) for i in found] == [(i.timestamp, i.digest) for i in expected]


def test_folder_without_frames(tmp_path):
    (tmp_path / "notes.txt").write_text("no frame")
    with pytest.raises(MediaError, match=r"test_folder.*: has no frames, expected at least one"):
        PROCESSOR.video(tmp_path)


def test_folder_with_a_broken_frame(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_text("no frame")
    with pytest.raises(MediaError, match=r"1\.png: is in no format that Pillow opens"):
        PROCESSOR.video(tmp_path)


def test_frames_of_several_sizes(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "0.png")
    Image.new("RGB", (30, 40)).save(tmp_path / "1.png")
    with pytest.raises(MediaError, match=r"frame 1 is \(30, 40\), expected \(40, 30\)"):
        PROCESSOR.video(tmp_path)


# hostile videos

MP4 = movie(np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), np.uint8), "mp4", "libx264", "yuv420p")


def without_frames(format):
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height = 64, 48
        container.start_encoding()
    return file.getvalue()


def only_sound():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux([*stream.encode(frame), *stream.encode()])
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello, this is text\n" * 50,
        MP4[:100],
        MP4[: len(MP4) // 2],
        MP4[: len(MP4) - 300],
        MP4[100:],
        without_frames("mp4"),
        without_frames("matroska"),
        only_sound(),
        movie(numbered(2, 48, 64), "avi", "mpeg4", "yuv420p"),
        saved(Image.new("RGB", (64, 64)), "PNG"),
        b"ffconcat version 1.0\nfile /etc/hostname\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n",
    ],
    ids=lambda data: f"{data[4:12]!r}{len(data)}",
)
def test_damaged_video(tmp_path, data):
    path = tmp_path / "broken.mp4"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(MediaError, match=r"^(\d+ bytes|.*broken\.mp4): .*expected"):
            PROCESSOR.video(source)


def test_random_damage_is_an_error_or_a_video(rng):
    noise = rng.integers(0, 256, (12, 48, 64, 3), np.uint8)
    movies = [
        movie(noise, "mp4", "libx264", "yuv420p"),
        movie(noise),
        movie(noise, "webm", "libvpx", "yuv420p"),
        movie(noise, "gif", "gif", "rgb8"),
    ]
    for data in movies:
        for _ in range(15):
            damaged = np.frombuffer(data, np.uint8).copy()
            damaged[rng.integers(0, len(data), 10)] = rng.integers(0, 256, 10)
            damaged = damaged[: rng.integers(1, 2 * len(data))]
            try:
                items = PROCESSOR.video(damaged.tobytes())
            except MediaError:
                continue
            assert items and all(item.patches.shape == (math.prod(item.grid), 588) for item in items)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((2, 4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((0, 4, 4, 3), np.uint8),
        np.zeros((2, 0, 4, 3), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_wrong_array_of_frames(array):
    with pytest.raises(MediaError, match="array: .*expected"):
        PROCESSOR.video(array)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), True, "2"])
def test_wrong_fps(fps):
    with pytest.raises(MediaError, match=r"fps is .*, expected a number > 0"):
        PROCESSOR.video(numbered(2), fps)


def test_fps_of_a_file():
    with pytest.raises(MediaError, match="bytes: fps is 2, expected None: a video file states its own"):
        PROCESSOR.video(MP4, 2)


def test_video_longer_than_any_prompt():
    frames = np.broadcast_to(np.uint8(0), (100_000, 360, 640, 3))
    with pytest.raises(MediaError, match="array: 100000 sampled frames are 7,475,000 tokens, expected <= 262,144"):
        PROCESSOR.video(frames)
    assert len(PROCESSOR.video(frames, fps=20_000)) == 3


def test_frames_that_are_too_large(monkeypatch):
    monkeypatch.setattr(media, "MAX_FRAME_PIXELS", 64 * 48)
    assert PROCESSOR.video(MP4)
    monkeypatch.setattr(media, "MAX_FRAME_PIXELS", 64 * 48 - 1)
    with pytest.raises(MediaError, match="bytes: frames are 64x48, expected at most 3,071 pixels"):
        PROCESSOR.video(MP4)


def test_frames_that_grow(monkeypatch):
    """A VP9 stream of 64x48 that goes on with 640x480, which its header does not say."""
    file = io.BytesIO()
    with av.open(file, "w", format="webm") as container:
        stream, time = None, 0
        for height, width in ((48, 64), (480, 640)):
            data = movie(numbered(2, height, width), "webm", "libvpx-vp9", "yuv420p")
            with av.open(io.BytesIO(data)) as part:
                stream = stream or container.add_stream_from_template(part.streams.video[0])
                for packet in part.demux(video=0):
                    if packet.size:
                        packet.stream, packet.pts, packet.dts = stream, time, time
                        time += 500
                        container.mux(packet)
    with pytest.raises(MediaError, match=r"frame 2 is \(640, 480\), expected \(64, 48\)"):
        PROCESSOR.video(file.getvalue())
    monkeypatch.setattr(media, "MAX_FRAME_PIXELS", 64 * 48)
    with pytest.raises(MediaError, match="cannot be read"):  # before there is a frame
        PROCESSOR.video(file.getvalue())


def test_without_pyav(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match=r"bytes: a video needs PyAV, expected: pip install 'kimi-native\[video\]'"):
        PROCESSOR.video(MP4)
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    assert len(PROCESSOR.video(tmp_path)) == len(PROCESSOR.video(numbered(1))) == 1


def test_only_sampled_frames_are_kept(tmp_path):
    """600 frames of 640x360 are 415 MB; of one a second a 20th is kept, and freed here."""
    path = tmp_path / "long.mp4"
    path.write_bytes(movie(np.broadcast_to(numbered(1, 360, 640), (600, 360, 640, 3)), "mp4", "mpeg4", "yuv420p", 30))
    script = """if True:
        import resource, sys
        from kimi_native.media import MediaProcessor
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        processor = MediaProcessor(sample_fps=0.25)
        processor.video(sys.argv[1])
        before = peak()
        items = MediaProcessor().video(sys.argv[1])
        print(peak() - before, sum(item.patches.nbytes for item in items))"""
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    kilobytes, kept = map(int, done.stdout.split())
    assert kept == 40 * 1196 * 588
    assert kilobytes * 1024 < kept + 20e6
