// Whole meta-steps of the engine without torch, on every instruction set of this CPU: each gradient
// against central differences of the loss, the same bits under every schedule, inputs and outputs
// in memory that ends where torch's tensors do. That the loss itself is the right one is what the
// Python tests show against autograd.
#include <gtest/gtest.h>

#include <algorithm>

#include "engine/adapt.h"
#include "engine/program_text.h"
#include "kernel_test_util.h"

namespace fastmeta::engine {
namespace {

using namespace fastmeta::test;

struct Isa {
  const char* name;
  void (*adapt)(const Adapt&, ParallelFor);
  void (*backward)(const Adapt&, const AdaptGradients&, ParallelFor);
  void (*meta_step)(const Adapt&, const AdaptGradients&, ParallelFor);
};
std::vector<Isa> isas() {
#define FASTMETA_TEST_ISA(name) {#name, name::adapt, name::adapt_backward, name::meta_step}
  std::vector<Isa> all{FASTMETA_TEST_ISA(baseline)};
#if defined(__x86_64__)
  if (cpu_has("avx2")) all.push_back(FASTMETA_TEST_ISA(avx2));
  if (cpu_has("avx512")) all.push_back(FASTMETA_TEST_ISA(avx512));
#endif
#undef FASTMETA_TEST_ISA
  return all;
}

struct Net {
  const char* name;
  const char* text;
  int64_t tasks, supports, queries, steps;
};
const std::vector<Net>& nets() {
  static const std::vector<Net> all{
      {"linear", "fm1;in=21;linear(0,w=f0,b=f1,out=19);tanh(1);linear(2,w=f2,out=33);loss=mse()", 3,
       5, 7, 2},
      // Weights in panels of several widths, whole and cut off.
      {"wide",
       "fm1;in=70;linear(0,w=f0,b=f1,out=75);gelu(1);linear(2,w=f2,b=f3,out=67);silu(3);"
       "linear(4,w=f4,b=f5,out=3);loss=cross_entropy(smoothing=0.1)",
       5, 9, 6, 2},
      {"narrow", "fm1;in=33;linear(0,w=f0,b=f1,out=3);tanh(1);linear(2,w=f2,b=f3,out=2);loss=mse()",
       4, 6, 5, 3},
      // factored.h: queries through products of the inputs, and through the whole last weight;
      // groups of several tasks.
      {"factored", "fm1;in=300;linear(0,w=f0,b=f1,out=40);tanh(1);linear(2,w=f2,out=4);loss=mse()",
       70, 3, 4, 3},
      {"factored_whole", "fm1;in=160;linear(0,w=f0,b=f1,out=5);loss=cross_entropy()", 70, 20, 60,
       6},
      {"frozen_body",
       "fm1;in=6;linear(0,w=s0,b=s1,out=176);tanh(1);linear(2,w=f0,b=f1,out=4);"
       "loss=huber(delta=0.8)",
       3, 12, 40, 6},
      {"convolutions",
       "fm1;in=3x7x6;conv2d(0,w=f0,b=f1,out=10,k=3x3,s=1x1,p=1x1,d=1x1,g=1);batch_norm(1,w=f2,b=f3)"
       ";"
       "softplus(2,beta=1,threshold=20);avg_pool(3,k=2x2);conv2d(4,w=f4,out=12,k=1x1,g=1);"
       "conv2d(5,w=f5,b=f6,out=8,k=2x2,s=2x1,p=1x0,d=1x1,g=4);sigmoid(6);mean_pool(7);flatten(8);"
       "linear(9,w=f7,b=f8,out=3);loss=cross_entropy()",
       3, 4, 5, 2},
      {"residual",
       "fm1;in=2x5x5;conv2d(0,w=f0,out=8,k=3x3,s=1x1,p=2x2,d=2x2,g=1);group_norm(1,w=f1,b=f2,"
       "groups="
       "2);"
       "tanh(2);conv2d(3,w=f3,b=f4,out=8,k=3x3,s=1x1,p=1x1,d=1x1,g=2);add(3+4);flatten(5);"
       "layer_norm(6,w=f5,b=f6);linear(7,w=f7,b=f8,out=2);loss=bce()",
       3, 3, 4, 2},
  };
  return all;
}

// Numbers in each parameter of one list, by the layers that use them.
std::vector<int64_t> counts(const Program& program, bool adapted) {
  std::vector<int64_t> all;
  const auto set = [&](const ParamRef& ref, int64_t numel) {
    if (!ref || ref.adapted != adapted) return;
    all.resize(std::max(all.size(), static_cast<size_t>(ref.index) + 1));
    all[ref.index] = numel;
  };
  for (const Node& n : program.nodes) {
    const bool product = n.kind == Kind::kLinear || n.kind == Kind::kConv2d;
    const int64_t weights = n.out.channels * (n.in.channels / n.groups) * n.k[0] * n.k[1];
    set(n.w, product ? weights : n.in.channels);
    set(n.b, n.out.channels);
  }
  return all;
}

// The tensors of a call, each in memory of its own size.
template <class T>
struct Tensors {
  using List = std::vector<std::vector<T>>;
  List fast, shared;
  std::vector<T> rates, support_x, query_x;
  std::vector<T> support_y, query_y;
  std::vector<int64_t> support_labels, query_labels;

  std::vector<std::vector<T>*> all() {
    std::vector<std::vector<T>*> found;
    for (List* list : {&fast, &shared}) {
      for (auto& t : *list) found.push_back(&t);
    }
    found.insert(found.end(), {&rates, &support_x, &query_x});
    return found;
  }
  template <class S>
  Tensors<S> as() const {
    Tensors<S> to;
    const auto convert = [](const std::vector<T>& from) {
      return std::vector<S>(from.begin(), from.end());
    };
    for (const auto& t : fast) to.fast.push_back(convert(t));
    for (const auto& t : shared) to.shared.push_back(convert(t));
    to.rates = convert(rates);
    to.support_x = convert(support_x);
    to.query_x = convert(query_x);
    to.support_y = convert(support_y);
    to.query_y = convert(query_y);
    to.support_labels = support_labels;
    to.query_labels = query_labels;
    return to;
  }
};

template <class T>
std::vector<const void*> pointers(const std::vector<std::vector<T>>& list) {
  std::vector<const void*> to;
  for (const auto& t : list) to.push_back(t.data());
  return to;
}
template <class T>
std::vector<void*> places(std::vector<std::vector<T>>& list) {
  std::vector<void*> to;
  for (auto& t : list) to.push_back(t.data());
  return to;
}

class Call {
 public:
  explicit Call(const Net& net) : net_(net), text_(net.text), program_(ProgramText::parse(text_)) {
    fast_ = counts(program_, true);
    shared_ = counts(program_, false);
  }

  int64_t outputs() const {
    return program_.shapes.back().channels * program_.shapes.back().pixels();
  }
  int64_t predictions() const { return net_.tasks * net_.queries * outputs(); }

  Tensors<double> draw(std::mt19937& random) const {
    Tensors<double> t;
    for (int64_t n : fast_) t.fast.push_back(normal<double>(random, n, 0.3));
    for (int64_t n : shared_) t.shared.push_back(normal<double>(random, n, 0.3));
    t.rates.assign(static_cast<size_t>(net_.steps) * fast_.size(), 0.1);
    for (double& r : t.rates) r += 0.02 * static_cast<double>(random() % 3);
    const int64_t row = program_.shapes.front().channels * program_.shapes.front().pixels();
    t.support_x = normal<double>(random, net_.tasks * net_.supports * row);
    t.query_x = normal<double>(random, net_.tasks * net_.queries * row);
    const auto labels = [&](int64_t rows) {
      std::vector<int64_t> y(static_cast<size_t>(net_.tasks * rows));
      for (int64_t& v : y) v = static_cast<int64_t>(random() % static_cast<unsigned>(outputs()));
      return y;
    };
    t.support_labels = labels(net_.supports);
    t.query_labels = labels(net_.queries);
    t.support_y = normal<double>(random, net_.tasks * net_.supports * outputs(), 0.4);
    t.query_y = normal<double>(random, predictions(), 0.4);
    return t;
  }

  // The mean query loss, and its gradients if there is room for them.
  template <class T>
  T meta_step(const Isa& isa, ParallelFor par, const Tensors<T>& in, Tensors<T>* out) const {
    T loss = 0;
    const auto fast = pointers(in.fast), shared = pointers(in.shared);
    Adapt args = arguments(in, fast, shared);
    args.loss = &loss;
    std::vector<void*> to_fast, to_shared;
    isa.meta_step(args, gradients(out, &to_fast, &to_shared), par);
    return loss;
  }

  // <prediction, u> + <adapted, v>, by forward and, if there is room, backward.
  template <class T>
  T adapt(const Isa& isa, ParallelFor par, const Tensors<T>& in, const std::vector<T>& u,
          const std::vector<std::vector<T>>& v, Tensors<T>* out) const {
    const auto fast = pointers(in.fast), shared = pointers(in.shared);
    Adapt args = arguments(in, fast, shared);
    std::vector<T> prediction(u.size()), trajectory;
    std::vector<std::vector<T>> adapted;
    int64_t numbers = 0;
    for (int64_t n : fast_) {
      adapted.emplace_back(static_cast<size_t>(net_.tasks * n));
      numbers += n;
    }
    trajectory.resize(static_cast<size_t>(net_.tasks * net_.steps * numbers));
    const auto to_adapted = places(adapted);
    args.prediction = prediction.data();
    args.adapted = to_adapted.data();
    args.trajectory = trajectory.data();
    isa.adapt(args, par);
    T sum = 0;
    for (size_t i = 0; i < u.size(); ++i) sum += prediction[i] * u[i];
    for (size_t k = 0; k < v.size(); ++k) {
      for (size_t i = 0; i < v[k].size(); ++i) sum += adapted[k][i] * v[k][i];
    }
    if (out == nullptr) return sum;
    args.prediction = nullptr;
    args.adapted = nullptr;
    std::vector<void*> to_fast, to_shared;
    AdaptGradients back = gradients(out, &to_fast, &to_shared);
    const auto from_adapted = pointers(v);
    back.prediction = u.data();
    back.adapted = from_adapted.data();
    isa.backward(args, back, par);
    return sum;
  }

 private:
  template <class T>
  Adapt arguments(const Tensors<T>& in, const std::vector<const void*>& fast,
                  const std::vector<const void*>& shared) const {
    const bool labels = program_.loss.kind == LossKind::kCrossEntropy;
    Adapt args{};
    args.dtype = dtype_of<T>();
    args.program = &program_;
    args.num_fast = static_cast<int64_t>(fast.size());
    args.num_shared = static_cast<int64_t>(shared.size());
    args.fast_numel = fast_.data();
    args.shared_numel = shared_.data();
    args.fast = fast.data();
    args.shared = shared.data();
    args.tasks = net_.tasks;
    args.supports = net_.supports;
    args.queries = net_.queries;
    args.steps = net_.steps;
    args.rates = in.rates.data();
    args.rate_rows = net_.steps;
    args.rate_cols = args.num_fast;
    args.support_x = in.support_x.data();
    args.query_x = in.query_x.data();
    args.support_y = labels ? static_cast<const void*>(in.support_labels.data())
                            : static_cast<const void*>(in.support_y.data());
    args.query_y = labels ? static_cast<const void*>(in.query_labels.data())
                          : static_cast<const void*>(in.query_y.data());
    return args;
  }

  template <class T>
  static AdaptGradients gradients(Tensors<T>* out, std::vector<void*>* fast,
                                  std::vector<void*>* shared) {
    AdaptGradients to{};
    if (out == nullptr) return to;
    *fast = places(out->fast);
    *shared = places(out->shared);
    to.fast = fast->data();
    to.shared = shared->data();
    to.rates = out->rates.data();
    to.support_x = out->support_x.data();
    to.query_x = out->query_x.data();
    return to;
  }

  const Net& net_;
  const std::string text_;
  const Program program_;
  std::vector<int64_t> fast_, shared_;
};

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// The gradients along a random direction of each tensor in turn.
template <class F>
void expect_gradients(std::mt19937& random, Tensors<double> in, Tensors<double>* out, F value) {
  constexpr double kStep = 1e-5;
  const auto tensors = in.all(), found = out->all();
  for (size_t k = 0; k < tensors.size(); ++k) {
    std::vector<double>& x = *tensors[k];
    const std::vector<double> here = x;
    const auto d = normal<double>(random, static_cast<int64_t>(x.size()));
    const auto at = [&](double by) {
      for (size_t i = 0; i < x.size(); ++i) x[i] = here[i] + by * d[i];
      return value(in);
    };
    const double want = (at(kStep) - at(-kStep)) / (2 * kStep);
    x = here;
    double size = 0;
    for (double g : *found[k]) size += std::abs(g);
    EXPECT_NEAR(dot(*found[k], d), want, 1e-6 * (1e-2 + size)) << "tensor " << k;
  }
}

template <class T>
void expect_same_bits(Tensors<T>* a, Tensors<T>* b) {
  const auto first = a->all(), second = b->all();
  for (size_t k = 0; k < first.size(); ++k) {
    EXPECT_TRUE(same_bits(*first[k], *second[k])) << "tensor " << k;
  }
}

TEST(EngineAdapt, MetaStep) {
  for (const Isa& isa : isas()) {
    for (const Net& net : nets()) {
      SCOPED_TRACE(std::string(isa.name) + ", " + net.name);
      std::mt19937 random(1);
      const Call call(net);
      const Tensors<double> in = call.draw(random);
      Tensors<double> out = in;
      const double loss = call.meta_step(isa, serial_for, in, &out);
      const auto value = [&](const Tensors<double>& at) {
        return call.meta_step<double>(isa, serial_for, at, nullptr);
      };
      EXPECT_NEAR(loss, value(in), 1e-13 * (1 + std::abs(loss)));
      expect_gradients(random, in, &out, value);
      for (const ParallelFor par : schedules()) {
        Tensors<double> again = in;
        EXPECT_EQ(call.meta_step(isa, par, in, &again), loss);
        expect_same_bits(&again, &out);
      }
      Tensors<float> single = in.as<float>();
      EXPECT_NEAR(call.meta_step(isa, serial_for, in.as<float>(), &single), loss,
                  1e-4 * (1 + std::abs(loss)));
      const auto exact = out.all();
      const auto rounded = single.all();
      for (size_t k = 0; k < exact.size(); ++k) {
        double error = 0, size = 0;
        for (size_t i = 0; i < exact[k]->size(); ++i) {
          error += std::abs(static_cast<double>((*rounded[k])[i]) - (*exact[k])[i]);
          size += std::abs((*exact[k])[i]);
        }
        EXPECT_LE(error, 1e-3 * (1e-2 + size)) << "tensor " << k;
      }
    }
  }
}

TEST(EngineAdapt, ForwardAndBackward) {
  for (const Isa& isa : isas()) {
    for (const Net& net : nets()) {
      SCOPED_TRACE(std::string(isa.name) + ", " + net.name);
      std::mt19937 random(2);
      const Call call(net);
      const Tensors<double> in = call.draw(random);
      const auto u = normal<double>(random, call.predictions(), 0.1);
      std::vector<std::vector<double>> v;
      for (const auto& t : in.fast) {
        v.push_back(normal<double>(random, net.tasks * static_cast<int64_t>(t.size()), 0.1));
      }
      Tensors<double> out = in;
      call.adapt(isa, serial_for, in, u, v, &out);
      expect_gradients(random, in, &out, [&](const Tensors<double>& at) {
        return call.adapt<double>(isa, serial_for, at, u, v, nullptr);
      });
      for (const ParallelFor par : schedules()) {
        Tensors<double> again = in;
        call.adapt(isa, par, in, u, v, &again);
        expect_same_bits(&again, &out);
      }
    }
  }
}

}  // namespace
}  // namespace fastmeta::engine
