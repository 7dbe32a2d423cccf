"""Bad arguments of MatchingNetwork: each error names the argument, what came and what was wanted."""

from __future__ import annotations

import math

import pytest
import torch
from networkcases import IN, encoder, episode, make
from torch import nn

from fastmeta.matching import MatchingNetwork
from fastmeta.nn import Conv4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"encoder": 3}, TypeError, "MatchingNetwork: encoder must be a torch.nn.Module, got int"),
        ({"similarity": "l1"}, ValueError, "similarity must be one of"),
        ({"scale": 0.0}, ValueError, "scale must be a positive number, got float 0.0"),
        ({"scale": -1}, ValueError, "scale must be"),
        ({"scale": math.inf}, ValueError, "scale must be"),
        ({"scale": torch.ones(1)}, ValueError, "scale must be"),
        ({"encode": "both"}, ValueError, "encode must be one of 'joint', 'separate'"),
        ({"query_encoder": "f"}, TypeError, "query_encoder must be"),
        ({"full_context": "yes"}, TypeError, "full_context must be"),
        ({"full_context": -1}, ValueError, "full_context must be"),
        (
            {"encoder": nn.Linear(2, 2), "full_context": True},
            ValueError,
            "embedding_dim must be the number of features .* with full_context",
        ),
        ({"encoder": nn.Linear(2, 2), "similarity": "additive"}, ValueError, "embedding_dim must"),
        ({"encoder": Conv4(), "similarity": "concat"}, ValueError, "embedding_dim must be"),
    ],
)
def test_constructor_errors(options, error, message):
    with pytest.raises(error, match=message):
        MatchingNetwork(**({"encoder": encoder()} | options))


def bad(**changes):
    names = ("support_x", "support_y", "query_x", "query_y")
    return dict(zip(names, episode(), strict=True)) | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"support_x": [1]}, TypeError, "support_x must be a tensor, got list"),
        ({"support_y": torch.zeros(2, 6)}, TypeError, "support_y must be an integer tensor"),
        ({"support_y": torch.zeros(2, 6, 1).long()}, ValueError, r"support_y must be of shape \[T"),
        ({"support_y": torch.zeros(2, 5).long()}, ValueError, r"support_x must be of shape \[2, 5"),
        (
            {"support_y": torch.zeros(6).long()},
            ValueError,
            r"support_x must be of shape \[6, ...\]",
        ),
        ({"support_y": torch.full((2, 6), -1)}, ValueError, "num_classes must be given when no"),
        (
            {"support_y": torch.tensor([[0, 1, 2, 0, 1, -3]] * 2)},
            ValueError,
            "support_y must be in",
        ),
        ({"query_x": None}, TypeError, "query_x must be a tensor"),
        ({"query_x": torch.zeros(2, 4, 3)}, ValueError, r"query_x must be of shape \[2, Q, 5\]"),
        ({"query_x": torch.zeros(3, 4, 5)}, ValueError, r"query_x must be of shape \[2, Q, 5\]"),
        ({"query_x": torch.zeros(2, 4, 5)}, TypeError, "query_x must be torch.float64, like"),
        ({"query_y": torch.zeros(2, 4)}, TypeError, "query_y must be an integer tensor"),
        ({"query_y": torch.zeros(2, 3).long()}, ValueError, r"query_y must be of shape \[2, 4\]"),
        ({"query_y": torch.full((2, 4), 3)}, ValueError, "query_y must be in"),
        ({"num_classes": 0}, ValueError, "num_classes must be an integer of at least 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an integer"),
        ({"num_classes": 2}, ValueError, "support_y must be in"),
        ({"lengths": torch.tensor([6, 7])}, ValueError, r"lengths must be in \[0, S=6\]"),
        ({"lengths": torch.tensor([6])}, ValueError, r"lengths must be of shape \[2\]"),
        ({"lengths": 6}, TypeError, "lengths must be an integer tensor"),
        ({"mask": torch.ones(2, 6)}, TypeError, "mask must be a bool tensor"),
        ({"mask": torch.ones(2, 5).bool()}, ValueError, r"mask must be of shape \[2, 6\]"),
        (
            {"mask": torch.ones(2, 6).bool(), "lengths": torch.tensor([6, 6])},
            ValueError,
            "mask must be None when lengths is given",
        ),
        (
            {"mask": torch.ones(2, 6).bool(), "padded": False},
            ValueError,
            "padded must be None or True",
        ),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"support_x": torch.zeros(2, 6, 3).double()}, ValueError, "query_x must be of shape"),
    ],
)
def test_call_errors(changes, error, message):
    with pytest.raises(error, match=f"MatchingNetwork: {message}"):
        make().loss(**bad(**changes))


@pytest.mark.parametrize(
    ("query_mask", "error", "message"),
    [
        (torch.ones(2, 4), TypeError, "query_mask must be a bool tensor"),
        (
            torch.ones(2, 6).bool(),
            ValueError,
            r"query_mask must be of shape \[2, 4\], like query_x",
        ),
    ],
)
def test_query_mask_errors(query_mask, error, message):
    with pytest.raises(error, match=message):
        make()(*episode()[:3], query_mask=query_mask)


class Wrong(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output(x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"encoder": Wrong(lambda x: (x, x))},
            TypeError,
            "encoder must be a module that returns a",
        ),
        (
            {"encoder": Wrong(lambda x: x[1:])},
            ValueError,
            r"encoder must be a module that maps \[N=",
        ),
        ({"encoder": Wrong(lambda x: x.sum(1))}, ValueError, "an output of shape"),
        (
            {"query_encoder": nn.Linear(IN, 3)},
            ValueError,
            "query_encoder must be one that gives D=4",
        ),
        (
            {"full_context": 1, "embedding_dim": 3},
            ValueError,
            "embedding_dim must be 4, the number",
        ),
    ],
)
def test_encoder_errors(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)(*episode()[:3])
