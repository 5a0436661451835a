"""Pictures: what is good is prepared as a file would be, what is bad harms nothing."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image

from chameleon_jax.data.images import prepare_garment
from chameleon_jax.serving import pictures
from chameleon_jax.serving.pictures import PictureError, Wardrobe

SIZE = (64, 48)


def picture(format_="PNG", size=(50, 70), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format_)
    return buffer.getvalue()


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP"])
def test_an_upload_is_prepared_as_a_file_is(format_):
    data = picture(format_)
    wardrobe = Wardrobe(SIZE)
    found = wardrobe.add_upload("garment", data)
    np.testing.assert_array_equal(found.pixels, prepare_garment(data, SIZE))
    assert wardrobe.get(found.name, "garment") is found
    assert wardrobe.add_upload("garment", data).name == found.name
    assert wardrobe.add_upload("person", data).name != found.name
    assert wardrobe.listed() == []  # an upload is nobody else's business
    assert Image.open(io.BytesIO(found.thumbnail)).format == "PNG"
    with pytest.raises(PictureError, match="no person of that name"):
        wardrobe.get(found.name, "person")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"GIF89a" + b"x" * 50, "expected a picture in PNG, JPEG, WebP"),
        (b"RIFF0000WAVE", "expected a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "expected a picture"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 15_000_000, "more than 15 MB"),
        (picture()[:100], "cannot be used"),
        (b"\xff\xd8\xff" + b"junk" * 100, "cannot be used"),
    ],
)
def test_bad_uploads_are_refused(data, message):
    with pytest.raises(PictureError, match=message):
        Wardrobe(SIZE).add_upload("garment", data)


def test_a_bomb_is_refused(monkeypatch):
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")  # 81 megapixels in a few kilobytes
    with pytest.raises(PictureError, match="more than 40 megapixels|too large"):
        Wardrobe(SIZE).add_upload("garment", buffer.getvalue())
    with pytest.raises(PictureError, match="expected one of person, garment"):
        Wardrobe(SIZE).add_upload("../garment", picture())


@pytest.mark.slow
def test_mutated_pictures_harm_nothing():
    """Each is used or refused; the server goes on."""
    rng, wardrobe = random.Random(0), Wardrobe(SIZE)
    originals = [picture(name, seed=i) for i, name in enumerate(("PNG", "JPEG", "WEBP"))]
    used = 0
    for number in range(60):
        data = bytearray(originals[number % 3])
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(12, len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(12, len(data)) :]
        try:
            assert wardrobe.add_upload("garment", bytes(data)).pixels.shape == (*SIZE, 3)
            used += 1
        except PictureError as error:
            assert "/" not in str(error).replace("and/or", "")  # no path, no traceback
    assert used < 60
    assert wardrobe.add_upload("garment", originals[0]).pixels.shape == (*SIZE, 3)


def test_only_so_many_uploads_are_kept(monkeypatch):
    monkeypatch.setattr(pictures, "MOST_KEPT", 2 * SIZE[0] * SIZE[1] * 3)
    monkeypatch.setattr(
        pictures, "_opened_apart", lambda kind, data, size: prepare_garment(data, size)
    )
    wardrobe = Wardrobe(SIZE)
    names = [wardrobe.add_upload("garment", picture(seed=i)).name for i in range(3)]
    with pytest.raises(PictureError):
        wardrobe.get(names[0])
    assert wardrobe.get(names[2])
