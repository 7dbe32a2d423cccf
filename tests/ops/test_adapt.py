"""The engine's ops against plain unrolling of the module that a program stands for, in float64."""

import pytest
import torch
from enginecases import CASES, LOSSES, Case, rates_of, relative_error, tasks, unroll
from opcases import isas, use_isa
from torch import nn

from fastmeta.ops._engine_program import parse
from fastmeta.ops.engine import WANTED, adapt, meta_step

ALL = sum(WANTED.values())
#: Biases before batch norm have a gradient of exactly zero, which is all rounding: not relative.
FLOOR = 1e-3


@pytest.fixture(autouse=True)
def _one_thread():
    """The problems are tiny: torch's own threads would only wait for each other."""
    torch.set_num_threads(1)


class Problem:
    """A case made ready: the op's inputs, and the truth's, which are the same tensors."""

    def __init__(self, name, loss="cross_entropy", kind="scalar", per_step=False, steps=2, **sizes):
        case = CASES[name] if isinstance(name, str) else name
        self.module = case.make()
        text, self.loss = LOSSES[loss]
        self.text, self.fast_names, self.shared_names = case.text(self.module, text)
        values = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        self.fast = [values[n] for n in self.fast_names]
        self.shared = [values[n] for n in self.shared_names]
        self.rates = rates_of(kind, per_step, steps, self.fast).requires_grad_()
        self.data = tasks(case.shape, targets=loss in ("mse", "huber", "bce"), **sizes)
        self.data[0].requires_grad_()
        self.data[2].requires_grad_()
        self.steps = steps

    @property
    def tensors(self):
        """What has a gradient, in the order of the op's results."""
        shared = [t for t in self.shared if t.requires_grad]
        return [*self.fast, *shared, self.rates, self.data[0], self.data[2]]

    @property
    def inputs(self):
        """The op's arguments up to the queries."""
        return (self.text, self.fast, self.shared, self.rates, *self.data[:3])

    def truth(self, first_order=False):
        """Losses, prediction, adapted weights."""
        names = self.fast_names, self.shared_names
        return unroll(
            self.module, *names, self.rates, self.data, self.steps, self.loss, first_order
        )

    def agree(self, found, wanted, bound=1e-9):
        pairs = zip(self.tensors, wanted, strict=False)
        wanted = [torch.zeros_like(t) if w is None else w for t, w in pairs]
        error = relative_error(found, wanted, FLOOR)
        assert error < bound, f"relative error {error:.1e}"

    def check_meta_step(self, first_order=False):
        losses, _, _ = self.truth(first_order)
        wanted = torch.autograd.grad(losses.mean(), self.tensors, allow_unused=True)
        found = meta_step(*self.inputs, self.data[3], self.steps, 0, first_order, ALL)
        assert relative_error(found[:1], [losses.mean()]) < 1e-9
        on_shared = [g for g, t in zip(found[2], self.shared, strict=True) if t.requires_grad]
        for g, t in zip(found[2], self.shared, strict=True):
            assert t.requires_grad or not g.any()
        self.agree([*found[1], *on_shared, *found[3:]], wanted)

    def check_adapt(self, first_order=False):
        _, prediction, ends = self.truth(first_order)
        weights = [torch.cos(torch.arange(t.numel()).double()).view_as(t) for t in ends]
        scalar = prediction.sin().sum() + sum(
            (w * t).sum() for w, t in zip(weights, ends, strict=True)
        )
        wanted = torch.autograd.grad(scalar, self.tensors, allow_unused=True)
        out, adapted, _ = adapt(*self.inputs, self.steps, 0, first_order, True, True)
        assert relative_error([out, *adapted], [prediction, *ends]) < 1e-9
        scalar = out.sin().sum() + sum((w * t).sum() for w, t in zip(weights, adapted, strict=True))
        found = torch.autograd.grad(scalar, self.tensors, materialize_grads=True)
        self.agree(found, wanted)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("name", list(CASES))
def test_every_layer(name, first_order, isa):
    problem = Problem(name)
    with use_isa(isa):
        problem.check_meta_step(first_order)
        problem.check_adapt(first_order)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("name", list(CASES))
def test_every_layer_in_float32(name, isa):
    """Against float64: to rounding, for no activation here changes sides by it."""
    problem = Problem(name, steps=3)
    wanted = meta_step(*problem.inputs, problem.data[3], 3, 0, False, ALL)

    def single(value):
        if isinstance(value, list):
            return [single(v) for v in value]
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.detach().float() if floating else value

    inputs = [single(value) for value in (*problem.inputs, problem.data[3])]
    with use_isa(isa):
        found = meta_step(*inputs, 3, 0, False, ALL)
    for a, b in zip(found, wanted, strict=True):
        pair = (a, b) if isinstance(a, list) else ([a], [b])
        error = relative_error([t.double() for t in pair[0]], pair[1], 1e-2)
        assert error < 2e-4, f"relative error {error:.1e}"


@pytest.mark.parametrize("steps", [0, 20])
@pytest.mark.parametrize("name", list(CASES))
def test_every_layer_over_no_and_many_steps(name, steps):
    Problem(name, steps=steps, kind="element", per_step=True).check_meta_step()


@pytest.mark.parametrize("name", ["linear", "deep", "conv_batch_norm"])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_every_loss(loss, name):
    Problem(name, loss).check_meta_step()
    Problem(name, loss).check_adapt()


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("steps", [0, 1, 2, 5, 20])
@pytest.mark.parametrize("name", ["linear", "deep", "conv_batch_norm"])
def test_any_number_of_steps(name, steps, first_order):
    problem = Problem(name, steps=steps)
    problem.check_meta_step(first_order)
    problem.check_adapt(first_order)


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("kind", ["scalar", "parameter", "element"])
@pytest.mark.parametrize("name", ["linear", "deep", "tied", "conv_batch_norm", "frozen"])
def test_rates_of_every_granularity(name, kind, per_step):
    for first_order in (False, True):
        problem = Problem(name, kind=kind, per_step=per_step, steps=3)
        problem.check_meta_step(first_order)
        problem.check_adapt(first_order)


@pytest.mark.parametrize(
    "sizes",
    [
        {"count": 1, "support": 1, "query": 1},
        {"count": 1, "support": 30, "query": 1},
        {"count": 9, "support": 2, "query": 17},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["linear", "deep", "conv", "residual"])
def test_small_and_odd_sizes(name, sizes):
    Problem(name, **sizes).check_meta_step()
    Problem(name, **sizes).check_adapt()


@pytest.mark.parametrize("support", [1, 2, 3])
@pytest.mark.parametrize("width", [*range(1, 10), 15, 16, 17, 33])
def test_first_layers_of_any_width(width, support):
    """With few supports these are kept as Gram matrices, whose sums end where the rows end."""
    case = Case(
        lambda: nn.Sequential(nn.Linear(width, 20), nn.Tanh(), nn.Linear(20, 3)),
        f"in={width};" + "linear(0,w={0.weight},b={0.bias},out=20);tanh(1);"
        "linear(2,w={2.weight},b={2.bias},out=3)",
        (width,),
    )
    problem = Problem(case, support=support, query=4, steps=3)
    problem.check_meta_step()
    problem.check_adapt()


@pytest.mark.parametrize("width", [8, 16, 32])
def test_rates_of_each_number_without_padding(width):
    """As many numbers in the engine's layout as in torch's, in another order."""
    case = Case(
        lambda: nn.Linear(width, width),
        f"in={width};linear(0,w={{weight}},b={{bias}},out={width})",
        (width,),
    )
    Problem(case, kind="element").check_meta_step()


@pytest.mark.parametrize("name", ["linear", "conv_batch_norm"])
def test_no_queries_and_no_tasks(name):
    problem = Problem(name, query=0)
    _, _, ends = problem.truth()
    wanted = torch.autograd.grad(ends[0].square().sum(), problem.tensors[:-1], allow_unused=True)
    out, adapted, _ = adapt(*problem.inputs, 2, 0, False, True, True)
    assert out.shape == (3, 0, 3)
    found = torch.autograd.grad(
        adapted[0].square().sum(), problem.tensors[:-1], materialize_grads=True
    )
    problem.agree(found, wanted)
    none = Problem(name, count=0)
    out, adapted, _ = adapt(*none.inputs, 2, 0, False, True, True)
    assert out.shape == (0, 4, 3)
    assert adapted[0].shape == (0, *none.fast[0].shape)
    grads = torch.autograd.grad(out.sum() + adapted[0].sum(), none.tensors, materialize_grads=True)
    assert not any(g.any() for g in grads)


def weighted(text, weights):
    """A cross-entropy with class weights as the shared tensor ``weights``."""
    return text.replace("smoothing=0.0,", f"smoothing=0.2,weight=s{weights},")


@pytest.mark.parametrize("ignored", [False, True])
def test_class_weights(ignored):
    problem = Problem("deep")
    weight = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
    problem.text = weighted(problem.text, 0)
    problem.shared = [weight]
    problem.loss = lambda p, y: torch.nn.functional.cross_entropy(p, y, weight, label_smoothing=0.2)
    if ignored:
        problem.data[1][:, 2:4] = -100
        problem.data[3][1, 0] = -100
    problem.shared_names = []
    losses, _, _ = problem.truth()
    wanted = torch.autograd.grad(losses.mean(), problem.tensors)
    found = meta_step(*problem.inputs, problem.data[3], 2, 0, False, ALL)
    assert relative_error(found[:1], [losses.mean()]) < 1e-9
    problem.agree([*found[1], *found[3:]], wanted)
    assert not found[2][0].any()


@pytest.mark.parametrize("name", ["linear", "deep"])
def test_supports_that_do_not_count(name):
    problem = Problem(name)
    problem.data[1][0] = -100  # a task that does not adapt
    problem.data[1][1, ::2] = -100

    def mean(prediction, labels):
        total = torch.nn.functional.cross_entropy(prediction, labels, reduction="sum")
        return total / (labels != -100).sum().clamp(min=1)

    problem.loss = mean
    problem.check_meta_step()
    problem.check_adapt()


@pytest.mark.parametrize("bit", list(WANTED))
def test_only_what_is_wanted_comes_back(bit):
    problem = Problem("frozen")
    whole = meta_step(*problem.inputs, problem.data[3], 2, 0, False, ALL)[1:]
    part = meta_step(*problem.inputs, problem.data[3], 2, 0, False, WANTED[bit])[1:]
    for name, full, alone in zip(WANTED, whole, part, strict=True):
        full, alone = ([t] if isinstance(t, torch.Tensor) else t for t in (full, alone))
        for a, b in zip(full, alone, strict=True):
            if name == bit:
                torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
            else:
                assert b.shape == (0,)


def test_nothing_is_returned_that_was_not_asked_for():
    problem = Problem("deep")
    with torch.no_grad():
        out, adapted, trajectory = adapt(*problem.inputs, 2, 0, False, False, False)
    assert out.shape == (3, 4, 3)
    assert {tuple(t.shape) for t in (*adapted, trajectory)} == {(0,)}
    _, _, trajectory = adapt(*problem.inputs, 2, 0, False, False, True)
    assert trajectory.shape == (3, 2, sum(p.numel() for p in problem.fast))


@pytest.mark.parametrize("name", ["linear", "tied", "frozen", "conv_batch_norm"])
def test_opcheck(name):
    problem = Problem(name)
    torch.library.opcheck(
        torch.ops.fastmeta.adapt.default, (*problem.inputs, 2, 0, False, True, True)
    )
    detached = [[t.detach() for t in a] if isinstance(a, list) else a for a in problem.inputs]
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in detached]
    grads = [torch.randn(3, *p.shape).double() for p in problem.fast]
    trajectory = torch.ops.fastmeta.adapt(*detached, 2, 0, False, True, True)[2]
    for wanted in (ALL, 5):
        torch.library.opcheck(
            torch.ops.fastmeta.meta_step.default,
            (*detached, problem.data[3], 2, 0, False, wanted),
        )
        backward = (2, 0, False, wanted, trajectory, torch.randn(3, 4, 3).double(), grads)
        torch.library.opcheck(torch.ops.fastmeta.adapt_backward.default, (*detached, *backward))


def test_a_second_differentiation_is_refused():
    problem = Problem("deep")
    out, _, _ = adapt(*problem.inputs, 2, 0, False, False, True)
    gradient = torch.autograd.grad(out.square().sum(), problem.fast, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*strategy='vmap'"):
        gradient[0].sum().backward()


def test_under_torch_func_and_compile():
    problem = Problem("deep")
    tensors = [t.detach() for t in problem.tensors]

    def scalar(*tensors):
        fast, (rates, support_x, query_x) = list(tensors[:-3]), tensors[-3:]
        arguments = (problem.text, fast, [], rates, support_x, problem.data[1], query_x)
        return adapt(*arguments, 2, 0, False, False, True)[0].square().sum()

    wanted = torch.autograd.grad(scalar(*problem.tensors), problem.tensors)
    positions = tuple(range(len(tensors)))
    found = torch.func.grad(scalar, argnums=positions)(*tensors)
    assert relative_error(found, wanted) < 1e-12
    compiled = torch.compile(scalar, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*problem.tensors), problem.tensors)
    assert relative_error(found, wanted) < 1e-12
    batch = [torch.stack([t, 0.9 * t]) for t in tensors]
    mapped = torch.vmap(torch.func.grad(scalar, argnums=positions))(*batch)
    assert relative_error([m[0] for m in mapped], wanted) < 1e-12
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(scalar, tuple(tensors), tuple(tensors))


@pytest.mark.parametrize("name", ["deep", "conv_batch_norm"])
def test_results_do_not_depend_on_threads_or_chance(name):
    problem = Problem(name, count=7)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(meta_step(*problem.inputs, problem.data[3], 2, 0, False, ALL))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            for x, y in zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]:
                assert torch.equal(x, y)


def test_strided_inputs():
    problem = Problem("conv_batch_norm")
    wanted = meta_step(*problem.inputs, problem.data[3], 2, 0, False, ALL)
    text, fast, shared, rates, support_x, support_y, query_x = problem.inputs
    with torch.no_grad():
        fast = [p.mT.contiguous().mT if p.dim() > 1 else p.repeat_interleave(2)[::2] for p in fast]
        support_x = support_x.movedim(0, -1).contiguous().movedim(-1, 0)
        query_x = query_x.mT.contiguous().mT
        support_y = support_y.T.contiguous().T
    found = meta_step(
        text, fast, shared, rates, support_x, support_y, query_x, problem.data[3], 2, 0, False, ALL
    )
    assert relative_error([found[0], *found[1]], [wanted[0], *wanted[1]], FLOOR) < 1e-12


@pytest.mark.parametrize("name", list(CASES))
def test_a_program_reads_as_it_is_written(name):
    text = CASES[name].text(CASES[name].make(), "mse()")[0]
    program = parse(text)
    assert program.text() == text
    assert program.output == (3,)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fm0;in=4;relu(0);loss=mse()",
        "fm1;in=4;loss=mse",
        "fm1;in=4;unknown(0);loss=mse()",
        "fm1;in=4;relu(1);loss=mse()",
        "fm1;in=4;linear(0,w=x0,out=3);loss=mse()",
        "fm1;in=1x2x2;linear(0,w=f0,out=3);loss=mse()",
        "fm1;in=1x2x2;conv2d(0,w=f0,out=2,k=3x3,s=1x1,p=0x0,d=1x1,g=1);loss=mse()",
        "fm1;in=2;linear(0,w=f0,out=3);add(0+1);loss=mse()",
        "fm1;in=2;linear(0,w=f0,out=2);add(1+-1);loss=mse()",
        "fm1;in=2;linear(0,w=f0,out=2,g=0);loss=mse()",
        "fm1;in=2;linear(0,w=f0,out=2);batch_norm(1,mean=s0);loss=mse()",
        *(
            f"fm1;in=1x4x4;conv2d(0,w=f0,out=2,{window},g=1);flatten(1);loss=mse()"
            for window in (
                "k=-1x-1,s=1x1,p=0x0,d=1x1",
                "k=2x2,s=0x1,p=0x0,d=1x1",
                "k=2x2,s=1x1,p=0x-1,d=1x1",
                "k=2x2,s=1x1,p=0x0,d=0x0",
            )
        ),
    ],
)
def test_what_is_no_program_is_refused(text):
    with pytest.raises(ValueError, match="adapt: program must be a program of version fm1"):
        parse(text)
    # By the op, too, which may be called without Python's look at the program.
    x = torch.ones(1, 2, 1, 4, 4) if "x4x4" in text else torch.ones(1, 2, 2)
    fast, shared = [torch.ones(2, 1, 2, 2)], [torch.ones(2)]
    arguments = (text, fast, shared, torch.ones(1, 1), x, torch.ones(1, 2, 2), x)
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.fastmeta.adapt(*arguments, 1, 0, False, False, False)


def test_a_prediction_that_nothing_adapted_influences_is_refused():
    text = "fm1;in=4;linear(0,w=f0,out=3);relu(0);loss=mse()"
    x = torch.ones(1, 2, 4)
    arguments = (text, [torch.ones(3, 4)], [], torch.ones(1, 1), x, x, x)
    with pytest.raises((ValueError, RuntimeError)):
        adapt(*arguments, 1, 0, False, False, False)


@pytest.mark.parametrize("wrong", ["fast", "shared", "turned"])
def test_a_parameter_of_another_shape_is_refused(wrong):
    """By the kernel: the reference meets torch's own complaint."""
    text = "fm1;in=4;linear(0,w=s0,out=3);linear(1,w=f0,out=3);loss=mse()"
    fast, shared = torch.ones(3, 3), torch.ones(3, 4)
    if wrong == "fast":
        fast = fast[:2]
    else:
        shared = shared[:2] if wrong == "shared" else shared.t().contiguous()
    x, y = torch.ones(1, 2, 4), torch.ones(1, 2, 3)
    with pytest.raises((ValueError, RuntimeError)):
        adapt(text, [fast], [shared], torch.ones(1, 1), x, y, x, 1, 0, False, False, False)
