"""The embedded data set: factory photographs of eight products, drawn by code, in MVTec AD's folder layout.

Four textures (woven cloth, metal mesh, wood planks, terrazzo) and four objects (hex nut and screw at any rotation, a
printed capsule, a circuit board with fixed parts). No two pictures are alike: light, colour, pose, material and sensor
noise vary as they do in a factory. A defective picture is made in three steps:

    scene  = draw(rng)                    the product, with random pose, light, material
    faulty = draw(the same rng, fault)    the very same product with one fault: one part bent, missing, swapped, ...
    mask   = |faulty - scene| > VISIBLE   before the sensor's noise; small gaps closed

so the mask is exact: it holds the pixels that the fault changed visibly, and no others. Faults whose mask is under
0.2 % or over 10 % of the picture are thrown again.

A drawing function looks like `hex_nut(rng, size, fault="", dice=None) -> (size, size, 3) float32` with values around
[0, 1]. Everything random about the product comes from `rng`, everything random about the fault from `dice`: this is why
the clean and the faulty drawing show the same product. Coordinates run from -1 (left, top) to 1 (right, bottom); shapes
are signed distances (negative inside), which `cover` turns into smooth edges.

A picture is the same under numpy 1.26 and 2 and under Pillow from 11.2 on (an older one fills the edges of the circuit
board's cans differently: up to 3 grey levels in some thirty pixels), but for the last bit of a processor's functions,
which may change single pixels by a grey level.

    python -m common.synth --out data/synth --train 40 --test-good 10 --test-bad 15 --size 256
"""
import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from tqdm import tqdm

from common import UsageError, options

VERSION = 6  # of the drawing: raise it whenever any picture changes
VISIBLE = 0.045  # smallest change of a colour channel, of 1, that counts as visible
MASK_AREA = (0.002, 0.10)  # smallest and largest part of the picture that a defect may cover
MARKER = "drawing.json"  # written last: a folder that has it is complete

# The kinds of defect of each class; the i-th defective picture shows kind i modulo their number.
DEFECTS = {
    "woven_cloth": ("missing_thread", "swapped_threads", "pulled_thread", "stain", "hole"),
    "metal_mesh": ("missing_wire", "bent_wire", "swapped_weave", "stain", "hole"),
    "wood_planks": ("scratch", "hole", "stain", "shifted_plank", "swapped_plank"),
    "terrazzo": ("hole", "stain", "scratch", "missing_chips", "swapped_chip"),
    "hex_nut": ("scratch", "stain", "missing_corner", "shifted_bore", "swapped_bore"),
    "screw": ("bent", "missing_thread", "missing_tip", "swapped_head", "scratch"),
    "capsule": ("misprint", "scratch", "hole", "shifted_half", "swapped_half"),
    "circuit_board": ("missing_part", "swapped_parts", "shifted_part", "misprint", "scratch"),
}
CLASSES = tuple(DEFECTS)
SPLITS = ("train", "good", "bad")


# ---------------------------------------------------------------------------------------------------------------------
# Drawing tools
# ---------------------------------------------------------------------------------------------------------------------

def clamp(values):
    """The values, limited to 0..1."""
    return np.clip(values, 0, 1)


def sign(dice):
    """-1 or 1."""
    return dice.choice([-1, 1])


def turned(angle, x, y):
    """The point (x, y) turned by an angle in radians about the origin."""
    c = math.cos(angle)
    s = math.sin(angle)
    return c * x - s * y, s * x + c * y


def wide(values):
    """The values in float64. Where a float64 or integer number of numpy's meets a float32 array, numpy 1 computes in
    float32 and numpy 2 in float64; said explicitly, both draw the same picture."""
    return values.astype(np.float64)


def plane(size):
    """Coordinates x, y (size, size) of the pixels' centres, from -1 to 1."""
    centre = np.arange(size, dtype=np.float32) + 0.5
    t = centre * (2 / size) - 1
    return np.meshgrid(t, t)


def pose(rng, size, turn, shift=0.0, zoom=0.0):
    """A product that lies turned by up to `turn` radians, shifted and scaled.

    Returns its own coordinates x, y (size, size) at each pixel, and the function that maps a point of the product to
    the picture (for `Canvas`).
    """
    angle = rng.uniform(-turn, turn)
    dx = rng.uniform(-shift, shift)
    dy = rng.uniform(-shift, shift)
    scale = rng.uniform(-zoom, zoom)
    c = math.cos(angle)
    s = math.sin(angle)
    x, y = plane(size)
    x = x - np.float32(dx)
    y = y - np.float32(dy)
    scale = 1 + scale

    def place(point):
        x, y = turned(angle, *point)
        return dx + scale * x, dy + scale * y

    return (c * x + s * y) / scale, (c * y - s * x) / scale, place


def dye(rng, colour, tone=0.04, hue=0.012):
    """A material's colour (3,), as it varies from batch to batch: in tone, and a little in hue."""
    brighter = rng.uniform(1 - tone, 1 + tone)
    shifted = rng.uniform(1 - hue, 1 + hue, 3)
    return np.asarray(colour, np.float32) * brighter * shifted


def cover(distance):
    """How much of each pixel a shape covers, 0 to 1, from its signed distance (negative inside)."""
    return clamp(0.5 - distance * (len(distance) / 2))


def step(low, high, value):
    """0 below `low`, 1 above `high`, smooth between."""
    t = clamp((value - low) / (high - low))
    return t * t * (3 - 2 * t)


def stretch(lattice, size):
    """Random numbers (cells + 3, n), smoothed along the first axis into `size` pixels by cubic B-splines."""
    centre = np.arange(size, dtype=np.float32)[:, None] + 0.5  # (size, 1)
    at = centre * ((len(lattice) - 3) / size)
    first = at.astype(int)
    t = at - first
    row = first[:, 0]
    total = (1 - t) ** 3 * lattice[row]
    total = total + (3 * t ** 3 - 6 * t ** 2 + 4) * lattice[row + 1]
    total = total + (1 + 3 * t * (1 + t - t * t)) * lattice[row + 2]
    total = total + t ** 3 * lattice[row + 3]
    return total / np.float32(6)


def noise(rng, size, down, across=None, octaves=1):
    """Smooth random field (size, size) of mean 0 and deviation about 1, with down x across bumps, finer per octave."""
    across = across or down
    total = 0.0
    power = 0.0
    for k in range(octaves):
        cells = (down << k) + 3, (across << k) + 3
        lattice = rng.standard_normal(cells, dtype=np.float32)
        total = total + 0.5 ** k * stretch(stretch(lattice, size).T, size).T
        power += 0.25 ** k
    return total * np.float32(2.1 / math.sqrt(power))


def lamp(rng):
    """Unit vector towards the light: from the upper left, a little different each time."""
    angle = rng.uniform(-2.6, -2.0)
    height = rng.uniform(0.85, 1.05)
    level = math.cos(height)
    right = math.cos(angle) * level
    down = math.sin(angle) * level
    return np.array([right, down, math.sin(height)])


def lit(height, light, gloss=20):
    """Light (size, size) that a relief scatters (1 where level) and light that it mirrors to the camera (0 to 1)."""
    gy, gx = np.gradient(height, 2 / len(height))
    length = np.sqrt(1 + gx * gx + gy * gy)
    gx = wide(gx)
    gy = wide(gy)
    half = light + [0, 0, 1]
    half = half / np.linalg.norm(half)

    def towards(v):  # cosine between the relief's normal and a direction
        along = v[2] - v[0] * gx - v[1] * gy
        return (along / length).astype(np.float32)

    scattered = np.clip(towards(light), 0, None) / np.float32(light[2])
    return scattered, clamp(towards(half)) ** gloss


def lay(image, colour, coverage):
    """The image with a colour, or another image, laid over it where `coverage` (size, size) is 1."""
    return image + coverage[..., None] * (np.asarray(colour, np.float32) - image)


def tint(colour, value):
    """A colour (3,), or one per pixel (size, size, 3), times a brightness (size, size)."""
    return np.asarray(colour, np.float32) * np.asarray(value, np.float32)[..., None]


def cast(shape, light, length, blur):
    """Soft shadow (size, size) of a shape's coverage, thrown away from the light."""
    size = len(shape)
    shift = [round(v * length * size / 2) for v in light[:2]]
    column = np.clip(np.arange(size) + shift[0], 0, size - 1)
    row = np.clip(np.arange(size) + shift[1], 0, size - 1)
    thrown = shape[row][:, column]
    return ndimage.gaussian_filter(thrown, blur * size / 2, truncate=2.5)


def pick(dice, region):
    """A random point (x, y) of the region (size, size), away from its border."""
    size = len(region)
    inner = ndimage.minimum_filter(region, size // 16, mode="constant") > 0.5
    spots = np.flatnonzero(inner if inner.any() else region > 0.5)
    spot = int(spots[dice.integers(len(spots))])
    row, column = divmod(spot, size)
    return (column + 0.5) * 2 / size - 1, (row + 0.5) * 2 / size - 1


def blob(dice, size, centre, radius):
    """Signed distance (size, size) of an irregular spot."""
    x, y = plane(size)
    x = x - np.float32(centre[0])
    y = y - np.float32(centre[1])
    turn = dice.uniform(0, math.pi)
    flat = dice.uniform(0.6, 1.0)
    along = math.cos(turn) * x + math.sin(turn) * y
    aside = math.cos(turn) * y - math.sin(turn) * x
    bumps = max(4, int(2.2 / radius))
    ragged = 1 + 0.22 * noise(dice, size, bumps, octaves=2)
    return np.hypot(along * flat, aside / flat) - radius * ragged


class Canvas:
    """Flat shapes and their heights, drawn at three times the size so that edges come out smooth.

    `place` maps a product's coordinates to the picture's: one canvas draws a part in any pose.
    """

    def __init__(self, size, place=lambda p: p, ground=(0, 0, 0)):
        self.size, self.place, self.big = size, place, 3 * size
        square = self.big, self.big
        self.colours = Image.new("RGB", square, tuple(int(255 * c) for c in ground))
        self.heights = Image.new("L", square, 0)

    def _put(self, shape, points, colour, height, **options):
        corners = []
        for point in points:
            x, y = self.place(point)
            column = (x + 1) / 2 * self.big
            row = (y + 1) / 2 * self.big
            corners.append((column, row))
        if colour is not None:
            fill = tuple(int(255 * min(max(c, 0), 1)) for c in colour)
            getattr(ImageDraw.Draw(self.colours), shape)(corners, fill=fill, **options)
        if height is not None:
            fill = int(255 * height)
            getattr(ImageDraw.Draw(self.heights), shape)(corners, fill=fill, **options)

    def polygon(self, points, colour=(1, 1, 1), height=None):
        self._put("polygon", points, colour, height)

    def line(self, points, width, colour=(1, 1, 1), height=None):
        pixels = max(1, round(width / 2 * self.big))
        self._put("line", points, colour, height, width=pixels, joint="curve")

    def box(self, x, y, w, h, colour=(1, 1, 1), height=None, turn=0.0):
        corners = []
        for a, b in ((-w, -h), (w, -h), (w, h), (-w, h)):
            across, down = turned(turn, a, b)
            corners.append((x + across, y + down))
        self.polygon(corners, colour, height)

    def disc(self, x, y, radius, colour=(1, 1, 1), height=None, start=0, end=360):
        angles = np.radians(np.linspace(start, end, 40))
        if end - start == 360:
            angles = angles[:-1]  # no edge of no length: Pillow before 11.2 draws stray pixels there
        points = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
        self.polygon(points, colour, height)

    def text(self, words, x, y, height, width, colour=(1, 1, 1), turn=0.0):
        """Words centred on (x, y), letters `height` tall, strokes `width` wide."""
        cell = height / 4
        for n, letter in enumerate(words):
            left = 3 * n - 3 * len(words) / 2 + 0.5
            for stroke in LETTERS.get(letter, ()):
                points = []
                for column, row in stroke.split():
                    at = (left + int(column)) * cell, (int(row) - 2) * cell
                    across, down = turned(turn, *at)
                    points.append((x + across, y + down))
                self.line(points, width, colour)

    def image(self):
        return np.asarray(self.colours.reduce(3), np.float32) / 255  # (size, size, 3)

    def height(self):
        return np.asarray(self.heights.reduce(3), np.float32) / 255  # (size, size)

    def coverage(self):
        return self.image()[..., 0]


# Letters as strokes on a grid of 3 columns and 5 rows; "02" is column 0, row 2.
LETTERS = {
    "A": ("04 01 10 21 24", "02 22"), "C": ("20 00 04 24",),
    "I": ("10 14",), "M": ("04 00 12 20 24",),
    "N": ("04 00 24 20",), "O": ("00 20 24 04 00",),
    "P": ("04 00 20 22 02",),
    "R": ("04 00 20 22 02", "12 24"), "U": ("00 04 24 20",),
    "X": ("00 24", "20 04"), "-": ("02 22",),
    "0": ("00 20 24 04 00",), "1": ("01 10 14",),
    "2": ("00 20 22 02 04 24",),
    "3": ("00 20 24 04", "02 22"), "4": ("00 02 22", "20 24"),
    "5": ("20 00 02 22 24 04",), "6": ("20 00 04 24 22 02",),
    "7": ("00 20 14",), "8": ("00 20 24 04 00", "02 22"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Blemishes: faults that look much the same on every product
# ---------------------------------------------------------------------------------------------------------------------

def scratch(dice, image, region, mark):
    """A thin curved scratch across the region: a bright or dark line with a lit edge; `mark` is what it shows."""
    size = len(image)
    x, y = pick(dice, region)
    turn = dice.uniform(0, 2 * math.pi)
    length = dice.uniform(0.25, 0.55)
    bow = dice.uniform(-0.25, 0.25)
    t = np.linspace(-0.5, 0.5, 24)
    along = t * length
    wobble = 0.012 * np.cumsum(dice.standard_normal(24)) / 3
    aside = (bow * (0.25 - t * t) + wobble) * length
    across, down = turned(turn, along, aside)
    path = list(zip(x + across, y + down))
    canvas = Canvas(size)
    for k, (start, end) in enumerate(zip(path, path[1:])):  # thin ends, thicker middle
        thickness = 0.006 + 0.016 * math.sin(math.pi * k / 23)
        canvas.line([start, end], dice.uniform(0.9, 1.1) * thickness)
    line = canvas.coverage() * region
    shadow = np.roll(line, (1, 1), (0, 1)) * region * (1 - line)
    image = lay(image, image * 0.6, 0.7 * shadow)
    return lay(image, mark, dice.uniform(0.5, 0.75) * line)


def stain(dice, image, region, colour, radius=(0.10, 0.22)):
    """A dried spot that dyes the region, darker along its border."""
    centre = pick(dice, region)
    d = blob(dice, len(image), centre, dice.uniform(*radius))
    inside = 1 - step(-0.02, 0.01, d)
    rim = inside * step(-0.06, -0.01, d)
    strength = region * inside * (dice.uniform(0.4, 0.6) + 0.25 * rim)
    dyed = image * np.float32(2) * np.asarray(colour, np.float32)
    return lay(image, dyed, strength)


def hole(dice, image, region, depth=0.12, radius=(0.05, 0.10)):
    """A ragged hole: dark inside, its lower right wall catching the light."""
    centre = pick(dice, region)
    d = blob(dice, len(image), centre, dice.uniform(*radius))
    inside = cover(d) * region
    slope = np.roll(d, (-2, -2), (0, 1)) - d  # falls towards the lower right
    wall = inside * clamp(1.6 * slope * len(d) / 8 + 0.1) * step(-0.05, 0, d)
    rim = cover(np.abs(d - 0.008) - 0.010) * region
    image = lay(image, image * 1.15 + 0.03, 0.5 * rim)
    dark = lay(image, image * depth + 0.02, inside)
    return lay(dark, image * 0.9 + 0.1, wall)


# ---------------------------------------------------------------------------------------------------------------------
# Textures: sheets of material, photographed through the window of a dark frame
# ---------------------------------------------------------------------------------------------------------------------

def opening(size):
    """1 where the sheet can be seen."""
    return np.float32(np.maximum(*np.abs(plane(size))) < 0.88)


def framed(image, light):
    """The sheet under a dark frame, which throws a narrow shadow onto it. The frame is always in the same place."""
    x, y = plane(len(image))
    beyond_x = clamp(np.abs(x) - 0.80)
    beyond_y = clamp(np.abs(y) - 0.80)
    edge = np.hypot(beyond_x, beyond_y) - 0.10  # rounded corners
    frame = cover(-edge)
    image = lay(image, image * 0.25, 0.8 * cast(frame, light, 0.05, 0.02))
    bevel = 1 + 0.5 * step(0.02, 0.0, np.abs(edge - 0.012))
    return lay(image, tint((0.145, 0.15, 0.16), bevel), frame)


def woven_cloth(rng, size, fault="", dice=None):
    """A 2/2 twill with a check: every 12 threads two are cream and one is rust, the others navy."""
    x, y, _ = pose(rng, size, 0.03, zoom=0.03)
    light = lamp(rng)
    start = rng.integers(24, 36, 2)
    u = wide(13 * x) + start[0] + 0.12 * noise(rng, size, 4)  # one unit per thread
    v = wide(13 * y) + start[1] + 0.12 * noise(rng, size, 4)
    if fault == "pulled_thread":
        along = (x - dice.uniform(-0.6, 0.6)) / 0.18
        aside = (y - dice.uniform(-0.6, 0.6)) / 0.16
        bump = np.exp(-(along ** 2) - aside ** 2)
        v = v + sign(dice) * dice.uniform(1.4, 2.2) * wide(bump)
    i = np.floor(u).astype(int)
    j = np.floor(v).astype(int)
    across_warp = u - i - 0.5
    across_weft = v - j - 0.5
    thick = rng.uniform(0.92, 1.06, (2, 64)).astype(np.float32)
    tone = rng.uniform(0.94, 1.06, (2, 64)).astype(np.float32)
    # Each thread rises and sinks as a sine along its way: two over, two under, one step further per row.
    flat_warp = 1 - (2 * across_warp / thick[0, i]) ** 2
    flat_weft = 1 - (2 * across_weft / thick[1, j]) ** 2
    warp = np.sqrt(np.clip(flat_warp, 0.02, 1)) + 0.9 * np.sin(np.pi / 2 * (v - i))
    weft = np.sqrt(np.clip(flat_weft, 0.02, 1)) - 0.9 * np.sin(np.pi / 2 * (j + 1 - u))
    if fault == "missing_thread":
        row = start[1] + dice.integers(-9, 9)
        left = start[0] + dice.uniform(-11, -2)
        right = left + dice.uniform(10, 20)
        lost = ((j == row) | (j == row + 1)) & (u > left) & (u < right)
        warp = np.where(lost, warp - 0.6, warp)
        weft = np.where(lost, np.float32(-1.2), weft)
    check = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 2, 0])
    warp_kind = check[i % 12]
    weft_kind = check[j % 12]
    if fault == "swapped_threads":  # two neighbours change places: all are there, the order is wrong
        kinds, index = (warp_kind, i) if dice.random() < 0.5 else (weft_kind, j)
        middle = start.mean().astype(int) // 12
        first = 12 * middle + 7 + 12 * dice.integers(-1, 1)
        a = first + 1
        b = first + 1 + dice.integers(1, 4) * dice.choice([-2, 1])
        kinds[index == a] = check[b % 12]
        kinds[index == b] = check[a % 12]
    navy = dye(rng, (0.16, 0.23, 0.36))
    cream = dye(rng, (0.78, 0.74, 0.64))
    rust = dye(rng, (0.60, 0.27, 0.18))
    dyes = np.array([navy, cream, rust])
    over = warp > weft
    colour = dyes[np.where(over, warp_kind, weft_kind)]  # (size, size, 3)
    # of the yarn's fibres
    twist = np.where(over, 2.5 * v + 2 * across_warp, 2.5 * u + 2 * across_weft)
    top = np.maximum(warp, weft)
    shade, _ = lit(0.030 * top, light)
    fibres = np.sin(2 * np.pi * twist)
    value = 0.30 + 0.42 * shade + 0.20 * np.clip(top, -1, 2) + 0.05 * fibres
    value = value * np.where(over, tone[0, i], tone[1, j])
    image = tint(colour, value * (1 + 0.05 * noise(rng, size, 90)))
    everywhere = opening(size)
    if fault == "stain":
        image = stain(dice, image, everywhere, (0.20, 0.17, 0.11), (0.15, 0.28))
    if fault == "hole":
        image = hole(dice, image, everywhere, 0.15, (0.08, 0.15))
    return framed(image, light)


def metal_mesh(rng, size, fault="", dice=None):
    """Plain-woven steel wire over a dark, out-of-focus ground."""
    x, y, _ = pose(rng, size, 0.05, zoom=0.03)
    light = lamp(rng)
    start = rng.uniform(20, 22, 2).astype(np.float32)
    u = 5.5 * x + start[0] + 0.03 * noise(rng, size, 3)  # one unit per wire
    v = 5.5 * y + start[1] + 0.03 * noise(rng, size, 3)
    i = np.floor(u).astype(int)
    j = np.floor(v).astype(int)
    sway = rng.uniform(-0.03, 0.03, (2, 64)).astype(np.float32)
    across_down = u - i - 0.5 + sway[0, i]  # of the wires that run down
    across_right = v - j - 0.5 + sway[1, j]  # of those that run across
    across = [across_down, across_right]
    # along each wire: over one, under the next
    rise_down = np.sin(np.pi * (v - i))
    rise_right = -np.sin(np.pi * (j + 1 - u))
    rise = [rise_down, rise_right]
    present = [np.ones_like(x), np.ones_like(x)]
    side = 0 if dice is None else int(dice.integers(2))
    index, along = ((i, v), (j, u))[side]
    if fault in ("bent_wire", "missing_wire", "swapped_weave"):
        wire = int(start[side] + dice.integers(-3, 4))
        at = start[1 - side] + np.float32(dice.uniform(-3, 3))
        near = index == wire
        if fault == "bent_wire":
            far = sign(dice) * dice.uniform(0.25, 0.31)
            bend = far * np.exp(-((along - at) / 1.5) ** 2)
            across[side] = across[side] + near * bend
        if fault == "missing_wire":
            gone = step(0, 0.1, dice.uniform(1.2, 4) - np.abs(along - at))
            present[side] = 1 - near * gone
        if fault == "swapped_weave":  # this wire goes over where it should go under
            flip = np.abs(along - np.round(at)) < 1
            for k in (0, 1):
                rise[k] = np.where(near & flip, -rise[k], rise[k])
    if fault == "hole":
        centre = pick(dice, opening(size))
        gap = 1 - cover(blob(dice, size, centre, dice.uniform(0.12, 0.22)))
        present = [p * gap for p in present]
    radius = 0.19
    pixel = 11 / size
    ground = 0.15 + 0.03 * noise(rng, size, 4, octaves=2)
    image = tint((0.95, 1.0, 1.1), ground)
    steel = dye(rng, (0.80, 0.82, 0.85))
    shine = 0.06 * noise(rng, size, 40)
    solid = []
    for there, distance in zip(present, across):
        solid.append(there * clamp((radius - np.abs(distance)) / pixel + 0.5))
    wires = np.maximum(*solid)
    image = lay(image, image * 0.35, 0.8 * cast(wires, light, 0.12, 0.02))
    above = rise[0] > rise[1], rise[0] <= rise[1]
    for lower in (True, False):  # first what lies lower, then higher
        for k in (0, 1):  # the wires that run down, then those that run across
            t = np.clip(across[k] / radius, -1, 1)
            slope = np.gradient(0.16 * rise[k], axis=1 - k) * 12 * size / 256
            n = np.sqrt(1 - t * t) / np.sqrt(1 + slope ** 2)
            facing = light[k] * t - light[1 - k] * slope * n + light[2] * n
            facing = clamp(facing)
            value = 0.20 + 0.62 * facing + 0.60 * facing ** 14 + shine
            value = value * (0.80 + 0.20 * rise[k])
            here = solid[k] * (above[k] != lower)
            image = lay(image, tint(steel, value), here)
    if fault == "stain":  # rust
        image = stain(dice, image, wires, (0.42, 0.23, 0.10), (0.16, 0.32))
    return framed(image, light)


def wood_planks(rng, size, fault="", dice=None):
    """Oak boards side by side, each with its own tone and grain, with butt joints."""
    x, y, _ = pose(rng, size, 0.015, zoom=0.02)
    light = lamp(rng)
    w = 2.5 * x + 10 + rng.uniform(-0.5, 0.5)  # one unit per board
    p = np.floor(w).astype(int)
    table = rng.uniform(0, 1, (6, 20)).astype(np.float32)
    lengths = y / 1.5 + 10 + table[0, p]  # one unit per length of board
    q = np.floor(lengths).astype(int)
    fw = w - p - 0.5
    fl = lengths - q - 0.5
    own = (7 * p + 3 * q) % 20  # which row of the table tells this board's tone and grain
    gap = 0.018 * np.ones_like(x)  # half the width of the gap between boards
    if fault == "shifted_plank":
        joint = dice.integers(9, 12)
        at = dice.uniform(-0.5, 0.5)
        far = dice.uniform(0.13, 0.20)
        spread = far * np.exp(-((y - at) / dice.uniform(0.3, 0.5)) ** 2)
        gap = gap + spread * (np.round(w) == joint)
    bend = noise(rng, size, 3, 10, octaves=2)
    pores = noise(rng, size, 14, 110)
    along = fl * 1.5
    aside = fw / 2.5
    if fault == "swapped_plank":  # a piece whose grain runs across: sound wood, laid the wrong way
        at = dice.uniform(-0.7, 0.7)
        board = p == dice.integers(9, 12)
        piece = board & (np.abs(y - at) < dice.uniform(0.12, 0.2))
        edge = piece & ~ndimage.binary_erosion(piece, iterations=max(1, size // 200))
        along = np.where(piece, aside, along)
        aside = np.where(piece, y - at, aside)
        bend = np.where(piece, bend.T, bend)
        pores = np.where(piece, pores.T, pores)
        gap = np.where(edge, np.float32(0.5), gap)
    # the pointed arches of flat-sawn wood
    arch = (0.4 + 0.8 * table[3, own]) * (along - table[4, own] + 0.5) ** 2
    rings = (15 + 6 * table[1, own]) * aside + 9 * table[2, own]
    rings = rings + arch + 0.55 * bend
    grain = (0.5 + 0.5 * np.sin(2 * np.pi * rings)) ** 2
    tone = 0.92 + 0.16 * table[5, own]
    colour = dye(rng, (0.70, 0.53, 0.35))
    value = tone * (1 - 0.20 * grain - 0.07 * np.clip(pores, 0, 3) - 0.03 * bend)
    yellower = np.array([0, 0.05, 0.10], np.float32) * grain[..., None]
    image = tint(colour, value) * (1 - yellower)
    # Distance to the board's nearest border, in units of its width; the edges are rounded, the gap is dark.
    to_side = 0.5 - np.abs(fw) - gap
    to_end = (0.5 - np.abs(fl)) * 3.75 - 0.018
    border = np.minimum(to_side, to_end)
    rounded = step(0, 0.05, border)
    shade, _ = lit(0.02 * rounded, light)
    value = 0.4 + 0.6 * shade * (0.55 + 0.45 * rounded)
    image = image * value[..., None]
    dark = clamp(0.5 - border * size / 5)
    image = lay(image, (0.07, 0.05, 0.035), dark)
    board = (border > 0) * opening(size)
    if fault == "scratch":
        image = scratch(dice, image, board, image * 1.35 + 0.16)
    if fault == "stain":
        image = stain(dice, image, board, (0.26, 0.23, 0.22))
    if fault == "hole":
        image = hole(dice, image, board, 0.15, (0.04, 0.08))
    return framed(image, light)


def scatter_chips(rng):
    """Stone chips that do not touch, big ones first.

    Returns a list of (outline (8, 2), colour (3,)), and their places (chips, 3): x, y, radius.
    """
    white, black = (0.86, 0.84, 0.80), (0.36, 0.35, 0.36)
    red, grey = (0.67, 0.43, 0.33), (0.62, 0.60, 0.55)
    stones = np.array([white, black, red, grey])
    chips, places = [], np.empty((0, 3))
    for radius in np.geomspace(0.10, 0.022, 320) * rng.uniform(0.85, 1.15, 320):
        at = rng.uniform(-1.1, 1.1, 2)
        shape = rng.uniform(0.85, 1.12, 8)
        kind = rng.choice(4, p=[0.4, 0.2, 0.2, 0.2])
        colour = stones[kind] * rng.uniform(0.93, 1.06)
        distance = np.hypot(*(places[:, :2] - at).T)
        if (distance > 0.92 * (places[:, 2] + radius) + 0.012).all():
            angles = 2 * np.pi * (np.arange(8) + 2 * shape) / 8
            corners = np.column_stack([np.cos(angles), np.sin(angles)])  # (8, 2)
            chips.append((at + radius * shape[:, None] * corners, colour))
            places = np.vstack([places, [*at, radius]])
    return chips, places


def terrazzo(rng, size, fault="", dice=None):
    """Polished cement with stone chips of four colours and all sizes."""
    light = lamp(rng)
    chips, places = scatter_chips(rng)
    if fault == "missing_chips":  # fallen out: their sockets show raw, dark cement
        centre = dice.uniform(-0.5, 0.5, 2)
        distance = np.hypot(*(places[:, :2] - centre).T)
        for k in np.flatnonzero(distance < dice.uniform(0.3, 0.42)):
            chips[k] = chips[k][0], np.array([0.33, 0.31, 0.28])
    if fault == "swapped_chip":  # a stone of another product
        visible = np.abs(places[:25, :2]).max(1) < 0.9
        k = dice.choice(np.flatnonzero(visible))
        chips[k] = chips[k][0], np.array([0.24, 0.40, 0.36])
    canvas = Canvas(size)
    for outline, colour in chips:
        canvas.polygon(outline, colour, 1)
    stone = canvas.height()
    grey = dye(rng, (0.66, 0.64, 0.60))
    value = 1 + 0.04 * noise(rng, size, 60, octaves=2)
    cement = tint(grey, value + 0.03 * noise(rng, size, 4))
    veins = 1 + 0.07 * noise(rng, size, 14, octaves=3)
    polished = canvas.image() / np.maximum(stone, 0.3)[..., None]
    polished = polished * veins[..., None]
    image = lay(cement, polished, stone)
    image = image * (1 - 0.5 * stone * (1 - stone))[..., None]  # the fine joint around each chip
    everywhere = opening(size)
    if fault == "hole":
        image = hole(dice, image, everywhere, 0.25, (0.07, 0.13))
    if fault == "stain":
        image = stain(dice, image, everywhere, (0.27, 0.21, 0.12), (0.16, 0.30))
    if fault == "scratch":
        image = scratch(dice, image, everywhere, (0.25, 0.24, 0.23))
    return framed(image, light)


# ---------------------------------------------------------------------------------------------------------------------
# Objects
# ---------------------------------------------------------------------------------------------------------------------

def hex_nut(rng, size, fault="", dice=None):
    """A turned steel nut from above, at any rotation, on a belt of grey rubber."""
    x, y, place = pose(rng, size, math.pi, shift=0.10, zoom=0.03)
    light = lamp(rng)
    belt = 0.30 + 0.018 * noise(rng, size, 110) + 0.02 * noise(rng, size, 5)
    image = tint(dye(rng, (0.92, 0.98, 1.0)), belt)
    r = np.hypot(x, y)
    sides = []
    for a in (0, math.pi / 3, 2 * math.pi / 3):
        sides.append(np.abs(x * math.cos(a) + y * math.sin(a)))
    hexagon = np.max(sides, 0) - 0.56
    if fault == "missing_corner":
        a = math.pi / 6 + math.pi / 3 * dice.integers(6)
        radius = dice.uniform(0.12, 0.22)
        ragged = radius * (1 + 0.12 * noise(dice, size, 14, octaves=2))
        corner_x, corner_y = 0.66 * math.cos(a), 0.66 * math.sin(a)
        distance = np.hypot(x - corner_x, y - corner_y)
        hexagon = np.maximum(hexagon, ragged - distance)
    bore = 0.31
    bx = 0.0
    by = 0.0
    if fault == "swapped_bore":  # the thread of the next smaller size
        bore = dice.uniform(0.225, 0.25)
    if fault == "shifted_bore":
        a = dice.uniform(0, 2 * math.pi)
        far = dice.uniform(0.06, 0.10)
        bx = far * math.cos(a)
        by = far * math.sin(a)
    rb = np.hypot(x - bx, y - by)
    solid = cover(np.maximum(hexagon, bore * 0.86 - rb))
    image = lay(image, image * 0.25, 0.85 * cast(solid, light, 0.14, 0.035))
    # Relief: a flat ring, the rounded-off corners, the countersunk edge of the bore.
    height = -0.55 * clamp(r - 0.53) - 0.5 * clamp(hexagon + 0.02)
    height = height - 0.9 * clamp(bore + 0.05 - rb)
    shade, gloss = lit(ndimage.gaussian_filter(height, size / 400), light, 30)
    # A turned surface has fine circular grooves: they mirror the lamp in two opposite fans.
    depth = rng.standard_normal(240)
    grooves = np.interp(r, np.linspace(0, 1, 240), depth).astype(np.float32)
    px, py = plane(size)
    centre_x, centre_y = place((0, 0))
    direction = np.arctan2(py - centre_y, px - centre_x)
    towards = np.cos(direction - math.atan2(light[1], light[0]))  # the lamp
    value = 0.34 + 0.24 * shade + 0.25 * gloss + 0.02 * noise(rng, size, 60)
    value = value + step(0, 0.02, 0.53 - r) * (0.16 * towards ** 6 + 0.022 * grooves)
    steel = dye(rng, (0.92, 0.93, 0.95))
    image = lay(image, tint(steel, value), solid)
    # Down the bore: rings of thread, lit on the side away from the lamp, and the belt in the dark.
    inner = cover(rb - bore * 0.93)
    winding = 2 * np.pi * rb / 0.036 + np.arctan2(y, x)
    thread = 0.5 + 0.5 * np.sin(winding)
    daylight = 0.2 + 0.8 * clamp(-towards)
    daylight = daylight * step(bore * 0.62, bore * 0.93, rb)
    wall = tint(steel, 0.06 + 0.42 * thread * daylight)
    floor = tint((0.92, 0.98, 1.0), 0.10 + 0.08 * step(0, 0.2, rb))
    inside = lay(wall, floor, cover(rb - bore * 0.64))
    image = lay(image, inside, inner)
    region = solid * (1 - inner)
    if fault == "scratch":
        image = scratch(dice, image, region, image * 1.1 + 0.22)
    if fault == "stain":
        image = stain(dice, image, region, (0.44, 0.26, 0.13), (0.10, 0.18))
    return image


def screw(rng, size, fault="", dice=None):
    """A countersunk wood screw of yellow zinc, at any rotation, on a light table."""
    x, y, _ = pose(rng, size, math.pi, shift=0.06, zoom=0.03)
    light = lamp(rng)
    table = 0.74 + 0.008 * noise(rng, size, 100) + 0.025 * noise(rng, size, 3)
    image = tint(dye(rng, (1.0, 0.99, 0.97), 0.04), table)
    if fault == "bent":
        start = dice.uniform(-0.2, 0.15)
        bow = wide(clamp(x - start) ** 2)
        y = y - sign(dice) * dice.uniform(0.7, 1.2) * bow
    tip = 0.74
    head = -0.74
    if fault == "missing_tip":
        tip = dice.uniform(0.36, 0.54)
    # Half the thickness along the axis: head, neck, core with thread, point.
    neck = 0.125
    core = 0.105
    half = np.where(x < -0.22, neck, core)
    half = half * step(0, 0.20, 0.74 - x) ** 0.7
    cone = np.clip(0.27 - clamp(x - head - 0.045) * 0.95, neck, None)
    if fault == "swapped_head":  # a round head: a sound part of another screw
        ball = 0.21 * np.sqrt(clamp(1 - ((x - head - 0.15) / 0.16) ** 2))
        cone = np.where(x < head + 0.15, ball, np.float32(neck))
    half = np.where(x < head + 0.25, cone, half)
    height = y / np.maximum(half + 0.03, 0.02)
    turn = np.arcsin(np.clip(height, -1, 1))
    pitch = 0.117
    winding = 2 * np.pi * x / pitch - turn + rng.uniform(0, 6.28)
    ridge = (0.5 + 0.5 * np.cos(winding)) ** 2
    deep = step(-0.24, -0.16, x) * step(0, 0.12, 0.76 - x)
    if fault == "missing_thread":
        a = dice.uniform(-0.15, 0.2)
        b = dice.uniform(0.2, 0.34)
        begins = step(a, a + 0.02, x)
        ends = step(a + b, a + b + 0.02, x)
        deep = deep * (1 - begins * (1 - ends))
    half = half + 0.050 * deep * ridge
    outline = np.maximum((np.abs(y) - half) * 0.85, x - tip)
    outline = np.maximum(outline, head - x)
    solid = cover(outline)
    image = lay(image, image * 0.35, 0.75 * cast(solid, light, 0.10, 0.03))
    # Round cross-section plus the thread's relief, lit in the picture's own frame.
    bulge = np.sqrt(np.clip(half * half - y * y, 0, None))
    bulge = bulge * (outline < 0.02)
    shade, gloss = lit(ndimage.gaussian_filter(bulge, size / 330), light, 12)
    value = 0.34 + 0.46 * np.clip(shade, 0, 1.6) + 0.55 * gloss
    value = value + 0.03 * noise(rng, size, 50)
    value = value * (1 - 0.40 * deep * (1 - ridge))
    zinc = dye(rng, (0.86, 0.72, 0.44))
    image = lay(image, tint(zinc, value), solid)
    if fault == "scratch":
        image = scratch(dice, image, solid, (1.0, 0.98, 0.94))
    return image


def capsule(rng, size, fault="", dice=None):
    """A two-coloured capsule with a print on each half, nearly in the same pose, on a blue tray."""
    x, y, place = pose(rng, size, 0.20, shift=0.06, zoom=0.02)
    light = lamp(rng)
    tray = 0.42 + 0.012 * noise(rng, size, 90) + 0.02 * noise(rng, size, 3)
    image = tint(dye(rng, (0.62, 0.80, 0.95)), tray)
    slid = dice.uniform(0.07, 0.13) if fault == "shifted_half" else 0.0
    # The body slides into the cap, which is a little thicker.

    def half(px, side, radius):
        end = np.hypot(px - 0.40 * side, y)
        return np.where(px * side > 0.40, end, np.abs(y)) - radius

    body = np.maximum(half(x - slid, 1, 0.262), -x - 0.2)
    cap = np.maximum(half(x, -1, 0.275), x - 0.02)
    solid = cover(np.minimum(body, cap))
    image = lay(image, image * 0.30, 0.75 * cast(solid, light, 0.14, 0.05))
    ivory = dye(rng, (0.88, 0.84, 0.74), 0.04)
    red = dye(rng, (0.72, 0.20, 0.16), 0.04)
    colours = [ivory, red]
    if fault == "swapped_half":  # two sound halves that do not belong together
        k = dice.integers(2)
        colours[k] = colours[1 - k]
    prints = [["OMNI", -0.33, 0.0], ["50", 0.28 + slid, 0.0]]
    if fault == "misprint":
        word = prints[dice.integers(2)]
        way = dice.integers(3)
        if way == 0:  # a letter is lacking
            word[0] = word[0][:-1]
        elif way == 1:  # two letters changed places
            word[0] = word[0][1::-1] + word[0][2:]
        else:  # printed beside its place
            word[1] += sign(dice) * 0.06
            word[2] += sign(dice) * dice.uniform(0.05, 0.09)
    canvas = Canvas(size, place)
    for word, px, py in prints:
        canvas.text(word, px, py, 0.17, 0.028)
    ink = canvas.coverage()
    halves = (body, colours[0], 0.262, slid), (cap, colours[1], 0.275, 0.0)
    for d, colour, radius, centre in halves:
        across = np.clip(y / radius, -1, 1)
        end = clamp((np.abs(x - centre) - 0.40) / radius)
        upwards = wide(np.sqrt(clamp(1 - across ** 2 - end ** 2)))
        facing = clamp(light[1] * wide(across) + light[2] * upwards)
        # the lamp's long reflection
        window = step(0.03, 0, np.abs(across + 0.52) - 0.03)
        window = window * (1 - step(0.2, 0.6, end))
        part = tint(colour, 0.35 + 0.72 * facing)
        part = lay(part, (0.16, 0.15, 0.17), 0.8 * ink)
        part = lay(part, (1, 1, 1), 0.55 * window + 0.14 * facing ** 20)
        # the cap's edge shades the body
        image = lay(image, image * 0.55, 0.6 * cover(d - 0.03) * cover(body))
        image = lay(image, part, cover(d))
    if fault == "scratch":
        image = scratch(dice, image, solid, image * 0.75)
    if fault == "hole":
        image = hole(dice, image, solid, 0.2, (0.035, 0.07))
    return image


# The parts of the circuit board: kind, place, and name printed beside.
PARTS = [
    ("chip", -0.30, -0.28, "U1"),
    ("driver", 0.48, -0.30, "U2"),
    ("can", -0.62, 0.48, "C1"),
    ("can", -0.26, 0.48, "C2"),
    ("crystal", 0.10, 0.30, "X1"),
    ("resistor", 0.36, 0.22, "R1"),
    ("resistor", 0.52, 0.22, "R2"),
    ("resistor", 0.68, 0.22, "R3"),
    ("ceramic", 0.36, 0.52, "C4"),
    ("ceramic", 0.52, 0.52, "C5"),
    ("ceramic", 0.68, 0.52, "C6"),
]


def circuit_board(rng, size, fault="", dice=None):
    """A green board whose parts always sit in the same places; only light, tone and a slight pose vary."""
    _, _, place = pose(rng, size, 0.02, shift=0.025)
    light = lamp(rng)
    green = dye(rng, (0.09, 0.34, 0.20))
    canvas = Canvas(size, place, (0.16, 0.16, 0.17))
    canvas.box(0, 0, 0.90, 0.90, green, 0.10)
    draw_copper(canvas, green * 1.5 + 0.03)
    title, parts = faulty_parts(fault, dice)
    silk = (0.86, 0.88, 0.86)
    canvas.text(title, 0.44, -0.03, 0.10, 0.018, silk)
    for kind, px, py, name in PARTS:
        if kind in ("resistor", "ceramic"):
            canvas.text(name, px, py - 0.125, 0.055, 0.011, silk)
    for kind, px, py, _, angle in parts:
        place_part(canvas, kind, px, py, angle, 1 + 0.05 * rng.standard_normal())
    height = canvas.height()
    relief = ndimage.gaussian_filter(0.16 * height, size / 500)
    shade, gloss = lit(relief, light, 40)
    shadow = np.clip(cast(height, light, 0.05, 0.010) - height, 0, 0.6)
    value = 0.30 + 0.70 * np.clip(shade, 0, 1.5) - 0.9 * shadow
    image = canvas.image() * value[..., None]
    grain = 1 + 0.02 * noise(rng, size, 80)
    image = (image + (0.10 * gloss)[..., None] - 0.05) * grain[..., None]
    if fault == "scratch":
        board = (height > 0.05).astype(np.float32)
        image = scratch(dice, image, board, (0.62, 0.66, 0.55))
    return image


def draw_copper(canvas, copper):
    """What is etched into the board: tracks with their vias, the four holes, the row of contacts."""
    gold = (0.80, 0.68, 0.38)
    layout = np.random.default_rng(4)  # the same tracks on every board
    for _ in range(34):
        a = layout.uniform(-0.85, 0.85, 2)
        b = layout.uniform(-0.8, 0.8, 2)
        across, down = abs(b - a)
        corner = a + np.sign(b - a) * min(across, down)  # first diagonally, then straight on
        end = (b[0], corner[1]) if across > down else (corner[0], b[1])
        canvas.line([tuple(a), tuple(corner), end], 0.017, copper, 0.12)
        canvas.disc(*end, 0.020, (0.62, 0.60, 0.50), 0.12)
        canvas.disc(*end, 0.009, (0.10, 0.12, 0.10), 0.10)
    for px in (-0.80, 0.80):
        for py in (-0.80, 0.80):
            canvas.disc(px, py, 0.065, gold, 0.12)
            canvas.disc(px, py, 0.040, (0.14, 0.14, 0.15), 0)
    for k in range(12):
        canvas.box(-0.55 + 0.1 * k, 0.825, 0.032, 0.06, gold, 0.12)


def faulty_parts(fault, dice):
    """The board's title, and its parts with the fault in them: lists of kind, x, y, name, angle."""
    parts = [[*part, 0.0] for part in PARTS]
    title = "NIP-40"
    if fault == "missing_part":
        lost = dice.integers(2, len(parts))
        parts[lost][0] = ""
    if fault == "swapped_parts":  # two parts change places
        small = dice.integers(5, 8), dice.integers(8, 11)
        pairs = [small, (2, 4), (3, 4)]
        a, b = pairs[dice.choice(3, p=[0.6, 0.2, 0.2])]
        parts[a][0], parts[b][0] = parts[b][0], parts[a][0]
    if fault == "shifted_part":
        part = parts[dice.integers(1, len(parts))]
        part[4] = sign(dice) * dice.uniform(0.25, 0.6)
        part[1] += dice.uniform(-0.04, 0.04)
        part[2] += dice.uniform(-0.04, 0.04)
    if fault == "misprint":
        title = str(dice.choice(["NIP-04", "NIP-", "PIN-40", "IP-40"]))
    return title, parts


def place_part(canvas, kind, x, y, turn, tone):
    """Draw one part of the board, centred on (x, y)."""

    def toned(colour):
        return tuple(tone * np.array(colour))

    def box(a, b, w, h, colour, height):
        across, down = turned(turn, a, b)
        canvas.box(x + across, y + down, w, h, toned(colour), height, turn)

    def label(words, below, height, width, grey):
        canvas.text(words, x, y + below, height, width, (grey, grey, grey), turn)

    tin = (0.72, 0.73, 0.74)
    black = (0.15, 0.15, 0.16)
    gold = (0.80, 0.68, 0.38)
    if kind == "chip":
        for k in np.linspace(-0.21, 0.21, 9):
            for far in (-0.28, 0.28):
                box(k, far, 0.013, 0.045, tin, 0.2)
                box(far, k, 0.045, 0.013, tin, 0.2)
        box(0, 0, 0.25, 0.25, black, 0.6)
        canvas.disc(x - 0.19, y - 0.19, 0.022, (0.10, 0.10, 0.10), 0.55)
        label("OMNI", -0.05, 0.09, 0.016, 0.55)
        label("2025", 0.09, 0.07, 0.013, 0.50)
    if kind == "driver":
        for k in np.linspace(-0.12, 0.12, 4):
            box(k, -0.15, 0.018, 0.05, tin, 0.2)
            box(k, 0.15, 0.018, 0.05, tin, 0.2)
        box(0, 0, 0.17, 0.12, black, 0.55)
        label("A35", 0, 0.08, 0.014, 0.55)
    if kind == "can":
        degrees = math.degrees(turn)
        canvas.disc(x, y, 0.155, toned((0.22, 0.22, 0.24)), 0.5)
        canvas.disc(x, y, 0.135, toned((0.74, 0.75, 0.77)), 0.95)
        stripe = (0.20, 0.20, 0.24)
        canvas.disc(x, y, 0.135, stripe, 0.95, 130 + degrees, 230 + degrees)
    if kind == "crystal":
        box(0, 0, 0.065, 0.15, (0.62, 0.62, 0.60), 0.45)
        box(0, 0, 0.050, 0.135, (0.80, 0.80, 0.78), 0.6)
    if kind in ("resistor", "ceramic", ""):  # the pads, also of a missing part
        box(0, -0.065, 0.040, 0.022, gold, 0.12)
        box(0, 0.065, 0.040, 0.022, gold, 0.12)
    if kind in ("resistor", "ceramic"):
        body = (0.13, 0.13, 0.14) if kind == "resistor" else (0.66, 0.50, 0.34)
        box(0, -0.062, 0.040, 0.020, tin, 0.35)
        box(0, 0.062, 0.040, 0.020, tin, 0.35)
        box(0, 0, 0.040, 0.046, body, 0.38)


DRAW = {
    "woven_cloth": woven_cloth,
    "metal_mesh": metal_mesh,
    "wood_planks": wood_planks,
    "terrazzo": terrazzo,
    "hex_nut": hex_nut,
    "screw": screw,
    "capsule": capsule,
    "circuit_board": circuit_board,
}


# ---------------------------------------------------------------------------------------------------------------------
# The photograph
# ---------------------------------------------------------------------------------------------------------------------

def develop(image, rng):
    """What lamp and lens make of a drawing: exposure, colour cast, uneven light, slight blur."""
    size = len(image)
    x, y = plane(size)
    slope = rng.uniform(0, 0.06)
    angle = rng.uniform(0, 2 * math.pi)
    ramp = 1 + slope * (x * math.cos(angle) + y * math.sin(angle))
    light = rng.uniform(0.95, 1.05) * ramp
    light = light * (1 - 0.06 * (x * x + y * y))  # a lens darkens towards the corners
    cast_of_colour = rng.uniform(0.988, 1.012, 3)
    image = np.clip(image, 0, 1.2) * tint(cast_of_colour, light)
    blur = rng.uniform(0.5, 0.75) * size / 256
    blurred = ndimage.gaussian_filter(image, (blur, blur, 0), truncate=2.5)
    return clamp(blurred).astype(np.float32)


def expose(image, rng):
    """Add the sensor's noise, which grows with the light, and round to 8 bits (size, size, 3)."""
    grain = rng.standard_normal(image.shape, dtype=np.float32)
    deviation = np.sqrt(0.00008 + 0.0003 * image)
    exposed = clamp(image + grain * deviation)
    return np.round(255 * exposed).astype(np.uint8)


def photograph(cls, split, index, seed=0, size=256):
    """One picture of the set; it depends on these five values and on nothing else.

    cls: one of `CLASSES`; split: "train", "good" or "bad" (the last two make up the test set); index: from 0.
    Returns (image uint8 (size, size, 3), mask uint8 (size, size) of 0 and 255, or None for a good picture).
    """
    numbers = seed, CLASSES.index(cls), SPLITS.index(split), index

    def stream(*more):
        return np.random.default_rng([*numbers, *more])

    scene = develop(DRAW[cls](stream(0), size), stream(1))
    if split != "bad":
        return expose(scene, stream(2)), None
    kind = DEFECTS[cls][index % len(DEFECTS[cls])]
    gap = max(1, size // 100)  # smaller ones in a mask are closed
    for attempt in itertools.count():
        drawing = DRAW[cls](stream(0), size, kind, stream(3, attempt))
        faulty = develop(drawing, stream(1))
        change = np.abs(faulty - scene).max(2)
        mask = np.pad(change > VISIBLE, 8)
        mask = ndimage.binary_closing(mask, iterations=gap)[8:-8, 8:-8]
        if MASK_AREA[0] <= mask.mean() <= MASK_AREA[1]:
            return expose(faulty, stream(2)), np.uint8(255) * mask


# ---------------------------------------------------------------------------------------------------------------------
# The set on disk
# ---------------------------------------------------------------------------------------------------------------------

def files(cls, split, index):
    """Where a picture and its mask (or None) lie, relative to the set's folder."""
    if split != "bad":
        return f"{cls}/{'train' if split == 'train' else 'test'}/good/{index:03d}.png", None
    kinds = DEFECTS[cls]
    kind = kinds[index % len(kinds)]
    number = index // len(kinds)
    return f"{cls}/test/{kind}/{number:03d}.png", f"{cls}/ground_truth/{kind}/{number:03d}_mask.png"


def save(task):
    """Draw one picture and write it and its mask, in a drawing process."""
    folder, cls, split, index, seed, size = task
    image_and_mask = photograph(cls, split, index, seed, size)
    for name, pixels in zip(files(cls, split, index), image_and_mask):
        if name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name, compress_level=3)


def leave_with_parent():
    """End this drawing process when the main process is killed; otherwise it would wait for work for ever."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def draw(folder, train=40, test_good=10, test_bad=15, size=256, seed=0, progress=True):
    """Draw the set into `folder`, unless it lies there already; returns the folder.

    train, test_good, test_bad: pictures per class. The folder appears at once and complete: the drawing goes into a
    temporary folder beside it, which is renamed at the end. A drawing in which pictures are missing, or made by an
    older version of this file, is drawn again. Raises UsageError for a drawing with other parameters, for a folder that
    holds something else, for parameters out of range, and if the folder cannot be written; none leaves a trace.
    """
    folder = Path(folder)
    wanted = dict(train=train, test_good=test_good, test_bad=test_bad, size=size, seed=seed)
    check(wanted)
    tasks = pictures(train, test_good, test_bad)
    if found(folder, wanted, tasks):
        return folder
    outdated = folder.exists()
    if outdated:
        check_replaceable(folder)
    try:
        with workplace(folder) as work:
            draw_all(work, tasks, seed, size, f"drawing {folder}", progress)
            marker = dict(version=VERSION, **wanted)
            (work / MARKER).write_bytes(json.dumps(marker).encode())
            if not found(folder, wanted, tasks):  # unless another process was faster
                if outdated:
                    shutil.rmtree(folder)
                replace(work, folder, wanted, tasks)
    except (OSError, MemoryError, BrokenProcessPool) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot draw the embedded data into {folder}: {reason}; "
                         "free some space, name another folder or draw less") from error
    return folder


def check_replaceable(folder):
    """Raise UsageError if an outdated drawing holds something that is not part of it."""
    for path in sorted(folder.iterdir()):
        if path.name not in CLASSES and path.name != MARKER and not path.name.startswith("."):
            raise UsageError(f"{folder}: must be drawn again, but {path.name} is not part of the drawing; "
                             "move it elsewhere")


def replace(work, folder, wanted, tasks):
    """Rename `work` to `folder`, unless another process has just done so."""
    try:
        work.rename(folder)
    except OSError:
        if not found(folder, wanted, tasks):
            raise


def check(wanted):
    """Raise UsageError for a parameter of `draw` that is no whole number, too small or too large."""
    smallest = dict(train=1, test_good=0, test_bad=0, size=64, seed=0)
    largest = dict(train=10**5, test_good=10**5, test_bad=10**5, size=4096, seed=2**63)
    for name, least in smallest.items():
        most = largest[name]
        if not isinstance(wanted[name], int) or not least <= wanted[name] <= most:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} is {wanted[name]!r}, but must be a whole number from {least} to {most}")


def pictures(train, test_good, test_bad):
    """Every picture of the set: a list of (class, split, index)."""
    counts = dict(zip(SPLITS, (train, test_good, test_bad)))
    tasks = []
    for cls in CLASSES:
        for split in SPLITS:
            tasks += [(cls, split, index) for index in range(counts[split])]
    return tasks


@contextlib.contextmanager
def workplace(folder):
    """A temporary folder beside `folder`, gone at the end unless it was renamed; those of killed drawings go too."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}-drawing-*"):
        with contextlib.suppress(OSError):  # it may just have been renamed
            # `draw_all` shows a sign of life at every picture
            if time.time() - left.stat().st_mtime > 600:
                shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-drawing-", dir=folder.parent))
    try:
        work.chmod(0o755)  # mkdtemp makes it private
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def draw_all(work, tasks, seed, size, title, progress):
    """Draw the pictures of all tasks into the folder `work`, in a process for each core, eight at most."""
    # Forked processes start at once and need no importable main module; elsewhere than on Linux fork is unsafe.
    start = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    processes = min(8, options.cores())
    with ProcessPoolExecutor(processes, start, leave_with_parent) as pool:
        done = pool.map(save, [(work, *task, seed, size) for task in tasks], chunksize=4)
        silent = None if progress else True  # None: silent when stderr is no terminal
        for _ in tqdm(done, title, len(tasks), disable=silent, unit="picture"):
            os.utime(work)


def found(folder, wanted, tasks):
    """Whether the wanted drawing lies in the folder, complete. Raises UsageError if something else does."""
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return False
    try:
        marker = json.loads((folder / MARKER).read_bytes())
        version = marker.pop("version")
    except (OSError, ValueError, KeyError, AttributeError):
        # perhaps somebody's own pictures: leave them alone
        raise UsageError(f"{folder} is not a drawing of the embedded data (no valid {MARKER} "
                         "in it): delete it or name another folder") from None
    if marker != wanted:
        other = [name for name in wanted if marker.get(name) != wanted[name]]
        there = ", ".join(f"{name}={marker.get(name)}" for name in other)
        asked = ", ".join(f"{name}={wanted[name]}" for name in other)
        raise UsageError(f"{folder} holds a drawing with {there}, but {asked} was asked for: "
                         "delete it or name another folder")
    if version != VERSION:
        return False
    for task in tasks:
        for name in files(*task):
            if name and not (folder / name).is_file():
                return False
    return True


def ensure(root, **parameters):
    """Draw the set into `root`/synth unless it lies there already; returns that folder. Parameters: see `draw`."""
    return draw(Path(root) / "synth", **parameters)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m common.synth",
        description="Draw the embedded data set.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", default="data/synth", help="folder to draw into")
    numbers = {
        "--train": (40, "good training pictures per class"),
        "--test-good": (10, "good test pictures per class"),
        "--test-bad": (15, "defective pictures per class"),
        "--size": (256, "width and height in pixels"),
        "--seed": (0, "another seed draws other pictures"),
    }
    for option, (default, text) in numbers.items():
        parser.add_argument(option, type=int, default=default, help=text)
    args = parser.parse_args()
    try:
        folder = draw(args.out, args.train, args.test_good, args.test_bad, args.size, args.seed)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:  # of the folder itself
        print(f"{args.out}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"{len(CLASSES)} classes with {args.train} training, {args.test_good} good and "
          f"{args.test_bad} defective test pictures each, {args.size} x {args.size}: {folder}")
    return 0


if __name__ == "__main__":
    options.exit_with(main)
