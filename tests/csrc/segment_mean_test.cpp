// Class means on every instruction set of this CPU, against sums in double by the definition.
#include "segment/segment_mean.h"

#include <gtest/gtest.h>

#include "kernel_test_util.h"

namespace fastmeta::segment {
namespace {

using namespace fastmeta::test;

struct Isa {
  const char* name;
  void (*mean)(const Mean&, ParallelFor);
  void (*backward)(const MeanBackward&, ParallelFor);
};
std::vector<Isa> isas() {
  std::vector<Isa> all{{"baseline", baseline::mean, baseline::mean_backward}};
#if defined(__x86_64__)
  if (cpu_has("avx2")) all.push_back({"avx2", avx2::mean, avx2::mean_backward});
  if (cpu_has("avx512")) all.push_back({"avx512", avx512::mean, avx512::mean_backward});
#endif
  return all;
}

template <class T>
void check(const Isa& isa, int64_t tasks, int64_t rows, int64_t classes, int64_t dim) {
  std::mt19937 random(static_cast<unsigned>(tasks + 7 * rows + 11 * classes + 13 * dim));
  const auto values = normal<T>(random, tasks * rows * dim);
  const auto grad = normal<T>(random, tasks * classes * dim);
  std::vector<int64_t> labels(static_cast<size_t>(tasks * rows));
  for (auto& y : labels)
    y = static_cast<int64_t>(random() % static_cast<unsigned>(classes + 2)) - 1;
  std::vector<double> sum(static_cast<size_t>(tasks * classes * dim)),
      count(static_cast<size_t>(tasks * classes));
  for (int64_t i = 0; i < tasks * rows; ++i) {
    const int64_t c = labels[i], slot = i / rows * classes + c;
    if (c < 0 || c >= classes) continue;
    count[slot] += 1;
    for (int64_t d = 0; d < dim; ++d)
      sum[slot * dim + d] += static_cast<double>(values[i * dim + d]);
  }
  const double tolerance = std::is_same_v<T, float> ? 2e-6 : 4e-15;
  std::vector<T> first;
  for (const ParallelFor par : schedules()) {
    std::vector<T> mean(sum.size(), T(9)), counts(count.size(), T(9)), back(values.size(), T(9));
    isa.mean({dtype_of<T>(), tasks, rows, classes, dim, values.data(), labels.data(), mean.data(),
              counts.data()},
             par);
    isa.backward({dtype_of<T>(), tasks, rows, classes, dim, grad.data(), labels.data(),
                  counts.data(), back.data()},
                 par);
    for (size_t k = 0; k < count.size(); ++k) {
      ASSERT_EQ(static_cast<double>(counts[k]), count[k]) << isa.name;
      for (int64_t d = 0; d < dim; ++d) {
        const double want = count[k] > 0 ? sum[k * dim + d] / count[k] : 0;
        ASSERT_NEAR(static_cast<double>(mean[k * dim + d]), want, tolerance) << isa.name;
      }
    }
    for (int64_t i = 0; i < tasks * rows; ++i) {
      const int64_t c = labels[i], slot = i / rows * classes + c;
      for (int64_t d = 0; d < dim; ++d) {
        const double want =
            c < 0 || c >= classes ? 0 : static_cast<double>(grad[slot * dim + d]) / count[slot];
        ASSERT_NEAR(static_cast<double>(back[i * dim + d]), want, tolerance) << isa.name;
      }
    }
    if (first.empty()) first = mean;
    EXPECT_TRUE(same_bits(first, mean)) << isa.name;
  }
}

TEST(SegmentMean, MatchesTheDefinition) {
  for (const Isa& isa : isas()) {
    for (const auto& [t, s, c, d] : std::vector<std::array<int64_t, 4>>{{1, 1, 1, 1},
                                                                        {2, 5, 3, 4},
                                                                        {3, 25, 5, 64},
                                                                        {1, 3000, 7, 130},
                                                                        {1, 900, 300, 33},
                                                                        {17, 4, 2, 3},
                                                                        {1, 600, 1, 200},
                                                                        {2, 0, 3, 5},
                                                                        {2, 3, 4, 0},
                                                                        {0, 3, 4, 5}}) {
      check<float>(isa, t, s, c, d);
      check<double>(isa, t, s, c, d);
    }
  }
}

TEST(SegmentMean, BFloat16SumsInFloat) {
  for (const Isa& isa : isas()) {
    // 1 + 300 * 2^-7: bfloat16 sums would lose every small addend.
    std::vector<bfloat16> values(301, to_bfloat16(0.0078125f));
    values[0] = to_bfloat16(1.f);
    const std::vector<int64_t> labels(values.size(), 0);
    bfloat16 mean{};
    float count = 0;
    isa.mean({DType::kBFloat16, 1, 301, 1, 1, values.data(), labels.data(), &mean, &count},
             serial_for);
    EXPECT_EQ(count, 301.f);
    const float want = (1.f + 300 * 0.0078125f) / 301;
    EXPECT_NEAR(from_bfloat16(mean), want, want / 256) << isa.name;
  }
}

}  // namespace
}  // namespace fastmeta::segment
