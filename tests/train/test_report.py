"""Pages and pictures, read back by others' readers."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib import image as reader
from matplotlib.figure import Figure

from fastmeta.train.report import Page, image_uri, png_bytes


def test_png_reads_back_as_ink_on_paper():
    ink = torch.rand(28, 20, generator=torch.Generator().manual_seed(0))
    read = reader.imread(io.BytesIO(png_bytes(ink)))
    np.testing.assert_allclose(read, 1 - ink.numpy(), atol=0.51 / 255)


def test_png_clips_and_takes_one_channel():
    read = reader.imread(io.BytesIO(png_bytes(torch.tensor([[[-1.0, 2.0]]]))))
    np.testing.assert_array_equal(read, [[1, 0]])


def test_image_uri_holds_the_png():
    image = torch.zeros(2, 3)
    head, data = image_uri(image).split(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == png_bytes(image)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(3, 4, 4), ValueError, r"image must be of shape \[H, W\] or \[1, H, W\]"),
        (torch.zeros(0, 4), ValueError, r"got \[0, 4\]"),
        (torch.zeros(4, 4, dtype=torch.uint8), TypeError, "got uint8 tensor"),
    ],
)
def test_png_refuses(image, error, message):
    with pytest.raises(error, match=message):
        png_bytes(image)


class Balance(HTMLParser):
    """That every element is closed by its own end."""

    def __init__(self):
        super().__init__()
        self.open, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_page_is_balanced_and_escaped():
    page = Page("A < B", "b { color: red }")
    page.heading("1 & 2")
    page.text("<script>alert(1)</script>", "note")
    page.table(["<i>"], [["a < b"]])
    axes = Figure().add_subplot()
    axes.plot([1, 2])
    page.figure(axes.figure, 'a "line"', "rising & rising")
    text = str(page)
    parser = Balance()
    parser.feed(text)
    assert not parser.open
    for wanted in (
        "A < B",
        "1 & 2",
        "<script>alert(1)</script>",
        "<i>",
        "a < b",
        "rising & rising",
    ):
        assert wanted in parser.texts
    assert "<script" not in text
    assert "b { color: red }" in text


def test_figure_is_the_same_to_the_byte_for_the_same_numbers():
    from matplotlib import rc_context

    def drawn():
        with rc_context({"svg.hashsalt": "x"}):
            page, axes = Page("t"), Figure().add_subplot()
            axes.plot([1, 2])
            page.figure(axes.figure, "line")
            return str(page)

    assert drawn() == drawn()


def test_write_makes_the_folder(tmp_path):
    path = Page("Ü").write(tmp_path / "a" / "b.html")
    assert "<h1>Ü</h1>" in path.read_text(encoding="utf-8")
