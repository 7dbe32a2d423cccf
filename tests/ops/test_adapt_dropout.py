"""Dropout in the engine: its masks, which are part of the contract, and gradients through them."""

import pytest
import torch
from enginecases import relative_error
from opcases import isas, use_isa

from fastmeta.ops._engine_reference import Pass, keep_mask
from fastmeta.ops.engine import WANTED, adapt, meta_step

TASKS, ROWS = 2, 6
TEXT = (
    "fm1;in=4;linear(0,w=f0,b=f1,out=9);tanh(1);dropout(2,p=0.4,id=3);"
    "linear(3,w=f2,b=f3,out=3);loss=cross_entropy(smoothing=0.0,ignore=-100)"
)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def inputs():
    """Parameters, a rate, supports and queries for `TEXT`."""
    torch.manual_seed(0)
    shapes = [(9, 4), (9,), (3, 9), (3,)]
    fast = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    rate = torch.full((1, 1), 0.3, dtype=torch.float64, requires_grad=True)
    x, xq = (torch.randn(TASKS, ROWS, 4, dtype=torch.float64, requires_grad=True) for _ in "sq")
    y, yq = (torch.randint(3, (TASKS, ROWS)) for _ in "sq")
    return fast, rate, x, y, xq, yq


@pytest.mark.parametrize("isa", isas())
def test_dropout_against_autograd_with_its_masks(isa):
    steps, p, seed = 3, 0.4, 11
    fast, rate, x, y, xq, yq = inputs()

    def loss(theta, x, y, step, task):
        mask = keep_mask((ROWS, 9), p, 3, Pass(seed, step, task), x.device).double()
        hidden = torch.tanh(x @ theta[0].T + theta[1]) * mask / (1 - p)
        return torch.nn.functional.cross_entropy(hidden @ theta[2].T + theta[3], y)

    losses = []
    for task in range(TASKS):
        theta = fast
        for step in range(steps):
            value = loss(theta, x[task], y[task], step, task)
            grads = torch.autograd.grad(value, theta, create_graph=True)
            theta = [t - rate.squeeze() * g for t, g in zip(theta, grads, strict=True)]
        losses.append(loss(theta, xq[task], yq[task], -1, task))
    mean = torch.stack(losses).mean()
    wanted = torch.autograd.grad(mean, [*fast, rate, x, xq])
    with use_isa(isa), torch.no_grad():
        found = meta_step(
            TEXT, fast, [], rate, x, y, xq, yq, steps, seed, False, sum(WANTED.values())
        )
    assert relative_error([found[0]], [mean]) < 1e-12
    assert relative_error([*found[1], *found[3:]], wanted) < 1e-9


def test_dropout_is_a_function_of_the_seed():
    fast, rate, x, y, xq, _ = inputs()
    first, again, other = (
        adapt(TEXT, fast, [], rate, x, y, xq, 3, seed, False, False, False)[0]
        for seed in (11, 11, 12)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_dropout_keeps_the_elements_that_its_hash_says():
    """The masks are part of the contract between reference and kernels: read off a linear net."""
    tasks, rows, width, p, seed = 2, 5, 8, 0.3, 123456789
    text = f"fm1;in={width};dropout(0,p={p},id=1);linear(1,w=f0,out={width});loss=mse()"
    x = torch.ones(tasks, rows, width, dtype=torch.float64)
    weight = torch.eye(width, dtype=torch.float64)
    rate = torch.zeros(1, 1, dtype=torch.float64)
    out, _, _ = adapt(text, [weight], [], rate, x, x, x, 1, seed, False, False, False)
    for task in range(tasks):
        mask = keep_mask((rows, width), p, 1, Pass(seed, -1, task), x.device).double()
        torch.testing.assert_close(out[task], mask / (1 - p), rtol=1e-12, atol=0)
    assert not torch.equal(out[0], out[1])


def test_masks_are_splitmix64_written_out():
    """By Python's integers, in the words of the contract."""
    bits = 2**64 - 1

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & bits
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & bits
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed, node, step, task in [(0, 0, 0, 0), (2**63 - 5, 3, -1, 7), (17, 1, 4, 1000)]:
        key = mix((seed + golden) & bits)
        for part in (node, step, task):
            key = mix(key ^ ((part + golden) & bits))
        wanted = [(mix((key + (e + 1) * golden) & bits) >> 40) >= 0.25 * 2**24 for e in range(64)]
        mask = keep_mask((8, 8), 0.25, node, Pass(seed, step, task), torch.device("cpu"))
        assert mask.flatten().tolist() == wanted


def test_masks_keep_their_share():
    mask = keep_mask((1000, 100), 0.25, 0, Pass(1, 0, 0), torch.device("cpu"))
    assert abs(mask.double().mean().item() - 0.75) < 0.005  # about 4 standard deviations
