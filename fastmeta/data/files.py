"""Where data lies: folders, the cache, downloads."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastmeta.errors import fail

__all__ = ["atomic_write", "cache_dir", "cached_arrays", "data_dir", "download_file"]


def data_dir(root: str | os.PathLike[str] | None, function: str) -> Path:
    """The folder with the data: the argument, else the environment variable ``FASTMETA_DATA``.

    Raises:
        ValueError: neither is given.
        FileNotFoundError: there is no such folder.
    """
    source = root if root is not None else os.environ.get("FASTMETA_DATA")
    if not source:
        wanted = "a folder, here or in the environment variable FASTMETA_DATA"
        fail(ValueError, function, "root", wanted, None)
    path = Path(source).expanduser()
    if not path.is_dir():
        fail(FileNotFoundError, function, "root", "an existing folder", str(path))
    return path


def cache_dir() -> Path:
    """The folder of made data: ``FASTMETA_CACHE``, else the user's cache folder of the platform."""
    chosen = os.environ.get("FASTMETA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "fastmeta"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write a file so that others see the whole of it or nothing, even when writing is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        # mkstemp makes files private; a shared cache must stay readable.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def cached_arrays(name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays from the cache, made and kept on the first call.

    Args:
        name: file name without suffix; must name everything the arrays depend on.
        make: makes them.

    Returns:
        The arrays. A cache that cannot be written (a read-only home) costs making them each time,
        and says so in a warning; a damaged file is made again.
    """
    path = cache_dir() / f"{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        arrays = make()  # there is none, or a damaged one, which is replaced
    try:
        with atomic_write(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        warnings.warn(
            f"cannot keep {path} ({error}): it will be made again next time. "
            "Set FASTMETA_CACHE to a folder that can be written.",
            stacklevel=3,
        )
    return arrays


def download_file(url: str, path: Path, sha256: str) -> None:
    """Fetch a file that does not exist yet, and keep it only if its checksum is right.

    Args:
        url: where it is.
        path: where it goes; appears there complete and checked, or not at all.
        sha256: its SHA-256, hexadecimal.

    Raises:
        OSError: it cannot be reached.
        ValueError: what came is not the file that was meant.
    """
    if path.exists():
        return
    digest = hashlib.sha256()
    with atomic_write(path) as file:
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                shutil.copyfileobj(response, _Tee(file, digest), 1 << 20)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise OSError(
                f"cannot download {url}: {error}. Without a network, fetch the file elsewhere and "
                f"put it at {path}."
            ) from error
        if digest.hexdigest() != sha256:
            raise ValueError(
                f"{url}: the checksum must be sha256 {sha256}, got {digest.hexdigest()}; "
                "nothing was kept"
            )


class _Tee:
    """A file that also feeds a digest."""

    def __init__(self, file: BinaryIO, digest: hashlib._Hash) -> None:
        self.file, self.digest = file, digest

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)
