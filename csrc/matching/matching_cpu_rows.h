// Scores with features along the vector lanes: both sides read in place, nothing packed.
//
// Where supports are few beside the features, packing a panel of queries costs as much as its
// products. Here a tile of 4 queries x 3 supports (AVX-512: 4 x 6) keeps its sums in registers, and
// the sums over the lanes at its end are shared by four queries.
#pragma once
#include <cstdint>

#include "matching/matching_cpu_outer.h"

namespace fastmeta::matching::FASTMETA_ISA {

// Classes, and for nll tasks, of up to so many supports are never cut by a block or a chunk. In the
// backward a class that is cut costs one more product; above 1280 rows holding its slopes with 64
// queries, which then fill the second-level cache, costs more.
constexpr int64_t kWholeRows = 256;
constexpr int64_t kWholeRowsBackward = 1280;
static inline int64_t whole_rows(const Problem& p) {
  return p.targets != nullptr ? kWholeRows : kWholeRowsBackward;
}

constexpr int kRowQueries = 4;
constexpr int kRowSupports = kMaxVectors == 4 ? 6 : 3;

// Whether scores are made this way. It must not depend on how many supports there are, padding
// included, lest padding change a result's bits; 16-bit rows would have to be converted first.
template <class S>
static bool scores_by_rows(const Problem& p) {
  constexpr int64_t kFeatures = 256;  // from here on the sums over lanes cost little
  return !kIsHalf<S> && p.similarity != Similarity::kAdditive && p.dim >= kFeatures;
}

// Of groups of four lanes: a0 b0 a1 b1, a2 b2 a3 b3; and a0 a1 b0 b1, a2 a3 b2 b3.
template <int Upper, class V, int... I>
FASTMETA_INLINE V unpack_fours(V a, V b, Lanes<I...>) {
  constexpr int kN = sizeof...(I);
  return __builtin_shufflevector(a, b, (I / 4 * 4 + I % 4 / 2 + 2 * Upper + I % 2 * kN)...);
}
template <int Upper, class V, int... I>
FASTMETA_INLINE V join_fours(V a, V b, Lanes<I...>) {
  constexpr int kN = sizeof...(I);
  return __builtin_shufflevector(a, b, (I / 4 * 4 + I % 2 + 2 * Upper + I % 4 / 2 * kN)...);
}

// to[i] = sum over the lanes of x[i], for four vectors.
template <class A>
FASTMETA_INLINE void store_sums(const Vec<A>* x, A* to) {
  constexpr int kW = kWidth<A>;
  if constexpr (kW >= 4) {
    using All = typename MakeLanes<kW>::type;
    const Vec<A> ab = unpack_fours<0>(x[0], x[1], All{}) + unpack_fours<1>(x[0], x[1], All{});
    const Vec<A> cd = unpack_fours<0>(x[2], x[3], All{}) + unpack_fours<1>(x[2], x[3], All{});
    Vec<A> sums = join_fours<0>(ab, cd, All{}) + join_fours<1>(ab, cd, All{});
    if constexpr (kW >= 16) sums += rotate_lanes<8 % kW>(sums, All{});
    if constexpr (kW >= 8) sums += rotate_lanes<4 % kW>(sums, All{});
    typedef A Four __attribute__((vector_size(4 * sizeof(A)), aligned(sizeof(A)), may_alias));
    *reinterpret_cast<Four*>(to) = __builtin_shufflevector(sums, sums, 0, 1, 2, 3);
  } else {
    for (int i = 0; i < 4; ++i) to[i] = hsum<A>(x[i]);
  }
}

// Inner sums of four queries with MS supports, to tile[support * lanes + query].
template <class A, Inner kInner, int MS>
static inline void row_tile(const A* const* query, const A* const* support, int64_t dim, A* tile,
                            int lanes) {
  constexpr int kW = kWidth<A>;
  Vec<A> sum[MS][kRowQueries];
  FASTMETA_UNROLL
  for (int r = 0; r < MS; ++r) {
    FASTMETA_UNROLL
    for (int i = 0; i < kRowQueries; ++i) sum[r][i] = Vec<A>{};
  }
  const auto add = [&](const auto& at) __attribute__((always_inline)) {
    Vec<A> s[MS];
    FASTMETA_UNROLL
    for (int r = 0; r < MS; ++r) s[r] = at(support[r]);
    FASTMETA_UNROLL
    for (int i = 0; i < kRowQueries; ++i) {
      const Vec<A> q = at(query[i]);
      FASTMETA_UNROLL
      for (int r = 0; r < MS; ++r) {
        if constexpr (kInner == Inner::kProduct) {
          sum[r][i] += q * s[r];
        } else {
          const Vec<A> t = q - s[r];
          sum[r][i] += t * t;
        }
      }
    }
  };
  int64_t d = 0;
  for (; d + kW <= dim; d += kW) add([&](const A* row) { return load(row + d); });
  if (d < dim) {
    const int n = static_cast<int>(dim - d);
    add([&](const A* row) { return load_n(row + d, n); });
  }
  FASTMETA_UNROLL
  for (int r = 0; r < MS; ++r) store_sums<A>(sum[r], tile + r * lanes);
}
template <class A, Inner kInner, int MS>
static inline void row_rest(int64_t n, const A* const* query, const A* const* support, int64_t dim,
                            A* tile, int lanes) {
  if constexpr (MS > 0) {
    if (n == MS) {
      row_tile<A, kInner, MS>(query, support, dim, tile, lanes);
    } else {
      row_rest<A, kInner, MS - 1>(n, query, support, dim, tile, lanes);
    }
  }
}

template <class A, Inner kInner, int NV>
static void rows_product(const A* const* supports, int64_t n, const A* const* queries, int count,
                         int64_t dim, const Finish<A>& finish, A* tile) {
  constexpr int kW = kWidth<A>, kL = NV * kW;
  static_assert(kL % kRowQueries == 0 || kW < kRowQueries);
  for (int l = 0; l < count; l += kRowQueries) {
    const A* query[kRowQueries];  // the last group repeats its first
    for (int i = 0; i < kRowQueries; ++i) query[i] = queries[l + i < count ? l + i : l];
    alignas(64) A spill[kRowSupports * kRowQueries];
    const bool fits = l + kRowQueries <= kL;
    int64_t r = 0;
    const auto run = [&](int64_t m) {
      A* to = fits ? tile + r * kL + l : spill;
      const int stride = fits ? kL : kRowQueries;
      if (m == kRowSupports) {
        row_tile<A, kInner, kRowSupports>(query, supports + r, dim, to, stride);
      } else {
        row_rest<A, kInner, kRowSupports - 1>(m, query, supports + r, dim, to, stride);
      }
      for (int64_t k = 0; !fits && k < m; ++k) {
        for (int i = 0; l + i < kL; ++i) tile[(r + k) * kL + l + i] = spill[k * kRowQueries + i];
      }
    };
    for (; r + kRowSupports <= n; r += kRowSupports) run(kRowSupports);
    if (r < n) run(n - r);
  }
  for (int64_t r = 0; r < n; ++r) {
    for (int l = count; l < kL; ++l) tile[r * kL + l] = 0;
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) {
      A* at = tile + r * kL + v * kW;
      store(at, finish_score<A, kInner>(load(at), finish, r, v * kW));
    }
  }
}

// score_block() with queries as rows.
template <class A, int NV>
static void score_rows(const A* const* supports, int64_t n, const A* const* queries, int count,
                       int64_t dim, const Finish<A>& finish, A* tile) {
  if (finish.similarity == Similarity::kEuclidean) {
    rows_product<A, Inner::kDifference, NV>(supports, n, queries, count, dim, finish, tile);
  } else {
    rows_product<A, Inner::kProduct, NV>(supports, n, queries, count, dim, finish, tile);
  }
}

}  // namespace fastmeta::matching::FASTMETA_ISA
