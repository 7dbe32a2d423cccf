// What the backward of matching_attention keeps in registers and shared memory, and the step from
// slopes to gradients: a tile of dL/dz times the other side's rows, on FP32 units or tensor cores.
// matching_backward_kernel.cuh has the kernel and its figures.
#pragma once
#include "matching/matching_tensor_kernel.cuh"

namespace fastmeta::matching::cuda {

// Features of a slice: what leaves room for two blocks a multiprocessor by registers in float32,
// where slopes that depend on the own row keep that row's features as well, and tensor cores want
// their fragments. float64 has room for one block.
template <class Product, class acc>
inline constexpr int kSlice =
    Product::kTensor || Product::kSlopeReadsOwn || std::is_same_v<acc, double> ? kTile : 2 * kTile;

// Tiles of the other side whose slopes a block keeps, to use them for several slices.
template <class acc>
inline constexpr int kMaxTiles = std::is_same_v<acc, double> ? 1 : 2;

template <class scalar_t>
struct BackwardParams {
  using acc = acc_t<scalar_t>;
  ProblemParams<scalar_t> problem;
  int64_t work_items;  // row_blocks * splits * parts of all tasks
  unsigned blocks;     // of the grid, that share them
  int64_t row_blocks;
  int slices, block_slices;    // in all; of a block, above one only where all slopes are kept
  int parts;                   // blocks that share a row's slices
  int tiles;                   // of slopes that a block keeps
  int64_t splits, split_size;  // of the rows that blocks stream
  acc* partial;                // [splits, rows, D], nullptr where they are not split
  acc* partial_sum;            // [splits, rows]: dL/dz * similarity
  const acc* __restrict__ grad;
  const acc* __restrict__ out;
  const acc* __restrict__ lse;
  const acc* __restrict__ grad_sum;  // attention: [T * Q], of grad over the classes with support
  const acc* __restrict__ scores;    // of the forward, [T, Q, S]; nullptr: formed again
  scalar_t* grad_rows;               // of the owned rows
  acc* scale_partial;                // [T, row_blocks, splits]
  acc* weight_partial;               // [T, row_blocks, splits, D], additive
};

// What dL/dz needs of a query. Ignored queries have row -1 and are never read.
template <class acc>
struct QueryTerms {
  acc lse[kTile];
  acc pull[kTile];        // attention: sum of grad over the classes; nll: grad
  acc nll[kTile];         // nll
  int64_t target[kTile];  // nll
};

template <class Product, class acc>
struct BackwardShared {
  static constexpr int kFeatures = kSlice<Product, acc>;
  static constexpr int kRowPitch = kFeatures + (Product::kTensor ? 8 : 0);
  union {
    StageOf<Product, acc> stage;
    alignas(16) acc rows[kDepth][kRowPitch];
  };
  Side<acc> own, other[kMaxTiles<acc>];
  QueryTerms<acc> terms;
  int64_t cls[kTile];  // of the supports, -1 for none
  acc row_sum[kTile];
  acc centre[kTile];                         // of the own queries' similarities: see centre_of
  int last_count;                            // rows of the last tile
  int64_t task, own0, share, split, other0;  // of the work item: registers are short
};

// dL/dz * slope_factor of a tile, [other][own]. params.tiles of them lie behind BackwardShared.
template <class Product, class acc>
struct SlopeTile {
  alignas(16) acc slope[kTile][Product::kTensor ? kTile + 8 : kPitch];
};

// Gradients of kFeatures features of the own rows, in the registers of their threads: rows 4 * ty
// and on by features 4 * tx and on, or on tensor cores products of 16 x 8 as tensor_row and
// tensor_column have them.
template <class Product, class acc>
struct Gradient {
  static constexpr int kFeatures = kSlice<Product, acc>;
  static constexpr int kPatches = kFeatures / kTile;             // of 4 x 4
  static constexpr int kProducts = kFeatures / 2 / kMmaColumns;  // of a warp
  static constexpr int kRows = Product::kTensor ? kProducts : 4;
  static constexpr int kColumns = Product::kTensor ? 4 : kPatches * kPack;
  acc value[kRows][kColumns];
  acc weight[kPatches * kPack];  // additive: shares of the gradient of the weight

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) value[r][c] = 0;
    }
#pragma unroll
    for (int c = 0; c < kPatches * kPack; ++c) weight[c] = 0;
  }
};

// Adds `depth` others, staged in shared.rows, by their slopes from k0 on, on tensor cores.
template <class scalar_t, class Product>
__device__ __forceinline__ void add_rows_tensor(const BackwardShared<Product, float>& shared,
                                                const SlopeTile<Product, float>& tile, int k0,
                                                Gradient<Product, float>& gradient) {
  const int warp = threadIdx.x / kWarpSize, g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
  const int row = warp % 4 * kMmaRows + g;
  constexpr bool kSplits = !std::is_same_v<scalar_t, float>;
#pragma unroll
  for (int step = 0; step < kDepth; step += kMmaWords) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float slope = tile.slope[k0 + step + t + i / 2 * 4][row + i % 2 * 8];
      high[i] = to_tf32(slope);
      low[i] = to_tf32(slope - bit_cast<float>(high[i]));
    }
#pragma unroll
    for (int j = 0; j < Gradient<Product, float>::kProducts; ++j) {
      const int column = (warp / 4 * Gradient<Product, float>::kProducts + j) * kMmaColumns + g;
      const uint32_t b[2] = {to_tf32(shared.rows[step + t][column]),
                             to_tf32(shared.rows[step + t + 4][column])};
      mma<float>(gradient.value[j], high, b);
      if constexpr (kSplits) mma<float>(gradient.value[j], low, b);
    }
  }
}

// Adds a tile of `count` others to the gradients of features feature0 and on.
template <bool kOwnsQueries, class Product, class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void add_tile(const BackwardParams<scalar_t>& params,
                                         BackwardShared<Product, acc>& shared,
                                         const Side<acc>& other_side,
                                         const SlopeTile<Product, acc>& tile, int count,
                                         int64_t feature0, Gradient<Product, acc>& gradient) {
  const ProblemParams<scalar_t>& p = params.problem;
  const scalar_t* own_rows = kOwnsQueries ? p.query : p.support;
  const scalar_t* other_rows = kOwnsQueries ? p.support : p.query;
  constexpr int kFeatures = kSlice<Product, acc>, kPatches = kFeatures / kTile;
  constexpr int kFetches = kDepth * kFeatures / (kThreads * kPack);
  const int thread = threadIdx.x, ty = thread / kAcross, tx = thread % kAcross;
  // Own features, where the slope depends on them: read anew for every tile (from L1), because
  // kept through tile_product they would cost the second block a multiprocessor.
  acc own_value[4][kPatches * kPack];
  if constexpr (Product::kSlopeReadsOwn) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int patch = 0; patch < kPatches; ++patch) {
        acc value[kPack];
        fetch_pack<false>(own_rows, shared.own.row[ty * 4 + r], acc(1),
                          feature0 + patch * kTile + tx * kPack, p.dim, p.vector, value);
#pragma unroll
        for (int c = 0; c < kPack; ++c) own_value[r][patch * kPack + c] = value[c];
      }
    }
  }
  for (int k0 = 0; k0 < count; k0 += kDepth) {
    __syncthreads();  // the stage, or the last rows, have been read; the slopes are written
#pragma unroll
    for (int f = 0; f < kFetches; ++f) {
      const int at = (f * kThreads + thread) * kPack;
      const int k = at / kFeatures, column = at % kFeatures;
      acc value[kPack];
      fetch_pack<Product::kScalesRows && !Product::kTensor>(
          other_rows, other_side.row[k0 + k], other_side.factor[k0 + k], feature0 + column, p.dim,
          p.vector, value);
      store<kPack>(&shared.rows[k][column], value);
    }
    __syncthreads();
    if constexpr (Product::kTensor) {
      add_rows_tensor<scalar_t>(shared, tile, k0, gradient);
    } else {
#pragma unroll Product::kSlopeUnroll
      for (int k = 0; k < kDepth; ++k) {
        const Pack<acc> slope = *reinterpret_cast<const Pack<acc>*>(&tile.slope[k0 + k][ty * 4]);
#pragma unroll
        for (int patch = 0; patch < kPatches; ++patch) {
          const Pack<acc> other =
              *reinterpret_cast<const Pack<acc>*>(&shared.rows[k][patch * kTile + tx * kPack]);
#pragma unroll
          for (int c = 0; c < kPack; ++c) {
            const int column = patch * kPack + c;
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              if constexpr (Product::kWeighs) {
                const acc value = tanh_(own_value[r][column] + other.v[c]);
                gradient.value[r][column] += slope.v[r] * (acc(1) - value * value);
                if constexpr (kOwnsQueries) gradient.weight[column] += slope.v[r] * value;
              } else if constexpr (Product::kSlopeReadsOwn) {
                gradient.value[r][column] +=
                    slope.v[r] * Product::slope(own_value[r][column], other.v[c]);
              } else {
                gradient.value[r][column] += slope.v[r] * Product::slope(acc(0), other.v[c]);
              }
            }
          }
        }
      }
    }
  }
}

// Writes `width` neighbouring features of the gradient of a row, from its sums over the other
// side: of slopes times rows, and of dL/dz * similarity. to_row is its place among all tasks' rows;
// row is the same, or -1 for padding and ignored queries, whose gradient is zero.
template <int width, bool kOwnsQueries, bool kWeighs, class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void finish_gradient(const BackwardParams<scalar_t>& params,
                                                int64_t task, int64_t row, acc factor, acc row_sum,
                                                int64_t to_row, int64_t feature,
                                                const acc (&gradient)[width]) {
  struct alignas(width * sizeof(scalar_t) < 16 ? width * sizeof(scalar_t) : 16) Wide {
    scalar_t v[width];
  };
  const ProblemParams<scalar_t>& p = params.problem;
  const scalar_t* own_rows = kOwnsQueries ? p.query : p.support;
  const acc scale = p.scale[task * p.scale_stride];
  acc own[width];
  if (p.similarity == Similarity::kCosine) {  // the part along the row changes its length alone
    if constexpr (width == kPack) {
      fetch_pack<true>(own_rows, row, factor, feature, p.dim, p.vector, own);
    } else {
#pragma unroll
      for (int c = 0; c < width; ++c) {
        const bool exists = row >= 0 && feature + c < p.dim;
        own[c] = exists ? factor * to_acc(own_rows[row * p.dim + feature + c]) : acc(0);
      }
    }
  }
  Wide wide;
#pragma unroll
  for (int c = 0; c < width; ++c) {
    acc result = gradient[c];
    if (p.similarity == Similarity::kCosine) result = factor * (result - own[c] * row_sum);
    if constexpr (kWeighs) {
      const acc* weight = p.weight + task * p.weight_stride;
      result *= feature + c < p.dim ? weight[feature + c] : acc(0);
    }
    wide.v[c] = from_acc<scalar_t>(row >= 0 ? scale * result : acc(0));
  }
  scalar_t* to = params.grad_rows + to_row * p.dim + feature;
  if (p.vector) {
    if (feature < p.dim) *reinterpret_cast<Wide*>(to) = wide;
  } else {
#pragma unroll
    for (int c = 0; c < width; ++c) {
      if (feature + c < p.dim) to[c] = wide.v[c];
    }
  }
}

// Writes `width` neighbouring features of the gradient of own row i, or this split's share of it.
template <int width, bool kOwnsQueries, class Product, class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void write_gradient(const BackwardParams<scalar_t>& params,
                                               const BackwardShared<Product, acc>& shared, int i,
                                               acc row_sum, int64_t feature,
                                               const acc (&gradient)[width]) {
  const ProblemParams<scalar_t>& p = params.problem;
  const int64_t num_own = kOwnsQueries ? p.num_queries : p.num_supports;
  const int64_t to_row = shared.task * num_own + shared.own0 + i;
  if (params.partial == nullptr) {
    finish_gradient<width, kOwnsQueries, Product::kWeighs>(params, shared.task, shared.own.row[i],
                                                           shared.own.factor[i], row_sum, to_row,
                                                           feature, gradient);
    return;
  }
  const int64_t at = shared.split * p.num_tasks * num_own + to_row;
  if (feature == 0) params.partial_sum[at] = row_sum;
  acc* to = params.partial + at * p.dim + feature;
  if (width == kPack && p.vector) {
    if (feature < p.dim) store<width>(to, gradient);
  } else {
#pragma unroll
    for (int c = 0; c < width; ++c) {
      if (feature + c < p.dim) to[c] = gradient[c];
    }
  }
}

}  // namespace fastmeta::matching::cuda
