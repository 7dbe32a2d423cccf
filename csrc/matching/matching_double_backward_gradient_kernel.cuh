// From a tile of pairs to gradients, in the double backward: coefficients, and their products with
// the other side's rows and directions. matching_double_backward_kernel.cuh has the kernels.
#pragma once
#include "matching/matching_double_backward_tile_kernel.cuh"

namespace fastmeta::matching::cuda {

// Sums of a thread's pairs: what the own rows receive along themselves and along their directions
// (cosine), and dL/dscale.
template <class acc>
struct PairSums {
  acc own[4] = {}, own_dot[4] = {}, scale = 0;

  // Over the threads that share the own rows.
  __device__ __forceinline__ void sum_lanes() {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      own[r] = lane_sum<kAcross>(own[r]);
      own_dot[r] = lane_sum<kAcross>(own_dot[r]);
    }
  }
};

// Turns the sums of a tile into the coefficients of the gradients.
template <class Product, class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void fill_coefficients(const SecondParams<scalar_t>& params,
                                                  SecondShared<acc>& shared, PairSums<acc>& pairs) {
  const ProblemParams<scalar_t>& p = params.problem;
  const int ty = threadIdx.x / kAcross, tx = threadIdx.x % kAcross;
  acc sum[4][kColumns], tangent[4][kColumns];
  second_product<Product>(params, shared, params.owns_queries, sum, tangent);
  store_patch(shared.tile, sum, tangent);
  const acc scale = p.scale[shared.task * p.scale_stride];
  const acc scale_dot = params.scale_dot != nullptr ? params.scale_dot[shared.task] : acc(0);
  const SecondSide<acc>& queries = params.owns_queries ? shared.own : shared.other;
#pragma unroll 1
  for (int c = tx * kColumns; c < (tx + 1) * kColumns; ++c) {
    Pack<acc>* first = reinterpret_cast<Pack<acc>*>(&shared.tile.first[c][ty * 4]);
    Pack<acc>* second = reinterpret_cast<Pack<acc>*>(&shared.tile.second[c][ty * 4]);
    Pack<acc> sums = *first, tangents = *second;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int own = ty * 4 + r;
      const int query = params.owns_queries ? own : c, support = params.owns_queries ? c : own;
      const acc own_stretch = shared.own.stretch[own];
      const acc stretches = own_stretch + shared.other.stretch[c];
      const acc similarity = similarity_of(p.similarity, sums.v[r]);
      const acc derivative = derivative_of(p.similarity, similarity, tangents.v[r], stretches);
      const Share<acc> share = share_of<true>(params, shared.terms, query, queries.row[query],
                                              shared.cls[support], scale * similarity);
      acc a = 0, b = 0;
      if (share.weight != acc(0)) {
        const acc relative = similarity - shared.terms.reference[query];
        const acc z_dot = scale * derivative + scale_dot * relative;
        const acc g = share.weight * share.pull;
        const acc h = share.weight * (share.pull * (z_dot - shared.terms.move[query]) - share.bend);
        pairs.scale += h * relative + g * derivative;
        a = scale * h + scale_dot * g;
        b = scale * g;
        if constexpr (Product::kScalesRows) {
          if (p.similarity == Similarity::kCosine) {
            pairs.own[r] += a * similarity + b * (derivative - acc(2) * own_stretch * similarity);
            pairs.own_dot[r] += b * similarity;
            a -= b * stretches;
          }
        } else if (p.similarity == Similarity::kSqEuclidean) {
          a *= 2;
          b *= 2;
        } else if (p.similarity == Similarity::kEuclidean) {
          const acc inverse = similarity == acc(0) ? acc(0) : acc(-1) / similarity;
          a = (a + b * derivative * inverse) * inverse;
          b *= inverse;
        }
      }
      sums.v[r] = a;
      tangents.v[r] = b;
    }
    *first = sums;
    *second = tangents;
  }
}

// Whether the thread's own row r exists (padding does), and where it begins.
template <class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ bool owns_row(const SecondParams<scalar_t>& params,
                                         const SecondShared<acc>& shared, int r) {
  const ProblemParams<scalar_t>& p = params.problem;
  const int i = threadIdx.x / kAcross * 4 + r;
  return shared.own0 + i < (params.owns_queries ? p.num_queries : p.num_supports);
}
template <class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ int64_t own_place(const SecondParams<scalar_t>& params,
                                             const SecondShared<acc>& shared, int r) {
  const ProblemParams<scalar_t>& p = params.problem;
  const int i = threadIdx.x / kAcross * 4 + r;
  const int64_t num_own = params.owns_queries ? p.num_queries : p.num_supports;
  return (shared.task * num_own + shared.own0 + i) * p.dim;
}

template <class T, class scalar_t, class acc>
__device__ __forceinline__ void write_row(T* row, const ProblemParams<scalar_t>& p, int64_t feature,
                                          const acc (&value)[kPack]) {
  if (p.vector) {
    if (feature < p.dim) store<kPack>(row + feature, value);
    return;
  }
#pragma unroll
  for (int c = 0; c < kPack; ++c) {
    if (feature + c < p.dim) row[feature + c] = from_acc<T>(value[c]);
  }
}

// Features `feature` and on of the thread's own row r, and of its direction.
template <bool kScales, class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void fetch_own(const SecondParams<scalar_t>& params,
                                          const SecondShared<acc>& shared, int r, int64_t feature,
                                          acc (&own)[kPack], acc (&own_dot)[kPack]) {
  const ProblemParams<scalar_t>& p = params.problem;
  const scalar_t* rows = params.owns_queries ? p.query : p.support;
  const scalar_t* dots = params.owns_queries ? params.query_dot : params.support_dot;
  const int i = threadIdx.x / kAcross * 4 + r;
  const int64_t row = shared.own.row[i];
  const acc factor = shared.own.factor[i];
  fetch_pack<kScales>(rows, row, factor, feature, p.dim, p.vector, own);
  fetch_pack<kScales>(dots, dots != nullptr ? row : -1, factor, feature, p.dim, p.vector, own_dot);
}

// Adds a tile of `count` others to the gradients of features feature0 and on, and to the shares of
// the gradient of the weight.
template <class Product, class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void add_second_tile(const SecondParams<scalar_t>& params,
                                                SecondShared<acc>& shared, int count,
                                                int64_t feature0, acc (&gradient)[4][kPack],
                                                acc (&weight_sum)[kPack]) {
  const ProblemParams<scalar_t>& p = params.problem;
  const int thread = threadIdx.x, ty = thread / kAcross, tx = thread % kAcross;
  const scalar_t* rows = params.owns_queries ? p.support : p.query;
  const scalar_t* dots = params.owns_queries ? params.support_dot : params.query_dot;
  const int64_t feature = feature0 + tx * kPack;
  acc own[4][kPack], own_dot[4][kPack];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if constexpr (Product::kSlopeReadsOwn) {
      fetch_own<false>(params, shared, r, feature, own[r], own_dot[r]);
    } else {
#pragma unroll
      for (int c = 0; c < kPack; ++c) own[r][c] = own_dot[r][c] = 0;
    }
  }
  acc weight[kPack] = {}, weight_dot[kPack] = {};
  if constexpr (Product::kWeighs) {
#pragma unroll
    for (int c = 0; c < kPack; ++c) {
      if (feature + c >= p.dim) continue;
      weight[c] = p.weight[shared.task * p.weight_stride + feature + c];
      if (params.weight_dot == nullptr) continue;
      weight_dot[c] = params.weight_dot[shared.task * p.dim + feature + c];
    }
  }
  static_assert(kDepth * kTile == kThreads * kPack);
  const int place = thread / kAcross;  // of the row that this thread moves
  for (int k0 = 0; k0 < count; k0 += kDepth) {
    __syncthreads();  // the last rows have been read; the coefficients are written
    const int64_t row = shared.other.row[k0 + place];
    const acc factor = shared.other.factor[k0 + place];
    acc value[kPack];
    fetch_pack<Product::kScalesRows>(rows, row, factor, feature, p.dim, p.vector, value);
    store<kPack>(&shared.tile.rows[0][place][tx * kPack], value);
    fetch_pack<Product::kScalesRows>(dots, dots != nullptr ? row : -1, factor, feature, p.dim,
                                     p.vector, value);
    store<kPack>(&shared.tile.rows[1][place][tx * kPack], value);
    __syncthreads();
#pragma unroll 1  // longer, it spills
    for (int k = 0; k < kDepth; ++k) {
      const auto pack = [](const acc* at) { return *reinterpret_cast<const Pack<acc>*>(at); };
      const Pack<acc> first = pack(&shared.tile.first[k0 + k][ty * 4]);
      const Pack<acc> second = pack(&shared.tile.second[k0 + k][ty * 4]);
      const Pack<acc> other = pack(&shared.tile.rows[0][k][tx * kPack]);
      const Pack<acc> other_dot = pack(&shared.tile.rows[1][k][tx * kPack]);
#pragma unroll
      for (int c = 0; c < kPack; ++c) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          if constexpr (Product::kWeighs) {
            const acc value = tanh_(own[r][c] + other.v[c]);
            const acc slope = acc(1) - value * value, dot = own_dot[r][c] + other_dot.v[c];
            const acc bent = weight_dot[c] - acc(2) * value * weight[c] * dot;
            gradient[r][c] += slope * (first.v[r] * weight[c] + second.v[r] * bent);
            weight_sum[c] += first.v[r] * value + second.v[r] * slope * dot;
          } else {
            gradient[r][c] += Second<Product>::pull(first.v[r], second.v[r], own[r][c], other.v[c],
                                                    own_dot[r][c], other_dot.v[c]);
          }
        }
      }
    }
  }
}

// Gradients that wait for the next tile: each read by the thread that wrote it, zero at first.
template <class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void load_sums(const SecondParams<scalar_t>& params,
                                          const SecondShared<acc>& shared, bool is_first,
                                          int64_t feature, acc (&gradient)[4][kPack]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const acc* from = params.sums + own_place(params, shared, r) + feature;
    const bool exists = !is_first && owns_row(params, shared, r);
#pragma unroll
    for (int c = 0; c < kPack; ++c) {
      gradient[r][c] = exists && feature + c < params.problem.dim ? from[c] : acc(0);
    }
  }
}
template <class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void store_sums(const SecondParams<scalar_t>& params,
                                           const SecondShared<acc>& shared, int64_t feature,
                                           const acc (&gradient)[4][kPack]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if (!owns_row(params, shared, r)) continue;
    write_row(params.sums + own_place(params, shared, r), params.problem, feature, gradient[r]);
  }
}

// Writes the gradients of the thread's own rows, features `feature` and on.
template <class Product, class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void write_second(const SecondParams<scalar_t>& params,
                                             const SecondShared<acc>& shared, int64_t feature,
                                             const PairSums<acc>& pairs,
                                             acc (&gradient)[4][kPack]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if (!owns_row(params, shared, r)) continue;
    const int i = threadIdx.x / kAcross * 4 + r;
    if constexpr (Product::kScalesRows) {
      if (params.problem.similarity == Similarity::kCosine) {
        acc own[kPack], own_dot[kPack];
        fetch_own<true>(params, shared, r, feature, own, own_dot);
#pragma unroll
        for (int c = 0; c < kPack; ++c) {
          gradient[r][c] -= own[c] * pairs.own[r] + own_dot[c] * pairs.own_dot[r];
          gradient[r][c] *= shared.own.factor[i];
        }
      }
    }
    if (shared.own.row[i] < 0) {
#pragma unroll
      for (int c = 0; c < kPack; ++c) gradient[r][c] = 0;
    }
    write_row(params.grad_rows + own_place(params, shared, r), params.problem, feature,
              gradient[r]);
  }
}

}  // namespace fastmeta::matching::cuda
