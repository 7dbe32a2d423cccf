// Device code of segment_mean: class means of unsorted, ragged rows, and their gradient.
//
// mean_kernel: a block owns one (task, class) and a slice of kThreads * width features; a thread
// owns width neighbouring features and adds the rows of its class in their order, so the result
// depends on nothing but the input. The block walks the labels in steps of kStep: every warp votes
// on 32 labels a round, the votes are turned into an ordered list of matching rows in shared
// memory, and the rows of the list are added.
//
// - bytes: b * T * D * (S + C), b bytes a scalar, and 8 * T * S * C * slices for labels, which
//   come from L2
// - FLOPs: T * S * D, below one a byte: bound by memory. 32 tasks of 5-way 5-shot at D = 512 in
//   float32 move 2 MB: 1.0 us on A100 (2.0 TB/s), 0.6 us on H100 (3.35 TB/s); one task of 100,000
//   rows at D = 128, 52 MB: 26 us and 15 us
// - tiles: a slice of 128 threads holds 512 features, so the usual D = 64 to 1600 are one to four
//   slices and the labels are read as often; a step of 512 labels lets a thread have four loads of
//   them in flight and spreads two barriers over all of them
// - vector width: kPack (16 bytes of float32, four rows in flight) where rows are aligned, else 1;
//   both are coalesced
// - shared memory: kStep 4-byte indices and 16 counters, 2112 bytes. A warp writes its matches to
//   neighbouring places and every read is of one address by all threads (broadcast): no bank
//   conflicts
// - distance from the floor, as designed (no GPU has measured it yet): few-shot sizes take the
//   latency of a launch, 2 to 4 us. Every class reads all labels, so 2 * C / D times the bytes of
//   float32 values come from L2 on top: little for few classes, but 100,000 rows in 1000 classes at
//   D = 128 read 800 MB there, about 160 us on A100, six times the floor; sorting the labels first
//   would lift that. Few large classes leave multiprocessors idle: T * C * slices blocks are all
//
// mean_backward_kernel: a thread writes width neighbouring elements of grad_values: b * T * S * D
// bytes written, 8 * T * S of labels and b * T * C * D of grad read, the latter from L2 but once;
// one division an element. Bound by memory: the sizes above are 1.6 MB, 0.8 and 0.5 us, and 51 MB,
// 26 and 15 us. A block of 128 threads writes 512 elements, without a loop or shared memory; a
// large gradient should reach the 90 % of a copy, a small one takes the latency of its launch.
#pragma once
#include "common/device.cuh"

namespace fastmeta::segment::cuda {

using namespace ::fastmeta::device;  // NOLINT(build/namespaces): device code

inline constexpr int kThreads = 128;
inline constexpr int kWarps = kThreads / kWarpSize;
inline constexpr int kRounds = 4;
inline constexpr int kStep = kRounds * kThreads;  // labels a block looks at in one go

template <class scalar_t>
struct MeanParams {
  int64_t num_tasks, num_rows, num_classes, dim, slices;
  const scalar_t* __restrict__ values;
  const int64_t* __restrict__ labels;
  scalar_t* __restrict__ mean;
  acc_t<scalar_t>* __restrict__ count;
};

template <class scalar_t>
struct MeanBackwardParams {
  int64_t num_tasks, num_rows, num_classes, dim;
  const scalar_t* __restrict__ grad;
  const int64_t* __restrict__ labels;
  const acc_t<scalar_t>* __restrict__ count;
  scalar_t* __restrict__ grad_values;
};

template <class scalar_t, int width>
__global__ void __launch_bounds__(kThreads)
    mean_kernel(const __grid_constant__ MeanParams<scalar_t> p) {
  using acc = acc_t<scalar_t>;
  FASTMETA_SHARED(int[kStep], matches);
  FASTMETA_SHARED(int[kRounds][kWarps], votes);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;

  const int64_t work_items = p.num_tasks * p.num_classes * p.slices;
  for (int64_t work = blockIdx.x; work < work_items; work += gridDim.x) {
    const int64_t slice = work % p.slices, segment = work / p.slices;
    const int64_t task = segment / p.num_classes, cls = segment % p.num_classes;
    const int64_t* labels = p.labels + task * p.num_rows;
    const int64_t feature = (slice * kThreads + threadIdx.x) * width;
    const bool owns = feature < p.dim;
    const scalar_t* column = p.values + task * p.num_rows * p.dim + feature;

    acc total[width] = {};
    int64_t count = 0;
    for (int64_t row0 = 0; row0 < p.num_rows; row0 += kStep) {
      unsigned vote[kRounds];
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        const int64_t row = row0 + round * kThreads + threadIdx.x;
        vote[round] = __ballot_sync(kFullMask, row < p.num_rows && labels[row] == cls);
        if (lane == 0) votes[round][warp] = __popc(vote[round]);
      }
      __syncthreads();
      int found = 0;  // matches ahead of this warp's in the current round, then all of them
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        int ahead = found;
#pragma unroll
        for (int other = 0; other < kWarps; ++other) {
          if (other < warp) ahead += votes[round][other];
          found += votes[round][other];
        }
        if (vote[round] >> lane & 1u) {
          matches[ahead + __popc(vote[round] & ((1u << lane) - 1u))] =
              round * kThreads + threadIdx.x;
        }
      }
      __syncthreads();
      if (owns) {
        acc sum[width] = {};  // of a step: one sum over a large class would lose digits
#pragma unroll 4
        for (int m = 0; m < found; ++m) {
          acc value[width];
          load<width>(column + (row0 + matches[m]) * p.dim, value);
#pragma unroll
          for (int i = 0; i < width; ++i) sum[i] += value[i];
        }
#pragma unroll
        for (int i = 0; i < width; ++i) total[i] += sum[i];
      }
      count += found;  // the next step writes its list after a barrier
    }

    if (owns) {
#pragma unroll
      for (int i = 0; i < width; ++i)
        total[i] = count > 0 ? total[i] / static_cast<acc>(count) : acc(0);
      store<width>(p.mean + segment * p.dim + feature, total);
    }
    if (slice == 0 && threadIdx.x == 0) p.count[segment] = static_cast<acc>(count);
  }
}

template <class scalar_t, int width>
__global__ void __launch_bounds__(kThreads)
    mean_backward_kernel(const __grid_constant__ MeanBackwardParams<scalar_t> p) {
  using acc = acc_t<scalar_t>;
  const int64_t packs = p.dim / width, total = p.num_tasks * p.num_rows * packs;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += stride) {
    const int64_t row = divide(i, packs), feature = (i - row * packs) * width;
    const int64_t task = divide(row, p.num_rows), cls = p.labels[row];
    acc value[width] = {};
    if (cls >= 0 && cls < p.num_classes) {
      const int64_t segment = task * p.num_classes + cls;
      const acc count = p.count[segment];
      load<width>(p.grad + segment * p.dim + feature, value);
#pragma unroll
      for (int k = 0; k < width; ++k) value[k] = value[k] / count;
    }
    store<width>(p.grad_values + row * p.dim + feature, value);
  }
}

}  // namespace fastmeta::segment::cuda
