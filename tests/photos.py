"""Photos of digits, made from images of MNIST or drawn with a pen, to measure `q1_baseline.prepare_photo`: a function
for each kind of picture that people take. Every draw comes from a generator, so that a seed gives the same files."""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

import common
import q1_baseline

# Ways to write that are rare in MNIST, as in common.SKELETONS: a nine with a hooked tail, an angular three, a closed
# triangular four, an open nine and four.
RARE = {
    9: "qekbefklqeqkoqjter pdjbddjkpgpdpnmshucs pdiadfgknipdpdqnnsjtgr qchadfgkmjqfqfpkou",
    3: "dbpbpbiiiiopkuds dbpbpbgigipjqpkucs ccpbpbiiiiqqqqcu",
    4: "mumamabnbnto nunanacocosn ouoaoabmbmsm dadkdkqk-nanu ebdldlrk-oeou",
}


def uniform(low, high, generator):
    return low + (high - low) * torch.rand((), generator=generator).item()


def encode(photo, generator, noise=0.03, blur=0.0):
    """A grey photo (H, W) from 0 to 1 as a JPEG file (bytes), with up to this much noise and a blur in pixels."""
    photo = photo + uniform(0, noise, generator) * torch.randn(photo.shape, generator=generator)
    photo = Image.fromarray((255 * photo.clamp(0, 1)).byte().numpy())
    photo = photo.filter(ImageFilter.GaussianBlur(blur))
    photo.save(content := io.BytesIO(), "JPEG", quality=round(uniform(30, 95, generator)))
    return content.getvalue()


# ---- Ink -------------------------------------------------------------------------------------------------------------
def thin(ink):
    """The centre lines of the strokes of a bool array (H, W), one pixel wide (Zhang and Suen 1984)."""
    ink = np.pad(ink, 1)
    while True:
        before = ink.sum()
        for first in (True, False):
            north, east, south, west = (np.roll(ink, *way) for way in ((1, 0), (-1, 1), (-1, 0), (1, 1)))
            corners = [np.roll(north, -1, 1), np.roll(south, -1, 1), np.roll(south, 1, 1), np.roll(north, 1, 1)]
            ring = [north, corners[0], east, corners[1], south, corners[2], west, corners[3]]
            count = sum(x.astype(int) for x in ring)
            ends = sum((~a & b).astype(int) for a, b in zip(ring, ring[1:] + ring[:1], strict=True))
            kept = (north & east & south) | (east & south & west)
            if not first:
                kept = (north & east & west) | (north & south & west)
            ink = ink & ~((count >= 2) & (count <= 6) & (ends == 1) & ~kept)
        if ink.sum() == before:
            return ink[1:-1, 1:-1]


def count_holes(ink):
    """Loops that the strokes of a bool tensor (H, W) close."""
    paper = ~F.max_pool2d(ink[None].float(), 3, 1, 1)[0].bool()
    _, boxes = q1_baseline.connected_parts(F.pad(paper, [1] * 4, value=True).numpy())
    return len(boxes) - 1  # but for the paper around


def is_faithful(line, ink):
    """Whether a line, drawn in the place of strokes of ink, closes as many loops and comes near all of the ink, bool
    tensors (H, W). A filled loop has no centre line: an 8 would look like a Y; where a faint stroke is lost, a 0 opens.
    """
    near = q1_baseline.widen(line, 2 * round(0.8 * q1_baseline.stroke_width(ink)))
    return count_holes(line) == count_holes(ink) and (ink & ~near).sum() < 0.002 * ink.sum()


def write(image, height, generator, width=None):
    """The digit of `image`, uint8 (1, 28, 28), as coverage with ink, float (h, w) from 0 to 1, its longer side about
    `height` pixels, slightly rotated; `width`: of the strokes in pixels. The strokes stay as wide as they are if it is
    None or if no one could read the digit any more: see `is_faithful`."""
    digit = image[0].float() / 255
    rows, columns = (digit.sum(axis).nonzero().flatten() for axis in (1, 0))
    digit = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    size = [max(2, round(n * height / max(digit.shape))) for n in digit.shape]
    digit = F.interpolate(digit[None, None], size, mode="bicubic")[0, 0]
    margin = round(height / 5)
    digit = F.pad(digit, [margin] * 4).clamp(0, 1)
    digit = Image.fromarray((255 * digit).byte().numpy()).rotate(uniform(-8, 8, generator), Image.Resampling.BICUBIC)
    digit = torch.from_numpy(np.array(digit)).float() / 255
    ink = digit > 0.3
    soft = max(1.0, height / 40)  # a sharper edge than that of the enlarged pixels
    sharp = ((digit - 0.5) * height / 20 / soft + 0.5).clamp(0, 1)
    if is_faithful(sharp > 0.5, ink):
        digit = sharp
    if width:
        smooth = Image.fromarray((255 * digit).byte().numpy()).filter(ImageFilter.GaussianBlur(height / 40))
        line = torch.from_numpy(thin(np.array(smooth) > 127))
    if width and is_faithful(line, ink):
        reach = math.ceil(width / 2)
        place = torch.arange(-reach, reach + 1.0)
        pen = (width / 2 + 0.5 - (place[:, None] ** 2 + place**2).sqrt()).clamp(0, 1)
        digit = F.conv2d(line[None, None].float(), pen[None, None], padding=reach)[0, 0].clamp(0, 1)
    rows, columns = ((digit > 0.5).any(axis).nonzero().flatten() for axis in (1, 0))
    return digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def place(digit, height, width, generator, margin=8):
    """A digit (h, w) somewhere on a sheet (height, width) without ink, at least `margin` pixels from its border."""
    sheet = torch.zeros(max(height, digit.shape[0] + 2 * margin), max(width, digit.shape[1] + 2 * margin))
    top, left = (
        round(uniform(margin, n - m - margin, generator)) for n, m in zip(sheet.shape, digit.shape, strict=True)
    )
    sheet[top : top + digit.shape[0], left : left + digit.shape[1]] = digit
    return sheet


def paint(sheet, generator, contrast=(0.4, 0.9), negative=0.2):
    """A sheet of ink as a photo: dark ink on light paper; a share of `negative` the other way round."""
    paper = uniform(0.65, 1, generator)
    photo = paper * (1 - uniform(*contrast, generator) * sheet)
    return 1 - photo if uniform(0, 1, generator) < negative else photo


# ---- Kinds of photos: (image, generator) -> a JPEG file --------------------------------------------------------------
def mixture(image, generator):
    """The digit of `image`, uint8 (1, 28, 28), enlarged 5 to 20 times, slightly rotated, somewhere on a larger sheet,
    dark on light or the reverse, with a lighting gradient, noise, blur and compression."""

    def uniform(low, high):
        return low + (high - low) * torch.rand((), generator=generator).item()

    scale = uniform(5, 20)
    side = round(28 * scale)
    digit = F.interpolate(image[None].float() / 255, (side, side), mode="bicubic").clamp(0, 1)[0, 0]
    digit = Image.fromarray((255 * digit).byte().numpy()).rotate(uniform(-8, 8), Image.Resampling.BICUBIC)
    height, width = (round(side * uniform(1.2, 3)) for _ in range(2))
    top, left = round(uniform(0, height - side)), round(uniform(0, width - side))
    sheet = torch.zeros(height, width)
    sheet[top : top + side, left : left + side] = torch.from_numpy(np.array(digit)).float() / 255
    paper, ink = uniform(0.75, 1), uniform(0, 0.3)
    photo = paper + (ink - paper) * sheet
    if uniform(0, 1) < 0.5:
        photo = 1 - photo
    angle, slope = uniform(0, 2 * math.pi), uniform(0, 0.35)
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    photo *= uniform(0.7, 1) * (1 + slope * (math.cos(angle) * x + math.sin(angle) * y))
    photo += uniform(0, 0.06) * torch.randn(height, width, generator=generator)
    photo = Image.fromarray((255 * photo.clamp(0, 1)).byte().numpy())
    photo = photo.filter(ImageFilter.GaussianBlur(uniform(0, 0.1) * scale))
    photo.save(content := io.BytesIO(), "JPEG", quality=round(uniform(30, 90)))
    return content.getvalue()


def small_digit(image, generator):
    """A small digit, anywhere on a large sheet of grey paper, and the two axes of the sheet from -1 to 1."""
    height, width = (round(uniform(360, 1200, generator)) for _ in range(2))
    side = max(40, uniform(0.07, 0.2, generator) * max(height, width))
    digit = write(image, side, generator, side * uniform(0.06, 0.15, generator))
    sheet = place(digit, height, width, generator, margin=15)
    photo = uniform(0.55, 0.8, generator) - uniform(0.25, 0.45, generator) * sheet
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in sheet.shape), indexing="ij")
    return photo, y, x


def gradient(image, generator):
    photo, y, x = small_digit(image, generator)
    slopes = [uniform(-0.12, 0.12, generator) for _ in range(2)]
    return encode(photo + slopes[0] * y + slopes[1] * x, generator, blur=1)


def vignette(image, generator):
    photo, y, x = small_digit(image, generator)
    photo *= 1 - uniform(0.1, 0.35, generator) * (x**2 + y**2) ** uniform(0.8, 2, generator) / 2
    return encode(photo, generator, blur=1)


def dark_object(image, generator):
    """A bar, or something round, reaches into the picture at a corner, not over the digit."""
    free = False
    while not free:
        photo, y, x = small_digit(image, generator)
        signs = [1 if uniform(0, 1, generator) < 0.5 else -1 for _ in range(2)]
        extent = uniform(0.1, 0.3, generator), uniform(0.2, 1.2, generator)
        depth = [(1 + sign * axis) / n for sign, axis, n in zip(signs, (x, y), extent, strict=True)]
        distance = torch.maximum(*depth)
        if uniform(0, 1, generator) < 0.3:
            distance = (depth[0] ** 2 + depth[1] ** 2).sqrt()
        free = photo[distance < 1.1].min() > photo.max() - 0.05
    photo[distance < 1] = uniform(0.05, 0.35, generator)
    photo += uniform(-0.06, 0.06, generator) * y
    return encode(photo, generator, blur=1)


def dotted(length, generator):
    period = round(uniform(4, 9, generator))
    return (torch.arange(length) % period < period / 2).float()


def form_cell(image, generator):
    """A printed cell of a form: lines on four sides, one of them dotted or missing; the lines may go on."""
    height, width = (round(uniform(70, 130, generator)) for _ in range(2))
    side = uniform(0.33, 0.6, generator) * min(height, width)
    thick = round(uniform(1.5, 7, generator))
    pen = uniform(0.08, 0.16, generator) * side if uniform(0, 1, generator) < 0.7 else None
    digit = write(image, side, generator, pen)
    margin = round(uniform(1, 8, generator))
    cell = place(digit, height, width, generator, margin + 3)
    open_side = int(uniform(0, 6, generator))  # 4 and 5: none
    for i in range(4):
        lines = cell if i % 2 == 0 else cell.T
        lines = lines if i < 2 else lines.flip(0)
        line = torch.ones(lines.shape[1])
        if i == open_side:
            line = dotted(len(line), generator) if uniform(0, 1, generator) < 0.7 else 0 * line
        lines[:thick] = torch.maximum(lines[:thick], line)
        if i >= 2:
            lines = lines.flip(0)
        cell = lines if i % 2 == 0 else lines.T
    around = round(uniform(0, 12, generator))
    sheet = F.pad(cell, [around] * 4)
    if uniform(0, 1, generator) < 0.4:
        sheet = F.pad(cell[None, None], [around] * 4, mode="replicate")[0, 0]
    return encode(paint(sheet, generator, negative=0.1), generator, blur=uniform(0, 1, generator))


def box(image, generator):
    """A closed box of thin lines on a larger sheet."""
    side = uniform(30, 200, generator)
    digit = write(image, side, generator, uniform(0.07, 0.16, generator) * side)
    height, width = (round(side * uniform(1.4, 3, generator)) for _ in range(2))
    inside = place(digit, height, width, generator, margin=round(0.12 * side))
    thick = max(1, round(side * uniform(0.03, 0.12, generator)))
    sheet = F.pad(inside, [thick] * 4, value=1.0)
    sheet = F.pad(sheet, [round(uniform(0.05, 0.6, generator) * side) for _ in range(4)])
    return encode(paint(sheet, generator, negative=0.1), generator, blur=side * uniform(0, 0.015, generator))


def card(image, generator):
    """A white card with a thick dark frame, which fills the picture or lies on a grey table."""
    side = uniform(60, 250, generator)
    digit = write(image, side, generator)
    height, width = (round(side * uniform(1.4, 2.5, generator)) for _ in range(2))
    inside = place(digit, height, width, generator, margin=round(0.15 * side))
    photo = uniform(0.8, 1, generator) - uniform(0.5, 0.75, generator) * inside
    photo = F.pad(photo, [round(uniform(0.15, 0.5, generator) * side)] * 4, value=uniform(0, 0.2, generator))
    if uniform(0, 1, generator) < 0.4:
        table = uniform(0.3, 0.8, generator)
        photo = F.pad(photo, [round(uniform(0.1, 0.6, generator) * side) for _ in range(4)], value=table)
    return encode(photo, generator, blur=1)


def hairline(image, generator):
    side = uniform(150, 450, generator)
    digit = write(image, side, generator, max(1.0, side * uniform(0.008, 0.022, generator)))
    height, width = (round(side * uniform(1.1, 2, generator)) for _ in range(2))
    return encode(paint(place(digit, height, width, generator), generator), generator, noise=0.02)


def rare(image, generator):
    """Drawn as `image`, which `draw_rare` has made: a bold or thin pen on a clean sheet."""
    side = uniform(60, 300, generator)
    pen = side * uniform(0.04, 0.15, generator)
    digit = write(image, side, generator, pen if uniform(0, 1, generator) < 0.6 else None)
    height, width = (round(side * uniform(1.2, 2, generator)) for _ in range(2))
    return encode(paint(place(digit, height, width, generator), generator), generator, blur=side / 150)


def broken(image, generator):
    """A gap through the digit, near its top or anywhere: the pen was lifted, or ran dry."""
    side = uniform(60, 300, generator)
    digit = write(image, side, generator, side * uniform(0.06, 0.14, generator))
    cut = round(len(digit) * uniform(0.15, 0.8, generator))
    gap = round(side * uniform(0.03, 0.14, generator))
    digit = torch.cat([digit[:cut], torch.zeros(gap, digit.shape[1]), digit[cut:]])
    height, width = (round(side * uniform(1.3, 2.5, generator)) for _ in range(2))
    return encode(paint(place(digit, height, width, generator), generator), generator, blur=side / 150)


def drawing(image, generator):
    """Drawn with a round pen in a window: no noise, thin or very bold."""
    side = uniform(80, 400, generator)
    digit = write(image, side, generator, side * uniform(0.03, 0.2, generator))
    sheet = place(digit, *[round(side * uniform(1.1, 2, generator)) for _ in range(2)], generator)
    return encode(paint(sheet, generator, contrast=(0.9, 1), negative=0.5), generator, noise=0)


def ruled_paper(image, generator):
    """A phone's photo of lined or squared paper, with a shadow over a part of it."""
    side = uniform(80, 300, generator)
    digit = write(image, side, generator, side * uniform(0.05, 0.14, generator))
    height, width = (round(side * uniform(1.5, 5, generator)) for _ in range(2))
    sheet = place(digit, height, width, generator)
    y, x = torch.meshgrid(*(torch.arange(float(n)) for n in sheet.shape), indexing="ij")
    period, tilt = side * uniform(0.3, 1.2, generator), uniform(-0.05, 0.05, generator)
    across = (y + tilt * x) % period < max(1.0, 0.015 * side)
    down = (x - tilt * y) % period < max(1.0, 0.015 * side)
    lines = across | down if uniform(0, 1, generator) < 0.5 else across
    photo = uniform(0.6, 0.95, generator) * (1 - uniform(0.08, 0.2, generator) * lines)
    photo = photo * (1 - uniform(0.5, 0.85, generator) * sheet)
    angle = uniform(0, 2 * math.pi, generator)
    far = math.cos(angle) * (x / width - 0.5) + math.sin(angle) * (y / height - 0.5)
    photo *= 1 - uniform(0, 0.4, generator) * torch.sigmoid((far + uniform(-0.3, 0.3, generator)) * 12)
    return encode(photo, generator, noise=0.04, blur=side * uniform(0, 0.015, generator))


def tiny_file(image, generator):
    """A file of 28x28 to 64x64 pixels that the digit nearly fills."""
    side = round(uniform(18, 40, generator))
    digit = write(image, side, generator)
    sheet = place(digit, *[round(side * uniform(1.15, 1.6, generator)) for _ in range(2)], generator, margin=2)
    return encode(paint(sheet, generator, negative=0.5), generator, noise=0.02)


def tight_crop(image, generator):
    """The digit fills the picture; it may touch two borders."""
    side = uniform(50, 400, generator)
    digit = write(image, side, generator, side * uniform(0.05, 0.18, generator))
    margins = [round(max(0, uniform(-0.02, 0.15, generator)) * side) for _ in range(4)]
    return encode(paint(F.pad(digit, margins), generator), generator, blur=side / 200)


def row(images, generator):
    """Digits (N, 1, 28, 28) side by side, of about the same height, not touching."""
    side = uniform(40, 150, generator)
    pen = side * uniform(0.07, 0.15, generator)
    digits = [write(image, side * uniform(0.85, 1.15, generator), generator, pen) for image in images]
    gaps = [round(side * uniform(0.12, 0.6, generator)) for _ in digits]
    drop = [round(side * uniform(0, 0.2, generator)) for _ in digits]
    high = max(len(digit) + y for digit, y in zip(digits, drop, strict=True))
    tiles = [F.pad(digit, (gap, 0, y, high - y - len(digit))) for digit, gap, y in zip(digits, gaps, drop, strict=True)]
    line = torch.cat(tiles, 1)
    height, width = (round(n + side * uniform(0.3, 2, generator)) for n in line.shape)
    photo = paint(place(line, height, width, generator), generator)
    x = torch.linspace(-1, 1, photo.shape[1])
    return encode(photo * (1 - uniform(0, 0.15, generator) * x), generator, blur=side / 100)


KINDS = {
    "mixture": mixture,
    "small, light from one side": gradient,
    "small, vignette": vignette,
    "small, dark object in a corner": dark_object,
    "form cell": form_cell,
    "box": box,
    "card with a thick frame": card,
    "hairline": hairline,
    "rare ways to write": rare,
    "broken strokes": broken,
    "several digits in a row": row,
    "lined or squared paper, shadow": ruled_paper,
    "drawing": drawing,
    "tiny file": tiny_file,
    "tight crop": tight_crop,
}


def draw_rare(count, generator):
    """Images (count, 1, 28, 28) and labels of RARE ways to write, drawn with a pen; none with strokes of more than 3
    pixels, which fill the bays of a three."""
    ways = [(digit, text) for digit, texts in RARE.items() for text in texts.split()]
    images, labels = [], []
    while len(images) < count:
        digit, text = ways[torch.randint(len(ways), (), generator=generator)]
        image = common.draw_skeleton(*common.skeleton_path(text), 1, generator)
        if q1_baseline.stroke_width(image[0] > 127) <= 3:
            images.append(image)
            labels.append(digit)
    return torch.stack(images), torch.tensor(labels)


def make_photos(kind, split, count, generator):
    """Yield `count` photos of a kind, made of images of `split`: (JPEG file, its digits as a list)."""
    images, labels = draw_rare(count, generator) if kind == "rare ways to write" else split
    for _ in range(count):
        number = int(uniform(2, 7, generator)) if kind == "several digits in a row" else 1
        chosen = torch.randint(len(labels), (number,), generator=generator)
        image = images[chosen] if number > 1 else images[chosen[0]]
        yield KINDS[kind](image, generator), labels[chosen].tolist()


def resize_naively(photo):
    """What most programs do: a grey photo (H, W) resized to uint8 (1, 28, 28), neither inverted nor framed."""
    return (255 * F.interpolate(photo[None, None], (28, 28), mode="bilinear", antialias=True)[0]).to(torch.uint8)
