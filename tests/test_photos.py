"""Photos of digits: prepared like MNIST's images, read from any kind of file, bad ones named in one line."""

import io
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from photos import KINDS, make_photos, mixture, resize_naively, write
from PIL import Image, ImageDraw

import common
import q1_baseline


def write_photo(path, image, scale=10, invert=True, **options):
    """A clean photo of `image`, uint8 (1, 28, 28), dark on light unless `invert` is False."""
    pixels = F.interpolate(image[None].float(), scale_factor=scale)[0, 0].byte().numpy()
    Image.fromarray(255 - pixels if invert else pixels).save(path, **options)
    return path


@pytest.fixture(scope="module")
def digits():
    return common.draw_digits(60, seed=7)


@pytest.fixture(scope="module")
def trained(mnist_folder, tmp_path_factory):
    """A folder with a network for photos, trained on 880 synthetic digits at the first --predict, and its options."""
    folder = tmp_path_factory.mktemp("trained")
    options = f"--out-dir {folder} --data-dir {mnist_folder} --epochs 4 --batch-size 16 --precision fp32 --workers 1"
    photo = write_photo(folder / "first.png", common.draw_digits(1, seed=3)[0][0])
    with pytest.raises(SystemExit) as end:
        q1_baseline.main([*options.split(), "--predict", str(photo)])
    assert end.value.code == 0
    return folder


def test_options_of_a_training_do_not_touch_the_network_that_is_there(trained, tmp_path, capsys):
    photo = write_photo(tmp_path / "photo.png", common.draw_digits(1, seed=3)[0][0])
    with pytest.raises(SystemExit):
        q1_baseline.main(["--out-dir", str(trained), "--epochs", "1", "--predict", str(photo)])
    assert "is used as it is; delete it to train another" in capsys.readouterr().out


def load_network(folder):
    args = common.parse_args(q1_baseline.__file__, "", q1_baseline.RUNS, ["--out-dir", str(folder)])
    return q1_baseline.photo_network(args)[0]


def predict(folder, *paths):
    with pytest.raises(SystemExit) as end:
        q1_baseline.main(["--out-dir", str(folder), "--predict", *map(str, paths)])
    return end.value.code


def prepare(path):
    return q1_baseline.prepare_photo(q1_baseline.read_photo(path))


def likeness(prepared, image):
    blurred = [F.avg_pool2d(x[None].float(), 3, 1).flatten() for x in (prepared, image)]
    return F.cosine_similarity(*blurred, dim=0)


def test_clean_photo_becomes_the_image_that_it_was_made_from(digits, tmp_path):
    for i, image in enumerate(digits[0][:5]):
        for invert in (True, False):
            images, doubts = prepare(write_photo(tmp_path / f"{i}.png", image, invert=invert))
            assert images.shape == (1, 1, 28, 28) and images.dtype == torch.uint8 and not doubts
            assert likeness(images[0], image) > 0.9


def test_prepared_digit_is_framed_like_mnist(digits):
    """In a box of 20 pixels, with the centre of mass within a pixel of (14, 14)."""
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(28.0)
    for image in digits[0][:6]:
        images, _ = prepare(io.BytesIO(mixture(image, generator)))
        ink = images[0, 0].float()
        assert max((ink.sum(axis) > 0).sum() for axis in (0, 1)) in (19, 20)
        for axis in (0, 1):
            assert abs((ink.sum(axis) * place).sum() / ink.sum() - 14) < 0.71


@pytest.mark.parametrize("density", [0, 0.05, 0.3, 0.6, 1])
def test_connected_parts_are_those_of_a_flood_fill(density):
    mask = np.random.default_rng(0).random((23, 37)) < density
    numbers, boxes = q1_baseline.connected_parts(mask)
    left = {tuple(place) for place in np.argwhere(mask)}
    found = []
    while left:
        part, edge = set(), {left.pop()}
        while edge:
            part |= edge
            near = {(y + i, x + j) for y, x in edge for i in (-1, 0, 1) for j in (-1, 0, 1)}
            edge = near & left
            left -= edge
        found.append(part)
    assert len(boxes) == len(found) == numbers.max()
    for part in found:
        number = numbers[next(iter(part))]
        assert part == {tuple(place) for place in np.argwhere(numbers == number)}
        y, x = zip(*part, strict=True)
        assert boxes[number - 1].tolist() == [min(y), min(x), max(y) + 1, max(x) + 1]


def test_windows_find_their_extremes():
    x = torch.rand(30, 40)
    for size in (1, 2, 5, 12):
        expected = F.max_pool2d(x[None], size, 1)[0]
        assert torch.equal(q1_baseline.slide(torch.maximum, x, size), expected)


def test_even_and_uneven_paper_is_not_ink():
    """Light that falls off to one side or to all corners leaves nothing, nor does a blank sheet."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 240), torch.linspace(-1, 1, 540), indexing="ij")
    for photo in (0.62 + 0.1 * x + 0.1 * y, torch.full((240, 540), 0.7), 0.7 * (1 - 0.15 * (x**2 + y**2))):
        images, doubts = q1_baseline.prepare_photo(photo)
        assert len(images) == 0 and "no digit stands out" in doubts[0]


def draw_sheet(size, shapes):
    """A white sheet (width, height) as a photo, with shapes: (method of ImageDraw, its points, options)."""
    sheet = Image.new("L", size, 255)
    pen = ImageDraw.Draw(sheet)
    for method, place, options in shapes:
        getattr(pen, method)(place, **options)
    return torch.from_numpy(np.array(sheet)).float() / 255


RING = ("ellipse", (150, 100, 230, 220), {"outline": 0, "width": 16})
FAINT = ("ellipse", (150, 400, 210, 470), {"outline": 170, "width": 7})
BAR = [(110, 100), (100, 180), (160, 200), (150, 260), (90, 270)]
LINE = {"fill": 0, "width": 14}


@pytest.mark.parametrize(
    ("size", "shapes", "widths"),
    [
        ((400, 400), [("line", BAR, LINE), ("line", [(185, 95), (260, 90)], LINE)], [16]),
        (
            (600, 300),
            [RING, ("line", [(170, 160), (210, 160)], LINE), ("line", [(300, 100), (300, 220)], LINE)],
            [13, 3],
        ),
        ((270, 640), [FAINT, ("rectangle", (0, 340, 20, 640), {"fill": 0})], [17]),
    ],
    ids=["a five's upper stroke", "a stroke inside a zero", "an object at the border"],
)
def test_parts_become_digits(size, shapes, widths):
    """Of these widths, in pixels, in a box of 20."""
    images, doubts = q1_baseline.prepare_photo(draw_sheet(size, shapes))
    assert not doubts and len(images) == len(widths)
    for image, width in zip(images, widths, strict=True):
        assert abs((image > 100).any(1).sum() - width) <= 1


def test_a_digit_near_its_frame_is_found():
    """Paper that it cuts off from the rest belongs to the sheet, too."""
    frame = ("rectangle", (4, 4, 235, 195), {"outline": 0, "width": 10})
    seven = ("line", [(140, 90), (222, 90), (180, 184)], LINE)
    images, _ = q1_baseline.prepare_photo(draw_sheet((240, 200), [frame, seven]))
    alone, _ = q1_baseline.prepare_photo(draw_sheet((240, 200), [seven]))
    assert len(images) == 1 and likeness(images[0], alone[0]) > 0.95


def test_made_digits_keep_their_loops_and_strokes():
    """A pen drawn along the centre line of a filled loop would make an L of a six."""
    shapes = [("line", [(110, 20), (80, 200)], {"fill": 0, "width": 24}), ("ellipse", (70, 150, 190, 260), {"fill": 0})]
    filled = 1 - F.interpolate(draw_sheet((280, 280), shapes)[None, None], (28, 28), mode="area")[0]
    generator = torch.Generator().manual_seed(0)
    written = write((255 * filled).byte(), 200, generator, width=12)
    assert (written > 0.5).float().mean() > 0.4


@pytest.mark.parametrize("kind", KINDS)
def test_digits_of_every_kind_are_found(kind, digits):
    """As many as there are; the right ones, which takes a network, in the slow test below."""
    generator = torch.Generator().manual_seed(1)
    found = 0
    for content, expected in make_photos(kind, digits, 3, generator):
        images, _ = prepare(io.BytesIO(content))
        found += len(images) == len(expected)
    assert found >= 2


@pytest.mark.slow
def test_photos_are_classified_where_resizing_fails(trained, digits):
    """The small form of the benchmark, on synthetic digits."""
    generator = torch.Generator().manual_seed(0)
    prepared, naive = [], []
    for image in digits[0]:
        photo = q1_baseline.read_photo(io.BytesIO(mixture(image, generator)))
        prepared.append(q1_baseline.prepare_photo(photo)[0][0])
        naive.append(resize_naively(photo))
    model = load_network(trained)

    def accuracy(images):
        return common.evaluate(model, common.Split(images, digits[1]))[1]

    assert accuracy(torch.stack(prepared)) > accuracy(digits[0]) - 8
    assert accuracy(torch.stack(naive)) < 50


FORMATS = {"png": {}, "jpg": {"quality": 80}, "gif": {}, "webp": {}}


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_prediction(suffix, trained, digits, tmp_path, capsys):
    path = write_photo(tmp_path / f"photo.{suffix}", digits[0][0], **FORMATS[suffix])
    assert predict(trained, path) == 0
    assert f"photo.{suffix}: {digits[1][0]} (" in capsys.readouterr().out
    assert (trained / "q1_baseline_predictions.png").stat().st_size > 5_000


def test_alpha_orientation_and_depth_are_respected(digits, tmp_path):
    image = digits[0][0]
    expected, _ = prepare(write_photo(tmp_path / "plain.png", image))
    pixels = F.interpolate(image[None].float(), scale_factor=10)[0, 0].byte().numpy()
    for ink in (0, 255):  # black or white ink on transparent paper
        layers = [np.full_like(pixels, ink)] * 3
        Image.fromarray(np.stack([*layers, pixels], 2), "RGBA").save(tmp_path / "alpha.png")
        assert torch.equal(prepare(tmp_path / "alpha.png")[0], expected)
    Image.fromarray(65535 - 257 * pixels.astype(np.uint16)).save(tmp_path / "deep.png")
    assert torch.equal(prepare(tmp_path / "deep.png")[0], expected)
    rotated = Image.fromarray(255 - pixels).rotate(90)
    exif = rotated.getexif()
    exif[274] = 6  # to be shown rotated by 90 degrees clockwise
    rotated.save(tmp_path / "rotated.png", exif=exif)
    assert torch.equal(prepare(tmp_path / "rotated.png")[0], expected)


@pytest.mark.parametrize("most", [1.0, 255.0, 4095, 65535, 10**6])
def test_deep_pixels_are_read_by_their_range(most, digits, tmp_path):
    """Floats up to 1 or 255, 12 bits in 16, and integers of 32 bits."""
    image = digits[0][0]
    expected, _ = prepare(write_photo(tmp_path / "plain.png", image))
    pixels = 1 - F.interpolate(image[None].float(), scale_factor=10)[0, 0].numpy() / 255
    kind = np.float32 if isinstance(most, float) else np.uint16 if most < 65536 else np.int32
    Image.fromarray((most * pixels).astype(kind)).save(tmp_path / "deep.tiff")
    assert likeness(prepare(tmp_path / "deep.tiff")[0][0], expected[0]) > 0.999


def test_bad_photos_are_one_line_each_and_the_others_are_predicted(trained, digits, tmp_path, capsys):
    good = write_photo(tmp_path / "good.png", digits[0][0])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "short.png").write_bytes(good.read_bytes()[:100])
    Image.new("1", (20_000, 6_000)).save(tmp_path / "huge.png")
    (tmp_path / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "scan.png").write_bytes(b"%PDF-1.7")
    (tmp_path / "folder").mkdir()
    Image.fromarray(np.full((30, 30), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    words = {
        "missing.png": "no such file",
        "text.png": "not an image",
        "short.png": "cannot be read",
        "huge.png": "more than 100 megapixels",
        "phone.jpg": "HEIC photo or a video, which cannot be read; export it as JPEG",
        "scan.png": "PDF file, not a picture; export it as JPEG",
        "folder": "a folder, not a picture",
        "nan.tiff": "not finite",
    }
    assert predict(trained, *(tmp_path / name for name in words), good) == 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert len(lines) == len(words)
    for line, (name, word) in zip(lines, words.items(), strict=True):
        assert line.startswith(f"{tmp_path / name}: ") and word in line
    assert "good.png: " in out


def paste(path, images, places, size=(900, 400)):
    """A sheet (width, height) with images at places (x, y, scale)."""
    sheet = Image.new("L", size, 255)
    for image, (x, y, scale) in zip(images, places, strict=True):
        pixels = F.interpolate(image[None].float(), scale_factor=scale)[0, 0].byte().numpy()
        sheet.paste(Image.fromarray(255 - pixels), (x, y))
    sheet.save(path)
    return path


def test_digits_in_a_line_are_read_from_left_to_right(trained, digits, tmp_path, capsys):
    places = [(20, 60, 8), (240, 40, 9), (480, 80, 7), (690, 50, 7)]
    path = paste(tmp_path / "year $2_0^$.png", digits[0][:4], places)  # no mathematics
    with Image.open(path) as sheet:
        ImageDraw.Draw(sheet).ellipse((450, 350, 455, 355), fill=0)  # a speck
        sheet.save(path)
    images, doubts = prepare(path)
    assert len(images) == 4 and not doubts
    for prepared, image in zip(images, digits[0], strict=False):
        assert likeness(prepared, image) > 0.85
    assert predict(trained, path) == 0
    text = capsys.readouterr().out.split(": ")[1]
    assert text.partition(" (")[0].replace(" ", "").isdigit() and text.count("%") == 4


def test_digits_half_a_stroke_apart_are_two_and_a_broken_one_is_one(tmp_path):
    sheet = Image.new("L", (500, 400), 255)
    pen = ImageDraw.Draw(sheet)
    for left in (100, 230):
        pen.ellipse((left, 100, left + 120, 260), outline=0, width=20)
    sheet.save(tmp_path / "two.png")
    assert len(prepare(tmp_path / "two.png")[0]) == 2
    pen.rectangle((225, 0, 500, 400), fill=255)
    pen.line([(90, 175), (240, 175)], fill=255, width=8)
    sheet.save(tmp_path / "broken.png")
    assert len(prepare(tmp_path / "broken.png")[0]) == 1


def test_doubts_are_shown_with_what_to_do(trained, digits, tmp_path, capsys):
    image = digits[0][0]
    names = "blank", "tiny", "cut", "lines", "frame"
    blank, tiny, cut, lines, frame = (tmp_path / f"{name}.png" for name in names)
    Image.new("L", (200, 200), 200).save(blank)
    Image.open(write_photo(tmp_path / "large.png", image)).resize((9, 9)).save(tiny)
    Image.open(tmp_path / "large.png").crop((60, 60, 220, 220)).save(cut)
    paste(lines, digits[0][:2], [(100, 10, 6), (100, 200, 6)])
    with Image.open(paste(frame, digits[0][:1], [(310, 60, 10)])) as sheet:  # open below; the digit is joined to it
        ImageDraw.Draw(sheet).line([(300, 380), (300, 20), (600, 20), (600, 380)], fill=0, width=12)
        ImageDraw.Draw(sheet).line([(300, 200), (450, 200)], fill=0, width=12)
        sheet.save(frame)
    words = "no digit stands out", "less than ten pixels high", "touches two borders", "more than one line", "a frame"
    assert predict(trained, blank, tiny, cut, lines, frame) == 0
    out, err = capsys.readouterr()
    assert not err and len(out.splitlines()) == len(words)
    for line, word in zip(out.splitlines(), words, strict=True):
        assert "unsure: " in line and word in line and q1_baseline.ADVICE in line


def test_twelve_megapixels_take_less_than_a_second(digits, tmp_path):
    """On a quiet machine 0.1 s: tests/benchmark.py measures it."""
    pixels = F.interpolate(digits[0][0][None].float(), (4000, 3000), mode="bilinear")[0, 0].byte().numpy()
    Image.fromarray(255 - pixels // 2).convert("RGB").save(tmp_path / "large.jpg")
    started = time.perf_counter()
    images, _ = prepare(tmp_path / "large.jpg")
    assert len(images) == 1 and time.perf_counter() - started < 1


def test_network_for_photos_is_trained_once_and_apart_from_the_experiment(trained, capsys):
    assert {path.name for path in trained.glob("*_runs")} == {"q1_baseline_photos_runs"}
    load_network(trained)
    assert "training" not in capsys.readouterr().out


def draw_line(figure, axes, points):
    """Press the mouse at the first point (x, y) of the data, move it to the others, and release it."""
    from matplotlib.backend_bases import MouseEvent

    for i, point in enumerate(points):
        x, y = axes.transData.transform(point)
        name = "motion_notify_event" if i else "button_press_event"
        figure.canvas.callbacks.process(name, MouseEvent(name, figure.canvas, x, y, button=1))


def test_board_shows_live_what_is_drawn(trained):
    from matplotlib.backend_bases import KeyEvent
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6))
    canvas = FigureCanvasAgg(figure)
    q1_baseline.make_board(figure, load_network(trained))
    canvas.draw()
    left, middle, right = figure.axes
    draw_line(figure, left, [(140, y) for y in range(40, 240, 10)])
    image = middle.images[0].get_array()
    assert image.max() > 200 and (image > 100).any(1).sum() in (19, 20) and (image > 100).any(0).sum() < 6
    heights = [bar.get_height() for bar in right.patches]
    assert abs(sum(heights) - 100) < 0.1 and right.texts[0].get_text().isdigit()
    started = time.perf_counter()
    draw_line(figure, left, [(60, 60), (100, 60)])
    assert time.perf_counter() - started < 1  # two segments; on a quiet machine 0.02 s
    canvas.callbacks.process("key_press_event", KeyEvent("key_press_event", canvas, "c"))
    assert middle.images[0].get_array().max() == 0 and right.patches[0].get_height() == 0


def test_without_a_display_draw_says_so(trained, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    with pytest.raises(SystemExit) as end:
        q1_baseline.main(["--out-dir", str(trained), "--draw"])
    assert "--draw needs a display" in end.value.code


WINDOW = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from matplotlib import pyplot
import q1_baseline
from test_photos import draw_line

def act():
    figure = pyplot.gcf()
    draw_line(figure, figure.axes[0], [(140, y) for y in range(40, 240, 10)])
    figure.canvas.draw()
    print("drawn", figure.axes[1].images[0].get_array().max(), type(figure.canvas).__name__)
    pyplot.close(figure)

show = pyplot.show
def show_and_act():
    timer = pyplot.gcf().canvas.new_timer(500, [(act, (), {{}})])
    timer.single_shot = True
    timer.start()
    show()
pyplot.show = show_and_act
q1_baseline.main(["--out-dir", {folder!r}, "--draw"])
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("xvfb-run"), reason="no virtual display: xvfb is not installed")
def test_window_under_a_virtual_display(trained):
    pytest.importorskip("tkinter", reason="no tkinter")
    code = WINDOW.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(trained))
    command = ["xvfb-run", "-a", sys.executable, "-c", code]
    environment = {**os.environ, "MPLBACKEND": "TkAgg"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "drawn 255" in done.stdout and "TkAgg" in done.stdout


def test_disputed_labels_are_marked(tiny):
    logits = torch.nn.functional.one_hot((tiny.test.labels + 1) % 10, 10).float()
    logits[3] *= 10  # the highest confidence
    mistakes = q1_baseline.list_mistakes(logits.softmax(1).unsqueeze(0), tiny.test.labels)
    figure = q1_baseline.plot_mistakes(mistakes, tiny.test, disputed={3})
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sum("label disputed" in text for text in texts) == 1 and len(texts) == 40
    assert len(q1_baseline.DISPUTED) == 15
