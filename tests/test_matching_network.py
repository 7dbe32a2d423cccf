"""MatchingNetwork against the formula of the paper, written with one-hot labels in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from networkcases import DIM, IN, SIMILARITIES, WAYS, encoder, episode, make, naive
from torch import nn
from torch.nn import functional as F

from fastmeta.matching import MatchingNetwork
from fastmeta.nn import MLP, FullContextEmbedding

# --- the formula ----------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_formula_and_its_gradient(similarity):
    net = make(similarity=similarity, scale=1.7)
    support_x, support_y, query_x, query_y = episode()
    logp = net(support_x, support_y, query_x)
    loss = net.loss(support_x, support_y, query_x, query_y)
    got = torch.autograd.grad(loss, list(net.parameters()))
    want_p = torch.stack(
        [
            naive(net, net.encoder(s), y, net.encoder(q))
            for s, y, q in zip(support_x, support_y, query_x, strict=True)
        ]
    )
    want_loss = F.nll_loss(want_p.log().flatten(0, 1), query_y.flatten())
    want = torch.autograd.grad(want_loss, list(net.parameters()))
    torch.testing.assert_close(logp, want_p.log())
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(got, want)
    assert got[0].abs().sum() > 0  # the scale learns


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions_ignore_padding_queries(reduction):
    net = make()
    support_x, support_y, query_x, query_y = episode()
    query_y[1, 2:] = -100
    got = net.loss(support_x, support_y, query_x, query_y, reduction=reduction)
    logp = net(support_x, support_y, query_x).transpose(1, 2)
    torch.testing.assert_close(got, F.nll_loss(logp, query_y, reduction=reduction))


def test_one_task_without_its_dimension():
    net = make(full_context=2, similarity="additive")
    support_x, support_y, query_x, query_y = episode()
    support_y[1, 5] = -100
    one = support_x[1], support_y[1], query_x[1]
    torch.testing.assert_close(net(*one), net(support_x, support_y, query_x)[1])
    weights = net.attention_weights(*one)
    torch.testing.assert_close(weights, net.attention_weights(support_x, support_y, query_x)[1])
    batched = net.loss(support_x, support_y, query_x, query_y, reduction="none")
    torch.testing.assert_close(net.loss(*one, query_y[1], reduction="none"), batched[1])
    torch.testing.assert_close(net.loss(*one, query_y[1]), batched[1].mean())
    length = net(support_x[1], support_y[1].clamp(0), query_x[1], lengths=torch.tensor(5))
    torch.testing.assert_close(length, net(*one))


def test_attention_weights():
    net = make(similarity="sqeuclidean")
    support_x, support_y, query_x, _ = episode()
    support_y[0, 3] = -100
    weights = net.attention_weights(support_x, support_y, query_x)
    assert weights.shape == (2, 4, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, dtype=torch.float64))
    assert (weights[0, :, 3] == 0).all()
    one_hot = F.one_hot(support_y.clamp(0), WAYS).double()
    torch.testing.assert_close(weights @ one_hot, net(support_x, support_y, query_x).exp())


def test_class_without_support():
    net = make()
    support_x, support_y, query_x, query_y = episode()
    logp = net(support_x, support_y, query_x, WAYS + 1)
    assert (logp[..., WAYS] == -math.inf).all()
    torch.testing.assert_close(logp[..., :WAYS], net(support_x, support_y, query_x))
    query_y[0, 0] = WAYS
    losses = net.loss(support_x, support_y, query_x, query_y, WAYS + 1, reduction="none")
    assert losses.isinf().sum() == 1
    losses.sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_encoder_output_is_flattened():
    net = MatchingNetwork(nn.Conv2d(1, 2, 3))
    logp = net(torch.rand(2, 3, 1, 5, 5), torch.arange(3).repeat(2, 1), torch.rand(2, 4, 1, 5, 5))
    assert logp.shape == (2, 4, 3)


def test_query_encoder():
    torch.manual_seed(0)
    net = make(similarity="dot", query_encoder=MLP([2, DIM]))
    support_x, support_y, _, _ = episode()
    query_x = torch.randn(2, 3, 2, dtype=torch.float64)
    got = net(support_x, support_y, query_x)
    for task in range(2):
        support, query = net.encoder(support_x[task]), net.query_encoder(query_x[task])
        torch.testing.assert_close(got[task].exp(), naive(net, support, support_y[task], query))


def test_scale():
    assert MatchingNetwork(encoder()).scale.item() == pytest.approx(10)
    for similarity in ("dot", "sqeuclidean", "euclidean", "additive", "concat"):
        assert MatchingNetwork(encoder(), similarity).scale.item() == 1
    net = MatchingNetwork(encoder(), scale=3.0, learn_scale=False)
    support_x, support_y, query_x, query_y = episode()
    net.double().loss(support_x, support_y, query_x, query_y).backward()
    assert net.log_scale.grad is None
    assert net.scale.item() == pytest.approx(3)


# --- variants in use elsewhere --------------------------------------------------------------------


def test_easyfsl_formula():
    """Raw query times support of unit length, biLSTM, an attention LSTM of S steps."""
    torch.manual_seed(0)
    supports = 6
    net = make(similarity="dot", normalize_support=True, full_context=supports, scale=1.0)
    lstm = nn.LSTM(DIM, DIM, batch_first=True, bidirectional=True).double()
    cell = nn.LSTMCell(2 * DIM, DIM).double()
    with torch.no_grad():  # one bias here, two in torch: theirs are summed
        context = net.context
        for direction, suffix in enumerate(("", "_reverse")):
            bias = getattr(lstm, f"bias_ih_l0{suffix}") + getattr(lstm, f"bias_hh_l0{suffix}")
            context.support_weight_ih[direction] = getattr(lstm, f"weight_ih_l0{suffix}")
            context.support_weight_hh[direction] = getattr(lstm, f"weight_hh_l0{suffix}")
            context.support_bias[direction] = bias
        context.query_weight_ih.copy_(cell.weight_ih[:, :DIM])
        context.query_weight_hh.copy_(torch.cat((cell.weight_hh, cell.weight_ih[:, DIM:]), 1))
        context.query_bias.copy_(cell.bias_ih + cell.bias_hh)
    support_x, support_y, query_x, _ = (t[0] for t in episode(supports=supports))

    support, query = net.encoder(support_x), net.encoder(query_x)
    states = lstm(support.unsqueeze(0))[0].squeeze(0)
    support = support + states[:, :DIM] + states[:, DIM:]
    hidden, c = query, torch.zeros_like(query)
    for _ in range(supports):
        read = torch.softmax(hidden @ support.T, 1) @ support
        hidden, c = cell(torch.cat((query, read), 1), (hidden, c))
        hidden = hidden + query
    attention = torch.softmax(hidden @ F.normalize(support).T, 1)
    want = (attention @ F.one_hot(support_y).double() + 1e-6).log()
    torch.testing.assert_close((net(support_x, support_y, query_x).exp() + 1e-6).log(), want)


def test_torchmeta_formula():
    """Cosine without scale, in the log domain, with -inf for a class that has no support."""
    net = make(similarity="cosine", scale=1.0)
    support_x, support_y, query_x, _ = episode()
    support_y[1] = support_y[1].clamp(max=1)
    support, query = net.encoder(support_x.flatten(0, 1)), net.encoder(query_x.flatten(0, 1))
    support, query = support.unflatten(0, (2, -1)), query.unflatten(0, (2, -1))
    squares = support.square().sum(2).unsqueeze(2) * query.square().sum(2).unsqueeze(1)
    similarities = support @ query.transpose(1, 2) * squares.clamp(min=1e-16).rsqrt()  # [B, S, Q]
    log_attention = similarities - similarities.logsumexp(1, keepdim=True)
    want = torch.full((2, WAYS, 4), -math.inf, dtype=torch.float64)
    for task in range(2):
        for c in range(WAYS):
            members = support_y[task] == c
            if members.any():
                want[task, c] = log_attention[task, members].logsumexp(0)
    torch.testing.assert_close(net(support_x, support_y, query_x, WAYS), want.transpose(1, 2))


def test_knagg_formula():
    """Softmax of negative squared distances, probabilities by a product with one-hot labels."""
    net = make(similarity="sqeuclidean")
    support_x, support_y, query_x, _ = (t[0] for t in episode())
    distances = torch.cdist(net.encoder(query_x), net.encoder(support_x)) ** 2
    want = (-distances).softmax(1) @ F.one_hot(support_y).double()
    torch.testing.assert_close(net(support_x, support_y, query_x).exp(), want)


# --- full context ---------------------------------------------------------------------------------


def test_full_context_in_the_network():
    net = make(full_context=3)
    assert net.context.steps == 3
    support_x, support_y, query_x, _ = episode()
    got = net(support_x, support_y, query_x)
    for task in range(2):
        embedded = net.encoder(support_x[task])[None], net.encoder(query_x[task])[None]
        support, query = net.context(*embedded)
        want = naive(net, support[0], support_y[task], query[0])
        torch.testing.assert_close(got[task].exp(), want)
    assert (got - make()(support_x, support_y, query_x)).abs().max() > 1e-3


def test_full_context_options():
    assert make(full_context=True).context.steps == 5
    assert make(full_context=False).context is None
    assert make(full_context=0).context.steps == 0
    own = FullContextEmbedding(DIM, 1)
    assert make(full_context=own).context is own
    assert (
        make(encoder=nn.Linear(IN, 7), full_context=1, embedding_dim=7).context.embedding_dim == 7
    )


# --- ragged episodes ------------------------------------------------------------------------------


@pytest.mark.parametrize("full_context", [False, 2])
@pytest.mark.parametrize("how", ["labels", "lengths", "mask", "padded"])
def test_ragged_equals_each_task_alone(how, full_context):
    net = make(full_context=full_context)
    support_x, support_y, query_x, query_y = episode(tasks=3)
    lengths = torch.tensor([6, 3, 4])
    mask = torch.arange(6) < lengths[:, None]
    want = [
        net(support_x[t, :n], support_y[t, :n], query_x[t], WAYS) for t, n in enumerate(lengths)
    ]
    support_x = support_x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    labelled = support_y.masked_fill(~mask, -100)
    options = {"lengths": {"lengths": lengths}, "mask": {"mask": mask}, "padded": {"padded": True}}
    if how in ("labels", "padded"):
        support_y = labelled
    options = options.get(how, {})
    torch.testing.assert_close(
        net(support_x, support_y, query_x, WAYS, **options), torch.stack(want)
    )
    net.loss(support_x, support_y, query_x, query_y, WAYS, **options).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def norm_statistics(net):
    norm = net.encoder.norm1
    return norm.running_mean, norm.running_var, norm.num_batches_tracked


@pytest.mark.parametrize("encode", ["joint", "separate"])
def test_padding_enters_no_batch_statistics(encode):
    net = make(encoder=encoder(norm="batch"), encode=encode)
    truth = copy.deepcopy(net)
    support_x, support_y, query_x, query_y = episode(tasks=2)
    support_y[1, 4:] = -100
    query_y[0, 2:] = -100
    valid, query_valid = support_y >= 0, query_y >= 0
    rows, query_rows = support_x[valid], query_x[query_valid]
    if encode == "joint":
        embedded = truth.encoder(torch.cat((rows, query_rows)))
        support, query = embedded.split((len(rows), len(query_rows)))
    else:
        support, query = truth.encoder(rows), truth.encoder(query_rows)
    support, query = support.split((6, 4)), query.split((2, 4))
    labels = [support_y[0], support_y[1, :4]]
    p = [naive(net, s, y, q) for s, y, q in zip(support, labels, query, strict=True)]
    want = F.nll_loss(torch.cat(p).log(), query_y[query_valid])

    support_x[~valid], query_x[~query_valid] = 1e6, -1e6
    torch.testing.assert_close(net.loss(support_x, support_y, query_x, query_y, WAYS), want)
    torch.testing.assert_close(norm_statistics(net), norm_statistics(truth))


def test_query_mask_keeps_queries_from_the_encoder():
    net = make(encoder=encoder(norm="batch"))
    truth = copy.deepcopy(net)
    support_x, support_y, query_x, _ = episode()
    query_mask = torch.ones(2, 4, dtype=torch.bool)
    query_mask[1, 1:] = False
    truth.encoder(torch.cat((support_x.flatten(0, 1), query_x[query_mask])))
    net(support_x, support_y, query_x, query_mask=query_mask)
    torch.testing.assert_close(norm_statistics(net), norm_statistics(truth))


def test_joint_and_separate_batches():
    """In training they differ under batch norm; in evaluation they agree."""
    joint, separate = (make(encoder=encoder(norm="batch"), encode=e) for e in ("joint", "separate"))
    args = episode()[:3]
    assert (joint(*args) - separate(*args)).abs().max() > 1e-3
    separate.load_state_dict(joint.state_dict())
    torch.testing.assert_close(joint.eval()(*args), separate.eval()(*args))


def test_bad_arguments_leave_batch_statistics_alone():
    net = make(encoder=encoder(norm="batch"))
    before = [s.clone() for s in norm_statistics(net)]
    support_x, support_y, query_x, query_y = episode()
    with pytest.raises(ValueError, match="support_y must be in"):
        net(support_x, support_y, query_x, 2)
    with pytest.raises(ValueError, match="query_y must be in"):
        net.loss(support_x, support_y, query_x, query_y + 2)
    torch.testing.assert_close(list(norm_statistics(net)), before)


@pytest.mark.parametrize(("tasks", "supports", "queries"), [(0, 6, 4), (2, 0, 4), (2, 6, 0)])
@pytest.mark.parametrize("full_context", [False, 2])
def test_empty(tasks, supports, queries, full_context):
    net = make(full_context=full_context)
    support_x, support_y, query_x, _ = episode(max(tasks, 1), supports, queries)
    support_x, support_y, query_x = support_x[:tasks], support_y[:tasks], query_x[:tasks]
    logp = net(support_x, support_y, query_x, WAYS)
    assert logp.shape == (tasks, queries, WAYS)
    if supports == 0:
        assert (logp == -math.inf).all()
    weights = net.attention_weights(support_x, support_y, query_x, WAYS)
    assert weights.shape == (tasks, queries, supports)


# --- derivatives and transforms -------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"full_context": 1}, {"similarity": "additive"}], ids=str)
def test_second_order_of_the_whole_net(options):
    torch.manual_seed(0)
    net = MatchingNetwork(MLP([2, 2], activation="tanh"), **options).double()
    g = torch.Generator().manual_seed(0)
    support_x, query_x = (torch.randn(1, n, 2, generator=g, dtype=torch.float64) for n in (3, 2))
    support_y = torch.tensor([[1, 0, -100]])
    names, values = zip(*net.named_parameters(), strict=True)

    def loss(support_x, query_x, *values):
        parameters = dict(zip(names, values, strict=True))
        args = (support_x, support_y, query_x, 2)
        return torch.func.functional_call(net, parameters, args)[..., 0].sum()

    inputs = [t.detach().requires_grad_() for t in (support_x, query_x, *values)]
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize("options", [{"full_context": 2}, {"similarity": "concat"}], ids=str)
def test_transforms(options):
    net = make(**options)
    support_x, support_y, query_x, query_y = episode()
    support_y[0, 5] = -100
    parameters = {k: v.detach() for k, v in net.named_parameters()}

    def loss(parameters, support_x, support_y, query_x, query_y):
        args = (support_x, support_y, query_x, WAYS)
        logp = torch.func.functional_call(net, parameters, args)
        return F.nll_loss(logp, query_y)

    arguments = (support_x, support_y, query_x, query_y)
    per_task = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0, 0))(parameters, *arguments)
    for task in range(2):
        net.zero_grad()
        net.loss(*(a[task] for a in arguments), WAYS).backward()
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(per_task[name][task], parameter.grad, msg=name)


def test_gradient_of_gradient_under_torch_func():
    """A MAML step of the whole network, by torch.func and by plain autograd."""
    net = make(similarity="sqeuclidean")
    arguments = (*episode()[:3], WAYS)
    query_y = episode()[3].flatten()
    parameters = {k: v.detach() for k, v in net.named_parameters()}

    def loss(parameters):
        return F.nll_loss(
            torch.func.functional_call(net, parameters, arguments).flatten(0, 1), query_y
        )

    def adapted(parameters):
        grads = torch.func.grad(loss)(parameters)
        return loss({k: v - 0.3 * grads[k] for k, v in parameters.items()})

    got = torch.func.grad(adapted)(parameters)
    leaves = {k: v.clone().requires_grad_() for k, v in parameters.items()}
    grads = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
    moved = {k: v - 0.3 * g for (k, v), g in zip(leaves.items(), grads, strict=True)}
    want = torch.autograd.grad(loss(moved), list(leaves.values()))
    torch.testing.assert_close(list(got.values()), list(want))


def test_tracing_rules():
    """Under transforms num_classes is needed, and declared padding may not meet a batch norm."""
    net = make(encoder=encoder(norm="batch"))
    support_x, support_y, query_x, _ = episode()

    def call(x, **options):
        return net(x, support_y, query_x, **options).sum()

    with pytest.raises(ValueError, match=r"num_classes must be given under torch\.compile"):
        torch.func.grad(call)(support_x)
    lengths = torch.tensor([6, 5])
    with pytest.raises(ValueError, match="without padding while tracing"):
        torch.func.grad(lambda x: call(x, num_classes=WAYS, lengths=lengths))(support_x)
    net.eval()
    got = torch.func.grad(lambda x: call(x, num_classes=WAYS, lengths=lengths))(support_x)
    leaf = support_x.clone().requires_grad_()
    call(leaf, lengths=lengths, num_classes=WAYS).backward()
    torch.testing.assert_close(got, leaf.grad)


@pytest.mark.compile
def test_compiles_whole():
    net = make(full_context=1)
    support_x, support_y, query_x, query_y = episode(supports=3)
    support_y[1, 2:] = -100
    compiled = torch.compile(net.loss, fullgraph=True, backend="aot_eager")
    got = compiled(support_x, support_y, query_x, query_y, WAYS)
    want = net.loss(support_x, support_y, query_x, query_y, WAYS)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(loss, list(net.parameters())) for loss in (got, want)]
    torch.testing.assert_close(*grads)


# --- precision, storage ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"full_context": 2}, {"similarity": "additive"}], ids=str)
def test_autocast(options):
    net = make(**options).float()
    support_x, support_y, query_x, query_y = episode()
    arguments = (support_x.float(), support_y, query_x.float())
    support_y[1, 5] = -100
    want = net(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        got = net(*arguments)
        loss = net.loss(*arguments, query_y)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=0.15, rtol=0.05)
    loss.backward()
    assert all(p.grad.dtype == p.dtype for p in net.parameters())


def test_bfloat16_module():
    net = make().bfloat16()
    support_x, support_y, query_x, _ = episode()
    assert net(support_x.bfloat16(), support_y, query_x.bfloat16()).dtype == torch.bfloat16


def test_state_dict_round_trip():
    options = {"similarity": "additive", "full_context": 2, "scale": 4.0}
    net, other = make(**options), make(seed=7, **(options | {"scale": 1.0}))
    args = episode()[:3]
    assert not torch.equal(net(*args), other(*args))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(*args), other(*args))


def test_repr_names_the_options():
    text = repr(MatchingNetwork(encoder(), "dot", learn_scale=False))
    assert "similarity='dot', learn_scale=False, encode='joint'" in text


# --- learning -------------------------------------------------------------------------------------


def cluster_task(generator, tasks=16, ways=4, shots=1, queries=4):
    """Classes that differ in 4 of 16 features only; the others are noise of five times the size."""
    centres = torch.zeros(tasks, ways, 1, 16)
    centres[..., :4] = torch.randn(tasks, ways, 1, 4, generator=generator)
    noise = torch.full((16,), 5.0)
    noise[:4] = 0.05

    def draw(rows):
        x = centres + torch.randn(tasks, ways, rows, 16, generator=generator) * noise
        return x.flatten(1, 2), torch.arange(ways).repeat_interleave(rows).repeat(tasks, 1)

    return (*draw(shots), *draw(queries))


@pytest.mark.parametrize(
    "options", [{}, {"similarity": "sqeuclidean"}, {"full_context": 1}], ids=str
)
def test_learns_to_compare(options):
    """After a few hundred tasks, classes never seen before are told apart."""
    torch.manual_seed(0)
    net = MatchingNetwork(MLP([16, 16]), **options)
    generator = torch.Generator().manual_seed(0)
    held_out = cluster_task(torch.Generator().manual_seed(1), tasks=64)

    def accuracy():
        with torch.no_grad():
            return (net(*held_out[:3]).argmax(-1) == held_out[3]).float().mean().item()

    assert accuracy() < 0.6
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(150):
        loss = net.loss(*cluster_task(generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert accuracy() > 0.95
