// Small matrix products for kernels whose threads own a task: C[M,N] = A[M,K] B[K,N], serial.
//
// A is read by broadcast at any strides, so it is never packed and its transpose costs nothing. B
// and C have their columns along the vector lanes, padded to whole vectors, in one of two forms:
// rows of `ld` numbers, or panels: kPanel columns wide (the last one narrower, or half as wide
// again: Matrix::panels), each [rows][width], one after another, which keeps the rows that a tile
// reads beside each other in memory.
//
// A tile's sums stay in registers: 6 x 2 or 4 x 3 vectors of 16 registers, 6 x 4 of 32.
#pragma once
#include <type_traits>

#include "common/vec.h"

namespace fastmeta::FASTMETA_ISA {

constexpr int kPanelVectors = kVecBytes == 64 ? 4 : 2;
// Of a tile `vectors` wide.
constexpr int64_t tile_rows(int vectors) { return kPanelVectors == 2 && vectors == 3 ? 4 : 6; }
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
  int64_t width(int64_t p) const { return p + 1 < panels() ? kPanel<T> : cols - p * kPanel<T>; }
  int64_t stride(int64_t p) const { return ld == 0 ? width(p) : ld; }
  // One vector alone makes slow tiles: where panels are of two, it joins the panel before it.
  int64_t panels() const {
    return kPanelVectors == 2 ? max_of<int64_t>(1, cols / kPanel<T>) : ceil_div(cols, kPanel<T>);
  }
  int64_t panel_of(int64_t column) const { return min_of(column / kPanel<T>, panels() - 1); }
  T* at(int64_t row, int64_t column) const {
    const int64_t p = panel_of(column);
    return panel(p) + row * stride(p) + (column - p * kPanel<T>);
  }
};
template <class T>
using ConstMatrix = Matrix<const T>;
template <class T>
constexpr int64_t kPanel<const T> = kPanel<T>;

// A of M rows, read by broadcast: element (i, j) at a[i * rs + j * cs]; and B, its first k rows.
template <class T>
struct GemmTerm {
  const T* a;
  int64_t rs, cs, k;
  ConstMatrix<T> b;
};

// Where C begins: at 0, or at a row that serves all rows, or at a matrix laid out as C.
template <class T>
struct GemmStart {
  T alpha = T(1);           // what the products are multiplied by
  const T* bias = nullptr;  // [cols]
  const T* from = nullptr;  // as C; may be C's own data
};

// f(std::integral_constant<int, vectors>{}), for the widths that panels have.
template <class F>
FASTMETA_INLINE void with_vectors(int64_t vectors, F&& f) {
  if (vectors == 1) {
    f(std::integral_constant<int, 1>{});
  } else if (vectors == 2) {
    f(std::integral_constant<int, 2>{});
  } else if (vectors == 3) {
    f(std::integral_constant<int, 3>{});
  } else if constexpr (kPanelVectors == 4) {
    f(std::integral_constant<int, 4>{});
  }
}

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

// The rows of one panel of C, and the products that go into them.
template <class T>
struct GemmPanel {
  struct Term {
    const T* a;
    int64_t rs, cs, k;
    const T* b;
    int64_t ldb;
  };
  Term terms[2];
  T alpha;
  const T* start;  // rows of it are start_stride apart: 0 for one row that serves all
  int64_t start_stride;
  T* c;
  int64_t ldc;
};

// Rows [row, row + kRows) of the panel.
template <class T, int kRows, int kVectors, int kTerms, bool kScaled>
FASTMETA_INLINE void gemm_tile(const GemmPanel<T>& g, int64_t row) {
  constexpr int kW = kWidth<T>;
  // A tile of few sums would wait for each addition: it takes several terms at a time.
  constexpr int kChains = kRows * kVectors >= 8 ? 1 : kRows * kVectors >= 4 ? 2 : 4;
  const T* const start = g.start + row * g.start_stride;
  Vec<T> sum[kRows][kVectors] = {};
  if constexpr (!kScaled) {
    FASTMETA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FASTMETA_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[r][v] = load(start + r * g.start_stride + v * kW);
    }
  }
  FASTMETA_UNROLL
  for (int t = 0; t < kTerms; ++t) {
    const auto& term = g.terms[t];
    const int64_t rs = term.rs, cs = term.cs, ldb = term.ldb;
    const T* __restrict a = term.a + row * rs;
    const T* __restrict b = term.b;
    int64_t i = term.k;
    if constexpr (kChains > 1) {
      Vec<T> chain[kChains - 1][kRows][kVectors] = {};
      for (; i >= kChains; i -= kChains) {
        add_product<T>(a, rs, b, sum);
        FASTMETA_UNROLL
        for (int s = 1; s < kChains; ++s) add_product<T>(a + s * cs, rs, b + s * ldb, chain[s - 1]);
        a += kChains * cs;
        b += kChains * ldb;
      }
      FASTMETA_UNROLL
      for (int r = 0; r < kRows; ++r) {
        FASTMETA_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          if constexpr (kChains == 2) {
            sum[r][v] += chain[0][r][v];
          } else {
            sum[r][v] = (sum[r][v] + chain[0][r][v]) + (chain[1][r][v] + chain[2][r][v]);
          }
        }
      }
    }
    for (; i > 0; --i) {
      add_product<T>(a, rs, b, sum);
      a += cs;
      b += ldb;
    }
  }
  T* const c = g.c + row * g.ldc;
  FASTMETA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FASTMETA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Vec<T> value = sum[r][v];
      if constexpr (kScaled) value = load(start + r * g.start_stride + v * kW) + g.alpha * value;
      store(c + r * g.ldc + v * kW, value);
    }
  }
}

// Rows [begin, end) in tiles of `rows`, the last one smaller.
template <class T, int kVectors, int kTerms, bool kScaled>
static void gemm_tiles(const GemmPanel<T>& g, int64_t begin, int64_t end, int64_t rows) {
#define FASTMETA_TILES(R)                                   \
  case R:                                                   \
    for (; begin + R <= end; begin += R) {                  \
      gemm_tile<T, R, kVectors, kTerms, kScaled>(g, begin); \
    }                                                       \
    break;
  switch (rows) {
    FASTMETA_TILES(1)
    FASTMETA_TILES(2)
    FASTMETA_TILES(3)
    FASTMETA_TILES(4)
    FASTMETA_TILES(5)
    FASTMETA_TILES(6)
  }
#undef FASTMETA_TILES
  if (begin < end) gemm_tiles<T, kVectors, kTerms, kScaled>(g, begin, end, end - begin);
}

template <class T>
inline constexpr Vec<T> kZeroRow[kPanelVectors + 1] = {};  // as wide as a panel may be

// C[m, cols] = start + alpha * the sum of one or two products.
template <class T, int kTerms>
FASTMETA_INLINE void gemm(int64_t m, const GemmTerm<T> (&terms)[kTerms], Matrix<T> c,
                          GemmStart<T> start) {
  constexpr int64_t kBlock = 384;  // rows of B: a panel's share stays in the first-level cache
  if (m <= 0) return;
  if constexpr (kTerms == 2) {
    if (terms[0].k + terms[1].k > kBlock) {
      gemm<T, 1>(m, {terms[0]}, c, start);
      gemm<T, 1>(m, {terms[1]}, c, {start.alpha, nullptr, c.data});
      return;
    }
  }
  for (int64_t k0 = 0; k0 == 0 || k0 < terms[0].k; k0 += kBlock) {
    GemmPanel<T> g;
    g.alpha = start.alpha;
    for (int64_t p = 0; p < c.panels(); ++p) {
      for (int t = 0; t < kTerms; ++t) {
        const GemmTerm<T>& x = terms[t];
        const int64_t ldb = x.b.stride(p);
        g.terms[t] = {x.a + k0 * x.cs,         x.rs, x.cs, min_of(kBlock, x.k - k0),
                      x.b.panel(p) + k0 * ldb, ldb};
      }
      g.c = c.panel(p);
      g.ldc = c.stride(p);
      g.start = reinterpret_cast<const T*>(kZeroRow<T>);
      g.start_stride = 0;
      if (k0 > 0) {
        g.start = g.c;
        g.start_stride = g.ldc;
      } else if (start.from != nullptr) {
        g.start = start.from + (g.c - c.data);
        g.start_stride = g.ldc;
      } else if (start.bias != nullptr) {
        g.start = start.bias + p * kPanel<T>;
      }
      with_vectors(c.width(p) / kWidth<T>, [&](auto vectors) __attribute__((always_inline)) {
        constexpr int kV = decltype(vectors)::value;
        const int64_t tile = ceil_div(m, ceil_div(m, tile_rows(kV)));
        g.alpha == T(1) ? gemm_tiles<T, kV, kTerms, false>(g, 0, m, tile)
                        : gemm_tiles<T, kV, kTerms, true>(g, 0, m, tile);
      });
    }
  }
}

// C[m, cols] = start + alpha * A B.
template <class T>
static void gemm(int64_t m, int64_t k, const T* a, int64_t rs, int64_t cs, ConstMatrix<T> b,
                 Matrix<T> c, GemmStart<T> start = {}) {
  gemm<T, 1>(m, {{a, rs, cs, k, b}}, c, start);
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
        const int64_t stride = w.stride(w.panel_of(j0));
        const T* from = w.at(0, j0);
        Vec<T> r[kW];
        const int64_t count = min_of<int64_t>(kW, cols - j0), ldo = out.stride(q);
        T* at = out.panel(q) + (to + j0) * ldo + v;
        if (n >= kW && count == kW) {  // the array stays in registers
          FASTMETA_UNROLL
          for (int i = 0; i < kW; ++i) r[i] = load(from + (row + i0 + i) * stride);
          transpose<T>(r);
          FASTMETA_UNROLL
          for (int j = 0; j < kW; ++j) store(at + j * ldo, r[j]);
          continue;
        }
        const T* const none = reinterpret_cast<const T*>(kZeroRow<T>);
        FASTMETA_UNROLL
        for (int i = 0; i < kW; ++i) r[i] = load(i < n ? from + (row + i0 + i) * stride : none);
        transpose<T>(r);
        FASTMETA_UNROLL
        for (int j = 0; j < kW; ++j) {
          if (j < count) store(at + j * ldo, r[j]);
        }
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
