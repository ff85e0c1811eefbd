"""Videos as a few frames each, sampled evenly: the same frames in every run, and never a whole film in memory."""

import io
import math
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
from PIL import Image

from sail_rl.data.images import IMAGE_ERRORS, MAX_PIXELS, BadRow, decode_image, flat_rgb, open_image

MAX_FRAMES = 216_000  # an hour at 60 a second: a few frames tell little of more, and finding them takes long
MAX_SIDE = 768  # of a kept frame: tiling models see 448 pixels, Qwen-VL about this; 16 full frames would take 100 MB
WRITE_ANEW = "write it anew, as with: ffmpeg -i <old> <new>.mp4"
VIDEO_ERRORS = (av.FFmpegError, *IMAGE_ERRORS)


def decode_video(video: Any, folder: Path, count: int) -> tuple[Image.Image, ...]:
    """At most `count` frames of a path, bytes, `{"bytes", "path"}` or list of pictures, upright and RGB."""
    if isinstance(video, list | tuple):
        if not video:
            raise BadRow("a video is an empty list of frames; drop the row or give its frames")
        return tuple(shrunk(decode_image(video[place], folder)) for place in sampled_places(len(video), count))
    name = video if isinstance(video, str) else video_path(video) or "(bytes)"
    try:
        with av.open(video_source(video, folder)) as container:
            times, keys = frame_times(container, name)
        wanted = [times[place] for place in sampled_places(len(times), count)]
        with av.open(video_source(video, folder)) as container:  # anew: not every format can be wound back
            return tuple(frames_at(wanted, keys, container, name))
    except VIDEO_ERRORS as error:
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise BadRow(f"video {name} cannot be read: {reason}; remake or remove it") from None


def check_video(video: Any, folder: Path) -> None:
    """What can be seen without decoding: the form, and that its file or frames are there."""
    if isinstance(video, list | tuple):
        for frame in video:
            open_image(frame, folder)
    else:
        source = video_source(video, folder)
        if isinstance(source, str) and not Path(source).is_file():
            raise BadRow(f"video {video_path(video) or video}: there is no file {source}")


def video_source(video: Any, folder: Path) -> str | io.BytesIO:
    """What PyAV opens."""
    if isinstance(video, dict):
        video = video.get("path") if video.get("bytes") is None else video["bytes"]
    if isinstance(video, bytes):
        return io.BytesIO(video)
    if not isinstance(video, str):
        raise BadRow(f"a video is a path, bytes or a list of pictures, not {type(video).__name__}")
    return str((folder / video).absolute())  # absolute, so that FFmpeg takes no name for an address


def video_path(video: Any) -> str | None:
    """The path that a video came with, if any."""
    return video.get("path") if isinstance(video, dict) else None


def sampled_places(total: int, count: int) -> list[int]:
    """The middles of `count` equal parts of `total` frames; all frames where there are no more than that."""
    parts = min(total, count)
    return [(2 * part + 1) * total // (2 * parts) for part in range(parts)]


def frame_times(container, name: str) -> tuple[list[int], list[int]]:
    """Times of all frames and of the key frames, in order and in the stream's own unit, without decoding."""
    times, keys = [], []
    for packet in container.demux(video_stream(container, name)):
        if packet.size == 0:  # the end, not a frame
            continue
        if packet.pts is None:
            raise BadRow(f"video {name} has frames without times; {WRITE_ANEW}")
        if packet.is_keyframe:
            keys.append(packet.pts)
        if not packet.is_discard:  # cut away at the beginning, but needed to decode what follows
            times.append(packet.pts)
        if len(times) > MAX_FRAMES:
            raise BadRow(f"video {name} has more than {MAX_FRAMES} frames; cut it, or give some frames as a list")
    if not times:
        raise BadRow(f"video {name} has no frames; remove it")
    return sorted(times), sorted(keys)


def video_stream(container, name: str):
    """The first video stream, of a size that can be decoded."""
    if not container.streams.video:
        raise BadRow(f"video {name} has no pictures, only sound or text; remove it")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise BadRow(f"video {name} has a format that PyAV cannot decode; {WRITE_ANEW}")
    if stream.width * stream.height > MAX_PIXELS:
        raise BadRow(f"video {name} has frames of {stream.width}x{stream.height} pixels; the limit is {MAX_PIXELS}")
    return stream


def frames_at(wanted: list[int], keys: list[int], container, name: str) -> Iterator[Image.Image]:
    """Decode the frames at these times; what lies between them is jumped over where key frames allow it."""
    stream = video_stream(container, name)
    frames, reached = container.decode(stream), -math.inf
    for time in wanted:
        # One key frame earlier than must be: formats without an index (MPEG-TS) jump a little too far.
        place = bisect_right(keys, time) - 2
        if place >= 0 and keys[place] > max(reached, keys[0]):
            container.seek(keys[place], stream=stream)
            frames = container.decode(stream)
        found = next((frame for frame in frames if frame.pts is not None and frame.pts >= time), None)
        if found is None or found.pts != time:
            raise BadRow(f"video {name} is torn: a frame that it announces cannot be decoded; {WRITE_ANEW}")
        reached = time
        yield shrunk(picture_of(found))


def picture_of(frame: av.VideoFrame) -> Image.Image:
    """A frame as a picture, upright where a camera was held on its side, on white where it is transparent."""
    transparent = any(component.is_alpha for component in frame.format.components)
    picture = flat_rgb(Image.fromarray(frame.to_ndarray(format="rgba" if transparent else "rgb24")))
    turned = 0 if math.isnan(frame.rotation) else frame.rotation
    return picture.rotate(turned, expand=True) if turned else picture


def shrunk(picture: Image.Image) -> Image.Image:
    """No side longer than `MAX_SIDE`."""
    if max(picture.size) > MAX_SIDE:
        picture = picture.copy()
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)
    return picture
