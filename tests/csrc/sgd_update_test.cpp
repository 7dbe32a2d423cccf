// The gradient step and its backward on every instruction set of this CPU, against double.
#include "update/sgd_update.h"

#include <gtest/gtest.h>

#include "kernel_test_util.h"

namespace fastmeta::update {
namespace {

using namespace fastmeta::test;

struct Isa {
  const char* name;
  void (*step)(const Sgd&, ParallelFor);
  void (*backward)(const SgdBackward&, ParallelFor);
};
std::vector<Isa> isas() {
  std::vector<Isa> all{{"baseline", baseline::sgd, baseline::sgd_backward}};
#if defined(__x86_64__)
  if (cpu_has("avx2")) all.push_back({"avx2", avx2::sgd, avx2::sgd_backward});
  if (cpu_has("avx512")) all.push_back({"avx512", avx512::sgd, avx512::sgd_backward});
#endif
  return all;
}

// An operand that varies over tasks, elements, both or neither.
template <class T>
struct Values {
  Values(std::mt19937& random, int64_t tasks_, int64_t elements_, bool by_task, bool by_element)
      : tasks(by_task ? tasks_ : 1),
        elements(by_element ? elements_ : 1),
        task_stride(by_task ? elements : 0),
        element_stride(by_element ? 1 : 0),
        data(normal<T>(random, tasks * elements)) {}
  Operand operand() const { return {data.data(), task_stride, element_stride}; }
  double at(int64_t t, int64_t n) const {
    return static_cast<double>(data[static_cast<size_t>(t * task_stride + n * element_stride)]);
  }
  int64_t tasks, elements, task_stride, element_stride;
  std::vector<T> data;
};

const std::vector<std::array<int64_t, 2>> kShapes{
    {1, 1}, {3, 5}, {32, 64}, {2, 17000}, {1, 33003}, {70, 133}, {2, 0}, {0, 4}, {600, 1}};

template <class T>
void check(const Isa& isa, int kind) {
  std::mt19937 random(static_cast<unsigned>(kind));
  const bool a_task = kind & 1, b_task = kind & 2, lr_task = kind & 4, lr_element = kind & 8;
  std::vector<Values<T>> a, b, lr;
  for (const auto& [t, n] : kShapes) {
    a.emplace_back(random, t, n, a_task, true);
    b.emplace_back(random, t, n, b_task, true);
    lr.emplace_back(random, t, n, lr_task, lr_element);
  }
  const double tolerance = std::is_same_v<T, float> ? 4e-6 : 8e-15;
  std::vector<std::vector<T>> first_out, first_grad, first_lr;
  for (const ParallelFor par : schedules()) {
    std::vector<std::vector<T>> out, grad_grad, grad_lr;
    for (size_t k = 0; k < kShapes.size(); ++k) {
      out.emplace_back(static_cast<size_t>(kShapes[k][0] * kShapes[k][1]), T(9));
      grad_grad.push_back(out.back());
      grad_lr.emplace_back(lr[k].data.size(), T(9));
    }
    std::vector<SgdTensor> step;
    std::vector<SgdBackwardTensor> back;
    for (size_t k = 0; k < kShapes.size(); ++k) {
      step.push_back({kShapes[k][0], kShapes[k][1], a[k].operand(), b[k].operand(), lr[k].operand(),
                      out[k].data()});
      back.push_back({kShapes[k][0], kShapes[k][1], a[k].operand(), b[k].operand(), lr[k].operand(),
                      grad_grad[k].data(), grad_lr[k].data()});
    }
    const int64_t count = static_cast<int64_t>(step.size());
    isa.step({dtype_of<T>(), dtype_of<T>(), count, step.data()}, par);
    isa.backward({dtype_of<T>(), dtype_of<T>(), count, back.data()}, par);
    if (!first_out.empty()) {
      for (size_t k = 0; k < kShapes.size(); ++k) {
        EXPECT_TRUE(same_bits(first_out[k], out[k]) && same_bits(first_grad[k], grad_grad[k]) &&
                    same_bits(first_lr[k], grad_lr[k]))
            << isa.name << " kind " << kind << " tensor " << k << " depends on the schedule";
      }
      continue;
    }
    for (size_t k = 0; k < kShapes.size(); ++k) {
      const auto [tasks, elements] = kShapes[k];
      std::vector<double> sum(lr[k].data.size()), size(lr[k].data.size());
      for (int64_t t = 0; t < tasks; ++t) {
        for (int64_t n = 0; n < elements; ++n) {
          const double x = a[k].at(t, n), y = b[k].at(t, n), rate = lr[k].at(t, n);
          const size_t i = static_cast<size_t>(t * elements + n);
          ASSERT_NEAR(static_cast<double>(out[k][i]), x - rate * y,
                      tolerance * (1 + std::fabs(rate * y)))
              << isa.name << " kind " << kind;
          ASSERT_NEAR(static_cast<double>(grad_grad[k][i]), -rate * x,
                      tolerance * (1 + std::fabs(rate * x)));
          const size_t slot = static_cast<size_t>(t * lr[k].task_stride + n * lr[k].element_stride);
          sum[slot] -= x * y;
          size[slot] += std::fabs(x * y);
        }
      }
      for (size_t i = 0; i < sum.size(); ++i) {
        ASSERT_NEAR(static_cast<double>(grad_lr[k][i]), sum[i], tolerance * (size[i] + 1e-6))
            << isa.name << " kind " << kind << " tensor " << k;
      }
    }
    first_out = out, first_grad = grad_grad, first_lr = grad_lr;
  }
}

TEST(SgdUpdate, MatchesTheDefinitionForEveryLayout) {
  for (const Isa& isa : isas()) {
    for (int kind = 0; kind < 16; ++kind) {
      check<float>(isa, kind);
      check<double>(isa, kind);
    }
  }
}

TEST(SgdUpdate, NanStaysWhereItIs) {
  for (const Isa& isa : isas()) {
    std::vector<float> param(40, 1.f), grad(40, 1.f), out(40);
    const float lr = 0.5f;
    grad[17] = std::nanf("");
    const SgdTensor x{1, 40, {param.data(), 40, 1}, {grad.data(), 40, 1}, {&lr, 0, 0}, out.data()};
    isa.step({DType::kFloat32, DType::kFloat32, 1, &x}, serial_for);
    for (int i = 0; i < 40; ++i) {
      if (i == 17) {
        EXPECT_TRUE(std::isnan(out[i]));
      } else {
        EXPECT_EQ(out[i], 0.5f);
      }
    }
  }
}

}  // namespace
}  // namespace fastmeta::update
