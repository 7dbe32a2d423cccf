// Matching attention on every instruction set of this CPU, against the definition in long double:
// values by the formula, gradients by the chain rule written out pair by pair.
#include "matching/matching_attention.h"

#include <gtest/gtest.h>

#include <limits>

#include "kernel_test_util.h"

namespace fastmeta::matching {
namespace {

using namespace fastmeta::test;
using Real = long double;
constexpr Real kInf = std::numeric_limits<Real>::infinity();

struct Isa {
  const char* name;
  void (*forward)(const Forward&, ParallelFor);
  void (*backward)(const Backward&, ParallelFor);
};
std::vector<Isa> isas() {
  std::vector<Isa> all{{"baseline", baseline::forward, baseline::backward}};
#if defined(__x86_64__)
  if (cpu_has("avx2")) all.push_back({"avx2", avx2::forward, avx2::backward});
  if (cpu_has("avx512")) all.push_back({"avx512", avx512::forward, avx512::backward});
#endif
  return all;
}
const std::vector<Similarity> kAll{Similarity::kDot, Similarity::kCosine, Similarity::kSqEuclidean,
                                   Similarity::kEuclidean, Similarity::kAdditive};

template <class T>
struct Case {
  Similarity similarity;
  int64_t tasks, queries, supports, classes, dim;
  bool nll;
  std::vector<T> query, support, scale, weight, grad;
  std::vector<int64_t> labels, targets;
};
template <class T>
Case<T> make_case(Similarity similarity, std::array<int64_t, 5> n, bool nll) {
  Case<T> c{similarity, n[0], n[1], n[2], n[3], n[4], nll, {}, {}, {}, {}, {}, {}, {}};
  std::mt19937 random(static_cast<unsigned>(n[0] + 3 * n[1] + 5 * n[2] + 7 * n[3] + 11 * n[4]));
  c.query = normal<T>(random, n[0] * n[1] * n[4]);
  c.support = normal<T>(random, n[0] * n[2] * n[4]);
  c.scale = normal<T>(random, n[0]);
  c.weight = normal<T>(random, n[0] * n[4]);
  c.grad = normal<T>(random, n[0] * n[1] * (nll ? 1 : n[3]));
  // About every sixth support is padding; targets include ignored ones and classes without support.
  for (int64_t i = 0; i < n[0] * n[2]; ++i) {
    c.labels.push_back(random() % 6 == 0 || n[3] == 0 ? -100
                                                      : static_cast<int64_t>(random() % n[3]));
  }
  for (int64_t i = 0; nll && i < n[0] * n[1]; ++i) {
    c.targets.push_back(random() % 6 == 0 || n[3] == 0 ? -100
                                                       : static_cast<int64_t>(random() % n[3]));
  }
  if (n[0] > 0 && n[1] > 0 && n[2] > 0 &&
      similarity != Similarity::kAdditive) {  // a coincident pair
    std::copy_n(c.query.begin(), n[4], c.support.begin());
  }
  if (similarity == Similarity::kCosine && n[0] > 0 && n[1] > 1 && n[2] > 1) {  // zero vectors
    std::fill_n(c.query.begin() + n[4], n[4], T(0));
    std::fill_n(c.support.begin() + n[4], n[4], T(0));
  }
  return c;
}

// A gradient and, entry by entry, the sum of the sizes of what went into it: rounding errors are in
// proportion to that, not to a result in which much may cancel.
struct Gradient {
  explicit Gradient(size_t n = 0) : value(n, 0), size(n, 0) {}
  void add(size_t i, Real factor, Real factor_size, Real slope) {
    value[i] += factor * slope;
    size[i] += factor_size * std::fabs(slope);
  }
  std::vector<Real> value, size;
};
struct Truth {
  std::vector<Real> out, lse;
  Gradient query, support, scale, weight;
  Real largest = 0;  // |score|
};

// Similarity of a pair and its derivatives by query, support and weight.
struct Slopes {
  std::vector<Real> query, support, weight;
};
template <class T>
Real pair(const Case<T>& c, const T* q, const T* s, const T* w, Slopes* slopes) {
  Real dot = 0, qq = 0, ss = 0, dd = 0, additive = 0;
  for (int64_t d = 0; d < c.dim; ++d) {
    const Real a = q[d], b = s[d];
    dot += a * b, qq += a * a, ss += b * b, dd += (a - b) * (a - b);
    additive += c.similarity == Similarity::kAdditive ? Real(w[d]) * std::tanh(a + b) : 0;
  }
  const Real norm = std::sqrt(qq) * std::sqrt(ss), cosine = norm > 0 ? dot / norm : 0;
  for (int64_t d = 0; slopes != nullptr && d < c.dim; ++d) {
    const Real a = q[d], b = s[d];
    Real &dq = slopes->query[d], &ds = slopes->support[d];
    dq = ds = 0;
    switch (c.similarity) {
      case Similarity::kDot:
        dq = b, ds = a;
        break;
      case Similarity::kCosine:
        if (norm > 0) dq = b / norm - cosine * a / qq, ds = a / norm - cosine * b / ss;
        break;
      case Similarity::kSqEuclidean:
        dq = 2 * (b - a), ds = 2 * (a - b);
        break;
      case Similarity::kEuclidean:
        if (dd > 0) dq = (b - a) / std::sqrt(dd), ds = (a - b) / std::sqrt(dd);
        break;
      case Similarity::kAdditive: {
        const Real u = std::tanh(a + b);
        dq = ds = w[d] * (1 - u * u);
        slopes->weight[d] = u;
        break;
      }
    }
  }
  switch (c.similarity) {
    case Similarity::kDot:
      return dot;
    case Similarity::kCosine:
      return cosine;
    case Similarity::kSqEuclidean:
      return -dd;
    case Similarity::kEuclidean:
      return -std::sqrt(dd);
    case Similarity::kAdditive:
      return additive;
  }
  return 0;
}

Real log_sum_exp(const std::vector<Real>& z) {
  Real most = -kInf, sum = 0;
  for (Real x : z) most = std::max(most, x);
  if (most == -kInf) return -kInf;
  for (Real x : z) sum += std::exp(x - most);
  return most + std::log(sum);
}

template <class T>
Truth truth_of(const Case<T>& c) {
  const int64_t width = c.nll ? 1 : c.classes;
  Truth r;
  r.out.assign(static_cast<size_t>(c.tasks * c.queries * width), 0);
  r.lse.assign(static_cast<size_t>(c.tasks * c.queries), 0);
  r.query = Gradient(c.query.size());
  r.support = Gradient(c.support.size());
  r.scale = Gradient(static_cast<size_t>(c.tasks));
  r.weight = Gradient(c.weight.size());
  const size_t dim = static_cast<size_t>(c.dim);
  Slopes slopes{std::vector<Real>(dim), std::vector<Real>(dim), std::vector<Real>(dim)};
  for (int64_t t = 0; t < c.tasks; ++t) {
    const T* w = c.weight.data() + t * c.dim;
    for (int64_t q = 0; q < c.queries; ++q) {
      const int64_t row = t * c.queries + q;
      const T* x = c.query.data() + row * c.dim;
      std::vector<Real> sim(static_cast<size_t>(c.supports)), all,
          logp(static_cast<size_t>(c.classes), -kInf);
      std::vector<std::vector<Real>> by_class(static_cast<size_t>(c.classes));
      for (int64_t i = 0; i < c.supports; ++i) {
        const int64_t y = c.labels[t * c.supports + i];
        if (y < 0) continue;
        sim[i] = pair(c, x, c.support.data() + (t * c.supports + i) * c.dim, w, nullptr);
        all.push_back(sim[i] * Real(c.scale[t]));
        r.largest = std::max(r.largest, std::fabs(all.back()));
        by_class[y].push_back(all.back());
      }
      const Real lse = r.lse[row] = log_sum_exp(all);
      std::vector<Real> g(static_cast<size_t>(c.classes), 0);
      for (int64_t k = 0; k < c.classes; ++k) {
        if (!by_class[k].empty()) logp[k] = log_sum_exp(by_class[k]) - lse;
        if (!c.nll) r.out[row * width + k] = logp[k];
        if (!c.nll && !by_class[k].empty()) g[k] = c.grad[row * width + k];
      }
      if (c.nll && c.targets[row] >= 0) {
        r.out[row] = -logp[c.targets[row]];
        if (r.out[row] < kInf) g[c.targets[row]] = -Real(c.grad[row]);
      }
      Real total = 0, total_size = 0;
      for (Real v : g) total += v, total_size += std::fabs(v);
      for (int64_t i = 0; i < c.supports; ++i) {
        const int64_t s = t * c.supports + i, y = c.labels[s];
        if (y < 0) continue;
        const Real scale = c.scale[t], p = std::exp(logp[y]);
        const Real share = std::exp(sim[i] * scale - lse - logp[y]);
        const Real dz = share * (g[y] - p * total),
                   size = share * (std::fabs(g[y]) + p * total_size);
        r.scale.add(t, dz, size, sim[i]);
        pair(c, x, c.support.data() + s * c.dim, w, &slopes);
        for (int64_t d = 0; d < c.dim; ++d) {
          r.query.add(row * c.dim + d, dz * scale, size * std::fabs(scale), slopes.query[d]);
          r.support.add(s * c.dim + d, dz * scale, size * std::fabs(scale), slopes.support[d]);
          r.weight.add(t * c.dim + d, dz * scale, size * std::fabs(scale), slopes.weight[d]);
        }
      }
    }
  }
  return r;
}

template <class T>
struct Result {
  std::vector<T> out, lse, grad_query, grad_support, grad_scale, grad_weight;
};
template <class T>
Result<T> run(const Isa& isa, const Case<T>& c, ParallelFor par) {
  const int64_t rows = c.tasks * c.queries;
  Result<T> r;
  r.out.assign(static_cast<size_t>(rows * (c.nll ? 1 : c.classes)), T(9));
  r.lse.assign(static_cast<size_t>(rows), T(9));
  r.grad_query.assign(c.query.size(), T(9));
  r.grad_support.assign(c.support.size(), T(9));
  r.grad_scale.assign(static_cast<size_t>(c.tasks), T(9));
  const bool additive = c.similarity == Similarity::kAdditive;
  if (additive) r.grad_weight.assign(c.weight.size(), T(9));
  const Problem p{dtype_of<T>(),
                  c.similarity,
                  c.tasks,
                  c.queries,
                  c.supports,
                  c.classes,
                  c.dim,
                  c.query.data(),
                  c.support.data(),
                  c.labels.data(),
                  c.nll ? c.targets.data() : nullptr,
                  c.scale.data(),
                  1,
                  additive ? c.weight.data() : nullptr,
                  additive ? c.dim : 0};
  isa.forward({p, r.out.data(), r.lse.data()}, par);
  isa.backward(
      {p, c.grad.data(), r.out.data(), r.lse.data(), r.grad_query.data(), r.grad_support.data(),
       r.grad_scale.data(), additive ? r.grad_weight.data() : nullptr},
      par);
  return r;
}

// Within `tolerance` of each value's own size, and the same infinities.
template <class T>
void expect_close(const std::vector<T>& got, const std::vector<Real>& want,
                  const std::vector<Real>& size, Real tolerance, const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::isfinite(want[i])) {
      ASSERT_NEAR(static_cast<double>(got[i]), static_cast<double>(want[i]),
                  static_cast<double>(tolerance * size[i]))
          << what << " at " << i;
    } else {
      ASSERT_EQ(static_cast<Real>(got[i]), want[i]) << what << " at " << i;
    }
  }
}

template <class T>
void check(const Case<T>& c) {
  const Truth want = truth_of(c);
  // A score of size z is known to eps * z, and so are logarithms; its exponential to eps * z of
  // itself. Vectors' own sizes enter where they are subtracted (distances) or divided by.
  const Real eps = std::numeric_limits<T>::epsilon(), scores = eps * (want.largest + 4);
  const auto flat = [](size_t n, Real x) { return std::vector<Real>(n, x); };
  const auto floored = [](const Gradient& g) {
    Real most = 0;
    for (Real x : g.size) most = std::max(most, x);
    std::vector<Real> size = g.size;
    for (Real& x : size) x = std::max(x, most / 16);
    return size;
  };
  for (const Isa& isa : isas()) {
    const std::string what =
        std::string(isa.name) + " similarity " + std::to_string(static_cast<int>(c.similarity)) +
        " S " + std::to_string(c.supports) + " Q " + std::to_string(c.queries) + " C " +
        std::to_string(c.classes) + " D " + std::to_string(c.dim) + (c.nll ? " nll " : " ");
    const Result<T> got = run(isa, c, serial_for);
    expect_close(got.out, want.out, flat(want.out.size(), 1), 4 * scores, what + "out");
    expect_close(got.lse, want.lse, flat(want.lse.size(), 1), 4 * scores, what + "lse");
    expect_close(got.grad_query, want.query.value, floored(want.query), 8 * scores,
                 what + "grad_query");
    expect_close(got.grad_support, want.support.value, floored(want.support), 8 * scores,
                 what + "grad_support");
    expect_close(got.grad_scale, want.scale.value, floored(want.scale), 8 * scores,
                 what + "grad_scale");
    if (!got.grad_weight.empty()) {
      expect_close(got.grad_weight, want.weight.value, floored(want.weight), 8 * scores,
                   what + "grad_weight");
    }
    for (const ParallelFor par : schedules()) {
      const Result<T> again = run(isa, c, par);
      EXPECT_TRUE(same_bits(got.out, again.out) && same_bits(got.lse, again.lse) &&
                  same_bits(got.grad_query, again.grad_query) &&
                  same_bits(got.grad_support, again.grad_support) &&
                  same_bits(got.grad_scale, again.grad_scale) &&
                  same_bits(got.grad_weight, again.grad_weight))
          << what << "depends on the schedule";
    }
  }
}

// T, Q, S, C, D
const std::vector<std::array<int64_t, 5>> kShapes{
    {1, 1, 1, 1, 1},    {2, 3, 4, 2, 5},   {3, 17, 25, 5, 16},  {1, 75, 25, 5, 65},
    {2, 5, 33, 40, 67}, {9, 20, 60, 3, 8}, {1, 5, 1100, 24, 7}, {1, 5, 1100, 1, 7},
    {1, 4, 0, 3, 5},    {2, 0, 5, 3, 4},   {1, 9, 13, 3, 0},    {1, 3, 4, 0, 5},
    {0, 3, 4, 2, 5}};

template <class T>
void check_shapes() {
  for (const Similarity s : kAll) {
    for (const auto& n : kShapes) {
      for (const bool nll : {false, true}) check(make_case<T>(s, n, nll));
    }
  }
}
TEST(MatchingAttention, MatchesTheDefinitionInFloat) { check_shapes<float>(); }
TEST(MatchingAttention, MatchesTheDefinitionInDouble) { check_shapes<double>(); }

// Large enough that a single task is cut along supports, along queries, and past the class buffer.
TEST(MatchingAttention, SplitTasksMatchTheDefinition) {
  for (const bool nll : {false, true}) {
    check(make_case<float>(Similarity::kDot, {1, 33, 1500, 3, 100}, nll));
    check(make_case<float>(Similarity::kCosine, {1, 400, 100, 50, 100}, nll));
    check(make_case<float>(Similarity::kEuclidean, {1, 40, 1100, 40, 100}, nll));
  }
  check(make_case<double>(Similarity::kSqEuclidean, {1, 33, 1500, 700, 100}, false));
}

// A class whose scores lie thousands of nats below another's keeps its log-probability.
TEST(MatchingAttention, FarClassesKeepTheirDigits) {
  for (const Isa& isa : isas()) {
    Case<float> c = make_case<float>(Similarity::kDot, {1, 40, 60, 4, 8}, false);
    c.scale[0] = 4096;
    const Truth want = truth_of(c);
    const Result<float> got = run(isa, c, serial_for);
    for (size_t i = 0; i < want.out.size(); ++i) {
      if (want.out[i] == -kInf) {
        ASSERT_TRUE(std::isinf(got.out[i]));
      } else {
        ASSERT_TRUE(std::isfinite(got.out[i])) << isa.name;
        ASSERT_NEAR(got.out[i], static_cast<double>(want.out[i]), 2e-6 * 4096 * 30) << isa.name;
      }
    }
  }
}

// dL/dz adds up to 0 over the supports of a query however large the scores: shares are normalised
// by their own sum, not by a log-sum-exp rounded to the size of the scores. A feature that is 1 in
// every support and 0 in every query reads that sum off grad_query.
TEST(MatchingAttention, ScoreGradientsAddUpToZeroAtLargeScores) {
  constexpr int64_t kQueries = 40, kSupports = 60, kClasses = 4, kDim = 8;
  for (const Isa& isa : isas()) {
    for (const bool nll : {false, true}) {
      Case<float> c =
          make_case<float>(Similarity::kDot, {1, kQueries, kSupports, kClasses, kDim}, nll);
      c.scale[0] = 4096;
      for (int64_t q = 0; q < kQueries; ++q) c.query[q * kDim] = 0;
      for (int64_t i = 0; i < kSupports; ++i) c.support[i * kDim] = 1;
      const Result<float> got = run(isa, c, serial_for);
      for (int64_t q = 0; q < kQueries; ++q) {
        double size = 0;
        for (int64_t k = 0; k < (nll ? 1 : kClasses); ++k) {
          size += std::fabs(c.grad[q * (nll ? 1 : kClasses) + k]);
        }
        EXPECT_NEAR(got.grad_query[q * kDim] / 4096, 0, 4e-6 * size) << isa.name << " query " << q;
      }
    }
  }
}

TEST(MatchingAttention, NanTouchesItsQueryOrTaskOnly) {
  for (const Isa& isa : isas()) {
    for (const Similarity s : kAll) {
      Case<float> c = make_case<float>(s, {2, 20, 10, 2, 6}, false);
      for (int64_t i = 0; i < 20; ++i) c.labels[i] = i % 2;
      Case<float> bad = c;
      bad.query[5 * 6 + 1] = std::nanf("");           // query 5 of task 0
      bad.support[(10 + 3) * 6 + 2] = std::nanf("");  // support 3 of task 1
      const Result<float> want = run(isa, c, serial_for), got = run(isa, bad, serial_for);
      for (int64_t q = 0; q < 40; ++q) {
        for (int64_t k = 0; k < 2; ++k) {
          const size_t i = static_cast<size_t>(q * 2 + k);
          if (q == 5 || q >= 20) {
            EXPECT_TRUE(std::isnan(got.out[i])) << isa.name << " " << q;
          } else {
            EXPECT_EQ(got.out[i], want.out[i]) << isa.name << " " << q;
          }
        }
        EXPECT_EQ(std::isnan(got.lse[q]), q == 5 || q >= 20);
        EXPECT_EQ(std::isnan(got.grad_query[q * 6]), q == 5 || q >= 20);
      }
    }
  }
}

TEST(MatchingAttention, BFloat16MatchesFloatOnTheSameValues) {
  for (const Isa& isa : isas()) {
    for (const Similarity s : kAll) {
      Case<float> c = make_case<float>(s, {2, 21, 30, 3, 19}, false);
      std::vector<bfloat16> query, support;
      for (float& x : c.query) query.push_back(to_bfloat16(x)), x = from_bfloat16(query.back());
      for (float& x : c.support)
        support.push_back(to_bfloat16(x)), x = from_bfloat16(support.back());
      const Result<float> want = run(isa, c, serial_for);
      std::vector<bfloat16> dq(query.size()), ds(support.size());
      Result<float> got = want;
      const bool additive = s == Similarity::kAdditive;
      const Problem p{DType::kBFloat16,
                      s,
                      2,
                      21,
                      30,
                      3,
                      19,
                      query.data(),
                      support.data(),
                      c.labels.data(),
                      nullptr,
                      c.scale.data(),
                      1,
                      additive ? c.weight.data() : nullptr,
                      additive ? 19 : 0};
      isa.forward({p, got.out.data(), got.lse.data()}, serial_for);
      isa.backward({p, c.grad.data(), got.out.data(), got.lse.data(), dq.data(), ds.data(),
                    got.grad_scale.data(), additive ? got.grad_weight.data() : nullptr},
                   serial_for);
      EXPECT_TRUE(same_bits(got.out, want.out)) << isa.name;
      EXPECT_TRUE(same_bits(got.grad_scale, want.grad_scale)) << isa.name;
      for (size_t i = 0; i < dq.size(); ++i) {
        ASSERT_NEAR(from_bfloat16(dq[i]), want.grad_query[i], std::fabs(want.grad_query[i]) / 256)
            << isa.name;
      }
      for (size_t i = 0; i < ds.size(); ++i) {
        ASSERT_NEAR(from_bfloat16(ds[i]), want.grad_support[i],
                    std::fabs(want.grad_support[i]) / 256);
      }
    }
  }
}

}  // namespace
}  // namespace fastmeta::matching
