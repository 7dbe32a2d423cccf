"""Pictures of characters from the fonts that come with matplotlib."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 28  # pixels of a picture
BOX = 20  # pixels of the longer side of the ink, as in MNIST

#: Text faces. Left out: LastResort (no letters), the display faces (few), STIX's non-Unicode sets
#: and Computer Modern's symbol sets, whose code points do not mean what they draw.
FACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmr10", "cmb10", "cmss10", "cmti10", "cmtt10",
)  # fmt: skip

# Computer Modern has TeX's encoding: "<" draws an inverted "!", "$" in italics a pound sign.
# Letters and digits are where they belong, and so are these.
TEX_SAFE = "!#%&()*+,-./:;=?@[]"

# Box drawing and blocks, and Braille: grids of lines or dots that fonts share to the pixel.
GRIDS = ((0x2500, 0x259F), (0x2800, 0x28FF))

# A character that decomposes so is another one made smaller, wider or bolder: no shape of its own.
RESTYLED = ("<super>", "<sub>", "<small>", "<wide>", "<narrow>", "<font>")

# Size at which ink is measured, in pixels per em (at 72 dots an inch a point is a pixel).
EM = 64


def usable(code: int) -> bool:
    """Whether a code point is a letter, digit, sign or mark with a shape of its own."""
    if any(low <= code <= high for low, high in GRIDS):
        return False
    char = chr(code)
    if unicodedata.category(char)[0] not in "LNPS":
        return False
    return not unicodedata.decomposition(char).startswith(RESTYLED)


def render_faces() -> dict[str, np.ndarray]:
    """Draw every usable character of every face.

    Returns:
        ``images`` uint8 ``[N, 28, 28]``, the ink scaled so that its longer side is 20 pixels,
        centred; ``codes`` int64 ``[N]``; ``faces`` int64 ``[N]``; ``extent`` float32 ``[N]``, the
        longer side of the ink as the font has it, in em.
    """
    import matplotlib as mpl

    folder = Path(mpl.get_data_path(), "fonts", "ttf")
    there = [face for face, name in enumerate(FACES) if (folder / f"{name}.ttf").is_file()]
    missing = [name for face, name in enumerate(FACES) if face not in there]
    # matplotlib before 3.11 has no cmti10: one style fewer of the letters.
    if set(missing) - {"cmti10"}:
        raise FileNotFoundError(
            f"glyphs: matplotlib's fonts must be in {folder}, but {missing} are missing; "
            "matplotlib from PyPI or conda-forge has them"
        )
    parts = [_render_face(folder / f"{FACES[face]}.ttf", FACES[face]) for face in there]
    return {
        "images": np.concatenate([part[0] for part in parts]),
        "codes": np.concatenate([part[1] for part in parts]),
        "faces": np.repeat(there, [len(part[1]) for part in parts]),
        "extent": np.concatenate([part[2] for part in parts]),
    }


def _render_face(path: Path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from matplotlib import ft2font

    font = ft2font.FT2Font(str(path))
    # Hinting bends outlines to the pixel grid, another shape at every size.
    module: Any = ft2font  # the flag moved to an enumeration in matplotlib 3.10
    named = getattr(module, "LoadFlags", None)
    flags = module.LOAD_NO_HINTING if named is None else named.NO_HINTING
    tex = name.startswith("cm")
    font.set_size(EM, 72)
    boxes = []
    for code in sorted(font.get_charmap()):
        if not usable(code) or (tex and not _tex_safe(code)):
            continue
        left, bottom, right, top = font.load_char(code, flags=flags).bbox
        if right > left and top > bottom:
            boxes.append((code, max(right - left, top - bottom) / (64 * EM)))
    height, width = BOX + 4, 4 * BOX
    canvas = np.zeros((len(boxes), height, width), np.uint8)
    for sheet, (code, extent) in zip(canvas, boxes, strict=True):
        font.set_size(BOX / extent, 72)
        glyph = font.load_char(code, flags=flags)
        # matplotlib adds the glyph's own left bearing to x.
        x = width // 2 - BOX // 2 - glyph.bbox[0] // 64
        _draw(font, ft2font, sheet, x, 1, glyph)
    codes = np.array([code for code, _ in boxes], np.int64)
    extents = np.array([extent for _, extent in boxes], np.float32)
    images, inked = _centre(canvas)
    return images[inked], codes[inked], extents[inked]


def _draw(font: Any, ft2font: Any, sheet: np.ndarray, x: int, y: int, glyph: Any) -> None:
    try:
        font.draw_glyph_to_bitmap(sheet, x, y, glyph, antialiased=True)
    except TypeError:  # matplotlib before 3.11 draws on an image of its own only
        image = ft2font.FT2Image(sheet.shape[1], sheet.shape[0])
        font.draw_glyph_to_bitmap(image, x, y, glyph, antialiased=True)
        sheet[:] = np.asarray(image)


def _tex_safe(code: int) -> bool:
    char = chr(code)
    return char.isascii() and (char.isalnum() or char in TEX_SAFE)


def _centre(canvas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move the ink of each sheet to the middle of a picture; say which sheets have any."""
    count, height, width = canvas.shape
    ink = canvas > 0
    columns, rows = np.asarray(ink.any(axis=1)), np.asarray(ink.any(axis=2))
    inked = np.asarray(columns.any(axis=1))
    left, top = columns.argmax(1), rows.argmax(1)
    ink_width = width - columns[:, ::-1].argmax(1) - left
    ink_height = height - rows[:, ::-1].argmax(1) - top
    pixels = np.arange(SIDE)
    row = (top - (SIDE - ink_height) // 2)[:, None] + pixels
    column = (left - (SIDE - ink_width) // 2)[:, None] + pixels
    inside = ((row >= 0) & (row < height))[:, :, None] & ((column >= 0) & (column < width))[:, None]
    picked = canvas[
        np.arange(count)[:, None, None],
        row.clip(0, height - 1)[:, :, None],
        column.clip(0, width - 1)[:, None, :],
    ]
    return picked * inside, inked
