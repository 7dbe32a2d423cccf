"""Fused few-shot and meta-learning for PyTorch."""

from fastmeta._version import __version__ as __version__
from fastmeta.errors import IGNORE_INDEX as IGNORE_INDEX
from fastmeta.ops import matching_attention as matching_attention
from fastmeta.ops import matching_nll as matching_nll
from fastmeta.ops import segment_mean as segment_mean
from fastmeta.ops import sgd_update as sgd_update
