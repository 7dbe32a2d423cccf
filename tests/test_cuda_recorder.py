"""What `CudaRecorder` asks of CUDA and in which order, of one that writes it down."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import fastmeta._cuda_recorder as cuda_recorder
from fastmeta._cuda_recorder import CudaRecorder


class Cuda:
    """torch, as far as the recorder knows it."""

    def __init__(self):
        self.log = []
        self.current = "user"
        self.mode = 0
        self.end_fails = False
        self.pool_ended = False
        recorded = self

        class Graph:
            def capture_begin(self, pool=None, capture_error_mode="global"):
                recorded.log.append(f"begin {pool} on {recorded.current} {capture_error_mode}")

            def capture_end(self):
                recorded.log.append(f"end on {recorded.current}")
                if recorded.end_fails:
                    recorded.end_fails = False
                    raise RuntimeError("invalidated")

            def replay(self):
                recorded.log.append(f"replay on {recorded.current}")

        self.cuda = SimpleNamespace(
            CUDAGraph=Graph,
            Stream=lambda index: self.stream_named(f"side {index}"),
            current_device=lambda: 1,
            current_stream=lambda device: self.stream_named(self.current),
            empty_cache=lambda: None,
            get_sync_debug_mode=lambda: self.mode,
            graph_pool_handle=lambda: "pool",
            set_sync_debug_mode=self.set_mode,
            stream=self.on,
            synchronize=lambda device: self.log.append("synchronize"),
        )
        self._C = SimpleNamespace(
            _cuda_endAllocateToPool=self.end_pool,
            _cuda_releasePool=lambda index, pool: self.log.append(f"release {pool}"),
        )
        self.device, self.Tensor = torch.device, torch.Tensor

    def __getattr__(self, name):
        return getattr(torch, name)

    def zeros(self, shape, device):
        return torch.zeros(shape)

    def stream_named(self, name):
        log = self.log
        return SimpleNamespace(
            name=name, wait_stream=lambda other: log.append(f"{name} waits for {other.name}")
        )

    def set_mode(self, mode):
        self.mode = mode

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    def end_pool(self, index, pool):
        if self.pool_ended:
            raise RuntimeError("not recording")
        self.log.append(f"end {pool} of {index}")


@pytest.fixture
def cuda(monkeypatch):
    fake = Cuda()
    monkeypatch.setattr(cuda_recorder, "torch", fake)
    cuda_recorder._side_stream.cache_clear()
    yield fake
    cuda_recorder._side_stream.cache_clear()


def test_warm_up(cuda):
    recorder = CudaRecorder(torch.device("cuda"))
    seen = recorder.warm_up(lambda: (cuda.current, cuda.mode))
    assert seen == ("side 1", 0)
    assert cuda.log == ["side 1 waits for user", "user waits for side 1"]
    assert recorder.warm_up(lambda: cuda.mode, strict=True) == "error"
    assert cuda.mode == 0

    def fails():
        raise ValueError("the user's")

    with pytest.raises(ValueError, match="user's"):
        recorder.warm_up(fails, strict=True)
    assert (cuda.mode, cuda.current) == (0, "user")
    assert cuda.log[-1] == "user waits for side 1"


def test_capture_and_replay(cuda):
    recorder = CudaRecorder(torch.device("cuda", 0))
    assert recorder.capture(lambda: cuda.log.append("run") or 5) == 5
    recorder.replay()
    assert cuda.log == [
        "synchronize",
        "side 0 waits for user",
        "begin pool on side 0 thread_local",
        "run",
        "end on side 0",
        "user waits for side 0",
        "replay on user",
    ]


@pytest.mark.parametrize("pool_ended", [False, True])
@pytest.mark.parametrize("end_fails", [False, True])
def test_a_capture_that_fails(end_fails, pool_ended, cuda):
    cuda.end_fails, cuda.pool_ended = end_fails, pool_ended
    recorder = CudaRecorder(torch.device("cuda", 0))

    def run():
        raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.capture(run)
    pool = [] if pool_ended else ["end pool of 0", "release pool"]
    assert cuda.log == [
        "synchronize",
        "side 0 waits for user",
        "begin pool on side 0 thread_local",
        "end on side 0",
        "user waits for side 0",
        *pool,
        # A capture that ends well.
        "begin None on side 0 thread_local",
        "end on side 0",
        "synchronize",
    ]
    assert cuda.current == "user"


def test_a_capture_that_does_not_end(cuda):
    cuda.end_fails = True
    with pytest.raises(RuntimeError, match="invalidated"):
        CudaRecorder(torch.device("cuda", 0)).capture(lambda: 5)
    assert cuda.log.count("end on side 0") == 2
    assert cuda.log[-1] == "synchronize"
