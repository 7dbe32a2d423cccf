"""The ops, one file a family: schema, reference, derivative rules, public function."""

from fastmeta.ops import engine as engine
from fastmeta.ops.matching import matching_attention as matching_attention
from fastmeta.ops.matching import matching_nll as matching_nll
from fastmeta.ops.segment import segment_mean as segment_mean
from fastmeta.ops.task_layers import task_batch_norm as task_batch_norm
from fastmeta.ops.task_layers import task_conv2d as task_conv2d
from fastmeta.ops.task_layers import task_linear as task_linear
from fastmeta.ops.update import adam_update as adam_update
from fastmeta.ops.update import momentum_update as momentum_update
from fastmeta.ops.update import sgd_update as sgd_update
