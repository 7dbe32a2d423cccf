"""Random changes of small images, for whole batches of tasks at once."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor

from fastmeta.errors import fail

__all__ = ["Augment"]

# Control points along a side of the spline that bends an image.
CONTROL = 6
# Spline weights are multiples of 2**-11 that sum to 1, and control points keep only so many binary
# digits that every product and partial sum fits the 24 of a float32. So the matrix product is
# exact, and images are the same to the bit for any batch, thread count and BLAS.
WEIGHT_BITS = 11
# Images at a time: what they need between the steps stays in the cache.
CHUNK = 192


class Augment:
    """Affine, elastic and stroke-weight changes, different for every image.

    One smooth warp does the geometry: a grid of 6x6 control points is turned, scaled, sheared and
    moved, each point is jittered, and a cubic B-spline through the grid says where each pixel comes
    from (it reproduces affine maps, so both changes cost one interpolation). Then strokes are made
    thicker or thinner, as the largest or smallest neighbour is blended in.

    Each amount is the largest change; the actual one is uniform up to it in both directions.

    Args:
        rotate: degrees.
        scale: relative size, 0.2 means 0.8 to 1.2 times; of width and height together.
        stretch: relative, width against height.
        shear: horizontal shift per height.
        translate: pixels of 28, in both directions.
        elastic: pixels of 28 by which control points (10 pixels apart) are jittered.
        thicker: of 1 pixel more on each side of a stroke.
        thinner: of 1 pixel less.

    Example:
        >>> import numpy as np, torch
        >>> augment = Augment(rotate=20)
        >>> images = torch.zeros(8, 1, 28, 28)
        >>> augment(images, np.random.default_rng(0)).shape
        torch.Size([8, 1, 28, 28])
    """

    def __init__(
        self,
        *,
        rotate: float = 15.0,
        scale: float = 0.15,
        stretch: float = 0.2,
        shear: float = 0.25,
        translate: float = 2.0,
        elastic: float = 2.5,
        thicker: float = 1.0,
        thinner: float = 0.4,
    ) -> None:
        """Check the amounts."""
        limits = {
            "rotate": (rotate, 180.0), "scale": (scale, 0.9), "stretch": (stretch, 0.9),
            "shear": (shear, 1.0), "translate": (translate, 14.0), "elastic": (elastic, 10.0),
            "thicker": (thicker, 1.0), "thinner": (thinner, 1.0),
        }  # fmt: skip
        for name, (value, high) in limits.items():
            if not 0 <= value <= high:
                fail(ValueError, "Augment", name, f"in [0, {high}]", value)
        self.rotate, self.scale, self.stretch, self.shear = rotate, scale, stretch, shear
        self.translate, self.elastic = translate, elastic
        self.thicker, self.thinner = thicker, thinner
        # No control point lies further out; the fewer digits before the point, the more after it.
        angle = np.deg2rad(min(rotate, 45.0))
        turned = (np.cos(angle) + np.sin(angle)) * (1 + shear) * (1 + 2 / (CONTROL - 3))
        reach = turned / ((1 - scale) * (1 - stretch / 2)) + (translate + elastic) / 14
        self._grain = 2.0 ** (np.ceil(np.log2(reach)) + WEIGHT_BITS - 24)
        self._weights: dict[tuple[int, int], Tensor] = {}

    def __repr__(self) -> str:
        """The amounts."""
        amounts = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        return f"Augment({', '.join(f'{name}={value}' for name, value in amounts.items())})"

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Change images ``[n, C, H, W]`` with numbers from one generator."""
        return self.apply(images, torch.from_numpy(self.draw(generator, len(images))))

    def draw(self, generator: Generator, count: int) -> np.ndarray:
        """Uniform numbers in [-1, 1) for ``count`` images, float32 ``[count, 7 + 2 * 36]``."""
        numbers = generator.random((count, 7 + 2 * CONTROL**2), dtype=np.float32)
        return np.subtract(2 * numbers, 1, out=numbers)

    def apply(self, items: Tensor, numbers: Tensor) -> Tensor:
        """Change images.

        Args:
            items: ``[N, C, H, W]`` floating, values at least 0, background 0.
            numbers: ``[N, 79]`` float32 of :meth:`draw`.

        Returns:
            Images of the same shape and type.
        """
        if items.dim() != 4 or not items.is_floating_point():
            got = f"{items.dtype} {list(items.shape)}"
            fail(ValueError, "Augment", "items", "floating images [N, C, H, W]", got)
        if numbers.shape != (len(items), 7 + 2 * CONTROL**2):
            wanted = f"of shape [{len(items)}, {7 + 2 * CONTROL**2}]"
            fail(ValueError, "Augment", "numbers", wanted, list(numbers.shape))
        out = torch.empty_like(items)
        for start in range(0, len(items), CHUNK):
            part = slice(start, start + CHUNK)
            image = items[part].to(torch.float32)
            warped = F.grid_sample(
                image, self._grid(numbers[part], *items.shape[2:]), align_corners=False
            )
            out[part] = self._reweigh(warped, numbers[part, 6])
        return out

    def _grid(self, numbers: Tensor, height: int, width: int) -> Tensor:
        """Where each pixel of the result comes from, ``[N, H, W, 2]`` in [-1, 1] coordinates."""
        # Only sums, products and quotients, which are rounded alike everywhere; so the sine and
        # cosine are written by the tangent of the half angle.
        tangent = numbers[:, 0] * float(np.tan(np.deg2rad(self.rotate) / 2))
        square = tangent * tangent
        cosine, sine = (1 - square) / (1 + square), 2 * tangent / (1 + square)
        size = 1 / (1 + self.scale * numbers[:, 1])
        aspect = 1 + self.stretch * numbers[:, 2] / 2
        shear = self.shear * numbers[:, 3]
        wide, high = size / aspect, size * aspect
        ax = torch.stack([wide * cosine, wide * (shear * cosine - sine)], 1)
        ay = torch.stack([high * sine, high * (shear * sine + cosine)], 1)
        points = _control_points()
        jitter = numbers[:, 7:].reshape(-1, 2, CONTROL**2) * (self.elastic / 14)
        move = numbers[:, 4:6] * (self.translate / 14)
        x = ax[:, :1] * points[0] + ax[:, 1:] * points[1] + move[:, :1] + jitter[:, 0]
        y = ay[:, :1] * points[0] + ay[:, 1:] * points[1] + move[:, 1:] + jitter[:, 1]
        key = (height, width)
        if key not in self._weights:
            self._weights[key] = _spline_weights(height, width)
        control = torch.stack([x, y])  # [2, N, 36]
        control = (control / self._grain).round() * self._grain
        spread = control.reshape(-1, CONTROL**2) @ self._weights[key]
        return torch.stack(spread.view(2, -1, height, width).unbind(0), -1)

    def _reweigh(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Blend in the largest (or smallest) of the four neighbours and the pixel itself."""
        amount = torch.where(numbers > 0, self.thicker * numbers, self.thinner * numbers)
        amount = amount.view(-1, 1, 1, 1)
        # The smallest is minus the largest of the negative: one pass for both.
        signed = images * torch.where(amount < 0, -1.0, 1.0)
        most = signed.clone()
        for axis in (-2, -1):
            size = images.shape[axis] - 1
            ahead, behind = signed.narrow(axis, 1, size), signed.narrow(axis, 0, size)
            inner, outer = most.narrow(axis, 0, size), most.narrow(axis, 1, size)
            torch.maximum(inner, ahead, out=inner)
            torch.maximum(outer, behind, out=outer)
        return images + (most - signed) * amount


def _control_points() -> Tensor:
    """Places ``[2, 36]`` (x, y) of the control points; the outer ring lies outside the image."""
    step = 2 / (CONTROL - 3)
    line = torch.arange(CONTROL, dtype=torch.float32, device="cpu") * step - 1 - step
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()])


def _spline_weights(height: int, width: int) -> Tensor:
    """Weights ``[36, H * W]`` of the control points at each pixel: a uniform cubic B-spline."""
    rows, columns = _spline(height), _spline(width)
    weights = np.einsum("ih,jw->ijhw", rows, columns).reshape(CONTROL**2, height * width)
    weights = np.round(weights * 2**WEIGHT_BITS)
    # Rounding must not move the image: what is missing from a sum of 1 goes to the largest weight.
    largest = weights.argmax(0)
    weights[largest, np.arange(height * width)] += 2**WEIGHT_BITS - weights.sum(0)
    return torch.from_numpy((weights * 2.0**-WEIGHT_BITS).astype(np.float32))


def _spline(pixels: int) -> np.ndarray:
    """Weights ``[6, pixels]`` along one axis."""
    intervals = CONTROL - 3
    place = (np.arange(pixels) + 0.5) / pixels * intervals
    interval = place.astype(int)
    t = place - interval
    four = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3])
    weights = np.zeros((CONTROL, pixels))
    for k in range(4):
        weights[interval + k, np.arange(pixels)] = four[k] / 6
    return weights
