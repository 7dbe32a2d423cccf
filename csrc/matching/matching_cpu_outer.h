// Gradients from coefficients: sums of rows weighted by what the score tiles became.
//
// Features lie along the lanes, coefficients are broadcast: a tile of 6 rows x kMaxVectors vectors
// keeps its sums in registers while it walks down the other side's rows.
#pragma once
#include <cstdint>

#include "matching/matching_cpu_tiles.h"

namespace fastmeta::matching::FASTMETA_ISA {

// Coefficients of n rows x: that of output row m and row k is coef[m * step_m + k * step_k].
template <class A>
struct OuterRun {
  const A* coef;
  int64_t step_m, step_k;
  const A* const* x;
  int64_t n;
  const A* const* own;  // kDifference: what output row m is subtracted as
};

// out[m][d] (+)= sum over the runs and k of coef(m, k) * x[k][d - x_column]             kProduct
//                                           coef(m, k) * (x[k][d - x_column] - own[m][d])
//                                           kDifference
// and, where there are own factors, + own_factor[m] * own[m][d], own being the first run's.
template <class A>
struct Outer {
  const OuterRun<A>* runs;
  int64_t num_runs;
  A* const* out;
  bool add;
  const A* own_factor = nullptr;
  int64_t x_column = 0;
};

template <class A, Inner kInner, int NV, int MR, bool kTail>
static inline void outer_tile(const Outer<A>& o, int64_t m0, int64_t d, int tail) {
  constexpr int kW = kWidth<A>;
  const auto at = [&](const A* row, int v) __attribute__((always_inline)) {
    return kTail ? load_n(row, tail) : load(row + v * kW);
  };
  Vec<A> sum[MR][NV];
  FASTMETA_UNROLL
  for (int r = 0; r < MR; ++r) {
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) sum[r][v] = Vec<A>{};
  }
  for (int64_t i = 0; i < o.num_runs; ++i) {
    const OuterRun<A>& run = o.runs[i];
    const A* coef = run.coef + m0 * run.step_m;
    const int64_t step_m = run.step_m, column = d - o.x_column;
    for (int64_t k = 0; k < run.n; ++k, coef += run.step_k) {
      const A* row = run.x[k] + column;
      Vec<A> x[NV];
      FASTMETA_UNROLL
      for (int v = 0; v < NV; ++v) x[v] = at(row, v);
      FASTMETA_UNROLL
      for (int r = 0; r < MR; ++r) {
        const Vec<A> a = splat<A>(coef[r * step_m]);
        FASTMETA_UNROLL
        for (int v = 0; v < NV; ++v) {
          if constexpr (kInner == Inner::kProduct) {
            sum[r][v] += a * x[v];
          } else {
            sum[r][v] += a * (x[v] - at(run.own[m0 + r] + d, v));
          }
        }
      }
    }
  }
  FASTMETA_UNROLL
  for (int r = 0; r < MR; ++r) {
    A* out = o.out[m0 + r] + d;
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) {
      if (o.own_factor != nullptr) {
        sum[r][v] += o.own_factor[m0 + r] * at(o.runs->own[m0 + r] + d, v);
      }
      if (o.add) sum[r][v] += at(out, v);
      if constexpr (kTail) {
        store_n(out, sum[r][v], tail);
      } else {
        store(out + v * kW, sum[r][v]);
      }
    }
  }
}
template <class A, Inner kInner, int NV, int MR, bool kTail>
static inline void outer_rows(const Outer<A>& o, int64_t n, int64_t m0, int64_t d, int tail) {
  if constexpr (MR > 0) {
    if (n == MR) {
      outer_tile<A, kInner, NV, MR, kTail>(o, m0, d, tail);
    } else {
      outer_rows<A, kInner, NV, MR - 1, kTail>(o, n, m0, d, tail);
    }
  }
}

// Calls f(first column, vectors, columns of a tail or 0) for the strips of columns [begin, end).
template <class A, class F>
FASTMETA_INLINE void for_strips(int64_t begin, int64_t end, const F& f) {
  constexpr int kW = kWidth<A>;
  int64_t d = begin;
  for (; d + kMaxVectors * kW <= end; d += kMaxVectors * kW) f(d, kMaxVectors, 0);
  const int left = static_cast<int>((end - d) / kW);
  if (left > 0) f(d, left, 0);
  d += left * kW;
  if (d < end) f(d, 1, static_cast<int>(end - d));
}

// Calls f(first row, rows, first column, vectors, tail) for the tiles of output rows [0, num_m) and
// columns [begin, end): at most kOuterTileRows rows, as even as they can be.
constexpr int kOuterTileRows = 6;
template <class A, class F>
FASTMETA_INLINE void for_outer_tiles(int64_t num_m, int64_t begin, int64_t end, const F& f) {
  const int64_t tiles = ceil_div(num_m, kOuterTileRows);
  for (int64_t i = 0, m = 0; i < tiles; ++i) {
    const int64_t rows = num_m * (i + 1) / tiles - m;
    for_strips<A>(begin, end,
                  [&](int64_t d, int vectors, int tail) { f(m, rows, d, vectors, tail); });
    m += rows;
  }
}

// Output rows [0, num_m), columns [begin, end).
template <class A, Inner kInner>
static void outer_product(const Outer<A>& o, int64_t num_m, int64_t begin, int64_t end) {
  constexpr int kMR = kOuterTileRows;
  for_outer_tiles<A>(num_m, begin, end,
                     [&](int64_t m, int64_t rows, int64_t d, int vectors, int tail) {
                       if (tail > 0)
                         return outer_rows<A, kInner, 1, kMR, true>(o, rows, m, d, tail);
                       with_vectors(vectors, [&](auto nv) {
                         outer_rows<A, kInner, decltype(nv)::value, kMR, false>(o, rows, m, d, 0);
                       });
                     });
}

template <class A>
static void outer(const Outer<A>& o, Similarity similarity, int64_t num_m, int64_t begin,
                  int64_t end) {
  if (similarity == Similarity::kEuclidean) {
    outer_product<A, Inner::kDifference>(o, num_m, begin, end);
  } else {
    outer_product<A, Inner::kProduct>(o, num_m, begin, end);
  }
}

// How many columns to take at a time so that `rows` rows of them stay in the L1 cache: at least a
// strip.
constexpr int64_t kBlockBytes = int64_t{24} << 10;
template <class A>
static int64_t block_columns(int64_t rows) {
  constexpr int64_t kStrip = kMaxVectors * kWidth<A>;
  const int64_t fit = kBlockBytes / (max_of<int64_t>(1, rows) * static_cast<int64_t>(sizeof(A)));
  return max_of(kStrip, fit / kStrip * kStrip);
}

}  // namespace fastmeta::matching::FASTMETA_ISA
