"""The CUDA kernels of matching_attention and matching_nll, emulated, against the definition."""

from __future__ import annotations

import opcases
import pytest
import torch
from cuda_emulation.cases import DTYPES, SIMILARITIES, Case, acc_of, check, check_budget

# T, Q, S, C, D: ones; odd sizes; one tile exactly; tiles crossed on both sides; a class a support
# over several tiles; one class; slices of features crossed, in packs and one by one.
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 3, 5, 4, 7),
    (1, 64, 64, 5, 16),
    (2, 67, 131, 4, 5),
    (1, 2, 70, 70, 8),
    (2, 4, 9, 1, 36),
    (1, 3, 7, 3, 132),
    (1, 2, 5, 2, 67),
]


@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_match_the_definition(emulation, shape, similarity, dtype, nll):
    if dtype in ("bfloat16", "float16") and shape[0] * shape[1] * shape[2] > 2000:
        shape = (1, 5, 66, 3, 12)  # storage is all that differs from float32
    check(emulation, Case(*shape, similarity, DTYPES[dtype]), nll)


@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=case.name,
            marks=[pytest.mark.slow] if case.queries * case.supports * case.dim > 5e4 else [],
        )
        for case in opcases.CASES
    ],
)
def test_shared_cases_match_the_definition(emulation, case, similarity, nll):
    check_budget(emulation, Case.of(case, similarity, torch.float32), nll)


@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", ["dot", "additive"])
def test_scale_and_weight_shared_by_the_tasks(emulation, similarity, nll):
    check(emulation, Case(3, 4, 6, 3, 8, similarity, torch.float32, shared=True), nll)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("similarity", ["dot", "additive"])
def test_rows_off_a_16_byte_boundary_are_read_one_by_one(emulation, similarity, dtype):
    aligned = Case(2, 5, 9, 3, 8, similarity, DTYPES[dtype])
    shifted = Case(2, 5, 9, 3, 8, similarity, DTYPES[dtype], offset=1)
    for name, value in check(emulation, aligned, False).items():
        assert torch.equal(value, shifted.run(emulation, nll=False)[name])


@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", ["cosine", "euclidean", "additive"])
def test_thread_order_and_grid_size_leave_the_bits_alone(emulation, similarity, nll):
    case = Case(2, 70, 67, 5, 20, similarity, torch.float32)
    first = case.run(emulation, nll=nll)
    schedules = [("random", 1, 2**31 - 1), ("random", 2, 3), ("forward", 0, 1), ("reverse", 0, 2)]
    for order, seed, max_grid in schedules:
        emulation.schedule(seed, order, max_grid)
        again = case.run(emulation, nll=nll)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_zero_vectors_and_coincident_points(emulation, similarity, nll):
    case = Case(2, 5, 9, 3, 12, similarity, torch.float32)
    case.query[0, 1] = 0
    case.support[0, 2] = 0
    case.support[1, 0] = case.query[1, 0]
    got = check(emulation, case, nll)
    assert all(not value.isnan().any() for value in got.values())
    if similarity == "cosine":
        kind = "nll" if nll else "logp"
        assert (got[f"{kind}_grad_query"][0, 1] == 0).all()
        assert (got[f"{kind}_grad_support"][0, 2] == 0).all()


@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_task_without_support_has_no_gradient(emulation, similarity, nll):
    case = Case(2, 4, 6, 3, 8, similarity, torch.float32)
    case.labels[1] = -100
    case.targets[:, :] = torch.tensor([0, 1, -100, 2])
    got = check(emulation, case, nll)
    kind = "nll" if nll else "logp"
    infinite = got[kind][1] == (torch.inf if nll else -torch.inf)
    assert infinite.equal(case.targets[1] >= 0) if nll else infinite.all()
    assert (got["lse"][1] == -torch.inf).all()
    for name, value in got.items():
        if "grad" in name:
            assert (value[1] == 0).all(), name


@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_what_padding_and_ignored_queries_hold_is_never_read(emulation, similarity, nll):
    case = Case(2, 5, 9, 3, 8, similarity, torch.float32)
    clean = case.run(emulation, nll=nll)
    outside = (case.labels < 0) | (case.labels >= 3)
    case.support[outside] = torch.nan
    ignored = torch.zeros_like(case.targets, dtype=torch.bool)
    if nll:
        ignored = (case.targets < 0) | (case.targets >= 3)
        assert ignored.any()
        case.query[ignored] = torch.nan
    again = case.run(emulation, nll=nll)
    for name in clean:
        if name == "lse":  # of an ignored query: nobody's business
            assert torch.equal(clean[name][~ignored], again[name][~ignored])
        else:
            assert torch.equal(clean[name], again[name]), name
    assert (again[f"{'nll' if nll else 'logp'}_grad_support"][outside] == 0).all()


def test_not_a_number_is_passed_on(emulation):
    case = Case(1, 3, 6, 2, 4, "dot", torch.float32)
    case.labels[:] = torch.tensor([0, 0, 0, 1, 1, 1])
    case.query[0, 1] = torch.nan
    got = case.run(emulation, nll=False)
    assert got["logp"][0, 1].isnan().all()
    assert not got["logp"][0, [0, 2]].isnan().any()


def test_large_scores_neither_overflow_nor_vanish(emulation):
    case = Case(1, 4, 12, 3, 8, "dot", torch.float32)
    case.scale[:] = 1e4
    for nll in (False, True):
        got = check(emulation, case, nll)
        assert all(not value.isnan().any() for value in got.values())


def test_lengths_of_rows_neither_overflow_nor_vanish(emulation):
    case = Case(1, 3, 6, 3, 8, "cosine", torch.float32)
    small = case.run(emulation, nll=False)["logp"]
    case.query *= 2.0**70
    case.support *= 2.0**-80
    emulation.check(case.run(emulation, nll=False)["logp"], small.double(), small)


def test_a_row_too_short_to_have_a_direction_is_as_zero(emulation):
    case = Case(1, 3, 6, 3, 8, "cosine", torch.float32)
    case.query[0, 1] = 1e-39
    got = case.run(emulation, nll=False)
    case.query[0, 1] = 0
    zero = case.run(emulation, nll=False)
    assert all(torch.equal(got[name], zero[name]) for name in got)


@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("queries", [3, 64])
def test_tiles_past_the_last_row_hold_no_infinities(emulation, queries, nll):
    """Vectors far from 0 and near each other: what is no row is infinitely far."""
    case = Case(1, queries, 5, 3, 8, "euclidean", torch.float32)
    case.query, case.support = (1e20 + x * 1e15 for x in (case.query, case.support))
    case.scale = case.scale * 1e-15
    got = case.run(emulation, nll=nll)
    kind = "nll" if nll else "logp"
    wanted = case.define(torch.float64)[f"{kind}_grad_scale"]
    torch.testing.assert_close(got[f"{kind}_grad_scale"].double(), wanted, rtol=1e-3, atol=0)
    directions = case.directions()
    for name in ("query", "support"):
        directions[name] = directions[name] * 1e19
    second = case.run_second(emulation, nll=nll, dots=directions)
    assert all(second[name].isfinite().all() for name in ("query", "support", "scale"))


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 2, 4), (2, 0, 3, 2, 4), (2, 3, 0, 2, 4), (2, 3, 4, 2, 0)], ids=str
)
def test_empty_sizes(emulation, shape, similarity):
    case = Case(*shape, similarity, torch.float32)
    for nll in (False, True):
        got = case.run(emulation, nll=nll)
        for name, value in got.items():
            if "grad" in name and shape[4]:
                assert (value == 0).all(), name
        if not shape[2]:
            assert (got["lse"] == -torch.inf).all()
        elif shape[0] and shape[1]:
            emulation.check(got["lse"], *[case.define(torch.float64)["lse"]] * 2)


@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_16_bit_types_without_tensor_cores(emulation, similarity, dtype, nll):
    emulation.module.tensor_cores(False)
    check(emulation, Case(2, 5, 66, 3, 36, similarity, DTYPES[dtype]), nll)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lengths_on_tensor_cores_neither_overflow_nor_vanish(emulation, dtype):
    case = Case(1, 5, 9, 3, 40, "cosine", DTYPES[dtype])
    up, down = (2.0**70, 2.0**-80) if dtype == "bfloat16" else (2.0**10, 2.0**-8)
    case.query, case.support = case.query * up, case.support * down
    check(emulation, case, False)


@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_tf32_where_it_is_allowed(emulation, similarity, nll):
    case = Case(2, 67, 70, 4, 36, similarity, torch.float32)
    exact = case.run(emulation, nll=nll)
    case.allow_tf32 = True
    rounded = case.run(emulation, nll=nll)
    emulation.module.tensor_cores(False)
    without = case.run(emulation, nll=nll)
    for name, value in exact.items():
        assert torch.equal(value, without[name])
        finite = value.isfinite()
        size = value[finite].abs().max().item()
        difference = (rounded[name] - value)[finite].abs().max().item()
        assert 0 < difference < 2**-7 * size, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_that_take_all_slices_give_the_bits_of_those_that_take_one(emulation, dtype):
    many = Case(256, 1, 2, 2, 132, "cosine", DTYPES[dtype])  # blocks enough without sharing a row
    one = Case(1, 1, 2, 2, 132, "cosine", DTYPES[dtype])
    for name in ("query", "support", "labels", "targets", "scale", "grad_logp", "grad_nll"):
        setattr(one, name, getattr(many, name)[7:8])
    together, alone = many.run(emulation, nll=True), one.run(emulation, nll=True)
    grids = [launch.grid for launch in emulation.launches() if "backward" in launch.what]
    assert grids[0] == 2 * 256  # blocks for the queries and for the supports
    assert grids[-1] > 2
    for name, value in alone.items():
        assert torch.equal(value, together[name][7:8]), name


# Of 11 tiles, on a device that wants 2, 3 and many blocks: classes within a split, over two and
# through some; a task whose last splits are empty.
SPLIT = [(1, 2, 700, 3, 4), (1, 2, 700, 60, 4), (1, 2, 700, 2, 4), (2, 3, 520, 9, 3)]


@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", ["dot", pytest.param("euclidean", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", SPLIT, ids=str)
def test_supports_that_blocks_share(emulation, shape, similarity, nll):
    case = Case(*shape, similarity, torch.float32)
    truth, peer = case.define(torch.float64), case.define(torch.float32)
    kind, seen = "nll" if nll else "logp", set()
    for multiprocessors in (1, 2, 128):
        emulation.module.multiprocessors(multiprocessors)
        got = case.forward(emulation, nll=nll)
        for name, value in zip((kind, "lse"), got, strict=True):
            emulation.check(value, truth[name], peer[name], 0.0, name)
        seen |= {launch.grid for launch in emulation.launches() if "splits" in launch.what}
        for order, seed, max_grid in [("random", 1, 2**31 - 1), ("reverse", 0, 1)]:
            emulation.schedule(seed, order, max_grid)
            assert all(map(torch.equal, got, case.forward(emulation, nll=nll)))
    assert seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(
    "shape", [(1, 2, 1100, 3, 8), (1, 1030, 3, 2, 5), (2, 3, 1030, 4, 7)], ids=str
)
def test_rows_of_the_other_side_that_blocks_share(emulation, shape, similarity, nll, dtype):
    """Gradients of few queries by many supports, and of few supports by many queries."""
    case = Case(*shape, similarity, DTYPES[dtype])
    if nll and case.targets[0, 0] < 0:
        case.query[0, 0] = torch.nan  # ignored
    whole = ["grad_query", "grad_support", "grad_scale", "grad_weight"]
    emulation.module.multiprocessors(1)
    alone = case.run(emulation, nll=nll)
    emulation.module.multiprocessors(128)
    got = case.run(emulation, nll=nll)
    assert any("backward: splits" in launch.what for launch in emulation.launches())
    for order, seed, max_grid in [("random", 1, 2**31 - 1), ("reverse", 0, 3)]:
        emulation.schedule(seed, order, max_grid)
        again = case.run(emulation, nll=nll)
        for name, value in got.items():
            assert torch.equal(value.nan_to_num(7.0), again[name].nan_to_num(7.0)), name
    case.query.nan_to_num_()
    truth, peer = case.define(torch.float64), case.define(acc_of(case.dtype))
    kind = "nll" if nll else "logp"
    names = [f"{kind}_{part}" for part in whole if f"{kind}_{part}" in got]
    size = 64 * max(float(truth[name].abs().max()) for name in names)  # of sums of many rows
    for name in names:
        emulation.check(got[name], truth[name], peer[name], size, name)
        emulation.check(alone[name], truth[name], peer[name], size, name)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(
    "shape", [(3, 3, 5, 4, 7), (2, 67, 131, 4, 5), (2, 70, 9, 3, 132)], ids=str
)
def test_scores_that_are_kept_change_no_bit(emulation, shape, similarity, nll, dtype):
    if similarity == "additive" and max(shape) > 100:
        shape = (2, 5, 66, 3, 12)
    case = Case(*shape, similarity, DTYPES[dtype])
    case.support[(case.labels < 0) | (case.labels >= shape[3])] = torch.nan  # padding
    formed, kept = case.run(emulation, nll=nll), case.run(emulation, nll=nll, keep_scores=True)
    for name, value in formed.items():
        assert torch.equal(value, kept[name]), name


def test_scores_are_kept_where_they_are_small(emulation):
    """Half of the memory of queries and supports, and no more."""
    for dtype, size in (("float32", 4), ("float64", 8), ("bfloat16", 2)):
        for dim in (8, 64, 512):
            problem = emulation.module.MatchingProblem()
            problem.dtype, problem.similarity = dtype, "dot"
            problem.Q, problem.S, problem.D = 75, 25, dim
            small = 2 * 75 * 25 * max(4, size) <= (75 + 25) * dim * size
            assert emulation.module.matching_scores_size(problem) == small * 75 * 25


@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
def test_the_gradient_of_the_scale_keeps_no_rounding_of_what_supports_have_in_common(
    emulation, nll
):
    """Squared distances of many features are large, and their differences are not."""
    case = Case(2, 64, 25, 5, 512, "sqeuclidean", torch.float32)
    case.scale[:] = 0.5 * 512**-0.5
    truth, peer = case.define(torch.float64), case.define(torch.float32)
    name = f"{'nll' if nll else 'logp'}_grad_scale"
    error = (case.run(emulation, nll=nll)[name] - truth[name]).abs().max()
    assert error < (peer[name] - truth[name]).abs().max()


def test_squares_of_many_features_are_summed_in_two_levels(emulation):
    case = Case(1, 4, 6, 3, 2048, "sqeuclidean", torch.float32)
    case.labels[:] = torch.tensor([0, 1, 2, 0, 1, 2])
    truth = case.define(torch.float64)["lse"]
    _, lse = case.forward(emulation, nll=False)
    assert ((lse - truth) / truth).abs().max() < 3e-7


@pytest.mark.parametrize(
    ("shape", "classes"), [((3, 5), 4), ((2, 512), 7), ((2, 130), 300), ((1, 1), 1), ((2, 0), 3)]
)
def test_class_order_is_that_of_a_stable_sort(emulation, shape, classes):
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(-2, classes + 2, shape, generator=generator)
    key = torch.where((labels >= 0) & (labels < classes), labels, classes)
    ordered, wanted = key.sort(dim=1, stable=True)
    starts = torch.searchsorted(
        ordered, torch.arange(classes + 1).expand(shape[0], -1).contiguous()
    )
    for order, seed, max_grid in [("random", 1, 2**31 - 1), ("reverse", 0, 1)]:
        emulation.schedule(seed, order, max_grid)
        problem = emulation.module.MatchingProblem()
        problem.dtype, problem.similarity = "float32", "dot"
        problem.T, problem.Q, problem.S, problem.C, problem.D = shape[0], 1, shape[1], classes, 1
        given = emulation.input(labels)
        found = emulation.output(*shape, dtype=torch.int64)
        start = emulation.output(shape[0], classes + 1, dtype=torch.int64)
        problem.labels, problem.order = given.address, found.address
        problem.class_start = start.address
        assert emulation.module.matching_class_order(problem)
        assert torch.equal(found.read(), wanted)
        assert torch.equal(start.read(), starts)


def test_tasks_of_many_supports_or_classes_are_left_to_torch(emulation):
    problem = emulation.module.MatchingProblem()
    problem.dtype, problem.similarity, problem.S, problem.C = "float32", "dot", 513, 5
    assert not emulation.module.matching_class_order(problem)
    problem.S, problem.C = 5, 10**6
    assert not emulation.module.matching_class_order(problem)


@pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
def test_a_task_without_support_in_splits(emulation, nll):
    case = Case(1, 3, 600, 3, 4, "cosine", torch.float64)
    case.labels[:] = -100
    case.targets[:, :] = torch.tensor([0, -100, 2])
    out, lse = case.forward(emulation, nll=nll)
    assert any("splits" in launch.what for launch in emulation.launches())
    assert (lse == -torch.inf).all()
    if nll:
        assert out[0].tolist() == [torch.inf, 0, torch.inf]
    else:
        assert (out == -torch.inf).all()
