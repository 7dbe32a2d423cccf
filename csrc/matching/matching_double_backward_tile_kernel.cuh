// The tile of pairs of the double backward: similarities and their derivatives along the
// directions, and what becomes of them (formulas in matching_attention.h).
//
// A block of 256 threads computes both for 64 "own" x 32 "other" rows. Thread (ty, tx), ty = thread
// / 16, keeps a 4 x 2 patch of each in registers: rows 4 * ty and on, columns 2 * tx and on. Rows
// and directions of both sides pass through shared memory in chunks of kDepth features, transposed
// as in matching_tile_kernel.cuh; scores are summed in that file's order, and so agree to the bit
// with the forward's on FP32 units.
//
// - size: 32 others and not 64, because a pair has two coefficients where the backward has one: so
//   both tiles fit in what the backward's one takes, and two blocks fit a multiprocessor
// - global memory: a thread moves one pack of an own row, of its direction, and of an other row or
//   its direction (threads from 128 on), fetched while the chunk before is multiplied
// - banks: pitches of 68 and 36 keep rows 16-byte aligned; a warp reads two own packs, each one
//   address for 16 lanes, and 16 neighbouring pairs
// - registers: 24 numbers read from shared memory, 12 loaded ahead and 16 sums; 24 multiply-adds
//   for 12 numbers read, the ratio of the gradients' loop
#pragma once
#include "matching/matching_backward_kernel.cuh"

namespace fastmeta::matching::cuda {

inline constexpr int kOthers = 32;                  // rows of the side that is streamed
inline constexpr int kOtherPitch = kOthers + 4;     // elements from one feature to the next
inline constexpr int kColumns = kOthers / kAcross;  // of a thread
static_assert(kOthers * kDepth * 2 == kThreads * kPack);

// A similarity along directions. add: one feature's share of the sum, and of the sum's derivative
// up to derivative_of. pull: one feature's share of the gradient to the own row, with the pair's
// coefficients `first` and `second`.
template <class Product>
struct Second;

template <>
struct Second<DotProduct> {
  static constexpr int kUnroll = 4;
  template <class acc>
  static __device__ __forceinline__ void add(acc& sum, acc& tangent, acc own, acc other,
                                             acc own_dot, acc other_dot, acc, acc) {
    sum += own * other;
    tangent += own_dot * other;
    tangent += own * other_dot;
  }
  template <class acc>
  static __device__ __forceinline__ acc pull(acc first, acc second, acc, acc other, acc,
                                             acc other_dot) {
    return first * other + second * other_dot;
  }
};

template <>
struct Second<SquaredDifference> {
  static constexpr int kUnroll = 1;
  template <class acc>
  static __device__ __forceinline__ void add(acc& sum, acc& tangent, acc own, acc other,
                                             acc own_dot, acc other_dot, acc, acc) {
    const acc difference = own - other;
    sum += difference * difference;
    tangent -= difference * (own_dot - other_dot);
  }
  template <class acc>
  static __device__ __forceinline__ acc pull(acc first, acc second, acc own, acc other, acc own_dot,
                                             acc other_dot) {
    return first * (other - own) + second * (other_dot - own_dot);
  }
};

// Its pull shares the tanh with the weight's gradient and stands where both are summed.
template <>
struct Second<WeightedTanh> {
  static constexpr int kUnroll = 1;
  template <class acc>
  static __device__ __forceinline__ void add(acc& sum, acc& tangent, acc own, acc other,
                                             acc own_dot, acc other_dot, acc weight,
                                             acc weight_dot) {
    const acc value = tanh_(own + other);
    sum += weight * value;
    tangent += (acc(1) - value * value) * (own_dot + other_dot) * weight + value * weight_dot;
  }
};

// ---- parameters and shared memory ---------------------------------------------------------------

// A direction that is nullptr stands for zero. grad_rows, row_blocks, slices, block_slices and
// parts are those of the side whose gradient is made.
template <class scalar_t>
struct SecondParams : BackwardParams<scalar_t> {
  using acc = acc_t<scalar_t>;
  bool owns_queries;  // the side: queries, or supports
  const scalar_t* __restrict__ query_dot;
  const scalar_t* __restrict__ support_dot;
  const acc* __restrict__ scale_dot;
  const acc* __restrict__ weight_dot;       // additive
  const acc* __restrict__ query_stretch;    // cosine: <q, q'> / |q|^2
  const acc* __restrict__ support_stretch;  // cosine
  acc* reference;                           // [T, Q], similarity of the first valid support
  acc* move;                                // [T, Q], M relative to the reference
  acc* grad_grad;                           // shaped like out
  acc* sums;                                // [rows, D], gradients between tiles: see below
};

template <class acc>
struct SecondSide : Side<acc> {
  acc stretch[kTile];
};

template <class acc>
struct SecondTerms : QueryTerms<acc> {
  acc reference[kTile], move[kTile];
};

template <class acc>
struct alignas(16) SecondStage {
  acc own[kDepth][kPitch], own_dot[kDepth][kPitch];
  acc other[2][kDepth][kOtherPitch];  // rows, and their directions
  acc weight[kDepth], weight_dot[kDepth];
};

// Coefficients of a tile, [other][own], and kDepth of the others' rows times one slice.
template <class acc>
struct alignas(16) SecondTile {
  acc first[kOthers][kPitch], second[kOthers][kPitch];
  acc rows[2][kDepth][kTile];  // rows, and their directions
};

template <class acc>
struct SecondShared {
  union {
    SecondStage<acc> stage;
    SecondTile<acc> tile;
  };
  SecondSide<acc> own, other;
  SecondTerms<acc> terms;
  int64_t cls[kTile];          // of the supports, -1 for none
  int64_t class_end[kOthers];  // where the support's class ends, in the sorted order
  acc warp_sum[kThreads / kWarpSize];
  int64_t task, own0;
};

// ---- rows of the two sides ----------------------------------------------------------------------

// kMeans: where the class means have been made.
template <bool kMeans, class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void set_second_query(const SecondParams<scalar_t>& params, int i,
                                                 int64_t row, SecondSide<acc>& side,
                                                 SecondTerms<acc>& terms) {
  set_query(params, i, row, side, terms);
  row = side.row[i];
  side.stretch[i] = params.query_stretch != nullptr && row >= 0 ? params.query_stretch[row] : 0;
  if constexpr (kMeans) {
    if (row < 0) return;
    terms.reference[i] = params.reference[row];
    terms.move[i] = params.move[row];
  }
}

template <class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void set_second_support(const SecondParams<scalar_t>& params, int i,
                                                   int64_t row, SecondSide<acc>& side,
                                                   int64_t* cls) {
  set_support(params.problem, i, row, side, cls);
  row = side.row[i];
  side.stretch[i] = params.support_stretch != nullptr && row >= 0 ? params.support_stretch[row] : 0;
}

// ---- the tile -----------------------------------------------------------------------------------

// Sums and their derivatives for the pairs of two sides, which all threads must see (barrier
// before). Leaves the stage free to be overwritten.
template <class Product, class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void second_product(const SecondParams<scalar_t>& params,
                                               SecondShared<acc>& shared, bool owns_queries,
                                               acc (&sum)[4][kColumns],
                                               acc (&tangent)[4][kColumns]) {
  struct alignas(sizeof(acc) * kColumns) Columns {
    acc v[kColumns];
  };
  const ProblemParams<scalar_t>& p = params.problem;
  SecondStage<acc>& stage = shared.stage;
  const int thread = threadIdx.x, ty = thread / kAcross, tx = thread % kAcross;
  const int i = thread / (kDepth / kPack), k = thread % (kDepth / kPack) * kPack;
  const int side = i / kOthers, j = i % kOthers;  // of the other side: its rows, or directions
  const scalar_t* own_rows = owns_queries ? p.query : p.support;
  const scalar_t* own_dots = owns_queries ? params.query_dot : params.support_dot;
  const scalar_t* other_rows = owns_queries ? p.support : p.query;
  const scalar_t* other_dots = owns_queries ? params.support_dot : params.query_dot;
  if (side == 1) other_rows = other_dots;
  const int64_t own = shared.own.row[i], own_dot = own_dots != nullptr ? own : -1;
  const int64_t other = other_rows != nullptr ? shared.other.row[j] : -1;
  const acc own_factor = shared.own.factor[i], other_factor = shared.other.factor[j];

  acc own_next[kPack], own_dot_next[kPack], other_next[kPack], weight_next = 0;
  const auto fetch = [&](int64_t k0) {
    constexpr bool kScales = Product::kScalesRows;
    fetch_pack<kScales>(own_rows, own, own_factor, k0 + k, p.dim, p.vector, own_next);
    fetch_pack<kScales>(own_dots, own_dot, own_factor, k0 + k, p.dim, p.vector, own_dot_next);
    fetch_pack<kScales>(other_rows, other, other_factor, k0 + k, p.dim, p.vector, other_next);
    if constexpr (Product::kWeighs) {
      const acc* from = thread < kDepth ? p.weight : params.weight_dot;
      const int64_t stride = thread < kDepth ? p.weight_stride : p.dim;
      const int64_t feature = k0 + thread % kDepth;
      const bool exists = thread < 2 * kDepth && from != nullptr && feature < p.dim;
      weight_next = exists ? from[shared.task * stride + feature] : acc(0);
    }
  };
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum[r][c] = tangent[r][c] = 0;
  }
  if (p.dim > 0) fetch(0);
  for (int64_t k0 = 0; k0 < p.dim; k0 += kDepth) {
    __syncthreads();  // the last chunk, or what lay here before, has been read
#pragma unroll
    for (int f = 0; f < kPack; ++f) {
      stage.own[k + f][i] = own_next[f];
      stage.own_dot[k + f][i] = own_dot_next[f];
      stage.other[side][k + f][j] = other_next[f];
    }
    if constexpr (Product::kWeighs) {
      if (thread < kDepth) stage.weight[thread] = weight_next;
      if (thread >= kDepth && thread < 2 * kDepth) stage.weight_dot[thread - kDepth] = weight_next;
    }
    __syncthreads();
    if (k0 + kDepth < p.dim) fetch(k0 + kDepth);
    // In tile_product's order.
    constexpr bool kChunks = Product::kSumsChunks && sizeof(scalar_t) > 2;
    acc chunk[4][kColumns] = {};
#pragma unroll Second < Product> ::kUnroll
    for (int f = 0; f < kDepth; ++f) {
      const Pack<acc> a = *reinterpret_cast<const Pack<acc>*>(&stage.own[f][ty * 4]);
      const Pack<acc> a_dot = *reinterpret_cast<const Pack<acc>*>(&stage.own_dot[f][ty * 4]);
      const Columns b = *reinterpret_cast<const Columns*>(&stage.other[0][f][tx * kColumns]);
      const Columns b_dot = *reinterpret_cast<const Columns*>(&stage.other[1][f][tx * kColumns]);
      const acc weight = Product::kWeighs ? stage.weight[f] : acc(0);
      const acc weight_dot = Product::kWeighs ? stage.weight_dot[f] : acc(0);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          Second<Product>::add(kChunks ? chunk[r][c] : sum[r][c], tangent[r][c], a.v[r], b.v[c],
                               a_dot.v[r], b_dot.v[c], weight, weight_dot);
        }
      }
    }
    if constexpr (kChunks) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sum[r][c] += chunk[r][c];
      }
    }
  }
  __syncthreads();  // the stage has been read: its place takes the coefficients
}

// The sums as a tile in shared memory, each thread its own patch: so the loops over pairs that
// follow need not be unrolled, which their exponentials would make too long for the cache.
template <class acc>
__device__ __forceinline__ void store_patch(SecondTile<acc>& tile, const acc (&sum)[4][kColumns],
                                            const acc (&tangent)[4][kColumns]) {
  const int ty = threadIdx.x / kAcross, tx = threadIdx.x % kAcross;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    Pack<acc> sums, tangents;
#pragma unroll
    for (int r = 0; r < 4; ++r) sums.v[r] = sum[r][c], tangents.v[r] = tangent[r][c];
    *reinterpret_cast<Pack<acc>*>(&tile.first[tx * kColumns + c][ty * 4]) = sums;
    *reinterpret_cast<Pack<acc>*>(&tile.second[tx * kColumns + c][ty * 4]) = tangents;
  }
}

// ---- pairs --------------------------------------------------------------------------------------

// Derivative of the similarity along the directions, from what second_product summed.
template <class acc>
__device__ __forceinline__ acc derivative_of(Similarity kind, acc similarity, acc tangent,
                                             acc stretches) {
  if (kind == Similarity::kCosine) return tangent - similarity * stretches;
  if (kind == Similarity::kSqEuclidean) return acc(2) * tangent;
  // similarity = -distance
  if (kind == Similarity::kEuclidean) return similarity == acc(0) ? acc(0) : -tangent / similarity;
  return tangent;
}

// Share w of a support in its class, for a query (place i in terms, flat row) and class cls. pull
// is G - P H and bend G (m - M); for nll they and w stand for all classes but the target together.
template <class acc>
struct Share {
  acc weight = 0, pull = 0, bend = 0;
};
template <bool kBends, class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ Share<acc> share_of(const SecondParams<scalar_t>& params,
                                               const SecondTerms<acc>& terms, int i, int64_t row,
                                               int64_t cls, acc z) {
  if (row < 0 || cls < 0) return {};
  const acc relative = z - terms.lse[i];
  Share<acc> share;
  if (params.problem.targets != nullptr) {
    share.pull = terms.pull[i];
    if (cls != terms.target[i]) {
      share.weight = exp_(relative);
      return share;
    }
    share.weight = exp_(relative + terms.nll[i]);
    if constexpr (kBends) {
      share.bend = share.pull * params.grad_grad[row];
      share.pull *= expm1_(-terms.nll[i]);
    }
    return share;
  }
  const int64_t at = row * params.problem.num_classes + cls;
  const acc log_p = params.out[at];
  if (log_p == -infinity<acc>()) return {};
  share.weight = exp_(relative - log_p);
  if constexpr (kBends) {
    const acc grad = params.grad[at];
    share.pull = grad - exp_(log_p) * terms.pull[i];
    share.bend = grad * params.grad_grad[at];
  }
  return share;
}

}  // namespace fastmeta::matching::cuda
