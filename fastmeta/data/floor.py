"""What an episode's raw pixels already tell: the floor under every accuracy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.data.episode import Episode
from fastmeta.errors import IGNORE_INDEX

__all__ = ["nearest_pixels", "pixel_floor"]


def nearest_pixels(episode: Episode) -> Tensor:
    """Label each query like the support whose pixels have the largest cosine with its own.

    Args:
        episode: tasks of any items, integer labels.

    Returns:
        ``Tensor[T, Q]`` int64; -100 for padded queries.
    """
    support = F.normalize(episode.support_x.flatten(2), dim=-1)
    query = F.normalize(episode.query_x.flatten(2), dim=-1)
    cosine = query @ support.mT  # [T, Q, S]
    padded = episode.support_y == IGNORE_INDEX
    nearest = cosine.masked_fill(padded[:, None], -torch.inf).argmax(-1)
    return episode.support_y.gather(1, nearest).masked_fill(
        episode.query_y == IGNORE_INDEX, IGNORE_INDEX
    )


def pixel_floor(episode: Episode) -> Tensor:
    """Accuracy of cosine nearest neighbour on raw pixels, task by task.

    What a learner that knows nothing reaches on the same tasks: show it beside every result, since
    on easy data (digits) learned features can lose to it while being far better than chance.

    Args:
        episode: tasks of any items, integer labels.

    Returns:
        ``Tensor[T]`` float32, in [0, 1]; NaN for a task without queries.

    Example:
        >>> import torch
        >>> support = torch.eye(2).view(1, 2, 2)
        >>> query = torch.tensor([[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]])
        >>> labels = torch.tensor([[0, 1]]), torch.tensor([[0, 1, 1]])
        >>> pixel_floor(Episode(support, labels[0], query, labels[1]))
        tensor([0.6667])
    """
    valid = episode.query_y != IGNORE_INDEX
    right = (nearest_pixels(episode) == episode.query_y) & valid
    return right.sum(1) / valid.sum(1)
