// Matrix products whose A is read through tables: A(i, j) is at a[rows[i] + depth[j]].
//
// So a convolution needs no patches: its rows are the places where patches begin, its depth the
// places within a patch, and their transposes the other way round. B and C as in gemm.h; C's rows
// may lie anywhere as well.
#pragma once
#include "common/gemm.h"

namespace fastmeta::FASTMETA_ISA {

// C = (C or 0) + bias + the sum over terms of A B, where the terms' A lie alike at different `a`.
template <class T>
struct IndexedTerm {
  const T* a = nullptr;
  ConstMatrix<T> b = {};
};

template <class T>
struct IndexedGemm {
  static constexpr int kTerms = 2;

  int64_t m, k;
  const int64_t* rows;   // [m]
  const int64_t* depth;  // [k]
  IndexedTerm<T> terms[kTerms] = {};
  int num_terms = 0;
  Matrix<T> c = {};
  const int64_t* c_rows = nullptr;  // [m]: where C's rows begin; nullptr: one after another
  const T* bias = nullptr;          // [cols]
  bool add = false;
  int64_t depth_block = 768;  // most of the depth that is summed before C is written
};

template <class T, int kRows, int kVectors>
static inline void indexed_tile(const IndexedGemm<T>& g, int64_t panel, int64_t row, int64_t begin,
                                int64_t end) {
  constexpr int kW = kWidth<T>;
  T* const c = g.c.panel(panel);
  const int64_t ldc = g.c.stride(panel);
  T* to[kRows];
  FASTMETA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    to[r] = c + (g.c_rows != nullptr ? g.c_rows[row + r] : (row + r) * ldc);
    __builtin_prefetch(to[r], 1);
  }
  Vec<T> sum[kRows][kVectors] = {};
  for (int t = 0; t < g.num_terms; ++t) {
    const IndexedTerm<T>& term = g.terms[t];
    const int64_t ldb = term.b.stride(panel);
    const T* b = term.b.panel(panel) + begin * ldb;
    const T* a[kRows];
    FASTMETA_UNROLL
    for (int r = 0; r < kRows; ++r) a[r] = term.a + g.rows[row + r];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = g.depth[i];
      Vec<T> column[kVectors];
      FASTMETA_UNROLL
      for (int v = 0; v < kVectors; ++v) column[v] = load(b + v * kW);
      FASTMETA_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> x = splat<T>(a[r][at]);
        FASTMETA_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[r][v] += x * column[v];
      }
      b += ldb;
    }
  }
  const bool first = begin == 0;
  const T* bias = first && g.bias != nullptr ? g.bias + panel * kPanel<T> : nullptr;
  const bool add = !first || g.add;
  FASTMETA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FASTMETA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Vec<T> value = sum[r][v];
      if (bias != nullptr) value += load(bias + v * kW);
      if (add) value += load(to[r] + v * kW);
      store(to[r] + v * kW, value);
    }
  }
}

template <class T>
static void gemm_indexed(const IndexedGemm<T>& g) {
  if (g.m <= 0) return;
  const int64_t blocks = max_of<int64_t>(1, ceil_div(g.k, g.depth_block));
  for (int64_t d = 0; d < blocks; ++d) {
    const int64_t begin = d * g.k / blocks, end = (d + 1) * g.k / blocks;
    for (int64_t p = 0; p < g.c.panels(); ++p) {
      const auto tile_of = [&](int64_t row, int64_t rows, auto vectors)
                               __attribute__((always_inline)) {
                                 constexpr int kV = decltype(vectors)::value;
#define FASTMETA_TILE(R)                           \
  case R:                                          \
    indexed_tile<T, R, kV>(g, p, row, begin, end); \
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
                               };
      const auto tiles_of = [&](auto vectors) __attribute__((always_inline)) {
        // Tiles differ by one row at most: two rows alone would wait for their sums.
        const int64_t tiles = ceil_div(g.m, tile_rows(decltype(vectors)::value));
        const int64_t least = g.m / tiles, more = g.m % tiles;
        for (int64_t t = 0, row = 0, rows; t < tiles; ++t, row += rows) {
          rows = least + (t < more ? 1 : 0);
          tile_of(row, rows, vectors);
        }
      };
      with_vectors(g.c.width(p) / kWidth<T>, tiles_of);
    }
  }
}

}  // namespace fastmeta::FASTMETA_ISA
