// From scores to coefficients of the gradients: dL/dz of a tile of scores, with the tables of a
// panel.
#pragma once
#include <cstdint>

#include "matching/matching_cpu_plan.h"

namespace fastmeta::matching::FASTMETA_ISA {

// Private partial gradients of all chunks together.
constexpr int64_t kPartialBytes = int64_t{8} << 20;

// Into how many chunks a task's queries or supports are split.
template <class A>
static int64_t gradient_chunks(const Problem& p, bool split_queries, int64_t panels) {
  const int64_t larger = split_queries ? panels : p.num_supports / 256;
  const int64_t row_bytes = static_cast<int64_t>(sizeof(A)) * max_of<int64_t>(1, p.dim) *
                            p.num_tasks * max_of<int64_t>(1, min_of(p.num_queries, p.num_supports));
  // Large partials: fewer chunks, but enough for a few threads.
  const int64_t fit = max_of<int64_t>(kPartialBytes / row_bytes, ceil_div(4, p.num_tasks));
  return max_of<int64_t>(1, min_of(min_of(jobs_per_task(p), larger), fit));
}

// What the forward kept of task t: similarities of sorted supports [at, at + n) with a panel of NV
// vectors that begins at query `begin`.
template <class A, int NV>
static void load_scores(const Backward& args, int64_t t, int64_t at, int64_t n, int64_t begin,
                        A* tile) {
  constexpr int kW = kWidth<A>;
  const Problem& p = args.problem;
  const int64_t lanes = kept_lanes(p);
  const A* from = static_cast<const A*>(args.scores) + (t * p.num_supports + at) * lanes + begin;
  for (int64_t r = 0; r < n; ++r) {
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) store(tile + (r * NV + v) * kW, load(from + r * lanes + v * kW));
  }
}

// Adds up the partials [T, chunks, Q or S, D] of one row of all tasks, in the order of the chunks.
// split_queries: the rows are supports, and padding gets zero.
template <class S>
static void add_partials(const Problem& p, bool split_queries, int64_t chunks, const void* partial,
                         int64_t row, void* grad) {
  using A = Acc<S>;
  constexpr int kW = kWidth<A>;
  const int64_t rows = split_queries ? p.num_supports : p.num_queries;
  const int64_t t = row / rows, i = row % rows;
  S* out = static_cast<S*>(grad) + row * p.dim;
  if (split_queries &&
      static_cast<uint64_t>(p.labels[row]) >= static_cast<uint64_t>(p.num_classes)) {
    return zero_row(out, p.dim);
  }
  const A* from = static_cast<const A*>(partial) + (t * chunks * rows + i) * p.dim;
  for (int64_t d = 0; d < p.dim; d += kW) {
    const int n = static_cast<int>(min_of<int64_t>(kW, p.dim - d));
    Vec<A> sum{};
    for (int64_t k = 0; k < chunks; ++k) sum += load_n(from + k * rows * p.dim + d, n);
    store_n(out + d, sum, n);
  }
}

// Sums of the jobs of each task, in order: of the scale's gradient and, additive, the weight's.
template <class A>
static void add_job_sums(const Problem& p, int64_t chunks, const double* scale, const void* weight,
                         void* grad_scale, void* grad_weight) {
  for (int64_t t = 0; t < p.num_tasks; ++t) {
    double total = 0;
    for (int64_t k = 0; k < chunks; ++k) total += scale[t * chunks + k];
    static_cast<A*>(grad_scale)[t] = static_cast<A>(total);
    if (p.similarity != Similarity::kAdditive) continue;
    A* out = static_cast<A*>(grad_weight) + t * p.dim;
    const A* from = static_cast<const A*>(weight) + t * chunks * p.dim;
    for (int64_t d = 0; d < p.dim; ++d) {
      double sum = 0;
      for (int64_t k = 0; k < chunks; ++k) sum += static_cast<double>(from[k * p.dim + d]);
      out[d] = static_cast<A>(sum);
    }
  }
}

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

// dL/dz of sorted supports [begin, begin + n) from their similarities. Shares within a class that
// lies whole in the block are normalised by its own sum, so that they add up to 1 however large the
// scores: lse and logp carry the rounding of numbers as large as the scores themselves, an error
// common to the class that would not cancel. Classes cut by the block take their log-sum-exp from
// lse and logp.
template <class A, int NV>
static __attribute__((noinline)) void class_weights(const GradientPanel<A>& x, const int64_t* start,
                                                    int64_t first_class, int64_t table_class,
                                                    int64_t begin, int64_t n, A factor,
                                                    const A* tile, A* weights) {
  constexpr int kW = kWidth<A>, kL = NV * kW;
  int64_t c = first_class;
  for (int64_t i = begin; i < begin + n; ++c) {
    const int64_t end = min_of(start[c + 1], begin + n);
    if (end <= i) continue;
    const A* sim = tile + (i - begin) * kL;
    A* out = weights + (i - begin) * kL;
    const int64_t count = end - i;
    const bool complete = i == start[c] && end == start[c + 1];
    i = end;
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int64_t at = (c - table_class) * kL + v * kW;
      const Vec<A> amplitude = load(x.amplitude + at);
      if (complete && count == 1) {
        store(out + v * kW, amplitude);
        continue;
      }
      Vec<A> most = load(x.off + at), share = amplitude;
      if (complete) {
        most = splat<A>(Const<A>::kLowest);
        for (int64_t r = 0; r < count; ++r)
          most = vmax<A>(most, load(sim + r * kL + v * kW) * factor);
        most = vmax<A>(splat<A>(Const<A>::kLowest), most);
        Vec<A> sum{};
        for (int64_t r = 0; r < count; ++r) {
          const Vec<A> e = vexp2<A>(load(sim + r * kL + v * kW) * factor - most);
          sum += e;
          store(out + r * kL + v * kW, e);
        }
        const Vec<A> zero{};
        share = sum == A(0) ? zero : amplitude / sum;
        for (int64_t r = 0; r < count; ++r) {
          store(out + r * kL + v * kW, load(out + r * kL + v * kW) * share);
        }
        continue;
      }
      for (int64_t r = 0; r < count; ++r) {
        store(out + r * kL + v * kW, vexp2<A>(load(sim + r * kL + v * kW) * factor - most) * share);
      }
    }
  }
}

// The same for nll. all: the block holds every support of the task, which normalises exactly.
template <class A, int NV>
static __attribute__((noinline)) void target_weights(const GradientPanel<A>& x,
                                                     const int64_t* start, int64_t first_class,
                                                     int64_t begin, int64_t n, bool all, A factor,
                                                     const A* tile, A* weights) {
  constexpr int kW = kWidth<A>, kL = NV * kW;
  for (int v = 0; v < NV; ++v) {
    const A* sim = tile + v * kW;
    A* out = weights + v * kW;
    const auto maximum = [&](int64_t from, int64_t to) {
      Vec<A> most = splat<A>(Const<A>::kLowest);
      for (int64_t i = from; i < to; ++i)
        most = vmax<A>(most, load(sim + (i - begin) * kL) * factor);
      return vmax<A>(splat<A>(Const<A>::kLowest), most);
    };
    Vec<A> others = load(x.off + v * kW), scale_others = load(x.amplitude + v * kW);
    Vec<A> scale_target = load(x.amplitude + kL + v * kW);
    if (all) others = maximum(begin, begin + n);
    Vec<A> sum{}, target_sum{};
    const Vec<A> zero{};
    for (int pass = 0; pass < 2; ++pass) {
      int64_t c = first_class;
      for (int64_t i = begin; i < begin + n; ++c) {
        const int64_t end = min_of(start[c + 1], begin + n);
        if (end <= i) continue;
        const auto hit = x.targets[v] == IntVec<A>{} + static_cast<decltype(IntVec<A>{}[0] + 0)>(c);
        if (pass == 0) {
          const Vec<A> own = all ? maximum(i, end) : load(x.off + kL + v * kW);
          const Vec<A> most = hit ? own : others;
          Vec<A> run{};
          for (int64_t r = i; r < end; ++r) {
            const Vec<A> e = vexp2<A>(load(sim + (r - begin) * kL) * factor - most);
            run += e;
            store(out + (r - begin) * kL, e);
          }
          if (all) {
            sum += hit ? run * vexp2<A>(own - others) : run;
            target_sum = hit ? run : target_sum;
          }
        } else {
          const Vec<A> share = hit ? scale_target : scale_others;
          for (int64_t r = i; r < end; ++r) {
            store(out + (r - begin) * kL, load(out + (r - begin) * kL) * share);
          }
        }
        i = end;
      }
      if (all && pass == 0) {
        scale_others = sum == A(0) ? zero : scale_others / sum;
        scale_target = target_sum == A(0) ? zero : scale_target / target_sum;
      }
    }
  }
}

// The sum of vectors over those lanes that have a query: similarities to none may be infinite, and
// their products with 0 NaN.
template <class A, int NV>
FASTMETA_INLINE double sum_over_queries(const Vec<A> (&sum)[NV], int count) {
  constexpr int kW = kWidth<A>;
  alignas(64) A lanes[NV * kW];
  FASTMETA_UNROLL
  for (int v = 0; v < NV; ++v) store(lanes + v * kW, sum[v]);
  for (int l = count; l < NV * kW; ++l) lanes[l] = A(0);
  Vec<A> total{};
  FASTMETA_UNROLL
  for (int v = 0; v < NV; ++v) total += load(lanes + v * kW);
  return static_cast<double>(hsum<A>(total));
}

// From dL/dz (weights) and similarities (tile) to the coefficients of the gradients, into the tile,
// for n supports. row_own[r] (a vector) collects what support r's own vector receives. Returns sum
// dL/dz * similarity.
template <class A, Similarity kSim, int NV>
static __attribute__((noinline)) double coefficients(const GradientPanel<A>& x, int64_t n,
                                                     const A* terms, A scale, const A* weights,
                                                     A* tile, Vec<A>* row_own) {
  constexpr int kW = kWidth<A>, kL = NV * kW;
  constexpr bool kOwn = kSim == Similarity::kCosine || kSim == Similarity::kSqEuclidean;
  Vec<A> own[NV] = {}, lane[NV] = {}, scale_sum[NV] = {};
  if constexpr (kSim == Similarity::kCosine) {
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) lane[v] = load(x.terms + v * kW);
  }
  for (int64_t r = 0; r < n; ++r) {
    A* t = tile + r * kL;
    Vec<A> row{};
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) {
      const Vec<A> sim = load(t + v * kW), dz = load(weights + r * kL + v * kW);
      scale_sum[v] += dz * sim;
      Vec<A> g = dz * scale;
      if constexpr (kSim == Similarity::kCosine) {
        const Vec<A> along = g * sim;
        own[v] += along;
        row += along;
        g *= lane[v] * terms[r];
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
    if constexpr (kOwn) row_own[r] += row;
  }
  if constexpr (kOwn) {
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) store(x.own + v * kW, load(x.own + v * kW) + own[v]);
  }
  return sum_over_queries<A>(scale_sum, x.count);
}

template <class A, int NV>
static double coefficients_of(Similarity similarity, const GradientPanel<A>& x, int64_t n,
                              const A* terms, A scale, const A* weights, A* tile, Vec<A>* row_own) {
  switch (similarity) {
#define FASTMETA_CASE(name) \
  case Similarity::name:    \
    return coefficients<A, Similarity::name, NV>(x, n, terms, scale, weights, tile, row_own);
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
