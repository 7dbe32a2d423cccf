"""Modules that few-shot learners are built of: encoders and full-context embeddings."""

from fastmeta.nn.encoders import MLP as MLP
from fastmeta.nn.encoders import Conv4 as Conv4
from fastmeta.nn.encoders import ResNet12 as ResNet12
from fastmeta.nn.full_context import FullContextEmbedding as FullContextEmbedding
