// C[M,N] = A[M,K] W[N,K]^T without a transposed copy of W: lanes run along the shared dimension,
// and a tile's sums become one vector when they are complete. For few columns (an output layer of a
// few classes, a Gram matrix of few examples), or few rows.
#pragma once
#include <utility>

#include "common/gemm.h"

namespace fastmeta::FASTMETA_ISA {

// Of each kPart lanes the upper half (kUpper 1; 0: the lower) of b, the other of a; and a with the
// halves of each kPart lanes exchanged.
template <int kPart, int kUpper, class V, int... I>
FASTMETA_INLINE V blend_halves(V a, V b, Lanes<I...>) {
  constexpr int kN = sizeof...(I);
  return __builtin_shufflevector(a, b, (I % kPart / (kPart / 2) == kUpper ? I + kN : I)...);
}
template <int kPart, class V, int... I>
FASTMETA_INLINE V swap_halves(V a, Lanes<I...>) {
  return __builtin_shufflevector(a, a, (I ^ (kPart / 2))...);
}

// The sums over the lanes of r[0..kCount), a power of two up to the width: that of r[i] in lane i *
// (width / kCount). Destroys r. Two vectors become one in each step, of which halves of parts of
// kPart lanes belong to one each.
template <class T, int kCount, int kPart = kWidth<T>>
FASTMETA_INLINE Vec<T> sum_lanes_of_each(Vec<T>* r) {
  using All = typename MakeLanes<kWidth<T>>::type;
  if constexpr (kPart == 1) {
    return r[0];
  } else if constexpr (kCount == 1) {
    r[0] += swap_halves<kPart>(r[0], All{});
    return sum_lanes_of_each<T, 1, kPart / 2>(r);
  } else {
    FASTMETA_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      const Vec<T> a = r[i], b = r[i + kCount / 2];
      r[i] = blend_halves<kPart, 1>(a, b, All{}) +
             swap_halves<kPart>(blend_halves<kPart, 0>(a, b, All{}), All{});
    }
    return sum_lanes_of_each<T, kCount / 2, kPart / 2>(r);
  }
}

// Lanes kFirst, kFirst + kStep, ... (kCount of them) of a; zeros behind them.
template <int kFirst, int kStep, int kCount, class V, int... I>
FASTMETA_INLINE V take_lanes(V a, Lanes<I...>) {
  constexpr int kN = sizeof...(I);
  return __builtin_shufflevector(a, V{}, (I < kCount ? kFirst + I * kStep : kN)...);
}

// A term of C: a [M, cols], rows lda apart, times w [N, cols] transposed.
template <class T>
struct TransposedTerm {
  const T* a;
  int64_t lda;
  ConstMatrix<T> w;
  int64_t cols;
};

// How many rows of W a tile has at most, and how many of A where it has `cols` of W: as many sums
// as registers hold beside the operands, in groups that make one vector.
template <class T>
constexpr int kMostTransposed = kWidth<T> < 5 ? kWidth<T> : 5;
template <class T>
constexpr int transposed_group(int cols) {
  return kWidth<T> / cols;
}
template <class T>
constexpr int transposed_rows(int cols) {
  const int most = (kVecBytes == 64 ? 16 : 12) / cols, group = transposed_group<T>(cols);
  const int rows = most < group ? most : most / group * group;
  return rows < 8 ? rows : 8;
}

// kRows x kCols numbers of C.
template <class T, int kRows, int kCols>
struct TransposedTile {
  static constexpr int kW = kWidth<T>;
  Vec<T> sum[kRows][kCols] = {};

  // The numbers [i, i + n) of each row; a whole vector of them if kWhole.
  template <bool kWhole>
  FASTMETA_INLINE_MEMBER void add_vector(const T* const (&a)[kRows], const T* w, int64_t stride,
                                         int64_t i, int n) {
    const auto read = [&](const T* p) __attribute__((always_inline)) {
      return kWhole ? load(p) : load_n(p, n);
    };
    Vec<T> weight[kCols];
    FASTMETA_UNROLL
    for (int c = 0; c < kCols; ++c) weight[c] = read(w + c * stride);
    FASTMETA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> x = read(a[r] + i);
      FASTMETA_UNROLL
      for (int c = 0; c < kCols; ++c) sum[r][c] += x * weight[c];
    }
  }

  // Columns [begin, end) of a term, w from row j on.
  FASTMETA_INLINE_MEMBER void add(const TransposedTerm<T>& term, const T* const (&a)[kRows],
                                  int64_t j, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const bool panels = term.w.ld == 0;
      const int64_t p = panels ? term.w.panel_of(i) : 0;
      const int64_t first = p * kPanel<T>, stride = term.w.stride(p);
      const int64_t last = panels ? min_of(first + term.w.width(p), end) : end;
      const T* w = term.w.panel(p) + j * stride - first;
      for (; i + kW <= last; i += kW) add_vector<true>(a, w + i, stride, i, kW);
      if (i < last) add_vector<false>(a, w + i, stride, i, static_cast<int>(last - i));
      i = last;
    }
  }

  // f(row, the row's numbers, zeros behind them)
  template <class F>
  FASTMETA_INLINE_MEMBER void each_row(F f) {
    groups<0>(f);
  }

 private:
  static constexpr int kGroup =
      transposed_group<T>(kCols) < kRows ? transposed_group<T>(kCols) : kRows;

  template <int kFirst, class F>
  FASTMETA_INLINE_MEMBER void groups(F& f) {
    if constexpr (kFirst < kRows) {
      constexpr int kMembers = kFirst + kGroup <= kRows ? kGroup : kRows - kFirst;
      constexpr int kSums = kMembers * kCols;
      constexpr int kCount = kSums <= 1 ? 1 : kSums <= 2 ? 2 : kSums <= 4 ? 4 : kSums <= 8 ? 8 : 16;
      Vec<T> all[kCount] = {};
      FASTMETA_UNROLL
      for (int i = 0; i < kSums; ++i) all[i] = sum[kFirst + i / kCols][i % kCols];
      members<kFirst, 0, kMembers, kW / kCount>(sum_lanes_of_each<T, kCount>(all), f);
      groups<kFirst + kGroup>(f);
    }
  }
  template <int kFirst, int kMember, int kMembers, int kStep, class F>
  FASTMETA_INLINE_MEMBER void members(Vec<T> total, F& f) {
    if constexpr (kMember < kMembers) {
      using All = typename MakeLanes<kW>::type;
      f(kFirst + kMember, take_lanes<kMember * kCols * kStep, kStep, kCols>(total, All{}));
      members<kFirst, kMember + 1, kMembers, kStep>(total, f);
    }
  }
};

// Columns [j, j + kCols) of C, kRows rows at a time.
template <class T, int kRows, int kCols, int kTerms>
static void gemm_transposed_columns(int64_t m, const TransposedTerm<T> (&terms)[kTerms], int64_t j,
                                    int64_t begin, int64_t end, T* c, int64_t ldc,
                                    GemmStart<T> start) {
  constexpr int kW = kWidth<T>;
  const int64_t n = terms[0].w.rows;
  const bool add = start.from != nullptr;
  // What lies behind the columns gets zeros, or what other columns write later.
  const int64_t room = min_of<int64_t>(kW, padded<T>(n) - j);
  const int64_t behind = !add && j + kCols == n ? padded<T>(n) - j - room : 0;
  const Vec<T> bias = start.bias != nullptr ? load_n(start.bias + j, kCols) : Vec<T>{};
  for (int64_t i = 0; i < m; i += kRows) {
    TransposedTile<T, kRows, kCols> tile;
    FASTMETA_UNROLL
    for (int t = 0; t < kTerms; ++t) {
      const T* rows[kRows];  // past the last row the last once more
      FASTMETA_UNROLL
      for (int r = 0; r < kRows; ++r) {
        rows[r] = terms[t].a + min_of<int64_t>(i + r, m - 1) * terms[t].lda;
      }
      tile.add(terms[t], rows, j, begin, min_of(end, terms[t].cols));
    }
    tile.each_row([&](int r, Vec<T> value) __attribute__((always_inline)) {
      if (i + r >= m) return;
      T* to = c + (i + r) * ldc + j;
      value = start.alpha * value + bias;
      if (room == kW) {
        store(to, add ? load(to) + value : value);
      } else {
        const int n = static_cast<int>(room);
        store_n(to, add ? load_n(to, n) + value : value, n);
      }
      for (int64_t o = 0; o < behind; ++o) to[kW + o] = T(0);
    });
  }
}

// C[m, n] = start + alpha * the sum of the terms; start is a bias, C itself or 0. C has rows of ldc
// numbers, of which padded(n) are written: zeros past n, or as they were when added to.
template <class T, int kTerms>
static void gemm_transposed(int64_t m, const TransposedTerm<T> (&terms)[kTerms], T* c, int64_t ldc,
                            GemmStart<T> start = {}) {
  constexpr int64_t kFewRows = 10;  // as many as a narrow layer has outputs, at most (is_narrow)
  constexpr int64_t kBlock = 4096 / sizeof(T);  // columns of which a tile stays in the first cache
  const int64_t n = terms[0].w.rows;
  int64_t cols = 0;
  for (const auto& term : terms) cols = max_of(cols, term.cols);
  constexpr int kW = kWidth<T>, kHalf = kW / 2;
  for (int64_t k = 0; k == 0 || k < cols; k += kBlock) {
    int64_t j = 0;
    // Whole vectors of C, a row at a time.
    for (; m <= kFewRows && j + kW <= n; j += kW) {
      gemm_transposed_columns<T, 1, kW>(m, terms, j, k, k + kBlock, c, ldc, start);
    }
    if constexpr (kHalf > kMostTransposed<T>) {
      if (m <= kFewRows && j + kHalf <= n) {
        gemm_transposed_columns<T, 1, kHalf>(m, terms, j, k, k + kBlock, c, ldc, start);
        j += kHalf;
      }
    }
    const int64_t tile = j < n ? ceil_div(n - j, ceil_div(n - j, kMostTransposed<T>)) : 1;
    for (; j < n; j += tile) {
      const int64_t count = min_of(tile, n - j);
      [&]<int... I>(std::integer_sequence<int, I...>) {
        ((count == I + 1 ? (m == 1 ? gemm_transposed_columns<T, 1, I + 1>(m, terms, j, k,
                                                                          k + kBlock, c, ldc, start)
                                   : gemm_transposed_columns<T, transposed_rows<T>(I + 1), I + 1>(
                                         m, terms, j, k, k + kBlock, c, ldc, start))
                         : void()),
         ...);
      }(std::make_integer_sequence<int, kMostTransposed<T>>{});
    }
    start = {start.alpha, nullptr, c};
  }
}

}  // namespace fastmeta::FASTMETA_ISA
