// Elementary functions of csrc/common/vec_math.h against long double, in units of the last place.
//
// Tests the vectors of the flags this file is compiled with; compile it once per instruction set
// with -DFASTMETA_ISA=<name> to test each.
#ifndef FASTMETA_ISA
#define FASTMETA_ISA vec_math_test
#endif
#include "common/vec_math.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace fastmeta::FASTMETA_ISA {
namespace {

#define FASTMETA_CONCAT_(a, b) a##b
#define FASTMETA_CONCAT(a, b) FASTMETA_CONCAT_(a, b)
#define FASTMETA_TEST_(suite, name) TEST(suite, name)
#define FASTMETA_TEST(name) FASTMETA_TEST_(FASTMETA_CONCAT(VecMath_, FASTMETA_ISA), name)

template <class T>
long double ulp(long double x) {
  const T y = static_cast<T>(std::fabs(x));
  const T low = std::max(y, std::numeric_limits<T>::min());
  return static_cast<long double>(std::nextafter(low, std::numeric_limits<T>::infinity())) - low;
}

// Largest error of f over random arguments in [low, high], where the result is a normal number.
template <class T, class F, class G>
long double worst(F f, G truth, T low, T high, int count = 200000) {
  std::mt19937_64 random(7);
  std::uniform_real_distribution<T> draw(low, high);
  long double most = 0;
  for (int k = 0; k < count; k += kWidth<T>) {
    Vec<T> x;
    for (int i = 0; i < kWidth<T>; ++i) x[i] = draw(random);
    const Vec<T> y = f(x);
    for (int i = 0; i < kWidth<T>; ++i) {
      const long double want = truth(static_cast<long double>(x[i]));
      if (std::fabs(want) < static_cast<long double>(std::numeric_limits<T>::min())) {
        EXPECT_LE(std::fabs(y[i] - want), std::numeric_limits<T>::min());
        continue;
      }
      most = std::max(most, std::fabs(y[i] - want) / ulp<T>(want));
    }
  }
  return most;
}

template <class T>
void check_functions() {
  const auto exp2_of = [](long double x) { return std::exp2(x); };
  const auto exp_of = [](long double x) { return std::exp(x); };
  const auto log_of = [](long double x) { return std::log(x); };
  const auto log2_of = [](long double x) { return std::log2(x); };
  const auto tanh_of = [](long double x) { return std::tanh(x); };
  const T lowest = sizeof(T) == 4 ? T(-126) : T(-1022);
  const auto expm1_of = [](long double x) { return std::expm1(x); };
  const auto erf_of = [](long double x) { return std::erf(x); };
  const auto sigmoid_of = [](long double x) { return 1 / (1 + std::exp(-x)); };
  const auto softplus_of = [](long double x) { return std::log1p(std::exp(x)); };
  EXPECT_LT(worst<T>(vexp2<T>, exp2_of, T(-1), T(1)), 2);
  EXPECT_LT(worst<T>(vexp2<T>, exp2_of, lowest - 50, -lowest), 2);
  EXPECT_LT(worst<T>(vexp<T>, exp_of, T(-1), T(1)), 2);
  EXPECT_LT(worst<T>(vexp<T>, exp_of, lowest * T(0.75), lowest * T(-0.68)), 2);
  EXPECT_LT(worst<T>(vlog2<T>, log2_of, T(0.5), T(2)), 3);
  EXPECT_LT(worst<T>(vlog2<T>, log2_of, T(1e-30), T(1e30)), 3);
  EXPECT_LT(worst<T>(vlog<T>, log_of, T(0.5), T(2)), 3);
  EXPECT_LT(worst<T>(vlog<T>, log_of, T(0), T(1e5)), 3);
  EXPECT_LT(worst<T>(vtanh<T>, tanh_of, T(-1), T(1)), 3);
  EXPECT_LT(worst<T>(vtanh<T>, tanh_of, T(-30), T(30)), 3);
  EXPECT_LT(worst<T>(vtanh<T>, tanh_of, T(-1e-6), T(1e-6)), 3);
  EXPECT_LT(worst<T>(vexpm1<T>, expm1_of, T(-2), T(0)), 4);
  EXPECT_LT(worst<T>(vexpm1<T>, expm1_of, T(-50), T(0)), 4);
  EXPECT_LT(worst<T>(vexpm1<T>, expm1_of, T(-1e-6), T(0)), 4);
  EXPECT_LT(worst<T>(verf<T>, erf_of, T(-1), T(1)), 2);
  EXPECT_LT(worst<T>(verf<T>, erf_of, T(-7), T(7)), 2);
  EXPECT_LT(worst<T>(verf<T>, erf_of, T(-1e-6), T(1e-6)), 2);
  EXPECT_LT(worst<T>(vsigmoid<T>, sigmoid_of, T(-2), T(2)), 3);
  EXPECT_LT(worst<T>(vsigmoid<T>, sigmoid_of, T(-80), T(40)), 3);
  EXPECT_LT(worst<T>(vsoftplus<T>, softplus_of, T(-2), T(2)), 4);
  EXPECT_LT(worst<T>(vsoftplus<T>, softplus_of, T(-80), T(80)), 4);
}

template <class T>
void check_special() {
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const auto at = [](auto f, T x) { return f(splat<T>(x))[0]; };
  EXPECT_EQ(at(vexp2<T>, T(0)), T(1));
  EXPECT_EQ(at(vexp2<T>, -inf), T(0));
  EXPECT_EQ(at(vexp2<T>, inf), inf);
  EXPECT_EQ(at(vexp<T>, T(0)), T(1));
  EXPECT_LT(at(vexp<T>, -inf), std::numeric_limits<T>::min());
  EXPECT_EQ(at(vlog2<T>, T(1)), T(0));
  EXPECT_EQ(at(vlog2<T>, T(8)), T(3));
  EXPECT_EQ(at(vlog2<T>, T(0)), -inf);
  EXPECT_EQ(at(vlog<T>, inf), inf);
  EXPECT_TRUE(std::isnan(at(vlog<T>, T(-1))));
  EXPECT_EQ(at(vtanh<T>, inf), T(1));
  EXPECT_EQ(at(vtanh<T>, -inf), T(-1));
  EXPECT_TRUE(std::signbit(at(vtanh<T>, T(-0.0))));
  EXPECT_EQ(at(vexpm1<T>, -inf), T(-1));
  EXPECT_EQ(at(verf<T>, inf), T(1));
  EXPECT_EQ(at(verf<T>, -inf), T(-1));
  EXPECT_TRUE(std::signbit(at(verf<T>, T(-0.0))));
  EXPECT_EQ(at(vsigmoid<T>, inf), T(1));
  EXPECT_EQ(at(vsigmoid<T>, -inf), T(0));
  EXPECT_EQ(at(vsoftplus<T>, inf), inf);
  EXPECT_LT(at(vsoftplus<T>, -inf), std::numeric_limits<T>::min());
  for (auto f : {vexp2<T>, vexp<T>, vexpm1<T>, vlog2<T>, vlog<T>, vtanh<T>, verf<T>, vsigmoid<T>,
                 vsoftplus<T>})
    EXPECT_TRUE(std::isnan(at(f, nan)));
}

FASTMETA_TEST(FloatFunctionsKeepTheirUlps) { check_functions<float>(); }
FASTMETA_TEST(DoubleFunctionsKeepTheirUlps) { check_functions<double>(); }
FASTMETA_TEST(SpecialArguments) {
  check_special<float>();
  check_special<double>();
}

template <class T>
void check_lanes() {
  constexpr int kW = kWidth<T>;
  Vec<T> r[kW];
  for (int i = 0; i < kW; ++i) {
    for (int j = 0; j < kW; ++j) r[i][j] = static_cast<T>(i * kW + j);
  }
  EXPECT_EQ(hsum<T>(r[0]), static_cast<T>(kW * (kW - 1) / 2));
  transpose<T>(r);
  for (int i = 0; i < kW; ++i) {
    for (int j = 0; j < kW; ++j) EXPECT_EQ(r[i][j], static_cast<T>(j * kW + i));
  }
  // Partial loads and stores end where they should: exactly sized buffers, for the address
  // sanitizer.
  for (int n = 1; n <= kW; ++n) {
    std::vector<T> from(static_cast<size_t>(n), T(3)), to(static_cast<size_t>(n), T(0));
    const Vec<T> x = load_n(from.data(), n);
    for (int j = 0; j < kW; ++j) EXPECT_EQ(x[j], j < n ? T(3) : T(0));
    store_n(to.data(), x, n);
    EXPECT_EQ(from, to);
  }
}
FASTMETA_TEST(LanesTransposeAndTails) {
  check_lanes<float>();
  check_lanes<double>();
}

// Every bfloat16 and float16 widens to the value of its bits and narrows back to itself.
float half_value(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const float sign = bits & 0x8000 ? -1.f : 1.f;
  if (exponent == 31)
    return mantissa ? std::nanf("") : sign * std::numeric_limits<float>::infinity();
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
}
FASTMETA_TEST(SixteenBitTypesRoundTrip) {
  for (int bits = 0; bits < 65536; ++bits) {
    const uint16_t b = static_cast<uint16_t>(bits);
    const float16 h{b};
    const bfloat16 g{b};
    const float x = load_one(&h), y = load_one(&g), want = half_value(b);
    if (std::isnan(want)) {
      EXPECT_TRUE(std::isnan(x));
    } else {
      ASSERT_EQ(x, want) << bits;
      ASSERT_EQ(std::signbit(x), std::signbit(want));
      float16 back;
      store_one(&back, x);
      ASSERT_EQ(back.bits, b);
    }
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float wanted;
    std::memcpy(&wanted, &word, 4);
    bfloat16 back;
    store_one(&back, y);
    if (std::isnan(wanted)) {
      EXPECT_TRUE(std::isnan(y));
      EXPECT_TRUE(std::isnan(load_one(&back)));
    } else {
      ASSERT_EQ(y, wanted);
      ASSERT_EQ(back.bits, b);
    }
  }
}
FASTMETA_TEST(SixteenBitTypesRoundToNearestEven) {
  std::mt19937 random(3);
  std::normal_distribution<float> draw(0, 1);
  for (int k = 0; k < 100000; ++k) {
    const float x = std::ldexp(draw(random), static_cast<int>(random() % 40) - 25);
    float16 h;
    store_one(&h, x);
    const float got = half_value(h.bits);
    if (std::fabs(x) >= 65520.f) {
      ASSERT_TRUE(std::isinf(got));
      continue;
    }
    const float down = half_value(static_cast<uint16_t>(h.bits - 1));
    const float up = half_value(static_cast<uint16_t>(h.bits + 1));
    if (!std::isnan(down)) {  // below zero there is none
      ASSERT_LE(std::fabs(got - x), std::fabs(down - x)) << x;
    }
    if (std::isfinite(up)) {
      ASSERT_LE(std::fabs(got - x), std::fabs(up - x)) << x;
    }
    bfloat16 b;
    store_one(&b, x);
    ASSERT_LE(std::fabs(load_one(&b) - x), std::ldexp(std::fabs(x), -8));
  }
}

}  // namespace
}  // namespace fastmeta::FASTMETA_ISA
