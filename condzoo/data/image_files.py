"""Reading one image file as RGB; what cannot be read is an error that names the file."""

import os
from io import BufferedIOBase

from PIL import Image

# Kinds of pixels that Pillow turns into 8-bit RGB without loss of range. Others (16-bit grey, float) it would clip.
EIGHT_BIT = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "La", "RGBa"}


class ImageError(ValueError):
    """An image that cannot be read."""


def read_image(file: str | os.PathLike[str] | BufferedIOBase, name: str | None = None) -> Image.Image:
    """The image of a file, as RGB: greyscale is repeated, CMYK and palettes are converted, transparency is dropped.

    Args:
        file: its path, or its bytes as an open file.
        name: what errors call it; None: its path.

    Raises:
        ImageError: the file is missing, truncated, no image, or has more than 8 bits a channel.
    """
    path = name or str(file)
    try:
        with Image.open(file) as image:  # type: ignore[arg-type]  # Pillow asks for IO[bytes], which this is
            if image.mode not in EIGHT_BIT:
                raise ImageError(f"{path}: its pixels are of mode {image.mode!r}; convert it to 8 bits a channel")
            one_a_colour = isinstance(image.info.get("transparency"), bytes)  # of which Pillow warns
            return (image.convert("RGBA") if one_a_colour else image).convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # a damaged file makes each of Pillow's decoders fail in its own way
        fault = str(error).replace(f": {path!r}", "")
        kind = "is no image" if isinstance(error, Image.UnidentifiedImageError) else "cannot be read"
        reason = "" if isinstance(error, Image.UnidentifiedImageError) else f" ({fault or type(error).__name__})"
        raise ImageError(f"{path} {kind}{reason}; replace it, or remove it") from error
