// The steps with a state on every instruction set of this CPU, against the formulas in double.
#include <gtest/gtest.h>

#include <array>

#include "kernel_test_util.h"
#include "update/adam_update.h"
#include "update/momentum_update.h"

namespace fastmeta::update {
namespace {

using namespace fastmeta::test;

struct Isa {
  const char* name;
  void (*momentum)(const Momentum&, ParallelFor);
  void (*momentum_backward)(const MomentumBackward&, ParallelFor);
  void (*adam)(const Adam&, ParallelFor);
  void (*adam_backward)(const AdamBackward&, ParallelFor);
};
std::vector<Isa> isas() {
  std::vector<Isa> all;
#define FASTMETA_ADD(isa) \
  all.push_back({#isa, isa::momentum, isa::momentum_backward, isa::adam, isa::adam_backward})
  FASTMETA_ADD(baseline);
#if defined(__x86_64__)
  if (cpu_has("avx2")) FASTMETA_ADD(avx2);
  if (cpu_has("avx512")) FASTMETA_ADD(avx512);
#endif
#undef FASTMETA_ADD
  return all;
}

// Rows of a whole vector, of less, and across pieces.
const std::vector<std::array<int64_t, 2>> kShapes{{1, 1},   {3, 5}, {32, 64}, {2, 17003},
                                                  {70, 33}, {2, 0}, {0, 4},   {600, 1}};

// What one kernel call takes: operands [T, N] each, a rate a task or an element, results.
template <class T>
struct Call {
  Call(int64_t tasks_, int64_t elements_, int operands, int results, bool rate_by_task)
      : tasks(tasks_), elements(elements_), by_task(rate_by_task) {
    std::mt19937 random(static_cast<unsigned>(tasks * 31 + elements));
    for (int k = 0; k < operands; ++k) {
      data.push_back(normal<T>(random, tasks * elements));
      for (T& x : data.back()) x = k == operands - 1 ? std::fabs(x) + T(0.1) : x;
    }
    rate = normal<T>(random, by_task ? tasks : elements);
    out.assign(static_cast<size_t>(results), std::vector<T>(data[0].size(), T(9)));
    grad_rate.assign(rate.size(), T(9));
  }
  Operand operand(int k) const { return {data[static_cast<size_t>(k)].data(), elements, 1}; }
  Operand lr() const { return {rate.data(), by_task ? 1 : 0, by_task ? 0 : 1}; }
  void* result(int k) { return out[static_cast<size_t>(k)].data(); }

  int64_t tasks, elements;
  bool by_task;
  std::vector<std::vector<T>> data, out;
  std::vector<T> rate, grad_rate;
};

// Compares results and the rate's gradient with `formula`, which maps the operands and rate of an
// element to results and to the element's share of that gradient.
template <class T, class Formula>
void expect(const char* what, const Call<T>& call, bool backward, const Formula& formula) {
  const double tolerance = std::is_same_v<T, float> ? 2e-5 : 2e-13;
  std::vector<double> sum(call.rate.size()), size(call.rate.size());
  for (int64_t t = 0; t < call.tasks; ++t) {
    for (int64_t n = 0; n < call.elements; ++n) {
      const size_t i = static_cast<size_t>(t * call.elements + n);
      const size_t slot = static_cast<size_t>(call.by_task ? t : n);
      std::array<double, 6> x{}, y{};
      for (size_t k = 0; k < call.data.size(); ++k) x[k] = static_cast<double>(call.data[k][i]);
      const double term = formula(x, static_cast<double>(call.rate[slot]), y);
      sum[slot] += term;
      size[slot] += std::fabs(term);
      for (size_t k = 0; k < call.out.size(); ++k) {
        ASSERT_NEAR(static_cast<double>(call.out[k][i]), y[k], tolerance * (1 + std::fabs(y[k])))
            << what << " result " << k << " of " << call.tasks << " x " << call.elements;
      }
    }
  }
  for (size_t i = 0; backward && i < sum.size(); ++i) {
    ASSERT_NEAR(static_cast<double>(call.grad_rate[i]), sum[i], tolerance * (size[i] + 1)) << what;
  }
}

const MomentumCoefficients kMomentum{1.9, 0.81, 0.8, 0.9};

template <class T>
void check_momentum(const Isa& isa, int64_t tasks, int64_t elements, bool by_task) {
  std::vector<std::vector<T>> first;
  for (const ParallelFor par : schedules()) {
    Call<T> step(tasks, elements, 3, 2, by_task), back(tasks, elements, 4, 2, by_task);
    const MomentumTensor forward{tasks,           elements,  step.operand(0), step.operand(1),
                                 step.operand(2), step.lr(), step.result(0),  step.result(1)};
    const MomentumBackwardTensor backward{
        tasks,           elements,  back.operand(0), back.operand(1), back.operand(2),
        back.operand(3), back.lr(), back.result(0),  back.result(1),  back.grad_rate.data()};
    isa.momentum({dtype_of<T>(), dtype_of<T>(), kMomentum, 1, &forward}, par);
    isa.momentum_backward({dtype_of<T>(), dtype_of<T>(), kMomentum, 1, &backward}, par);
    if (!first.empty()) {
      EXPECT_TRUE(same_bits(first[0], back.out[0]) && same_bits(first[1], back.grad_rate))
          << isa.name << ": momentum depends on the schedule";
      continue;
    }
    const auto& c = kMomentum;
    expect(isa.name, step, false, [&](auto& x, double lr, auto& y) {
      y[0] = x[0] - lr * (c.step_grad * x[1] + c.step_buffer * x[2]);
      y[1] = c.keep_grad * x[1] + c.keep_buffer * x[2];
      return 0.0;
    });
    expect(isa.name, back, true, [&](auto& x, double lr, auto& y) {
      y[0] = c.keep_grad * x[2] - lr * c.step_grad * x[0];
      y[1] = c.keep_buffer * x[2] - lr * c.step_buffer * x[0];
      return -x[0] * (c.step_grad * x[1] + c.step_buffer * x[3]);
    });
    first = {back.out[0], back.grad_rate};
  }
}

const AdamCoefficients kAdam{0.9, 0.95, 1e-3, 1e-2, 1 / (1 - 0.81), 1 / (1 - 0.95 * 0.95)};

template <class T>
void check_adam(const Isa& isa, int64_t tasks, int64_t elements, bool by_task) {
  std::vector<std::vector<T>> first;
  for (const ParallelFor par : schedules()) {
    Call<T> step(tasks, elements, 4, 3, by_task), back(tasks, elements, 6, 3, by_task);
    const AdamTensor forward{tasks,           elements,        step.operand(0), step.operand(1),
                             step.operand(2), step.operand(3), step.lr(),       step.result(0),
                             step.result(1),  step.result(2)};
    const AdamBackwardTensor backward{
        tasks,           elements,        back.operand(0),      back.operand(1), back.operand(2),
        back.operand(3), back.operand(4), back.operand(5),      back.lr(),       back.result(0),
        back.result(1),  back.result(2),  back.grad_rate.data()};
    isa.adam({dtype_of<T>(), dtype_of<T>(), kAdam, 1, &forward}, par);
    isa.adam_backward({dtype_of<T>(), dtype_of<T>(), kAdam, 1, &backward}, par);
    if (!first.empty()) {
      EXPECT_TRUE(same_bits(first[0], back.out[0]) && same_bits(first[1], back.grad_rate))
          << isa.name << ": Adam depends on the schedule";
      continue;
    }
    const auto& c = kAdam;
    expect(isa.name, step, false, [&](auto& x, double lr, auto& y) {
      y[1] = c.beta1 * x[2] + (1 - c.beta1) * x[1];
      y[2] = c.beta2 * x[3] + (1 - c.beta2) * x[1] * x[1];
      const double root = std::sqrt(c.square_scale * y[2] + c.eps_root);
      y[0] = x[0] - lr * c.mean_scale * y[1] / (root + c.eps);
      return 0.0;
    });
    expect(isa.name, back, true, [&](auto& x, double lr, auto& y) {
      const double mean = c.beta1 * x[4] + (1 - c.beta1) * x[1];
      const double square = c.beta2 * x[5] + (1 - c.beta2) * x[1] * x[1];
      const double root = std::sqrt(c.square_scale * square + c.eps_root);
      const double step_value = c.mean_scale * mean / (root + c.eps);
      const double to_mean = x[2] - lr * x[0] * c.mean_scale / (root + c.eps);
      const double to_square =
          x[3] + lr * x[0] * step_value * c.square_scale / (2 * root * (root + c.eps));
      y[0] = (1 - c.beta1) * to_mean + 2 * (1 - c.beta2) * x[1] * to_square;
      y[1] = c.beta1 * to_mean;
      y[2] = c.beta2 * to_square;
      return -x[0] * step_value;
    });
    first = {back.out[0], back.grad_rate};
  }
}

TEST(StatefulUpdate, MatchesTheFormulas) {
  for (const Isa& isa : isas()) {
    check_adam<float>(isa, 1, 1200007, false);  // results past the caches
    for (const auto& [tasks, elements] : kShapes) {
      for (const bool by_task : {true, false}) {
        check_momentum<float>(isa, tasks, elements, by_task);
        check_momentum<double>(isa, tasks, elements, by_task);
        check_adam<float>(isa, tasks, elements, by_task);
        check_adam<double>(isa, tasks, elements, by_task);
      }
    }
  }
}

TEST(StatefulUpdate, ARootAtZeroHasNoDerivative) {
  for (const Isa& isa : isas()) {
    const std::vector<float> zero(21), one(21, 1.f);
    const AdamCoefficients c{0.9, 0.999, 1e-3, 0, 10, 1000};
    const float lr = 0.5f;
    std::vector<float> grad(21), mean(21), square(21);
    float grad_lr = 9;
    const Operand zeros{zero.data(), 21, 1};
    const AdamBackwardTensor x{
        1,     21,          {one.data(), 21, 1}, zeros,       zeros,         zeros,   zeros,
        zeros, {&lr, 0, 0}, grad.data(),         mean.data(), square.data(), &grad_lr};
    isa.adam_backward({DType::kFloat32, DType::kFloat32, c, 1, &x}, serial_for);
    for (size_t i = 0; i < 21; ++i) {
      EXPECT_NEAR(grad[i], -500.f, 1e-3f) << isa.name;
      EXPECT_EQ(square[i], 0.f);
    }
    EXPECT_EQ(grad_lr, 0.f);
  }
}

}  // namespace
}  // namespace fastmeta::update
