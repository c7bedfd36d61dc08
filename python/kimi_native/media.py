"""Images and videos to the patches that the vision tower takes, by the rule the model was trained with.

An image is brought to RGB, shrunk by Pillow's bicubic until it fits the limits of media_proc_cfg, padded right and
below with 0 to whole tokens (2 x 2 patches) and cut into patches. A video is sampled at sample_fps and cut into chunks
of temporal_merge_kernel_size frames, each of which is an item of its own. Source: preprocessor_config.json of
moonshotai/Kimi-K2.5 and the image processor beside it.

Sources come from anywhere: bytes that a decoder chokes on are a MediaError, and what an item or a video may hold is
bounded (MAX_FRAME_PIXELS, MAX_VIDEO_TOKENS, PIL.Image.MAX_IMAGE_PIXELS).
"""

import base64
import hashlib
import io
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

MERGE = 2  # a token is MERGE x MERGE patches
MAX_FRAME_PIXELS = 8192 * 4096  # of a video: decoders hold more than a dozen frames
MAX_VIDEO_TOKENS = 262_144  # the context of the model
VIDEO_FORMATS = "mov,matroska,gif"  # FFmpeg's names; others may name further files and remote hosts to open

_IMAGE_TEXT = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"
_CHUNK_TEXT = "<|media_begin|>video<|media_content|><|media_pad|><|media_end|>"

# by EXIF orientation
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# by degrees counterclockwise
_ROTATED = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


class MediaError(ValueError):
    """Media or a preprocessor_config.json that cannot be used: the message names the source, what was found and what
    is expected."""


@dataclass(frozen=True, eq=False)
class MediaItem:
    """An image, or a chunk of a video's sampled frames: what one placeholder token of a prompt stands for.

    kind: "image" or "video". patches: uint8 [t * gh * gw, 3 * patch_size ** 2], in the order frame, row, column, and
    within a patch channel, row, column. grid: (t, gh, gw), in patches. levels: float32 [3, 256], a byte of each channel
    once normalised. timestamp: of a chunk's first frame, "HH:MM:SS.mmm"; None for an image.
    """

    kind: str
    patches: np.ndarray
    grid: tuple[int, int, int]
    levels: np.ndarray
    timestamp: str | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the prompt; a chunk takes as many as one of its frames."""
        return self.grid[1] * self.grid[2] // MERGE**2

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of what the tower sees: grid, levels and patches."""
        digest = hashlib.sha256(repr(self.grid).encode())
        digest.update(self.levels)
        digest.update(self.patches)
        return digest.digest()

    def normalised(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start, 3 * patch_size ** 2], the patches start .. stop - 1."""
        patches = self.patches[start:stop].reshape(stop - start, 3, -1)
        out = np.empty(patches.shape, np.float32)
        for channel in range(3):
            out[:, channel] = self.levels[channel][patches[:, channel]]
        return out.reshape(stop - start, -1)


def prompt_text(items: Iterable[MediaItem]) -> str:
    """What stands for the items in a prompt: an image, or all chunks of a video. The template adds the newline."""
    return "".join(_IMAGE_TEXT if item.kind == "image" else f"{item.timestamp}{_CHUNK_TEXT}" for item in items)


@dataclass(frozen=True)
class MediaProcessor:
    """The keys of media_proc_cfg in preprocessor_config.json, with the values published for Kimi K2.5.

    Raises MediaError for values that cannot be honoured.
    """

    in_patch_limit: int = 16384  # of an image, before padding
    in_patch_limit_each_frame: int = 4096
    patch_limit_on_one_side: int = 512
    patch_size: int = 14
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    sample_fps: float = 2.0
    temporal_merge_kernel_size: int = 4
    # These have one supported value.
    merge_kernel_size: int = MERGE
    fixed_output_tokens: None = None
    in_patch_limit_video: None = None
    max_num_frames_each_video: None = None
    timestamp_mode: str = "hh:mm:ss.fff"

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("image_mean", "image_std"):
                positive = f.name == "image_std"
                good = isinstance(value, tuple) and len(value) == 3 and all(_is_number(v, positive) for v in value)
                expected = f"three numbers{' > 0' if positive else ''}"
            elif f.name == "sample_fps":
                good, expected = _is_number(value, positive=True), "a number > 0"
            elif f.type is int and f.name != "merge_kernel_size":
                good, expected = type(value) is int and 0 < value < 2**31, "an integer > 0"
            else:
                good, expected = type(value) is type(f.default) and value == f.default, json.dumps(f.default)
            if not good:
                raise MediaError(f"media_proc_cfg.{f.name} is {value!r:.80}, expected {expected}")

    @classmethod
    def from_folder(cls, path) -> "MediaProcessor":
        """Read `path`/preprocessor_config.json; without the file the published values. MediaError if it is unusable."""
        file = Path(path) / "preprocessor_config.json"
        try:
            values = json.loads(file.read_bytes())
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise MediaError(f"{file}: cannot be read ({error.strerror}), expected a JSON object") from error
        except (ValueError, RecursionError) as error:
            raise MediaError(f"{file}: not JSON ({error}), expected a JSON object") from error
        settings = values.get("media_proc_cfg") if isinstance(values, dict) else None
        if not isinstance(settings, dict):
            raise MediaError(f"{file}: media_proc_cfg is {settings!r:.80}, expected an object")
        known = {f.name for f in fields(cls)}
        if unknown := settings.keys() - known:
            raise MediaError(f"{file}: media_proc_cfg.{min(unknown)} is unknown, expected one of {sorted(known)}")
        try:
            return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})
        except MediaError as error:
            raise MediaError(f"{file}: {error}") from None

    @cached_property
    def levels(self) -> np.ndarray:
        """float32 [3, 256], as in MediaItem"""
        values = (np.arange(256) / 255).astype(np.float32)
        mean, scale = np.float32(self.image_mean), np.float32(1 / np.array(self.image_std))
        return (values - mean[:, None]) * scale[:, None]

    def resized(self, width: int, height: int, limit: int) -> tuple[int, int]:
        """(width, height) that an image of this size is shrunk to for a limit of patches."""
        p, side = self.patch_size, self.patch_limit_on_one_side * self.patch_size
        cells = max(1, width // p) * max(1, height // p)
        scale = min(1.0, math.sqrt(limit / cells), side / width, side / height)
        return min(max(1, int(width * scale)), side), min(max(1, int(height * scale)), side)

    def image(self, source) -> MediaItem:
        """The item of one image.

        source: path, bytes or data URL of any format that Pillow opens; PIL image; NumPy uint8 [h, w], [h, w, 3] or
        [h, w, 4]. EXIF orientation is applied, alpha is dropped, of 16 bits of grey the high byte is kept (as Pillow
        does with colour), of an animation the first frame. Raises MediaError for anything else, for damaged files and
        for more than PIL.Image.MAX_IMAGE_PIXELS.
        """
        patches, grid = self._patches(_image(source), self.in_patch_limit)
        return MediaItem("image", patches, (1, *grid), self.levels)

    def video(self, source, fps: float | None = None) -> list[MediaItem]:
        """The chunks of one video, in order.

        source: path, bytes or data URL of an mp4, mov, mkv, webm or gif; path of a folder of images, taken in the order
        of their names; NumPy uint8 [frames, h, w, 3]. fps: frames per second of a folder or an array, by default
        sample_fps, which samples every frame; files state their own. Files are decoded as a stream, of which only the
        sampled frames are kept, each resized as it comes. Raises MediaError for anything else, for damaged files, for a
        video without frames, for frames of several sizes, and for more than MAX_FRAME_PIXELS or MAX_VIDEO_TOKENS.
        """
        if fps is not None and not _is_number(fps, positive=True):
            raise MediaError(f"fps is {fps!r:.80}, expected a number > 0")
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.ndim != 4 or source.shape[3] != 3:
                raise MediaError(f"array: is {source.dtype} {list(source.shape)}, expected uint8 [frames, h, w, 3]")
            return self._still_frames("array", source, fps)
        if isinstance(source, str | os.PathLike) and os.path.isdir(source):
            return self._still_frames(os.fsdecode(source), _images_of_folder(os.fsdecode(source)), fps)
        name, file = _file(source)
        if fps is not None:
            raise MediaError(f"{name}: fps is {fps}, expected None: a video file states its own")
        return self._video_file(name, file)

    def _patches(self, image: Image.Image, limit: int) -> tuple[np.ndarray, tuple[int, int]]:
        """uint8 [gh * gw, 3 * patch_size ** 2] of an RGB image, and (gh, gw)."""
        p = self.patch_size
        width, height = self.resized(image.width, image.height, limit)
        # Columns first, then rows: Pillow 13, asked for both at once, may take the other order, which rounds otherwise.
        for size in ((width, image.height), (width, height)):
            image = image.resize(size, Image.Resampling.BICUBIC) if size != image.size else image
        gh, gw = (-(-n // (p * MERGE)) * MERGE for n in (height, width))
        pixels = np.zeros((gh * p, gw * p, 3), np.uint8)
        pixels[:height, :width] = image
        return pixels.reshape(gh, p, gw, p, 3).transpose(0, 2, 4, 1, 3).reshape(gh * gw, 3 * p * p), (gh, gw)

    def _sampled(self, name: str, count: int, fps: float) -> np.ndarray:
        """The indices of the sampled ones of `count` frames, ascending."""
        if not count:
            raise MediaError(f"{name}: has no frames, expected at least one")
        sampled = max(round(count * min(self.sample_fps, fps) / fps), 1)
        return np.linspace(0, count - 1, sampled).round().astype(int)

    def _still_frames(self, name: str, frames: Sequence, fps: float | None) -> list[MediaItem]:
        fps = fps or self.sample_fps
        indices = self._sampled(name, len(frames), fps)
        return self._chunks(name, (_image(frames[i]) for i in indices), indices, fps)

    def _video_file(self, name: str, file) -> list[MediaItem]:
        with _open_video(name, file) as (container, stream):
            count = sum(packet.size > 0 for packet in container.demux(stream))
            fps = float(stream.average_rate or stream.guessed_rate or 0)
        if fps <= 0:
            raise MediaError(f"{name}: states no frame rate, expected one")
        while True:
            indices = self._sampled(name, count, fps)
            frames = _DecodedFrames(name, file, indices)
            chunks = self._chunks(name, frames, indices, fps)
            if frames.count == count:
                return chunks
            count, chunks = frames.count, None  # some packets show no frame, or several: sample what there is

    def _chunks(self, name: str, images: Iterable[Image.Image], indices: np.ndarray, fps: float) -> list[MediaItem]:
        """indices: of the images, in the video."""
        length = self.temporal_merge_kernel_size
        chunks, frames, size = [], [], None
        for n, image in enumerate(images):
            size = size or image.size
            if image.size != size:
                raise MediaError(f"{name}: frame {indices[n]} is {image.size}, expected {size} like those before")
            patches, grid = self._patches(image, self.in_patch_limit_each_frame)
            tokens = math.prod(grid) // MERGE**2 * math.ceil(len(indices) / length)
            if tokens > MAX_VIDEO_TOKENS:
                raise MediaError(
                    f"{name}: {len(indices)} sampled frames are {tokens:,} tokens, expected <= {MAX_VIDEO_TOKENS:,}"
                )
            frames.append(patches)
            if len(frames) == length or n + 1 == len(indices):
                time = _timestamp(indices[n + 1 - len(frames)] / fps)
                chunks.append(MediaItem("video", np.concatenate(frames), (len(frames), *grid), self.levels, time))
                frames = []
        return chunks


class _DecodedFrames:
    """The wanted frames of a video file as RGB images; `count` is the number of all frames once these are taken."""

    def __init__(self, name: str, file, indices: np.ndarray):
        self.name, self.file, self.wanted, self.count = name, file, set(indices.tolist()), 0

    def __iter__(self) -> Iterator[Image.Image]:
        with _open_video(self.name, self.file) as (container, stream):
            for index, frame in enumerate(container.decode(stream)):
                self.count = index + 1
                if index in self.wanted:
                    turn = _ROTATED.get(frame.rotation % 360)
                    yield frame.to_image() if turn is None else frame.to_image().transpose(turn)


@contextmanager
def _open_video(name: str, file):
    """(container, best video stream) of a path or a BytesIO; what PyAV raises inside becomes a MediaError."""
    try:
        import av
    except ImportError as error:
        raise MediaError(f"{name}: a video needs PyAV, expected: pip install 'kimi-native[video]'") from error
    if isinstance(file, io.BytesIO):
        file.seek(0)
    else:
        file = f"file:{file}"  # or FFmpeg may take its beginning for a protocol
    with (
        _decoding(name, "an mp4, mov, mkv, webm or gif"),
        av.open(file, container_options={"format_whitelist": VIDEO_FORMATS}) as container,
    ):
        stream = container.streams.best("video")
        if stream is None:
            raise MediaError(f"{name}: has no video stream, expected one")
        if stream.width * stream.height > MAX_FRAME_PIXELS:
            raise MediaError(
                f"{name}: frames are {stream.width}x{stream.height}, expected at most {MAX_FRAME_PIXELS:,} pixels"
            )
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # where frames are not what the file says
        yield container, stream


@contextmanager
def _decoding(name: str, expected: str):
    """Decoders answer damaged bytes with exceptions of many types."""
    try:
        yield
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        raise MediaError(f"{name}: is in no format that Pillow opens, expected {expected}") from error
    except Exception as error:
        raise MediaError(f"{name}: cannot be read ({type(error).__name__}: {error}), expected {expected}") from error


def _image(source) -> Image.Image:
    """An upright RGB image of any source that MediaProcessor.image takes."""
    if isinstance(source, np.ndarray):
        return _from_array(source)
    expected = "an image"
    if isinstance(source, Image.Image):
        with _decoding("PIL image", expected):
            return _rgb("PIL image", source)
    name, file = _file(source)
    with _decoding(name, expected), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            if image.format == "EPS":
                raise MediaError(f"{name}: is a PostScript program, expected {expected}")
            return _rgb(name, image)


def _images_of_folder(folder: str) -> list[str]:
    """Paths of the files that are images by their names, in order."""
    with _decoding(folder, "a folder of images"):
        names = sorted(os.listdir(folder))
    known = Image.registered_extensions()
    return [os.path.join(folder, n) for n in names if n[0] != "." and os.path.splitext(n)[1].lower() in known]


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,), (4,)) or not array.size:
        raise MediaError(
            f"array: is {array.dtype} {list(array.shape)}, expected uint8 [h, w], [h, w, 3] or [h, w, 4], not empty"
        )
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _rgb(name: str, image: Image.Image) -> Image.Image:
    image.load()
    if not image.width * image.height:
        raise MediaError(f"{name}: is {image.width}x{image.height}, expected at least one pixel")
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    if image.mode == "F":
        raise MediaError(f"{name}: has floating-point pixels, whose range is not stated; expected integers")
    if image.mode == "I" or image.mode.startswith("I;16"):  # convert("RGB") would clip them to 255
        grey = np.asarray(image)
        if image.mode == "I" and not 0 <= grey.min() <= grey.max() < 2**16:
            raise MediaError(f"{name}: has pixels from {grey.min()} to {grey.max()}, expected 0 to 65535")
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _file(source):
    """(name for messages, path or BytesIO) of a path, bytes or a data URL."""
    if isinstance(source, bytes):
        return f"{len(source)} bytes", io.BytesIO(source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _data_url(source)
    if isinstance(source, str) and re.match(r"[a-z][a-z0-9+.-]*://", source, re.IGNORECASE):
        raise MediaError(f"{source:.80}: nothing is fetched from elsewhere, expected a path, bytes or a data URL")
    if isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        if not os.path.isfile(path):
            raise MediaError(f"{path:.200}: is no file, expected one")
        return path, path
    raise MediaError(f"source is a {type(source).__name__}, expected a path, bytes, data URL, PIL image or NumPy array")


def _data_url(url: str) -> tuple[str, io.BytesIO]:
    head, comma, payload = url.partition(",")
    name = f"data URL {head:.80}"
    if not comma:
        raise MediaError(f"{name}: has no comma, expected data:[type][;base64],content")
    data = unquote_to_bytes(payload)
    if head.lower().endswith(";base64"):
        try:
            data = base64.b64decode(data, validate=True)
        except ValueError as error:
            raise MediaError(f"{name}: is not base64 ({error}), expected base64") from error
    return name, io.BytesIO(data)


def _is_number(value, positive: bool) -> bool:
    limit = sys.float_info.max
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and -limit <= value <= limit
    return is_number and (value > 0 or not positive)


def _timestamp(seconds: float) -> str:
    """HH:MM:SS.mmm, milliseconds cut off in floating point like the text the model was trained with."""
    whole = int(seconds)
    return f"{whole // 3600 % 24:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}.{int(seconds % 1 * 1000):03d}"
