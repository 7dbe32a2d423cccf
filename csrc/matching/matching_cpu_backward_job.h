// A job of the backward: some panels of a task against some of its sorted supports.
#pragma once
#include <cstdint>

#include "matching/matching_cpu_bf16_outer.h"
#include "matching/matching_cpu_exact.h"
#include "matching/matching_cpu_outer.h"

namespace fastmeta::matching::FASTMETA_ISA {

static thread_local Scratch backward_scratch;

constexpr int64_t kHeldBytes = int64_t{320} << 10;  // slopes held together
constexpr int64_t kScoreRows = 36;                  // supports scored at a time, in the L1 cache
constexpr int64_t kOuterRows = 192;  // and multiplied with slopes, in the L2 cache with gradients

struct BackwardPlan {
  const Backward* args;
  int64_t chunks;
  bool split_queries;  // else supports
  int64_t* order;      // [T, S], when chunks > 1 or tasks are large
  int64_t* start;      // [T, C + 1]
  void* grad_sum;      // [T, lanes] sum of G over supported classes, when supports are split
  void* partial;       // [T, chunks, Q or S, D]
  void* weight;        // [T, chunks, D], additive
  double* scale;       // [T, chunks]
  Exact exact;
};

// A job under way: the memory it works in and where its gradients go.
template <class S>
struct BackwardJob {
  using A = Acc<S>;
  static constexpr int kW = kWidth<A>, kMaxLanes = kMaxVectors * kW;

  const BackwardPlan& plan;
  const Backward& args;
  const Problem& p;
  const Task<S> task;
  const int64_t t, k;  // task and chunk
  const bool nll, additive, whole, by_query, by_rows;
  const bool pairs;  // scores and gradients by pairs: rows of words in place of converted ones
  const Panels<A> panels;
  int64_t first, last;  // panels
  const int64_t *order, *start;
  int64_t begin, end, c0, c1;  // sorted supports and the classes they span

  // Few supports stay in the cache while panel after panel passes by them; many are taken block by
  // block past all panels.
  bool resident;
  int64_t group, group_lanes;  // panels at a time
  int64_t held;                // panels whose slopes are held together
  int64_t rows, capacity;      // supports per block: aimed at, at most
  Block<S> block;
  GradientPanel<A>* panel;
  A *slopes, *weights, *packed, *arrays, *grad_sum, *query_copies, *grad_query_copies,
      *grad_support_copies, *support_pairs, *lane_scales, *row_scales;
  A* grad_weight;
  A* partial;
  IntVec<A>* targets;
  Vec<A>*row_own, *row_most;
  OuterRun<A>* runs;   // [held]
  PairRun* pair_runs;  // [held]
  const A** query_rows;
  A **grad_query_rows, **grad_support_rows;

  BackwardJob(const BackwardPlan& plan_, int64_t index)
      : plan(plan_),
        args(*plan_.args),
        p(args.problem),
        task(p, index / plan_.chunks),
        t(index / plan_.chunks),
        k(index % plan_.chunks),
        nll(p.targets != nullptr),
        additive(p.similarity == Similarity::kAdditive),
        whole(plan_.chunks == 1),
        by_query(!whole && plan_.split_queries),
        by_rows(scores_by_rows<S>(p)),
        pairs(scores_by_pairs<S>(p)),
        panels(p.num_queries) {
    first = by_query ? panels.count * k / plan.chunks : 0;
    last = by_query ? panels.count * (k + 1) / plan.chunks : panels.count;
    order = plan.order + t * p.num_supports;
    start = plan.start + t * (p.num_classes + 1);
    begin = 0, end = p.num_supports, c0 = 0, c1 = p.num_classes;
    if (!whole) {
      const int64_t valid = start[p.num_classes];
      begin = by_query ? 0 : chunk_begin(start, p.num_classes, k, plan.chunks, whole_rows(p));
      end = by_query ? valid : chunk_begin(start, p.num_classes, k + 1, plan.chunks, whole_rows(p));
      while (c0 < p.num_classes && start[c0 + 1] <= begin) ++c0;
      while (c1 > c0 && start[c1 - 1] >= end) --c1;
    }
    rows = block_rows<A>(p.num_supports, p.dim);
    capacity = largest_block();
    resident = (end - begin) * p.dim * static_cast<int64_t>(sizeof(A)) <= kResidentBytes;
    constexpr int64_t kPanelBytes = kMaxLanes * static_cast<int64_t>(sizeof(A));
    held = kHeldBytes / (max_of<int64_t>(1, capacity) * kPanelBytes);
    held = min_of(max_of<int64_t>(1, held), last - first);
    group = resident ? held : last - first;
    group_lanes = min_of(group * kMaxLanes, panels.begin(last) - panels.begin(first));
    allocate(backward_scratch);
    if (additive) zero_row(grad_weight, p.dim);
    partial = whole ? nullptr
                    : static_cast<A*>(plan.partial) +
                          index * (by_query ? p.num_supports : p.num_queries) * p.dim;
  }

  void allocate(Scratch& scratch) {
    const int64_t slots = resident ? end - begin : capacity, dim = p.dim;
    const int64_t tables = 2 + 2 * (nll ? 2 : c1 - c0), stride = copy_stride<S>(dim);
    const int64_t query_copied = copies_rows<S>(dim) ? group_lanes * stride : 0;
    const int64_t half_rows = kIsHalf<S> ? group_lanes * dim : 0;
    const int64_t half_supports = kIsHalf<S> ? slots * dim : 0;
    const int64_t paired = pairs ? slots * stride : 0;
    const bool sorts = plan.order == nullptr, copy = copies_rows<S>(dim) && !pairs;
    const int64_t own_rows = sorts ? p.num_supports : 0,
                  own_classes = sorts ? p.num_classes + 1 : 0;
    scratch.reset(
        Scratch::size_of<int64_t>(own_rows) + Scratch::size_of<int64_t>(own_classes) +
        Scratch::size_of<GradientPanel<A>>(group) + Block<S>::bytes(slots, dim, copy) +
        Scratch::size_of<A>(paired) + Scratch::size_of<A>(held * slope_rows(capacity) * kMaxLanes) +
        Scratch::size_of<A>(capacity * kMaxLanes) + Scratch::size_of<OuterRun<A>>(held) +
        Scratch::size_of<PairRun>(pairs ? held : 0) +
        Scratch::size_of<A>(pairs ? held * kMaxLanes : 0) +
        Scratch::size_of<A>(pairs ? capacity + kW : 0) +
        Scratch::size_of<Vec<A>>(pairs ? capacity : 0) + Scratch::size_of<A>(group_lanes * dim) +
        Scratch::size_of<A>(group_lanes * tables) + Scratch::size_of<A>(kMaxLanes) +
        Scratch::size_of<A>(query_copied) + Scratch::size_of<A>(half_rows) +
        Scratch::size_of<A>(half_supports) + Scratch::size_of<A>(additive ? dim : 0) +
        Scratch::size_of<IntVec<A>>(group_lanes / kW) + Scratch::size_of<Vec<A>>(slots) +
        2 * Scratch::size_of<A*>(group_lanes) + Scratch::size_of<A*>(slots));
    if (sorts) {
      int64_t* own_order = scratch.take<int64_t>(own_rows);
      int64_t* own_start = scratch.take<int64_t>(own_classes);
      end = sort_by_class(task.labels, p.num_supports, p.num_classes, own_order, own_start);
      order = own_order;
      start = own_start;
    } else if (whole) {
      end = start[p.num_classes];
    }
    panel = scratch.take<GradientPanel<A>>(group);
    block.allocate(scratch, slots, dim, copy);
    support_pairs = scratch.take<A>(paired);
    slopes = scratch.take<A>(held * slope_rows(capacity) * kMaxLanes);
    runs = scratch.take<OuterRun<A>>(held);
    pair_runs = scratch.take<PairRun>(pairs ? held : 0);
    lane_scales = scratch.take<A>(pairs ? held * kMaxLanes : 0);
    row_scales = scratch.take<A>(pairs ? capacity + kW : 0);
    row_most = scratch.take<Vec<A>>(pairs ? capacity : 0);
    weights = scratch.take<A>(capacity * kMaxLanes);
    packed = scratch.take<A>(group_lanes * dim);
    arrays = scratch.take<A>(group_lanes * tables);
    grad_sum = scratch.take<A>(kMaxLanes);
    query_copies = scratch.take<A>(query_copied);
    grad_query_copies = scratch.take<A>(half_rows);
    grad_support_copies = scratch.take<A>(half_supports);
    grad_weight = scratch.take<A>(additive ? dim : 0);
    targets = scratch.take<IntVec<A>>(group_lanes / kW);
    row_own = scratch.take<Vec<A>>(slots);
    query_rows = scratch.take<const A*>(group_lanes);
    grad_query_rows = scratch.take<A*>(group_lanes);
    grad_support_rows = scratch.take<A*>(slots);
  }

  // Supports of the largest block there will be.
  int64_t largest_block() const {
    if (plan.order == nullptr) return p.num_supports;  // few
    if (nll) return max_of(rows, min_of(kWholeRows, p.num_supports));
    int64_t most = rows;
    for (int64_t c = c0; c < c1; ++c) {
      if (!is_large(start, c)) most = max_of(most, start[c + 1] - start[c]);
    }
    return most;
  }

  // Makes ready panel i of the group that begins at panel g.
  void open_panel(int64_t i, int64_t g) {
    const int64_t classes = p.num_classes, dim = p.dim;
    const int64_t at = panels.begin(i) - panels.begin(g), tables = nll ? 2 : c1 - c0;
    GradientPanel<A>& x = panel[i - g];
    x.vectors = panels.vectors_in(i);
    x.query = panels.begin(i);
    const int width = x.vectors * kW;
    x.count = static_cast<int>(min_of<int64_t>(width, p.num_queries - x.query));
    x.packed = packed + at * dim;
    x.terms = arrays + at * (2 + 2 * tables);
    x.own = x.terms + width;
    x.off = x.own + width;
    x.amplitude = x.off + tables * width;
    x.targets = targets + at / kW;
    x.rows = query_rows + at;
    x.grad = grad_query_rows + at;
    const S* query = task.query + x.query * dim;
    for (int l = 0; l < width; ++l) x.own[l] = 0;
    A* copies = query_copies + at * copy_stride<S>(dim);
    if (!pairs) take_rows(query, dim, x.count, copies, x.rows);
    if constexpr (kPairs<S>) {
      if (pairs) interleave(x.count, dim, copies, [&](int64_t l) { return query + l * dim; });
    }
    for (int l = 0; l < x.count; ++l) {
      if (!whole && !by_query) {
        x.grad[l] = partial + (x.query + l) * dim;
      } else if constexpr (kIsHalf<S>) {
        x.grad[l] = grad_query_copies + (at + l) * dim;
      } else {
        x.grad[l] = static_cast<A*>(args.grad_query) + (t * p.num_queries + x.query + l) * dim;
      }
      if (begin == end) zero_row(x.grad[l], dim);
    }
    if (by_rows || args.scores != nullptr) {
      row_terms<A>(p, x.rows, x.count, width, x.terms);
    } else {
      pack_panel(p, query, x.count, width, x.packed, x.terms);
    }
    const int64_t row = t * p.num_queries + x.query;
    const A* grad = static_cast<const A*>(args.grad) + row * (nll ? 1 : classes);
    const A* out = static_cast<const A*>(args.out) + row * (nll ? 1 : classes);
    const A* lse = static_cast<const A*>(args.lse) + row;
    if (nll) {
      const int64_t* wanted = task.targets + x.query;
      load_targets<A>(wanted, classes, x.count, width, x.targets);
      target_tables<A>(grad, out, lse, wanted, classes, x.count, width, x.off, x.amplitude);
      for (int64_t e = 0; e < plan.exact.entries && start[classes] > kWholeRows; ++e) {
        normalise<A>(plan.exact, t, e, panels.lanes(), x.query, width, x.off + e * width,
                     x.amplitude + e * width);
      }
      return;
    }
    const A* sums = grad_sum;
    if (plan.grad_sum != nullptr) {
      sums = static_cast<const A*>(plan.grad_sum) + t * panels.lanes() + x.query;
    } else {
      sum_gradients<A>(grad, start, classes, x.count, width, grad_sum);
    }
    class_tables<A>(grad, out, lse, sums, classes, c0, c1, x.count, width, x.off, x.amplitude);
    int64_t entry = plan.exact.entries > 0 ? count_large(start, 0, c0) : 0;
    for (int64_t c = c0; c < c1 && plan.exact.entries > 0; ++c) {
      if (!is_large(start, c)) continue;
      normalise<A>(plan.exact, t, entry++, panels.lanes(), x.query, width, x.off + (c - c0) * width,
                   x.amplitude + (c - c0) * width);
    }
  }

  // Adds to a gradient what goes along its own vector: `row`, or where there are pairs `given`.
  void add_own(A* grad, A own, A term, const A* row, [[maybe_unused]] const S* given) const {
    if constexpr (kPairs<S>) {
      if (pairs) {
        own = own_of(p.similarity, own, grad, given, p.dim);
        return add_scaled(grad, own * own_factor(p.similarity, term), given, p.dim);
      }
    }
    add_scaled(grad, own * own_factor(p.similarity, term), row, p.dim);
  }

  void close_panel(const GradientPanel<A>& x) {
    for (int l = 0; l < x.count; ++l) {
      if (needs_norms(p.similarity) && begin < end) {
        add_own(x.grad[l], x.own[l], x.terms[l], pairs ? nullptr : x.rows[l],
                task.query + (x.query + l) * p.dim);
      }
      if constexpr (kIsHalf<S>) {
        S* out = static_cast<S*>(args.grad_query) + (t * p.num_queries + x.query + l) * p.dim;
        if (whole || by_query) store_row(x.grad[l], p.dim, out);
      }
    }
  }

  // Supports [at, at + n) in slots [slot, slot + n).
  void open_block(int64_t at, int64_t n, int64_t slot) {
    block.gather(p, task.support, order + at, n, slot);
    if constexpr (kPairs<S>) {
      if (pairs) {
        interleave(n, p.dim, support_pairs + slot * copy_stride<S>(p.dim),
                   [&](int64_t r) { return block.given[slot + r]; });
      }
    }
    for (int64_t r = 0; r < n; ++r) {
      row_own[slot + r] = Vec<A>{};
      const int64_t row = order[at + r];
      if (by_query) {
        grad_support_rows[slot + r] = partial + row * p.dim;
      } else if constexpr (kIsHalf<S>) {
        grad_support_rows[slot + r] = grad_support_copies + (slot + r) * p.dim;
      } else {
        grad_support_rows[slot + r] =
            static_cast<A*>(args.grad_support) + (t * p.num_supports + row) * p.dim;
      }
    }
  }

  void close_block(int64_t at, int64_t n) {
    for (int64_t r = 0; r < n; ++r) {
      if (needs_norms(p.similarity)) {
        add_own(grad_support_rows[r], hsum<A>(row_own[r]), block.terms[r],
                pairs ? nullptr : block.rows[r], task.support + order[at + r] * p.dim);
      }
      if constexpr (kIsHalf<S>) {
        S* out = static_cast<S*>(args.grad_support) + (t * p.num_supports + order[at + r]) * p.dim;
        if (!by_query) store_row(grad_support_rows[r], p.dim, out);
      }
    }
  }

  // Similarities of `count` panels from x on with supports [at, at + n), a few at a time that stay
  // in the L1 cache, to where their slopes will be.
  void score(const GradientPanel<A>* x, int64_t count, int64_t at, int64_t n, int64_t slot) {
    for (int64_t i = 0; i < count && args.scores != nullptr; ++i) {
      with_vectors(x[i].vectors, [&](auto nv) {
        load_scores<A, decltype(nv)::value>(args, t, at, n, x[i].query, slopes_of(x, i, n));
      });
    }
    if (args.scores != nullptr) return;
    for (int64_t r = 0; r < n; r += kScoreRows) {
      const int64_t m = min_of(kScoreRows, n - r);
      for (int64_t i = 0; i < count; ++i) {
        const Finish<A> finish{p.similarity, block.terms + slot + r,
                               needs_norms(p.similarity) ? x[i].terms : nullptr, A(1)};
        A* tile = slopes_of(x, i, n) + r * x[i].vectors * kW;
        with_vectors(x[i].vectors, [&](auto nv) {
          constexpr int kNV = decltype(nv)::value;
          if (by_rows) {
            score_rows<A, kNV>(block.rows + slot + r, m, x[i].rows, x[i].count, p.dim, finish,
                               tile);
          } else {
            block.template score<kNV>(p, slot + r, m, x[i].packed, task.weight, finish, tile);
          }
        });
      }
    }
  }
  // Of panel i of those held, n supports each; with pairs, an even number of them.
  int64_t slope_rows(int64_t n) const { return pairs ? (n + 1) / 2 * 2 : n; }
  A* slopes_of(const GradientPanel<A>* x, int64_t i, int64_t n) const {
    return slopes + (x[i].query - x[0].query) * slope_rows(n);
  }

  // `count` panels from x on against supports [at, at + n); returns sum dz * similarity.
  double step(const GradientPanel<A>* x, int64_t count, int64_t at, int64_t n, int64_t slot,
              int64_t first_class, bool add_query, bool add_support) {
    const A* const* supports = block.rows + slot;
    A* const* to = grad_support_rows + slot;
    const A factor = task.scale * Const<A>::kLog2e;
    double scale_sum = 0;
    score(x, count, at, n, slot);
    for (int64_t i = 0; i < count; ++i) {
      const int width = x[i].vectors * kW;
      A* tile = slopes_of(x, i, n);
      with_vectors(x[i].vectors, [&](auto nv) {
        constexpr int kNV = decltype(nv)::value;
        if (nll) {
          const bool all = at == 0 && n == start[p.num_classes];
          target_weights<A, kNV>(x[i], start, first_class, at, n, all, factor, tile, weights);
        } else {
          class_weights<A, kNV>(x[i], start, first_class, c0, at, n, factor, tile, weights);
        }
        scale_sum += coefficients_of<A, kNV>(p.similarity, x[i], n, block.terms + slot, task.scale,
                                             weights, tile, row_own + slot);
      });
      if (additive) {
        additive_gradients<A>(tile, width, supports, n, x[i].rows, x[i].count, p.dim, task.weight,
                              to, x[i].grad, grad_weight, add_support || i > 0, add_query);
      }
      runs[i] = {tile, width, 1, x[i].rows, x[i].count, supports};
    }
    if (additive) return scale_sum;
    if constexpr (kPairs<S>) {
      if (pairs) {
        pair_gradients(x, count, n, slot, add_query, add_support);
        return scale_sum;
      }
    }
    const int64_t parts = ceil_div(n, kOuterRows);
    for (int64_t i = 0, r = 0; i < parts; ++i) {
      const int64_t m = n * (i + 1) / parts - r;
      multiply(x, count, supports + r, to + r, m, add_query || r > 0, add_support);
      for (int64_t j = 0; j < count; ++j) runs[j].coef += m * runs[j].step_m, runs[j].own += m;
      r += m;
    }
    return scale_sum;
  }

  // Adds to the gradients of `count` panels from x on and of n supports, from the slopes in `runs`.
  void multiply(const GradientPanel<A>* x, int64_t count, const A* const* supports, A* const* to,
                int64_t n, bool add_query, bool add_support) const {
    const int64_t step = block_columns<A>(n);
    for (int64_t d = 0; d < p.dim; d += step) {
      for (int64_t i = 0; i < count; ++i) {
        const OuterRun<A> run{runs[i].coef, 1, runs[i].step_m, supports, n, x[i].rows};
        outer(Outer<A>{&run, 1, x[i].grad, add_query}, p.similarity, x[i].count, d,
              min_of(p.dim, d + step));
      }
    }
    const int64_t lanes = x[count - 1].query + x[count - 1].count - x[0].query;
    const int64_t columns = block_columns<A>(lanes);
    for (int64_t d = 0; d < p.dim; d += columns) {
      outer(Outer<A>{runs, count, to, add_support}, p.similarity, n, d, min_of(p.dim, d + columns));
    }
  }

  // The slopes of n supports with `count` panels, in words, times rows of words.
  void pair_gradients(const GradientPanel<A>* x, int64_t count, int64_t n, int64_t slot,
                      bool add_query, bool add_support) {
    const int64_t dim = p.dim, stride = copy_stride<S>(dim), n_pairs = ceil_div(n, 2);
    const bool own = p.similarity == Similarity::kSqEuclidean;
    const auto lane_scale = [&](int64_t i) { return lane_scales + (x[i].query - x[0].query); };
    for (int64_t r = 0; r < n; ++r) row_most[r] = Vec<A>{};
    for (int64_t i = 0; i < count; ++i) {
      with_vectors(x[i].vectors, [&](auto nv) {
        measure_slopes(nv, slopes_of(x, i, n), n, x[i].count, lane_scale(i), row_most);
      });
      for (int l = 0; l < x[i].vectors * kW; l += kW) {
        store(lane_scale(i) + l, scale_of(load(lane_scale(i) + l)));
      }
    }
    for (int64_t r = 0; r < n; ++r) row_scales[r] = largest(row_most[r]);
    for (int64_t r = 0; r < n; r += kW) {  // room for whole vectors
      store(row_scales + r, scale_of(load(row_scales + r)));
    }
    for (int64_t i = 0; i < count; ++i) {
      A* tile = slopes_of(x, i, n);
      const int64_t width = x[i].vectors * kW;
      with_vectors(x[i].vectors, [&](auto nv) {
        round_slopes(nv, tile, n, lane_scale(i), row_scales, own ? x[i].own : nullptr,
                     own ? row_own + slot : nullptr);
      });
      pair_runs[i] = {tile + width,
                      2 * width,
                      width / 2,
                      1,
                      query_copies + (x[i].query - panel[0].query) * stride,
                      2 * stride,
                      ceil_div(x[i].count, 2)};
    }
    const int64_t step = block_columns<A>(n_pairs);
    for (int64_t d = 0; d < dim; d += step) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t width = x[i].vectors * kW;
        const PairRun run{slopes_of(x, i, n), 2,      1, 2 * width, support_pairs + slot * stride,
                          2 * stride,         n_pairs};
        pair_outer(PairOuter<A>{&run, 1, x[i].grad, lane_scale(i), add_query}, x[i].count, d,
                   min_of(dim, d + step));
      }
    }
    const int64_t lanes = x[count - 1].query + x[count - 1].count - x[0].query;
    const int64_t columns = block_columns<A>(ceil_div(lanes, 2));
    for (int64_t d = 0; d < dim; d += columns) {
      pair_outer(PairOuter<A>{pair_runs, count, grad_support_rows + slot, row_scales, add_support},
                 n, d, min_of(dim, d + columns));
    }
  }

  void run(int64_t index) {
    double scale_total = 0;
    for (int64_t g = first; g < last; g += group) {
      const int64_t g_end = min_of(last, g + group);
      for (int64_t i = g; i < g_end; ++i) open_panel(i, g);
      int64_t first_class = c0;
      int64_t n = 0;
      for (int64_t at = begin; at < end; at += n) {
        n = block_size(start, p.num_classes, at, end, rows, whole_rows(p), nll);
        const int64_t slot = resident ? at - begin : 0;
        if (!resident || g == first) open_block(at, n, slot);
        while (start[first_class + 1] <= at) ++first_class;
        for (int64_t i = g; i < g_end; i += held) {
          if (!resident) {
            const int64_t rest = min_of(n, end - at - n), steps = ceil_div(g_end - g, held);
            const int64_t part = (i - g) / held, from = rest * part / steps;
            prefetch_rows(task.support, order + at + n + from, rest * (part + 1) / steps - from,
                          p.dim);
          }
          scale_total += step(panel + (i - g), min_of(held, g_end - i), at, n, slot, first_class,
                              at > begin, i > first);
        }
        if (!resident) close_block(at, n);
      }
      for (int64_t i = g; i < g_end; ++i) close_panel(panel[i - g]);
    }
    if (resident) close_block(begin, end - begin);
    if (!by_query && k == 0) {
      for (int64_t i = 0; i < p.num_supports; ++i) {
        if (static_cast<uint64_t>(task.labels[i]) < static_cast<uint64_t>(p.num_classes)) continue;
        zero_row(static_cast<S*>(args.grad_support) + (t * p.num_supports + i) * p.dim, p.dim);
      }
    }
    if (whole) {
      static_cast<A*>(args.grad_scale)[t] = static_cast<A>(scale_total);
    } else {
      plan.scale[index] = scale_total;
    }
    if (additive) {
      A* out = static_cast<A*>(whole ? args.grad_weight : plan.weight);
      convert_row(grad_weight, p.dim, out + index * p.dim);
    }
  }
};

}  // namespace fastmeta::matching::FASTMETA_ISA
