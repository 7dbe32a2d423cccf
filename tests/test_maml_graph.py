"""``MAML(cuda_graph=True)``, but for CUDA: the CPU stands for a GPU, and replays run again."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from graphcases import StandIn, stand_in
from mamlcases import make
from torch import nn

import fastmeta._graphed_step as graphed_step
from fastmeta.maml import MAML


@pytest.fixture
def counts(monkeypatch):
    return stand_in(monkeypatch)


def pair(model, *args, **options):
    """A learner with graphs and one without, of models with equal numbers."""
    return [
        MAML(*copy.deepcopy((model, *args)), cuda_graph=on, **copy.deepcopy(options))
        for on in (True, False)
    ]


def state(maml, data):
    tensors = [*maml.parameters(), *(t for t in data if t.requires_grad)]
    return [None if t.grad is None else t.grad.clone() for t in tensors]


def same(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def call(maml, data, way):
    if way == "backward":
        return maml.backward(*data)
    value = maml.loss(*data)
    value.backward()
    return value.detach()


OPTIONS = {
    "second": {},
    "first": {"first_order": True},
    "rates": {"learn_lr": "parameter", "lr_per_step": True},
    "head": {"adapt": "2"},
    "chunks": {"task_chunk": 2},
    "loop": {"strategy": "loop"},
}


@pytest.mark.parametrize("way", ["backward", "loss"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["mlp", "conv_bn"])
def test_the_same_steps_as_without(name, options, way, counts):
    if name == "conv_bn" and "adapt" in options:
        options = {"adapt": "0"}
    model, data = make(name)
    learners = pair(model, 0.1, 2, **options)
    optimizers = [torch.optim.Adam(m.parameters(), 0.01) for m in learners]
    for seed in range(4):
        batch = [t.roll(seed, 0) for t in data]
        values = []
        for maml, optimizer in zip(learners, optimizers, strict=True):
            optimizer.zero_grad()
            values.append(call(maml, batch, way))
            optimizer.step()
        assert torch.equal(*values)
        same(list(learners[0].parameters()), list(learners[1].parameters()))
        same(list(learners[0].buffers()), list(learners[1].buffers()))
    assert counts == {"warm_up": 1, "strict": 2, "capture": 1, "replay": 4}
    plan = learners[0].plan()
    assert plan.reason.endswith("replayed as a CUDA graph")
    assert plan.strategy == learners[1].plan().strategy


@pytest.mark.parametrize("way", ["backward", "loss"])
def test_gradients_of_inputs_add_up(way, counts):
    model, data = make("mlp")
    learners = pair(model, 0.1, 2)
    found = []
    for maml in learners:
        own = [t.clone().requires_grad_(t.is_floating_point()) for t in data]
        scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        call(maml, own, way)
        # The second time an input comes out of a graph, and gradients are added.
        call(maml, [own[0] * scale, *own[1:]], way)
        found.append([scale.grad, *state(maml, own)])
    same(*found)
    assert counts["capture"] == 1


def test_the_same_tensor_twice(counts):
    model, data = make("mlp")
    found = []
    for maml in pair(model, 0.1, 2):
        x = data[0].clone().requires_grad_()
        for _ in range(3):
            maml.backward(x, data[1], x, data[1])
        found.append(state(maml, [x]))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)  # added in another order


def test_what_is_handed_out_stays(counts):
    model, data = make("mlp")
    other = [t.roll(1, 0) for t in data]
    maml, plain = pair(model, 0.1, 2)
    kept = maml.loss(*data)
    value = kept.item()
    maml.loss(*other)
    (4 * kept).backward()  # exact, wherever it is multiplied
    (4 * plain.loss(*data)).backward()
    same(state(maml, data), state(plain, data))
    assert kept.item() == value
    first = state(maml, data)
    handed = [p.grad for p in maml.parameters()]
    maml.zero_grad()
    maml.backward(*other)
    same(handed, first)
    once = maml.loss(*data)
    once.backward(retain_graph=True)
    once.backward()
    with pytest.raises(RuntimeError, match="second time"):
        once.backward()
    grads = torch.autograd.grad(maml.loss(*data), list(maml.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        grads[0].sum().backward()


def test_hooks_run_once_a_call(counts):
    model, data = make("mlp")
    found = []
    for maml in pair(model, 0.1, 2):
        first, second, *_ = maml.parameters()
        seen = []
        first.register_hook(lambda g: 2 * g)
        second.register_hook(lambda g, seen=seen: seen.append(g.clone()))
        second.register_post_accumulate_grad_hook(lambda p, s=seen: s.append(p.grad.clone()))
        for way in ("backward", "loss", "backward"):
            call(maml, data, way)
        found.append([*seen, *state(maml, data)])
        assert len(seen) == 6
    same(*found)


def test_layouts_and_expanded_inputs(counts):
    model, data = make("mlp")
    data[0] = data[0][:1].expand(3, 6, 4)
    data[2] = data[2].transpose(0, 2).contiguous().transpose(0, 2)
    with torch.no_grad():
        model[0].weight.set_(model[0].weight.t().contiguous().t())
    found = []
    for maml in pair(model, 0.1, 2):
        maml.backward(*data)
        found.append(state(maml, data))
        assert maml.model[0].weight.grad.stride() == model[0].weight.stride()
    same(*found)


CHANGES = {
    "lr": lambda maml: setattr(maml, "lr", 0.2),
    "steps": lambda maml: setattr(maml, "steps", 3),
    "first order": lambda maml: setattr(maml, "first_order", True),
    "eval": lambda maml: maml.eval(),
    "frozen": lambda maml: maml.model[0].weight.requires_grad_(False),
    "replaced": lambda maml: setattr(maml.model[2], "bias", nn.Parameter(torch.ones(3).double())),
    "layer": lambda maml: maml.model.__setitem__(1, nn.ReLU()),
    "data": lambda maml: setattr(maml.model[0].weight, "data", maml.model[0].weight.data + 1),
    "assigned": lambda maml: maml.load_state_dict(
        {n: 2 * t for n, t in maml.state_dict().items()}, assign=True
    ),
    "moved and back": lambda maml: maml.float().double(),
    "criterion": lambda maml: setattr(maml.criterion, "label_smoothing", 0.3),
    "class weights": lambda maml: setattr(maml.criterion, "weight", torch.ones(3).double()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_captured_anew(change, counts):
    model, data = make("mlp")
    learners = pair(model, 0.1, 2, loss=nn.CrossEntropyLoss())
    found = []
    for maml in learners:
        maml.backward(*data)
        maml.zero_grad()
        change(maml)
        for _ in range(2):
            maml.backward(*data)
        found.append(state(maml, data))
    same(*found)
    assert counts["capture"] == 2
    assert counts["replay"] == 3


INPUTS = {
    "shape": lambda data: [t[:2] for t in data],
    "strides": lambda data: [data[0].transpose(1, 2).contiguous().transpose(1, 2), *data[1:]],
    "labels": lambda data: [data[0], data[1].int(), *data[2:]],
    "gradient": lambda data: [data[0].clone().requires_grad_(), *data[1:]],
}


@pytest.mark.parametrize("change", INPUTS.values(), ids=INPUTS)
def test_signatures_have_graphs_of_their_own(change, counts):
    model, data = make("mlp")
    found = []
    for maml in pair(model, 0.1, 2):
        for batch in (data, change(data), data, change(data)):
            maml.backward(*batch)
        found.append(state(maml, data))
    same(*found)
    assert (counts["capture"], counts["replay"]) == (2, 4)


def test_settings_belong_to_the_signature(counts):
    model, data = make("mlp")
    maml, plain = pair(model.float(), 0.1, 2)
    data = [t.float() if t.is_floating_point() else t for t in data]

    def under(context):
        with context:
            assert torch.equal(maml.loss(*data), plain.loss(*data))

    for _ in range(2):
        under(torch.enable_grad())
        under(torch.no_grad())
        under(torch.inference_mode())
        under(torch.autocast("cpu", torch.bfloat16))
    # Inference mode is no_grad here.
    assert counts["capture"] == 3
    torch.use_deterministic_algorithms(True)
    try:
        maml.loss(*data)
    finally:
        torch.use_deterministic_algorithms(False)
    assert counts["capture"] == 4
    with torch.no_grad():
        assert not maml.loss(*data).requires_grad


def test_modes_that_alternate_keep_their_graphs(counts):
    model, data = make("dropout_eval")
    maml = MAML(model, 0.1, 2, cuda_graph=True)
    for _ in range(3):
        maml.train().backward(*data)
        maml.eval().backward(*data)
    assert counts["capture"] == 2


def test_few_graphs_are_kept(counts, monkeypatch):
    monkeypatch.setattr(graphed_step, "KEPT", 2)
    model, data = make("mlp")
    maml = MAML(model, 0.1, 1, cuda_graph=True)
    for tasks in (3, 2, 3, 1, 3, 2):  # 2 is the one that was not used for longest
        maml.backward(*[t[:tasks] for t in data])
    assert counts["capture"] == 4
    maml.model[0].weight.data = maml.model[0].weight.data.clone()
    maml.backward(*data)
    maml.backward(*[t[:2] for t in data])
    assert len(maml._graphs._known) == 2  # those of the old memory are gone


def test_copies_have_no_graphs(counts):
    model, data = make("mlp")
    maml = MAML(model, 0.1, 2, cuda_graph=True)
    maml.backward(*data)
    wanted = state(maml, data)
    for other in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        assert not other._graphs._known
        other.zero_grad()
        other.backward(*data)
        same(state(other, data), wanted)
    assert counts["capture"] == 3


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("options", [{}, {"task_chunk": 2}, {"first_order": True}], ids=str)
def test_random_numbers_come_as_without(options, steps, counts):
    model, data = make("dropout_eval")
    found = []
    for maml in pair(model.train(), 0.1, steps, **options):
        torch.manual_seed(3)
        values = [maml.backward(*data) for _ in range(3)]
        assert values[0] != values[1]
        found.append([*values, *state(maml, data)])
    same(*found)
    assert counts["capture"] == 1


class Counts(nn.Module):
    """A loss that writes a buffer in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, prediction, target):
        self.calls += 1
        return self.scale * F.mse_loss(prediction, target)


def test_buffers_of_a_loss_are_written_as_often_as_without(counts):
    model, data = make("mlp")
    data[1], data[3] = (F.one_hot(y, 3).double() for y in (data[1], data[3]))
    found = []
    for maml in pair(model, 0.1, 2, loss=Counts()):
        for _ in range(3):
            maml.backward(*data)
        found.append([maml.criterion.calls, *state(maml, data)])
    same(*found)
    assert counts["capture"] == 1


def padded(data):
    support_x, support_y, *query = (t.clone() for t in data)
    support_y[0, :2] = -100
    return [support_x, support_y, *query]


def test_padding_that_mixes_runs_without(counts):
    model, data = make("conv_bn")
    found = []
    for maml in pair(model, 0.1, 2):
        for batch in (padded(data), data, padded(data), data):
            maml.backward(*batch)
        found.append(state(maml, data))
    same(*found)
    # The first is known to be padded after one warm-up.
    assert counts == {"warm_up": 2, "strict": 2, "capture": 1, "replay": 2}


def test_padding_that_does_not_mix_is_replayed(counts):
    model, data = make("mlp")
    found = []
    for maml in pair(model, 0.1, 2, loss=nn.CrossEntropyLoss(ignore_index=1)):
        for batch in (data, padded(data)):
            maml.backward(*batch)
        found.append(state(maml, data))
    same(*found)
    assert (counts["capture"], counts["replay"]) == (1, 2)


class Twice(nn.Module):
    """What reads more than its own: its parameters come from elsewhere."""

    def __init__(self, other):
        super().__init__()
        self.layer, self.other = nn.Linear(4, 3).double(), [other]

    def forward(self, x):
        return self.layer(x) * self.other[0]


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 3).double(), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x)


class HostDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x):
        import random

        return self.layer(x) * random.random()


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: Twice(torch.tensor(2.0, requires_grad=True)), "from outside the modules"),
        (Counting, "changes the module"),
        (HostDropout, "random numbers are drawn on the host"),
    ],
)
def test_models_without_a_graph_say_why_once(build, reason, counts):
    import random

    _, data = make("mlp")
    found = []
    model = build()
    for maml in pair(model, 0.1, 1, strategy="vmap"):
        random.seed(4)
        values = []
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            values = [maml.backward(*data) for _ in range(3)]
        told = [str(w.message) for w in said if "cuda_graph" in str(w.message)]
        assert len(told) == (maml._graphs is not None)
        assert all(reason in text for text in told)
        found.append([*values, *state(maml, data)])
    same(*found)
    assert not counts["replay"]


def test_a_model_that_vmap_cannot_map_runs_without(counts):
    model, data = make("branches")
    maml = MAML(model, 0.1, 2, cuda_graph=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            maml.backward(*data)
    told = [str(w.message) for w in said]
    assert (
        sum("cuda_graph=True without a graph, because tasks run one after" in t for t in told) == 1
    )
    assert not counts["capture"]
    assert maml.plan().strategy == "loop"


def test_a_capture_that_fails(counts, monkeypatch):
    monkeypatch.setattr(StandIn, "fails", RuntimeError("operation not permitted\nmore of it"))
    model, data = make("dropout_eval")
    found = []
    for maml in pair(model.train(), 0.1, 2):
        torch.manual_seed(2)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            values = [maml.backward(*data) for _ in range(2)]
        if maml._graphs is not None:
            assert "cannot be captured (RuntimeError: operation not permitted)" in str(
                said[0].message
            )
        assert len(said) == (maml._graphs is not None)
        assert not maml._runner.recording
        found.append([*values, *state(maml, data)])
    same(*found)
    assert counts["capture"] == 1
    monkeypatch.setattr(StandIn, "fails", torch.OutOfMemoryError("no memory"))
    with pytest.raises(torch.OutOfMemoryError):
        MAML(model, 0.1, 2, cuda_graph=True).backward(*data)


def test_errors_of_the_user_are_the_usual_ones(counts):
    model, data = make("mlp")
    maml = MAML(model, 0.1, 2, cuda_graph=True)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"MAML\.backward: query_x must be"):
            maml.backward(data[0], data[1], data[2][:2], data[3][:2])
        with pytest.raises(TypeError, match="support_y must be a tensor"):
            maml.backward(data[0], None, *data[2:])
    with pytest.raises(TypeError, match="cuda_graph must be True or False"):
        MAML(model, 0.1, 2, cuda_graph=1)


def test_transforms_and_swapped_parameters_run_without(counts):
    model, data = make("mlp")
    maml, plain = pair(model, 0.1, 2)
    values = {n: 2 * p.detach() for n, p in maml.named_parameters()}
    found = [torch.func.functional_call(m, values, tuple(data)) for m in (maml, plain)]
    assert torch.equal(*found)
    grads = [
        torch.func.grad(lambda v, m=m: torch.func.functional_call(m, v, tuple(data)))(values)
        for m in (maml, plain)
    ]
    same(list(grads[0].values()), list(grads[1].values()))
    assert not counts["capture"]


def test_nothing_happens_on_the_cpu():
    model, data = make("mlp")
    found = []
    for maml in pair(model, 0.1, 2):
        maml.backward(*data)
        found.append(state(maml, data))
        assert "graph" not in maml.plan().reason
    same(*found)
