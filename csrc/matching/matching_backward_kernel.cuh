// Device code of the backward of matching_attention and matching_nll.
//
// One kernel, two uses: a block owns 64 queries and streams the valid supports (grad_query, and
// partial sums of grad_scale and grad_weight), or owns 64 supports and streams the queries
// (grad_support). Every gradient has one owner, so nothing is added atomically. A tile's scores
// are recomputed, to the bit, turned into dL/dz by lse, out and grad, and kept in shared memory;
// then the other side's rows are streamed again, kDepth at a time, into 64 x kSlice gradients that
// live in registers.
//
// - slices: a block owns kSlice features of its rows' gradients; blocks of other slices
//   recompute the scores. That takes any D, at Q * S * D * (slices + 1) multiply-adds instead of
//   2 * Q * S * D: nothing is repeated at D = 64 (Conv4), and at D = 1600 the slices are what
//   gives few-shot tasks enough blocks
// - bytes: b * (D + kSlice) for every row a block streams, from L2 where blocks share a task
// - FLOPs: 2 * Q * S * D * (slices + 1) for dot products, 3 for differences, for each of the two
//   uses
// - bound: by FP32 units for D above about 32 (19.5 TFLOP/s on A100, 67 on H100)
// - shared memory: 29 KB in float32 and 16-bit types: two blocks a multiprocessor on every
//   architecture; 56 KB in float64, one block where 64 or 100 KB are all there is
// - banks: dL/dz is stored transposed, 16 bytes a lane, four ways in conflict but only twice a
//   tile, and read at one address by 16 lanes; the streamed rows are stored and read by
//   neighbouring lanes
#pragma once
#include "matching/matching_tile_kernel.cuh"

namespace fastmeta::matching::cuda {

// Features of a slice: what leaves room for two blocks a multiprocessor by registers in float32,
// where slopes that depend on the own row keep that row's features as well. float64 has room for
// one block.
template <class Product, class acc>
inline constexpr int kSlice =
    Product::kSlopeReadsOwn || std::is_same_v<acc, double> ? kTile : 2 * kTile;

template <class scalar_t>
struct BackwardParams {
  using acc = acc_t<scalar_t>;
  ProblemParams<scalar_t> problem;
  int64_t row_blocks, slices;
  const acc* __restrict__ grad;
  const acc* __restrict__ out;
  const acc* __restrict__ lse;
  const acc* __restrict__ grad_sum;  // attention: [T * Q], of grad over the classes with support
  scalar_t* grad_rows;               // of the owned rows
  acc* scale_partial;                // [T, row_blocks]
  acc* weight_partial;               // [T, row_blocks, D], additive
};

// What dL/dz needs of a query. Ignored queries have row -1 and are never read.
template <class acc>
struct QueryTerms {
  acc lse[kTile];
  acc pull[kTile];        // attention: sum of grad over the classes; nll: grad
  acc nll[kTile];         // nll
  int64_t target[kTile];  // nll
};

template <class acc, int kFeatures>
struct BackwardShared {
  union {
    Stage<acc> stage;
    alignas(16) acc rows[kDepth][kFeatures];
  };
  alignas(16) acc slope[kTile][kPitch];  // [other][own]: dL/dz * slope_factor
  Side<acc> own, other;
  QueryTerms<acc> terms;
  int64_t cls[kTile];  // of the supports, -1 for none
  acc row_sum[kTile];
};

// grad_sum[t, q] = sum of grad over the classes that have support: a warp a query.
template <class acc>
__global__ void __launch_bounds__(kThreads)
    grad_sum_kernel(const acc* __restrict__ grad, const int64_t* __restrict__ class_start,
                    int64_t num_tasks, int64_t num_queries, int64_t num_classes,
                    acc* __restrict__ grad_sum) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarpSize);
  int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  for (; row < num_tasks * num_queries; row += warps) {
    const int64_t* start = class_start + divide(row, num_queries) * (num_classes + 1);
    acc sum = 0;
    for (int64_t c = lane; c < num_classes; c += kWarpSize) {
      if (start[c] < start[c + 1]) sum += grad[row * num_classes + c];
    }
    sum = lane_sum(sum);
    if (lane == 0) grad_sum[row] = sum;
  }
}

// Sums partial[row, 0..count) in order into sum[row], for `width` neighbouring columns of every
// row.
template <class acc>
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const acc* __restrict__ partial, int64_t rows, int64_t count, int64_t width,
                        acc* __restrict__ sum) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i < rows * width; i += stride) {
    const int64_t row = divide(i, width), column = i - row * width;
    acc total = 0;
    for (int64_t k = 0; k < count; ++k) total += partial[(row * count + k) * width + column];
    sum[i] = total;
  }
}

template <class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void set_query(const BackwardParams<scalar_t>& params, int i,
                                          int64_t row, Side<acc>& side, QueryTerms<acc>& terms) {
  const ProblemParams<scalar_t>& p = params.problem;
  if (row >= 0) {
    if (p.targets != nullptr) {
      const int64_t target = p.targets[row];
      terms.target[i] = target;
      terms.pull[i] = params.grad[row];
      terms.nll[i] = params.out[row];
      // Ignored, or its class has no support: no gradient, whatever the query holds.
      if (target < 0 || target >= p.num_classes || terms.nll[i] == infinity<acc>()) row = -1;
    } else {
      terms.pull[i] = params.grad_sum[row];
    }
  }
  if (row >= 0) terms.lse[i] = params.lse[row];
  set_row(side, i, row, p.query_factor);
}

template <class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void set_support(const ProblemParams<scalar_t>& p, int i, int64_t row,
                                            Side<acc>& side, int64_t* cls) {
  int64_t label = row >= 0 ? p.labels[row] : -1;
  if (label < 0 || label >= p.num_classes) label = row = -1;
  cls[i] = label;
  set_row(side, i, row, p.support_factor);
}

// dL/dz of a query (place i in terms, flat row) and a support of class cls.
template <class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ acc score_gradient(const BackwardParams<scalar_t>& params,
                                              const QueryTerms<acc>& terms, int i, int64_t row,
                                              int64_t cls, acc z) {
  if (row < 0 || cls < 0) return 0;
  const acc relative = z - terms.lse[i];
  if (params.problem.targets != nullptr) {
    if (cls != terms.target[i]) return terms.pull[i] * exp_(relative);
    // exp(relative) - exp(relative + nll), without cancellation where the class is nearly certain
    return terms.pull[i] * exp_(relative + terms.nll[i]) * expm1_(-terms.nll[i]);
  }
  const int64_t at = row * params.problem.num_classes + cls;
  const acc log_p = params.out[at];
  if (log_p == -infinity<acc>()) return 0;
  return exp_(relative - log_p) * (params.grad[at] - exp_(log_p) * terms.pull[i]);
}

template <class scalar_t, class Product, bool kOwnsQueries>
__global__ void __launch_bounds__(kThreads, kBlocks<acc_t<scalar_t>>)
    backward_kernel(const __grid_constant__ BackwardParams<scalar_t> params) {
  using acc = acc_t<scalar_t>;
  constexpr int kFeatures = kSlice<Product, acc>;
  constexpr int kPatches = kFeatures / kTile;  // 4 x 4 patches of gradients a thread
  constexpr int kFetches = kDepth * kFeatures / (kThreads * kPack);
  using Shared = BackwardShared<acc, kFeatures>;
  FASTMETA_DYNAMIC_SHARED(Shared, shared);
  const ProblemParams<scalar_t>& p = params.problem;
  const int thread = threadIdx.x, ty = thread / kAcross, tx = thread % kAcross;
  const int64_t num_own = kOwnsQueries ? p.num_queries : p.num_supports;
  const scalar_t* own_rows = kOwnsQueries ? p.query : p.support;
  const scalar_t* other_rows = kOwnsQueries ? p.support : p.query;

  const int64_t work_items = p.num_tasks * params.row_blocks * params.slices;
  for (int64_t work = blockIdx.x; work < work_items; work += gridDim.x) {
    const int64_t slice = work % params.slices, row_block = work / params.slices;
    const int64_t task = row_block / params.row_blocks;
    const int64_t own0 = row_block % params.row_blocks * kTile;
    const int64_t feature0 = slice * kFeatures;
    const acc scale = p.scale[task * p.scale_stride];
    const acc* weight = p.weight == nullptr ? nullptr : p.weight + task * p.weight_stride;

    __syncthreads();  // the last work item is done with shared memory
    bool active = false;
    if (thread < kTile) {
      const int64_t row = own0 + thread < num_own ? task * num_own + own0 + thread : -1;
      if constexpr (kOwnsQueries) {
        set_query(params, thread, row, shared->own, shared->terms);
      } else {
        set_support(p, thread, row, shared->own, shared->cls);
      }
      active = shared->own.row[thread] >= 0;
    }
    const bool any_active = __syncthreads_or(active);
    int64_t num_other =
        kOwnsQueries ? p.class_start[task * (p.num_classes + 1) + p.num_classes] : p.num_queries;
    if (!any_active) num_other = 0;  // padding, or ignored queries: only zeros to write

    acc gradient[4][kPatches * kPack], weight_sum[kPatches * kPack], row_sum[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      row_sum[r] = 0;
#pragma unroll
      for (int c = 0; c < kPatches * kPack; ++c) gradient[r][c] = 0;
    }
#pragma unroll
    for (int c = 0; c < kPatches * kPack; ++c) weight_sum[c] = 0;

    for (int64_t other0 = 0; other0 < num_other; other0 += kTile) {
      if (thread < kTile) {  // nobody looks at the last tile's other side after its last barrier
        const int64_t position = other0 + thread;
        const bool exists = position < num_other;
        if constexpr (kOwnsQueries) {
          const int64_t* order = p.order + task * p.num_supports;
          set_support(p, thread, exists ? task * p.num_supports + order[position] : -1,
                      shared->other, shared->cls);
        } else {
          set_query(params, thread, exists ? task * p.num_queries + position : -1, shared->other,
                    shared->terms);
        }
      }
      __syncthreads();

      acc sum[4][4];
      tile_product<Product>(shared->stage, own_rows, shared->own, other_rows, shared->other, weight,
                            p.dim, p.vector, sum);
      // The sums go through this thread's own patch of the slopes, so that the loop that turns them
      // into slopes need not be unrolled: exp and expm1 sixteen times over outgrow the cache.
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        Pack<acc> column;
#pragma unroll
        for (int r = 0; r < 4; ++r) column.v[r] = sum[r][c];
        *reinterpret_cast<Pack<acc>*>(&shared->slope[tx * 4 + c][ty * 4]) = column;
      }
#pragma unroll 1
      for (int c = 0; c < 4; ++c) {
        Pack<acc>* patch = reinterpret_cast<Pack<acc>*>(&shared->slope[tx * 4 + c][ty * 4]);
        Pack<acc> column = *patch;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int own = ty * 4 + r, other = tx * 4 + c;
          const int query = kOwnsQueries ? own : other, support = kOwnsQueries ? other : own;
          const int64_t row = (kOwnsQueries ? shared->own : shared->other).row[query];
          const acc similarity = similarity_of(p.similarity, column.v[r]);
          const acc dz = score_gradient(params, shared->terms, query, row, shared->cls[support],
                                        scale * similarity);
          row_sum[r] += dz * similarity;
          column.v[r] = dz * slope_factor(p.similarity, column.v[r]);
        }
        *patch = column;
      }

      // Own features, where the slope depends on them: read anew for every tile (from L1), because
      // kept through tile_product they would cost the second block a multiprocessor.
      acc own_value[4][kPatches * kPack];
      if constexpr (Product::kSlopeReadsOwn) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
          for (int patch = 0; patch < kPatches; ++patch) {
            acc value[kPack];
            fetch_pack<false>(own_rows, shared->own.row[ty * 4 + r], acc(1),
                              feature0 + patch * kTile + tx * kPack, p.dim, p.vector, value);
#pragma unroll
            for (int c = 0; c < kPack; ++c) own_value[r][patch * kPack + c] = value[c];
          }
        }
      }

      const int count =
          static_cast<int>(num_other - other0 < kTile ? num_other - other0 : int64_t{kTile});
      for (int k0 = 0; k0 < count; k0 += kDepth) {
        __syncthreads();  // the stage, or the last rows, have been read; the slopes are written
#pragma unroll
        for (int f = 0; f < kFetches; ++f) {
          const int at = (f * kThreads + thread) * kPack;
          const int k = at / kFeatures, column = at % kFeatures;
          acc value[kPack];
          fetch_pack<Product::kScalesRows>(other_rows, shared->other.row[k0 + k],
                                           shared->other.factor[k0 + k], feature0 + column, p.dim,
                                           p.vector, value);
          store<kPack>(&shared->rows[k][column], value);
        }
        __syncthreads();
#pragma unroll Product::kSlopeUnroll
        for (int k = 0; k < kDepth; ++k) {
          const Pack<acc> slope =
              *reinterpret_cast<const Pack<acc>*>(&shared->slope[k0 + k][ty * 4]);
#pragma unroll
          for (int patch = 0; patch < kPatches; ++patch) {
            const Pack<acc> other =
                *reinterpret_cast<const Pack<acc>*>(&shared->rows[k][patch * kTile + tx * kPack]);
#pragma unroll
            for (int c = 0; c < kPack; ++c) {
              const int column = patch * kPack + c;
#pragma unroll
              for (int r = 0; r < 4; ++r) {
                if constexpr (Product::kWeighs) {
                  const acc value = tanh_(own_value[r][column] + other.v[c]);
                  gradient[r][column] += slope.v[r] * (acc(1) - value * value);
                  if constexpr (kOwnsQueries) weight_sum[column] += slope.v[r] * value;
                } else if constexpr (Product::kSlopeReadsOwn) {
                  gradient[r][column] +=
                      slope.v[r] * Product::slope(own_value[r][column], other.v[c]);
                } else {
                  gradient[r][column] += slope.v[r] * Product::slope(acc(0), other.v[c]);
                }
              }
            }
          }
        }
      }
    }

#pragma unroll
    for (int r = 0; r < 4; ++r) {
      row_sum[r] = lane_sum<kAcross>(row_sum[r]);
      const int own = ty * 4 + r;
      if (own0 + own >= num_own) continue;
      const int64_t row = shared->own.row[own];
      const acc factor = shared->own.factor[own];
#pragma unroll
      for (int patch = 0; patch < kPatches; ++patch) {
        const int64_t feature = feature0 + patch * kTile + tx * kPack;
        acc value[kPack];
        if (p.similarity ==
            Similarity::kCosine) {  // the part along the row changes its length alone
          fetch_pack<true>(own_rows, row, factor, feature, p.dim, p.vector, value);
        }
#pragma unroll
        for (int c = 0; c < kPack; ++c) {
          acc result = gradient[r][patch * kPack + c];
          if (p.similarity == Similarity::kCosine)
            result = factor * (result - value[c] * row_sum[r]);
          if (Product::kWeighs) result *= feature + c < p.dim ? weight[feature + c] : acc(0);
          value[c] = row >= 0 ? scale * result : acc(0);
        }
        scalar_t* to = params.grad_rows + (task * num_own + own0 + own) * p.dim + feature;
        if (p.vector) {
          if (feature < p.dim) store<kPack>(to, value);
        } else {
#pragma unroll
          for (int c = 0; c < kPack; ++c) {
            if (feature + c < p.dim) to[c] = from_acc<scalar_t>(value[c]);
          }
        }
      }
    }

    if constexpr (kOwnsQueries) {
      if constexpr (Product::kWeighs) {
        __syncthreads();  // the slopes have been read: their place takes the sums of weight
      }
      if (slice == 0 && tx == 0) {
#pragma unroll
        for (int r = 0; r < 4; ++r) shared->row_sum[ty * 4 + r] = row_sum[r];
      }
      acc(*by_row)[kFeatures] = reinterpret_cast<acc(*)[kFeatures]>(&shared->slope[0][0]);
      static_assert(kAcross * kFeatures <= kTile * kPitch);
      if constexpr (Product::kWeighs) {
#pragma unroll
        for (int column = 0; column < kPatches * kPack; ++column) {
          by_row[ty][column / kPack * kTile + tx * kPack + column % kPack] = weight_sum[column];
        }
      }
      __syncthreads();
      if (slice == 0 && thread == 0) {
        acc total = 0;
        for (int r = 0; r < kTile; ++r) total += shared->row_sum[r];
        params.scale_partial[row_block] = total;
      }
      if constexpr (Product::kWeighs) {
        if (thread < kFeatures && feature0 + thread < p.dim) {
          acc total = 0;
#pragma unroll
          for (int r = 0; r < kAcross; ++r) total += by_row[r][thread];
          params.weight_partial[row_block * p.dim + feature0 + thread] = scale * total;
        }
      }
    }
  }
}

}  // namespace fastmeta::matching::cuda
