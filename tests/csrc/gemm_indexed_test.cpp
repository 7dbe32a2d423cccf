// Products of csrc/common/gemm_indexed.h against sums in long double.
//
// Tests the vectors of the flags this file is compiled with; compile it once per instruction set
// with -DFASTMETA_ISA=<name> to test each.
#ifndef FASTMETA_ISA
#define FASTMETA_ISA gemm_indexed_test
#endif
#include "common/gemm_indexed.h"

#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <vector>

namespace fastmeta::FASTMETA_ISA {
namespace {

#define FASTMETA_CONCAT_(a, b) a##b
#define FASTMETA_CONCAT(a, b) FASTMETA_CONCAT_(a, b)
#define FASTMETA_TEST_(suite, name) TEST(suite, name)
#define FASTMETA_TEST(name) FASTMETA_TEST_(FASTMETA_CONCAT(GemmIndexed_, FASTMETA_ISA), name)

template <class T>
std::vector<T> drawn(int64_t n, std::mt19937& random) {
  std::uniform_real_distribution<T> draw(-1, 1);
  std::vector<T> v(n);
  for (T& x : v) x = draw(random);
  return v;
}

// Element (i, j) of a matrix in rows or panels.
template <class T>
T at(const Matrix<T>& m, int64_t i, int64_t j) {
  return *m.at(i, j);
}

// A of `terms` matrices reads single numbers of a table in any order; C's rows lie in reverse, a
// gap between them, where `scattered`, in panels else.
template <class T>
void check(int64_t m, int64_t n, int64_t k, int terms, bool scattered, bool add, int64_t block) {
  std::mt19937 random(static_cast<unsigned>(m * 131 + n * 17 + k + terms));
  const int64_t cols = padded<T>(n), gap = cols + 3;
  std::vector<int64_t> rows(m), depth(k), c_rows(m);
  for (int64_t i = 0; i < m; ++i) rows[i] = (i * 7) % 29;
  for (int64_t j = 0; j < k; ++j) depth[j] = (j * 5) % 23;
  for (int64_t i = 0; i < m; ++i) c_rows[i] = (m - 1 - i) * gap;
  std::vector<T> a[2], b[2];
  const std::vector<T> bias = drawn<T>(cols, random), before = drawn<T>(m * gap, random);
  std::vector<T> out = before;
  IndexedGemm<T> gemm{m, k, rows.data(), depth.data()};
  for (int t = 0; t < terms; ++t) {
    a[t] = drawn<T>(64, random);
    b[t] = drawn<T>(k * cols, random);
    gemm.terms[gemm.num_terms++] = {a[t].data(), {b[t].data(), k, cols, t == 0 ? 0 : cols}};
  }
  gemm.c = {out.data(), m, cols, scattered ? gap : 0};
  if (scattered) gemm.c_rows = c_rows.data();
  gemm.bias = bias.data();
  gemm.add = add;
  gemm.depth_block = block;
  gemm_indexed(gemm);
  const ConstMatrix<T> was{before.data(), m, cols, gemm.c.ld};
  for (int64_t i = 0; i < m; ++i) {
    const int64_t row = scattered ? m - 1 - i : i;
    for (int64_t j = 0; j < cols; ++j) {
      long double want = static_cast<long double>(bias[j]) + (add ? at(was, row, j) : T(0));
      for (int t = 0; t < terms; ++t) {
        for (int64_t q = 0; q < k; ++q) {
          want += static_cast<long double>(a[t][rows[i] + depth[q]]) * at(gemm.terms[t].b, q, j);
        }
      }
      const double bound = 8 * static_cast<double>(k + 4) * std::numeric_limits<T>::epsilon();
      ASSERT_NEAR(at(gemm.c, row, j), want, bound) << m << ' ' << n << ' ' << k << ' ' << terms;
    }
    for (int64_t j = cols; scattered && j < gap; ++j) {
      ASSERT_EQ(out[i * gap + j], before[i * gap + j]) << "past the columns";
    }
  }
}

template <class T>
void check_all() {
  for (int64_t m : {0, 1, 5, 6, 7, 13, 20}) {
    for (int64_t n : {1, 8, 16, 17, 40, 70}) {
      for (int64_t k : {0, 1, 9, 40, 130}) {
        for (int terms : {0, 1, 2}) {
          const bool scattered = (m + n + k) % 2 == 0;
          check<T>(m, n, k, terms, scattered, false, 768);
          check<T>(m, n, k, terms, !scattered, true, 32);
        }
      }
    }
  }
}

FASTMETA_TEST(Float) { check_all<float>(); }
FASTMETA_TEST(Double) { check_all<double>(); }

}  // namespace
}  // namespace fastmeta::FASTMETA_ISA
