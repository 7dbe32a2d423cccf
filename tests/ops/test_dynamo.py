"""What torch.compile is told, before and after it was imported."""

import importlib
import sys

import pytest
import torch

from fastmeta.ops import _dynamo


def opaque(x):
    """A function that cannot be traced."""
    return torch.from_numpy(x.numpy() + 1) if type(x) is torch.Tensor else torch.empty_like(x)


@pytest.mark.compile
def test_a_function_is_allowed_at_once_when_dynamo_is_there():
    import torch._dynamo

    allowed = _dynamo.allow_in_graph(lambda x: opaque(x))
    got = torch.compile(lambda x: allowed(x) * 2, fullgraph=True, backend="eager")(torch.ones(3))
    assert got.tolist() == [4, 4, 4]


def test_functions_wait_for_the_import_and_survive_one_that_fails(monkeypatch, tmp_path):
    """With a module of another name in dynamo's place, as dynamo itself is imported only once."""
    waiting = _dynamo._AfterImport()
    allowed = []
    monkeypatch.setattr(_dynamo, "_NAME", "in_dynamos_place")
    monkeypatch.setattr(_dynamo, "_after_import", waiting)
    monkeypatch.setattr(torch.compiler, "allow_in_graph", allowed.append)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert _dynamo.allow_in_graph(opaque) is opaque
        assert _dynamo.allow_in_graph(len) is len
        assert sys.meta_path.count(waiting) == 1
        with pytest.raises(ModuleNotFoundError):
            __import__("in_dynamos_place")
        (tmp_path / "in_dynamos_place.py").write_text("1 / 0")
        importlib.invalidate_caches()
        with pytest.raises(ZeroDivisionError):
            __import__("in_dynamos_place")
        assert allowed == []
        assert waiting in sys.meta_path
        (tmp_path / "in_dynamos_place.py").write_text("VALUE = 10")
        importlib.invalidate_caches()
        assert __import__("in_dynamos_place").VALUE == 10
    finally:
        sys.modules.pop("in_dynamos_place", None)
        if waiting in sys.meta_path:
            sys.meta_path.remove(waiting)
            pytest.fail("the finder stays")
    assert allowed == [opaque, len]
