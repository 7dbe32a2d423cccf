import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache folder of this run alone: glyphs are rendered once, by the code under test."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("FASTMETA_CACHE")
    os.environ["FASTMETA_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["FASTMETA_CACHE"]
    else:
        os.environ["FASTMETA_CACHE"] = before


@pytest.fixture(scope="session")
def data_root():
    """The folder with real data: FASTMETA_DATA, else ../shared/data from the project's root."""
    default = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("FASTMETA_DATA") or default)
    if not folder.is_dir():
        pytest.skip(f"needs real data: no folder {folder} (name one in FASTMETA_DATA)")
    return folder


@pytest.fixture
def omniglot_root(data_root):
    if not (data_root / "omniglot" / "omniglot28_nearest_1bit.npz").exists():
        pytest.skip(f"needs omniglot28_nearest_1bit.npz in {data_root}/omniglot")
    return data_root
