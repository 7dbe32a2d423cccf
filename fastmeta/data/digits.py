"""Handwritten digits: scikit-learn's small ones and MNIST's files."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from fastmeta.data.files import data_dir, download_file
from fastmeta.data.images import LabelledImages
from fastmeta.errors import check_choice, fail

__all__ = ["digits", "mnist"]

DIGITS = tuple("0123456789")

# SHA-256 of the four files.
MNIST_FILES = {
    "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"


def digits() -> LabelledImages:
    """1,797 handwritten digits that come with scikit-learn, as 28x28 images.

    The 8x8 images (UCI "Optical recognition of handwritten digits", 43 writers) are enlarged
    bilinearly to 20x20 and set in the middle of 28x28, where MNIST has its ink. Nothing is
    downloaded.

    Returns:
        The images and the classes 0..9.

    Raises:
        ImportError: scikit-learn is not installed.

    Example:
        >>> from fastmeta.data import digits
        >>> digits()
        LabelledImages(1797 images of 1x28x28, 10 classes)
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits needs scikit-learn: pip install fastmeta[train]") from error
    raw = load_digits()
    small = torch.from_numpy(raw.images.astype(np.float32))[:, None] / 16
    large = F.interpolate(small, size=(20, 20), mode="bilinear", align_corners=False)
    images = (F.pad(large, (4, 4, 4, 4)) * 255).round().to(torch.uint8)
    return LabelledImages(images, torch.from_numpy(raw.target.astype(np.int64)), DIGITS)


def mnist(
    split: str = "test", root: str | os.PathLike[str] | None = None, *, download: bool = False
) -> LabelledImages:
    """MNIST from its IDX files (LeCun, Cortes and Burges).

    Args:
        split: "train" (60,000 images) or "test" (10,000).
        root: folder with the files, as they come (``.gz``) or unpacked, in it or in a folder
            ``mnist``, ``mnist_t10k`` or ``MNIST/raw`` in it; default the environment variable
            ``FASTMETA_DATA``.
        download: fetch what is missing to ``root/mnist``, with its checksum verified.

    Returns:
        The images and the classes 0..9.

    Raises:
        FileNotFoundError: the files are not there.
        OSError: a download failed.
        ValueError: a file is damaged or not what it should be.
    """
    check_choice("mnist", "split", split, ("train", "test"))
    folder = data_dir(root, "mnist")
    prefix = "train" if split == "train" else "t10k"
    names = [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]
    found = [_find(folder, name) for name in names]
    for place, name in enumerate(names):
        if found[place] is None and download:
            path = folder / "mnist" / f"{name}.gz"
            download_file(MNIST_URL + path.name, path, MNIST_FILES[name])
            found[place] = path
    paths = [path for path in found if path is not None]
    if len(paths) < 2:
        wanted = f"a folder with {names[0]}[.gz] and {names[1]}[.gz] (download=True fetches them)"
        fail(FileNotFoundError, "mnist", "root", wanted, str(folder))
    images, labels = (read_idx(path) for path in paths)
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        wanted = "a folder with images [N, H, W] and as many labels"
        fail(ValueError, "mnist", "root", wanted, f"{images.shape} and {labels.shape}")
    return LabelledImages(
        torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64)), DIGITS
    )


def _find(folder: Path, name: str) -> Path | None:
    for place in ("", "mnist", "mnist_t10k", "MNIST/raw"):
        for ending in ("", ".gz"):
            path = folder / place / f"{name}{ending}"
            if path.is_file():
                return path
    return None


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped when its name ends in ``.gz``.

    Raises:
        ValueError: the file is cut off, damaged or of another kind.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from error
    # Magic number: two zero bytes, the type (8 is unsigned byte), the number of dimensions.
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    shape = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path}: {values.size} bytes of data where its header says {shape}")
    array: np.ndarray = values.reshape(shape).copy()
    return array
