"""Omniglot: 1,623 handwritten characters of 50 alphabets, each by 20 drawers."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch

from fastmeta.data.episode import Episode
from fastmeta.data.files import cached_arrays, data_dir, download_file
from fastmeta.data.images import LabelledImages, to_float
from fastmeta.errors import check_choice, fail

__all__ = ["omniglot", "omniglot_runs"]

#: Number of the way official images are made small; any change raises it.
RECIPE = 1
SIDE, FULL, DRAWERS = 28, 105, 20
CLASSES = {"background": 964, "evaluation": 659}
SPLITS = {
    "vinyals": ("train", "val", "trainval", "test", "all"),
    "lake": ("background", "evaluation", "all"),
}
PACKED = {"nearest": "omniglot28_nearest_1bit.npz", "box": "omniglot28_box_4bit.npz"}
URL = "https://github.com/brendenlake/omniglot/raw/master/python/"
# SHA-256, as published in the list of checksums of TensorFlow Datasets.
ZIPS = {
    "background": "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
    "evaluation": "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
}
VINYALS_SOURCE = (
    "train.txt, val.txt and test.txt of data/omniglot/splits/vinyals in "
    "https://github.com/jakesnell/prototypical-networks"
)


def omniglot(
    split: str = "train",
    root: str | os.PathLike[str] | None = None,
    *,
    protocol: str = "vinyals",
    resize: str = "nearest",
    download: bool = False,
) -> LabelledImages:
    """Omniglot as 28x28 images, ink = 255 (Lake et al. 2015, Science 350).

    Read from whatever lies in the folder, or in a folder ``omniglot`` in it: the packed files
    ``omniglot28_nearest_1bit.npz`` or ``omniglot28_box_4bit.npz``, else the official
    ``images_background`` and ``images_evaluation``, as zips or unpacked (made small once, then kept
    in the cache folder; needs pillow).

    Protocols:

    - ``"vinyals"`` (Vinyals et al. 2016): splits ``train`` (1,028 classes), ``val`` (172), both
      together ``trainval`` (1,200) and ``test`` (423). In the papers each class turned by 90, 180
      and 270 degrees is a class too: give the sampler ``rotations=True``. Needs
      ``splits_vinyals.npz`` or the lists train.txt, val.txt and test.txt.
    - ``"lake"``: ``background`` (964) and ``evaluation`` (659), alphabets disjoint: harder.

    An image's ``sources`` is its drawer, a class's ``groups`` its alphabet.

    Args:
        split: a split of the protocol, or "all".
        root: folder; default the environment variable ``FASTMETA_DATA``.
        protocol: "vinyals" or "lake".
        resize: from 105x105, by "nearest" neighbour (as in the papers) or area average ("box").
        download: fetch the official zips to ``root/omniglot`` when they are needed and missing,
            with their checksums verified.

    Returns:
        The images (class by class, drawer by drawer) and classes.

    Raises:
        FileNotFoundError: the files are not there.
        ImportError: PNG files are to be read and pillow is not installed.
        OSError: a download failed.
        ValueError: unknown split, or damaged files.

    Example:
        >>> from fastmeta.data import omniglot
        >>> data = omniglot("test", "/data")  # doctest: +SKIP
    """
    check_choice("omniglot", "protocol", protocol, tuple(SPLITS))
    check_choice("omniglot", "split", split, SPLITS[protocol])
    check_choice("omniglot", "resize", resize, tuple(PACKED))
    folder = data_dir(root, "omniglot")
    parts = (split,) if split in CLASSES else tuple(CLASSES)
    data = _read_packed(folder, resize, parts)
    if data is None:
        data = _read_official(folder, resize, parts, download)
    if protocol == "lake" or split == "all":
        return data
    return data.select(_vinyals(folder, split, data.classes))


def omniglot_runs(
    root: str | os.PathLike[str] | None = None, *, resize: str = "nearest"
) -> Episode:
    """Lake's 20 official runs of 20-way one-shot classification: a fixed test of 400 trials.

    Args:
        root: folder with ``omniglot_20runs.npz`` and Omniglot's images as :func:`omniglot` reads
            them; default the environment variable ``FASTMETA_DATA``.
        resize: as in :func:`omniglot`.

    Returns:
        One episode: T = 20 runs, 20 supports (one a class) and 20 queries (one a class) each.

    Raises:
        FileNotFoundError: the files are not there.
        ValueError: a file is not what it should be.
    """
    folder = data_dir(root, "omniglot_runs")
    path = _find(folder, "omniglot_20runs.npz")
    if path is None:
        wanted = "a folder with omniglot_20runs.npz, in it or in a folder omniglot"
        fail(FileNotFoundError, "omniglot_runs", "root", wanted, str(folder))
    with np.load(path, allow_pickle=False) as file:
        places, labels = file["class_drawer"].astype(np.int64), file["test_label"].astype(np.int64)
    if places.shape != (20, 20, 2, 2) or labels.shape != (20, 20):
        raise ValueError(f"{path}: shapes {places.shape} and {labels.shape} are not 20 runs")
    images = omniglot("all", folder, resize=resize).images
    x = to_float(images[torch.from_numpy(places[..., 0] * DRAWERS + places[..., 1])])
    return Episode(
        x[:, :, 0].contiguous(),
        torch.arange(20).expand(20, 20).contiguous(),
        x[:, :, 1].contiguous(),
        torch.from_numpy(labels),
    )


def _find(folder: Path, name: str) -> Path | None:
    found = (folder / place / name for place in ("", "omniglot"))
    return next((path for path in found if path.exists()), None)


def _read_packed(folder: Path, resize: str, parts: tuple[str, ...]) -> LabelledImages | None:
    path = _find(folder, PACKED[resize])
    if path is None:
        return None
    with np.load(path, allow_pickle=False) as file:
        packed, alphabet, character = file["images"], file["alphabet"], file["character"]
        names, evaluation = file["alphabet_names"], file["evaluation"]
    keep = np.isin(np.where(evaluation, "evaluation", "background"), parts)
    packed = packed[keep]
    if resize == "nearest":
        images = np.unpackbits(packed, axis=-1)[..., : SIDE * SIDE] * np.uint8(255)
    else:
        # Two grey values of 4 bits in a byte, the high half first; 15 is ink.
        images = np.stack([packed >> 4, packed & 15], axis=-1) * np.uint8(17)
    return _labelled(
        images.reshape(-1, DRAWERS, SIDE, SIDE), [str(names[i]) for i in alphabet[keep]],
        character[keep].tolist(),
    )  # fmt: skip


def _labelled(images: np.ndarray, alphabets: list[str], characters: list[int]) -> LabelledImages:
    classes = len(images)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(alphabets))}
    return LabelledImages(
        torch.from_numpy(images.reshape(-1, 1, SIDE, SIDE)),
        torch.arange(classes).repeat_interleave(DRAWERS),
        tuple(f"{a}/character{c:02d}" for a, c in zip(alphabets, characters, strict=True)),
        torch.arange(DRAWERS).repeat(classes),
        tuple(f"drawer {i + 1}" for i in range(DRAWERS)),
        torch.tensor([numbers[name] for name in alphabets], dtype=torch.int64),
    )


def _read_official(
    folder: Path, resize: str, parts: tuple[str, ...], download: bool
) -> LabelledImages:
    arrays = []
    for part in parts:
        name = f"images_{part}"
        source = _find(folder, f"{name}.zip") or _find(folder, name)
        if source is None and download:
            source = folder / "omniglot" / f"{name}.zip"
            download_file(f"{URL}{name}.zip", source, ZIPS[part])
        if source is None:
            wanted = (
                f"a folder with {PACKED[resize]}, {name}.zip or {name}, in it or in a folder "
                f"omniglot (download=True fetches {URL}{name}.zip)"
            )
            fail(FileNotFoundError, "omniglot", "root", wanted, str(folder))
        key = f"omniglot-{RECIPE}-{part}-{resize}-{_stamp(source)}"
        arrays.append(cached_arrays(key, partial(_shrink, source, part, resize)))
    return _labelled(
        np.concatenate([part["images"] for part in arrays]),
        [str(name) for part in arrays for name in part["alphabets"]],
        [int(number) for part in arrays for number in part["characters"]],
    )


def _stamp(source: Path) -> str:
    """A name for the state of a zip or folder: names, sizes and times of its files."""
    files = [source] if source.is_file() else sorted(source.glob("*/*/*.png"))
    digest = hashlib.sha256(str(source.resolve()).encode())
    for path in files:
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _shrink(source: Path, part: str, resize: str) -> dict[str, np.ndarray]:
    """Read all drawings of a set, make them 28x28, and sort them by alphabet and character."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("PNG files need pillow: pip install fastmeta[train]") from error
    drawings: dict[tuple[str, int], dict[int, np.ndarray]] = {}
    for name, file in _open_pngs(source):
        match = re.search(r"([^/]+)/character(\d+)/\d+_(\d+)\.png$", name)
        if match is None:
            raise ValueError(f"{source}: {name} is not alphabet/characterNN/NNNN_NN.png")
        with Image.open(file) as image:
            ink = np.asarray(image.convert("L")) < 128
        if ink.shape != (FULL, FULL):
            raise ValueError(f"{source}: {name} must be {FULL}x{FULL}, got {ink.shape}")
        drawings.setdefault((match[1], int(match[2])), {})[int(match[3])] = _resize(ink, resize)
    order = sorted(drawings)
    short = [key for key in order if sorted(drawings[key]) != list(range(1, DRAWERS + 1))]
    if short or len(order) != CLASSES[part]:
        wanted = f"{CLASSES[part]} characters with drawings 01 to {DRAWERS}"
        got = f"{len(order)} characters, {len(short)} of them with other drawings"
        raise ValueError(f"{source} must hold {wanted}, got {got}")
    images = [[drawings[key][i + 1] for i in range(DRAWERS)] for key in order]
    return {
        "images": np.array(images),
        "alphabets": np.array([alphabet for alphabet, _ in order]),
        "characters": np.array([character for _, character in order]),
    }


def _open_pngs(source: Path) -> Iterator[tuple[str, BinaryIO]]:
    if source.is_dir():
        for path in sorted(source.glob("*/*/*.png")):
            with path.open("rb") as file:
                yield path.as_posix(), file
        return
    try:
        with zipfile.ZipFile(source) as archive:
            for name in archive.namelist():
                if name.endswith(".png") and not name.startswith("__MACOSX"):
                    with archive.open(name) as member:
                        yield name, cast("BinaryIO", member)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{source}: damaged zip file ({error})") from error


def _resize(ink: np.ndarray, resize: str) -> np.ndarray:
    step = FULL / SIDE
    if resize == "nearest":
        pixels = ((np.arange(SIDE) + 0.5) * step).astype(int)
        return ink[np.ix_(pixels, pixels)] * np.uint8(255)
    # Share of each of the 105 pixels in each of the 28.
    edges = np.arange(SIDE)[:, None] * step
    share = np.minimum(np.arange(FULL) + 1, edges + step) - np.maximum(np.arange(FULL), edges)
    share = np.clip(share, 0, None) / step
    return np.round(share @ ink @ share.T * 255).astype(np.uint8)


def _vinyals(folder: Path, split: str, classes: tuple[str, ...]) -> np.ndarray:
    path = _find(folder, "splits_vinyals.npz")
    if path is not None:
        with np.load(path, allow_pickle=False) as file:
            return file[split].astype(np.int64)
    names = ("train", "val") if split == "trainval" else (split,)
    position = {name: number for number, name in enumerate(classes)}
    chosen: set[int] = set()
    for name in names:
        path = _find(folder, f"{name}.txt") or _find(folder, f"vinyals/{name}.txt")
        if path is None:
            wanted = f"a folder with splits_vinyals.npz, or with {VINYALS_SOURCE}"
            fail(FileNotFoundError, "omniglot", "root", wanted, str(folder))
        # A line is alphabet/characterNN/rotNNN; rotations are the sampler's.
        for line in path.read_text().split():
            character = "/".join(line.split("/")[:2])
            if character not in position:
                raise ValueError(f"{path}: no such character: {line}")
            chosen.add(position[character])
    return np.array(sorted(chosen), np.int64)
