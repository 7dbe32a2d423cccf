// Gradients of bfloat16 inputs by the dot products of AVX512-BF16: slopes times rows, as in
// matching_cpu_outer.h, two rows at a time.
//
// Two neighbouring rows of supports, or of queries, become one of words; slopes are rounded to
// bfloat16, in pairs along supports and in pairs along queries. They are rounded as fractions of
// the largest that goes into the same row of a gradient: alike slopes, as a nearly uniform
// attention has them, would all be off by the same otherwise. Where rows have a direction in
// common, what a gradient loses along its own vector (cosine, squared euclidean) is a difference of
// large numbers: it is made from the sums at hand, with the slopes as rounded, so that their errors
// cancel in it.
#pragma once
#include <cstdint>

#include "matching/matching_cpu_gradient.h"
#include "matching/matching_cpu_outer.h"

namespace fastmeta::matching::FASTMETA_ISA {

// Words of slopes and the rows of words they go with: output row m takes those at coef + m / 2 *
// step_two + m % 2 * step_one + k * step_k, times row k of x, x_stride apart.
struct PairRun {
  const float* coef;
  int64_t step_two, step_one, step_k;
  const float* x;
  int64_t x_stride, pairs;
};
template <class A>
struct PairOuter {
  const PairRun* runs;
  int64_t num_runs;
  A* const* out;
  const A* scale;  // of output rows: their sums are in fractions of it
  bool add;
};

#if defined(__AVX512F__)

// The words of rows a and b, zeros past the features up to whole vectors. b may be nullptr: zeros.
static inline void interleave_rows(const bfloat16* a, const bfloat16* b, int64_t dim, float* to) {
  constexpr int kW = kWidth<float>;
  for (int64_t d = 0; d < dim; d += kW) {
    const int n = static_cast<int>(min_of<int64_t>(kW, dim - d));
    const auto bits = [&](const bfloat16* p) __attribute__((always_inline)) {
      return reinterpret_cast<WordVec>(n == kW ? load(p + d) : load_n(p + d, n));
    };
    WordVec word = bits(a) >> 16;
    if (b != nullptr) word |= bits(b);
    store(to + d, reinterpret_cast<Vec<float>>(word));
  }
}
// `count` rows from row_at(0) on, two by two: to[i * stride] holds rows i and i + 1 for even i.
template <class F>
static void interleave(int64_t count, int64_t dim, float* to, const F& row_at) {
  for (int64_t i = 0; i < count; i += 2) {
    interleave_rows(row_at(i), i + 1 < count ? row_at(i + 1) : nullptr, dim,
                    to + i * copy_stride<bfloat16>(dim));
  }
}

// Slopes of n supports with a panel of `count` queries: the largest sizes per lane, in lane_most,
// and per support, in row_most if larger than what is there; lanes past `count` become zeros.
template <int NV>
static void measure_slopes(Int<NV>, float* tile, int64_t n, int count, float* lane_most,
                           Vec<float>* row_most) {
  constexpr int kW = kWidth<float>, kL = NV * kW;
  WordVec live[NV];
  for (int l = 0; l < kL; ++l) live[l / kW][l % kW] = l < count ? ~0u : 0u;
  Vec<float> most[NV] = {};
  for (int64_t r = 0; r < n; ++r) {
    Vec<float> row = row_most[r];
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) {
      float* at = tile + r * kL + v * kW;
      const WordVec x = reinterpret_cast<WordVec>(load(at)) & live[v];
      if (count < kL) store(at, reinterpret_cast<Vec<float>>(x));
      const Vec<float> size = reinterpret_cast<Vec<float>>(x & 0x7fffffffu);
      most[v] = vmax<float>(most[v], size);
      row = vmax<float>(row, size);
    }
    row_most[r] = row;
  }
  for (int v = 0; v < NV; ++v) store(lane_most + v * kW, most[v]);
}
// What slopes are fractions of, 1 where the largest is far out or not a number.
FASTMETA_INLINE Vec<float> scale_of(Vec<float> most) {
  const Vec<float> one = splat<float>(1);
  return (most > 0x1p-100f) & (most < 0x1p100f) ? most : one;
}
FASTMETA_INLINE float largest(Vec<float> x) {
  using All = typename MakeLanes<kWidth<float>>::type;
  x = vmax<float>(x, rotate_lanes<8>(x, All{}));
  x = vmax<float>(x, rotate_lanes<4>(x, All{}));
  x = vmax<float>(x, rotate_lanes<2>(x, All{}));
  return vmax<float>(x, rotate_lanes<1>(x, All{}))[0];
}

// Rounds the slopes of n supports with a panel, in place, as fractions of the scales. The memory of
// two rows then holds a row of words, pairs along the supports as fractions of their lanes' scales,
// and after it both rows as fractions of their own, in which pairs along the queries lie side by
// side; zeros where there is no second row. What rounding added goes to own and row_own where these
// are not nullptr.
template <int NV>
FASTMETA_BF16_TARGET static void round_slopes(Int<NV>, float* tile, int64_t n,
                                              const float* lane_scale, const float* row_scale,
                                              float* own, Vec<float>* row_own) {
  constexpr int kW = kWidth<float>, kL = NV * kW;
  typedef uint16_t Halves __attribute__((vector_size(kVecBytes)));
  typedef uint16_t HalfOfThem __attribute__((vector_size(kVecBytes / 2), may_alias));
  const auto lower = [](Halves x) __attribute__((always_inline)) {
    return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  };
  const auto upper = [](Halves x) __attribute__((always_inline)) {
    return __builtin_shufflevector(x, x, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30,
                                   31);
  };
  const auto zip = [](Halves x) __attribute__((always_inline)) {
    return reinterpret_cast<WordVec>(
        __builtin_shufflevector(x, x, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24,
                                9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
  };
  const auto first_of = [](WordVec word) __attribute__((always_inline)) {
    return reinterpret_cast<Vec<float>>(word << 16);
  };
  const auto second_of = [](WordVec word) __attribute__((always_inline)) {
    return reinterpret_cast<Vec<float>>(word & 0xffff0000u);
  };
  Vec<float> lane[NV], inverse[NV], added[NV] = {};
  for (int v = 0; v < NV; ++v) {
    lane[v] = load(lane_scale + v * kW);
    inverse[v] = 1 / lane[v];
  }
  for (int64_t r = 0; r < n; r += 2) {
    const bool two = r + 1 < n;
    float* at = tile + r * kL;
    HalfOfThem* rows = reinterpret_cast<HalfOfThem*>(at + kL);
    const Vec<float> scale_a = splat<float>(row_scale[r]), inverse_a = 1 / scale_a;
    const Vec<float> scale_b = splat<float>(two ? row_scale[r + 1] : 1.0f), inverse_b = 1 / scale_b;
    Vec<float> a[NV], b[NV], row_a{}, row_b{};
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) {
      a[v] = load(at + v * kW);
      b[v] = two ? load(at + kL + v * kW) : Vec<float>{};
    }
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) {
      const Halves by_lane =
          (Halves)_mm512_cvtne2ps_pbh((__m512)(b[v] * inverse[v]), (__m512)(a[v] * inverse[v]));
      const Halves by_row =
          (Halves)_mm512_cvtne2ps_pbh((__m512)(b[v] * inverse_b), (__m512)(a[v] * inverse_a));
      const WordVec word = zip(by_lane);
      store(at + v * kW, reinterpret_cast<Vec<float>>(word));
      rows[v] = lower(by_row);
      rows[NV + v] = upper(by_row);
      if (own != nullptr) {
        added[v] += (first_of(word) * lane[v] - a[v]) + (second_of(word) * lane[v] - b[v]);
        row_a += first_of(zip(by_row)) * scale_a - a[v];
        row_b += second_of(zip(by_row)) * scale_b - b[v];
      }
    }
    if (own != nullptr) {
      row_own[r] += row_a;
      if (two) row_own[r + 1] += row_b;
    }
  }
  for (int v = 0; v < NV && own != nullptr; ++v) {
    store(own + v * kW, load(own + v * kW) + added[v]);
  }
}

template <int NV, int MR>
FASTMETA_BF16_TARGET static void pair_outer_tile(const PairOuter<float>& o, int64_t m0, int64_t d,
                                                 int tail) {
  constexpr int kW = kWidth<float>;
  Vec<float> sum[MR][NV];
  FASTMETA_UNROLL
  for (int r = 0; r < MR; ++r) {
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) sum[r][v] = Vec<float>{};
  }
  for (int64_t i = 0; i < o.num_runs; ++i) {
    const PairRun& run = o.runs[i];
    const float* row[MR];
    FASTMETA_UNROLL
    for (int r = 0; r < MR; ++r) {
      row[r] = run.coef + (m0 + r) / 2 * run.step_two + (m0 + r) % 2 * run.step_one;
    }
    const int64_t step = run.step_k, stride = run.x_stride, last = run.pairs * step;
    const float* x = run.x + d;
    for (int64_t k = 0; k < last; k += step, x += stride) {
      uint32_t word[MR];
      FASTMETA_UNROLL
      for (int r = 0; r < MR; ++r) std::memcpy(&word[r], row[r] + k, sizeof(uint32_t));
      add_products<NV, MR>(word, x, sum);
    }
  }
  FASTMETA_UNROLL
  for (int r = 0; r < MR; ++r) {
    float* out = o.out[m0 + r] + d;
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) sum[r][v] *= o.scale[m0 + r];
    if (tail > 0) {
      if (o.add) sum[r][0] += load_n(out, tail);
      store_n(out, sum[r][0], tail);
      continue;
    }
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) {
      if (o.add) sum[r][v] += load(out + v * kW);
      store(out + v * kW, sum[r][v]);
    }
  }
}
template <int NV, int MR>
static void pair_outer_rows(const PairOuter<float>& o, int64_t n, int64_t m0, int64_t d, int tail) {
  if constexpr (MR > 0) {
    if (n == MR) {
      pair_outer_tile<NV, MR>(o, m0, d, tail);
    } else {
      pair_outer_rows<NV, MR - 1>(o, n, m0, d, tail);
    }
  }
}
// outer() of output rows [0, num_m), columns [begin, end).
static inline void pair_outer(const PairOuter<float>& o, int64_t num_m, int64_t begin,
                              int64_t end) {
  for_outer_tiles<float>(
      num_m, begin, end, [&](int64_t m, int64_t rows, int64_t d, int vectors, int tail) {
        with_vectors(vectors, [&](auto nv) {
          pair_outer_rows<decltype(nv)::value, kOuterTileRows>(o, rows, m, d, tail);
        });
      });
}

// What a gradient loses along its own vector: under cosine its projection on it, by the sum itself.
static inline float own_of(Similarity s, float own, const float* grad, const bfloat16* row,
                           int64_t dim) {
  if (s != Similarity::kCosine) return own;
  constexpr int kW = kWidth<float>;
  Vec<float> sum{};
  int64_t d = 0;
  for (; d + kW <= dim; d += kW) sum += load(grad + d) * load(row + d);
  const int left = static_cast<int>(dim - d);
  if (left > 0) sum += load_n(grad + d, left) * load_n(row + d, left);
  return hsum<float>(sum);
}

#endif

}  // namespace fastmeta::matching::FASTMETA_ISA
