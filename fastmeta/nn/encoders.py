"""Encoders of the few-shot literature: `Conv4`, `ResNet12` and `MLP`.

All take a flat batch [N, ...] and are plain `torch.nn.Sequential` modules: they go into
`fastmeta.MatchingNetwork`, into `fastmeta.MAML` (with ``num_classes``) or into your own loop alike.
``embedding_dim`` is the width of their output, None where that depends on an image size not given.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from fastmeta.errors import check_choice, check_integer, fail

__all__ = ["MLP", "Conv4", "ResNet12"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class _Images(nn.Sequential):
    """A stack that maps images [N, C, H, W] to [N, embedding_dim]."""

    in_channels: int
    min_size: int
    embedding_dim: int | None

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] to embeddings or logits, two-dimensional."""
        name = type(self).__name__
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            wanted = f"of shape [N, {self.in_channels}, H, W]"
            fail(ValueError, name, "input", wanted, f"shape {list(x.shape)}")
        if min(x.shape[2:]) < self.min_size:
            wanted = f"images of at least {self.min_size} x {self.min_size} pixels"
            fail(ValueError, name, "input", wanted, f"shape {list(x.shape)}")
        return super().forward(x)

    def _finish(
        self,
        width: int,
        output: str,
        image_size: int | tuple[int, int] | None,
        shrink: Callable[[int], int],
        num_classes: int | None,
    ) -> None:
        """Append pooling or flattening and the linear head."""
        name = type(self).__name__
        check_choice(name, "output", output, ("flatten", "mean"))
        self.embedding_dim = None
        if output == "mean":
            self.add_module("mean", nn.AdaptiveAvgPool2d(1))
            self.embedding_dim = width
        elif image_size is not None:
            sides = tuple(image_size) if isinstance(image_size, Iterable) else (image_size,) * 2
            if len(sides) != 2 or min(sides) < self.min_size:
                wanted = f"an integer or two (H, W), of at least {self.min_size}"
                fail(ValueError, name, "image_size", wanted, repr(image_size))
            self.embedding_dim = width * math.prod(shrink(side) for side in sides)
        self.add_module("flatten", nn.Flatten())
        if num_classes is not None:
            check_integer(name, "num_classes", num_classes, 1)
            if self.embedding_dim is None:
                wanted = "given with num_classes and output='flatten'"
                fail(ValueError, name, "image_size", wanted, "None")
            self.add_module("head", nn.Linear(self.embedding_dim, num_classes))
            self.embedding_dim = num_classes


class Conv4(_Images):
    """Four convolutional blocks: the Conv-64 of the few-shot literature.

    A block is a 3x3 convolution, normalisation, ReLU and a halving of the image. Vinyals et al.
    2016 (arXiv:1606.04080), Snell et al. 2017 (arXiv:1703.05175), Finn et al. 2017
    (arXiv:1703.03400).

    Args:
        in_channels: Channels of the images.
        hidden: Channels of every block.
        pooling: ``"max"``: 2x2 max-pooling, sizes rounded down (28 -> 14 -> 7 -> 3 -> 1; images of
            at least 16 x 16); ``"stride"``: convolutions of stride 2 instead, sizes rounded up
            (28 -> 14 -> 7 -> 4 -> 2; any size), as Finn et al. 2017 use on Omniglot.
        norm: ``"batch"``; ``"group"``: up to 8 groups, each row by itself; or ``"none"``.
        output: ``"flatten"``: [N, hidden * h * w], or ``"mean"`` over the positions: [N, hidden].
        image_size: H = W, or (H, W). Only needed to know ``embedding_dim`` with ``"flatten"``.
        num_classes: Append a linear head with this many outputs, for `fastmeta.MAML`.

    Raises:
        ValueError: An option is unknown, or ``num_classes`` comes without what fixes the width of
            the head; in the call, the input is not [N, in_channels, H, W] or is too small.

    Note:
        Convolutions are He-initialised, and have a bias only where no normalisation follows; the
        head is Glorot-initialised with bias 0.

    Example:
        >>> import torch, fastmeta as fm
        >>> fm.nn.Conv4()(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 64])
        >>> fm.nn.Conv4(3, 32, image_size=84, num_classes=5)(torch.zeros(2, 3, 84, 84)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        in_channels: int = 1,
        hidden: int = 64,
        *,
        pooling: str = "max",
        norm: str = "batch",
        output: str = "flatten",
        image_size: int | tuple[int, int] | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        check_integer("Conv4", "in_channels", in_channels, 1)
        check_integer("Conv4", "hidden", hidden, 1)
        check_choice("Conv4", "pooling", pooling, ("max", "stride"))
        check_choice("Conv4", "norm", norm, ("batch", "group", "none"))
        self.in_channels = in_channels
        self.min_size = 16 if pooling == "max" else 1
        for index in range(4):
            channels = in_channels if index == 0 else hidden
            stride = 1 if pooling == "max" else 2
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            layers["conv"] = nn.Conv2d(channels, hidden, 3, stride, 1, bias=norm == "none")
            if norm != "none":
                layers["norm"] = _norm2d(norm, hidden)
            layers["relu"] = nn.ReLU()
            if pooling == "max":
                layers["pool"] = nn.MaxPool2d(2)
            self.add_module(f"block{index + 1}", nn.Sequential(layers))

        def shrink(side: int) -> int:
            return side // 16 if pooling == "max" else -(-side // 16)

        self._finish(hidden, output, image_size, shrink, num_classes)
        _initialise(self, 0.0)


class ResNet12(_Images):
    """Four residual blocks of three 3x3 convolutions: the ResNet-12 of the few-shot literature.

    As in Oreshkin et al. 2018 (TADAM, arXiv:1805.10123) and Lee et al. 2019 (MetaOptNet,
    arXiv:1904.03758): leaky ReLU of slope 0.1, 1x1 convolution on the shortcut, 2x2 max-pooling
    after each block; no DropBlock.

    Args:
        in_channels: Channels of the images.
        widths: Channels of the four blocks; (64, 160, 320, 640) is the other common choice.
        norm: ``"batch"``, ``"group"`` (up to 8 groups) or ``"none"``.
        output: ``"mean"`` over the positions: [N, widths[-1]], or ``"flatten"``.
        image_size: H = W, or (H, W). Only needed to know ``embedding_dim`` with ``"flatten"``.
        num_classes: Append a linear head with this many outputs.

    Raises:
        ValueError: An option is unknown, or ``num_classes`` comes without what fixes the width of
            the head; in the call, the input is not [N, in_channels, H, W] or is under 16 x 16.

    Example:
        >>> import torch, fastmeta as fm
        >>> fm.nn.ResNet12(widths=(8, 16, 24, 32))(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 32])
    """

    def __init__(
        self,
        in_channels: int = 3,
        widths: Sequence[int] = (64, 128, 256, 512),
        *,
        norm: str = "batch",
        output: str = "mean",
        image_size: int | tuple[int, int] | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        check_integer("ResNet12", "in_channels", in_channels, 1)
        check_choice("ResNet12", "norm", norm, ("batch", "group", "none"))
        if len(widths) != 4:
            fail(ValueError, "ResNet12", "widths", "four integers", repr(widths))
        self.in_channels = in_channels
        self.min_size = 16
        channels = in_channels
        for index, width in enumerate(widths):
            check_integer("ResNet12", "widths", width, 1)
            self.add_module(f"block{index + 1}", _ResidualBlock(channels, width, norm))
            channels = width
        self._finish(channels, output, image_size, lambda side: side // 16, num_classes)
        _initialise(self, 0.1)


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, width: int, norm: str) -> None:
        super().__init__()
        bias = norm == "none"

        def convolution(inputs: int, size: int) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, width, size, padding=size // 2, bias=bias)
            return [conv] if bias else [conv, _norm2d(norm, width)]

        self.body = nn.Sequential(
            *convolution(channels, 3),
            nn.LeakyReLU(0.1),
            *convolution(width, 3),
            nn.LeakyReLU(0.1),
            *convolution(width, 3),
        )
        self.shortcut = nn.Sequential(*convolution(channels, 1))
        self.activation = nn.LeakyReLU(0.1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.activation(self.body(x) + self.shortcut(x)))


class MLP(nn.Sequential):
    """Fully connected network on flattened rows.

    Args:
        sizes: Features of the input, of every hidden layer and of the output: at least two. The
            last layer is linear, so ``MLP([1, 40, 40, 1])`` is the sinusoid regressor of Finn et
            al. 2017.
        activation: ``"relu"``, ``"leaky_relu"``, ``"gelu"``, ``"silu"``, ``"tanh"``, ``"sigmoid"``,
            or a callable that makes a module.
        norm: Before every activation: ``"none"``, ``"batch"`` or ``"layer"``.

    Raises:
        ValueError: An option is unknown, or a size is not positive; in the call, a row of the input
            does not have ``sizes[0]`` elements.

    Example:
        >>> import torch, fastmeta as fm
        >>> fm.nn.MLP([784, 64, 5])(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: str | Callable[[], nn.Module] = "relu",
        norm: str = "none",
    ) -> None:
        super().__init__()
        if len(sizes) < 2:
            fail(ValueError, "MLP", "sizes", "at least two integers", repr(sizes))
        sizes = [check_integer("MLP", "sizes", size, 1) for size in sizes]
        check_choice("MLP", "norm", norm, ("none", "batch", "layer"))
        if not callable(activation):
            check_choice("MLP", "activation", activation, tuple(_ACTIVATIONS))
            activation = _ACTIVATIONS[activation]
        self.in_features = sizes[0]
        self.embedding_dim = sizes[-1]
        self.add_module("flatten", nn.Flatten())
        for index in range(1, len(sizes)):
            last = index == len(sizes) - 1
            bias = last or norm == "none"
            linear = nn.Linear(sizes[index - 1], sizes[index], bias=bias)
            self.add_module(f"linear{index}", linear)
            if last:
                break
            if norm == "batch":
                self.add_module(f"norm{index}", nn.BatchNorm1d(sizes[index]))
            elif norm == "layer":
                self.add_module(f"norm{index}", nn.LayerNorm(sizes[index]))
            self.add_module(f"activation{index}", activation())

    def forward(self, x: Tensor) -> Tensor:
        """Rows [N, ...] to [N, sizes[-1]]."""
        if x.dim() < 2 or math.prod(x.shape[1:]) != self.in_features:
            wanted = f"of shape [N, ...] with {self.in_features} elements a row"
            fail(ValueError, "MLP", "input", wanted, f"shape {list(x.shape)}")
        return super().forward(x)


def _norm2d(norm: str, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(8, channels), channels)


@torch.no_grad()
def _initialise(model: nn.Module, slope: float) -> None:
    """He initialisation of the convolutions, Glorot of a linear head."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, slope, nonlinearity="leaky_relu")
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
