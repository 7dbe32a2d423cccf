"""What the machine can do: the physical floors that a workload's time is held against.

Three measured numbers: the peak rate of fused multiply-adds (a loop over registers, compiled on
the spot), the rate of torch's matrix product (what most code can hope for), and the bandwidth of a
triad ``c = a + b`` whose arrays together are as large as the workload's traffic, so that small
workloads are held against the cache they live in. On CUDA the peak is that of torch's large matrix
product: without TF32 in float32, on tensor cores in 16-bit types.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import torch

FMA_SOURCE = r"""
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float vec __attribute__((vector_size(BYTES)));
int lanes(void) { return BYTES / 4; }
float run(long n, float x, float y) {  /* 12 independent chains hide the latency */
  vec a[12], vx = (vec){} + x, vy = (vec){} + y;
  for (int j = 0; j < 12; j++) a[j] = (vec){} + (float)j;
#pragma GCC unroll 1
  for (long i = 0; i < n; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; j++) a[j] = a[j] * vx + vy;
  }
  vec s = (vec){};
  for (int j = 0; j < 12; j++) s += a[j];
  float total = 0;
  for (int j = 0; j < BYTES / 4; j++) total += s[j];
  return total;
}
"""


def _best(step, repeats: int = 5) -> float:
    """Shortest of a few runs, in seconds: a peak is what the machine does undisturbed."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def _fma_library() -> ctypes.CDLL | None:
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    compiler = next((c for c in names if c and shutil.which(c)), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "fma.c"), Path(folder, "fma.so")
        source.write_text(FMA_SOURCE)
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        done = subprocess.run(
            [compiler, *flags, str(source), "-o", str(library)], capture_output=True, check=False
        )
        return ctypes.CDLL(str(library)) if done.returncode == 0 else None


@functools.cache
def fma_peak(threads: int) -> float | None:
    """Peak of fused multiply-adds on ``threads`` threads, FLOP/s; None without a C compiler."""
    library = _fma_library()
    if library is None:
        return None
    library.run.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.c_float]
    library.run.restype = ctypes.c_float
    count = 4_000_000

    def work() -> None:
        pool = [
            threading.Thread(target=library.run, args=(count, 0.999, 1e-3)) for _ in range(threads)
        ]
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()

    return threads * count * 12 * library.lanes() * 2 / _best(work)


@functools.cache
def gemm_peak(device: str, threads: int, dtype: str = "float32") -> float:
    """Rate of torch's matrix product, FLOP/s."""
    size = 4096 if device == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=getattr(torch, dtype))

    def work() -> None:
        for _ in range(4):
            torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()

    work()
    return 4 * 2 * size**3 / _best(work)


@functools.cache
def _triad(device: str, threads: int, log2_bytes: int) -> float:
    numbers = 2**log2_bytes // 12
    a, b, c = torch.ones(3, numbers, device=device)
    repeats = max(1, 2**26 // 2**log2_bytes)

    def work() -> None:
        for _ in range(repeats):
            torch.add(a, b, out=c)
        if device == "cuda":
            torch.cuda.synchronize()

    work()
    return repeats * 12 * numbers / _best(work)


def bandwidth(device: str, threads: int, size: float) -> float:
    """Bytes a second of a triad over ``size`` bytes in all (a power of two, 256 KiB to 512 MiB)."""
    log2_bytes = min(max(round(size).bit_length(), 18), 29)
    return _triad(device, threads, log2_bytes)


def floor_seconds(
    device: str, threads: int, flops: float, size: float, dtype: str = "float32"
) -> float:
    """No program can be faster: arithmetic at the peak, or the least traffic at the bandwidth.

    On the CPU in any ``dtype`` by float32's peak; a GPU has a peak for each.
    """
    peak = gemm_peak(device, threads, dtype if device == "cuda" else "float32")
    if device == "cpu":
        peak = max(peak, fma_peak(threads) or 0.0)
    return max(flops / peak, size / bandwidth(device, threads, size))
