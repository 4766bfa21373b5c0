"""Images from strangers: what is let in, and what is not.

An upload is looked at before it is decoded: a file of a few KB can hold a picture of gigabytes, and a picture of one
pixel's height becomes one of gigabytes when it is scaled to the model's size.
"""

from __future__ import annotations

from io import BytesIO

from fastapi import HTTPException
from PIL import Image, ImageOps, UnidentifiedImageError
from starlette.datastructures import Headers
from starlette.responses import JSONResponse


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # Pillow's readers of some others start programs or are little tested
MAX_PIXELS = 50_000_000
MAX_RATIO = 16  # of the longer side to the shorter


def read_image(data: bytes, name: str = "the image") -> Image.Image:
    """Decodes an upload.

    Args:
        data: the bytes of the file.
        name: what to call it in errors.

    Returns:
        An RGB image, turned upright.

    Raises:
        HTTPException: 415 for what is no image of an allowed format, 413 for one that is too large or too elongated,
            422 for one that is damaged.
    """
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)  # reads the header only
    except UnidentifiedImageError:
        raise HTTPException(415, f"{name} is not an image of the formats {', '.join(FORMATS)}.") from None
    except Image.DecompressionBombError:
        raise HTTPException(413, f"{name} has too many pixels; {MAX_PIXELS:,} are allowed.") from None
    except Exception as error:  # broken headers raise whatever they happen to
        raise HTTPException(422, f"{name} is damaged: {error}") from None
    check_size(*image.size, name)
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # and so do broken pixels
        raise HTTPException(422, f"{name} is damaged: {error}") from None


def check_size(width: int, height: int, name: str) -> None:
    """Raises `HTTPException` 413 for an image that would take too much memory once it is decoded and scaled."""
    if width * height > MAX_PIXELS:
        raise HTTPException(413, f"{name} has {width} x {height} pixels; at most {MAX_PIXELS:,} are allowed.")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise HTTPException(
            413, f"{name} has {width} x {height} pixels; the longer side may be {MAX_RATIO} times the shorter one."
        )


class LimitBody:
    """
    ASGI middleware that answers 413 to requests with long bodies, before more than that much of them is read.

    Args:
        app: the application.
        max_bytes: of a request's body.
    """

    def __init__(self, app, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        message = f"The request is too long; at most {self.max_bytes:,} bytes are allowed."
        if int(Headers(scope=scope).get("content-length", 0)) > self.max_bytes:
            answer = JSONResponse({"detail": message}, 413, {"connection": "close"})
            return await answer(scope, receive, send)
        received = 0

        async def receive_within_limit():  # the length need not be told beforehand, nor truthfully
            nonlocal received
            part = await receive()
            received += len(part.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(413, message, {"connection": "close"})
            return part

        return await self.app(scope, receive_within_limit, send)
