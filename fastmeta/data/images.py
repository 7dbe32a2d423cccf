"""Labelled images in memory: what the data sets return and the samplers take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmeta.errors import fail

__all__ = ["LabelledImages", "to_float"]


def to_float(items: Tensor) -> Tensor:
    """Items as learners want them: uint8 to float32 in [0, 1], bool to float32, others as is."""
    if items.dtype == torch.uint8:
        return items.to(torch.float32).mul_(1 / 255)
    return items.to(torch.float32) if items.dtype == torch.bool else items


@dataclass(frozen=True, eq=False)
class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Images with class labels, kept small (uint8) until a sampler reads them.

    It is a map-style torch dataset too: ``dataset[i]`` is ``(image, label)``, the image float.

    Attributes:
        images: ``Tensor[N, 1, H, W]`` uint8, ink = 255.
        labels: ``Tensor[N]`` int64 in [0, number of classes).
        classes: name of each class.
        sources: ``Tensor[N]`` int64, what made the image (a typeface, a drawer), or None.
        source_names: name of each source.
        groups: ``Tensor[number of classes]`` int64: classes of one group are kin (a letter and its
            accented twins) and lie in one split, or None.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...] = field(repr=False)
    sources: Tensor | None = None
    source_names: tuple[str, ...] = field(default=(), repr=False)
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        name, count = type(self).__name__, self.images.shape[0]
        if self.labels.shape != (count,):
            fail(ValueError, name, "labels", f"of shape [{count}]", list(self.labels.shape))
        if count and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            fail(ValueError, name, "labels", f"in [0, {len(self.classes)})", "labels outside it")

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    def __repr__(self) -> str:
        """Sizes, not contents."""
        shape = "x".join(map(str, self.images.shape[1:]))
        return f"LabelledImages({len(self)} images of {shape}, {self.num_classes} classes)"

    def __len__(self) -> int:
        """The number of images."""
        return self.images.shape[0]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image ``[1, H, W]`` as float and its label."""
        return to_float(self.images[index]), int(self.labels[index])

    def select(self, classes: Iterable[int] | np.ndarray | Tensor) -> LabelledImages:
        """Only these classes, renumbered 0.. in the given order.

        Args:
            classes: class labels, each once.
        """
        chosen = torch.from_numpy(np.fromiter((int(c) for c in classes), np.int64))
        if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < self.num_classes:
            wanted = f"labels in [0, {self.num_classes})"
            fail(ValueError, "LabelledImages.select", "classes", wanted, chosen.tolist())
        if len(set(chosen.tolist())) != chosen.numel():
            fail(ValueError, "LabelledImages.select", "classes", "distinct", chosen.tolist())
        position = chosen.new_full((self.num_classes,), -1)
        position[chosen] = torch.arange(chosen.numel(), device="cpu")
        labels = position[self.labels]
        keep = (labels >= 0).nonzero()[:, 0]
        return LabelledImages(
            self.images[keep],
            labels[keep],
            tuple(self.classes[i] for i in chosen.tolist()),
            None if self.sources is None else self.sources[keep],
            self.source_names,
            None if self.groups is None else self.groups[chosen],
        )
