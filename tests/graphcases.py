"""A stand-in for CUDA graphs on the CPU, which runs again what a graph would replay."""

import torch

import fastmeta._cuda_recorder as cuda_recorder
import fastmeta._graph_capture as graph_capture
import fastmeta._graphed_step as graphed_step
import fastmeta._inner_loop as inner_loop
import fastmeta._inner_losses as inner_losses
import fastmeta._padding as padding


class StandIn:
    """What a recorder promises: a replay writes to what the capture returned."""

    counts = None
    fails = None

    def __init__(self, device):
        self.device = device

    @staticmethod
    def busy():
        return False

    def warm_up(self, run, *, strict=False):
        self.counts["strict" if strict else "warm_up"] += 1
        return run()

    def capture(self, run):
        self.counts["capture"] += 1
        if self.fails is not None:
            raise self.fails
        self.run, self.learning = run, torch.is_grad_enabled()
        # The numbers of a capture are garbage.
        self.static = run()
        for t in self.tensors(self.static):
            t.fill_(float("nan"))
        return self.static

    @staticmethod
    def tensors(result):
        loss, grads = result
        return [loss, *(g for g in grads if g is not None)]

    def replay(self):
        self.counts["replay"] += 1
        with torch.set_grad_enabled(self.learning):
            fresh = self.run()
        with torch.no_grad():
            for to, value in zip(self.tensors(self.static), self.tensors(fresh), strict=True):
                to.copy_(value)


def stand_in(monkeypatch):
    """Have the CPU stand for a GPU: nobody free to look, no engine, graphs. Returns the counts."""
    StandIn.counts = dict.fromkeys(("warm_up", "strict", "capture", "replay"), 0)
    monkeypatch.setattr(StandIn, "fails", None)
    for module in (padding, inner_losses):
        monkeypatch.setattr(module, "free_to_look", lambda tensor: False)
    monkeypatch.setattr(inner_loop, "has_kernel", lambda device_type: False)
    for module in (cuda_recorder, graph_capture, graphed_step):
        monkeypatch.setattr(module, "RECORDERS", {"cpu": StandIn})
    return StandIn.counts
