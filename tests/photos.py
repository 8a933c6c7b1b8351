"""Photos made from images of MNIST, to measure `q1_baseline.prepare_photo`."""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter


def make_photo(image, generator):
    """A JPEG file (bytes) that shows the digit of `image`, uint8 (1, 28, 28): enlarged 5 to 20 times, slightly rotated,
    somewhere on a larger sheet, dark on light or the reverse, with a lighting gradient, noise, blur and compression."""

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


def resize_naively(photo):
    """What most programs do: a grey photo (H, W) resized to uint8 (1, 28, 28), neither inverted nor framed."""
    return (255 * F.interpolate(photo[None, None], (28, 28), mode="bilinear", antialias=True)[0]).to(torch.uint8)
