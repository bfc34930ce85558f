"""Pictures of any mode, upright, as RGB arrays (Pillow and OpenCV).

Legend: H W pixels.
"""

import cv2
import numpy as np
from PIL import Image

EXIF_ORIENTATION = 0x0112


def upright_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a picture of any mode, EXIF orientation applied; the first frame of several.

    Grey, palette and CMYK become RGB without colour management. Alpha is dropped and the stored colour kept, as the
    published code does through `cv2.imread`. 16-bit grey keeps its high byte, as is done for 16-bit colour.

    Raises:
        ValueError: a float image.
        Exception: whatever Pillow raises on damaged bytes.
    """
    return upright(_pixels(image), orientation(image))


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes an EXIF orientation (1 to 8; anything else is taken for 1) of an (H, W, 3) array."""
    if orientation in (5, 6, 7, 8):  # stored with rows and columns exchanged
        pixels = cv2.transpose(pixels)
    rows, columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    if rows or columns:
        pixels = cv2.flip(pixels, -1 if rows and columns else int(columns))
    return np.ascontiguousarray(pixels)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of a picture; 1 (upright) where none is stated."""
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF raises anything; the picture itself may be sound
        return 1


def _pixels(image: Image.Image) -> np.ndarray:
    image.load()
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("a float image is not a picture; give it as depth, or store 8 bits")
    return np.array(image.convert("RGB"))
