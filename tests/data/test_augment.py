import numpy as np
import pytest
import torch

from fastmeta.data import Augment
from fastmeta.data.augment import CONTROL

NONE = dict.fromkeys(
    ["rotate", "scale", "stretch", "shear", "translate", "elastic", "thicker", "thinner"], 0.0
)
NUMBERS = 7 + 2 * CONTROL**2


def blobs(count=6):
    """Smooth pictures with an empty border."""
    g = torch.Generator().manual_seed(0)
    small = torch.rand(count, 1, 7, 7, generator=g)
    small[..., [0, -1], :] = small[..., [0, -1]] = 0
    return torch.nn.functional.interpolate(small, size=28, mode="bicubic").clamp(0, 1)


def numbers(count=6, **values):
    """Numbers of ``draw`` that ask for nothing but what is named."""
    names = ["rotate", "scale", "stretch", "shear", "right", "down", "stroke"]
    out = torch.zeros(count, NUMBERS)
    for name, value in values.items():
        out[:, names.index(name)] = value
    return out


def test_no_change_changes_nothing():
    images = blobs()
    drawn = torch.from_numpy(Augment().draw(np.random.default_rng(0), 6))
    assert (Augment(**NONE).apply(images, drawn) - images).abs().max() < 0.01
    assert (Augment().apply(images, torch.zeros(6, NUMBERS)) - images).abs().max() < 0.01


@pytest.mark.parametrize(
    "ask",
    [
        dict(rotate=1.0), dict(rotate=-0.5), dict(scale=1.0), dict(scale=-1.0), dict(stretch=1.0),
        dict(shear=0.8), dict(right=1.0, down=-0.5),
        dict(rotate=0.7, scale=-0.5, stretch=-1.0, shear=-0.6, right=-0.4, down=0.9),
    ],
    ids=str,
)  # fmt: skip
def test_affine_changes_against_scipy(ask):
    ndimage = pytest.importorskip("scipy.ndimage", reason="needs scipy (the [train] extra)")
    amounts = dict(rotate=40.0, scale=0.3, stretch=0.4, shear=0.5, translate=4.0)
    got = Augment(**{**NONE, **amounts}).apply(blobs(), numbers(**ask))
    # The half angle's tangent is what is drawn evenly.
    angle = 2 * np.arctan(np.tan(np.deg2rad(amounts["rotate"]) / 2) * ask.get("rotate", 0))
    size = 1 / (1 + amounts["scale"] * ask.get("scale", 0))
    aspect = 1 + amounts["stretch"] * ask.get("stretch", 0) / 2
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    slant = np.array([[1, amounts["shear"] * ask.get("shear", 0)], [0, 1]])
    matrix = np.diag([size / aspect, size * aspect]) @ turn @ slant  # on (x, y), about the middle
    shift = 4.0 * np.array([ask.get("right", 0), ask.get("down", 0)])
    y, x = np.mgrid[:28, :28] - 13.5
    from_x, from_y = np.einsum("ij,jhw->ihw", matrix, np.stack([x, y])) + shift[:, None, None]
    for image, mine in zip(blobs()[:, 0].numpy(), got[:, 0].numpy(), strict=True):
        want = ndimage.map_coordinates(
            image, [from_y + 13.5, from_x + 13.5], order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(mine, want, atol=0.02)


def test_rotation_is_as_large_as_named():
    ndimage = pytest.importorskip("scipy.ndimage", reason="needs scipy (the [train] extra)")
    got = Augment(**{**NONE, "rotate": 30.0}).apply(blobs(), numbers(rotate=1.0))
    want = ndimage.rotate(blobs().numpy(), 30.0, axes=(3, 2), order=1, reshape=False)
    np.testing.assert_allclose(got.numpy(), want, atol=0.02)


@pytest.mark.parametrize("stroke", [1.0, 0.3, -1.0, -0.6])
def test_strokes_against_scipy(stroke):
    ndimage = pytest.importorskip("scipy.ndimage", reason="needs scipy (the [train] extra)")
    images = blobs()
    got = Augment(**{**NONE, "thicker": 0.9, "thinner": 0.5}).apply(images, numbers(stroke=stroke))
    cross = ndimage.generate_binary_structure(2, 1)[None, None]
    change = ndimage.grey_dilation if stroke > 0 else ndimage.grey_erosion
    extreme = change(images.numpy(), footprint=cross, mode="nearest")
    share = abs(stroke) * (0.9 if stroke > 0 else 0.5)
    np.testing.assert_allclose(
        got.numpy(), images.numpy() * (1 - share) + extreme * share, atol=0.01
    )


def test_elastic_moves_ink_by_no_more_than_its_amount():
    # A ramp shows where each pixel came from: its value is the place.
    ramp = torch.arange(28.0).expand(1, 1, 28, 28).contiguous()
    drawn = numbers(200)
    drawn[:, 7:] = torch.rand(200, NUMBERS - 7, generator=torch.Generator().manual_seed(1)) * 2 - 1
    moved = Augment(**{**NONE, "elastic": 3.0}).apply(ramp.expand(200, -1, -1, -1), drawn)
    inner = (moved - ramp)[..., 6:-6, 6:-6]
    assert inner.abs().max() <= 3.0
    assert inner.abs().amax((1, 2, 3)).min() > 0.3  # each picture is bent
    assert inner.diff(dim=-1).abs().max() < 1.0  # and not folded


def test_pictures_are_the_same_to_the_bit_in_any_company():
    augment, images = Augment(), torch.rand(450, 1, 28, 28)
    drawn = torch.from_numpy(augment.draw(np.random.default_rng(0), 450))
    torch.set_num_threads(2)
    together = augment.apply(images, drawn)
    torch.set_num_threads(1)
    assert torch.equal(augment.apply(images, drawn), together)
    for index in (0, 191, 192, 449):
        one = slice(index, index + 1)
        assert torch.equal(augment.apply(images[one], drawn[one]), together[one])


def test_values_stay_in_range_and_images_differ():
    augment, image = Augment(), blobs(1).expand(100, -1, -1, -1)
    out = augment(image, np.random.default_rng(3))
    assert out.min() >= 0
    assert out.max() <= 1
    assert torch.unique(out.flatten(1), dim=0).shape[0] == 100
    assert torch.equal(out, augment(image, np.random.default_rng(3)))


def test_other_sizes_channels_and_types():
    augment = Augment()
    out = augment(torch.rand(3, 2, 20, 32, dtype=torch.float64), np.random.default_rng(0))
    assert out.shape == (3, 2, 20, 32)
    assert out.dtype == torch.float64
    assert augment(torch.rand(0, 1, 28, 28), np.random.default_rng(0)).shape == (0, 1, 28, 28)
    # Channels of an image are bent alike.
    gray = blobs(2)
    out = augment(gray.expand(-1, 3, -1, -1), np.random.default_rng(0))
    assert torch.equal(out[:, 0], out[:, 2])


def test_wrong_arguments_are_told():
    with pytest.raises(ValueError, match=r"Augment: rotate must be in \[0, 180.0\], got -1"):
        Augment(rotate=-1)
    with pytest.raises(ValueError, match=r"thicker must be in \[0, 1.0\], got 2"):
        Augment(thicker=2)
    with pytest.raises(ValueError, match=r"items must be floating images .* got torch.uint8"):
        Augment()(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"numbers must be of shape \[2, 79\], got \[3, 79\]"):
        Augment().apply(torch.zeros(2, 1, 28, 28), torch.zeros(3, NUMBERS))
    assert "rotate=15.0" in repr(Augment())
