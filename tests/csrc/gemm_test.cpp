// Products of csrc/common/gemm.h and gemm_transposed.h against sums in long double.
//
// Tests the vectors of the flags this file is compiled with; compile it once per instruction set
// with -DFASTMETA_ISA=<name> to test each.
#ifndef FASTMETA_ISA
#define FASTMETA_ISA gemm_test
#endif
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "common/gemm_transposed.h"

namespace fastmeta::FASTMETA_ISA {
namespace {

#define FASTMETA_CONCAT_(a, b) a##b
#define FASTMETA_CONCAT(a, b) FASTMETA_CONCAT_(a, b)
#define FASTMETA_TEST_(suite, name) TEST(suite, name)
#define FASTMETA_TEST(name) FASTMETA_TEST_(FASTMETA_CONCAT(Gemm_, FASTMETA_ISA), name)

constexpr double kUntouched = 12345;

// A matrix with its own storage, in panels or in rows; columns past `used` are padding of zeros.
template <class T>
class Owned {
 public:
  Owned(int64_t rows, int64_t used, bool panels, std::mt19937& random)
      : used_(used),
        data_(rows * padded<T>(used), T(0)),
        matrix_{data_.data(), rows, padded<T>(used), panels ? 0 : padded<T>(used)} {
    std::uniform_real_distribution<T> draw(-1, 1);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < used; ++j) at(i, j) = draw(random);
    }
  }
  T& at(int64_t i, int64_t j) { return *matrix_.at(i, j); }
  void pad(T value) {
    for (int64_t i = 0; i < matrix_.rows; ++i) {
      for (int64_t j = used_; j < matrix_.cols; ++j) at(i, j) = value;
    }
  }
  Matrix<T> matrix() { return matrix_; }
  ConstMatrix<T> fixed() const { return {data_.data(), matrix_.rows, matrix_.cols, matrix_.ld}; }
  int64_t used() const { return used_; }

 private:
  int64_t used_;
  std::vector<T> data_;
  Matrix<T> matrix_;
};

template <class T>
double bound(int64_t k) {
  return 4 * static_cast<double>(k + 4) * std::numeric_limits<T>::epsilon();
}

enum class Beginning { kZero, kBias, kFrom };

// One product, or two, the second as deep as the first or not.
template <class T>
void check_products(int64_t m, int64_t n, int64_t k, bool panels, bool transposed_a, T alpha,
                    Beginning beginning) {
  std::mt19937 random(static_cast<unsigned>(m * 131 + n * 17 + k));
  std::uniform_real_distribution<T> draw(-1, 1);
  const int64_t more = k / 2 + 1;
  std::vector<T> a(m * k), a2(m * more), bias(padded<T>(n), T(0));
  for (std::vector<T>* list : {&a, &a2}) {
    for (T& x : *list) x = draw(random);
  }
  for (int64_t j = 0; j < n; ++j) bias[j] = draw(random);
  const int64_t rs = transposed_a ? 1 : k, cs = transposed_a ? m : 1;
  Owned<T> b(k, n, panels, random), b2(more, n, panels, random), c(m, n, panels, random);
  Owned<T> one(m, n, panels, random), two(m, n, panels, random);
  const GemmStart<T> start{alpha, beginning == Beginning::kBias ? bias.data() : nullptr,
                           beginning == Beginning::kFrom ? c.fixed().data : nullptr};
  const GemmTerm<T> terms[2] = {{a.data(), rs, cs, k, b.fixed()},
                                {a2.data(), more, 1, more, b2.fixed()}};
  gemm<T>(m, k, a.data(), rs, cs, b.fixed(), one.matrix(), start);
  gemm<T>(m, terms, two.matrix(), start);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      long double want = beginning == Beginning::kBias   ? bias[j]
                         : beginning == Beginning::kFrom ? c.at(i, j)
                                                         : T(0);
      for (int64_t q = 0; q < k; ++q) {
        want += static_cast<long double>(alpha) * a[i * rs + q * cs] * b.at(q, j);
      }
      ASSERT_NEAR(one.at(i, j), want, bound<T>(k)) << m << ' ' << n << ' ' << k << ' ' << panels;
      for (int64_t q = 0; q < more; ++q) {
        want += static_cast<long double>(alpha) * a2[i * more + q] * b2.at(q, j);
      }
      ASSERT_NEAR(two.at(i, j), want, bound<T>(k + more)) << m << ' ' << n << ' ' << k;
    }
  }
}

// X [m, cols] times W [k, cols] transposed: without a copy of W, and by way of its transpose.
template <class T>
void check_transposed(int64_t m, int64_t n, int64_t k, bool panels) {
  std::mt19937 random(static_cast<unsigned>(m * 7 + n * 31 + k));
  const int64_t more = n / 2 + 1;
  Owned<T> x(m, n, false, random), w(k, n, panels, random);
  Owned<T> x2(m, more, false, random), w2(k, more, !panels, random);
  for (Owned<T>* matrix : {&x, &w, &x2, &w2}) matrix->pad(std::numeric_limits<T>::quiet_NaN());
  const int64_t ld = padded<T>(k) + kWidth<T>;
  std::vector<T> few(m * ld, T(kUntouched)), many(few), two(few), bias(k);
  for (int64_t j = 0; j < k; ++j) bias[j] = w.at(j, 0);
  const TransposedTerm<T> terms[2] = {{x.fixed().data, padded<T>(n), w.fixed(), n},
                                      {x2.fixed().data, padded<T>(more), w2.fixed(), more}};
  gemm_transposed<T, 1>(m, {terms[0]}, few.data(), ld, {T(2)});
  gemm_transposed<T, 1>(m, {terms[0]}, few.data(), ld, {T(1), nullptr, few.data()});
  gemm_transposed<T>(m, terms, two.data(), ld, {T(-1), bias.data()});
  Owned<T> turned(n, k, true, random);
  transpose_to_panels<T>(w.fixed(), n, turned.matrix());
  GemmStart<T> start;
  start.alpha = T(3);
  gemm<T>(m, n, x.fixed().data, padded<T>(n), 1, turned.fixed(), {many.data(), m, padded<T>(k), ld},
          start);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < ld; ++j) {
      const T untouched = j < padded<T>(k) ? T(0) : T(kUntouched);
      long double first = 0, second = 0;
      for (int64_t q = 0; j < k && q < n; ++q) {
        first += static_cast<long double>(x.at(i, q)) * static_cast<long double>(w.at(j, q));
      }
      for (int64_t q = 0; j < k && q < more; ++q) {
        second += static_cast<long double>(x2.at(i, q)) * static_cast<long double>(w2.at(j, q));
      }
      const long double want = j < k ? 3 * first : untouched;
      const long double sum = j < k ? bias[j] - first - second : untouched;
      ASSERT_NEAR(few[i * ld + j], want, 3 * bound<T>(n)) << m << ' ' << n << ' ' << k;
      ASSERT_NEAR(many[i * ld + j], want, 3 * bound<T>(n)) << m << ' ' << n << ' ' << k;
      ASSERT_NEAR(two[i * ld + j], sum, bound<T>(n + more)) << m << ' ' << n << ' ' << k;
    }
  }
}

template <class T>
void check_all() {
  for (int64_t m : {1, 2, 5, 6, 7, 13}) {
    for (int64_t n : {1, 5, 8, 16, 17, 24, 40, 70, 1100}) {
      for (int64_t k : {0, 1, 2, 3, 4, 5, 7, 9, 11, 25, 40, 385, 800}) {
        for (bool panels : {false, true}) {
          for (T alpha : {T(1), T(-0.5)}) {
            for (Beginning b : {Beginning::kZero, Beginning::kBias, Beginning::kFrom}) {
              check_products<T>(m, n, k, panels, (m + k) % 2 == 0, alpha, b);
            }
          }
          if (k > 0) check_transposed<T>(m, n, k, panels);
        }
      }
    }
  }
}

FASTMETA_TEST(Float) { check_all<float>(); }
FASTMETA_TEST(Double) { check_all<double>(); }

}  // namespace
}  // namespace fastmeta::FASTMETA_ISA
