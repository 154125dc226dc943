"""Pictures for people to look at: masks and boxes over frames, animations."""
import numpy as np
from PIL import Image, ImageDraw

# Pixels of the longer side of an animation. Smaller pictures are enlarged by a whole factor to some SMALLEST.
# Larger ones are shrunk to LARGEST.
SMALLEST = 384
LARGEST = 640


def overlay(picture: Image.Image, mask: np.ndarray, boxes=()) -> Image.Image:
    """RGB picture with the mask, bool [H, W], in red, its outline in white, and the given boxes in green."""
    factor = max(1, round(SMALLEST / max(picture.size)))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.NEAREST)
    mask = mask.repeat(factor, 0).repeat(factor, 1)
    pixels = np.array(picture).astype(np.float32)
    pixels[mask] = 0.5 * pixels[mask] + 0.5 * np.array([255, 40, 40])
    # Pixels whose four neighbours are all in the mask.
    inside = np.roll(mask, 1, 0) & np.roll(mask, -1, 0)
    inside &= np.roll(mask, 1, 1) & np.roll(mask, -1, 1)
    pixels[mask & ~inside] = (255, 255, 255)
    image = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for x1, y1, x2, y2 in boxes:
        # The corners' pixels are inside the box.
        enlarged = (x1 * factor, y1 * factor, (x2 + 1) * factor - 1, (y2 + 1) * factor - 1)
        draw.rectangle(enlarged, outline=(60, 255, 60), width=max(factor, image.width // 200))
    return image


def write_animation(path, pictures: list[Image.Image], fps: float) -> None:
    """An animated webp of pictures at `fps` frames a second. Larger ones are shrunk to LARGEST pixels."""
    for picture in pictures:
        picture.thumbnail((LARGEST, LARGEST))
    first, *others = pictures
    first.save(path, save_all=True, append_images=others, loop=0, duration=round(1000 / fps))
