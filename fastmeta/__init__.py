"""Fast few-shot and meta-learning training for PyTorch.

Fused ops for the softmax attention of Matching Networks and for inner-loop updates, differentiable
to second order, and the learners built on them. ``fm.backend_info()`` tells what runs compiled.
"""

from fastmeta.ops import adam_update as adam_update  # schemas before kernels
from fastmeta.ops import matching_attention as matching_attention
from fastmeta.ops import matching_nll as matching_nll
from fastmeta.ops import momentum_update as momentum_update
from fastmeta.ops import segment_mean as segment_mean
from fastmeta.ops import sgd_update as sgd_update
from fastmeta.ops import task_batch_norm as task_batch_norm
from fastmeta.ops import task_conv2d as task_conv2d
from fastmeta.ops import task_linear as task_linear

from fastmeta import _native as _native  # isort: skip
from fastmeta import data as data
from fastmeta import nn as nn
from fastmeta._version import __version__ as __version__
from fastmeta.errors import IGNORE_INDEX as IGNORE_INDEX
from fastmeta.info import backend_info as backend_info
from fastmeta.maml import MAML as MAML
from fastmeta.maml import AdaptedTasks as AdaptedTasks
from fastmeta.matching import MatchingNetwork as MatchingNetwork
from fastmeta.matching import MatchingNetworks as MatchingNetworks
from fastmeta.ops.update import AdamState as AdamState
from fastmeta.prototypical import PrototypicalNetwork as PrototypicalNetwork
