"""What a CUDA kernel owes its caller: streams, graphs, no waiting, devices, determinism, TF32."""

import pytest
import torch
from opcases import Case, leaves

import fastmeta as fm

CASE = Case("rules", 4, 75, 40, 64, 5, padded=0.2)
# One block of queries, and more supports than a block could keep anything of.
LONG = Case("long", 1, 9, 20000, 32, 5)


def matching(similarity, nll):
    def step(query, support, labels, targets, scale, weight):
        options = {"similarity": similarity, "scale": scale, "weight": weight}
        if nll:
            return fm.matching_nll(query, support, labels, targets, 5, reduction="sum", **options)
        logp = fm.matching_attention(query, support, labels, 5, **options)
        return torch.where(logp.isinf(), 0, logp).sum()

    step.similarity = similarity
    return step


def segment_mean(query, support, labels, targets, scale, weight):
    return (fm.segment_mean(support, labels, 5)[0] * query.mean(1, keepdim=True)).sum()


def sgd_update(query, support, labels, targets, scale, weight):
    return sum(u.square().sum() for u in fm.sgd_update([query, support], [query, support], scale))


def momentum_update(query, support, labels, targets, scale, weight):
    both = [query, support]
    updated, buffers = fm.momentum_update(both, both, None, scale)
    return sum(t.square().sum() for t in (*updated, *buffers))


def adam_update(query, support, labels, targets, scale, weight):
    both = [query, support]
    updated, state = fm.adam_update(both, both, None, scale, eps=1e-2)
    return sum(t.square().sum() for t in (*updated, *state.mean, *state.square))


def task_linear(query, support, labels, targets, scale, weight):
    return fm.task_linear(query, support).square().mean()


def task_conv2d(query, support, labels, targets, scale, weight):
    x = query.unflatten(2, (2, 4, -1))
    kernels = support[:, :6, :18].unflatten(2, (2, 3, 3))
    return fm.task_conv2d(x, kernels, padding=1, stride=2).square().mean()


def task_batch_norm(query, support, labels, targets, scale, weight):
    return fm.task_batch_norm(query, support[:, 0], support[:, 1]).pow(3).mean()


STEPS = {
    "segment_mean": segment_mean,
    "task_linear": task_linear,
    "task_conv2d": task_conv2d,
    "task_batch_norm": task_batch_norm,
    "sgd_update": sgd_update,
    "momentum_update": momentum_update,
    "adam_update": adam_update,
    **{
        f"{'nll' if nll else 'attention'}-{name}": matching(name, nll)
        for name in ("dot", "cosine", "sqeuclidean", "euclidean", "additive")
        for nll in (False, True)
    },
}


def inputs_of(step, device, dtype=torch.float32, seed=0, case=CASE):
    made = case.make(dtype, seed, getattr(step, "similarity", "dot"))
    tensors = [None if t is None else t.to(device) for t in made]
    return [t if t is None or not t.is_floating_point() else t.requires_grad_() for t in tensors]


def forward_backward(step, inputs):
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    loss = step(*inputs)
    return [loss, *torch.autograd.grad(loss, wanted, materialize_grads=True)]


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_nothing_waits_for_the_device(step, gpu):
    inputs = inputs_of(step, gpu)
    forward_backward(step, inputs)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward(step, inputs)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_launches_go_to_the_current_stream(step, gpu):
    inputs = inputs_of(step, gpu)
    expected = forward_backward(step, inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [None if t is None else torch.full_like(t, 1).detach() for t in inputs]
        torch.cuda._sleep(50_000_000)  # the default stream would read the ones
        with torch.no_grad():
            for to, value in zip(late, inputs, strict=True):
                if to is not None:
                    to.copy_(value)
        late = [t if t is None or not t.is_floating_point() else t.requires_grad_() for t in late]
        got = forward_backward(step, late)
    stream.synchronize()
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_graph_captures_forward_and_backward(step, gpu):
    static = inputs_of(step, gpu)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            forward_backward(step, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_backward(step, static)
    for seed in (1, 2):
        fresh = inputs_of(step, gpu, seed=seed)
        with torch.no_grad():
            for to, value in zip(static, fresh, strict=True):
                if to is not None:
                    to.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        expected = forward_backward(step, fresh)
        assert all(map(torch.equal, captured, expected))


@pytest.mark.parametrize("case", [CASE, LONG], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_equal_inputs_give_equal_bits(step, dtype, case, gpu):
    inputs = inputs_of(step, gpu, dtype, case=case)
    first = forward_backward(step, inputs)
    for _ in range(5):
        assert all(map(torch.equal, first, forward_backward(step, inputs)))


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_the_device_of_the_tensors_is_used(step, gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    expected = forward_backward(step, inputs_of(step, "cuda:0"))
    with torch.cuda.device(0):
        got = forward_backward(step, inputs_of(step, "cuda:1"))
    assert all(g.device.index == 1 for g in got)
    assert all(torch.equal(g.cpu(), e.cpu()) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)], ids=str)
def test_empty_sizes(sizes, gpu):
    tasks, queries, supports, dim = sizes
    query, support = leaves(
        torch.randn(tasks, queries, dim, device=gpu), torch.randn(tasks, supports, dim, device=gpu)
    )
    labels = torch.zeros(tasks, supports, dtype=torch.long, device=gpu)
    logp = fm.matching_attention(query, support, labels, 2)
    assert logp.shape == (tasks, queries, 2)
    loss = torch.where(logp.isinf(), 0, logp).sum()
    grads = torch.autograd.grad(loss, [query, support], materialize_grads=True)
    assert all(not g.any() for g in grads)


def test_labels_outside_the_range_are_padding(gpu):
    query, support, labels, *_ = inputs_of(matching("dot", False), gpu)
    stray = torch.where(labels == 0, 77, labels)
    padded = torch.where(labels == 0, -100, labels)
    got, wanted = (fm.matching_attention(query, support, y, 5) for y in (stray, padded))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_tf32_only_where_torch_allows_it(similarity, gpu):
    step = matching(similarity, False)
    query, support, labels, _, scale, _ = inputs_of(step, gpu)
    options = {"similarity": similarity, "scale": scale.item()}
    truth = fm.matching_attention(query.double(), support.double(), labels, 5, **options)
    before = torch.backends.cuda.matmul.allow_tf32
    errors = {}
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            logp = fm.matching_attention(query, support, labels, 5, **options)
            errors[allowed] = (logp - truth)[truth.isfinite()].abs().max().item()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    size = 100.0 if similarity == "dot" else 1.3  # of the logits
    assert errors[False] < 32 * torch.finfo(torch.float32).eps * size
    assert errors[True] < 2**-9 * size
    if torch.cuda.get_device_capability()[0] >= 8:
        assert errors[True] > errors[False]


@pytest.mark.slow
def test_indices_beyond_32_bits(gpu):
    rows, dim = 2**21 + 64, 1024  # 2^31 elements and some
    if torch.cuda.get_device_properties(gpu).total_memory < 24 * 2**30:
        pytest.skip("less than 24 GiB of GPU memory")
    support = torch.zeros(1, rows, dim, device=gpu, dtype=torch.bfloat16)
    support[0, -1] = 1
    labels = torch.zeros(1, rows, dtype=torch.long, device=gpu)
    labels[0, -1] = 1
    query = torch.ones(1, 1, dim, device=gpu, dtype=torch.bfloat16)
    logp = fm.matching_attention(query, support, labels, 2, similarity="dot", scale=0.1)
    assert logp[0, 0, 1] > logp[0, 0, 0]
    mean, count = fm.segment_mean(support, labels, 2)
    assert (mean[0, 1] == 1).all()
    assert count[0].tolist() == [rows - 1, 1]
