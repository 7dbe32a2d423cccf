"""Characters of matplotlib's fonts as a few-shot data set: some 1,800 classes and no download."""

from __future__ import annotations

import hashlib
import itertools
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np
import torch

from fastmeta.data import _fonts
from fastmeta.data.files import cached_arrays
from fastmeta.data.images import LabelledImages
from fastmeta.errors import check_choice

__all__ = ["glyphs"]

#: Number of the recipe below; any change that changes an image or a class raises it.
RECIPE = 1
LEAST_STYLES = 8  # different pictures that a class must have
TINY = 0.3  # em; ink smaller than this is a dot, an accent or a tick
TWIN = 0.95  # cosine; classes more alike than this, face by face, are one to the eye
KIN = 0.9  # cosine; classes more alike than this lie in one split
SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}  # of the classes


def glyphs(split: str = "train", *, digits: bool = False) -> LabelledImages:
    """Characters rendered from the 21 text faces of matplotlib's fonts.

    Letters of all the scripts there are, signs and arrows, each in 8 to 21 styles (DejaVu Sans,
    Mono and Serif, STIX, Computer Modern), 28x28, ink scaled to a 20 pixel box. Characters that
    look the same are one class (Latin A, Greek Alpha, Cyrillic A); near duplicates and tiny marks
    are left out. Splits are by base character: a letter, its other case, its accented forms and its
    look-alikes lie in the same split. An image's ``sources`` is its face, a class's ``groups`` its
    base character.

    The first call renders (some seconds) and keeps the result in the cache folder, see
    ``FASTMETA_CACHE``; later ones take milliseconds.

    On their own such tasks are nearly trivial, because faces are alike: train with
    ``transform=Augment()``.

    Args:
        split: "train", "val", "test" (70, 10 and 20% of the classes) or "all".
        digits: whether digits and what contains one (superscripts, fractions, other scripts'
            digits) are included. Leave them out of training when handwritten digits are the target.

    Returns:
        The images and classes; class names are characters with their Unicode names.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no such split.

    Example:
        >>> from fastmeta.data import glyphs
        >>> data = glyphs("test")  # doctest: +SKIP
    """
    check_choice("glyphs", "split", split, (*SHARES, "all"))
    try:
        import matplotlib as mpl
        from matplotlib import ft2font
    except ImportError as error:
        raise ImportError("glyphs needs matplotlib: pip install fastmeta[train]") from error
    # FreeType draws, so its version is part of what the pictures depend on.
    version = f"{mpl.__version__}-freetype{ft2font.__freetype_version__}"
    arrays = cached_arrays(f"glyphs-{RECIPE}-matplotlib{version}", make_glyphs)
    keep = np.ones(len(arrays["codes"]), bool) if digits else ~arrays["digit"]
    if split != "all":
        keep &= arrays["split"] == list(SHARES).index(split)
    data = LabelledImages(
        torch.from_numpy(arrays["images"])[:, None],
        torch.from_numpy(arrays["labels"]),
        tuple(_name(int(code)) for code in arrays["codes"]),
        torch.from_numpy(arrays["faces"]),
        _fonts.FACES,
        torch.from_numpy(arrays["groups"]),
    )
    return data.select(np.flatnonzero(keep))


def make_glyphs() -> dict[str, np.ndarray]:
    """Render and clean: what the cache keeps.

    Returns:
        Per image ``images`` uint8 ``[N, 28, 28]``, ``labels``, ``faces``; per class ``codes`` (its
        lowest code point), ``groups``, ``split`` and ``digit`` (is or contains a digit).
    """
    drawn = _fonts.render_faces()
    images, codes, faces = drawn["images"], drawn["codes"], drawn["faces"]
    prints = [image.tobytes() for image in images]
    same = _merge_identical(prints, codes, faces)
    classes = _collect(prints, codes, faces, same)
    extent = drawn["extent"]
    classes = {c: rows for c, rows in classes.items() if np.median(extent[rows]) >= TINY}

    alike = _alike(images, faces, classes)
    groups = _groups(codes, same, alike)
    gone: set[int] = set()
    order = {code: (-len(rows), code) for code, rows in classes.items()}  # more styles stay
    for a, b in sorted(alike, key=lambda pair: sorted((order[pair[0]], order[pair[1]]))):
        if alike[a, b] >= TWIN and a not in gone and b not in gone:
            gone.add(max(a, b, key=order.__getitem__))
    kept = [code for code in sorted(classes) if code not in gone]
    rows = np.concatenate([classes[code] for code in kept])
    group_of = [groups[code] for code in kept]
    return {
        "images": images[rows],
        "labels": np.repeat(np.arange(len(kept)), [len(classes[code]) for code in kept]),
        "faces": faces[rows],
        "codes": np.array(kept, np.int64),
        "groups": np.array(group_of, np.int64),
        "split": _split(group_of),
        "digit": np.array([any(map(_is_digit, same.members(code))) for code in kept]),
    }


class _Union:
    """Disjoint sets of code points; a set's name is its lowest member."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}

    def find(self, item: int) -> int:
        self.parent.setdefault(item, item)
        while self.parent[item] != item:
            self.parent[item] = self.parent[self.parent[item]]
            item = self.parent[item]
        return item

    def join(self, a: int, b: int) -> None:
        low, high = sorted((self.find(a), self.find(b)))
        self.parent[high] = low

    def members(self, name: int) -> list[int]:
        if not hasattr(self, "_members"):
            self._members: dict[int, list[int]] = defaultdict(list)
            for item in list(self.parent):
                self._members[self.find(item)].append(item)
        return self._members[name]


def _merge_identical(prints: list[bytes], codes: np.ndarray, faces: np.ndarray) -> _Union:
    """Code points that are one class, because most faces that have both draw them identically."""
    drawn_as: dict[tuple[int, bytes], set[int]] = defaultdict(set)
    faces_of: dict[int, set[int]] = defaultdict(set)
    for image, code, face in zip(prints, codes.tolist(), faces.tolist(), strict=True):
        drawn_as[face, image].add(code)
        faces_of[code].add(face)
    times = Counter(
        pair for group in drawn_as.values() for pair in itertools.combinations(sorted(group), 2)
    )
    same = _Union()
    for code in faces_of:
        same.find(code)
    for (a, b), count in times.items():
        # Some italics draw Cyrillic "п" as "n": once in a while is no identity.
        if 2 * count >= len(faces_of[a] & faces_of[b]):
            same.join(a, b)
    return same


def _collect(
    prints: list[bytes], codes: np.ndarray, faces: np.ndarray, same: _Union
) -> dict[int, np.ndarray]:
    """Image rows of each class with enough styles: one for each face, no picture twice."""
    seen: dict[tuple[int, bytes], int] = {}
    chosen: dict[int, dict[int, int]] = defaultdict(dict)
    pictures: dict[int, set[bytes]] = defaultdict(set)
    for row in np.lexsort((faces, codes)).tolist():
        name, face, image = same.find(int(codes[row])), int(faces[row]), prints[row]
        # The picture of another class in this face (the italic "п") belongs to that class alone.
        if seen.setdefault((face, image), name) != name:
            continue
        if face not in chosen[name] and image not in pictures[name]:
            chosen[name][face] = row
            pictures[name].add(image)
    return {
        name: np.array([rows[face] for face in sorted(rows)])
        for name, rows in chosen.items()
        if len(rows) >= LEAST_STYLES
    }


def _alike(
    images: np.ndarray, faces: np.ndarray, classes: dict[int, np.ndarray]
) -> dict[tuple[int, int], float]:
    """Pairs of classes that look alike: mean cosine over the faces that have both, if above KIN."""
    names = sorted(classes)
    unit: dict[int, dict[int, np.ndarray]] = {}
    means = np.empty((len(names), images[0].size), np.float32)
    for place, name in enumerate(names):
        flat = images[classes[name]].reshape(len(classes[name]), -1).astype(np.float32)
        flat /= np.linalg.norm(flat, axis=1, keepdims=True)
        unit[name] = dict(zip(faces[classes[name]].tolist(), flat, strict=True))
        means[place] = flat.mean(0)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    alike = {}
    # Averaging blurs, so mean pictures are more alike than the pictures: nothing is missed.
    for i, j in np.argwhere(np.triu(means @ means.T, 1) > KIN - 0.05):
        a, b = names[i], names[j]
        shared = unit[a].keys() & unit[b].keys()
        if shared:
            cosine = float(np.mean([unit[a][face] @ unit[b][face] for face in shared]))
            if cosine > KIN:
                alike[a, b] = cosine
    return alike


def _groups(codes: np.ndarray, same: _Union, alike: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Base character of every class: kin by case, accent, decomposition, or looks."""
    kin = _Union()
    for code in set(codes.tolist()):
        kin.join(code, same.find(code))
        kin.join(code, _base(code))
    for a, b in alike:
        kin.join(a, b)
    return {code: kin.find(code) for code in set(codes.tolist())}


def _base(code: int) -> int:
    """The character without accents, strokes, hooks and case."""
    char = unicodedata.normalize("NFKD", chr(code))[0]
    if char == " ":  # an accent on its own, which only the other normal form takes apart
        char = unicodedata.normalize("NFD", chr(code))[0]
    name = unicodedata.name(char, "")
    # Strokes and hooks are not decomposed by Unicode, but its names say them.
    for cut in (" WITH ", " DIGRAPH"):
        if cut in name:
            try:
                char = unicodedata.lookup(name.split(cut)[0])
            except KeyError:
                continue
    lower = char.lower()
    return ord(lower if len(lower) == 1 else lower[0])


def _is_digit(code: int) -> bool:
    text = unicodedata.normalize("NFKD", chr(code))
    return any(unicodedata.digit(char, None) is not None for char in text)


def _split(groups: list[int]) -> np.ndarray:
    """Number of the split of each class: whole groups, in an order that depends on nothing else."""
    sizes = Counter(groups)
    order = sorted(sizes, key=lambda group: hashlib.sha256(str(group).encode()).digest())
    place = dict(
        zip(order, np.cumsum([sizes[group] for group in order]) / len(groups), strict=True)
    )
    limits = np.cumsum(list(SHARES.values()))[:-1]
    return np.searchsorted(limits, [place[group] for group in groups])


def _name(code: int) -> str:
    return f"{chr(code)} {unicodedata.name(chr(code), f'U+{code:04X}').lower()}"
