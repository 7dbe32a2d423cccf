"""Shapes and rates that the tests of the updates share."""

import torch

SHAPES = [(3, 4, 5), (3, 7), (3,), (3, 1, 2, 3, 3), (3, 33), (3, 1000)]


def tensors(shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def rates(kind, shapes, dtype=torch.float64):
    """A learning rate of each granularity, as the caller gives it and as a list of tensors."""
    generator = torch.Generator().manual_seed(9)

    def rand(*shape):
        return torch.rand(shape, generator=generator, dtype=dtype) + 0.1

    made = {
        "scalar": lambda s: rand(),
        "one": lambda s: rand(1),
        "per_element": lambda s: rand(*s[1:]),
        "per_task": lambda s: rand(s[0], *(1 for _ in s[1:])),
        "full": lambda s: rand(*s),
        "per_row": lambda s: rand(*s[:2], *(1 for _ in s[2:])),
        "middle": lambda s: rand(*(n if d % 2 else 1 for d, n in enumerate(s))),
    }[kind]
    return [made(s) for s in shapes]


KINDS = ("scalar", "one", "per_element", "per_task", "full", "per_row", "middle")


def gradients(outputs, weights, inputs):
    """Gradients of the weighted sum of the outputs; zero where the graph does not reach."""
    loss = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def check_large(fused, definition, count):
    """Results and gradients of one large tensor in float32 against the definition in float64.

    ``fused`` and ``definition`` take ``count`` tensors and a rate, and return one tensor less. The
    32 MiB of all make the kernels store past the caches, and the odd rows begin within a line.
    """
    shape = (2, (4 << 20) // (2 * count - 1) | 1)
    inputs = [t[0] for t in (tensors([shape], torch.float32, seed=s) for s in range(count))]
    inputs = [t.abs() + 0.5 for t in inputs]
    inputs.append(torch.tensor([[0.1], [0.2]]))
    sides = []
    for function, dtype in ((fused, torch.float32), (definition, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        outputs = function(*leaves)
        grads = torch.autograd.grad(outputs, leaves, [torch.full_like(o, 0.5) for o in outputs])
        sides.append([*outputs, *grads])
    for value, truth in zip(*sides, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-5)
