// Device code of the backward of matching_attention and matching_nll.
//
// One kernel, two kinds of work: a block owns 64 queries and streams the valid supports
// (grad_query, and partial sums of grad_scale and grad_weight), or owns 64 supports and streams the
// queries (grad_support). Every gradient has one owner, so nothing is added atomically. A tile's
// scores are recomputed, to the bit, turned into dL/dz by lse, out and grad, and kept in shared
// memory; then the other side's rows are streamed again, kDepth at a time, into 64 x kSlice
// gradients that live in registers.
//
// - kept sums: the forward of few-shot tasks leaves its sums over the features, 4 * Q * S bytes,
//   and the first product falls away
// - splits: where rows of a side are too few for the device and the other side is long, blocks
//   share the rows that they stream, and leave sums that merge_gradients_kernel puts together in
//   their order: D + 1 numbers a row and split. Sizes and device alone say how many
// - slices: registers hold kSlice features of the gradients. Where the other side fits in kMaxTiles
//   tiles, which few-shot tasks do, a block computes its slopes once and then takes slice after
//   slice, as many as leave blocks enough (backward_slices): Q * S * D * 2 multiply-adds where all
//   slices are one block's, and Q * S * D * (blocks of a row + 1) else. Longer sides take one slice
//   a block, and nothing is repeated up to D = kSlice. Either way every sum has the same order
// - bytes: b * (D + kSlice) for every row a block streams, from L2 where blocks share a task
// - FLOPs: 4 * Q * S * D for dot products and up, see above; 3 for differences; for each of the two
//   kinds
// - bound: by FP32 units for D above about 32 (19.5 TFLOP/s on A100, 67 on H100)
// - tensor cores: scores as in the forward. Gradients are products of TF32: rows of 16-bit types
//   are exact in it, and dL/dz is split in two terms that keep 22 bits of it, so one float32
//   product becomes two at 8 times its rate (A100: 156 TFLOP/s). In float32 with TF32 allowed: one
// - shared memory: 29 KB a tile of slopes in float32 and 16-bit types, 17 KB more for a second one:
//   two blocks a multiprocessor, but for two tiles on sm_75; 56 KB in float64, one block where 64
//   or 100 KB are all there is
// - banks: dL/dz is stored transposed, 16 bytes a lane, four ways in conflict but only twice a
//   tile, and read at one address by 16 lanes; the streamed rows are stored and read by
//   neighbouring lanes. The fragments of tensor cores are 4 rows by 8 neighbours, and pitches of 8
//   modulo 32 spread them over all banks
#pragma once
#include "matching/matching_gradient_kernel.cuh"

namespace fastmeta::matching::cuda {

// grad_sum[t, q] = sum of grad over the classes that have a probability: a warp a query.
template <class acc>
__global__ void __launch_bounds__(kThreads)
    grad_sum_kernel(const acc* __restrict__ grad, const acc* __restrict__ log_p, int64_t num_rows,
                    int64_t num_classes, acc* __restrict__ grad_sum) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarpSize);
  int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  for (; row < num_rows; row += warps) {
    acc sum = 0;
    for (int64_t c = lane; c < num_classes; c += kWarpSize) {
      const int64_t at = row * num_classes + c;
      if (log_p[at] != -infinity<acc>()) sum += grad[at];
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

// Whether a query has a gradient: not if it is ignored, or its class has no support, whatever the
// query holds.
template <class scalar_t>
__device__ __forceinline__ bool query_counts(const BackwardParams<scalar_t>& params, int64_t row) {
  const ProblemParams<scalar_t>& p = params.problem;
  if (p.targets == nullptr) return true;
  const int64_t target = p.targets[row];
  return target >= 0 && target < p.num_classes && params.out[row] != infinity<acc_t<scalar_t>>();
}

// The sum of dL/dz over the supports is 0, so of similarities a constant may be taken off before
// they are weighed by it: else what all supports of a far query have in common would leave its
// rounding in the gradient of the scale. This one, log(mean exp z) / scale, lies between the
// smallest and the largest of them; of a tiny scale nothing is left of it, nor is it needed.
template <class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ acc centre_of(const ProblemParams<scalar_t>& p, int64_t task, acc lse) {
  if (p.similarity == Similarity::kCosine) return 0;
  const int64_t valid = p.class_start[task * (p.num_classes + 1) + p.num_classes];
  const acc mean = lse - log_(static_cast<acc>(valid));
  const acc centre = mean / p.scale[task * p.scale_stride];
  return abs_(mean) > acc(0.001) && abs_(centre) < infinity<acc>() ? centre : acc(0);
}

template <class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void set_query(const BackwardParams<scalar_t>& params, int i,
                                          int64_t row, Side<acc>& side, QueryTerms<acc>& terms) {
  const ProblemParams<scalar_t>& p = params.problem;
  if (row >= 0 && !query_counts(params, row)) row = -1;
  if (row >= 0) {
    if (p.targets != nullptr) {
      terms.target[i] = p.targets[row];
      terms.pull[i] = params.grad[row];
      terms.nll[i] = params.out[row];
    } else {
      terms.pull[i] = params.grad_sum[row];
    }
    terms.lse[i] = params.lse[row];
  }
  set_row(side, i, row, p.query_factor);
}

template <class scalar_t>
__device__ __forceinline__ bool support_counts(const ProblemParams<scalar_t>& p, int64_t row) {
  return p.labels[row] >= 0 && p.labels[row] < p.num_classes;
}

template <class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void set_support(const ProblemParams<scalar_t>& p, int i, int64_t row,
                                            Side<acc>& side, int64_t* cls) {
  if (row >= 0 && !support_counts(p, row)) row = -1;
  cls[i] = row >= 0 ? p.labels[row] : -1;
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

// Sums over the features for a tile of pairs, into the place of their slopes: each thread finds its
// patch there, columns as packs.
template <bool kOwnsQueries, class Product, class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void form_sums(const BackwardParams<scalar_t>& params,
                                          BackwardShared<Product, acc>& shared,
                                          const Side<acc>& other_side,
                                          SlopeTile<Product, acc>& tile) {
  const ProblemParams<scalar_t>& p = params.problem;
  const scalar_t* own_rows = kOwnsQueries ? p.query : p.support;
  const scalar_t* other_rows = kOwnsQueries ? p.support : p.query;
  const int ty = threadIdx.x / kAcross, tx = threadIdx.x % kAcross;
  acc sum[4][4];
  if constexpr (Product::kTensor) {
    tensor_product(shared.stage, own_rows, shared.own, other_rows, other_side, p.dim, p.vector,
                   sum);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        tile.slope[tensor_column(kTensorTiles, j, e)][tensor_row(e)] = sum[j][e];
      }
    }
    __syncthreads();  // the sums go to the threads of the patches
  } else {
    const acc* weight = Product::kWeighs ? p.weight + shared.task * p.weight_stride : nullptr;
    tile_product<Product>(shared.stage, own_rows, shared.own, other_rows, other_side, weight, p.dim,
                          p.vector, sum);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      Pack<acc> column;
#pragma unroll
      for (int r = 0; r < 4; ++r) column.v[r] = sum[r][c];
      *reinterpret_cast<Pack<acc>*>(&tile.slope[tx * 4 + c][ty * 4]) = column;
    }
  }
}

// The same from what the forward kept.
template <bool kOwnsQueries, class Product, class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void load_sums(const BackwardParams<scalar_t>& params,
                                          const BackwardShared<Product, acc>& shared,
                                          const Side<acc>& other_side,
                                          SlopeTile<Product, acc>& tile) {
  const int64_t num_supports = params.problem.num_supports;
  const int64_t first = shared.task * num_supports;  // supports count from task 0
  const int ty = threadIdx.x / kAcross, tx = threadIdx.x % kAcross;
#pragma unroll 1
  for (int c = 0; c < 4; ++c) {
    Pack<acc> column;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t own = shared.own.row[ty * 4 + r], other = other_side.row[tx * 4 + c];
      const int64_t query = kOwnsQueries ? own : other, support = kOwnsQueries ? other : own;
      const bool exists = own >= 0 && other >= 0;
      column.v[r] = exists ? params.scores[query * num_supports + support - first] : acc(0);
    }
    *reinterpret_cast<Pack<acc>*>(&tile.slope[tx * 4 + c][ty * 4]) = column;
  }
}

// Slopes of a tile of pairs, and the rows' sums of dL/dz * similarity, each thread its patch's
// share.
template <bool kOwnsQueries, class Product, class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void fill_slopes(const BackwardParams<scalar_t>& params,
                                            BackwardShared<Product, acc>& shared,
                                            const Side<acc>& other_side,
                                            SlopeTile<Product, acc>& tile, acc (&row_sum)[4]) {
  const ProblemParams<scalar_t>& p = params.problem;
  const int ty = threadIdx.x / kAcross, tx = threadIdx.x % kAcross;
  // The sums go through shared memory, so that the loop that turns them into slopes need not be
  // unrolled: exp and expm1 sixteen times over outgrow the cache.
  if (params.scores != nullptr) {
    load_sums<kOwnsQueries>(params, shared, other_side, tile);
  } else {
    form_sums<kOwnsQueries>(params, shared, other_side, tile);
  }
  const acc scale = p.scale[shared.task * p.scale_stride];
#pragma unroll 1
  for (int c = 0; c < 4; ++c) {
    Pack<acc>* patch = reinterpret_cast<Pack<acc>*>(&tile.slope[tx * 4 + c][ty * 4]);
    Pack<acc> column = *patch;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int own = ty * 4 + r, other = tx * 4 + c;
      const int query = kOwnsQueries ? own : other, support = kOwnsQueries ? other : own;
      const int64_t row = (kOwnsQueries ? shared.own : other_side).row[query];
      const acc similarity = similarity_of(p.similarity, column.v[r]);
      const acc dz =
          score_gradient(params, shared.terms, query, row, shared.cls[support], scale * similarity);
      // Of no row the similarity may be infinite.
      const acc centre = kOwnsQueries ? shared.centre[query] : acc(0);
      if (dz != acc(0)) row_sum[r] += dz * (similarity - centre);
      column.v[r] = dz * slope_factor(p.similarity, column.v[r]);
      // Rows are exact in TF32, scaled ones would not be.
      if constexpr (Product::kTensor) column.v[r] *= other_side.factor[other];
    }
    *patch = column;
  }
}

// One work item of a side: some rows of a task, some of their features, some of the other side's
// rows.
template <class Product, bool kOwnsQueries, class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void backward_block(const BackwardParams<scalar_t>& params,
                                               BackwardShared<Product, acc>* shared, int64_t work) {
  constexpr int kFeatures = kSlice<Product, acc>;
  auto* slopes = reinterpret_cast<SlopeTile<Product, acc>*>(shared + 1);
  const ProblemParams<scalar_t>& p = params.problem;
  const int thread = threadIdx.x, ty = thread / kAcross, tx = thread % kAcross;
  const int64_t num_own = kOwnsQueries ? p.num_queries : p.num_supports;

  const int64_t share = work / params.parts;  // of a block of rows
  const int64_t row_block = share / params.splits, split = share % params.splits;
  const int slice0 = static_cast<int>(work % params.parts) * params.block_slices;

  __syncthreads();  // the last work item is done with shared memory
  const int64_t task = row_block / params.row_blocks;
  const int64_t own0 = row_block % params.row_blocks * kTile;
  // Tiles of the other side in this split, in 32 bits, which is rows in 37; and rows of the last.
  const int64_t others =
      kOwnsQueries ? p.class_start[task * (p.num_classes + 1) + p.num_classes] : p.num_queries;
  const int64_t rest = others - split * params.split_size;
  const int64_t num_other = rest < params.split_size ? rest : params.split_size;
  int num_tiles = num_other > 0 ? static_cast<int>((num_other - 1) / kTile + 1) : 0;
  if (thread == 0) {
    shared->task = task;
    shared->own0 = own0;
    shared->share = share;
    shared->split = split;
    shared->other0 = split * params.split_size;
    shared->last_count = static_cast<int>(num_other - int64_t{num_tiles - 1} * kTile);
  }
  bool active = false;
  if (thread < kTile) {
    const int64_t row = own0 + thread < num_own ? task * num_own + own0 + thread : -1;
    if constexpr (kOwnsQueries) {
      set_query(params, thread, row, shared->own, shared->terms);
      if (shared->own.row[thread] >= 0) {
        shared->centre[thread] = centre_of(p, task, shared->terms.lse[thread]);
      }
    } else {
      set_support(p, thread, row, shared->own, shared->cls);
    }
    active = shared->own.row[thread] >= 0;
  }
  const bool any_active = __syncthreads_or(active);
  if (!any_active) num_tiles = 0;  // padding, or ignored queries: only zeros to write
  const auto count_of = [&](int k) { return k + 1 < num_tiles ? kTile : shared->last_count; };
  Gradient<Product, acc> gradient;
  acc row_sum[4] = {};
  for (int tile0 = 0; tile0 == 0 || tile0 < num_tiles; tile0 += params.tiles) {
    for (int k = 0; k < params.tiles && tile0 + k < num_tiles; ++k) {
      if (k > 0) __syncthreads();  // the last tile's terms have been read
      if (thread < kTile) {
        const int64_t position = shared->other0 + int64_t{tile0 + k} * kTile + thread;
        const bool exists = thread < count_of(tile0 + k);
        if constexpr (kOwnsQueries) {
          const int64_t first = shared->task * p.num_supports;
          set_support(p, thread, exists ? first + p.order[first + position] : -1, shared->other[k],
                      shared->cls);
        } else {
          set_query(params, thread, exists ? shared->task * p.num_queries + position : -1,
                    shared->other[k], shared->terms);
        }
      }
      __syncthreads();
      fill_slopes<kOwnsQueries>(params, *shared, shared->other[k], slopes[k], row_sum);
    }
    const bool is_last = tile0 + params.tiles >= num_tiles;
    if (is_last) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        row_sum[r] = lane_sum<kAcross>(row_sum[r]);
        if (tx == 0) shared->row_sum[ty * 4 + r] = row_sum[r];
      }
      if constexpr (kOwnsQueries || Product::kTensor) __syncthreads();
      if (kOwnsQueries && slice0 == 0 && thread == 0) {
        acc total = 0;
        for (int r = 0; r < kTile; ++r) total += shared->row_sum[r];
        params.scale_partial[shared->share] = total;
      }
    }
    for (int slice = slice0; slice < slice0 + params.block_slices && slice < params.slices;
         ++slice) {
      const int64_t feature0 = int64_t{slice} * kFeatures;
      if (tile0 == 0) gradient.clear();
      for (int k = 0; k < params.tiles && tile0 + k < num_tiles; ++k) {
        add_tile<kOwnsQueries>(params, *shared, shared->other[k], slopes[k], count_of(tile0 + k),
                               feature0, gradient);
      }
      if (!is_last) continue;
      if constexpr (Product::kTensor) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int own = tensor_row(half * 2);
          if (shared->own0 + own >= num_own) continue;
#pragma unroll
          for (int j = 0; j < Gradient<Product, acc>::kProducts; ++j) {
            const int column = tensor_column(Gradient<Product, acc>::kProducts, j, 0);
            const acc pair[2] = {gradient.value[j][half * 2], gradient.value[j][half * 2 + 1]};
            write_gradient<2, kOwnsQueries>(params, *shared, own, shared->row_sum[own],
                                            feature0 + column, pair);
          }
        }
      } else {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int own = ty * 4 + r;
          if (shared->own0 + own >= num_own) continue;
#pragma unroll
          for (int patch = 0; patch < kFeatures / kTile; ++patch) {
            acc pack[kPack];
#pragma unroll
            for (int c = 0; c < kPack; ++c) pack[c] = gradient.value[r][patch * kPack + c];
            write_gradient<kPack, kOwnsQueries>(params, *shared, own, row_sum[r],
                                                feature0 + patch * kTile + tx * kPack, pack);
          }
        }
      }
      if constexpr (kOwnsQueries && Product::kWeighs) {
        static_assert(kAcross == kDepth);
        __syncthreads();  // the rows have been read: their place takes the sums of the weight
#pragma unroll
        for (int column = 0; column < kFeatures / kTile * kPack; ++column) {
          const int feature = column / kPack * kTile + tx * kPack + column % kPack;
          shared->rows[ty][feature] = gradient.weight[column];
        }
        __syncthreads();
        if (thread < kFeatures && feature0 + thread < p.dim) {
          acc total = 0;
#pragma unroll
          for (int r = 0; r < kAcross; ++r) total += shared->rows[r][thread];
          params.weight_partial[shared->share * p.dim + feature0 + thread] =
              p.scale[shared->task * p.scale_stride] * total;
        }
      }
    }
  }
}

// Blocks a multiprocessor, by registers. 16-bit dot products without tensor cores, which is sm_75,
// would spill for a second one.
template <class Product, class scalar_t>
inline constexpr int kBackwardBlocks =
    sizeof(scalar_t) == 2 && std::is_same_v<Product, DotProduct> ? 1 : kBlocks<acc_t<scalar_t>>;

// Both sides' work, in one launch: that of few-shot tasks leaves room on the device beside it.
template <class scalar_t, class Product>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<Product, scalar_t>)
    backward_kernel(const __grid_constant__ BackwardParams<scalar_t> queries,
                    const __grid_constant__ BackwardParams<scalar_t> supports) {
  using Shared = BackwardShared<Product, acc_t<scalar_t>>;
  FASTMETA_DYNAMIC_SHARED(Shared, shared);
  if (blockIdx.x < queries.blocks) {
    for (int64_t work = blockIdx.x; work < queries.work_items; work += queries.blocks) {
      backward_block<Product, true>(queries, shared, work);
    }
    return;
  }
  for (int64_t work = blockIdx.x - queries.blocks; work < supports.work_items;
       work += supports.blocks) {
    backward_block<Product, false>(supports, shared, work);
  }
}

template <int width, bool kOwnsQueries, class scalar_t>
__device__ __forceinline__ void merge_gradients(const BackwardParams<scalar_t>& params) {
  using acc = acc_t<scalar_t>;
  const ProblemParams<scalar_t>& p = params.problem;
  const int64_t num_own = kOwnsQueries ? p.num_queries : p.num_supports;
  const int64_t rows = p.num_tasks * num_own, packs = p.dim / width;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i < rows * packs; i += stride) {
    const int64_t row = divide(i, packs), feature = (i - row * packs) * width;
    acc gradient[width] = {}, row_sum = 0;
#pragma unroll 4
    for (int64_t split = 0; split < params.splits; ++split) {
      acc share[width];
      load<width>(params.partial + (split * rows + row) * p.dim + feature, share);
#pragma unroll
      for (int c = 0; c < width; ++c) gradient[c] += share[c];
      row_sum += params.partial_sum[split * rows + row];
    }
    const bool counts = kOwnsQueries ? query_counts(params, row) : support_counts(p, row);
    const int64_t task = divide(row, num_own), from = counts ? row : -1;
    const acc* factors = kOwnsQueries ? p.query_factor : p.support_factor;
    const acc factor = factors != nullptr ? factors[row] : acc(1);
    if (p.similarity == Similarity::kAdditive) {
      finish_gradient<width, kOwnsQueries, true>(params, task, from, factor, row_sum, row, feature,
                                                 gradient);
    } else {
      finish_gradient<width, kOwnsQueries, false>(params, task, from, factor, row_sum, row, feature,
                                                  gradient);
    }
  }
}

// Puts the splits' shares of a side's gradients together, in their order: a thread has a pack of
// features, or a single one where rows are not packable. Bound by memory: splits * rows * D
// numbers, just written, from L2.
template <class scalar_t, bool kOwnsQueries>
__global__ void __launch_bounds__(kThreads, 4)
    merge_gradients_kernel(const __grid_constant__ BackwardParams<scalar_t> params) {
  if (params.problem.vector) {
    merge_gradients<kPack, kOwnsQueries>(params);
  } else {
    merge_gradients<1, kOwnsQueries>(params);
  }
}

}  // namespace fastmeta::matching::cuda
