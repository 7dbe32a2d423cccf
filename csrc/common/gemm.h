// Small matrix products for kernels whose threads own a task: C[M,N] = A[M,K] B[K,N], serial.
//
// A is read by broadcast at any strides, so it is never packed and its transpose costs nothing. B
// and C have their columns along the vector lanes, padded to whole vectors, in one of two forms:
// rows of `ld` numbers, or panels: kPanel columns wide (the last one narrower), each [rows][width],
// one after another, which keeps the rows that a tile reads beside each other in memory.
//
// The tile is kTileRows x kPanel in registers: 6 x 2 vectors of 16 registers, 6 x 4 of 32.
#pragma once
#include "common/vec.h"

namespace fastmeta::FASTMETA_ISA {

constexpr int kPanelVectors = kVecBytes == 64 ? 4 : 2;
constexpr int kTileRows = 6;
template <class T>
constexpr int64_t kPanel = kPanelVectors * kWidth<T>;

template <class T>
FASTMETA_INLINE int64_t padded(int64_t n) {
  return ceil_div(n, kWidth<T>) * kWidth<T>;
}

// A matrix of `rows` rows and `cols` columns (whole vectors). ld = 0: panels.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols, ld;

  // Columns [p * kPanel, ...): where their first row is, how wide they are, how far rows are apart.
  T* panel(int64_t p) const { return data + p * kPanel<T> * (ld == 0 ? rows : 1); }
  int64_t width(int64_t p) const { return min_of<int64_t>(kPanel<T>, cols - p * kPanel<T>); }
  int64_t stride(int64_t p) const { return ld == 0 ? width(p) : ld; }
  int64_t panels() const { return ceil_div(cols, kPanel<T>); }
};
template <class T>
using ConstMatrix = Matrix<const T>;
template <class T>
constexpr int64_t kPanel<const T> = kPanel<T>;

// C = start + alpha * A B, where start is 0, or a row added to every row, or a matrix laid out as
// C.
template <class T>
struct GemmStart {
  T alpha = T(1);
  const T* bias = nullptr;  // [cols]
  const T* from = nullptr;  // as C; may be C's own data
};

template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

// sum += a column of A times a row of B.
template <class T, int kRows, int kVectors>
FASTMETA_INLINE void add_product(const T* __restrict a, int64_t rs, const T* __restrict b,
                                 Vec<T> (&sum)[kRows][kVectors]) {
  Vec<T> row[kVectors];
  FASTMETA_UNROLL
  for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kWidth<T>);
  FASTMETA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const Vec<T> x = splat<T>(a[r * rs]);
    FASTMETA_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[r][v] += x * row[v];
  }
}

template <class T, int kRows, int kVectors>
static inline void gemm_tile(int64_t k, const T* __restrict a, int64_t rs, int64_t cs,
                             const T* __restrict b, int64_t ldb, T alpha, const T* bias,
                             const T* from, T* c, int64_t ldc) {
  constexpr int kW = kWidth<T>;
  // A tile of few sums would wait for each addition: it takes several terms at a time.
  constexpr int kChains = kRows * kVectors >= 8 ? 1 : kRows * kVectors >= 4 ? 2 : 4;
  Vec<T> sum[kRows][kVectors] = {};
  int64_t i = 0;
  if constexpr (kChains > 1) {
    Vec<T> chain[kChains][kRows][kVectors] = {};
    for (; i + kChains <= k; i += kChains) {
      FASTMETA_UNROLL
      for (int t = 0; t < kChains; ++t) {
        add_product<T>(a, rs, b, chain[t]);
        a += cs;
        b += ldb;
      }
    }
    FASTMETA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FASTMETA_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (kChains == 2) {
          sum[r][v] = chain[0][r][v] + chain[1][r][v];
        } else {
          sum[r][v] = (chain[0][r][v] + chain[1][r][v]) + (chain[2][r][v] + chain[3][r][v]);
        }
      }
    }
  }
  for (; i < k; ++i) {
    add_product<T>(a, rs, b, sum);
    a += cs;
    b += ldb;
  }
  const auto finish = [&](auto started) __attribute__((always_inline)) {
    FASTMETA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FASTMETA_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        store(c + r * ldc + v * kW, started(r, v) + alpha * sum[r][v]);
      }
    }
  };
  if (from != nullptr && bias == nullptr) {
    finish([&](int r, int v)
               __attribute__((always_inline)) { return load(from + r * ldc + v * kW); });
  } else if (from == nullptr) {
    Vec<T> row[kVectors] = {};
    if (bias != nullptr) {
      for (int v = 0; v < kVectors; ++v) row[v] = load(bias + v * kW);
    }
    finish([&](int, int v) __attribute__((always_inline)) { return row[v]; });
  } else {
    finish([&](int r, int v) __attribute__((always_inline)) {
      return load(bias + v * kW) + load(from + r * ldc + v * kW);
    });
  }
}

template <class T, int kVectors>
static inline void gemm_rows(int64_t rows, int64_t k, const T* a, int64_t rs, int64_t cs,
                             const T* b, int64_t ldb, T alpha, const T* bias, const T* from, T* c,
                             int64_t ldc) {
#define FASTMETA_TILE(R)                                                        \
  case R:                                                                       \
    gemm_tile<T, R, kVectors>(k, a, rs, cs, b, ldb, alpha, bias, from, c, ldc); \
    break;
  switch (rows) {
    FASTMETA_TILE(1)
    FASTMETA_TILE(2)
    FASTMETA_TILE(3)
    FASTMETA_TILE(4)
    FASTMETA_TILE(5)
    FASTMETA_TILE(6)
  }
#undef FASTMETA_TILE
}

// C[m, b.cols] from A's element (i, j) at a[i * rs + j * cs] and B's first k rows.
template <class T>
static void gemm(int64_t m, int64_t k, const T* a, int64_t rs, int64_t cs, ConstMatrix<T> b,
                 Matrix<T> c, GemmStart<T> start = {}) {
  constexpr int kW = kWidth<T>;
  constexpr int64_t kBlock = 384;  // rows of B: a panel's share stays in the first-level cache
  if (m <= 0) return;
  const int64_t tiles = ceil_div(m, kTileRows), tile = ceil_div(m, tiles);
  for (int64_t k0 = 0; k0 == 0 || k0 < k; k0 += kBlock) {
    const int64_t kn = min_of(kBlock, k - k0);
    for (int64_t p = 0; p < b.panels(); ++p) {
      const int64_t ldb = b.stride(p), ldc = c.stride(p);
      const T* bp = b.panel(p) + k0 * ldb;
      T* cp = c.panel(p);
      const T* bias = k0 == 0 && start.bias != nullptr ? start.bias + p * kPanel<T> : nullptr;
      const T* from = k0 > 0 ? cp : start.from != nullptr ? start.from + (cp - c.data) : nullptr;
      for (int64_t i = 0; i < m; i += tile) {
        const int64_t rows = min_of(tile, m - i);
        const T* ap = a + i * rs + k0 * cs;
        const T* fp = from != nullptr ? from + i * ldc : nullptr;
        const auto rows_of = [&](auto vectors) __attribute__((always_inline)) {
          gemm_rows<T, decltype(vectors)::value>(rows, kn, ap, rs, cs, bp, ldb, start.alpha, bias,
                                                 fp, cp + i * ldc, ldc);
        };
        const int64_t vectors = b.width(p) / kW;
        if (vectors == 1) {
          rows_of(Number<1>{});
        } else if (vectors == 2) {
          rows_of(Number<2>{});
        } else if constexpr (kPanelVectors == 4) {
          vectors == 3 ? rows_of(Number<3>{}) : rows_of(Number<4>{});
        }
      }
    }
  }
}

// Vectors r[0..kW) summed over their lanes into the lanes of one vector.
template <class T>
FASTMETA_INLINE Vec<T> sum_lanes_of_each(Vec<T>* r) {
  transpose<T>(r);
  FASTMETA_UNROLL
  for (int stride = kWidth<T> / 2; stride > 0; stride /= 2) {
    FASTMETA_UNROLL
    for (int i = 0; i < stride; ++i) r[i] += r[i + stride];
  }
  return r[0];
}

// C[m, n] (+)= A[m, cols] W[n, cols]^T for few rows, without a transposed copy of W: lanes run
// along the shared dimension. Rows of A have w.cols numbers, lda apart. C has rows of ldc numbers,
// of which padded(n) are written: zero past n, or as they were when added to.
template <class T>
static void gemm_transposed_few(int64_t m, const T* a, int64_t lda, ConstMatrix<T> w, T* c,
                                int64_t ldc, T alpha, bool add) {
  constexpr int kW = kWidth<T>;
  for (int64_t j = 0; j < w.rows; j += kW) {
    const int64_t n = min_of<int64_t>(kW, w.rows - j);
    int64_t row[kW];  // past the last row the last once more, so that loops over rows unroll
    FASTMETA_UNROLL
    for (int r = 0; r < kW; ++r) row[r] = j + min_of<int64_t>(r, n - 1);
    for (int64_t i = 0; i < m; ++i) {
      Vec<T> sum[kW] = {};
      for (int64_t p = 0; p < w.panels(); ++p) {
        const int64_t stride = w.stride(p), width = w.width(p);
        const T* wp = w.panel(p);
        const T* ap = a + i * lda + p * kPanel<T>;
        for (int64_t o = 0; o < width; o += kW) {
          const Vec<T> x = load(ap + o);
          FASTMETA_UNROLL
          for (int r = 0; r < kW; ++r) sum[r] += x * load(wp + row[r] * stride + o);
        }
      }
      Vec<T> value = alpha * sum_lanes_of_each<T>(sum);
      if (n < kW) {
        for (int64_t r = n; r < kW; ++r) value[r] = 0;
      }
      T* out = c + i * ldc + j;
      store(out, add ? load(out) + value : value);
    }
  }
}

// Rows [row, row + rows) of w, their first `cols` columns, transposed into out's rows [to, to +
// cols), which get zeros past `rows` columns.
template <class T>
static void transpose_rows(ConstMatrix<T> w, int64_t row, int64_t rows, int64_t cols, Matrix<T> out,
                           int64_t to) {
  constexpr int kW = kWidth<T>;
  for (int64_t q = 0; q < out.panels(); ++q) {
    for (int64_t v = 0; v < out.width(q); v += kW) {
      const int64_t i0 = q * kPanel<T> + v;
      const int64_t n = min_of<int64_t>(kW, rows - i0);
      for (int64_t j0 = 0; j0 < cols; j0 += kW) {
        const int64_t p = j0 / kPanel<T>, stride = w.stride(p);
        const T* from = w.panel(p) + (j0 - p * kPanel<T>);
        Vec<T> r[kW];
        for (int i = 0; i < kW; ++i) {
          r[i] = i < n ? load(from + (row + i0 + i) * stride) : Vec<T>{};
        }
        transpose<T>(r);
        const int64_t count = min_of<int64_t>(kW, cols - j0), ldo = out.stride(q);
        T* at = out.panel(q) + (to + j0) * ldo + v;
        for (int64_t j = 0; j < count; ++j) store(at + j * ldo, r[j]);
      }
    }
  }
}

// out [cols of w, padded(rows of w)] in panels = the transpose of w's first `cols` columns.
template <class T>
static void transpose_to_panels(ConstMatrix<T> w, int64_t cols, Matrix<T> out) {
  transpose_rows(w, 0, w.rows, cols, out, 0);
}

}  // namespace fastmeta::FASTMETA_ISA
