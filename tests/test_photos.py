"""Photos of digits: prepared like MNIST's images, read from any kind of file, bad ones named in one line."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call_script
from photos import make_photo, resize_naively
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
    """A folder with networks of Q1, trained on 800 synthetic digits."""
    folder = tmp_path_factory.mktemp("trained")
    call_script("q1_baseline.py", "--epochs 8 --only baseline --precision fp32", mnist_folder, folder)
    return folder


def predict(folder, *paths):
    with pytest.raises(SystemExit) as end:
        q1_baseline.main(["--out-dir", str(folder), "--predict", *map(str, paths)])
    return end.value.code


def test_clean_photo_becomes_the_image_that_it_was_made_from(digits, tmp_path):
    for i, image in enumerate(digits[0][:5]):
        for invert in (True, False):
            photo = q1_baseline.read_photo(write_photo(tmp_path / f"{i}.png", image, invert=invert))
            prepared, others = q1_baseline.prepare_photo(photo)
            assert prepared.shape == (1, 28, 28) and prepared.dtype == torch.uint8 and others == 0
            blurred = [F.avg_pool2d(x[None].float(), 3, 1).flatten() for x in (prepared, image)]
            assert F.cosine_similarity(*blurred, dim=0) > 0.9


def test_prepared_digit_is_framed_like_mnist(digits):
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(28.0)
    for image in digits[0][:4]:
        path = make_photo(image, generator)
        prepared, _ = q1_baseline.prepare_photo(q1_baseline.read_photo(io.BytesIO(path)))
        ink = prepared[0].float()
        assert max((ink.sum(axis) > 0).sum() for axis in (0, 1)) in (19, 20)
        for axis in (0, 1):
            centre = (ink.sum(axis) * place).sum() / ink.sum()
            assert abs(centre - 13.5) < 2.5


@pytest.mark.slow
def test_photos_are_classified_where_resizing_fails(trained, digits):
    """The small form of the benchmark, on synthetic digits."""
    generator = torch.Generator().manual_seed(0)
    prepared, naive = [], []
    for image in digits[0]:
        photo = q1_baseline.read_photo(io.BytesIO(make_photo(image, generator)))
        prepared.append(q1_baseline.prepare_photo(photo)[0])
        naive.append(resize_naively(photo))
    model = q1_baseline.best_network(trained / "q1_baseline_runs")

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
    expected, _ = q1_baseline.prepare_photo(q1_baseline.read_photo(write_photo(tmp_path / "plain.png", image)))
    pixels = F.interpolate(image[None].float(), scale_factor=10)[0, 0].byte().numpy()
    for ink in (0, 255):  # black or white ink on transparent paper
        layers = [np.full_like(pixels, ink)] * 3
        Image.fromarray(np.stack([*layers, pixels], 2), "RGBA").save(tmp_path / "alpha.png")
        assert torch.equal(q1_baseline.prepare_photo(q1_baseline.read_photo(tmp_path / "alpha.png"))[0], expected)
    Image.fromarray(65535 - 257 * pixels.astype(np.uint16)).save(tmp_path / "deep.png")
    assert torch.equal(q1_baseline.prepare_photo(q1_baseline.read_photo(tmp_path / "deep.png"))[0], expected)
    rotated = Image.fromarray(255 - pixels).rotate(90)
    exif = rotated.getexif()
    exif[274] = 6  # to be shown rotated by 90 degrees clockwise
    rotated.save(tmp_path / "rotated.png", exif=exif)
    assert torch.equal(q1_baseline.prepare_photo(q1_baseline.read_photo(tmp_path / "rotated.png"))[0], expected)


def test_bad_photos_are_one_line_each_and_the_others_are_predicted(trained, digits, tmp_path, capsys):
    good = write_photo(tmp_path / "good.png", digits[0][0])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "short.png").write_bytes(good.read_bytes()[:100])
    Image.new("L", (200, 200), 200).save(tmp_path / "blank.png")
    Image.new("1", (20_000, 6_000)).save(tmp_path / "huge.png")
    names = "missing.png", "text.png", "short.png", "blank.png", "huge.png"
    assert predict(trained, *(tmp_path / name for name in names), good) == 1
    out, err = capsys.readouterr()
    words = "no such file", "not an image", "cannot be read", "no digit stands out", "more than 100 megapixels"
    lines = err.splitlines()
    assert len(lines) == len(names)
    for line, name, word in zip(lines, names, words, strict=True):
        assert line.startswith(str(tmp_path / name)) and word in line
    assert "good.png: " in out


def test_largest_of_several_digits_is_taken_with_a_warning(trained, digits, tmp_path, capsys):
    large = Image.open(write_photo(tmp_path / "large.png", digits[0][0], scale=12))
    small = Image.open(write_photo(tmp_path / "small.png", digits[0][1], scale=9))
    sheet = Image.new("L", (900, 400), 255)
    sheet.paste(large, (30, 30))
    sheet.paste(small, (600, 60))
    ImageDraw.Draw(sheet).ellipse((450, 350, 455, 355), fill=0)  # a speck
    sheet.save(tmp_path / "sheet.png")
    assert predict(trained, tmp_path / "sheet.png") == 0
    out, err = capsys.readouterr()
    assert f"sheet.png: {digits[1][0]} (" in out and err.count("several digits") == 1


def test_without_a_network_the_command_that_trains_one_is_named(digits, tmp_path):
    path = write_photo(tmp_path / "photo.png", digits[0][0])
    assert "python q1_baseline.py trains one" in predict(tmp_path, path)


def test_disputed_labels_are_marked(tiny):
    logits = torch.nn.functional.one_hot((tiny.test.labels + 1) % 10, 10).float()
    logits[3] *= 10  # the highest confidence
    figure = q1_baseline.plot_mistakes(logits, tiny.test, disputed={3})
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sum("label disputed" in text for text in texts) == 1 and len(texts) == 40
    assert len(q1_baseline.DISPUTED) == 15
