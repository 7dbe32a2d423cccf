"""Encoders: shapes, structure against the papers, per-row independence, second order, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastmeta.nn import MLP, Conv4, ResNet12


def images(n=3, channels=1, size=28, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("options", "size", "width"),
    [
        ({}, 28, 64),
        ({"hidden": 32}, 84, 32 * 25),
        ({"pooling": "stride"}, 28, 64 * 4),
        ({"pooling": "stride", "output": "mean"}, 28, 64),
        ({"pooling": "stride"}, 8, 64),
        ({"output": "mean", "norm": "group"}, 40, 64),
        ({"norm": "none"}, 16, 64),
    ],
)
def test_conv4_shapes(options, size, width):
    assert Conv4(**options)(images(size=size)).shape == (3, width)
    known = Conv4(**options, image_size=size)
    assert known.embedding_dim == width
    head = Conv4(**options, image_size=(size, size), num_classes=5)
    assert head.embedding_dim == 5
    assert head(images(size=size)).shape == (3, 5)


def test_conv4_is_the_network_of_the_papers():
    """Written out with torch.nn.functional, on the module's own weights."""
    torch.manual_seed(0)
    net = Conv4(3, 8).double()
    x = want = images(4, 3, 32).double()
    for index in range(1, 5):
        weight = net.get_parameter(f"block{index}.conv.weight")
        scale, shift = (net.get_parameter(f"block{index}.norm.{n}") for n in ("weight", "bias"))
        want = F.conv2d(want, weight, padding=1)
        want = F.batch_norm(want, None, None, scale, shift, training=True)
        want = F.max_pool2d(F.relu(want), 2)
    torch.testing.assert_close(net(x), want.flatten(1))
    assert sum(p.numel() for p in Conv4(3, 64).parameters()) == 27 * 64 + 3 * 9 * 64**2 + 8 * 64


def test_conv4_stride_and_mean():
    torch.manual_seed(0)
    net = Conv4(1, 4, pooling="stride", norm="none", output="mean", num_classes=2).double()
    x = want = images().double()
    for index in range(1, 5):
        weight, bias = (net.get_parameter(f"block{index}.conv.{n}") for n in ("weight", "bias"))
        want = F.relu(F.conv2d(want, weight, bias, stride=2, padding=1))
    want = F.linear(want.mean((2, 3)), net.head.weight, net.head.bias)
    torch.testing.assert_close(net(x), want)


def test_resnet12_is_the_network_of_the_papers():
    torch.manual_seed(0)
    net = ResNet12(3, (4, 5, 6, 7)).double()
    x = want = images(2, 3, 32).double()

    def unit(x, conv, norm):
        x = F.conv2d(x, conv.weight, padding=conv.weight.shape[-1] // 2)
        return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)

    for index in range(1, 5):
        block = net.get_submodule(f"block{index}")
        body, shortcut = block.body, block.shortcut
        out = F.leaky_relu(unit(want, body[0], body[1]), 0.1)
        out = F.leaky_relu(unit(out, body[3], body[4]), 0.1)
        out = unit(out, body[6], body[7]) + unit(want, shortcut[0], shortcut[1])
        want = F.max_pool2d(F.leaky_relu(out, 0.1), 2)
    torch.testing.assert_close(net(x), want.mean((2, 3)))
    assert net.embedding_dim == 7


def test_resnet12_options():
    widths = (4, 4, 6, 6)
    flat = ResNet12(1, widths, norm="group", output="flatten", image_size=(32, 48), num_classes=3)
    assert flat(torch.rand(2, 1, 32, 48)).shape == (2, 3)
    assert ResNet12(1, widths, norm="none", output="flatten").embedding_dim is None
    # 12 convolutions of 3x3 and their shortcuts: 8.0 million parameters at the default widths.
    assert round(sum(p.numel() for p in ResNet12().parameters()) / 1e6, 1) == 8.0


def test_mlp_is_what_its_sizes_say():
    torch.manual_seed(0)
    net = MLP([6, 5, 4, 2], activation="tanh").double()
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    want = x.flatten(1)
    for index in range(1, 4):
        layer = net.get_submodule(f"linear{index}")
        want = F.linear(want, layer.weight, layer.bias)
        want = torch.tanh(want) if index < 3 else want
    torch.testing.assert_close(net(x), want)
    assert net.embedding_dim == 2


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_mlp_norm(norm):
    net = MLP([4, 8, 2], norm=norm, activation=nn.ELU)
    hidden = nn.Sequential(*list(net)[:3])(torch.randn(16, 4) * 5 + 3)
    over = 0 if norm == "batch" else 1
    torch.testing.assert_close(
        hidden.mean(over), torch.zeros(hidden.shape[1 - over]), atol=1e-5, rtol=0
    )
    assert any(isinstance(m, nn.ELU) for m in net)


@pytest.mark.parametrize(
    "net",
    [
        Conv4(1, 8, norm="group"),
        Conv4(1, 8).eval(),
        ResNet12(1, (4, 4, 4, 4), norm="group"),
        MLP([784, 8], norm="layer"),
    ],
    ids=["conv4-group", "conv4-eval", "resnet-group", "mlp-layer"],
)
def test_rows_do_not_mix(net):
    x = images(4)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]))


@pytest.mark.parametrize(
    "net", [Conv4(1, 4, norm="group", num_classes=3, output="mean"), MLP([256, 8, 3])]
)
def test_second_order_through_functional_call(net):
    """What a MAML step needs: the gradient of a function of the gradient, vmapped over tasks."""
    net = net.double()
    x = images(4, size=16).double()
    y = torch.tensor([[0, 1], [2, 0]])
    parameters = {k: v.detach() for k, v in net.named_parameters()}

    def loss(parameters, x, y):
        return F.cross_entropy(torch.func.functional_call(net, parameters, (x,)), y)

    def adapted(parameters, x, y):
        grads = torch.func.grad(loss)(parameters, x, y)
        return loss({k: v - 0.1 * grads[k] for k, v in parameters.items()}, x, y)

    tasks = x.unflatten(0, (2, 2))
    got = torch.func.vmap(torch.func.grad(adapted), (None, 0, 0))(parameters, tasks, y)
    for task in range(2):
        leaves = {k: v.clone().requires_grad_() for k, v in parameters.items()}
        inner = loss(leaves, tasks[task], y[task])
        grads = torch.autograd.grad(inner, list(leaves.values()), create_graph=True)
        moved = {k: v - 0.1 * g for (k, v), g in zip(leaves.items(), grads, strict=True)}
        want = torch.autograd.grad(loss(moved, tasks[task], y[task]), list(leaves.values()))
        for (name, grad), w in zip(got.items(), want, strict=True):
            torch.testing.assert_close(grad[task], w, msg=name)


def test_initialisation_keeps_the_signal():
    """He initialisation: without any norm, the second moment survives the four blocks."""
    torch.manual_seed(0)
    net = Conv4(3, 64, norm="none", pooling="stride")
    out = net(torch.randn(8, 3, 64, 64))
    assert 0.2 < out.square().mean() < 5


def test_state_dict_round_trip():
    for make in (lambda: Conv4(1, 4), lambda: ResNet12(1, (2, 2, 2, 2)), lambda: MLP([784, 3])):
        net, other = make().eval(), make().eval()
        other.load_state_dict(net.state_dict())
        assert torch.equal(other(images()), net(images()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Conv4(0), "Conv4: in_channels must be"),
        (lambda: Conv4(1, 1.5), "hidden must be"),
        (lambda: Conv4(pooling="avg"), "pooling must be one of 'max', 'stride', got 'avg'"),
        (lambda: Conv4(norm="instance"), "norm must be one of"),
        (lambda: Conv4(output="max"), "output must be one of"),
        (lambda: Conv4(num_classes=5), "image_size must be given with num_classes"),
        (lambda: Conv4(num_classes=0, image_size=28), "num_classes must be"),
        (lambda: Conv4(image_size=8), "image_size must be .* at least 16, got 8"),
        (lambda: Conv4(image_size=(28, 28, 28)), "image_size must be"),
        (lambda: Conv4()(images(channels=3)), r"input must be of shape \[N, 1, H, W\], got shape"),
        (lambda: Conv4()(images()[0]), "input must be of shape"),
        (lambda: Conv4()(images(size=8)), "at least 16 x 16 pixels"),
        (lambda: ResNet12(widths=(1, 2)), "ResNet12: widths must be four"),
        (lambda: ResNet12(widths=(1, 2, 0, 4)), "widths must be an integer of at least 1"),
        (lambda: ResNet12()(images()), r"input must be of shape \[N, 3"),
        (lambda: MLP([3]), "MLP: sizes must be at least two"),
        (lambda: MLP([3, -1]), "sizes must be"),
        (lambda: MLP([3, 4], activation="swish"), "activation must be one of"),
        (lambda: MLP([3, 4], norm="group"), "norm must be one of"),
        (lambda: MLP([3, 4])(torch.rand(2, 4)), r"with 3 elements a row, got shape \[2, 4\]"),
    ],
)
def test_errors(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
