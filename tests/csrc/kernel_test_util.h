// What the kernel tests share: instruction sets of this CPU, thread schedules, random numbers.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "common/parallel.h"
#include "common/types.h"

namespace fastmeta::test {

inline bool cpu_has(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == "baseline";
}

// Schedules that a kernel must not notice: in one go, one index at a time from the back, on
// threads.
inline void one_by_one(int64_t total, int64_t, RangeBody body, void* context) {
  for (int64_t i = total - 1; i >= 0; --i) body(context, i, i + 1);
}
inline void on_threads(int64_t total, int64_t, RangeBody body, void* context) {
  constexpr int64_t kThreads = 3;
  std::vector<std::thread> threads;
  for (int64_t k = 0; k < kThreads; ++k) {
    const int64_t begin = total * k / kThreads, end = total * (k + 1) / kThreads;
    if (begin < end) threads.emplace_back([=] { body(context, begin, end); });
  }
  for (std::thread& t : threads) t.join();
}
inline const std::vector<ParallelFor>& schedules() {
  static const std::vector<ParallelFor> all{serial_for, one_by_one, on_threads};
  return all;
}

template <class T>
std::vector<T> normal(std::mt19937& random, int64_t n, double deviation = 1) {
  std::normal_distribution<double> draw(0, deviation);
  std::vector<T> x(static_cast<size_t>(n));
  for (T& v : x) v = static_cast<T>(draw(random));
  return x;
}

// Equal in every bit, NaN included.
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class T>
constexpr DType dtype_of() {
  return std::is_same_v<T, float> ? DType::kFloat32 : DType::kFloat64;
}

// bfloat16 by truncation: exact for values that have at most 8 significant bits.
inline bfloat16 to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return {static_cast<uint16_t>(bits >> 16)};
}
inline float from_bfloat16(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

}  // namespace fastmeta::test
