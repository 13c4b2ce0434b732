"""Drawing: heat-maps, overlays, pictures side by side with titles, histograms of scores, curves.

Arrays of pixels are uint8 (H, W, 3), RGB; a canvas is a Pillow image. What is drawn, and in which
folder it lies, is decided by `report.py`, `prediction.py`, `pages.py` and the scripts.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Dark blue over red to pale yellow; lightness rises evenly, so that the maps also read in grey.
HEAT = np.array([[0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66],
                 [245, 125, 21], [250, 193, 39], [252, 255, 164]], float)
GREEN, RED, GREY, PALE = (64, 160, 72), (208, 60, 56), (90, 90, 90), (225, 225, 225)
# Four colours that can be told apart without telling red from green.
LINES = (230, 159, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167)
TITLE = 18  # height of a title in pixels


# --------------------------------------------------------------------------------------------- maps


def share(values, low, high):
    """Map (H, W) -> float64 (H, W) in 0..1: 0 at `low` and below, 1 at `high` and above."""
    return np.clip((np.asarray(values, float) - low) / max(high - low, 1e-12), 0, 1)


def heat(values, low, high):
    """Map (H, W) -> uint8 colours (H, W, 3); low is dark, high is bright."""
    t = share(values, low, high) * (len(HEAT) - 1)
    channels = [np.interp(t, np.arange(len(HEAT)), HEAT[:, c]) for c in range(3)]
    return np.stack(channels, -1).astype(np.uint8)


def overlay(image, values, low, high):
    """Heat over the image, more opaque where the map is higher: uint8 (H, W, 3)."""
    alpha = share(values, low, high)[..., None] * 0.75
    return (image * (1 - alpha) + heat(values, low, high) * alpha).astype(np.uint8)


def heat_picture(values, low, high, size):
    """Map (H, W) -> picture of `size` (width, height): 256 steps of the colours of `heat` in a
    palette, so that a pixel takes one byte."""
    steps = np.rint(255 * share(values, low, high)).astype(np.uint8)
    picture = Image.fromarray(steps).resize(size, Image.Resampling.BILINEAR)
    picture.putpalette(heat(np.arange(256)[None], 0, 255).tobytes())
    return picture


def enlarged(values, size):
    """Map (h, w) -> float32 (height, width), bilinear."""
    picture = Image.fromarray(np.asarray(values, np.float32))
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR))


def overlaid(image, values, low, high):
    """`overlay` for a map of another size: image (h, w, 3), map (H, W) -> uint8 (h, w, 3)."""
    size = image.shape[1], image.shape[0]
    colours = heat_picture(values, low, high, size).convert("RGB")
    opaque = np.rint(0.75 * 255 * share(values, low, high)).astype(np.uint8)
    alpha = Image.fromarray(opaque).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(Image.composite(colours, Image.fromarray(image), alpha))


def truth(mask):
    """Mask (H, W) bool -> uint8 (H, W, 3): white where it is true."""
    return np.where(mask[..., None], 255, 0).astype(np.uint8).repeat(3, 2)


def pixels(image):
    """uint8 tensor (3, S, S) -> uint8 array (S, S, 3)."""
    return image.permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------------------- layout


def in_row(arrays, gap=4):
    """Arrays (H, W, 3) side by side on white, top edges aligned."""
    height = max(array.shape[0] for array in arrays)
    width = sum(array.shape[1] + gap for array in arrays) - gap
    canvas, x = Image.new("RGB", (width, height), "white"), 0
    for array in arrays:
        canvas.paste(Image.fromarray(array), (x, 0))
        x += array.shape[1] + gap
    return canvas


def in_column(canvases, gap=4):
    """Canvases one below the other on white, left edges aligned."""
    width = max(canvas.width for canvas in canvases)
    height = sum(canvas.height + gap for canvas in canvases) - gap
    column, y = Image.new("RGB", (width, height), "white"), 0
    for canvas in canvases:
        column.paste(canvas, (0, y))
        y += canvas.height + gap
    return column


def titled(canvas, text):
    """The canvas below a line of text."""
    result = Image.new("RGB", (canvas.width, canvas.height + TITLE), "white")
    ImageDraw.Draw(result).text((2, 1), text, fill="black", font=ImageFont.load_default(13))
    result.paste(canvas, (0, TITLE))
    return result


# ------------------------------------------------------------------------------------------- graphs


def histogram(good, bad, width, height=120, bins=40, limits=None):
    """Scores of good (green) and defective (red) images; a bar is a share of the images of its
    colour.

    limits: (lowest, highest) score of the axis; None: of these scores.
    """
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    low, high = limits or (min(good + bad), max(good + bad))
    edges = np.linspace(low, high if high > low else low + 1e-9, bins + 1)
    shares = [np.histogram(scores, edges)[0] / max(1, len(scores)) for scores in (good, bad)]
    top = max(values.max() for values in shares)
    base, step = height - 16, width / bins
    for side, colour in enumerate((GREEN, RED)):
        for i, value in enumerate(shares[side]):
            if value > 0:
                x = i * step + side * step / 2
                y = base - value / top * (base - 4)
                draw.rectangle((x, y, x + step / 2 - 1, base), fill=colour)
    draw.line((0, base, width, base), fill=GREY)
    draw.text((2, base + 2), f"{low:.3g}", fill=GREY, font=font)
    label = f"{high:.3g}"
    draw.text((width - draw.textlength(label, font) - 2, base + 2), label, fill=GREY, font=font)
    return canvas


OWN_PICTURES = ("overview", "shift", "distributions", "pixels", "changed")  # in pictures/


def file_of(cls, classes):
    """The file name of a class's picture: CLASS.png, or CLASS-class.png where CLASS is one of
    OWN_PICTURES; with "-class" repeated while another class has that name."""
    name = cls
    while name in OWN_PICTURES or (name != cls and name in classes):
        name += "-class"
    return f"{name}.png"


def distributions(path, parts):
    """PNG of the image scores of every class on one axis, side by side for several ways to score.

    parts: {title: rows (path, class, label, score)}, like `rows` of a `report.Pass`.
    """
    panels = []
    for title, rows in parts.items():
        scores = np.array([row[3] for row in rows])
        # A few extreme defects would squeeze all others.
        limits = scores.min(), np.quantile(scores, 0.99)
        strips = []
        for cls in dict.fromkeys(row[1] for row in rows):
            of_label = [], []
            for _, row_class, label, value in rows:
                if row_class == cls:
                    of_label[label].append(min(value, limits[1]))
            strips.append(titled(histogram(*of_label, 420, 56, limits=limits), cls))
        panels.append(np.asarray(titled(in_column(strips), title)))
    path.parent.mkdir(parents=True, exist_ok=True)
    in_row(panels, gap=24).save(path)


def curves(path, panels, width=360, height=240):
    """PNG of curves side by side.

    panels: {title: {name: list of fractions}}, the fractions at 0, 1, 2, ...; lines that hold None
    are left out.
    """
    drawn = []
    for title, lines in panels.items():
        known = {name: line for name, line in lines.items() if None not in line}
        drawn.append(np.asarray(titled(_curves_panel(known, width, height), title)))
    in_row(drawn, gap=16).save(path)


def _curves_panel(lines, width, height):
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    lowest = min((min(line) for line in lines.values()), default=0)
    low = math.floor(10 * lowest) / 10
    last = max((len(line) for line in lines.values()), default=6) - 1

    def x(position):
        return 36 + position * (width - 150) / last

    def y(value):
        return 8 + (1 - value) / max(1 - low, 0.1) * (height - 34)

    for tick in np.arange(low, 1.01, 0.1):
        draw.line((x(0), y(tick), x(last), y(tick)), fill=PALE)
        draw.text((8, y(tick) - 6), f"{100 * tick:.0f}", fill=GREY, font=font)
    for position in range(last + 1):
        draw.text((x(position) - 3, height - 18), str(position), fill=GREY, font=font)
    for i, (name, line) in enumerate(lines.items()):
        points = [(x(position), y(value)) for position, value in enumerate(line)]
        draw.line(points, fill=LINES[i], width=2)
        draw.text((width - 106, 10 + 16 * i), name, fill=LINES[i], font=font)
    return canvas
