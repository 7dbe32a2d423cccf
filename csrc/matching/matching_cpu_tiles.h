// Inner kernels of matching attention: packed query panels and score tiles.
//
// Scores: queries lie along the vector lanes (a panel of NV vectors, packed as panel[d][lane]);
// support values are read in place and broadcast, MR rows at a time, so that MR * NV sums stay in
// registers. AVX-512 has registers for 6 x 4 sums, AVX2 and SSE for 6 x 2. Gradients, but for the
// additive similarity's, are in matching_cpu_outer.h.
#pragma once
#include <cstdint>

#include "common/vec.h"
#include "common/vec_math.h"
#include "matching/matching_attention.h"

namespace fastmeta::matching::FASTMETA_ISA {

using namespace fastmeta::FASTMETA_ISA;

#if defined(__AVX512F__)
constexpr int kMaxVectors = 4;
#else
constexpr int kMaxVectors = 2;
#endif
template <int NV>
constexpr int kTileRows = NV == 4                         ? 6
                          : NV == 3                       ? 8
                          : (NV == 2 && kMaxVectors == 2) ? 6
                                                          : 12;
constexpr int64_t kFeatureBlock =
    128;  // features per pass over a block of supports; the panel's part fits L1

template <int N>
struct Int {
  static constexpr int value = N;
};
// Calls f(Int<nv>{}) for 1 <= nv <= kMaxVectors.
template <class F>
FASTMETA_INLINE void with_vectors(int nv, const F& f) {
  if constexpr (kMaxVectors == 4) {
    if (nv == 4) return f(Int<4>{});
    if (nv == 3) return f(Int<3>{});
  }
  if (nv == 2) return f(Int<2>{});
  return f(Int<1>{});
}

// ---- packing
// Rows src[0..count), `stride` apart, columns [0, n): dst[column * lanes + row], 0 in the lanes
// past count.
template <class S>
static void pack_transposed(const S* src, int64_t stride, int64_t n, int count, int lanes,
                            Acc<S>* dst) {
  using A = Acc<S>;
  constexpr int kW = kWidth<A>;
  for (int lane = 0; lane < lanes; lane += kW) {
    const int rows = count - lane;
    const S* first = src + lane * stride;
    for (int64_t d = 0; d < n; d += kW) {
      Vec<A> r[kW];
      const int columns = static_cast<int>(min_of<int64_t>(kW, n - d));
      if (rows >= kW && columns == kW) {
        FASTMETA_UNROLL
        for (int i = 0; i < kW; ++i) r[i] = load(first + i * stride + d);
      } else {
        FASTMETA_UNROLL
        for (int i = 0; i < kW; ++i) {
          r[i] = i < rows ? load_n(first + i * stride + d, columns) : Vec<A>{};
        }
      }
      transpose<A>(r);
      A* to = dst + d * lanes + lane;
      if (columns == kW) {
        FASTMETA_UNROLL
        for (int i = 0; i < kW; ++i) store(to + i * lanes, r[i]);
      } else {
        FASTMETA_UNROLL
        for (int i = 0; i < kW; ++i) {
          if (i < columns) store(to + i * lanes, r[i]);
        }
      }
    }
  }
}

// The other way: dst[row * stride + column] = src[column * lanes + row] for rows [0, count).
template <class A>
static void unpack_transposed(const A* src, int lanes, int64_t n, int count, A* dst,
                              int64_t stride) {
  constexpr int kW = kWidth<A>;
  for (int lane = 0; lane < count; lane += kW) {
    const int rows = min_of(kW, count - lane);
    for (int64_t c = 0; c < n; c += kW) {
      Vec<A> r[kW];
      const int columns = static_cast<int>(min_of<int64_t>(kW, n - c));
      FASTMETA_UNROLL
      for (int i = 0; i < kW; ++i)
        r[i] = i < columns ? load(src + (c + i) * lanes + lane) : Vec<A>{};
      transpose<A>(r);
      A* to = dst + lane * stride + c;
      FASTMETA_UNROLL
      for (int i = 0; i < kW; ++i) {
        if (i >= rows) break;
        if (columns == kW) {
          store(to + i * stride, r[i]);
        } else {
          store_n(to + i * stride, r[i], columns);
        }
      }
    }
  }
}

// Per lane, the squared norms of a packed panel; sums of 64 features join the total.
template <class A>
static void panel_norms(const A* panel, int64_t dim, int lanes, A* out) {
  constexpr int kW = kWidth<A>;
  for (int lane = 0; lane < lanes; lane += kW) {
    Vec<A> total{};
    for (int64_t begin = 0; begin < dim; begin += 64) {
      const int64_t end = min_of(dim, begin + 64);
      Vec<A> even{}, odd{};
      int64_t d = begin;
      for (; d + 2 <= end; d += 2) {
        const Vec<A> x = load(panel + d * lanes + lane), y = load(panel + (d + 1) * lanes + lane);
        even += x * x;
        odd += y * y;
      }
      if (d < end) {
        const Vec<A> x = load(panel + d * lanes + lane);
        even += x * x;
      }
      total += even + odd;
    }
    store(out + lane, total);
  }
}

template <class S>
static Acc<S> squared_norm(const S* x, int64_t dim) {
  using A = Acc<S>;
  constexpr int kW = kWidth<A>;
  Vec<A> a{}, b{}, c{}, e{};
  int64_t d = 0;
  for (; d + 4 * kW <= dim; d += 4 * kW) {
    const Vec<A> p = load(x + d), q = load(x + d + kW), r = load(x + d + 2 * kW),
                 s = load(x + d + 3 * kW);
    a += p * p;
    b += q * q;
    c += r * r;
    e += s * s;
  }
  for (; d + kW <= dim; d += kW) {
    const Vec<A> p = load(x + d);
    a += p * p;
  }
  if (d < dim) {
    const Vec<A> p = load_n(x + d, static_cast<int>(dim - d));
    b += p * p;
  }
  return hsum<A>((a + b) + (c + e));
}

template <class S>
static void convert_row(const S* from, int64_t dim, Acc<S>* to) {
  constexpr int kW = kWidth<Acc<S>>;
  int64_t d = 0;
  for (; d + kW <= dim; d += kW) store(to + d, load(from + d));
  if (d < dim)
    store_n(to + d, load_n(from + d, static_cast<int>(dim - d)), static_cast<int>(dim - d));
}
template <class S>
static void store_row(const Acc<S>* from, int64_t dim, S* to) {
  constexpr int kW = kWidth<Acc<S>>;
  int64_t d = 0;
  for (; d + kW <= dim; d += kW) store(to + d, load(from + d));
  if (d < dim)
    store_n(to + d, load_n(from + d, static_cast<int>(dim - d)), static_cast<int>(dim - d));
}
// to += factor * x
template <class A, class S>
static void add_scaled(A* to, A factor, const S* x, int64_t dim) {
  constexpr int kW = kWidth<A>;
  int64_t d = 0;
  for (; d + kW <= dim; d += kW) store(to + d, load(to + d) + factor * load(x + d));
  if (d < dim) {
    const int n = static_cast<int>(dim - d);
    store_n(to + d, load_n(to + d, n) + factor * load_n(x + d, n), n);
  }
}

// ---- scores
enum class Inner { kProduct, kDifference };

// From the inner sums to factor * similarity. row, lane: inverse norms (cosine) or squared norms
// (squared euclidean), per support of the block and per lane of the panel.
template <class A>
struct Finish {
  Similarity similarity;
  const A* row;
  const A* lane;
  A factor;
};

// Of the inner sums of support `row` of the block with the queries from `lane` on.
template <class A, Inner kInner>
FASTMETA_INLINE Vec<A> finish_score(Vec<A> x, const Finish<A>& finish, int64_t row, int lane) {
  if constexpr (kInner == Inner::kDifference) {
    x = -vsqrt<A>(x);
  } else if (finish.similarity == Similarity::kCosine) {
    x = x * finish.row[row] * load(finish.lane + lane);
  } else if (finish.similarity == Similarity::kSqEuclidean) {
    // Rounding must not turn a distance negative; NaN passes as the second operand.
    x = -vmax<A>(Vec<A>{}, (load(finish.lane + lane) + finish.row[row]) - A(2) * x);
  }
  return x * finish.factor;
}

// The end of a tile's pass over some features: sums join those of the passes before, and the last
// makes scores of them.
template <class A, Inner kInner, int NV, int MR>
FASTMETA_INLINE void store_scores(Vec<A> (&sum)[MR][NV], bool first, bool last,
                                  const Finish<A>& finish, int64_t r0, A* tile) {
  constexpr int kW = kWidth<A>, kL = NV * kW;
  if (!first) {
    FASTMETA_UNROLL
    for (int r = 0; r < MR; ++r) {
      FASTMETA_UNROLL
      for (int v = 0; v < NV; ++v) sum[r][v] += load(tile + r * kL + v * kW);
    }
  }
  if (last) {
    FASTMETA_UNROLL
    for (int r = 0; r < MR; ++r) {
      FASTMETA_UNROLL
      for (int v = 0; v < NV; ++v) {
        sum[r][v] = finish_score<A, kInner>(sum[r][v], finish, r0 + r, v * kW);
      }
    }
  }
  FASTMETA_UNROLL
  for (int r = 0; r < MR; ++r) {
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) store(tile + r * kL + v * kW, sum[r][v]);
  }
}

template <class A, Inner kInner, int NV, int MR>
static inline void score_tile(const A* const* rows, const A* panel, int64_t begin, int64_t end,
                              bool last, const Finish<A>& finish, int64_t r0, A* tile) {
  constexpr int kW = kWidth<A>, kL = NV * kW;
  const A* row[MR];
  FASTMETA_UNROLL
  for (int r = 0; r < MR; ++r) row[r] = rows[r0 + r];
  tile += r0 * kL;
  Vec<A> sum[MR][NV];
  FASTMETA_UNROLL
  for (int r = 0; r < MR; ++r) {
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) sum[r][v] = Vec<A>{};
  }
  const A* q = panel + begin * kL;
  for (int64_t d = begin; d < end; ++d, q += kL) {
    Vec<A> x[NV];
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) x[v] = load(q + v * kW);
    FASTMETA_UNROLL
    for (int r = 0; r < MR; ++r) {
      const Vec<A> s = splat<A>(row[r][d]);
      FASTMETA_UNROLL
      for (int v = 0; v < NV; ++v) {
        if constexpr (kInner == Inner::kProduct) {
          sum[r][v] += s * x[v];
        } else {
          const Vec<A> t = x[v] - s;
          sum[r][v] += t * t;
        }
      }
    }
  }
  store_scores<A, kInner, NV, MR>(sum, begin == 0, last, finish, r0, tile);
}
template <class A, Inner kInner, int NV, int MR>
static inline void score_rest(int64_t n, const A* const* rows, const A* panel, int64_t begin,
                              int64_t end, bool last, const Finish<A>& finish, int64_t r0,
                              A* tile) {
  if constexpr (MR > 0) {
    if (n == MR) {
      score_tile<A, kInner, NV, MR>(rows, panel, begin, end, last, finish, r0, tile);
    } else {
      score_rest<A, kInner, NV, MR - 1>(n, rows, panel, begin, end, last, finish, r0, tile);
    }
  }
}
template <class A, Inner kInner, int NV>
static void score_product(const A* const* rows, int64_t n, const A* panel, int64_t dim,
                          const Finish<A>& finish, A* tile) {
  constexpr int kMR = kTileRows<NV>;
  int64_t begin = 0;
  do {  // once even without features: the finish makes the similarity of empty vectors
    const int64_t end = min_of(dim, begin + kFeatureBlock);
    const bool last = end == dim;
    int64_t r = 0;
    for (; r + kMR <= n; r += kMR) {
      score_tile<A, kInner, NV, kMR>(rows, panel, begin, end, last, finish, r, tile);
    }
    score_rest<A, kInner, NV, kMR - 1>(n - r, rows, panel, begin, end, last, finish, r, tile);
    begin = end;
  } while (begin < dim);
}
template <class A, int NV>
static void score_additive(const A* const* rows, int64_t n, const A* panel, int64_t dim,
                           const A* weight, A factor, A* tile) {
  constexpr int kW = kWidth<A>, kL = NV * kW;
  for (int64_t r = 0; r < n; ++r) {
    Vec<A> sum[NV] = {};
    for (int64_t d = 0; d < dim; ++d) {
      FASTMETA_UNROLL
      for (int v = 0; v < NV; ++v) {
        sum[v] += weight[d] * vtanh<A>(load(panel + d * kL + v * kW) + rows[r][d]);
      }
    }
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) store(tile + r * kL + v * kW, sum[v] * factor);
  }
}
// tile[r][lane] = factor * similarity(query lane, support r) for n supports.
template <class A, int NV>
static void score_block(const A* const* rows, int64_t n, const A* panel, int64_t dim,
                        const A* weight, const Finish<A>& finish, A* tile) {
  switch (finish.similarity) {
    case Similarity::kEuclidean:
      return score_product<A, Inner::kDifference, NV>(rows, n, panel, dim, finish, tile);
    case Similarity::kAdditive:
      return score_additive<A, NV>(rows, n, panel, dim, weight, finish.factor, tile);
    default:
      return score_product<A, Inner::kProduct, NV>(rows, n, panel, dim, finish, tile);
  }
}

// ---- gradients
// Additive: with u = tanh(q + s) and coef c, per pair and feature: dq += c w (1 - u^2), ds
// likewise, dw += c u.
template <class A>
static void additive_gradients(const A* tile, int lanes, const A* const* supports, int64_t n,
                               const A* const* queries, int count, int64_t dim, const A* weight,
                               A* const* grad_support, A* const* grad_query, A* grad_weight,
                               bool add_support, bool add_query) {
  constexpr int kW = kWidth<A>;
  for (int64_t d = 0; d < dim; d += kW) {
    const int m = static_cast<int>(min_of<int64_t>(kW, dim - d));
    const Vec<A> w = load_n(weight + d, m);
    Vec<A> q[kMaxVectors * kW], dq[kMaxVectors * kW];
    for (int l = 0; l < count; ++l) {
      q[l] = load_n(queries[l] + d, m);
      dq[l] = Vec<A>{};
    }
    Vec<A> dw{};
    for (int64_t r = 0; r < n; ++r) {
      const Vec<A> s = load_n(supports[r] + d, m);
      Vec<A> ds{};
      for (int l = 0; l < count; ++l) {
        const A c = tile[r * lanes + l];
        const Vec<A> u = vtanh<A>(q[l] + s);
        const Vec<A> slope = c * (A(1) - u * u);
        ds += slope;
        dq[l] += slope;
        dw += c * u;
      }
      ds *= w;
      store_n(grad_support[r] + d, add_support ? load_n(grad_support[r] + d, m) + ds : ds, m);
    }
    for (int l = 0; l < count; ++l) {
      const Vec<A> x = dq[l] * w;
      store_n(grad_query[l] + d, add_query ? load_n(grad_query[l] + d, m) + x : x, m);
    }
    store_n(grad_weight + d, load_n(grad_weight + d, m) + dw, m);
  }
}

}  // namespace fastmeta::matching::FASTMETA_ISA
