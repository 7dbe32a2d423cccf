// Losses of csrc/engine/layers/losses.h against their definitions in long double: value, gradient,
// and the gradient's tangent.
#ifndef FASTMETA_ISA
#define FASTMETA_ISA engine_losses_test
#endif
#include "engine/layers/losses.h"
#include "engine_layer_util.h"

namespace fastmeta::engine::FASTMETA_ISA {
namespace {

#define FASTMETA_CONCAT_(a, b) a##b
#define FASTMETA_CONCAT(a, b) FASTMETA_CONCAT_(a, b)
#define FASTMETA_TEST_(suite, name) TEST(suite, name)
#define FASTMETA_TEST(name) FASTMETA_TEST_(FASTMETA_CONCAT(EngineLosses_, FASTMETA_ISA), name)

struct Problem {
  Loss loss;
  Shape shape;  // without ld
  int64_t rows;
  bool turned = false;
  Numbers prediction, dprediction, targets, weight;
  std::vector<int64_t> labels;
};
struct Result {
  Real value = 0;
  Numbers g, dg;
};

// Where a number [row, channel, pixel] of torch's layout is in the engine's: [rows, pixels, ld], or
// [channels, rows].
int64_t place(const Shape& s, int64_t rows, int64_t i) {
  const int64_t plane = i / s.pixels(), r = plane / s.channels, c = plane % s.channels;
  return s.lanes > 0 ? c * s.padded_rows(rows) + r : r * s.row() + i % s.pixels() * s.ld + c;
}
// What is between them holds padding.
template <class T>
std::vector<T> pack(const Problem& of, const Numbers& x, const Shape& s) {
  std::vector<T> to(static_cast<size_t>(s.size(of.rows)), T(3));
  for (int64_t i = 0; i < size_of(x); ++i) to[place(s, of.rows, i)] = static_cast<T>(x[i]);
  return to;
}
template <class T>
Numbers unpack(const Problem& of, std::vector<T> x, const Shape& s) {
  Numbers to;
  for (int64_t i = 0; i < size_of(of.prediction); ++i) {
    T& number = x[place(s, of.rows, i)];
    to.push_back(number);
    number = T(0);
  }
  EXPECT_EQ(x, std::vector<T>(x.size())) << "padding";
  return to;
}

template <class T>
Result evaluate(const Problem& of, bool dual) {
  Shape s = of.shape;
  s.ld = ceil_div(s.channels, int64_t{kWidth<T>}) * kWidth<T> + kWidth<T>;
  if (of.turned) s.lanes = kWidth<T>;
  const std::vector<T> prediction = pack<T>(of, of.prediction, s);
  const std::vector<T> dprediction = pack<T>(of, of.dprediction, s);
  const std::vector<T> targets(of.targets.begin(), of.targets.end());
  const std::vector<T> weight(of.weight.begin(), of.weight.end());
  std::vector<T> g(prediction.size(), T(NAN)), dg = g;
  LossCall<T> call{};
  call.loss = &of.loss;
  call.shape = s;
  call.rows = of.rows;
  call.prediction = prediction.data();
  call.dprediction = dprediction.data();
  call.targets = targets.data();
  call.weight = weight.empty() ? nullptr : weight.data();
  std::vector<T> labels(of.labels.size() + kWidth<T>);
  if (of.loss.kind == LossKind::kCrossEntropy) {
    call.counted = prepare_labels(of.loss, of.labels.data(), of.rows, call.weight, labels.data());
    call.labels = labels.data();
  }
  Result to;
  to.value = loss_value(call);
  call.g = g.data();
  call.dg = dg.data();
  const Real again = loss_and_gradient(call);
  // Compilers round the same sums in their own ways where a gradient is made, too.
  const Real tolerance = 16 * std::numeric_limits<T>::epsilon();
  if (!std::isnan(to.value)) expect_near({again}, {to.value}, tolerance, "value again");
  to.g = unpack(of, g, s);
  dual ? loss_dual(call) : loss_gradient(call);
  if (!std::isnan(to.value)) expect_near(unpack(of, g, s), to.g, tolerance, "gradient again");
  if (dual) to.dg = unpack(of, dg, s);
  return to;
}

Real cross_entropy(const Problem& of, const Numbers& z) {
  const int64_t classes = of.shape.channels;
  const auto weight = [&](int64_t c) { return of.weight.empty() ? Real(1) : of.weight[c]; };
  const Real e = of.loss.smoothing;
  Real total = 0, counted = 0;
  for (int64_t r = 0; r < of.rows; ++r) {
    if (of.labels[r] == of.loss.ignore) continue;
    Real sum = 0;
    for (int64_t c = 0; c < classes; ++c) sum += std::exp(z[r * classes + c]);
    for (int64_t c = 0; c < classes; ++c) {
      const Real nll = std::log(sum) - z[r * classes + c];
      const Real aim = (c == of.labels[r] ? 1 - e : 0) + e / classes;
      total += weight(c) * aim * nll;
    }
    counted += weight(of.labels[r]);
  }
  return counted == 0 ? 0 : total / counted;
}
Real elementwise(const Problem& of, const Numbers& x) {
  Real total = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const Real t = of.targets[i], d = std::fabs(x[i] - t), delta = of.loss.delta;
    const Real s = 1 / (1 + std::exp(-x[i]));
    total += of.loss.kind == LossKind::kMse   ? d * d
             : of.loss.kind == LossKind::kBce ? -t * std::log(s) - (1 - t) * std::log(1 - s)
                                              : (d < delta ? d * d / 2 : delta * (d - delta / 2));
  }
  return x.empty() ? 0 : total / static_cast<Real>(x.size());
}

void check_loss(const Problem& of) {
  if (!of.turned && of.shape.pixels() == 1) {
    Problem turned = of;
    turned.turned = true;
    check_loss(turned);
  }
  const auto define = [&](const Numbers& x) {
    return of.loss.kind == LossKind::kCrossEntropy ? cross_entropy(of, x) : elementwise(of, x);
  };
  Result want;
  want.value = define(of.prediction);
  want.g.resize(of.prediction.size());
  Numbers at = of.prediction;
  for (size_t i = 0; i < at.size(); ++i) {
    at[i] = of.prediction[i] + 1e-6L;
    const Real up = define(at);
    at[i] = of.prediction[i] - 1e-6L;
    want.g[i] = (up - define(at)) / 2e-6L;
    at[i] = of.prediction[i];
  }
  Problem up = of, down = of;
  up.prediction = moved(of.prediction, of.dprediction, 1e-5L);
  down.prediction = moved(of.prediction, of.dprediction, -1e-5L);
  want.dg = slope(evaluate<double>(up, false).g, evaluate<double>(down, false).g, 1e-5L);
  const Result got = evaluate<double>(of, true), rough = evaluate<float>(of, true);
  expect_near({got.value}, {want.value}, 1e-13L, "value");
  expect_near(got.g, want.g, 1e-10L, "g");
  expect_near(evaluate<double>(of, false).g, want.g, 1e-10L, "g alone");
  expect_near(got.dg, want.dg, 1e-9L, "dg");
  expect_near({rough.value}, {want.value}, 1e-6L, "float value");
  expect_near(rough.g, want.g, 1e-6L, "float g");
  expect_near(rough.dg, want.dg, 1e-6L, "float dg");
}

Problem make(LossKind kind, int64_t rows, const Shape& s, std::mt19937& random) {
  Problem p;
  p.loss.kind = kind;
  p.shape = s;
  p.rows = rows;
  const int64_t n = rows * s.channels * s.pixels();
  p.prediction = draw(random, n);
  p.dprediction = draw(random, n);
  p.targets = draw(random, n);
  for (int64_t r = 0; r < rows; ++r)
    p.labels.push_back(static_cast<int64_t>(random() % s.channels));
  return p;
}

FASTMETA_TEST(CrossEntropy) {
  std::mt19937 random(1);
  for (int64_t classes : {1, 3, 5, 8, 17}) {
    for (int64_t rows : {1, 6, 20}) {
      for (double smoothing : {0.0, 0.25, 1.0}) {
        Problem p = make(LossKind::kCrossEntropy, rows, shape(classes), random);
        p.loss.smoothing = smoothing;
        for (Real& v : p.prediction) v *= 3;
        check_loss(p);
        p.weight = draw(random, classes);
        for (Real& v : p.weight) v = std::fabs(v);
        check_loss(p);
        p.loss.ignore = p.labels[0];
        check_loss(p);
      }
    }
  }
}
FASTMETA_TEST(CrossEntropyOfFarLogits) {
  std::mt19937 random(2);
  Problem p = make(LossKind::kCrossEntropy, 1, shape(3), random);
  p.prediction = {1e4L, -1e4L, 0};
  p.labels = {1};
  const Result got = evaluate<float>(p, true);
  EXPECT_EQ(got.value, 2e4L);
  EXPECT_EQ(got.g, (Numbers{1, -1, 0}));
  p.prediction = {0, 0, -std::numeric_limits<Real>::infinity()};
  EXPECT_EQ(evaluate<double>(p, false).g, (Numbers{0.5L, -0.5L, 0}));
}
FASTMETA_TEST(NothingCounts) {
  std::mt19937 random(3);
  Problem p = make(LossKind::kCrossEntropy, 2, shape(3), random);
  p.labels = {-100, -100};
  Result got = evaluate<double>(p, true);
  EXPECT_EQ(got.value, 0);
  EXPECT_EQ(got.g, Numbers(6));
  EXPECT_EQ(got.dg, Numbers(6));
  p.labels = {0, 1};  // of classes without weight
  p.weight = {0, 0, 1};
  p.prediction[4] = std::nan("");
  got = evaluate<double>(p, true);
  EXPECT_EQ(got.value, 0);
  EXPECT_EQ(got.g, Numbers(6));
  EXPECT_EQ(got.dg, Numbers(6));
  for (LossKind kind :
       {LossKind::kCrossEntropy, LossKind::kMse, LossKind::kHuber, LossKind::kBce}) {
    EXPECT_EQ(evaluate<float>(make(kind, 0, shape(3), random), true).value, 0);
  }
}

FASTMETA_TEST(ElementwiseLosses) {
  std::mt19937 random(4);
  for (LossKind kind : {LossKind::kMse, LossKind::kHuber, LossKind::kBce}) {
    for (const Shape& s : {shape(1), shape(5), shape(17), shape(3, 2, 3), shape(8, 1, 2)}) {
      for (int64_t rows : {1, 7, 20}) {
        Problem p = make(kind, rows, s, random);
        p.loss.delta = 0.75;
        check_loss(p);
      }
    }
  }
}
FASTMETA_TEST(ElementwiseLossesFarOut) {
  std::mt19937 random(5);
  Problem p = make(LossKind::kBce, 1, shape(2), random);
  p.prediction = {1e4L, -1e4L};
  p.targets = {0, 0};
  EXPECT_EQ(evaluate<float>(p, true).value, 5e3L);
  EXPECT_EQ(evaluate<float>(p, true).g, (Numbers{0.5L, 0}));
  EXPECT_EQ(evaluate<float>(p, true).dg, (Numbers{0, 0}));
  p.loss.kind = LossKind::kHuber;
  p.prediction = {1e30L, std::nan("")};
  EXPECT_EQ(evaluate<float>(p, true).g[0], 0.5L);
  EXPECT_TRUE(std::isnan(evaluate<float>(p, true).g[1]));
}

}  // namespace
}  // namespace fastmeta::engine::FASTMETA_ISA
