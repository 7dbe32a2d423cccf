// Kernels with one bug each, and the same without: what the emulator and the sanitizers must catch.
// usage: planted_bugs NAME SEED; prints the results, or the complaint and fails. SEED "forward" and
// "reverse" stand for threads in that order.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "common/device.cuh"
#include "cuemu.h"

namespace {

constexpr int kThreads = 64;

// Reverses 64 numbers through shared memory and sums neighbours by shuffle.
void reverse(const std::string& bug, float* out) {
  FASTMETA_DYNAMIC_SHARED(float, numbers);
  const int i = threadIdx.x;
  if (bug == "returned" && i == 5) return;
  if (bug != "unwritten shared" || i != 7) numbers[i] = static_cast<float>(i);
  if (bug == "divergent barrier" && i < 32) {
    __syncthreads();
  } else if (bug != "missing barrier") {
    __syncthreads();
  }
  const int overrun = bug == "overrun shared" ? 1 : 0;
  const float number = numbers[kThreads - 1 - i + overrun];
  float other = 0;
  if (bug == "lane outside mask") {
    other = __shfl_xor_sync(0xffffu, number, 1);
  } else if (bug == "partner outside mask") {
    if (i < 16) other = __shfl_xor_sync(0xffffu, number, 16);
  } else if (bug == "lost lanes") {
    if (i % 32 < 31) other = __shfl_xor_sync(0xffffffffu, number, 1);
  } else {
    other = __shfl_xor_sync(0xffffffffu, number, 1);
  }
  if (bug != "unwritten output" || i != 9) out[i] = number + other;
  if (bug == "overrun output" && i == 0) out[kThreads] = 1;
  if (bug == "misaligned pack") {
    const auto pack = *reinterpret_cast<const fastmeta::device::Pack<float>*>(out + 1);
    out[i] = pack.v[0];
  }
}

// A reduction in which every thread adds to one number without an order.
void race(bool has_bug, float* out) {
  FASTMETA_SHARED(float[kThreads], parts);
  FASTMETA_SHARED(float, total);
  const int i = threadIdx.x;
  parts[i] = 1.0f / static_cast<float>(i + 1);
  if (i == 0) total = 0;
  __syncthreads();
  if (has_bug) {
    total = total + parts[i];  // in the order that the threads happen to run in
  } else if (i == 0) {
    for (int k = 0; k < kThreads; ++k) total += parts[k];
  }
  __syncthreads();
  out[i] = total;
}

// Neighbours swap numbers through shared memory within a warp.
void swap(bool has_bug, float* out) {
  FASTMETA_SHARED(float[kThreads], numbers);
  const int i = threadIdx.x;
  numbers[i] = static_cast<float>(i);
  if (!has_bug) __syncwarp();
  out[i] = numbers[i ^ 1];
}

// Blocks share one output: each owns a half, or both own all.
void own(bool has_bug, float* out) {
  const int i = threadIdx.x;
  if (has_bug || i / 32 == static_cast<int>(blockIdx.x)) out[i] = static_cast<float>(i);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const std::string bug = argv[1];
  const std::string seed = argv[2];
  if (seed == "forward") cuemu::options().order = cuemu::Order::kForward;
  if (seed == "reverse") cuemu::options().order = cuemu::Order::kReverse;
  cuemu::options().seed = std::strtoull(argv[2], nullptr, 10);
  const auto out = cuemu::fresh_shared(kThreads * sizeof(float));
  float* numbers = reinterpret_cast<float*>(out.get());
  try {
    const bool owns = bug == "two owners" || bug == "one owner";
    const auto kernel = [&] {
      if (owns) {
        own(bug == "two owners", numbers);
      } else if (bug == "race" || bug == "no race") {
        race(bug == "race", numbers);
      } else if (bug == "missing warp barrier" || bug == "warp barrier") {
        swap(bug == "missing warp barrier", numbers);
      } else {
        reverse(bug, numbers);
      }
    };
    const int block = bug == "large block" ? 2048 : kThreads;
    cuemu::launch(bug.c_str(), owns ? 2 : 1, block, kThreads * sizeof(float), kernel);
  } catch (const cuemu::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  for (int i = 0; i < kThreads; ++i) std::printf("%.9g ", static_cast<double>(numbers[i]));
  return 0;
}
