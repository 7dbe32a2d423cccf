// Second derivatives: derivatives of similarities along directions, and what becomes of them.
//
// A tile holds, per pair, the similarity, its derivative d along the directions and the share w of
// the support in its class; from these come g = dL/dz' and h = dL/dz (matching_attention.h) and the
// coefficients of the gradients.
#pragma once
#include <cstdint>

#include "matching/matching_cpu_gradient.h"

namespace fastmeta::matching::FASTMETA_ISA {

// A panel of queries in the double backward. Of the tables, `amplitude` (of GradientPanel) is 1, so
// that the weights are the shares themselves.
//
// Neither g nor h changes when a query's scores, or their derivatives, all move by one number;
// their sums over the supports are 0. Similarities are therefore taken relative to the first
// support's, `reference`, wherever they are multiplied by numbers that sum to 0.
template <class A>
struct SecondPanel : GradientPanel<A> {
  A* reference;
  A* packed_dot;
  A* stretch;    // per lane <q, q'>, under cosine times a^2
  A* own_dot;    // what the query's direction receives (negative)
  A *one, *two;  // tables: m in the first pass; a = G - P H and b = G (m - M) + a M in the second
  A* move;       // per lane M
  const A** rows_dot;
};

template <class A>
struct Directions {
  Similarity similarity;
  const A *row, *row_stretch;    // inverse norms (cosine) and <s, s'> per support
  const A *lane, *lane_stretch;  // the same per query
};

// d of n supports from the inner products <q', s> + <q, s'> in `tangent`; sims as score_block made
// them.
template <class A, int NV>
static void finish_tangent(const Directions<A>& x, int64_t n, const A* sims, A* tangent) {
  constexpr int kW = kWidth<A>, kL = NV * kW;
  if (x.similarity == Similarity::kDot) return;
  for (int64_t r = 0; r < n; ++r) {
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) {
      A* at = tangent + r * kL + v * kW;
      const Vec<A> stretch = load(x.lane_stretch + v * kW) + x.row_stretch[r];
      Vec<A> d = load(at);
      if (x.similarity == Similarity::kCosine) {
        d = d * x.row[r] * load(x.lane + v * kW) - load(sims + r * kL + v * kW) * stretch;
      } else {
        d = A(2) * (d - stretch);
      }
      store(at, d);
    }
  }
}

// Euclidean: d = -<q - s, q' - s'> / |q - s|, 0 at coincident points. A direction may be nullptr.
template <class A, int NV>
static void tangent_euclidean(const A* const* rows, const A* const* rows_dot, int64_t n,
                              const A* panel, const A* panel_dot, int64_t dim, const A* sims,
                              A* tangent) {
  constexpr int kW = kWidth<A>, kL = NV * kW;
  for (int64_t r = 0; r < n; ++r) {
    Vec<A> sum[NV] = {};
    for (int64_t d = 0; d < dim; ++d) {
      const Vec<A> s = splat<A>(rows[r][d]);
      const Vec<A> s_dot = splat<A>(rows_dot == nullptr ? A(0) : rows_dot[r][d]);
      FASTMETA_UNROLL
      for (int v = 0; v < NV; ++v) {
        const int64_t at = d * kL + v * kW;
        const Vec<A> dot = panel_dot == nullptr ? -s_dot : load(panel_dot + at) - s_dot;
        sum[v] += (load(panel + at) - s) * dot;
      }
    }
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) {
      const Vec<A> sim = load(sims + r * kL + v * kW), zero{};
      store(tangent + r * kL + v * kW, sim == A(0) ? zero : sum[v] / sim);
    }
  }
}

// Additive: d = sum of (1 - u^2) (q' + s') weight + u weight', u = tanh(q + s).
template <class A, int NV>
static void tangent_additive(const A* const* rows, const A* const* rows_dot, int64_t n,
                             const A* panel, const A* panel_dot, int64_t dim, const A* weight,
                             const A* weight_dot, A* tangent) {
  constexpr int kW = kWidth<A>, kL = NV * kW;
  for (int64_t r = 0; r < n; ++r) {
    Vec<A> sum[NV] = {};
    for (int64_t d = 0; d < dim; ++d) {
      const A s_dot = rows_dot == nullptr ? A(0) : rows_dot[r][d];
      const A w_dot = weight_dot == nullptr ? A(0) : weight_dot[d];
      FASTMETA_UNROLL
      for (int v = 0; v < NV; ++v) {
        const int64_t at = d * kL + v * kW;
        const Vec<A> u = vtanh<A>(load(panel + at) + rows[r][d]);
        const Vec<A> dot = panel_dot == nullptr ? splat<A>(s_dot) : load(panel_dot + at) + s_dot;
        sum[v] += (A(1) - u * u) * dot * weight[d] + u * w_dot;
      }
    }
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) store(tangent + r * kL + v * kW, sum[v]);
  }
}

// The row of a table that a support of class c reads in each lane: the class's own, or for nll the
// target's (1) where c is the target and that of the others (0) elsewhere.
template <class A, int NV>
static Vec<A> table_value(const SecondPanel<A>& x, const A* table, bool nll, int64_t c,
                          int64_t table_class, int v) {
  constexpr int kW = kWidth<A>, kL = NV * kW;
  if (!nll) return load(table + (c - table_class) * kL + v * kW);
  const auto hit = x.targets[v] == IntVec<A>{} + static_cast<decltype(IntVec<A>{}[0] + 0)>(c);
  return hit ? load(table + kL + v * kW) : load(table + v * kW);
}

// First pass: adds the block's part of m per class (nll: of the target, and of all others together)
// to the table `one`.
template <class A, int NV>
static __attribute__((noinline)) void add_moves(const SecondPanel<A>& x, bool nll,
                                                const int64_t* start, int64_t first_class,
                                                int64_t table_class, int64_t begin, int64_t n,
                                                A scale, A scale_dot, const A* sims,
                                                const A* tangent, const A* weights) {
  constexpr int kW = kWidth<A>, kL = NV * kW;
  for_classes(start, first_class, begin, n, [&](int64_t c, int64_t from, int64_t to) {
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) {
      const Vec<A> reference = load(x.reference + v * kW);
      Vec<A> sum{};
      for (int64_t r = from; r < to; ++r) {
        const int64_t at = r * kL + v * kW;
        sum += load(weights + at) *
               (load(tangent + at) * scale + (load(sims + at) - reference) * scale_dot);
      }
      if (nll) {
        const Vec<A> zero{};
        const auto hit = x.targets[v] == IntVec<A>{} + static_cast<decltype(IntVec<A>{}[0] + 0)>(c);
        A *others = x.one + v * kW, *target = others + kL;
        store(others, load(others) + (hit ? zero : sum));
        store(target, load(target) + (hit ? sum : zero));
      } else {
        A* at = x.one + (c - table_class) * kL + v * kW;
        store(at, load(at) + sum);
      }
    }
  });
}

// Second pass: shares to g (in place) and h (into `bends`).
template <class A, int NV>
static __attribute__((noinline)) void bend(const SecondPanel<A>& x, bool nll, const int64_t* start,
                                           int64_t first_class, int64_t table_class, int64_t begin,
                                           int64_t n, A scale, A scale_dot, const A* sims,
                                           const A* tangent, A* weights, A* bends) {
  constexpr int kW = kWidth<A>, kL = NV * kW;
  for_classes(start, first_class, begin, n, [&](int64_t c, int64_t from, int64_t to) {
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) {
      const Vec<A> a = table_value<A, NV>(x, x.one, nll, c, table_class, v);
      const Vec<A> b = table_value<A, NV>(x, x.two, nll, c, table_class, v);
      const Vec<A> reference = load(x.reference + v * kW);
      for (int64_t r = from; r < to; ++r) {
        const int64_t at = r * kL + v * kW;
        const Vec<A> w = load(weights + at);
        const Vec<A> z_dot = load(tangent + at) * scale + (load(sims + at) - reference) * scale_dot;
        store(weights + at, w * a);
        store(bends + at, w * (a * z_dot - b));
      }
    }
  });
}

// What the supports of a block collect on their own vectors, a Vec a row.
template <class A>
struct RowOwn {
  Vec<A>* own;
  Vec<A>* own_dot;
};

// From g (weights), h (bends), similarities and d to the coefficients A (into `sims`) and B (into
// `tangent`) of the header's formulas. Returns sum h * similarity + g * d.
template <class A, Similarity kSim, int NV>
static __attribute__((noinline)) double second_coefficients(const SecondPanel<A>& x,
                                                            const Directions<A>& dirs, int64_t n,
                                                            A scale, A scale_dot, const A* weights,
                                                            const A* bends, A* sims, A* tangent,
                                                            const RowOwn<A>& rows) {
  constexpr int kW = kWidth<A>, kL = NV * kW;
  constexpr bool kOwn = kSim == Similarity::kCosine || kSim == Similarity::kSqEuclidean;
  Vec<A> own[NV] = {}, own_dot[NV] = {}, scale_sum[NV] = {};
  for (int64_t r = 0; r < n; ++r) {
    Vec<A> row{}, row_dot{};
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int64_t at = r * kL + v * kW;
      const Vec<A> sim = load(sims + at), d = load(tangent + at);
      const Vec<A> g = load(weights + at), h = load(bends + at);
      scale_sum[v] += h * (sim - load(x.reference + v * kW)) + g * d;
      Vec<A> first = h * scale + g * scale_dot, second = g * scale;
      if constexpr (kSim == Similarity::kCosine) {
        const Vec<A> e = load(dirs.lane_stretch + v * kW), level = second * sim;
        const A f = dirs.row_stretch[r];
        const Vec<A> along = first * sim + second * d;
        own[v] += along - A(2) * e * level;
        own_dot[v] += level;
        row += along - A(2) * f * level;
        row_dot += level;
        const Vec<A> ab = load(dirs.lane + v * kW) * dirs.row[r];
        first = ab * (first - second * (e + f));
        second = ab * second;
      } else if constexpr (kSim == Similarity::kSqEuclidean) {
        first += first;
        second += second;
        own[v] += first;
        own_dot[v] += second;
        row += first;
        row_dot += second;
      } else if constexpr (kSim == Similarity::kEuclidean) {
        const Vec<A> zero{};
        const Vec<A> inverse = sim == A(0) ? zero : A(-1) / sim;
        first = (first + second * d * inverse) * inverse;
        second = second * inverse;
      }
      store(sims + at, first);
      store(tangent + at, second);
    }
    if constexpr (kOwn) {
      rows.own[r] += row;
      rows.own_dot[r] += row_dot;
    }
  }
  if constexpr (kOwn) {
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) {
      store(x.own + v * kW, load(x.own + v * kW) + own[v]);
      store(x.own_dot + v * kW, load(x.own_dot + v * kW) + own_dot[v]);
    }
  }
  return sum_over_queries<A>(scale_sum, x.count);
}

template <class A, int NV>
static double second_coefficients_of(const SecondPanel<A>& x, const Directions<A>& dirs, int64_t n,
                                     A scale, A scale_dot, const A* weights, const A* bends,
                                     A* sims, A* tangent, const RowOwn<A>& rows) {
  switch (dirs.similarity) {
#define FASTMETA_CASE(name)                                                                    \
  case Similarity::name:                                                                       \
    return second_coefficients<A, Similarity::name, NV>(x, dirs, n, scale, scale_dot, weights, \
                                                        bends, sims, tangent, rows);
    FASTMETA_CASE(kDot)
    FASTMETA_CASE(kCosine)
    FASTMETA_CASE(kSqEuclidean)
    FASTMETA_CASE(kEuclidean)
    FASTMETA_CASE(kAdditive)
#undef FASTMETA_CASE
  }
  return 0;
}

// Additive, per pair and feature, with t = q' + s': x = (1 - u^2) (A w + B (w' - 2 u w t)) to both
// vectors, A u + B (1 - u^2) t to the weight. Directions may be nullptr.
template <class A>
struct AdditiveRows {
  const A* const* value;
  const A* const* dot;
  A* const* grad;
  bool add;
};
template <class A>
static void additive_second(const A* first, const A* second, int lanes,
                            const AdditiveRows<A>& supports, int64_t n,
                            const AdditiveRows<A>& queries, int count, int64_t dim, const A* weight,
                            const A* weight_dot, A* grad_weight) {
  constexpr int kW = kWidth<A>;
  for (int64_t d = 0; d < dim; d += kW) {
    const int m = static_cast<int>(min_of<int64_t>(kW, dim - d));
    const auto part = [&](const A* const* rows, int64_t i) {
      return rows == nullptr ? Vec<A>{} : load_n(rows[i] + d, m);
    };
    const Vec<A> w = load_n(weight + d, m);
    const Vec<A> w_dot = weight_dot == nullptr ? Vec<A>{} : load_n(weight_dot + d, m);
    Vec<A> dq[kMaxVectors * kW];
    for (int l = 0; l < count; ++l) dq[l] = Vec<A>{};
    Vec<A> dw{};
    for (int64_t r = 0; r < n; ++r) {
      const Vec<A> s = part(supports.value, r), s_dot = part(supports.dot, r);
      Vec<A> ds{};
      for (int l = 0; l < count; ++l) {
        const A one = first[r * lanes + l], two = second[r * lanes + l];
        const Vec<A> u = vtanh<A>(part(queries.value, l) + s);
        const Vec<A> slope = A(1) - u * u, t = part(queries.dot, l) + s_dot;
        const Vec<A> x = slope * (one * w + two * (w_dot - A(2) * u * w * t));
        ds += x;
        dq[l] += x;
        dw += one * u + two * slope * t;
      }
      A* to = supports.grad[r] + d;
      store_n(to, supports.add ? load_n(to, m) + ds : ds, m);
    }
    for (int l = 0; l < count; ++l) {
      A* to = queries.grad[l] + d;
      store_n(to, queries.add ? load_n(to, m) + dq[l] : dq[l], m);
    }
    store_n(grad_weight + d, load_n(grad_weight + d, m) + dw, m);
  }
}

}  // namespace fastmeta::matching::FASTMETA_ISA
