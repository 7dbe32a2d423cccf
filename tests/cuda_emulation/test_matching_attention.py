"""The CUDA kernels of matching_attention and matching_nll, emulated, against the definition."""

from __future__ import annotations

import opcases
import pytest
import torch
from cuda_emulation.cases import DTYPES, SIMILARITIES, Case, check, check_budget

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
            marks=[pytest.mark.slow] if case.queries * case.supports * case.dim > 2e5 else [],
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


def test_launches_fit_every_architecture(emulation):
    """Block and shared memory against what sm_75 gives; grids have one dimension, so any T fits."""
    for similarity in SIMILARITIES:
        for dtype, kind in DTYPES.items():
            Case(1, 2, 3, 2, 4, similarity, kind).run(emulation, nll=False)
            for launch in emulation.launches():
                shared = launch.shared_bytes + launch.static_shared_bytes
                assert launch.block <= 1024
                assert launch.grid <= 2**31 - 1
                assert shared <= 64 * 1024, (
                    launch.what,
                    dtype,
                )  # sm_75's opt-in limit, the smallest
                if (
                    kind != torch.float64
                ):  # two blocks a multiprocessor, with 1 KB each for the system
                    assert 2 * (shared + 1024) <= 64 * 1024, (launch.what, dtype)
