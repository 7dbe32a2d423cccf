// Scores of bfloat16 by the dot products of AVX512-BF16, where the machine has them.
//
// A panel of queries is packed as panel[pair][lane], a word for two neighbouring features; supports
// are read in place, a word broadcast at a time: half the instructions and half the memory of
// float32, and nothing to convert. A last feature without a neighbour has zeros for one, on both
// sides.
//
// A product of two bfloat16 is exact in float32 and added with one rounding, as in float32, the
// second feature of a pair before the first. Numbers below the normal range (1.2e-38) count as
// zero, inputs and sums alike, whatever the mode of the processor: the instruction has no other
// way.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "matching/matching_cpu_tiles.h"

namespace fastmeta::matching::FASTMETA_ISA {

// Whether this translation unit has them for inputs of type S, and whether a problem's scores are
// made of them. Forward, backward and double backward must agree on it: their scores are the same.
#if defined(__AVX512F__)
template <class S>
constexpr bool kPairs = std::is_same_v<S, bfloat16>;
#else
template <class S>
constexpr bool kPairs = false;
#endif
template <class S>
static bool scores_by_pairs(const Problem& p) {
  return kPairs<S> && p.bf16_dots &&
         (p.similarity == Similarity::kDot || p.similarity == Similarity::kCosine ||
          p.similarity == Similarity::kSqEuclidean);
}

#if defined(__AVX512F__)

// Functions with the instruction, in a translation unit that other machines run the rest of.
#if !defined(FASTMETA_BF16_TARGET)
#define FASTMETA_BF16_TARGET __attribute__((target("avx512bf16")))
#endif

typedef float PairsUnaligned __attribute__((vector_size(kVecBytes), aligned(2), may_alias));

// 0 < n <= 32 features as words, zeros after them.
FASTMETA_INLINE Vec<float> load_pairs(const bfloat16* p, int n) {
  if (n == 2 * kWidth<float>) return *reinterpret_cast<const PairsUnaligned*>(p);
  return (Vec<float>)_mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1u), p);
}

// Rows src[0..count), `dim` apart: dst[pair * lanes + row], 0 in the lanes past count.
static inline void pack_pairs(const bfloat16* src, int64_t dim, int count, int lanes, float* dst) {
  constexpr int kW = kWidth<float>;
  for (int lane = 0; lane < lanes; lane += kW) {
    const int rows = count - lane;
    const bfloat16* first = src + lane * dim;
    for (int64_t d = 0; d < dim; d += 2 * kW) {
      const int features = static_cast<int>(min_of<int64_t>(2 * kW, dim - d));
      Vec<float> r[kW];
      if (rows >= kW && features == 2 * kW) {
        FASTMETA_UNROLL
        for (int i = 0; i < kW; ++i) r[i] = load_pairs(first + i * dim + d, 2 * kW);
      } else {
        FASTMETA_UNROLL
        for (int i = 0; i < kW; ++i) {
          r[i] = i < rows ? load_pairs(first + i * dim + d, features) : Vec<float>{};
        }
      }
      transpose<float>(r);
      float* to = dst + d / 2 * lanes + lane;
      FASTMETA_UNROLL
      for (int i = 0; i < kW; ++i) {
        if (2 * i < features) store(to + i * lanes, r[i]);
      }
    }
  }
}

// panel_norms() of a panel of pairs, to the bit.
static inline void pair_norms(const float* panel, int64_t dim, int lanes, float* out) {
  constexpr int64_t kPairsPerSum = 32;
  const int64_t pairs = ceil_div(dim, 2);
  for (int lane = 0; lane < lanes; lane += kWidth<float>) {
    Vec<float> total{};
    for (int64_t begin = 0; begin < pairs; begin += kPairsPerSum) {
      Vec<float> even{}, odd{};
      for (int64_t k = begin; k < min_of(pairs, begin + kPairsPerSum); ++k) {
        const WordVec word = reinterpret_cast<WordVec>(load(panel + k * lanes + lane));
        const Vec<float> x = reinterpret_cast<Vec<float>>(word << 16);
        const Vec<float> y = reinterpret_cast<Vec<float>>(word & 0xffff0000u);
        even += x * x;
        odd += y * y;
      }
      total += even + odd;
    }
    store(out + lane, total);
  }
}

// sum[r][v] += products of the word of row r with the words of vector v.
template <int NV, int MR>
FASTMETA_BF16_TARGET FASTMETA_INLINE void add_products(const uint32_t (&word)[MR],
                                                       const float* panel,
                                                       Vec<float> (&sum)[MR][NV]) {
  Vec<float> x[NV];
  FASTMETA_UNROLL
  for (int v = 0; v < NV; ++v) x[v] = load(panel + v * kWidth<float>);
  FASTMETA_UNROLL
  for (int r = 0; r < MR; ++r) {
    const WordVec s = WordVec{} + word[r];
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) {
      sum[r][v] = (Vec<float>)_mm512_dpbf16_ps((__m512)sum[r][v], (__m512bh)s, (__m512bh)x[v]);
    }
  }
}

// score_tile() of pairs [begin, end).
template <int NV, int MR>
FASTMETA_BF16_TARGET static void pair_tile(const bfloat16* const* rows, const float* panel,
                                           int64_t dim, int64_t begin, int64_t end, bool last,
                                           const Finish<float>& finish, int64_t r0, float* tile) {
  constexpr int kL = NV * kWidth<float>;
  const bfloat16* row[MR];
  uint32_t word[MR];
  Vec<float> sum[MR][NV];
  FASTMETA_UNROLL
  for (int r = 0; r < MR; ++r) {
    row[r] = rows[r0 + r];
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) sum[r][v] = Vec<float>{};
  }
  const int64_t whole = min_of(end, dim / 2);
  const float* q = panel + begin * kL;
  for (int64_t k = begin; k < whole; ++k, q += kL) {
    FASTMETA_UNROLL
    for (int r = 0; r < MR; ++r) std::memcpy(&word[r], row[r] + 2 * k, sizeof(uint32_t));
    add_products<NV, MR>(word, q, sum);
  }
  if (whole < end) {
    FASTMETA_UNROLL
    for (int r = 0; r < MR; ++r) word[r] = row[r][dim - 1].bits;
    add_products<NV, MR>(word, q, sum);
  }
  store_scores<float, Inner::kProduct, NV, MR>(sum, begin == 0, last, finish, r0, tile + r0 * kL);
}
template <int NV, int MR>
static void pair_rest(int64_t n, const bfloat16* const* rows, const float* panel, int64_t dim,
                      int64_t begin, int64_t end, bool last, const Finish<float>& finish,
                      int64_t r0, float* tile) {
  if constexpr (MR > 0) {
    if (n == MR) {
      pair_tile<NV, MR>(rows, panel, dim, begin, end, last, finish, r0, tile);
    } else {
      pair_rest<NV, MR - 1>(n, rows, panel, dim, begin, end, last, finish, r0, tile);
    }
  }
}
// score_block() of n supports with a panel of pairs.
template <int NV>
static void score_pairs(Int<NV>, const bfloat16* const* rows, int64_t n, const float* panel,
                        int64_t dim, const Finish<float>& finish, float* tile) {
  constexpr int kMR = kTileRows<NV>;
  const int64_t pairs = ceil_div(dim, 2);
  int64_t begin = 0;
  do {  // once even without features
    const int64_t end = min_of(pairs, begin + kFeatureBlock / 2);
    const bool last = end == pairs;
    int64_t r = 0;
    for (; r + kMR <= n; r += kMR) {
      pair_tile<NV, kMR>(rows, panel, dim, begin, end, last, finish, r, tile);
    }
    pair_rest<NV, kMR - 1>(n - r, rows, panel, dim, begin, end, last, finish, r, tile);
    begin = end;
  } while (begin < pairs);
}

#endif

}  // namespace fastmeta::matching::FASTMETA_ISA
