"""Masks that stand where boxes stand."""
import zlib

import numpy as np
import torch
import torch.nn.functional as F


def mask_box(mask: np.ndarray) -> tuple | None:
    """First and last column and row of a mask [H, W] as a box of ints; None where the mask is empty."""
    rows = mask.any(1).nonzero()[0].tolist()
    columns = mask.any(0).nonzero()[0].tolist()
    if not rows:
        return None
    return columns[0], rows[0], columns[-1], rows[-1]


class Mask(tuple):
    """A mask in place of a box. As a tuple it is its box (x1, y1, x2, y2), or () where the mask is empty.

    Rewards, pictures and files see the box. Only the tracker asks for the pixels. A Mask equals a Mask with
    the same pixels and no box, so that each is tracked once. The pixels are kept compressed, because the
    completions of a batch may have thousands of masks.
    """

    @classmethod
    def of(cls, pixels: np.ndarray) -> "Mask":
        """The Mask of a bool array [H, W]."""
        mask = cls(mask_box(pixels) or ())
        mask.shape = pixels.shape
        mask.bits = zlib.compress(np.packbits(pixels).tobytes(), level=1)
        return mask

    @property
    def pixels(self) -> np.ndarray:
        """bool [H, W]"""
        bits = np.frombuffer(zlib.decompress(self.bits), np.uint8)
        height, width = self.shape
        return np.unpackbits(bits, count=height * width).astype(bool).reshape(height, width)

    def __eq__(self, other):
        return isinstance(other, Mask) and (self.shape, self.bits) == (other.shape, other.bits)

    def __ne__(self, other):
        return not self == other

    def __hash__(self):
        return hash(self.bits)


def bool_array(mask, shape: tuple) -> np.ndarray:
    """Somebody's mask as an array. Raises TypeError or ValueError where it is not bool of this shape."""
    pixels = np.asarray(mask)
    if pixels.dtype != bool or pixels.shape != shape:
        raise ValueError(f"{pixels.dtype} {pixels.shape}")
    return pixels


def square_masks(masks: list[torch.Tensor], side: int) -> torch.Tensor:
    """Masks bool [H, W], of any sizes, as SAM2's predictor shows them to SAM2: 0 or 1, [n, 1, side, side]."""
    squares = []
    for mask in masks:
        square = F.interpolate(mask[None, None].float(), (side, side), mode="bilinear", antialias=True)
        squares.append(square[0] >= 0.5)
    return torch.stack(squares).float()
