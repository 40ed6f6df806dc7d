"""Pictures, clips and voxel grids between files and tensors: how they are read, cut to a size, and written."""

from __future__ import annotations

import hashlib
import math
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign import mesh
from diffalign.errors import UserError
from diffalign.files import replacing
from diffalign.records import MAX_PIXELS, media_path, read_image, save_image

if TYPE_CHECKING:
    from collections.abc import Iterator

Modality = Literal["image", "video", "mesh"]
Size = tuple[int, ...]
"""Height and width in pixels; of a clip, frames before them."""

SUFFIX: dict[str, str] = {"image": ".png", "video": ".mp4", "mesh": ".npz"}
FPS = 16  # of clips that are written; Wan's own rate


class View(NamedTuple):
    """How a picture is cut to the size that is trained on: scaled to cover it, then cropped."""

    original: tuple[int, int]
    """Height and width of the file's picture."""
    scaled: tuple[int, int]
    crop: tuple[int, int]
    """Top and left of the crop in the scaled picture."""
    target: tuple[int, int]


def view(original: tuple[int, int], target: tuple[int, int], place: tuple[float, float] = (0.5, 0.5)) -> View:
    """Cover ``target`` and crop at ``place``: (0, 0) keeps the upper left corner, (0.5, 0.5) the centre."""
    factor = max(new / old for new, old in zip(target, original, strict=True))
    height, width = (max(new, round(old * factor)) for new, old in zip(target, original, strict=True))
    top, left = (int((have - want) * at) for have, want, at in zip((height, width), target, place, strict=True))
    return View(original, (height, width), (top, left), target)


def crop_place(identity: str) -> tuple[float, float]:
    """A random place for a crop that the name of a record decides."""
    digest = hashlib.sha256(f"crop|{identity}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32, int.from_bytes(digest[4:8], "big") / 2**32


def cut(image: Image.Image, how: View) -> Image.Image:
    """The part of a picture that is trained on, at its size."""
    if how.original == how.target:
        return image
    (top, left), (height, width) = how.crop, how.target
    scaled = image.resize((how.scaled[1], how.scaled[0]), Image.Resampling.LANCZOS)
    return scaled.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> Tensor:
    """A PIL picture -> (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()


def to_pixels(image: Tensor) -> np.ndarray:
    """(..., 3, H, W) in [0, 1] -> (..., H, W, 3) uint8, rounded as the stock pipelines do."""
    return (image * 255).round().to(torch.uint8).movedim(-3, -1).cpu().numpy()


def bucket(ratio: float, area: tuple[int, int], step: int) -> tuple[int, int]:
    """The height and width nearest to an aspect ratio (height / width), multiples of ``step`` within an area.

    Args:
        area: a height and width whose product is the most pixels a bucket may have.
    """
    most = area[0] * area[1]
    sizes = {(side, most // side // step * step) for side in range(step, most // step + 1, step)}
    sizes |= {(w, h) for h, w in sizes}
    usable = [(h, w) for h, w in sorted(sizes) if w and h and max(h, w) <= 4 * min(h, w)]
    if not usable:
        raise UserError(f"data.buckets: no multiple of {step} fits into {area[0]}x{area[1]} pixels")
    return min(usable, key=lambda size: (abs(math.log(size[0] / size[1] / ratio)), -size[0] * size[1]))


# --- files --------------------------------------------------------------------------------------------------------


def picture_size(modality: Modality, root: Path, name: str) -> tuple[int, int]:
    """Height and width of a picture or of the frames of a clip."""
    if modality == "video":
        frame = next(iter(_frames(root, name)))
        return frame.height, frame.width
    image = read_image(root, name)
    return image.height, image.width


def frame_count(root: Path, name: str) -> int:
    """The number of frames of a clip: what its file says, or counted where it does not.

    Raises:
        UserError: no such file, or an unreadable one.
    """
    with _video(root, name) as (container, stream):
        return stream.frames or sum(1 for _ in container.decode(stream))


def frame_rate(root: Path, name: str) -> float:
    """Frames per second of a clip.

    Raises:
        UserError: no such file, an unreadable one, or one that does not say.
    """
    with _video(root, name) as (_, stream):
        if stream.average_rate:
            return float(stream.average_rate)
    raise UserError(f"{media_path(root, name)}: does not say its frame rate; write it again as mp4")


def read(modality: Modality, root: Path, name: str, size: Size, place: tuple[float, float]) -> Tensor:
    """A media file as a family encodes it: (3, H, W) or (3, F, H, W) in [-1, 1], or voxels (1, R, R, R).

    Args:
        size: of the result; voxels are as they are.
        place: of the crop.

    Raises:
        UserError: no such file, an unreadable one, or a clip that is too short.
    """
    if modality == "mesh":
        return torch.from_numpy(mesh.read_occupancy(media_path(root, name))).float()[None]
    target = (size[-2], size[-1])
    if modality == "image":
        image = read_image(root, name)
        return to_tensor(cut(image, view((image.height, image.width), target, place)))
    frames = []
    for frame in _frames(root, name):
        frames.append(to_tensor(cut(frame, view((frame.height, frame.width), target, place))))
        if len(frames) == size[0]:
            return torch.stack(frames, 1)
    raise UserError(f"{media_path(root, name)}: has {len(frames)} frames, {size[0]} are needed")


def write(modality: Modality, path: Path, sample: Tensor) -> None:
    """One decoded sample: (3, H, W) or (3, F, H, W) in [0, 1], or voxels (1, R, R, R), with its mesh beside it."""
    if modality == "image":
        save_image(path, to_pixels(sample))
    elif modality == "video":
        _save_clip(path, to_pixels(sample.transpose(0, 1)))
    else:
        occupancy = sample[0].bool().cpu().numpy()
        mesh.write_mesh(path.with_suffix(".ply"), *mesh.triangulate(occupancy))
        mesh.write_occupancy(path, occupancy)


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise UserError("clips are read and written with PyAV: pip install 'diffalign[video]'") from None
    return av


def _frames(root: Path, name: str) -> Iterator[Image.Image]:
    """The frames of a clip as RGB pictures."""
    with _video(root, name) as (container, stream):
        for frame in container.decode(stream):
            yield frame.to_image()


def frames_at(root: Path, name: str, fps: float) -> Iterator[tuple[float, Image.Image]]:
    """The frames of a clip at so many per second, each with its time in seconds since the first.

    A clip with fewer frames than that gives all of them, none twice.

    Raises:
        UserError: no such file, or an unreadable one.
    """
    start = None
    due = 0.0
    with _video(root, name) as (container, stream):
        rate = float(stream.average_rate or FPS)
        for index, frame in enumerate(container.decode(stream)):
            time = index / rate if frame.time is None else frame.time
            start = time if start is None else start
            if time - start >= due - 1e-6:
                yield time - start, frame.to_image()
                due = (int((time - start) * fps + 1e-6) + 1) / fps


@contextmanager
def _video(root: Path, name: str) -> Iterator[tuple[Any, Any]]:
    """The open container of a clip and its first video stream."""
    av = _av()
    path = media_path(root, name)
    if not path.is_file():
        raise UserError(f"{path}: no such clip")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path}: holds no video")
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise UserError(f"{path}: more than {MAX_PIXELS:,} pixels; scale it down")
            yield container, stream
    except (av.FFmpegError, ValueError) as error:
        raise UserError(f"{path}: truncated or not a clip: {error}") from None


def _save_clip(path: Path, frames: np.ndarray) -> None:
    """Write uint8 (F, H, W, 3) as H.264, all at once, nearly without loss."""
    av = _av()
    with (
        replacing(path, durable=False) as handle,
        av.open(handle, mode="w", format="mp4", options={"fflags": "+bitexact"}) as container,
    ):  # without the date
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "10", "preset": "fast"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # threads cut the picture into slices, and the bits would depend on their number
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())
