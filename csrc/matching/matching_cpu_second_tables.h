// Tables of a panel per class in the double backward: where the shares start from, and what turns
// them into g and h.
#pragma once
#include <cstdint>

#include "matching/matching_cpu_second.h"

namespace fastmeta::matching::FASTMETA_ISA {

// Of one task, for classes [c0, c1).
template <class A>
struct SecondTables {
  static constexpr int kW = kWidth<A>, kMaxLanes = kMaxVectors * kW;

  const DoubleBackward& args;
  const Problem& p;
  int64_t task;
  bool nll;
  const int64_t* start;
  int64_t c0, c1;
  A *moves, *references;  // per lane M and the reference, from the first pass to the second

  int64_t first_row(const SecondPanel<A>& x) const { return task * p.num_queries + x.query; }

  // off and amplitude per class; the table `one` starts at zero.
  void open_classes(const SecondPanel<A>& x) const {
    const int width = x.vectors * kW;
    const A* out = static_cast<const A*>(args.out) + first_row(x) * p.num_classes;
    const A* lse = static_cast<const A*>(args.lse) + first_row(x);
    load_classes<A>(out, p.num_classes, x.count, width, c0, c1 - c0, x.off);
    for (int l = 0; l < width; l += kW) {
      const int n = max_of(0, min_of(kW, x.count - l));
      const Vec<A> base = n > 0 ? load_n(lse + l, n) : Vec<A>{};
      Vec<A> live{};
      for (int k = 0; k < n; ++k) live[k] = 1;
      const Vec<A> zero{}, infinity = splat<A>(Const<A>::kInfinity);
      for (int64_t k = 0; k < c1 - c0; ++k) {
        const Vec<A> logp = load(x.off + k * width + l);
        const auto absent = (logp == -infinity) | (live == A(0));
        store(x.off + k * width + l, absent ? infinity : (base + logp) * Const<A>::kLog2e);
        store(x.amplitude + k * width + l, absent ? zero : splat<A>(A(1)));
        store(x.one + k * width + l, zero);
      }
    }
  }
  void open_targets(const SecondPanel<A>& x) const {
    const int width = x.vectors * kW;
    const A* loss = static_cast<const A*>(args.out) + first_row(x);
    const A* lse = static_cast<const A*>(args.lse) + first_row(x);
    for (int l = 0; l < width; ++l) {
      const bool counts = counted(x, l);
      x.off[l] = counts ? lse[l] * Const<A>::kLog2e : Const<A>::kInfinity;
      x.off[width + l] = counts ? (lse[l] - loss[l]) * Const<A>::kLog2e : Const<A>::kInfinity;
      x.amplitude[l] = x.amplitude[width + l] = counts ? A(1) : A(0);
      x.one[l] = x.one[width + l] = 0;
    }
  }
  // nll: whether the query's loss depends on anything.
  bool counted(const SecondPanel<A>& x, int l) const {
    if (l >= x.count || x.targets[l / kW][l % kW] < 0) return false;
    return static_cast<const A*>(args.out)[first_row(x) + l] != Const<A>::kInfinity;
  }

  // End of the first pass: M, and dL/dG = m - M. Classes are those of the whole task.
  void close_moves(const SecondPanel<A>& x) const {
    const int width = x.vectors * kW;
    convert_row(x.reference, width, references + x.query);
    A* move = moves + x.query;
    A* out = static_cast<A*>(args.grad_grad) + first_row(x) * (nll ? 1 : p.num_classes);
    if (nll) {
      const A* loss = static_cast<const A*>(args.out) + first_row(x);
      for (int l = 0; l < width; ++l) {
        const bool counts = counted(x, l);
        move[l] = counts ? x.one[l] + exp_of(-loss[l]) * x.one[width + l] : A(0);
        if (l < x.count) out[l] = counts ? move[l] - x.one[width + l] : A(0);
      }
      return;
    }
    const A* logp = static_cast<const A*>(args.out) + first_row(x) * p.num_classes;
    load_classes<A>(logp, p.num_classes, x.count, width, 0, p.num_classes, x.two);
    for (int l = 0; l < width; l += kW) {
      Vec<A> sum{};
      for (int64_t c = 0; c < p.num_classes; ++c) {
        sum += vexp<A>(load(x.two + c * width + l)) * load(x.one + c * width + l);
      }
      store(move + l, sum);
      for (int64_t c = 0; c < p.num_classes; ++c) {
        const int64_t at = c * width + l;
        const Vec<A> zero{}, live = load(x.amplitude + at);
        store(x.one + at, live == A(0) ? zero : load(x.one + at) - sum);
      }
    }
    unpack_transposed<A>(x.one, width, p.num_classes, x.count, out, p.num_classes);
  }
  static A exp_of(A x) { return vexp<A>(splat<A>(x))[0]; }

  // Start of the second pass: a = G - P H and b = G (m - M) + a M.
  void open_gradients(const SecondPanel<A>& x) const {
    const int width = x.vectors * kW;
    convert_row(references + x.query, width, x.reference);
    const A* move = moves + x.query;
    const int64_t row = first_row(x) * (nll ? 1 : p.num_classes);
    const A* grad = static_cast<const A*>(args.grad) + row;
    const A* out = static_cast<const A*>(args.out) + row;
    const A* from = static_cast<const A*>(args.grad_grad) + row;
    if (nll) {
      for (int l = 0; l < width; ++l) {
        const bool counts = counted(x, l);
        const A g = counts ? grad[l] : A(0);
        const A left =
            counts ? static_cast<A>(__builtin_expm1(-static_cast<double>(out[l]))) : A(0);
        x.one[l] = g;
        x.one[width + l] = g * left;
        x.two[l] = g * move[l];
        x.two[width + l] = (counts ? g * from[l] : A(0)) + x.one[width + l] * move[l];
      }
      return;
    }
    alignas(64) A grad_sum[kMaxLanes];
    sum_gradients<A>(grad, start, p.num_classes, x.count, width, grad_sum);
    load_classes<A>(grad, p.num_classes, x.count, width, c0, c1 - c0, x.one);
    load_classes<A>(from, p.num_classes, x.count, width, c0, c1 - c0, x.two);
    alignas(64) A logp[kW * kMaxLanes];
    for (int64_t c = c0; c < c1; c += kW) {
      const int64_t n = min_of<int64_t>(kW, c1 - c);
      load_classes<A>(out, p.num_classes, x.count, width, c, n, logp);
      for (int64_t k = 0; k < n; ++k) {
        for (int l = 0; l < width; l += kW) {
          const int64_t at = (c - c0 + k) * width + l;
          const Vec<A> zero{}, live = load(x.amplitude + at), g = load(x.one + at);
          const Vec<A> a = g - vexp<A>(load(logp + k * width + l)) * load(grad_sum + l);
          store(x.one + at, live == A(0) ? zero : a);
          store(x.two + at, live == A(0) ? zero : g * load(x.two + at) + a * load(move + l));
        }
      }
    }
  }
};

}  // namespace fastmeta::matching::FASTMETA_ISA
