"""A report as one HTML file that needs nothing else: no network, no other files, no scripts."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmeta.errors import check_float_tensor, fail

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Page", "image_uri", "png_bytes"]

STYLE = """
:root { --ink: #1c2128; --soft: #5b6470; --line: #d9dee4; --paper: #fff; --tint: #f5f7f9;
  --right: #1a7f4b; --wrong: #c4314b; }
* { box-sizing: border-box; }
html { background: var(--tint); }
body { margin: 0 auto; max-width: 64rem; padding: 2.5rem 3rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans",
  sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: 1.1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
p { margin: .5rem 0 .8rem; max-width: 46rem; }
.lead { font-size: 1.1rem; color: var(--soft); }
.note { font-size: .9rem; color: var(--soft); }
table.data { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
table.data th, table.data td { padding: .42rem .75rem; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap; }
table.data th { font-size: .85rem; font-weight: 600; color: var(--soft); }
table.data th:first-child, table.data td:first-child { text-align: left; padding-left: 0; }
table.data.words td { text-align: left; white-space: normal; vertical-align: top; }
figure { margin: 1rem 0; }
figure img.plot { width: 100%; height: auto; display: block; }
figcaption { font-size: .9rem; color: var(--soft); max-width: 46rem; margin-top: .4rem; }
code { font: .9em ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
@media print { body { max-width: none; padding: 0; } html { background: none; } }
@media (max-width: 50rem) { body { padding: 1.2rem; } figure, .wide { overflow-x: auto; } }
"""


class Page:
    """An HTML page that is put together piece by piece.

    Text arguments are escaped; `html` takes markup as it is.

    Args:
        title: of the window and the page.
        style: CSS of the page's own, behind the common one.

    Example:
        >>> page = Page("Results")
        >>> page.text("One half is 50%.")
        >>> page.table(["what", "%"], [["one half", "50"]])
        >>> "<h1>Results</h1>" in str(page)
        True
    """

    def __init__(self, title: str, style: str = "") -> None:
        self.title, self.style = title, style
        self._parts: list[str] = []

    def heading(self, text: str, level: int = 2) -> None:
        """A heading of level 2 or 3."""
        self.html(f"<h{level}>{escape(text)}</h{level}>")

    def text(self, text: str, kind: str = "") -> None:
        """A paragraph; ``kind`` "lead" for the opening, "note" for small print."""
        self.html(f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> None:
        """A table, numbers to the right; with kind "words" to the left."""
        top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
        )
        top = f"<thead><tr>{top}</tr></thead>" if head else ""
        self.html(
            f'<div class="wide"><table class="data {kind}">{top}<tbody>{body}</tbody></table></div>'
        )

    def figure(self, figure: Figure, description: str, caption: str = "") -> None:
        """A matplotlib figure, as an SVG inside the page.

        Args:
            figure: what to draw.
            description: what it shows, for those who cannot see it.
            caption: text below it.
        """
        buffer = io.BytesIO()
        # No date: the same results give the same file.
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        data = base64.b64encode(buffer.getvalue()).decode()
        below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        source = f"data:image/svg+xml;base64,{data}"
        self.html(
            f'<figure><img class="plot" alt="{escape(description)}" src="{source}">{below}</figure>'
        )

    def html(self, markup: str) -> None:
        """Markup as it is."""
        self._parts.append(markup)

    def __str__(self) -> str:
        """The whole page."""
        title, body = escape(self.title), "\n".join(self._parts)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{STYLE}{self.style}</style>\n</head>\n"
            f"<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Write the page to a file, whose folder is made when needed."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(self), encoding="utf-8")
        return path


def png_bytes(image: Tensor) -> bytes:
    """An image in grey as a PNG file, white where the value is 0: ink on paper.

    Args:
        image: ``Tensor[H, W]`` or ``Tensor[1, H, W]`` floating, in [0, 1] (clipped to it).

    Raises:
        TypeError: not a floating tensor.
        ValueError: not one grey image.

    Example:
        >>> import torch
        >>> png_bytes(torch.zeros(28, 28))[1:4]
        b'PNG'
    """
    check_float_tensor("png_bytes", "image", image)
    if image.dim() == 3 and image.shape[0] == 1:
        image = image[0]
    if image.dim() != 2 or not image.numel():
        fail(ValueError, "png_bytes", "image", "of shape [H, W] or [1, H, W]", list(image.shape))
    grey = (255 * (1 - image.detach().cpu().float().clamp(0, 1))).round().to(torch.uint8)
    height, width = grey.shape
    # PNG puts a byte before every row that says how it is filtered: 0, not at all.
    rows = torch.cat([grey.new_zeros(height, 1), grey], 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [
        (b"IHDR", header),
        (b"IDAT", zlib.compress(rows.numpy().tobytes(), 9)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def image_uri(image: Tensor) -> str:
    """`png_bytes` as a ``data:`` address, for ``<img src=...>``."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()
