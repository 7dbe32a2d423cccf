"""Tests on a GPU: ``pytest -m cuda``. Without one they are skipped, and say so.

``FASTMETA_TEST_DEVICE=cpu`` runs what does not need a GPU on the CPU, to try the tests themselves.
"""

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)


@pytest.fixture
def device():
    """Where the ops run; its kernels must be there, or the test would try the reference."""
    name = os.environ.get("FASTMETA_TEST_DEVICE", "cuda")
    if name == "cuda":
        require_gpu()
    return torch.device(name)


@pytest.fixture
def gpu():
    """The GPU, for what only a GPU has."""
    require_gpu()
    return torch.device("cuda")


def require_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    import fastmeta as fm

    info = fm.backend_info()
    assert info["cuda"], f"a GPU but no CUDA kernels: {info['cuda_reason']}"
