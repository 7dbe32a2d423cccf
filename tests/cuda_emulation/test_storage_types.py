"""Conversion of 16-bit storage types against PyTorch's, over every bit pattern."""

from __future__ import annotations

import numpy as np
import pytest
import torch


@pytest.mark.parametrize(
    ("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_every_pattern_decodes_and_values_round_to_nearest_even(emulation, name, dtype):
    patterns = torch.from_numpy(np.arange(2**16, dtype=np.uint16).view(np.int16))
    stored = patterns.view(dtype)
    # Every stored value, what lies halfway to the next one, and both neighbours of that.
    with np.errstate(over="ignore", invalid="ignore"):
        exact = stored.float().numpy()
        halfway = ((exact.astype(np.float64) + np.roll(exact, -1)) / 2).astype(np.float32)
        nudged = [np.nextafter(halfway, np.float32(side)) for side in (-np.inf, np.inf)]
    values = torch.from_numpy(np.concatenate([exact, halfway, *nudged]))
    source = patterns.repeat(4)

    decoded = emulation.output(values.numel(), dtype=torch.float32)
    encoded = emulation.output(values.numel(), dtype=torch.int16)
    inputs = emulation.input(source), emulation.input(values)
    convert = getattr(emulation.module, f"convert_{name}")
    convert(values.numel(), inputs[0].address, decoded.address, inputs[1].address, encoded.address)

    torch.testing.assert_close(
        decoded.read()[: 2**16], stored.float(), rtol=0, atol=0, equal_nan=True
    )
    got, want = encoded.read().view(dtype), values.to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.view(torch.int16)[~got.isnan()], want.view(torch.int16)[~want.isnan()])
