"""Pictures for people to look at: masks and boxes over frames, animations."""
import numpy as np
from PIL import Image, ImageDraw

# Pixels of the longer side of an animation. Smaller pictures are enlarged by a whole factor to some SMALLEST.
# Larger ones are shrunk to LARGEST.
SMALLEST = 384
LARGEST = 640


def tint(pixels: np.ndarray, mask: np.ndarray) -> None:
    """Turns the pixels, uint8 [H, W, 3], red where the mask is, in place."""
    pixels[mask] = pixels[mask] // 2 + np.array([127, 20, 20], np.uint8)


def overlay(picture: Image.Image, mask: np.ndarray, boxes=()) -> Image.Image:
    """RGB picture with the mask, bool [H, W], in red, its outline in white, and the boxes in green."""
    factor = max(1, round(SMALLEST / max(picture.size)))
    size = (picture.width * factor, picture.height * factor)
    pixels = np.array(picture.resize(size, Image.NEAREST))
    mask = mask.repeat(factor, 0).repeat(factor, 1)
    tint(pixels, mask)
    # Pixels whose four neighbours are in the mask.
    inside = np.roll(mask, 1, 0) & np.roll(mask, -1, 0)
    inside &= np.roll(mask, 1, 1)
    inside &= np.roll(mask, -1, 1)
    pixels[mask & ~inside] = 255
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    width = max(factor, image.width // 200)
    for x1, y1, x2, y2 in boxes:
        # The pixels of the corners are inside the box.
        right = (x2 + 1) * factor - 1
        bottom = (y2 + 1) * factor - 1
        enlarged = (x1 * factor, y1 * factor, right, bottom)
        draw.rectangle(enlarged, outline=(60, 255, 60), width=width)
    return image


def write_animation(path, pictures: list[Image.Image], fps: float) -> None:
    """Writes an animated webp of pictures, shrunk to LARGEST pixels."""
    for picture in pictures:
        picture.thumbnail((LARGEST, LARGEST))
    first = pictures[0]
    milliseconds = round(1000 / fps)
    first.save(
        path,
        save_all=True,
        append_images=pictures[1:],
        loop=0,
        duration=milliseconds,
    )
