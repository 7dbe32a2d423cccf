// Matching attention on the CPU, forward.
//
// Supports are sorted by class once, so the log-sum-exp of a class is one running (maximum, sum)
// per query lane, kept in registers over the rows of the class: exact however far classes lie
// apart, one exponential per pair, and no [Q, S] array: a score tile of at most 48 supports x 64
// queries lives in the L1 cache. Scores are in base 2 (the factor log2(e) rides on the scale) and
// class values are taken relative to a score of the same query, so that large common offsets cost
// no digits.
//
// Floor: the inner products, T*Q*S*D multiply-adds; each support value loaded serves a panel of 64
// queries, each query value a block of supports.
//
// A job is a task, or, where tasks are few, a range of panels of a task against a chunk of its
// sorted supports. A chunk leaves for each query the log-sum-exp over the classes that lie wholly
// inside it and the (maximum, sum) of the two classes that may reach beyond; a last pass merges
// chunks in order. Jobs depend on shapes only, so results do not depend on the number of threads.
#include "matching/matching_attention.h"
#include "matching/matching_cpu_chunks.h"

namespace fastmeta::matching::FASTMETA_ISA {

namespace {

thread_local Scratch call_scratch, job_scratch;

struct Plan {
  const Forward* args;
  int64_t panels, panel_jobs, chunks;
  int64_t lanes;   // per task
  int64_t* order;  // [T, S] when chunks > 1
  int64_t* start;  // [T, C + 1]
  void* partial;   // [T, chunks, kFields, lanes]
};

// One panel of queries against a chunk of supports.
template <class A>
struct Panel {
  int vectors, count;  // width; queries in it
  int64_t query;       // the first of them
  A* packed;           // or, where scores are made by rows, its rows
  const A** rows;
  A* terms;
  A* field[kFields];
  A *run_maximum, *run_sum;  // of the class under way
  A* values;     // [kClassBuffer, lanes] finished classes, base 2, relative to the reference
  int64_t* ids;  // [kClassBuffer]
  int held;
  IntVec<A>* targets;
};

template <class A>
struct Job {
  const Problem& p;
  const int64_t* start;
  Chunk chunk;
  bool whole;  // the only chunk of its task
  A* out;      // of the task

  // Merges the held classes into the log-sum-exp and hands them on.
  template <int NV>
  __attribute__((noinline)) void flush(Panel<A>& x) const {
    constexpr int kW = kWidth<A>, kL = NV * kW;
    if (x.held == 0) return;
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) {
      const Vec<A> before = load(x.field[kMaximum] + v * kW);
      Vec<A> most = before;
      for (int k = 0; k < x.held; ++k) most = vmax<A>(most, load(x.values + k * kL + v * kW));
      most = vmax<A>(splat<A>(Const<A>::kLowest), most);
      Vec<A> sum{};
      for (int k = 0; k < x.held; ++k) sum += vexp2<A>(load(x.values + k * kL + v * kW) - most);
      store(x.field[kSum] + v * kW, load(x.field[kSum] + v * kW) * vexp2<A>(before - most) + sum);
      store(x.field[kMaximum] + v * kW, most);
    }
    if (p.targets != nullptr) {
      for (int k = 0; k < x.held; ++k) take_target<NV>(x, x.ids[k], x.values + k * kL);
      x.held = 0;
    } else if (!(whole && p.num_classes <= kClassBuffer)) {
      unpack_transposed<A>(x.values, kL, x.held, x.count, out + x.query * p.num_classes + x.ids[0],
                           p.num_classes);
      x.held = 0;
    }
  }
  template <int NV>
  static void take_target(Panel<A>& x, int64_t id, const A* value) {
    constexpr int kW = kWidth<A>;
    const IntVec<A> wanted = IntVec<A>{} + static_cast<decltype(IntVec<A>{}[0] + 0)>(id);
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) {
      A* target = x.field[kTarget] + v * kW;
      store(target, x.targets[v] == wanted ? load(value + v * kW) : load(target));
    }
  }
  template <int NV>
  A* push(Panel<A>& x, int64_t id) const {
    if (x.held == kClassBuffer) flush<NV>(x);
    x.ids[x.held] = id;
    return x.values + x.held++ * NV * kWidth<A>;
  }
  // Classes without support that this chunk answers for, [from, to).
  template <int NV>
  void push_empty(Panel<A>& x, int64_t from, int64_t to) const {
    if (p.targets != nullptr) return;
    for (int64_t c = from; c < to; ++c) {
      A* value = push<NV>(x, c);
      for (int v = 0; v < NV; ++v) store(value + v * kWidth<A>, splat<A>(-Const<A>::kInfinity));
    }
  }

  // Scores of sorted supports [begin, begin + n) are in `tile`: runs of one class after the other.
  template <int NV>
  __attribute__((noinline)) void process(Panel<A>& x, int64_t begin, int64_t n, int64_t first_class,
                                         const A* tile) const {
    constexpr int kW = kWidth<A>, kL = NV * kW;
    if (begin == chunk.begin) {
      FASTMETA_UNROLL
      for (int v = 0; v < NV; ++v) {
        const Vec<A> z = load(tile + v * kW);
        store(x.field[kReference] + v * kW, z - z == A(0) ? z : Vec<A>{});
      }
    }
    int64_t c = first_class;
    for (int64_t i = begin; i < begin + n; ++c) {
      const int64_t end = min_of(start[c + 1], begin + n);
      if (end <= i) continue;  // an empty class, pushed before the next one with support
      const bool opens = i == start[c] || i == chunk.begin;
      const bool closes = end == start[c + 1] || end == chunk.end;
      const bool partial = c == chunk.head_class || c == chunk.tail_class;
      const A* rows = tile + (i - begin) * kL;
      const int count = static_cast<int>(end - i);
      A *maximum = x.run_maximum, *sum = x.run_sum, *value = nullptr;
      if (partial && c == chunk.head_class)
        maximum = x.field[kHeadMaximum], sum = x.field[kHeadSum];
      if (partial && c == chunk.tail_class)
        maximum = x.field[kTailMaximum], sum = x.field[kTailSum];
      if (closes && !partial) value = push<NV>(x, c);
      Vec<A> reference[NV];
      FASTMETA_UNROLL
      for (int v = 0; v < NV; ++v) reference[v] = load(x.field[kReference] + v * kW);
      if (value != nullptr && opens && count == 1) {
        FASTMETA_UNROLL
        for (int v = 0; v < NV; ++v) store(value + v * kW, load(rows + v * kW) - reference[v]);
      } else {
        Vec<A> most[NV], total[NV];
        FASTMETA_UNROLL
        for (int v = 0; v < NV; ++v) most[v] = splat<A>(Const<A>::kLowest);
        for (int r = 0; r < count; ++r) {
          FASTMETA_UNROLL
          for (int v = 0; v < NV; ++v) most[v] = vmax<A>(most[v], load(rows + r * kL + v * kW));
        }
        FASTMETA_UNROLL
        for (int v = 0; v < NV; ++v) {
          // A NaN score is lost to the maximum, never to the sum.
          most[v] = vmax<A>(splat<A>(Const<A>::kLowest), most[v]);
          total[v] = Vec<A>{};
        }
        if (!opens) {
          FASTMETA_UNROLL
          for (int v = 0; v < NV; ++v) most[v] = vmax<A>(load(maximum + v * kW), most[v]);
        }
        for (int r = 0; r < count; ++r) {
          FASTMETA_UNROLL
          for (int v = 0; v < NV; ++v) total[v] += vexp2<A>(load(rows + r * kL + v * kW) - most[v]);
        }
        if (!opens) {
          FASTMETA_UNROLL
          for (int v = 0; v < NV; ++v) {
            total[v] += load(sum + v * kW) * vexp2<A>(load(maximum + v * kW) - most[v]);
          }
        }
        if (value != nullptr) {
          FASTMETA_UNROLL
          for (int v = 0; v < NV; ++v)
            store(value + v * kW, (most[v] - reference[v]) + vlog2<A>(total[v]));
        } else {
          FASTMETA_UNROLL
          for (int v = 0; v < NV; ++v) {
            store(maximum + v * kW, most[v]);
            store(sum + v * kW, total[v]);
          }
        }
      }
      // Empty classes behind this one, up to the next with support or the end of this chunk's
      // range.
      if (closes && end == start[c + 1]) {
        int64_t next = c + 1;
        while (next < chunk.class_end && start[next + 1] == end) ++next;
        push_empty<NV>(x, c + 1, next);
      }
      i = end;
    }
  }
};

// Similarities of a tile to where the backward will find them, with zeros up to lane `end`; the
// tile gets its factor.
template <class A, int NV>
void keep_scores(int64_t n, A factor, A* tile, A* scores, int64_t lanes, int64_t end) {
  constexpr int kW = kWidth<A>;
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t l = NV * kW; l < end; ++l) scores[r * lanes + l] = 0;
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) {
      const Vec<A> x = load(tile + (r * NV + v) * kW);
      store(scores + r * lanes + v * kW, x);
      store(tile + (r * NV + v) * kW, x * factor);
    }
  }
}

template <class S>
void run_job(const Plan& plan, int64_t index) {
  using A = Acc<S>;
  const Problem& p = plan.args->problem;
  const Panels<A> panels(p.num_queries);
  const int64_t group = index % plan.panel_jobs, k = index / plan.panel_jobs % plan.chunks;
  const int64_t t = index / (plan.panel_jobs * plan.chunks);
  const int64_t first = panels.count * group / plan.panel_jobs;
  const int64_t last = panels.count * (group + 1) / plan.panel_jobs;
  const bool whole = plan.chunks == 1;
  const int64_t lane0 = panels.begin(first);
  const int64_t lanes = panels.begin(last) - lane0;
  const int64_t rows = block_rows<A>(p.num_supports, p.dim);
  constexpr int kMaxLanes = kMaxVectors * kWidth<A>;

  const bool by_rows = scores_by_rows<S>(p),
             copy = copies_rows<S>(p.dim) && !by_rows && !scores_by_pairs<S>(p);
  const int64_t packed_size = by_rows ? 0 : lanes * p.dim;
  Scratch& scratch = job_scratch;
  const int64_t sort_rows = whole ? p.num_supports : 0,
                sort_classes = whole ? p.num_classes + 1 : 0;
  scratch.reset(Scratch::size_of<int64_t>(sort_rows) + Scratch::size_of<int64_t>(sort_classes) +
                Scratch::size_of<Panel<A>>(last - first) + Block<S>::bytes(rows, p.dim, copy) +
                Scratch::size_of<A>(rows * kMaxLanes) + Scratch::size_of<A>(packed_size) +
                Scratch::size_of<const A*>(lanes) +
                Scratch::size_of<A>(lanes * (3 + kFields + kClassBuffer)) +
                Scratch::size_of<IntVec<A>>(lanes / kWidth<A>) +
                Scratch::size_of<int64_t>((last - first) * kClassBuffer));
  const Task<S> task(p, t);
  const int64_t *order = plan.order + t * p.num_supports,
                *start = plan.start + t * (p.num_classes + 1);
  if (whole) {
    int64_t* own_order = scratch.take<int64_t>(sort_rows);
    int64_t* own_start = scratch.take<int64_t>(sort_classes);
    sort_by_class(task.labels, p.num_supports, p.num_classes, own_order, own_start);
    order = own_order;
    start = own_start;
  }
  Panel<A>* panel = scratch.take<Panel<A>>(last - first);
  Block<S> block;
  block.allocate(scratch, rows, p.dim, copy);
  A* tile = scratch.take<A>(rows * kMaxLanes);
  A* packed = scratch.take<A>(packed_size);
  const A** query_rows = scratch.take<const A*>(lanes);
  A* arrays = scratch.take<A>(lanes * (3 + kFields + kClassBuffer));
  IntVec<A>* targets = scratch.take<IntVec<A>>(lanes / kWidth<A>);
  int64_t* ids = scratch.take<int64_t>((last - first) * kClassBuffer);

  const Job<A> job{p, start, make_chunk(start, p.num_classes, k, plan.chunks), whole,
                   static_cast<A*>(plan.args->out) + t * p.num_queries * p.num_classes};
  const auto take = [&](int64_t n) {
    A* x = arrays;
    arrays += n;
    return x;
  };
  for (int64_t i = first; i < last; ++i) {
    Panel<A>& x = panel[i - first];
    x.vectors = panels.vectors_in(i);
    const int64_t width = x.vectors * kWidth<A>, begin = panels.begin(i);
    x.query = begin;
    x.count = static_cast<int>(min_of(width, p.num_queries - begin));
    x.packed = by_rows ? nullptr : packed + (begin - lane0) * p.dim;
    x.rows = query_rows + (begin - lane0);
    x.terms = take(width);
    x.run_maximum = take(width);
    x.run_sum = take(width);
    x.values = take(width * kClassBuffer);
    A* fields = whole ? take(width * kFields)
                      : static_cast<A*>(plan.partial) +
                            (t * plan.chunks + k) * kFields * plan.lanes + begin;
    for (int f = 0; f < kFields; ++f) x.field[f] = fields + f * (whole ? width : plan.lanes);
    for (int64_t l = 0; l < width; ++l) {
      x.field[kReference][l] = 0;
      x.field[kMaximum][l] = Const<A>::kLowest;
      x.field[kSum][l] = 0;
      x.field[kTarget][l] = -Const<A>::kInfinity;
    }
    x.ids = ids + (i - first) * kClassBuffer;
    x.held = 0;
    x.targets = targets + (begin - lane0) / kWidth<A>;
    if (task.targets != nullptr) {
      load_targets<A>(task.targets + begin, p.num_classes, x.count, static_cast<int>(width),
                      x.targets);
    }
    const S* query = task.query + begin * p.dim;
    if constexpr (!kIsHalf<S>) {
      for (int l = 0; by_rows && l < x.count; ++l) x.rows[l] = query + l * p.dim;
    }
    if (by_rows) {
      row_terms<A>(p, x.rows, x.count, static_cast<int>(width), x.terms);
    } else {
      pack_panel(p, query, x.count, static_cast<int>(width), x.packed, x.terms);
    }
  }
  const A factor = task.scale * Const<A>::kLog2e;
  A* scores = static_cast<A*>(plan.args->scores);
  if (scores != nullptr) scores += t * p.num_supports * kept_lanes(p);
  const Chunk& chunk = job.chunk;
  int64_t first_class = chunk.begin < chunk.end ? class_at(start, p.num_classes, chunk.begin) : 0;
  // Empty classes in front of all supports.
  const int64_t front = chunk.begin < chunk.end ? first_class : chunk.class_end;
  for (int64_t i = first; i < last; ++i) {
    Panel<A>& x = panel[i - first];
    with_vectors(x.vectors, [&](auto nv) {
      job.template push_empty<decltype(nv)::value>(x, chunk.class_begin, front);
    });
  }
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += rows) {
    const int64_t n = min_of(rows, chunk.end - begin);
    block.gather(p, task.support, order + begin, n, 0);
    while (start[first_class + 1] <= begin) ++first_class;
    const int64_t rest = min_of(rows, chunk.end - begin - n);
    for (int64_t i = first; i < last; ++i) {
      const int64_t from = rest * (i - first) / (last - first);
      prefetch_rows(task.support, order + begin + n + from,
                    rest * (i - first + 1) / (last - first) - from, p.dim);
      Panel<A>& x = panel[i - first];
      const Finish<A> finish{p.similarity, block.terms,
                             needs_norms(p.similarity) ? x.terms : nullptr,
                             scores == nullptr ? factor : A(1)};
      with_vectors(x.vectors, [&](auto nv) {
        constexpr int kNV = decltype(nv)::value;
        if (by_rows) {
          score_rows<A, kNV>(block.rows, n, x.rows, x.count, p.dim, finish, tile);
        } else {
          block.template score<kNV>(p, 0, n, x.packed, task.weight, finish, tile);
        }
        if (scores != nullptr) {
          const int64_t lanes = kept_lanes(p), end = i + 1 < panels.count ? 0 : lanes - x.query;
          keep_scores<A, kNV>(n, factor, tile, scores + begin * lanes + x.query, lanes, end);
        }
        job.template process<kNV>(x, begin, n, first_class, tile);
      });
    }
  }
  for (int64_t i = first; i < last; ++i) {
    Panel<A>& x = panel[i - first];
    with_vectors(x.vectors, [&](auto nv) {
      constexpr int kNV = decltype(nv)::value;
      job.template flush<kNV>(x);
      if (whole) {
        finish_panel<A, kNV>(*plan.args, 1, t, start, x.query, x.count, x.field[0], kNV * kWidth<A>,
                             x.targets, p.num_classes <= kClassBuffer ? x.values : nullptr);
      }
    });
  }
}

template <class S>
void run_finish(const Plan& plan, int64_t index) {
  using A = Acc<S>;
  const Problem& p = plan.args->problem;
  const Panels<A> panels(p.num_queries);
  const int64_t i = index % panels.count, t = index / panels.count, begin = panels.begin(i);
  const Task<S> task(p, t);
  const int width = panels.vectors_in(i) * kWidth<A>;
  const int count = static_cast<int>(min_of<int64_t>(width, p.num_queries - begin));
  IntVec<A> targets[kMaxVectors];
  if (task.targets != nullptr) {
    load_targets<A>(task.targets + begin, p.num_classes, count, width, targets);
  }
  with_vectors(panels.vectors_in(i), [&](auto nv) {
    finish_panel<A, decltype(nv)::value>(
        *plan.args, plan.chunks, t, plan.start + t * (p.num_classes + 1), begin, count,
        static_cast<const A*>(plan.partial) + t * plan.chunks * kFields * plan.lanes + begin,
        plan.lanes, targets, nullptr);
  });
}

template <class S>
void run(const Forward& args, ParallelFor par) {
  using A = Acc<S>;
  const Problem& p = args.problem;
  if (p.num_tasks == 0 || p.num_queries == 0) return;
  const Panels<A> panels(p.num_queries);
  Plan plan{&args, panels.count, 1, 1, panels.lanes(), nullptr, nullptr, nullptr};
  const int64_t wanted = jobs_per_task(p);
  plan.chunks = max_of<int64_t>(1, min_of(wanted, p.num_supports / 256));
  plan.panel_jobs = min_of(panels.count, ceil_div(wanted, plan.chunks));
  // Few supports stay in the cache while panel after panel passes by them, and are worth a job for
  // a few panels; many are taken block by block past all panels of a job.
  if (plan.chunks == 1 &&
      p.num_supports * p.dim * static_cast<int64_t>(sizeof(A)) <= kResidentBytes) {
    plan.panel_jobs = min_of(panels.count, ceil_div(kJobs, p.num_tasks));
  }
  const int64_t jobs = p.num_tasks * plan.panel_jobs * plan.chunks;
  if (plan.chunks > 1) {
    const int64_t rows = p.num_tasks * p.num_supports, starts = p.num_tasks * (p.num_classes + 1);
    const int64_t partial = p.num_tasks * plan.chunks * kFields * plan.lanes;
    call_scratch.reset(Scratch::size_of<int64_t>(rows) + Scratch::size_of<int64_t>(starts) +
                       Scratch::size_of<A>(partial));
    plan.order = call_scratch.take<int64_t>(rows);
    plan.start = call_scratch.take<int64_t>(starts);
    plan.partial = call_scratch.take<A>(partial);
    par(
        p.num_tasks, 1,
        [](void* context, int64_t begin, int64_t end) {
          const Plan& x = *static_cast<const Plan*>(context);
          const Problem& q = x.args->problem;
          for (int64_t t = begin; t < end; ++t) {
            sort_by_class(q.labels + t * q.num_supports, q.num_supports, q.num_classes,
                          x.order + t * q.num_supports, x.start + t * (q.num_classes + 1));
          }
        },
        &plan);
  }
  const int64_t work = task_work(p) / (plan.panel_jobs * plan.chunks);
  par(
      jobs, max_of<int64_t>(1, kSerialWork / work),
      [](void* context, int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) run_job<S>(*static_cast<const Plan*>(context), j);
      },
      &plan);
  if (plan.chunks > 1) {
    par(
        p.num_tasks * panels.count, 1,
        [](void* context, int64_t begin, int64_t end) {
          for (int64_t j = begin; j < end; ++j)
            run_finish<S>(*static_cast<const Plan*>(context), j);
        },
        &plan);
  }
}

}  // namespace

void forward(const Forward& args, ParallelFor par) {
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
