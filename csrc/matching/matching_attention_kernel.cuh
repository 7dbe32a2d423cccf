// Device code of the forward of matching_attention and matching_nll.
//
// A block owns 64 queries of one task and streams the task's supports, sorted by class, in tiles
// of 64 through shared memory (matching_tile_kernel.cuh). A tile's scores go to shared memory;
// then four threads a query fold them, class after class, into an online (max, sum). At the end of
// a class its log-sum-exp is written to out and folded into the query's total, so one pair of
// (max, sum) a thread is all the state, whatever C is; the last step subtracts lse from the
// block's part of out. Nothing of size Q x S leaves the block.
//
// - splits: where tasks and query blocks are too few for the device, blocks share the supports. A
//   block streams a run of them in class order and leaves (max, sum) of the query, and of the at
//   most two classes that others have a part of; merge_splits_kernel puts them together in their
//   order. Sizes and device alone say how many: six numbers a query and split, whatever C is
// - bytes: a task reads b * D * (Q + S * ceil(Q / 64)), the repeats from L2, and moves 12 * Q *
//   C for out, which nll does not have; b bytes a scalar
// - FLOPs: 2 * Q * S * D for dot products, 3 for differences, a tanh more for additive, and one
//   exp a pair
// - bound: by FP32 units for D above about 32 (19.5 TFLOP/s on A100, 67 on H100), on tensor
//   cores by L2 and from D = 64 down by the exps (a sixteenth of the FP32 rate); few-shot sizes by
//   the number of blocks, T * ceil(Q / 64): one a multiprocessor from T = 64 on
// - shared memory: 28 or 30 KB in float32 and 16-bit types, so two blocks a multiprocessor on every
//   architecture; 54 KB in float64, one block where 64 or 100 KB are all there is
// - banks: scores have pitch 68: 16-byte stores by neighbouring lanes, and reads of 8 rows x 4
//   columns a warp that touch 32 different banks
// - divergence: all threads follow the same classes, so branches on classes are uniform
#pragma once
#include "matching/matching_tensor_kernel.cuh"

namespace fastmeta::matching::cuda {

// Blocks of the forward a multiprocessor: a third one works while others wait for shared memory.
// sm_75 has no shared memory for it; from sm_100 on, and to keep scores (of tasks too small to fill
// the device), something would have to spill.
template <class Product, class acc, bool kKeepsScores>
constexpr int forward_blocks(int capability) {
  if (std::is_same_v<acc, double>) return 1;
  const bool third = capability >= 8 && capability < 10 && !kKeepsScores;
  return std::is_same_v<Product, DotProduct> && third ? 3 : 2;
}
#if defined(__CUDA_ARCH__)
inline constexpr int kCapability = __CUDA_ARCH__ / 100;
#else
inline constexpr int kCapability = 8;
#endif

template <class Product, class acc>
struct ForwardShared {
  StageOf<Product, acc> stage;
  acc score[kTile][kPitch];
  Side<acc> query, support;
  int64_t cls[kTile];
  int64_t class_end[kTile];  // where the support's class ends, in the sorted order
};

// Sum of exp(z) over some scores z, as sum * exp(max).
template <class acc>
struct LogSum {
  acc max = -infinity<acc>(), sum = 0;

  static __device__ __forceinline__ acc weight(acc from, acc to) {  // also where both are infinite
    return from == to ? acc(1) : exp_(from - to);
  }
  __device__ __forceinline__ void merge(acc other_max, acc other_sum) {
    const acc top = max_(max, other_max);
    sum = sum * weight(max, top) + other_sum * weight(other_max, top);
    max = top;
  }
  // Merges with the lane `offset` away; both lanes compute the same expression, to the same bits.
  __device__ __forceinline__ void merge_lane(int offset) {
    const acc other_max = __shfl_xor_sync(kFullMask, max, offset);
    const acc other_sum = __shfl_xor_sync(kFullMask, sum, offset);
    const bool upper = threadIdx.x & offset;
    LogSum first{upper ? other_max : max, upper ? other_sum : sum};
    first.merge(upper ? max : other_max, upper ? sum : other_sum);
    *this = first;
  }
  // Merges all lanes of the warp.
  __device__ __forceinline__ void merge_lanes() {
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) merge_lane(offset);
  }
  __device__ __forceinline__ acc log() const { return max + log_(sum); }
};

// What a block leaves of a query when others have the rest of its supports. The class that an
// earlier split began ends, or runs through, in `first`; the one that goes on in the next split and
// began here is in `last`; classes that lie within the split are in out. For nll `first` is of the
// target's class alone. What the class order says is not there is not written.
template <class acc>
struct SplitSums {
  LogSum<acc> total, first, last;
};

template <class scalar_t>
struct ForwardParams {
  using acc = acc_t<scalar_t>;
  ProblemParams<scalar_t> problem;
  int64_t query_blocks;
  int64_t splits, split_size;  // of the supports in class order
  SplitSums<acc>* partial;     // [T * Q, splits], nullptr where supports are not split
  acc* out;
  acc* lse;
  acc* scores;  // kept for the backward: [T, Q, S] sums over the features
};

template <class scalar_t, class Product, bool kKeepsScores>
__global__ void __launch_bounds__(
    kThreads, (forward_blocks<Product, acc_t<scalar_t>, kKeepsScores>(kCapability)))
    forward_kernel(const __grid_constant__ ForwardParams<scalar_t> params) {
  using acc = acc_t<scalar_t>;
  constexpr int kParts = kThreads / kTile;  // threads of a query when its scores are folded
  using Shared = ForwardShared<Product, acc>;
  FASTMETA_DYNAMIC_SHARED(Shared, shared);
  const ProblemParams<scalar_t>& p = params.problem;
  const int thread = threadIdx.x, ty = thread / kAcross, tx = thread % kAcross;
  const int i = thread / kParts, part = thread % kParts;
  const acc none = -infinity<acc>();

  const int64_t work_items = p.num_tasks * params.query_blocks * params.splits;
  for (int64_t work = blockIdx.x; work < work_items; work += gridDim.x) {
    const int64_t query_block = work / params.splits, split = work % params.splits;
    const int64_t task = query_block / params.query_blocks;
    const int64_t query0 = query_block % params.query_blocks * kTile;
    const int64_t* class_start = p.class_start + task * (p.num_classes + 1);
    const int64_t* order = p.order + task * p.num_supports;
    const int64_t begin = split * params.split_size, rest = class_start[p.num_classes] - begin;
    const int64_t num_valid = begin + (rest < params.split_size ? rest : params.split_size);
    const acc scale = p.scale[task * p.scale_stride];
    const acc* weight = p.weight == nullptr ? nullptr : p.weight + task * p.weight_stride;

    const int64_t row = task * p.num_queries + query0 + i;
    const bool owns = query0 + i < p.num_queries;
    const int64_t target = owns && p.targets != nullptr ? p.targets[row] : -1;
    acc* out = params.out + (p.targets != nullptr ? row : row * p.num_classes);
    // Class c of a query is written and read by its thread c % kParts alone.
    const auto write_empty = [&](int64_t from, int64_t to) {
      if (!owns || p.targets != nullptr || params.partial != nullptr) return;
      for (int64_t c = from + ((part - from) & (kParts - 1)); c < to; c += kParts) out[c] = none;
    };

    if (thread < kTile) {  // nobody looks at the last work item's queries after its last barrier
      const int64_t query = query0 + thread;
      set_row(shared->query, thread, query < p.num_queries ? task * p.num_queries + query : -1,
              p.query_factor);
    }
    LogSum<acc> total, running;  // of the query (in all its threads), of this thread in the class
    const auto split_sums = [&]() -> SplitSums<acc>& {
      return params.partial[row * params.splits + split];
    };
    // Whether the sums in `running`, of class cls, belong to `first`; leaves them there.
    const auto leave_first = [&](int64_t cls) {
      if (params.partial == nullptr) return false;
      const bool is_first = p.targets != nullptr ? cls == target : class_start[cls] < begin;
      if (is_first && owns && part == 0) split_sums().first = running;
      return is_first;
    };
    acc target_lse = none;
    int64_t next_class = 0, open_class = -1;  // that goes on in the next tile
    for (int64_t support0 = begin; support0 < num_valid; support0 += kTile) {
      __syncthreads();  // the last tile's scores and classes have been read
      if (thread < kTile) {
        const int64_t position = support0 + thread;
        const bool is_valid = position < num_valid;
        const int64_t support = is_valid ? task * p.num_supports + order[position] : -1;
        set_row(shared->support, thread, support, p.support_factor);
        const int64_t cls = is_valid ? p.labels[support] : p.num_classes;
        shared->cls[thread] = cls;
        shared->class_end[thread] = is_valid ? class_start[cls + 1] : position + 1;
      }
      __syncthreads();
      acc sum[4][4];
      if constexpr (Product::kTensor) {
        tensor_product(shared->stage, p.query, shared->query, p.support, shared->support, p.dim,
                       p.vector, sum);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = tensor_row(e), column = tensor_column(kTensorTiles, j, e);
            shared->score[i][column] = scale * sum[j][e];
          }
        }
      } else {
        tile_product<Product>(shared->stage, p.query, shared->query, p.support, shared->support,
                              weight, p.dim, p.vector, sum);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          Pack<acc> score;
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            score.v[c] = scale * similarity_of(p.similarity, sum[r][c]);
          }
          *reinterpret_cast<Pack<acc>*>(&shared->score[ty * 4 + r][tx * 4]) = score;
        }
      }
      if constexpr (kKeepsScores) {
        const auto keep = [&](int i, int column, acc value) {
          const int64_t query = shared->query.row[i], support = shared->support.row[column];
          if (query < 0 || support < 0) return;
          params.scores[query * p.num_supports + support - task * p.num_supports] = value;
        };
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            if constexpr (Product::kTensor) {
              keep(tensor_row(c), tensor_column(kTensorTiles, r, c), sum[r][c]);
            } else {
              keep(ty * 4 + r, tx * 4 + c, sum[r][c]);
            }
          }
        }
      }
      __syncthreads();

      const int count =
          static_cast<int>(num_valid - support0 < kTile ? num_valid - support0 : kTile);
      const acc* score = shared->score[i];
      for (int column = 0; column < count;) {
        const int64_t cls = shared->cls[column], class_end = shared->class_end[column] - support0;
        const int end = class_end < count ? static_cast<int>(class_end) : count;
        acc top = running.max;
        for (int c = column + part; c < end; c += kParts) top = max_(top, score[c]);
        running.sum *= LogSum<acc>::weight(running.max, top);
        running.max = top;
        for (int c = column + part; c < end; c += kParts) {
          if (score[c] != none) running.sum += LogSum<acc>::weight(score[c], top);
        }
        column = end;
        open_class = class_end > count ? cls : -1;
        if (open_class >= 0) break;
        running.merge_lane(1);
        running.merge_lane(2);
        const acc class_lse = running.log();
        write_empty(next_class, cls);
        if (!leave_first(cls) && owns && p.targets == nullptr && (cls & (kParts - 1)) == part) {
          out[cls] = class_lse;
        }
        if (cls == target) target_lse = class_lse;
        total.merge(running.max, running.sum);
        running = {};
        next_class = cls + 1;
      }
    }
    write_empty(next_class, p.num_classes);

    if (params.partial != nullptr) {
      if (open_class >= 0) {
        running.merge_lane(1);
        running.merge_lane(2);
        total.merge(running.max, running.sum);
        if (!leave_first(open_class) && owns && part == 0) split_sums().last = running;
      }
      if (owns && part == 0) split_sums().total = total;
      continue;
    }
    if (!owns) continue;
    const acc lse = total.log();
    if (part == 0) params.lse[row] = lse;
    if (p.targets != nullptr) {
      const bool counts = target >= 0 && target < p.num_classes;
      const acc nll = target_lse == none ? infinity<acc>() : lse - target_lse;
      if (part == 0) *out = counts ? nll : acc(0);
      continue;
    }
    for (int64_t c = part; c < p.num_classes; c += kParts) {
      const acc class_lse = out[c];
      if (class_lse != none) out[c] = class_lse - lse;
    }
  }
}

// Puts the splits of a query together, in their order: a warp a query.
template <class acc>
__global__ void __launch_bounds__(kThreads, 4)
    merge_splits_kernel(const SplitSums<acc>* __restrict__ partial,
                        const int64_t* __restrict__ class_start,
                        const int64_t* __restrict__ targets, int64_t num_tasks, int64_t num_queries,
                        int64_t num_classes, int64_t splits, int64_t split_size,
                        acc* __restrict__ out, acc* __restrict__ lse) {
  const acc none = -infinity<acc>();
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarpSize);
  int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  for (; row < num_tasks * num_queries; row += warps) {
    const int64_t* start = class_start + divide(row, num_queries) * (num_classes + 1);
    const SplitSums<acc>* parts = partial + row * splits;
    LogSum<acc> total;
    for (int64_t split = lane; split < splits; split += kWarpSize) {
      total.merge(parts[split].total.max, parts[split].total.sum);
    }
    total.merge_lanes();
    const acc row_lse = total.log();
    if (lane == 0) lse[row] = row_lse;

    if (targets != nullptr) {
      const int64_t target = targets[row];
      const bool counts = target >= 0 && target < num_classes;
      LogSum<acc> sums;
      if (counts && start[target] < start[target + 1]) {
        const int64_t last = divide(start[target + 1] - 1, split_size);
        for (int64_t split = divide(start[target], split_size) + lane; split <= last;
             split += kWarpSize) {
          sums.merge(parts[split].first.max, parts[split].first.sum);
        }
      }
      sums.merge_lanes();
      const acc target_lse = sums.log();
      const acc nll = target_lse == none ? infinity<acc>() : row_lse - target_lse;
      if (lane == 0) out[row] = counts ? nll : acc(0);
      continue;
    }
    for (int64_t c = lane; c < num_classes; c += kWarpSize) {
      acc* to = out + row * num_classes + c;
      acc class_lse = none;
      if (start[c] < start[c + 1]) {
        const int64_t begin = divide(start[c], split_size);
        const int64_t last = divide(start[c + 1] - 1, split_size);
        if (begin == last) {
          class_lse = *to;
        } else {
          LogSum<acc> sums = parts[begin].last;
          for (int64_t split = begin + 1; split <= last; ++split) {
            sums.merge(parts[split].first.max, parts[split].first.sum);
          }
          class_lse = sums.log();
        }
      }
      *to = class_lse == none ? none : class_lse - row_lse;
    }
  }
}

}  // namespace fastmeta::matching::cuda
