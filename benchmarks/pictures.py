"""Pictures for people to look at: masks and boxes over frames, animations."""
import io

import numpy as np
from PIL import Image, ImageDraw

# Pixels of the longer side of an animation. Smaller pictures are enlarged by a whole factor to some SMALLEST.
# Larger ones are shrunk to LARGEST.
SMALLEST = 384
LARGEST = 640
# Most bytes of an animation.
LARGEST_FILE = 16_000_000


def tint(pixels: np.ndarray, mask: np.ndarray) -> None:
    """Turns the pixels, uint8 [H, W, 3], red where the mask is, in place."""
    pixels[mask] = pixels[mask] // 2 + np.array([127, 20, 20], np.uint8)


def overlay(picture: Image.Image, mask: np.ndarray, boxes=()) -> Image.Image:
    """RGB picture for an animation: the mask, bool [H, W], in red with a white outline, boxes in green."""
    longer = max(picture.size)
    factor = max(1, round(SMALLEST / longer))
    if longer > LARGEST:
        factor = LARGEST / longer
    size = [max(1, round(side * factor)) for side in picture.size]
    smooth = Image.BICUBIC if factor < 1 else Image.NEAREST
    pixels = np.array(picture.resize(size, smooth))
    mask = np.array(Image.fromarray(mask).resize(size, Image.NEAREST))
    tint(pixels, mask)
    # Pixels whose four neighbours are in the mask.
    inside = np.roll(mask, 1, 0) & np.roll(mask, -1, 0)
    inside &= np.roll(mask, 1, 1)
    inside &= np.roll(mask, -1, 1)
    pixels[mask & ~inside] = 255
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    width = max(round(factor), image.width // 200)
    for x1, y1, x2, y2 in boxes:
        # The pixels of the corners are inside the box.
        right = max((x2 + 1) * factor - 1, x1 * factor)
        bottom = max((y2 + 1) * factor - 1, y1 * factor)
        scaled = (x1 * factor, y1 * factor, right, bottom)
        draw.rectangle(scaled, outline=(60, 255, 60), width=width)
    return image


def animation(pictures: dict, end: int, fps: float) -> bytes:
    """An animated webp of {frame: picture}. Each stays until the next one's time, the last until `end`.

    While it has more than LARGEST_FILE bytes, every other picture is left out.
    """
    times = sorted(pictures)
    durations = [1000 * (after - t) / fps for t, after in zip(times, [*times[1:], end])]
    file = io.BytesIO()
    pictures[times[0]].save(
        file,
        "webp",
        save_all=True,
        append_images=[pictures[t] for t in times[1:]],
        loop=0,
        duration=durations,
    )
    if len(times) > 1 and file.tell() > LARGEST_FILE:
        fewer = {t: pictures[t] for t in times[::2]}
        return animation(fewer, end, fps)
    return file.getvalue()
