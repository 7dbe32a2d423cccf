// Backward of tasks whose slopes dL/dz fit the second-level cache: few-shot tasks.
//
// The slopes of a task are made once, panel by panel of queries, and kept; then each gradient is
// one product with them, whose sums stay in registers over all of the other side: every gradient is
// written once, nothing is added up in memory. Against the blocks of the general path that saves
// most loads and stores of gradients, and classes are never cut.
//
// Floor: 3 T*Q*S*D multiply-adds, or 2 where the forward has left the similarities. A job is a
// task; or, where tasks are few, a panel for the slopes and then some columns of one gradient. How
// work is cut does not change any sum, so results depend on shapes alone.
#pragma once
#include <cstdint>

#include "matching/matching_cpu_gradient.h"

namespace fastmeta::matching::FASTMETA_ISA {

constexpr int64_t kDepth = 256;  // terms of the first of two levels of sums

// What a task keeps between its two steps.
template <class A>
struct KeptTask {
  int64_t *order, *start;      // [S], [C + 1]
  A* slopes;                   // panel after panel, each [S, its lanes]
  A *terms, *query_terms;      // [S], [lanes]
  A *own, *query_own;          // what own vectors receive: [panels, S]; [lanes], as factors
  double* scale;               // [panels]
  const A **support, **query;  // rows, supports in class order
  A **grad_support, **grad_query;

  static int64_t bytes(const Problem& p) {
    const Panels<A> panels(p.num_queries);
    const int64_t supports = p.num_supports, lanes = panels.lanes();
    return Scratch::size_of<int64_t>(supports) + Scratch::size_of<int64_t>(p.num_classes + 1) +
           Scratch::size_of<A>(lanes * supports) + Scratch::size_of<A>(supports) +
           2 * Scratch::size_of<A>(lanes) + Scratch::size_of<A>(panels.count * supports) +
           Scratch::size_of<double>(panels.count) + 2 * Scratch::size_of<A*>(supports) +
           2 * Scratch::size_of<A*>(lanes);
  }
  void take(Scratch& scratch, const Problem& p) {
    const Panels<A> panels(p.num_queries);
    const int64_t supports = p.num_supports, lanes = panels.lanes();
    order = scratch.take<int64_t>(supports);
    start = scratch.take<int64_t>(p.num_classes + 1);
    slopes = scratch.take<A>(lanes * supports);
    terms = scratch.take<A>(supports);
    query_terms = scratch.take<A>(lanes);
    query_own = scratch.take<A>(lanes);
    own = scratch.take<A>(panels.count * supports);
    scale = scratch.take<double>(panels.count);
    support = scratch.take<const A*>(supports);
    grad_support = scratch.take<A*>(supports);
    query = scratch.take<const A*>(lanes);
    grad_query = scratch.take<A*>(lanes);
  }
};

// What a thread works in.
template <class A>
struct KeptWork {
  static constexpr int kMaxLanes = kMaxVectors * kWidth<A>;
  static constexpr int64_t kBlock =  // at most what block_columns() makes of kDepth rows
      kDepth * kMaxLanes > kBlockBytes / 4 ? kDepth * kMaxLanes : kBlockBytes / 4;

  A *weights, *packed, *tables, *block, *factors;
  Vec<A>* row_own;
  OuterRun<A>* runs;
  const A** block_rows;

  static int64_t tables_size(const Problem& p) {
    return kMaxLanes * (1 + 2 * (p.targets != nullptr ? 2 : p.num_classes));
  }
  static int64_t bytes(const Problem& p) {
    return Scratch::size_of<A>(p.num_supports * kMaxLanes) +
           Scratch::size_of<A>(kMaxLanes * p.dim) + Scratch::size_of<A>(tables_size(p)) +
           Scratch::size_of<A>(kBlock) + Scratch::size_of<A>(p.num_supports) +
           Scratch::size_of<Vec<A>>(p.num_supports) + Scratch::size_of<OuterRun<A>>(kDepth) +
           Scratch::size_of<A*>(kDepth);
  }
  void take(Scratch& scratch, const Problem& p) {
    weights = scratch.take<A>(p.num_supports * kMaxLanes);
    packed = scratch.take<A>(kMaxLanes * p.dim);
    tables = scratch.take<A>(tables_size(p));
    block = scratch.take<A>(kBlock);
    factors = scratch.take<A>(p.num_supports);
    row_own = scratch.take<Vec<A>>(p.num_supports);
    runs = scratch.take<OuterRun<A>>(kDepth);
    block_rows = scratch.take<const A*>(kDepth);
  }
};

// The steps of a task, for float and double.
template <class A>
struct KeptBackward {
  static constexpr int kW = kWidth<A>;

  const Backward& args;
  const Problem& p;
  const Panels<A> panels;

  explicit KeptBackward(const Backward& args_)
      : args(args_), p(args_.problem), panels(p.num_queries) {}

  void open(int64_t t, const KeptTask<A>& x) const {
    const Task<A> task(p, t);
    const int64_t valid =
        sort_by_class(task.labels, p.num_supports, p.num_classes, x.order, x.start);
    A* grad_support = static_cast<A*>(args.grad_support) + t * p.num_supports * p.dim;
    A* grad_query = static_cast<A*>(args.grad_query) + t * p.num_queries * p.dim;
    for (int64_t r = 0; r < valid; ++r) {
      x.support[r] = task.support + x.order[r] * p.dim;
      x.grad_support[r] = grad_support + x.order[r] * p.dim;
      if (needs_norms(p.similarity)) {
        x.terms[r] = norm_term(p.similarity, squared_norm(x.support[r], p.dim));
      }
    }
    for (int64_t q = 0; q < p.num_queries; ++q) {
      x.query[q] = task.query + q * p.dim;
      x.grad_query[q] = grad_query + q * p.dim;
    }
    for (int64_t i = 0; valid < p.num_supports && i < p.num_supports; ++i) {
      if (static_cast<uint64_t>(task.labels[i]) < static_cast<uint64_t>(p.num_classes)) continue;
      zero_row(grad_support + i * p.dim, p.dim);
    }
  }

  // The slopes of panel i, as coefficients of the gradients.
  void make_slopes(int64_t t, int64_t i, const KeptTask<A>& x, const KeptWork<A>& work) const {
    const Task<A> task(p, t);
    const bool nll = p.targets != nullptr, by_rows = scores_by_rows<A>(p);
    const int64_t classes = p.num_classes, begin = panels.begin(i), valid = x.start[classes];
    const int64_t rows = block_rows<A>(p.num_supports, p.dim);
    const int width = panels.vectors_in(i) * kW;
    const int count = static_cast<int>(min_of<int64_t>(width, p.num_queries - begin));
    GradientPanel<A> panel{};
    panel.count = count;
    panel.terms = x.query_terms + begin;
    panel.own = x.query_own + begin;
    zero_row(panel.own, width);
    if (by_rows || args.scores != nullptr) {
      row_terms<A>(p, x.query + begin, count, width, panel.terms);
    } else {
      pack_panel(p, task.query + begin * p.dim, count, width, work.packed, panel.terms);
    }
    IntVec<A> targets[kMaxVectors];
    panel.targets = targets;
    const int64_t row = t * p.num_queries + begin;
    const A* lse = static_cast<const A*>(args.lse) + row;
    const A* grad = static_cast<const A*>(args.grad) + row * (nll ? 1 : classes);
    const A* out = static_cast<const A*>(args.out) + row * (nll ? 1 : classes);
    A* sums = work.tables;
    panel.off = sums + width;
    panel.amplitude = panel.off + (nll ? 2 : classes) * width;
    if (nll) {
      load_targets<A>(task.targets + begin, classes, count, width, targets);
      target_tables<A>(grad, out, lse, task.targets + begin, classes, count, width, panel.off,
                       panel.amplitude);
    } else {
      sum_gradients<A>(grad, x.start, classes, count, width, sums);
      class_tables<A>(grad, out, lse, sums, classes, 0, classes, count, width, panel.off,
                      panel.amplitude);
    }
    for (int64_t r = 0; r < valid; ++r) work.row_own[r] = Vec<A>{};
    A* tile = slopes_of(x, i);
    const A factor = task.scale * Const<A>::kLog2e;
    double scale = 0;
    with_vectors(panels.vectors_in(i), [&](auto nv) {
      constexpr int kNV = decltype(nv)::value;
      for (int64_t at = 0; at < valid; at += rows) {
        const int64_t n = min_of(rows, valid - at);
        const Finish<A> finish{p.similarity, x.terms + at,
                               needs_norms(p.similarity) ? panel.terms : nullptr, A(1)};
        if (args.scores != nullptr) {
          load_scores<A, kNV>(args, t, at, n, begin, tile + at * width);
        } else if (by_rows) {
          score_rows<A, kNV>(x.support + at, n, x.query + begin, count, p.dim, finish,
                             tile + at * width);
        } else {
          score_block<A, kNV>(x.support + at, n, work.packed, p.dim, nullptr, finish,
                              tile + at * width);
        }
      }
      if (nll) {
        target_weights<A, kNV>(panel, x.start, 0, 0, valid, true, factor, tile, work.weights);
      } else {
        class_weights<A, kNV>(panel, x.start, 0, 0, 0, valid, factor, tile, work.weights);
      }
      for (int64_t at = 0; at < valid; at += rows) {  // two-level sums
        scale += coefficients_of<A, kNV>(p.similarity, panel, min_of(rows, valid - at),
                                         x.terms + at, task.scale, work.weights + at * width,
                                         tile + at * width, work.row_own + at);
      }
    });
    x.scale[i] = scale;
    if (!needs_norms(p.similarity)) return;
    for (int64_t r = 0; r < valid; ++r) x.own[i * p.num_supports + r] = hsum<A>(work.row_own[r]);
    for (int l = 0; l < width; ++l) panel.own[l] *= own_factor(p.similarity, panel.terms[l]);
  }

  // Columns [begin, end) of the gradient of the queries.
  void make_query_gradients(const KeptTask<A>& x, const KeptWork<A>& work, int64_t begin,
                            int64_t end) const {
    const int64_t valid = x.start[p.num_classes], step = block_columns<A>(min_of(kDepth, valid));
    const A* own = needs_norms(p.similarity) && valid > 0 ? x.query_own : nullptr;
    for (int64_t d = begin; d < end; d += step) {
      const int64_t d_end = min_of(end, d + step);
      for (int64_t k = 0; k == 0 || k < valid; k += kDepth) {
        const int64_t n = min_of(kDepth, valid - k);
        const Rows rows = pack(x.support + k, n, p.num_queries, d, d_end, work);
        for (int64_t i = 0; i < panels.count; ++i) {
          const int64_t first = panels.begin(i), width = panels.vectors_in(i) * kW;
          const OuterRun<A> run{
              slopes_of(x, i) + k * width, 1, width, rows.row, n, x.query + first};
          outer(Outer<A>{&run, 1, x.grad_query + first, k > 0,
                         own != nullptr && k == 0 ? own + first : nullptr, rows.column},
                p.similarity, min_of<int64_t>(width, p.num_queries - first), d, d_end);
        }
      }
    }
  }

  // The same of the supports.
  void make_support_gradients(const KeptTask<A>& x, const KeptWork<A>& work, int64_t begin,
                              int64_t end) const {
    const int64_t valid = x.start[p.num_classes];
    const int64_t step = block_columns<A>(min_of(kDepth, p.num_queries));
    const bool norms = needs_norms(p.similarity);
    for (int64_t r = 0; norms && r < valid; ++r) {
      A sum = 0;
      for (int64_t i = 0; i < panels.count; ++i) sum += x.own[i * p.num_supports + r];
      work.factors[r] = sum * own_factor(p.similarity, x.terms[r]);
    }
    for (int64_t d = begin; d < end; d += step) {
      const int64_t d_end = min_of(end, d + step);
      for (int64_t i = 0, next = 0; i < panels.count; i = next) {
        const int64_t first = panels.begin(i);
        while (next < panels.count && panels.begin(next + 1) - first <= kDepth) ++next;
        const int64_t last = min_of(panels.begin(next), p.num_queries);
        const Rows rows = pack(x.query + first, last - first, valid, d, d_end, work);
        for (int64_t j = i; j < next; ++j) {
          const int64_t at = panels.begin(j), width = panels.vectors_in(j) * kW;
          work.runs[j - i] = {slopes_of(x, j),          width,    1, rows.row + (at - first),
                              min_of(width, last - at), x.support};
        }
        outer(Outer<A>{work.runs, next - i, x.grad_support, i > 0,
                       norms && i == 0 ? work.factors : nullptr, rows.column},
              p.similarity, valid, d, d_end);
      }
    }
  }

  // Sum of dL/dz * similarity.
  void store_scale(int64_t t, const KeptTask<A>& x) const {
    double total = 0;
    for (int64_t i = 0; i < panels.count; ++i) total += x.scale[i];
    static_cast<A*>(args.grad_scale)[t] = static_cast<A>(total);
  }

 private:
  A* slopes_of(const KeptTask<A>& x, int64_t i) const {
    return x.slopes + panels.begin(i) * p.num_supports;
  }
  // Rows, and the column that their first element is.
  struct Rows {
    const A* const* row;
    int64_t column;
  };
  // Columns [begin, end) of rows for num_m output rows: in place, or as a copy where rows a large
  // power of two apart would compete for a few sets of the L1 cache, and the copy serves many.
  Rows pack(const A* const* rows, int64_t n, int64_t num_m, int64_t begin, int64_t end,
            const KeptWork<A>& work) const {
    constexpr int64_t kFewRows = 12;
    if (!copies_rows<A>(p.dim) || num_m <= kFewRows) return {rows, 0};
    const int64_t stride = block_columns<A>(n);
    for (int64_t k = 0; k < n; ++k) {
      work.block_rows[k] = work.block + k * stride;
      convert_row(rows[k] + begin, end - begin, work.block + k * stride);
    }
    return {work.block_rows, begin};
  }
};

static thread_local Scratch kept_tasks, kept_work;

template <class A>
static void run_kept_task(const Backward& args, int64_t t) {
  const KeptBackward<A> job(args);
  const Problem& p = args.problem;
  kept_work.reset(KeptTask<A>::bytes(p) + KeptWork<A>::bytes(p));
  KeptTask<A> x;
  KeptWork<A> work;
  x.take(kept_work, p);
  work.take(kept_work, p);
  job.open(t, x);
  for (int64_t i = 0; i < job.panels.count; ++i) job.make_slopes(t, i, x, work);
  job.make_query_gradients(x, work, 0, p.dim);
  job.make_support_gradients(x, work, 0, p.dim);
  job.store_scale(t, x);
}

template <class A>
static KeptWork<A> thread_work(const Problem& p) {
  kept_work.reset(KeptWork<A>::bytes(p));
  KeptWork<A> work;
  work.take(kept_work, p);
  return work;
}

template <class A>
static void run_kept(const Backward& args, ParallelFor par) {
  const Problem& p = args.problem;
  const int64_t tasks = p.num_tasks, work = 3 * task_work(p);
  if (jobs_per_task(p) == 1) {
    par(
        tasks, max_of<int64_t>(1, kSerialWork / work),
        [](void* context, int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t) {
            run_kept_task<A>(*static_cast<const Backward*>(context), t);
          }
        },
        const_cast<Backward*>(&args));
    return;
  }
  struct Call {
    const Backward& args;
    const KeptBackward<A> job;
    KeptTask<A> task[kJobs];
    int64_t chunks;  // of the columns
  } call{args, KeptBackward<A>(args), {}, 1};
  const int64_t panels = call.job.panels.count;
  constexpr int64_t kColumns = kMaxVectors * kWidth<A>;
  call.chunks = max_of<int64_t>(1, min_of(ceil_div(p.dim, kColumns), kJobs / 2 / tasks));
  kept_tasks.reset(tasks * KeptTask<A>::bytes(p));
  for (int64_t t = 0; t < tasks; ++t) {
    call.task[t].take(kept_tasks, p);
    call.job.open(t, call.task[t]);
  }
  par(
      tasks * panels, max_of<int64_t>(1, kSerialWork / (work / (3 * panels))),
      [](void* context, int64_t begin, int64_t end) {
        const Call& x = *static_cast<const Call*>(context);
        const int64_t count = x.job.panels.count;
        const KeptWork<A> own = thread_work<A>(x.args.problem);
        for (int64_t j = begin; j < end; ++j) {
          x.job.make_slopes(j / count, j % count, x.task[j / count], own);
        }
      },
      &call);
  par(
      tasks * 2 * call.chunks, max_of<int64_t>(1, kSerialWork / (work / (3 * call.chunks))),
      [](void* context, int64_t begin, int64_t end) {
        const Call& x = *static_cast<const Call*>(context);
        const KeptWork<A> own = thread_work<A>(x.args.problem);
        const int64_t strips = ceil_div(x.args.problem.dim, kColumns);
        for (int64_t j = begin; j < end; ++j) {
          const int64_t k = j / 2 % x.chunks;
          const int64_t from = strips * k / x.chunks * kColumns;
          const int64_t to = min_of(x.args.problem.dim, strips * (k + 1) / x.chunks * kColumns);
          const KeptTask<A>& task = x.task[j / (2 * x.chunks)];
          if (j % 2 == 0) {
            x.job.make_query_gradients(task, own, from, to);
          } else {
            x.job.make_support_gradients(task, own, from, to);
          }
        }
      },
      &call);
  for (int64_t t = 0; t < tasks; ++t) call.job.store_scale(t, call.task[t]);
}

}  // namespace fastmeta::matching::FASTMETA_ISA
