"""MAML on a GPU: the CPU's numbers, and nothing that makes the host wait."""

import gc
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

import fastmeta as fm
import fastmeta._cuda_recorder as cuda_recorder


@contextmanager
def no_waiting():
    """Anything that makes the host wait for the GPU is an error meanwhile."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def sinusoid():
    return fm.nn.MLP([1, 40, 40, 1])


def classifier():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))


def conv_bn():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def dropout():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 5)
    )


def tasks(build, device, dtype=torch.float32, seed=0, *, count=4, padded=False):
    """Supports and queries of ``count`` tasks."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for rows in (10, 15):
        if build is sinusoid:
            x = 10 * torch.rand(count, rows, 1, generator=generator) - 5
            made += [x.to(dtype), x.sin().to(dtype)]
            continue
        x = torch.randn(count, rows, 1, 4, 4, generator=generator).to(dtype)
        y = torch.arange(count * rows).reshape(count, rows) % 5
        if padded:
            y[0, :3] = -100
        made += [x, y]
    return [t.to(device) for t in made]


def learner(build, device, dtype=torch.float32, *, steps=2, **options):
    torch.manual_seed(0)
    model = build().to(device=device, dtype=dtype)
    loss = "mse" if build is sinusoid else "cross_entropy"
    return fm.MAML(model, lr=0.05, steps=steps, loss=loss, **options)


def gradients(maml):
    return {n: p.grad.detach().cpu() for n, p in maml.named_parameters() if p.grad is not None}


def close(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    largest = max(w.norm() for w in wanted.values())
    for name, w in wanted.items():
        error = (found[name] - w).norm()
        assert error <= tolerance * max(w.norm(), 1e-3 * largest), f"{name}: {error:.1e}"


OPTIONS = {
    "second": {},
    "first": {"first_order": True},
    "scalar": {"learn_lr": "scalar"},
    "parameter": {"learn_lr": "parameter", "lr_per_step": True},
    "element": {"learn_lr": "element"},
    "head": {"adapt": "*.weight"},
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("build", [sinusoid, classifier])
def test_nothing_waits_for_the_device(build, options, steps, gpu):
    maml = learner(build, gpu, steps=steps, **options)
    data = tasks(build, gpu, padded=build is classifier)

    def calls():
        maml.backward(*data)
        maml.loss(*data).backward()
        maml(*data[:3]).square().mean().backward()
        with torch.no_grad():
            maml.adapt(*data[:2])(data[2])

    calls()
    with no_waiting():
        calls()
    assert maml.plan().strategy == "vmap"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("build", [sinusoid, classifier, conv_bn])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_numbers_of_the_cpu(build, options, padded, device):
    found = {}
    for place in (torch.device("cpu"), device):
        maml = learner(build, place, torch.float64, steps=3, **options)
        value = maml.backward(*tasks(build, place, torch.float64, padded=padded))
        found[place] = {**gradients(maml), "loss": value.cpu()}
    close(found[device], found[torch.device("cpu")], 1e-9)


def test_batch_norm_has_to_look(gpu):
    maml = learner(conv_bn, gpu)
    data = tasks(conv_bn, gpu)
    maml.backward(*data)
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        maml.backward(*data)


def learners(build, device, dtype=torch.float64, **options):
    """A learner with graphs and one without, of equal numbers."""
    return [learner(build, device, dtype, cuda_graph=on, **options) for on in (True, False)]


def replays(maml):
    return maml.plan().reason.endswith("replayed as a CUDA graph")


GRAPHED = {
    **OPTIONS,
    "chunks": {"task_chunk": 3},
    "one step": {"steps": 1},
    "five steps": {"steps": 5},
    "loop": {"strategy": "loop"},
}


@pytest.mark.parametrize("way", ["backward", "loss"])
@pytest.mark.parametrize("options", GRAPHED.values(), ids=GRAPHED)
@pytest.mark.parametrize("build", [sinusoid, classifier, conv_bn])
def test_a_graph_takes_the_steps_of_a_run_without(build, options, way, gpu):
    runs = []
    for maml in learners(build, gpu, **options):
        optimizer = torch.optim.SGD(maml.parameters(), 0.02, momentum=0.9)
        values = []
        for seed in range(5):
            data = tasks(build, gpu, torch.float64, seed)
            optimizer.zero_grad()
            if way == "backward":
                values.append(maml.backward(*data))
            else:
                values.append(maml.loss(*data))
                values[-1].backward()
            optimizer.step()
        assert replays(maml) == (maml._graphs is not None)
        numbers = {n: t.detach().cpu().double() for n, t in maml.state_dict().items()}
        runs.append({**numbers, "values": torch.stack(values).detach().cpu()})
    close(*runs, 1e-9)


def test_a_graph_of_conv4(gpu):
    runs = []
    for on in (True, False):
        torch.manual_seed(0)
        model = fm.nn.Conv4(1, 16, image_size=28, num_classes=5)
        maml = fm.MAML(model.to(gpu).double(), lr=0.05, steps=3, cuda_graph=on)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            x = torch.randn(3, 20, 1, 28, 28, generator=generator, dtype=torch.float64).to(gpu)
            y = (torch.arange(60).reshape(3, 20) % 5).to(gpu)
            maml.backward(x[:, :5], y[:, :5], x[:, 5:], y[:, 5:])
        assert replays(maml) == on
        buffers = {n: b.cpu().double() for n, b in maml.named_buffers()}
        runs.append({**gradients(maml), **buffers})
    close(*runs, 1e-9)


def test_a_graph_gives_gradients_of_inputs(gpu):
    runs = []
    for maml in learners(classifier, gpu):
        data = tasks(classifier, gpu, torch.float64)
        data[0].requires_grad_()
        data[2].requires_grad_()
        for _ in range(3):
            maml.backward(data[0], data[1], 2 * data[2], data[3])
        runs.append({**gradients(maml), "s": data[0].grad.cpu(), "q": data[2].grad.cpu()})
    close(*runs, 1e-9)


def test_a_graph_under_autocast(gpu):
    runs = []
    for maml in learners(classifier, gpu, torch.float32):
        with torch.autocast("cuda", torch.bfloat16):
            for seed in range(3):
                maml.backward(*tasks(classifier, gpu, seed=seed))
        assert replays(maml) == (maml._graphs is not None)
        runs.append(gradients(maml))
    close(*runs, 1e-2)


def test_replays_do_not_wait_and_hand_out_copies(gpu):
    maml = learner(classifier, gpu, cuda_graph=True)
    data, other = tasks(classifier, gpu), tasks(classifier, gpu, seed=1)
    maml.backward(*data)
    wanted = gradients(maml)
    with no_waiting():
        maml.zero_grad()
        first = maml.backward(*data)
        kept = {n: p.grad for n, p in maml.named_parameters()}
        maml.zero_grad()
        late = maml.loss(*data)
        second = maml.backward(*other)
        maml.zero_grad()
        late.backward()
    close({n: g.cpu() for n, g in kept.items()}, wanted, 1e-6)
    close(gradients(maml), wanted, 1e-6)
    assert first.item() == late.item() != second.item()


def test_padded_tasks_beside_graphs(gpu):
    for build in (classifier, conv_bn):
        runs = []
        for maml in learners(build, gpu):
            for padded in (True, False, True, False):
                maml.backward(*tasks(build, gpu, torch.float64, padded=padded))
            assert replays(maml) == (maml._graphs is not None)
            runs.append(gradients(maml))
        close(*runs, 1e-9)


@pytest.mark.parametrize("steps", [1, 3])
def test_replays_draw_other_random_numbers(steps, gpu):
    runs = []
    for maml in learners(dropout, gpu, steps=steps):
        torch.manual_seed(7)
        data = tasks(dropout, gpu, torch.float64)
        values = torch.stack([maml.backward(*data) for _ in range(4)]).cpu()
        assert len(set(values.tolist())) == 4
        assert replays(maml) == (maml._graphs is not None)
        runs.append({**gradients(maml), "values": values, "next": torch.rand(3, device=gpu).cpu()})
    close(*runs, 1e-9)  # the same as without a graph, and as many of them


class Waits(nn.Module):
    """What makes the host wait in every pass."""

    def __init__(self):
        super().__init__()
        self.layers = dropout()
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return self.layers(x) * self.scale.item()


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "in the capture"])
def test_what_cannot_be_captured_runs_on(noticed, gpu, monkeypatch):
    before = learner(dropout, gpu, torch.float64, cuda_graph=True)
    data = tasks(dropout, gpu, torch.float64)
    before.backward(*data)
    if not noticed:
        monkeypatch.setattr(cuda_recorder, "_no_waiting", lambda strict: nullcontext())
    runs = []
    for maml in learners(Waits, gpu, steps=1):
        torch.manual_seed(5)
        if maml._graphs is None:
            values = [maml.backward(*data) for _ in range(3)]
        else:
            with pytest.warns(UserWarning, match="cannot be captured"):
                values = [maml.backward(*data)]
            values += [maml.backward(*data) for _ in range(2)]
            assert not replays(maml)
        values = torch.stack(values).cpu()
        runs.append({**gradients(maml), "values": values, "next": torch.rand(3, device=gpu).cpu()})
    close(*runs, 1e-9)
    # Streams, random numbers, other graphs and new ones are as if nothing had been.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert len({before.backward(*data).item() for _ in range(3)}) == 3
    after = learner(dropout, gpu, torch.float64, cuda_graph=True)
    assert len({after.backward(*data).item() for _ in range(3)}) == 3
    assert replays(before)
    assert replays(after)
    torch.cuda.synchronize()


@pytest.mark.parametrize("way", ["backward", "loss"])
@pytest.mark.parametrize("build", [sinusoid, conv_bn, dropout])
def test_replays_take_no_memory(build, way, gpu):
    maml = learner(build, gpu, steps=3, cuda_graph=True)
    data = tasks(build, gpu)

    def step():
        maml.zero_grad()
        maml.backward(*data) if way == "backward" else maml.loss(*data).backward()

    for _ in range(3):
        step()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(50):
        step()
    assert torch.cuda.memory_allocated() == held
    numbers = sum(p.numel() for p in maml.parameters()) + sum(t.numel() for t in data)
    assert torch.cuda.max_memory_allocated() - held <= 8 * numbers + 512 * 64


def test_graphs_go_with_their_learner(gpu):
    torch.cuda.synchronize()
    learner(conv_bn, gpu, cuda_graph=True).backward(*tasks(conv_bn, gpu))
    gc.collect()
    held = torch.cuda.memory_allocated()
    for _ in range(3):
        learner(conv_bn, gpu, cuda_graph=True).backward(*tasks(conv_bn, gpu))
        gc.collect()
        assert torch.cuda.memory_allocated() == held


def test_changes_are_captured_anew(gpu):
    runs = []
    for maml in learners(classifier, gpu):
        data = tasks(classifier, gpu, torch.float64)
        maml.backward(*data)
        for change in (
            lambda maml: setattr(maml, "lr", 0.2),
            lambda maml: maml.model[1].bias.requires_grad_(False),
            lambda maml: maml.float().double(),
            lambda maml: maml.load_state_dict(
                {n: t + 1 for n, t in maml.state_dict().items()}, assign=True
            ),
        ):
            change(maml)
            for _ in range(2):
                maml.backward(*data)
        runs.append(gradients(maml))
    close(*runs, 1e-9)
