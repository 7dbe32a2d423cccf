"""Full-context embeddings against the formulas of the paper's appendix and torch's own LSTMs."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastmeta.nn import FullContextEmbedding

DIM, STEPS = 3, 2


def make(steps=STEPS, dim=DIM, seed=0):
    torch.manual_seed(seed)
    return FullContextEmbedding(dim, steps).double()


def data(tasks=2, supports=4, queries=3, dim=DIM, seed=1):
    generator = torch.Generator().manual_seed(seed)
    support = torch.randn(tasks, supports, dim, generator=generator, dtype=torch.float64)
    query = torch.randn(tasks, queries, dim, generator=generator, dtype=torch.float64)
    return support, query


def lstm_step(x, hidden, c, weight_ih, weight_hh, bias):
    """One step of the LSTM equations on vectors, gates in the order input, forget, cell, output."""
    i, f, g, o = (weight_ih @ x + weight_hh @ hidden + bias).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def naive(module, support, query):
    """Equations of appendix A for one task, item by item; all supports valid."""
    weights = (module.support_weight_ih, module.support_weight_hh, module.support_bias)
    zero = torch.zeros(module.embedding_dim, dtype=torch.float64)
    states = []
    for direction, order in enumerate((range(len(support)), reversed(range(len(support))))):
        h, c, of = zero, zero, {}
        for i in order:
            h, c = lstm_step(support[i], h, c, *(w[direction] for w in weights))
            of[i] = h
        states.append(of)
    g = [x + states[0][i] + states[1][i] for i, x in enumerate(support)]
    f = []
    for x in query:
        h, c = x, zero
        for _ in range(module.steps):
            read = zero
            if g:
                attention = torch.softmax(torch.stack([h @ s for s in g]), 0)
                read = sum(a * s for a, s in zip(attention, g, strict=True))
            h_hat, c = lstm_step(
                x,
                torch.cat((h, read)),
                c,
                module.query_weight_ih,
                module.query_weight_hh,
                module.query_bias,
            )
            h = h_hat + x
        f.append(h)
    return torch.stack(g) if g else support, torch.stack(f)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_follows_the_appendix(steps):
    module, (support, query) = make(steps), data()
    got_support, got_query = module(support, query)
    for task in range(2):
        want_support, want_query = naive(module, support[task], query[task])
        torch.testing.assert_close(got_support[task], want_support)
        torch.testing.assert_close(got_query[task], want_query)


@pytest.mark.parametrize(
    "mask",
    [
        [[1, 1, 1, 1], [1, 1, 0, 0]],  # padded at the end
        [[0, 1, 0, 1], [0, 0, 1, 0]],  # anywhere
        [[1, 1, 1, 0], [0, 0, 0, 0]],  # a task without supports
    ],
)
def test_padding_influences_nothing(mask):
    module, (support, query) = make(), data()
    mask = torch.tensor(mask, dtype=torch.bool)
    padded = support.masked_fill(~mask.unsqueeze(-1), torch.nan)
    got_support, got_query = module(padded, query, mask)
    (got_support.square().sum() + got_query.square().sum()).backward()
    got_grads = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    total = 0
    for task in range(2):
        valid = mask[task]
        want_support, want_query = naive(module, support[task, valid], query[task])
        torch.testing.assert_close(got_support[task, valid], want_support)
        torch.testing.assert_close(got_query[task], want_query)
        assert (got_support[task, ~valid] == 0).all()
        total = total + want_support.square().sum() + want_query.square().sum()
    total.backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(got_grads[name], parameter.grad, msg=name)


def test_gradient_of_padding_is_zero():
    module, (support, query) = make(), data()
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)
    support.requires_grad_()
    outputs = module(support, query, mask)
    (grad,) = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), support)
    assert (grad[~mask] == 0).all()
    assert (grad[mask] != 0).all()


def test_equals_torch_lstm_on_packed_sequences():
    """g is torch's bidirectional LSTM with a skip, f torch's LSTMCell on [f', r] and h."""
    module, (support, query) = make(steps=4), data(tasks=3, supports=5)
    lengths = torch.tensor([5, 2, 3])
    lstm = torch.nn.LSTM(DIM, DIM, batch_first=True, bidirectional=True).double()
    cell = torch.nn.LSTMCell(2 * DIM, DIM).double()
    with torch.no_grad():
        for direction, suffix in enumerate(("", "_reverse")):
            getattr(lstm, f"weight_ih_l0{suffix}").copy_(module.support_weight_ih[direction])
            getattr(lstm, f"weight_hh_l0{suffix}").copy_(module.support_weight_hh[direction])
            getattr(lstm, f"bias_ih_l0{suffix}").copy_(module.support_bias[direction])
            getattr(lstm, f"bias_hh_l0{suffix}").zero_()
        of_h, of_read = module.query_weight_hh.chunk(2, 1)
        cell.weight_ih.copy_(torch.cat((module.query_weight_ih, of_read), 1))
        cell.weight_hh.copy_(of_h)
        cell.bias_ih.copy_(module.query_bias)
        cell.bias_hh.zero_()
    packed = pack_padded_sequence(support, lengths, batch_first=True, enforce_sorted=False)
    states, _ = pad_packed_sequence(lstm(packed)[0], batch_first=True, total_length=5)
    mask = torch.arange(5) < lengths[:, None]
    got_support, got_query = module(support, query, mask)
    g = (support + states[..., :DIM] + states[..., DIM:]) * mask.unsqueeze(-1)
    torch.testing.assert_close(got_support, g)
    for task, length in enumerate(lengths):
        h, c = query[task], torch.zeros_like(query[task])
        for _ in range(4):
            read = torch.softmax(h @ g[task, :length].T, 1) @ g[task, :length]
            h, c = cell(torch.cat((query[task], read), 1), (h, c))
            h = h + query[task]
        torch.testing.assert_close(got_query[task], h)


def test_order_of_the_supports_matters():
    module, (support, query) = make(), data()
    straight, turned = module(support, query)[1], module(support.flip(1), query)[1]
    assert (straight - turned).abs().max() > 1e-3


def functional(module, *names):
    def call(*tensors):
        inputs, values = tensors[:2], dict(zip(names, tensors[2:], strict=True))
        mask = torch.tensor([[1, 1, 0]], dtype=torch.bool)
        return torch.func.functional_call(module, values, (*inputs, mask))

    return call


def test_gradients_to_second_order():
    module, (support, query) = make(dim=2), data(tasks=1, supports=3, queries=2, dim=2)
    names = ["support_weight_hh", "query_weight_hh", "query_bias"]
    parameters = dict(module.named_parameters())
    inputs = [
        t.detach().requires_grad_() for t in (support, query, *(parameters[n] for n in names))
    ]
    call = functional(module, *names)
    assert gradcheck(call, inputs)
    assert gradgradcheck(lambda *t: call(*t)[1], inputs, fast_mode=True)


def test_transforms():
    module, (support, query) = make(), data()
    parameters = {k: v.detach() for k, v in module.named_parameters()}

    def value(parameters, support, query):
        return torch.func.functional_call(module, parameters, (support, query))[1].square().sum()

    got = torch.func.grad(value)(parameters, support, query)
    module(support, query)[1].square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=name)

    # Over weights and tasks at once: every task with weights of its own.
    stacked = {k: torch.stack((v, v * 1.5)) for k, v in parameters.items()}
    per_task = torch.func.vmap(torch.func.grad(value))(stacked, support[:, None], query[:, None])
    for task in range(2):
        own = {k: v[task] for k, v in stacked.items()}
        want = torch.func.grad(value)(own, support[task : task + 1], query[task : task + 1])
        for name in want:
            torch.testing.assert_close(per_task[name][task], want[name], msg=name)


def test_autocast():
    module, (support, query) = make().float(), data()
    want = module(support.float(), query.float())
    with torch.autocast("cpu", torch.bfloat16):
        got = module(support.float(), query.float())
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, w, atol=0.05, rtol=0.05)
        assert not torch.equal(g, w)


@pytest.mark.parametrize(("supports", "queries", "tasks"), [(0, 3, 2), (4, 0, 2), (4, 3, 0)])
def test_empty(supports, queries, tasks):
    module, (support, query) = make(), data(tasks, supports, queries)
    got_support, got_query = module(support, query)
    assert got_support.shape == support.shape
    assert got_query.shape == query.shape
    assert got_query.isfinite().all()


def test_state_dict_round_trip():
    module, other, (support, query) = make(), make(seed=5), data()
    other.load_state_dict(module.state_dict())
    for got, want in zip(other(support, query), module(support, query), strict=True):
        assert torch.equal(got, want)


def test_forget_gates_start_open():
    module = make(dim=16)
    forget, others = module.query_bias[16:32], module.query_bias[32:]
    assert (forget - 1).abs().max() <= 0.25
    assert others.abs().max() <= 0.25


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, s, q: FullContextEmbedding(0), ValueError, "embedding_dim must be"),
        (lambda m, s, q: FullContextEmbedding(4, -1), ValueError, "steps must be"),
        (lambda m, s, q: FullContextEmbedding(4, 1.5), TypeError, "steps must be .* got float 1.5"),
        (lambda m, s, q: m(s[0], q), ValueError, "support must be"),
        (lambda m, s, q: m(s[..., :2], q), ValueError, r"support must be .*embedding_dim=3"),
        (lambda m, s, q: m(s, q[..., :2]), ValueError, "query must be"),
        (lambda m, s, q: m(s, q[:1]), ValueError, r"query must be of shape \[T=2"),
        (lambda m, s, q: m(s.long(), q), TypeError, "support must be a float"),
        (lambda m, s, q: m(s, q, torch.ones(2, 4)), TypeError, "mask must be a bool"),
        (lambda m, s, q: m(s, q, torch.ones(2, 3).bool()), ValueError, "mask must be of shape"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(make(), *data())
