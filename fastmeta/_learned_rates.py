"""The rates of the inner loop that `MAML` holds as parameters."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from fastmeta._descent import Rates
from fastmeta.errors import fail

__all__ = ["LEARN_LR", "make_rates", "rates_of"]

#: The choices of ``learn_lr``, besides False.
LEARN_LR = ("scalar", "parameter", "element")


def make_rates(
    model: nn.Module, adapted: Collection[str], lr: float, learn_lr: bool | str, lead: Sequence[int]
) -> nn.ParameterDict:
    """Rates for the parameters ``adapted`` of ``model``, all at ``lr``; ``lead`` counts steps."""
    rates = nn.ParameterDict()
    if not learn_lr:
        return rates
    parameters = dict(model.named_parameters())
    if learn_lr == "scalar":
        like = parameters[next(n for n in parameters if n in adapted)]
        rates["all"] = _rate(lr, lead, like)
        return rates
    for name in (n for n in parameters if n in adapted):
        like = parameters[name]
        shape = (*lead, *like.shape) if learn_lr == "element" else lead
        rates[_key(name)] = _rate(lr, shape, like)
    return rates


def rates_of(
    rates: nn.ParameterDict, names: Sequence[str], lr: float, learn_lr: bool | str, per_step: bool
) -> Rates:
    """The learned rates of the parameters ``names``."""
    shared = learn_lr == "scalar"
    keys = ["all"] if shared else [_key(name) for name in names]
    for key in keys:
        if key not in rates:
            wanted = f"of parameters that were there when learn_lr={learn_lr!r} made rates"
            fail(ValueError, "MAML", "model", wanted, key.replace("/", "."))
    return Rates(lr, [rates[key] for key in keys], shared, per_step)


def _key(name: str) -> str:
    return name.replace(".", "/")


def _rate(lr: float, shape: Sequence[int], like: Tensor) -> nn.Parameter:
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    return nn.Parameter(torch.full(tuple(shape), lr, dtype=dtype, device=like.device))
