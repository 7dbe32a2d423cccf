// From scores to coefficients of the gradients: dL/dz of a tile of scores, with the tables of a
// panel.
#pragma once
#include <cstdint>

#include "matching/matching_cpu_plan.h"

namespace fastmeta::matching::FASTMETA_ISA {

// A panel of queries in the backward.
template <class A>
struct GradientPanel {
  int vectors, count;
  int64_t query;
  A* packed;
  A* terms;
  A *off,
      *amplitude;  // attention: [classes of the job, lanes]; nll: [2, lanes]: other classes, target
  A* own;          // per lane, what the query's own vector receives (negative)
  IntVec<A>* targets;
  const A** rows;  // query rows in accumulation type
  A** grad;        // gradient rows
};

// Rows [0, count) of src ([.., C]) at classes [c, c + n) into dst[class][lane].
template <class A>
static void load_classes(const A* src, int64_t classes, int count, int lanes, int64_t c, int64_t n,
                         A* dst) {
  pack_transposed(src + c, classes, n, count, lanes, dst);
}

// out[lane] = sum of grad over the classes with support.
template <class A>
static void sum_gradients(const A* grad, const int64_t* start, int64_t classes, int count,
                          int lanes, A* out) {
  constexpr int kW = kWidth<A>;
  alignas(64) A block[kW * kMaxVectors * kW];
  for (int l = 0; l < lanes; ++l) out[l] = 0;
  for (int64_t c = 0; c < classes; c += kW) {
    const int64_t n = min_of<int64_t>(kW, classes - c);
    load_classes<A>(grad, classes, count, lanes, c, n, block);
    for (int l = 0; l < lanes; l += kW) {
      Vec<A> sum{};
      for (int64_t k = 0; k < n; ++k) {
        if (start[c + k] < start[c + k + 1]) sum += load(block + k * lanes + l);
      }
      store(out + l, load(out + l) + sum);
    }
  }
}

// off and amplitude of classes [c0, c1) for a panel.
template <class A>
static void class_tables(const A* grad, const A* out, const A* lse, const A* grad_sum,
                         int64_t classes, int64_t c0, int64_t c1, int count, int lanes, A* off,
                         A* amplitude) {
  constexpr int kW = kWidth<A>;
  load_classes<A>(out, classes, count, lanes, c0, c1 - c0, off);
  load_classes<A>(grad, classes, count, lanes, c0, c1 - c0, amplitude);
  for (int l = 0; l < lanes; l += kW) {
    const int n = max_of(0, min_of(kW, count - l));
    const Vec<A> base = n > 0 ? load_n(lse + l, n) : Vec<A>{};
    Vec<A> live{};
    for (int k = 0; k < n; ++k) live[k] = 1;
    const Vec<A> sum = load(grad_sum + l);
    for (int64_t k = 0; k < c1 - c0; ++k) {
      A *o = off + k * lanes + l, *a = amplitude + k * lanes + l;
      const Vec<A> logp = load(o);
      const Vec<A> x = load(a) - vexp<A>(logp) * sum;
      // A class of probability 0 takes no gradient, and lanes past the queries weigh nothing.
      const Vec<A> zero{}, infinity = splat<A>(Const<A>::kInfinity);
      const Vec<A> o2 = (base + logp) * Const<A>::kLog2e;
      store(a, logp == -infinity ? zero : (live > A(0) ? x : zero));
      store(o, logp == -infinity ? infinity : (live > A(0) ? o2 : infinity));
    }
  }
}

// nll: dL/dz = g * p for the classes other than the target's, and -g (1 - P) * w for the target's.
template <class A>
static void target_tables(const A* grad, const A* nll, const A* lse, const int64_t* targets,
                          int64_t classes, int count, int lanes, A* off, A* amplitude) {
  for (int l = 0; l < lanes; ++l) {
    off[l] = off[lanes + l] = Const<A>::kInfinity;
    amplitude[l] = amplitude[lanes + l] = 0;
    if (l >= count || static_cast<uint64_t>(targets[l]) >= static_cast<uint64_t>(classes)) continue;
    if (nll[l] == Const<A>::kInfinity) continue;
    off[l] = lse[l] * Const<A>::kLog2e;
    off[lanes + l] = (lse[l] - nll[l]) * Const<A>::kLog2e;
    amplitude[l] = grad[l];
    amplitude[lanes + l] = grad[l] * static_cast<A>(__builtin_expm1(-static_cast<double>(nll[l])));
  }
}

// Turns similarities into coefficients of the gradients, in place, for sorted supports
// [begin, begin + n). row_own[r] (a vector) collects what support r's own vector receives.
// Returns sum dz * similarity.
template <class A, Similarity kSim, int NV>
static double coefficients(const GradientPanel<A>& x, const int64_t* start, int64_t first_class,
                           int64_t table_class, bool nll, int64_t begin, int64_t n, const A* terms,
                           A scale, A* tile, Vec<A>* row_own) {
  constexpr int kW = kWidth<A>, kL = NV * kW;
  constexpr bool kOwn = kSim == Similarity::kCosine || kSim == Similarity::kSqEuclidean;
  const A factor = scale * Const<A>::kLog2e;
  Vec<A> own[NV] = {}, lane[NV] = {}, scale_sum[NV] = {};
  if constexpr (kSim == Similarity::kCosine) {
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) lane[v] = load(x.terms + v * kW);
  }
  int64_t c = first_class;
  for (int64_t i = begin; i < begin + n; ++c) {
    const int64_t end = min_of(start[c + 1], begin + n);
    if (end <= i) continue;
    Vec<A> off[NV], amplitude[NV];
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) {
      if (nll) {
        const IntVec<A> id = IntVec<A>{} + static_cast<decltype(IntVec<A>{}[0] + 0)>(c);
        const auto hit = x.targets[v] == id;
        off[v] = hit ? load(x.off + kL + v * kW) : load(x.off + v * kW);
        amplitude[v] = hit ? load(x.amplitude + kL + v * kW) : load(x.amplitude + v * kW);
      } else {
        off[v] = load(x.off + (c - table_class) * kL + v * kW);
        amplitude[v] = load(x.amplitude + (c - table_class) * kL + v * kW);
      }
    }
    for (; i < end; ++i) {
      A* t = tile + (i - begin) * kL;
      Vec<A> row{};
      FASTMETA_UNROLL
      for (int v = 0; v < NV; ++v) {
        const Vec<A> sim = load(t + v * kW);
        const Vec<A> dz = vexp2<A>(sim * factor - off[v]) * amplitude[v];
        scale_sum[v] += dz * sim;
        Vec<A> g = dz * scale;
        if constexpr (kSim == Similarity::kCosine) {
          const Vec<A> along = g * sim;
          own[v] += along;
          row += along;
          g *= lane[v] * terms[i - begin];
        } else if constexpr (kSim == Similarity::kSqEuclidean) {
          g += g;
          own[v] += g;
          row += g;
        } else if constexpr (kSim == Similarity::kEuclidean) {
          const Vec<A> zero{};
          g = sim == A(0) ? zero : g / -sim;
        }
        store(t + v * kW, g);
      }
      if constexpr (kOwn) row_own[i - begin] += row;
    }
  }
  Vec<A> total{};
  FASTMETA_UNROLL
  for (int v = 0; v < NV; ++v) {
    total += scale_sum[v];
    if constexpr (kOwn) store(x.own + v * kW, load(x.own + v * kW) + own[v]);
  }
  return static_cast<double>(hsum<A>(total));
}

template <class A, int NV>
static double coefficients_of(Similarity similarity, const GradientPanel<A>& x,
                              const int64_t* start, int64_t first_class, int64_t table_class,
                              bool nll, int64_t begin, int64_t n, const A* terms, A scale, A* tile,
                              Vec<A>* row_own) {
  switch (similarity) {
#define FASTMETA_CASE(name)                                                                      \
  case Similarity::name:                                                                         \
    return coefficients<A, Similarity::name, NV>(x, start, first_class, table_class, nll, begin, \
                                                 n, terms, scale, tile, row_own);
    FASTMETA_CASE(kDot)
    FASTMETA_CASE(kCosine)
    FASTMETA_CASE(kSqEuclidean)
    FASTMETA_CASE(kEuclidean)
    FASTMETA_CASE(kAdditive)
#undef FASTMETA_CASE
  }
  return 0;
}

}  // namespace fastmeta::matching::FASTMETA_ISA
