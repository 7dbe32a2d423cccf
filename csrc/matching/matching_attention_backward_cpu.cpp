// Matching attention on the CPU, backward.
//
// Scores are computed again, a tile at a time, and turned into dL/dz on the spot: with the
// log-sum-exp of the class, off = lse + logp, and amplitude G - P sum G per (class, query lane)
// made beforehand,
//   dL/dz(q, i) = exp2(z - off) * amplitude          one exponential per pair.
// While the tile is in the L1 cache it gives both gradients: rows of grad_query and of
// grad_support. The parts along a vector itself (cosine, squared euclidean) are collected as one
// number per row.
//
// Floor: 3 T*Q*S*D multiply-adds. Never [Q, S] in memory.
//
// A job is a task, or, where tasks are few, a chunk of the larger of S and Q; the gradient of the
// other side is then a private partial per chunk, added up in the order of the chunks. Jobs depend
// on shapes only, so results do not depend on the number of threads. Sums over supports have three
// levels: block, chunk, all.
#include "matching/matching_attention.h"
#include "matching/matching_cpu_plan.h"

namespace fastmeta::matching::FASTMETA_ISA {

namespace {

constexpr int64_t kPartialBytes = int64_t{8}
                                  << 20;  // private partial gradients of all chunks together

thread_local Scratch call_scratch, job_scratch;

struct Plan {
  const Backward* args;
  int64_t chunks;
  bool split_queries;  // else supports
  int64_t* order;      // [T, S] when chunks > 1
  int64_t* start;      // [T, C + 1]
  void* grad_sum;      // [T, lanes] sum of G over supported classes, when supports are split
  void* partial;       // [T, chunks, Q or S, D]
  void* weight;        // [T, chunks, D], additive
  double* scale;       // [T, chunks]
};

template <class A>
struct Panel {
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
void load_classes(const A* src, int64_t classes, int count, int lanes, int64_t c, int64_t n,
                  A* dst) {
  pack_transposed(src + c, classes, n, count, lanes, dst);
}

// out[lane] = sum of grad over the classes with support.
template <class A>
void sum_gradients(const A* grad, const int64_t* start, int64_t classes, int count, int lanes,
                   A* out) {
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
void class_tables(const A* grad, const A* out, const A* lse, const A* grad_sum, int64_t classes,
                  int64_t c0, int64_t c1, int count, int lanes, A* off, A* amplitude) {
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
void target_tables(const A* grad, const A* nll, const A* lse, const int64_t* targets,
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
double coefficients(const Panel<A>& x, const int64_t* start, int64_t first_class,
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
double coefficients_of(Similarity similarity, const Panel<A>& x, const int64_t* start,
                       int64_t first_class, int64_t table_class, bool nll, int64_t begin, int64_t n,
                       const A* terms, A scale, A* tile, Vec<A>* row_own) {
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

template <class A>
void zero_row(A* row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = A{};
}

template <class S>
void run_job(const Plan& plan, int64_t index) {
  using A = Acc<S>;
  constexpr int kW = kWidth<A>, kMaxLanes = kMaxVectors * kW;
  const Backward& args = *plan.args;
  const Problem& p = args.problem;
  const bool nll = p.targets != nullptr, additive = p.similarity == Similarity::kAdditive;
  const int64_t t = index / plan.chunks, k = index % plan.chunks;
  const int64_t supports = p.num_supports, classes = p.num_classes, dim = p.dim;
  const Panels<A> panels(p.num_queries);
  const bool whole = plan.chunks == 1, by_query = !whole && plan.split_queries;
  const int64_t first = by_query ? panels.count * k / plan.chunks : 0;
  const int64_t last = by_query ? panels.count * (k + 1) / plan.chunks : panels.count;
  const int64_t lane0 = panels.begin(first), lanes = panels.begin(last) - lane0;
  const int64_t rows = block_rows<A>(supports, dim);
  Scratch& scratch = job_scratch;
  const Task<S> task(p, t);
  const int64_t *order = plan.order + t * supports, *start = plan.start + t * (classes + 1);

  // Sorted supports of this job and the classes they span. Tables are sized for all classes when
  // the sorting is this job's own.
  int64_t begin = 0, end = 0, c0 = 0, c1 = classes;
  if (!whole) {
    const int64_t valid = start[classes];
    begin = by_query ? 0 : valid * k / plan.chunks;
    end = by_query ? valid : valid * (k + 1) / plan.chunks;
    while (c0 < classes && start[c0 + 1] <= begin) ++c0;
    while (c1 > c0 && start[c1 - 1] >= end) --c1;
  }
  const int64_t table = nll ? 2 : c1 - c0;
  const bool query_scratch = kIsHalf<S>;
  const bool dq_private = !whole && !by_query;
  scratch.reset(
      (whole ? Scratch::size_of<int64_t>(supports) + Scratch::size_of<int64_t>(classes + 1) : 0) +
      Scratch::size_of<Panel<A>>(last - first) + Block<S>::bytes(rows, dim) +
      Scratch::size_of<A>(rows * kMaxLanes) + Scratch::size_of<A>(lanes * dim) +
      Scratch::size_of<A>(lanes * (2 + 2 * table)) + Scratch::size_of<A>(kMaxLanes) +
      Scratch::size_of<IntVec<A>>(lanes / kW) + Scratch::size_of<Vec<A>>(rows) +
      2 * Scratch::size_of<A*>(lanes) + 2 * Scratch::size_of<A*>(rows) +
      (query_scratch ? 2 * Scratch::size_of<A>(lanes * dim) + Scratch::size_of<A>(rows * dim) : 0) +
      (additive ? Scratch::size_of<A>(dim) : 0));
  if (whole) {
    int64_t* own_order = scratch.take<int64_t>(supports);
    int64_t* own_start = scratch.take<int64_t>(classes + 1);
    end = sort_by_class(task.labels, supports, classes, own_order, own_start);
    order = own_order;
    start = own_start;
  }
  Panel<A>* panel = scratch.take<Panel<A>>(last - first);
  Block<S> block;
  block.allocate(scratch, rows, dim);
  A* tile = scratch.take<A>(rows * kMaxLanes);
  A* packed = scratch.take<A>(lanes * dim);
  A* arrays = scratch.take<A>(lanes * (2 + 2 * table));
  A* grad_sum = scratch.take<A>(kMaxLanes);
  IntVec<A>* targets = scratch.take<IntVec<A>>(lanes / kW);
  Vec<A>* row_own = scratch.take<Vec<A>>(rows);
  const A** query_rows = scratch.take<const A*>(lanes);
  A** grad_query_rows = scratch.take<A*>(lanes);
  A** grad_support_rows = scratch.take<A*>(rows);
  A* converted = query_scratch ? scratch.take<A>(lanes * dim) : nullptr;
  A* grad_converted = query_scratch ? scratch.take<A>(lanes * dim) : nullptr;
  A* support_converted = query_scratch ? scratch.take<A>(rows * dim) : nullptr;
  A* weight_gradient = additive ? scratch.take<A>(dim) : nullptr;
  if (additive) zero_row(weight_gradient, dim);

  // Where gradients go: the caller's arrays, a private partial, or converted rows.
  S* grad_query = static_cast<S*>(args.grad_query) + (t * p.num_queries + lane0) * dim;
  S* grad_support = static_cast<S*>(args.grad_support) + t * supports * dim;
  A* partial = whole ? nullptr
                     : static_cast<A*>(plan.partial) +
                           (t * plan.chunks + k) * (by_query ? supports : p.num_queries) * dim;
  const auto query_target = [&](int64_t q) -> A* {
    if (dq_private) return partial + q * dim;
    if constexpr (kIsHalf<S>) {
      return grad_converted + q * dim;
    } else {
      return grad_query + q * dim;
    }
  };
  const A* grad = static_cast<const A*>(args.grad) + t * p.num_queries * (nll ? 1 : classes);
  const A* out = static_cast<const A*>(args.out) + t * p.num_queries * (nll ? 1 : classes);
  const A* lse = static_cast<const A*>(args.lse) + t * p.num_queries;
  for (int64_t i = first; i < last; ++i) {
    Panel<A>& x = panel[i - first];
    x.vectors = panels.vectors_in(i);
    const int width = x.vectors * kW;
    x.query = panels.begin(i);
    const int64_t at = x.query - lane0;
    x.count = static_cast<int>(min_of<int64_t>(width, p.num_queries - x.query));
    x.packed = packed + at * dim;
    x.terms = arrays;
    x.own = arrays + width;
    x.off = arrays + 2 * width;
    x.amplitude = x.off + table * width;
    arrays = x.amplitude + table * width;
    x.targets = targets + at / kW;
    x.rows = query_rows + at;
    x.grad = grad_query_rows + at;
    const S* query = task.query + x.query * dim;
    for (int l = 0; l < width; ++l) x.own[l] = 0;
    for (int l = 0; l < x.count; ++l) {
      if constexpr (kIsHalf<S>) {
        convert_row(query + l * dim, dim, converted + (at + l) * dim);
        x.rows[l] = converted + (at + l) * dim;
      } else {
        x.rows[l] = query + l * dim;
      }
      x.grad[l] = query_target(at + l);
      if (begin == end) zero_row(x.grad[l], dim);
    }
    pack_panel(p, query, x.count, width, x.packed, x.terms);
    if (nll) {
      load_targets<A>(task.targets + x.query, classes, x.count, width, x.targets);
      target_tables<A>(grad + x.query, out + x.query, lse + x.query, task.targets + x.query,
                       classes, x.count, width, x.off, x.amplitude);
    } else {
      const A* sums = grad_sum;
      if (plan.grad_sum != nullptr) {
        sums = static_cast<const A*>(plan.grad_sum) + t * panels.lanes() + x.query;
      } else {
        sum_gradients<A>(grad + x.query * classes, start, classes, x.count, width, grad_sum);
      }
      class_tables<A>(grad + x.query * classes, out + x.query * classes, lse + x.query, sums,
                      classes, c0, c1, x.count, width, x.off, x.amplitude);
    }
  }

  double scale_total = 0;
  int64_t first_class = c0;
  for (int64_t at = begin; at < end; at += rows) {
    const int64_t n = min_of(rows, end - at);
    block.gather(p, task.support, order + at, n);
    while (start[first_class + 1] <= at) ++first_class;
    for (int64_t r = 0; r < n; ++r) {
      row_own[r] = Vec<A>{};
      if (by_query) {
        grad_support_rows[r] = partial + order[at + r] * dim;
      } else if constexpr (kIsHalf<S>) {
        grad_support_rows[r] = support_converted + r * dim;
      } else {
        grad_support_rows[r] = grad_support + order[at + r] * dim;
      }
    }
    for (int64_t i = first; i < last; ++i) {
      const Panel<A>& x = panel[i - first];
      const int width = x.vectors * kW;
      const Finish<A> finish{p.similarity, block.terms,
                             needs_norms(p.similarity) ? x.terms : nullptr, A(1)};
      with_vectors(x.vectors, [&](auto nv) {
        constexpr int kNV = decltype(nv)::value;
        score_block<A, kNV>(block.rows, n, x.packed, dim, task.weight, finish, tile);
        scale_total += coefficients_of<A, kNV>(p.similarity, x, start, first_class, c0, nll, at, n,
                                               block.terms, task.scale, tile, row_own);
      });
      const bool add_query = at > begin, add_support = i > first;
      if (additive) {
        additive_gradients<A>(tile, width, block.rows, n, x.rows, x.count, dim, task.weight,
                              grad_support_rows, x.grad, weight_gradient, add_support, add_query);
        continue;
      }
      const Outer<A> to_query{tile, 1, width, block.rows, n, x.rows, x.grad, add_query};
      const Outer<A> to_support{
          tile, width, 1, x.rows, x.count, block.rows, grad_support_rows, add_support};
      if (p.similarity == Similarity::kEuclidean) {
        outer_product<A, Inner::kDifference>(to_query, x.count, dim);
        outer_product<A, Inner::kDifference>(to_support, n, dim);
      } else {
        outer_product<A, Inner::kProduct>(to_query, x.count, dim);
        outer_product<A, Inner::kProduct>(to_support, n, dim);
      }
    }
    for (int64_t r = 0; r < n; ++r) {
      if (needs_norms(p.similarity)) {
        const A square =
            p.similarity == Similarity::kCosine ? block.terms[r] * block.terms[r] : A(1);
        add_scaled(grad_support_rows[r], -hsum<A>(row_own[r]) * square, block.rows[r], dim);
      }
      if constexpr (kIsHalf<S>) {
        if (!by_query) store_row(grad_support_rows[r], dim, grad_support + order[at + r] * dim);
      }
    }
  }

  for (int64_t i = first; i < last; ++i) {
    const Panel<A>& x = panel[i - first];
    for (int l = 0; l < x.count; ++l) {
      if (needs_norms(p.similarity) && begin < end) {
        const A square = p.similarity == Similarity::kCosine ? x.terms[l] * x.terms[l] : A(1);
        add_scaled(x.grad[l], -x.own[l] * square, x.rows[l], dim);
      }
      if constexpr (kIsHalf<S>) {
        if (!dq_private) store_row(x.grad[l], dim, grad_query + (x.query - lane0 + l) * dim);
      }
    }
  }
  if (!by_query && k == 0) {
    for (int64_t i = 0; i < supports; ++i) {
      if (static_cast<uint64_t>(task.labels[i]) >= static_cast<uint64_t>(classes)) {
        zero_row(grad_support + i * dim, dim);
      }
    }
  }
  A* weight_out = static_cast<A*>(args.grad_weight);
  if (whole) {
    static_cast<A*>(args.grad_scale)[t] = static_cast<A>(scale_total);
    if (additive) convert_row(weight_gradient, dim, weight_out + t * dim);
  } else {
    plan.scale[index] = scale_total;
    if (additive) convert_row(weight_gradient, dim, static_cast<A*>(plan.weight) + index * dim);
  }
}

// Adds up the private partials of row `row` of all tasks.
template <class S>
void reduce_row(const Plan& plan, int64_t row) {
  using A = Acc<S>;
  constexpr int kW = kWidth<A>;
  const Problem& p = plan.args->problem;
  const int64_t rows = plan.split_queries ? p.num_supports : p.num_queries, t = row / rows,
                i = row % rows;
  S* out = static_cast<S*>(plan.split_queries ? plan.args->grad_support : plan.args->grad_query) +
           row * p.dim;
  if (plan.split_queries &&
      static_cast<uint64_t>(p.labels[row]) >= static_cast<uint64_t>(p.num_classes)) {
    return zero_row(out, p.dim);
  }
  const A* from = static_cast<const A*>(plan.partial) + (t * plan.chunks * rows + i) * p.dim;
  for (int64_t d = 0; d < p.dim; d += kW) {
    const int n = static_cast<int>(min_of<int64_t>(kW, p.dim - d));
    Vec<A> sum{};
    for (int64_t k = 0; k < plan.chunks; ++k) sum += load_n(from + k * rows * p.dim + d, n);
    store_n(out + d, sum, n);
  }
}

template <class S>
void run(const Backward& args, ParallelFor par) {
  using A = Acc<S>;
  const Problem& p = args.problem;
  const int64_t tasks = p.num_tasks;
  if (tasks == 0) return;
  if (p.num_queries == 0) {
    zero_row(static_cast<S*>(args.grad_support), tasks * p.num_supports * p.dim);
    zero_row(static_cast<A*>(args.grad_scale), tasks);
    if (p.similarity == Similarity::kAdditive)
      zero_row(static_cast<A*>(args.grad_weight), tasks * p.dim);
    return;
  }
  const Panels<A> panels(p.num_queries);
  Plan plan{&args,   1,      p.num_queries > p.num_supports, nullptr, nullptr, nullptr, nullptr,
            nullptr, nullptr};
  const int64_t larger = plan.split_queries ? panels.count : p.num_supports / 256;
  const int64_t row_bytes = static_cast<int64_t>(sizeof(A)) * max_of<int64_t>(1, p.dim) * tasks *
                            max_of<int64_t>(1, min_of(p.num_queries, p.num_supports));
  // Large partials: fewer chunks, but enough for a few threads.
  const int64_t fit = max_of<int64_t>(kPartialBytes / row_bytes, ceil_div(4, tasks));
  plan.chunks = max_of<int64_t>(1, min_of(min_of(jobs_per_task(p), larger), fit));
  if (plan.chunks > 1) {
    const int64_t rows = tasks * p.num_supports, starts = tasks * (p.num_classes + 1);
    const int64_t jobs = tasks * plan.chunks;
    const bool sums = p.targets == nullptr && !plan.split_queries;
    const int64_t partial = jobs * (plan.split_queries ? p.num_supports : p.num_queries) * p.dim;
    call_scratch.reset(Scratch::size_of<int64_t>(rows) + Scratch::size_of<int64_t>(starts) +
                       Scratch::size_of<A>(partial) + Scratch::size_of<double>(jobs) +
                       Scratch::size_of<A>(jobs * p.dim) +
                       Scratch::size_of<A>(tasks * panels.lanes()));
    plan.order = call_scratch.take<int64_t>(rows);
    plan.start = call_scratch.take<int64_t>(starts);
    plan.partial = call_scratch.take<A>(partial);
    plan.scale = call_scratch.take<double>(jobs);
    plan.weight = call_scratch.take<A>(jobs * p.dim);
    if (sums) plan.grad_sum = call_scratch.take<A>(tasks * panels.lanes());
    par(
        tasks, 1,
        [](void* context, int64_t begin, int64_t end) {
          const Plan& x = *static_cast<const Plan*>(context);
          const Problem& q = x.args->problem;
          for (int64_t t = begin; t < end; ++t) {
            sort_by_class(q.labels + t * q.num_supports, q.num_supports, q.num_classes,
                          x.order + t * q.num_supports, x.start + t * (q.num_classes + 1));
          }
        },
        &plan);
    if (sums) {
      par(
          tasks * panels.count, 1,
          [](void* context, int64_t begin, int64_t end) {
            const Plan& x = *static_cast<const Plan*>(context);
            const Problem& q = x.args->problem;
            const Panels<A> split(q.num_queries);
            for (int64_t j = begin; j < end; ++j) {
              const int64_t t = j / split.count, i = j % split.count, at = split.begin(i);
              const int width = split.vectors_in(i) * kWidth<A>;
              sum_gradients<A>(
                  static_cast<const A*>(x.args->grad) + (t * q.num_queries + at) * q.num_classes,
                  x.start + t * (q.num_classes + 1), q.num_classes,
                  static_cast<int>(min_of<int64_t>(width, q.num_queries - at)), width,
                  static_cast<A*>(x.grad_sum) + t * split.lanes() + at);
            }
          },
          &plan);
    }
  }
  const int64_t work = 3 * task_work(p) / plan.chunks;
  par(
      tasks * plan.chunks, max_of<int64_t>(1, kSerialWork / work),
      [](void* context, int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) run_job<S>(*static_cast<const Plan*>(context), j);
      },
      &plan);
  if (plan.chunks == 1) return;
  const int64_t rows = tasks * (plan.split_queries ? p.num_supports : p.num_queries);
  par(
      rows, max_of<int64_t>(1, 32768 / (plan.chunks * (p.dim + 8))),
      [](void* context, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) reduce_row<S>(*static_cast<const Plan*>(context), r);
      },
      &plan);
  for (int64_t t = 0; t < tasks; ++t) {
    double scale = 0;
    for (int64_t k = 0; k < plan.chunks; ++k) scale += plan.scale[t * plan.chunks + k];
    static_cast<A*>(args.grad_scale)[t] = static_cast<A>(scale);
    if (p.similarity != Similarity::kAdditive) continue;
    A* out = static_cast<A*>(args.grad_weight) + t * p.dim;
    const A* from = static_cast<const A*>(plan.weight) + t * plan.chunks * p.dim;
    for (int64_t d = 0; d < p.dim; ++d) {
      double sum = 0;
      for (int64_t k = 0; k < plan.chunks; ++k) sum += static_cast<double>(from[k * p.dim + d]);
      out[d] = static_cast<A>(sum);
    }
  }
}

}  // namespace

void backward(const Backward& args, ParallelFor par) {
  switch (args.problem.dtype) {
    case DType::kFloat32:
      return run<float>(args, par);
    case DType::kFloat64:
      return run<double>(args, par);
    case DType::kBFloat16:
      return run<bfloat16>(args, par);
    case DType::kFloat16:
      return run<float16>(args, par);
  }
}

}  // namespace fastmeta::matching::FASTMETA_ISA
