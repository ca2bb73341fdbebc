"""How the images of a folder become arrays of one shape. Imports no torch, which takes seconds."""

from dataclasses import dataclass

from PIL import Image

from gm_probe.checks import optional, whole
from gm_probe.errors import DataError, UsageError

MAX_PIXELS = 64_000_000
"""Images with more pixels are refused before they are decoded (decompression bombs)."""
MOST_PIXELS = 2**31 - 1
"""The largest side that may be asked for."""


@dataclass(frozen=True, slots=True)
class ImageReading:
    """How the images of a folder become arrays of one shape.

    Attributes:
        channels: 1 or 3 converts to grey or RGB; None keeps grey only if all images are.
        image_size: pixels of both sides, whatever the aspect ratio was (bilinear, with antialiasing).
        resize: pixels of the shorter side; the aspect ratio stays. It equals torchvision's ``Resize``.
        crop: pixels a side of the square that is then cut from the centre. It equals torchvision's ``CenterCrop``.

    Raises:
        UsageError: a value is impossible, ``image_size`` is combined with another size, or ``crop`` is larger than
            ``resize``.
    """

    channels: int | None = None
    image_size: int | None = None
    resize: int | None = None
    crop: int | None = None

    def __post_init__(self) -> None:
        if self.channels not in {None, 1, 3}:
            raise UsageError(f"channels = {self.channels} must be 1 (grey) or 3 (RGB)")
        for name in ("image_size", "resize", "crop"):
            optional(whole, name, getattr(self, name), 1, MOST_PIXELS)
        if self.image_size and (self.resize or self.crop):
            raise UsageError("--image-size sets both sides. Give either --image-size, or --resize and --crop")
        if self.resize and self.crop and self.crop > self.resize:
            raise UsageError(
                f"--crop {self.crop} is larger than --resize {self.resize}, so a black border would be left"
            )

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """Return (H, W) of an image of this size after resizing, before the crop."""
        if self.image_size:
            return self.image_size, self.image_size
        if not self.resize:
            return height, width
        short, long = sorted((height, width))
        longer = int(self.resize * long / short)  # rounded as torchvision does
        return (self.resize, longer) if height <= width else (longer, self.resize)

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Return (H, W) of an image of this size after resizing and cropping."""
        return (self.crop, self.crop) if self.crop else self.scaled(height, width)

    def shaped(self, picture: Image.Image) -> Image.Image:
        """Resize and crop ``picture``."""
        height, width = self.scaled(picture.height, picture.width)
        if (picture.height, picture.width) != (height, width):
            if height * width > MAX_PIXELS:
                raise DataError(f"it would have {width}×{height} pixels; the limit is {MAX_PIXELS:,}")
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        if not self.crop:
            return picture
        if self.crop > min(height, width):
            raise DataError(f"it has {width}×{height} pixels, fewer than --crop {self.crop}; add --resize")
        top, left = round((height - self.crop) / 2), round((width - self.crop) / 2)
        return picture.crop((left, top, left + self.crop, top + self.crop))
