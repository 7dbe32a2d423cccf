// The tile of pairs that the forward and both backward kernels of matching_attention are built on.
//
// A block of 256 threads computes sums over the features for 64 "own" rows x 64 "other" rows.
// Thread (ty, tx), ty = thread / 16, keeps a 4 x 4 patch in registers: rows 4 * ty and on, columns
// 4 * tx and on. The features pass through shared memory in chunks of kDepth, transposed to
// [feature][row], so that a thread reads its 4 rows and 4 columns of one feature with two 16-byte
// loads for 16 multiply-adds.
//
// - global memory: a chunk is 64 rows x 16 features of both sides. A thread moves one pack of 4
//   neighbours of each (16 bytes of float32; single elements where rows are not packable),
//   fetched into registers while the chunk before is multiplied
// - banks: the pitch of 68 keeps rows 16-byte aligned; reads are 16 bytes from neighbouring
//   lanes, or one address (no conflict); the transposing stores conflict two ways, once in 64
//   products
// - roofline: 2 * 64 * 64 * D FLOPs for dot products and 2 * 64 * D * b bytes from L2 a tile: 16
//   FLOPs a byte in float32, above the ridge of A100 (19.5 TFLOP/s at about 5 TB/s of L2: 4) and
//   of H100 (67 at about 5.5: 12), hence bound by FP32 units
// - size: 64 x 64 and not 128 x 128, because few-shot tasks have 5 to 100 supports and about 75
//   queries: in larger tiles most threads would idle
//
// tile_product forms the products on FP32 (FP64) units; matching_tensor_kernel.cuh has the form for
// tensor cores.
#pragma once
#include "common/device.cuh"
#include "matching/matching_attention.h"

namespace fastmeta::matching::cuda {

using namespace ::fastmeta::device;  // NOLINT(build/namespaces): device code

inline constexpr int kThreads = 256;
inline constexpr int kTile = 64;           // rows of a side
inline constexpr int kDepth = 16;          // features of a chunk
inline constexpr int kPitch = kTile + 4;   // elements from one feature to the next
inline constexpr int kAcross = kTile / 4;  // threads along a side
static_assert(kThreads == kAcross * kAcross && kTile * kDepth == kThreads * kPack);

// Blocks a multiprocessor that registers must leave room for.
template <class acc>
inline constexpr int kBlocks = std::is_same_v<acc, double> ? 1 : 2;

// ---- what a pair of rows sums up ----------------------------------------------------------------
// add: one feature's share of the sum. slope: derivative of the share with respect to the own row's
// feature, up to factors that do not depend on the feature and other side (weight, slope_factor).
// kSumsChunks: a chunk's sum is formed by itself, for terms of one sign, whose sum grows and with
// it the rounding of every addition. (That of 16-bit storage is larger anyway.)

struct DotProduct {  // dot, and cosine on rows scaled to length one
  static constexpr bool kScalesRows = true, kSlopeReadsOwn = false, kWeighs = false;
  static constexpr bool kTensor = false, kSumsChunks = false;
  static constexpr int kUnroll = 8, kSlopeUnroll = 4;
  template <class acc>
  static __device__ __forceinline__ void add(acc& sum, acc own, acc other, acc) {
    sum += own * other;
  }
  template <class acc>
  static __device__ __forceinline__ acc slope(acc, acc other) {
    return other;
  }
};

struct SquaredDifference {  // sqeuclidean and euclidean; differences, so that close points stay
                            // exact
  static constexpr bool kScalesRows = false, kSlopeReadsOwn = true, kWeighs = false;
  static constexpr bool kTensor = false, kSumsChunks = true;
  static constexpr int kUnroll = 2, kSlopeUnroll = 2;
  template <class acc>
  static __device__ __forceinline__ void add(acc& sum, acc own, acc other, acc) {
    const acc difference = own - other;
    sum += difference * difference;
  }
  template <class acc>
  static __device__ __forceinline__ acc slope(acc own, acc other) {
    return other - own;
  }
};

// additive. Not unrolled: 16 tanh already, more would outgrow the instruction cache. Its slope,
// 1 - tanh^2, shares the tanh with the weight's gradient and stands where both are summed.
struct WeightedTanh {
  static constexpr bool kScalesRows = false, kSlopeReadsOwn = true, kWeighs = true;
  static constexpr bool kTensor = false, kSumsChunks = false;
  static constexpr int kUnroll = 1, kSlopeUnroll = 1;
  template <class acc>
  static __device__ __forceinline__ void add(acc& sum, acc own, acc other, acc weight) {
    sum += weight * tanh_(own + other);
  }
};

template <class acc>
__device__ __forceinline__ acc similarity_of(Similarity similarity, acc sum) {
  if (similarity == Similarity::kSqEuclidean) return -sum;
  if (similarity == Similarity::kEuclidean) return -sqrt_(sum);
  return sum;
}

// d similarity / d own feature = slope_factor * slope (* weight for additive).
template <class acc>
__device__ __forceinline__ acc slope_factor(Similarity similarity, acc sum) {
  if (similarity == Similarity::kSqEuclidean) return acc(2);
  if (similarity == Similarity::kEuclidean) return sum == acc(0) ? acc(0) : acc(1) / sqrt_(sum);
  return acc(1);
}

// ---- parameters ---------------------------------------------------------------------------------

template <class scalar_t>
struct ProblemParams {
  using acc = acc_t<scalar_t>;
  Similarity similarity;
  bool vector;  // rows of query, support (and their gradients) are packable
  int64_t num_tasks, num_queries, num_supports, num_classes, dim;
  int64_t scale_stride, weight_stride;
  const scalar_t* __restrict__ query;
  const scalar_t* __restrict__ support;
  const int64_t* __restrict__ labels;
  const int64_t* __restrict__ targets;  // nullptr: attention
  const acc* __restrict__ scale;
  const acc* __restrict__ weight;          // additive
  const acc* __restrict__ query_factor;    // cosine: 1 / |query|, 0 for the zero vector
  const acc* __restrict__ support_factor;  // cosine
  const int64_t* __restrict__ order;
  const int64_t* __restrict__ class_start;
};

// Rows of one side of the tile. Row -1 stands for none and reads as zeros.
template <class acc>
struct Side {
  int64_t row[kTile];  // in the flat [T * Q] or [T * S] rows
  acc factor[kTile];   // what the row is multiplied by, 1 unless cosine
};

template <class acc>
struct alignas(16) Stage {
  acc own[kDepth][kPitch];
  acc other[kDepth][kPitch];
  acc weight[kDepth];
};

template <class acc>
__device__ __forceinline__ void set_row(Side<acc>& side, int i, int64_t row, const acc* factors) {
  side.row[i] = row;
  side.factor[i] = factors != nullptr && row >= 0 ? factors[row] : acc(1);
}

// Features [k, k + kPack) of a row; zeros beyond dim and for row -1.
template <bool kScales, class scalar_t>
__device__ __forceinline__ void fetch_pack(const scalar_t* rows, int64_t row,
                                           acc_t<scalar_t> factor, int64_t k, int64_t dim,
                                           bool vector, acc_t<scalar_t> (&value)[kPack]) {
  if (row >= 0 && vector && k < dim) {
    load<kPack>(rows + row * dim + k, value);
  } else {
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      value[i] = row >= 0 && k + i < dim ? to_acc(rows[row * dim + k + i]) : acc_t<scalar_t>(0);
    }
  }
  if constexpr (kScales) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) value[i] *= factor;
  }
}

template <class Product, class acc>
__device__ __forceinline__ void multiply_chunk(const Stage<acc>& stage, acc (&sum)[4][4]) {
  const int ty = threadIdx.x / kAcross, tx = threadIdx.x % kAcross;
#pragma unroll Product::kUnroll
  for (int k = 0; k < kDepth; ++k) {
    const Pack<acc> own = *reinterpret_cast<const Pack<acc>*>(&stage.own[k][ty * 4]);
    const Pack<acc> other = *reinterpret_cast<const Pack<acc>*>(&stage.other[k][tx * 4]);
    const acc weight = Product::kWeighs ? stage.weight[k] : acc(0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) Product::add(sum[i][j], own.v[i], other.v[j], weight);
    }
  }
}

// Whether any of the own rows of the warp's patches is one: else its products would be of zeros.
template <class acc>
__device__ __forceinline__ bool warp_owns_rows(const Side<acc>& own) {
  const int ty = threadIdx.x / kAcross, tx = threadIdx.x % kAcross;
  return __ballot_sync(kFullMask, own.row[ty * 4 + tx % 4] >= 0) != 0;
}

// Sums over all features for the pairs of two sides, which all threads must see (barrier before).
// The order of the additions does not depend on which side is own: scores of the forward and of
// both backward kernels agree to the bit. Rows -1 get no sums of worth. Leaves the stage free to be
// written after the next barrier.
template <class Product, class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void tile_product(Stage<acc>& stage, const scalar_t* own_rows,
                                             const Side<acc>& own, const scalar_t* other_rows,
                                             const Side<acc>& other, const acc* weight, int64_t dim,
                                             bool vector, acc (&sum)[4][4]) {
  const int i = threadIdx.x / (kDepth / kPack), k = threadIdx.x % (kDepth / kPack) * kPack;
  const int thread = threadIdx.x;
  acc own_next[kPack], other_next[kPack], weight_next = 0;
  const auto fetch = [&](int64_t k0) {
    constexpr bool kScales = Product::kScalesRows;
    fetch_pack<kScales>(own_rows, own.row[i], own.factor[i], k0 + k, dim, vector, own_next);
    fetch_pack<kScales>(other_rows, other.row[i], other.factor[i], k0 + k, dim, vector, other_next);
    if constexpr (Product::kWeighs) {
      if (thread < kDepth) weight_next = k0 + thread < dim ? weight[k0 + thread] : acc(0);
    }
  };
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[r][c] = 0;
  }
  const bool busy = warp_owns_rows(own);
  if (dim > 0) fetch(0);
  for (int64_t k0 = 0; k0 < dim; k0 += kDepth) {
    __syncthreads();  // the last chunk has been read
#pragma unroll
    for (int p = 0; p < kPack; ++p) {
      stage.own[k + p][i] = own_next[p];
      stage.other[k + p][i] = other_next[p];
    }
    if constexpr (Product::kWeighs) {
      if (thread < kDepth) stage.weight[thread] = weight_next;
    }
    __syncthreads();
    if (k0 + kDepth < dim) fetch(k0 + kDepth);
    if (!busy) continue;
    if constexpr (Product::kSumsChunks && sizeof(scalar_t) > 2) {
      acc chunk[4][4] = {};
      multiply_chunk<Product>(stage, chunk);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[r][c] += chunk[r][c];
      }
    } else {
      multiply_chunk<Product>(stage, sum);
    }
  }
}

// ---- row lengths, for cosine --------------------------------------------------------------------

// factor[row] = 1 / |row|, 0 for the zero vector: a warp a row, bound by memory (the rows are read
// twice, the second time from L1). Scaled by the largest magnitude, so no square over- or
// underflows.
template <class scalar_t>
__global__ void __launch_bounds__(kThreads, 4)
    inverse_length_kernel(const scalar_t* __restrict__ rows, int64_t num_rows, int64_t dim,
                          acc_t<scalar_t>* __restrict__ factor) {
  using acc = acc_t<scalar_t>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarpSize);
  int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  for (; row < num_rows; row += warps) {
    const scalar_t* values = rows + row * dim;
    acc largest = 0;
    for (int64_t k = lane; k < dim; k += kWarpSize) {
      const acc value = abs_(to_acc(values[k]));
      if (value > largest || value != value) largest = value;  // a NaN stays
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      const acc other = __shfl_xor_sync(kFullMask, largest, offset);
      if (other > largest || other != other) largest = other;
    }
    acc sum = 0;
    for (int64_t k = lane; k < dim; k += kWarpSize) {
      const acc value = to_acc(values[k]) / largest;
      sum += value * value;
    }
    sum = lane_sum(sum);
    if (lane == 0) {
      const acc inverse = acc(1) / largest / sqrt_(sum);
      // What is too short to have an inverse length is as the zero vector.
      factor[row] = largest == acc(0) || inverse == infinity<acc>() ? acc(0) : inverse;
    }
  }
}

}  // namespace fastmeta::matching::cuda
