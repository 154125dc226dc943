"""System 2 for the toy world: finds things by their colour and shape. numpy and scipy are enough.

    python segment.py --index 10 --system2 plugs/colours.py

Copy it for a detector of your own: one function, from a picture and a description to masks.
"""
import numpy as np
from scipy import ndimage

# As the toy world paints them. Its noise changes each value by a few.
COLOURS = {
    "red": (220, 45, 40),
    "green": (40, 185, 70),
    "blue": (50, 85, 230),
    "yellow": (235, 215, 50),
    "purple": (165, 60, 205),
    "white": (240, 240, 240),
}
FARTHEST = 40    # of a value from the colour's
SMALLEST = 12    # pixels


def masks(image, description):
    """Bool arrays [H, W] of the image's size, one for each thing; [] where there is none."""
    words = description.lower().split()
    colours = [colour for colour in COLOURS if colour in words]
    pixels = np.asarray(image.convert("RGB")).astype(int)
    found = []
    for colour in colours:
        near = (abs(pixels - COLOURS[colour]) <= FARTHEST).all(2)
        regions, count = ndimage.label(near)
        for n in range(1, count + 1):
            region = regions == n
            if region.sum() >= SMALLEST:
                found.append(region)
    # A thing that is partly hidden may fill any share of its box, so the shape only chooses among several.
    if len(found) > 1:
        right = [region for region in found if shape_of(region) in words]
        found = right or found
    return found


def shape_of(region):
    """The shape that fills as much of its box as the region does: all of it, pi / 4 or a half."""
    rows, columns = region.nonzero()
    filled = len(rows) / (np.ptp(rows) + 1) / (np.ptp(columns) + 1)
    if filled > 0.9:
        return "square"
    return "circle" if filled > 0.65 else "triangle"
