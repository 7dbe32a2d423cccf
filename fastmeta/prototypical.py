"""Prototypical Networks: classification by distance to the class means of a task."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmeta.errors import IGNORE_INDEX, check_choice
from fastmeta.nn.episode import Episode
from fastmeta.nn.episodic import Comparison, EpisodicClassifier
from fastmeta.ops.segment import segment_mean

__all__ = ["PrototypicalNetwork"]


class PrototypicalNetwork(EpisodicClassifier):
    r"""Prototypical Network: softmax over the similarities of a query to the class means.

    .. math:: p(c \mid x) = \operatorname{softmax}_c
              \bigl(\mathrm{scale} \cdot \mathrm{similarity}(f(x), m_c)\bigr), \qquad
              m_c = \frac{1}{n_c} \sum_{i: y_i = c} f(x_i)

    Snell et al. 2017, "Prototypical Networks for Few-shot Learning", arXiv:1703.05175. With one
    shot and the same similarity it equals `fastmeta.MatchingNetwork`.

    Args:
        encoder: Any module from a flat batch [N, ...] to [N, D] (more dimensions are flattened).
        similarity: ``"sqeuclidean"`` (the paper's), ``"euclidean"`` (negative distances),
            ``"cosine"`` (give it a scale of about 10) or ``"dot"``.
        scale: Inverse temperature at the start, positive.
        learn_scale: Learn the scale, as its logarithm in the parameter ``log_scale``.
        query_encoder: Separate encoder of the queries.
        encode: ``"joint"`` or ``"separate"``: which rows share batch statistics, as in
            `fastmeta.MatchingNetwork`.

    Shape:
        The call, its shapes, padding and options are those of `fastmeta.MatchingNetwork`:
        ``net(support_x, support_y, query_x) -> log-probabilities [T, Q, C]``, ragged supports by
        label -100, ``lengths`` or ``mask``. A class without support gets exactly -inf.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape, device, label or option does not fit; the message names the argument.

    Example:
        >>> import torch, fastmeta as fm
        >>> net = fm.PrototypicalNetwork(fm.nn.MLP([4, 16, 8]))
        >>> support_x, support_y = torch.rand(2, 6, 4), torch.tensor([[0, 0, 1, 1, 2, 2]] * 2)
        >>> net(support_x, support_y, torch.rand(2, 5, 4)).shape
        torch.Size([2, 5, 3])
        >>> net.prototypes(support_x, support_y)[0].shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        encoder: nn.Module,
        similarity: str = "sqeuclidean",
        scale: float = 1.0,
        *,
        learn_scale: bool = False,
        query_encoder: nn.Module | None = None,
        encode: str = "joint",
    ) -> None:
        choices = ("sqeuclidean", "euclidean", "cosine", "dot")
        check_choice(type(self).__name__, "similarity", similarity, choices)
        super().__init__(encoder, query_encoder, encode, scale, learn_scale)
        self.similarity = similarity

    def prototypes(
        self,
        support_x: Tensor,
        support_y: Tensor,
        num_classes: int | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        padded: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Class means of the embedded supports; arguments as in the call.

        Returns:
            The means, Tensor[T, C, D], 0 for a class without support, and the counts, Tensor[T, C];
            without T for one task. Batch norm in training sees the supports alone here.
        """
        episode = self._episode(
            support_x,
            support_y,
            num_classes,
            has_queries=False,
            lengths=lengths,
            mask=mask,
            padded=padded,
        )
        support, _ = self._embed(episode)
        mean, count = segment_mean(support, episode.labels, episode.num_classes)
        return (mean, count) if episode.batched else (mean.squeeze(0), count.squeeze(0))

    def extra_repr(self) -> str:
        """Options, for `repr`."""
        return f"similarity={self.similarity!r}, {super().extra_repr()}"

    def _compare(self, support: Tensor, query: Tensor | None, episode: Episode) -> Comparison:
        assert query is not None
        mean, count = segment_mean(support, episode.labels, episode.num_classes)
        classes = torch.arange(episode.num_classes, device=mean.device)
        # Labelled as padding, an empty class gets exactly -inf instead of the distance to its mean
        # 0.
        labels = torch.where(count > 0, classes, IGNORE_INDEX)
        return Comparison(query, mean, labels, self.similarity)
