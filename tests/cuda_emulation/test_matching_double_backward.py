"""The CUDA kernels of matching attention's double backward, emulated, against the definition."""

from __future__ import annotations

import opcases
import pytest
import torch
from cuda_emulation.cases import DTYPES, SIMILARITIES, Case, acc_of, largest_logit

# T, Q, S, C, D: ones; odd sizes; own rows of several blocks and others of several tiles; slices of
# features crossed, in packs and one by one; a class a support; one class.
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 3, 5, 4, 7),
    (1, 67, 35, 4, 5),
    (1, 34, 70, 3, 68),
    (1, 2, 40, 40, 8),
    (2, 4, 9, 1, 36),
    (1, 2, 5, 2, 131),
]
KINDS = pytest.mark.parametrize("nll", [False, True], ids=["attention", "nll"])
MAIN = ["cosine", "euclidean", "additive"]  # one that scales, subtracts, weighs its rows
QUICK = [
    ((3, 3, 5, 4, 7), "float32"),
    ((3, 3, 5, 4, 7), "bfloat16"),
    ((1, 2, 5, 2, 131), "float64"),
]


def slow_unless(quick):
    """Leave what is not quick to the full suite."""
    return [] if quick else [pytest.mark.slow]


def check_second(emulation, case, nll, parts="qsaw"):
    """Run the kernels and hold them against the definition in float64; returns what they gave."""
    dots = case.directions(parts)
    got = case.run_second(emulation, nll=nll, dots=dots)
    truth = case.define_second(torch.float64, nll, dots)
    peer = case.define_second(acc_of(case.dtype), nll, dots)
    logit = max(1.0, largest_logit(case))
    size = max((float(v.abs().max()) for v in truth.values() if v.numel()), default=0.0)
    for name, value in got.items():
        # Sums whose terms cancel: a logit's rounding is that of every weight.
        terms = size * logit * (8 if name != "scale" else 8 * case.shape[1])
        emulation.check(value, truth[name], peer[name], terms, name)
    return got


@KINDS
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(
            shape, dtype, id=f"{shape}-{dtype}", marks=slow_unless((shape, dtype) in QUICK)
        )
        for shape in SHAPES
        for dtype in DTYPES
    ],
)
def test_second_derivatives_match_the_definition(emulation, shape, similarity, dtype, nll):
    check_second(emulation, Case(*shape, similarity, DTYPES[dtype]), nll)


@KINDS
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=slow_unless(case.name == "absent_classes"))
        for case in opcases.CASES
    ],
)
def test_shared_cases_match_the_definition(emulation, case, similarity, nll):
    check_second(emulation, Case.of(case, similarity, torch.float32), nll)


@pytest.mark.parametrize("parts", ["q", "s", "a", "w", ""])
@pytest.mark.parametrize("similarity", ["cosine", "additive"])
def test_directions_that_nobody_gave_count_as_zero(emulation, similarity, parts):
    check_second(emulation, Case(2, 4, 9, 3, 8, similarity, torch.float32), False, parts)


@pytest.mark.parametrize(
    ("similarity", "dtype"),
    [
        pytest.param(similarity, dtype, marks=slow_unless((similarity, dtype) == quick))
        for quick in [("cosine", "bfloat16")]
        for similarity in MAIN
        for dtype in ("float32", "float64", "bfloat16")
    ],
)
def test_blocks_that_take_all_slices_give_the_bits_of_those_that_take_one(
    emulation, similarity, dtype
):
    case = Case(1, 35, 36, 3, 132, similarity, DTYPES[dtype])  # two slices of three a block
    dots = case.directions()
    emulation.module.multiprocessors(1)
    together = check_second(emulation, case, False)
    grids = [launch.grid for launch in emulation.launches()]
    emulation.module.multiprocessors(128)
    alone = case.run_second(emulation, nll=False, dots=dots)
    assert sum(grids) < sum(launch.grid for launch in emulation.launches())
    assert all(torch.equal(together[name], alone[name]) for name in alone)


@KINDS
@pytest.mark.parametrize(
    "similarity", [pytest.param(s, marks=slow_unless(s == "cosine")) for s in MAIN]
)
def test_thread_order_and_grid_size_leave_the_bits_alone(emulation, similarity, nll):
    case = Case(2, 66, 35, 5, 20, similarity, torch.float32)
    dots = case.directions()
    first = case.run_second(emulation, nll=nll, dots=dots)
    for order, seed, max_grid in [("random", 1, 2**31 - 1), ("random", 2, 3), ("reverse", 0, 1)]:
        emulation.schedule(seed, order, max_grid)
        again = case.run_second(emulation, nll=nll, dots=dots)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("similarity", ["cosine", "additive"])
def test_rows_off_a_16_byte_boundary_are_read_one_by_one(emulation, similarity, dtype):
    aligned = Case(2, 5, 9, 3, 8, similarity, DTYPES[dtype])
    shifted = Case(2, 5, 9, 3, 8, similarity, DTYPES[dtype], offset=1)
    for name, value in check_second(emulation, aligned, False).items():
        again = shifted.run_second(emulation, nll=False, dots=shifted.directions())
        assert torch.equal(value, again[name])


@KINDS
@pytest.mark.parametrize("similarity", ["dot", "additive"])
def test_scale_and_weight_shared_by_the_tasks(emulation, similarity, nll):
    check_second(emulation, Case(3, 4, 6, 3, 8, similarity, torch.float32, shared=True), nll)


@KINDS
@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_zero_vectors_and_coincident_points_stay_finite(emulation, similarity, nll):
    case = Case(2, 5, 9, 3, 12, similarity, torch.float32)
    case.query[0, 1] = 0
    case.support[0, 2] = 0
    case.support[1, 0] = case.query[1, 0]
    got = case.run_second(emulation, nll=nll, dots=case.directions())
    assert all(not value.isnan().any() for value in got.values())
    if similarity == "cosine":
        assert (got["query"][0, 1] == 0).all()
        assert (got["support"][0, 2] == 0).all()


@KINDS
@pytest.mark.parametrize("similarity", MAIN)
def test_a_task_without_support_has_no_second_derivatives(emulation, similarity, nll):
    case = Case(2, 4, 6, 3, 8, similarity, torch.float32)
    case.labels[1] = -100
    case.targets[:, :] = torch.tensor([0, 1, -100, 2])
    got = check_second(emulation, case, nll)
    for name, value in got.items():
        assert (value[1] == 0).all(), name


@KINDS
@pytest.mark.parametrize("similarity", MAIN)
def test_what_padding_and_ignored_queries_hold_is_never_read(emulation, similarity, nll):
    case = Case(2, 5, 9, 3, 8, similarity, torch.float32)
    dots = case.directions()
    clean = case.run_second(emulation, nll=nll, dots=dots)
    outside = (case.labels < 0) | (case.labels >= 3)
    case.support[outside] = torch.nan
    dots["support"][outside] = torch.nan
    if nll:
        ignored = (case.targets < 0) | (case.targets >= 3)
        assert ignored.any()
        case.query[ignored] = torch.nan
        dots["query"][ignored] = torch.nan
    again = case.run_second(emulation, nll=nll, dots=dots)
    assert all(torch.equal(clean[name], again[name]) for name in clean)
    assert (again["support"][outside] == 0).all()


@pytest.mark.parametrize("similarity", ["cosine", "additive"])
@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 2, 4), (2, 0, 3, 2, 4), (2, 3, 0, 2, 4), (2, 3, 4, 2, 0)], ids=str
)
def test_empty_sizes(emulation, shape, similarity):
    case = Case(*shape, similarity, torch.float32)
    for nll in (False, True):
        got = case.run_second(emulation, nll=nll, dots=case.directions())
        for name, value in got.items():
            if name != "grad" or not (shape[2] and shape[4]):
                assert not value.isnan().any(), name
            if not (shape[2] and shape[1]):
                assert (value == 0).all(), name


@KINDS
@pytest.mark.parametrize("similarity", ["cosine"])
def test_scores_from_tensor_cores_are_close_enough(emulation, similarity, nll):
    case = Case(1, 35, 34, 4, 36, similarity, torch.float32)
    dots = case.directions()
    exact = case.run_second(emulation, nll=nll, dots=dots)
    case.allow_tf32 = True
    rounded = case.run_second(emulation, nll=nll, dots=dots)
    for name, value in exact.items():
        size = value.abs().max().item()
        difference = (rounded[name] - value).abs().max().item()
        assert 0 < difference < 2**-6 * size, name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scores_have_the_bits_of_the_forward(emulation, dtype):
    """A class of one support gives it a share of 1, however far its query is."""
    case = Case(1, 4, 5, 5, 512, "sqeuclidean", DTYPES[dtype])
    case.query = case.query + 10
    dots = case.directions()
    truth = case.define_second(torch.float64, False, dots)["grad"]
    got = case.run_second(emulation, nll=False, dots=dots)["grad"]
    assert (got - truth).abs().max() < 1e-5 * truth.abs().max()
