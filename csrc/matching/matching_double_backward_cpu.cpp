// Matching attention on the CPU, double backward: formulas in matching_attention.h.
//
// Two passes over the pairs. The first makes m and M, the class means of the scores' derivative
// along the directions; the second the gradients. Both compute scores, derivatives and shares a
// tile at a time; where the tiles of a panel against all supports stay in the cache the second pass
// finds them there.
//
// Floor: 7 T*Q*S*D multiply-adds (3 for the tiles, 4 for the gradients), 10 where tiles are made
// twice. Never [Q, S] in memory.
//
// Jobs and partial sums are those of the backward: a task, or where tasks are few a chunk of the
// larger of S and Q. Where supports are split the first pass has jobs of its own, one a panel, as
// it needs all supports of a query.
#include "matching/matching_attention.h"
#include "matching/matching_cpu_second_job.h"

namespace fastmeta::matching::FASTMETA_ISA {

namespace {

thread_local Scratch call_scratch, job_scratch;

template <class S>
void zero_padding(const DoubleBackward& args, int64_t t) {
  const Problem& p = args.problem;
  for (int64_t i = t * p.num_supports; i < (t + 1) * p.num_supports; ++i) {
    if (static_cast<uint64_t>(p.labels[i]) < static_cast<uint64_t>(p.num_classes)) continue;
    zero_row(static_cast<S*>(args.grad_support) + i * p.dim, p.dim);
  }
}

// The first pass by itself, panel `index` of all tasks: where supports are split.
template <class S>
void run_moves(const SecondPlan& plan, int64_t index) {
  const Problem& p = plan.args->problem;
  const Panels<Acc<S>> panels(p.num_queries);
  const int64_t t = index / panels.count, i = index % panels.count;
  const int64_t valid = plan.start[t * (p.num_classes + 1) + p.num_classes];
  SecondJob<S>(job_scratch, plan, t, i, i + 1, 0, valid, nullptr, false, Pass::kMoves)
      .run(Pass::kMoves);
}

template <class S>
void run_job(const SecondPlan& plan, int64_t index) {
  using A = Acc<S>;
  const Problem& p = plan.args->problem;
  const Panels<A> panels(p.num_queries);
  const int64_t t = index / plan.chunks, k = index % plan.chunks, classes = p.num_classes;
  const int64_t* start = plan.start + t * (classes + 1);
  const bool split = plan.chunks > 1, by_query = split && plan.split_queries;
  const bool by_support = split && !plan.split_queries;
  const int64_t first = by_query ? panels.count * k / plan.chunks : 0;
  const int64_t last = by_query ? panels.count * (k + 1) / plan.chunks : panels.count;
  const int64_t begin = by_support ? chunk_begin(start, classes, k, plan.chunks, kWholeRows) : 0;
  const int64_t end =
      by_support ? chunk_begin(start, classes, k + 1, plan.chunks, kWholeRows) : start[classes];
  A* partial = nullptr;
  if (split) {
    const int64_t rows = by_query ? p.num_supports : p.num_queries;
    partial = static_cast<A*>(plan.partial) + index * rows * p.dim;
  }
  const Pass pass = by_support ? Pass::kGradients : Pass::kBoth;
  SecondJob<S> job(job_scratch, plan, t, first, last, begin, end, partial, by_support, pass);
  job.run(pass);
  if (!by_query && k == 0) zero_padding<S>(*plan.args, t);
  plan.scale[index] = job.scale_total;
  if (job.additive) {
    convert_row(job.grad_weight, p.dim, static_cast<A*>(plan.weight) + index * p.dim);
  }
}

template <class S>
void run(const DoubleBackward& args, ParallelFor par) {
  using A = Acc<S>;
  const Problem& p = args.problem;
  const int64_t tasks = p.num_tasks;
  if (tasks == 0) return;
  if (p.num_queries == 0) {
    zero_row(static_cast<S*>(args.grad_support), tasks * p.num_supports * p.dim);
    zero_row(static_cast<A*>(args.grad_scale), tasks);
    if (p.similarity == Similarity::kAdditive) {
      zero_row(static_cast<A*>(args.grad_weight), tasks * p.dim);
    }
    return;
  }
  const Panels<A> panels(p.num_queries);
  SecondPlan plan{&args, 1, p.num_queries > p.num_supports};
  plan.chunks = gradient_chunks<A>(p, plan.split_queries, panels.count);
  const int64_t jobs = tasks * plan.chunks;
  const int64_t rows = tasks * p.num_supports, starts = tasks * (p.num_classes + 1);
  const int64_t private_rows = plan.split_queries ? p.num_supports : p.num_queries;
  const int64_t partial = plan.chunks > 1 ? jobs * private_rows * p.dim : 0;
  const int64_t weights = p.similarity == Similarity::kAdditive ? jobs * p.dim : 0;
  call_scratch.reset(Scratch::size_of<int64_t>(rows) + Scratch::size_of<int64_t>(starts) +
                     2 * Scratch::size_of<A>(tasks * panels.lanes()) +
                     Scratch::size_of<A>(partial) + Scratch::size_of<A>(weights) +
                     Scratch::size_of<double>(jobs));
  plan.order = call_scratch.take<int64_t>(rows);
  plan.start = call_scratch.take<int64_t>(starts);
  plan.move = call_scratch.take<A>(tasks * panels.lanes());
  plan.reference = call_scratch.take<A>(tasks * panels.lanes());
  plan.partial = call_scratch.take<A>(partial);
  plan.weight = call_scratch.take<A>(weights);
  plan.scale = call_scratch.take<double>(jobs);
  const int64_t work = 8 * task_work(p) / plan.chunks;
  const int64_t grain = max_of<int64_t>(1, kSerialWork / work);
  par(
      tasks, max_of<int64_t>(1, kSerialWork / (p.num_supports + p.num_classes + 1)),
      [](void* context, int64_t begin, int64_t end) {
        const SecondPlan& x = *static_cast<const SecondPlan*>(context);
        const Problem& q = x.args->problem;
        for (int64_t t = begin; t < end; ++t) {
          sort_by_class(q.labels + t * q.num_supports, q.num_supports, q.num_classes,
                        x.order + t * q.num_supports, x.start + t * (q.num_classes + 1));
        }
      },
      &plan);
  if (plan.chunks > 1 && !plan.split_queries) {
    par(
        tasks * panels.count, 1,
        [](void* context, int64_t begin, int64_t end) {
          for (int64_t j = begin; j < end; ++j)
            run_moves<S>(*static_cast<const SecondPlan*>(context), j);
        },
        &plan);
  }
  par(
      jobs, grain,
      [](void* context, int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j)
          run_job<S>(*static_cast<const SecondPlan*>(context), j);
      },
      &plan);
  if (plan.chunks > 1) {
    par(
        tasks * private_rows, max_of<int64_t>(1, 32768 / (plan.chunks * (p.dim + 8))),
        [](void* context, int64_t begin, int64_t end) {
          const SecondPlan& x = *static_cast<const SecondPlan*>(context);
          void* out = x.split_queries ? x.args->grad_support : x.args->grad_query;
          for (int64_t r = begin; r < end; ++r) {
            add_partials<S>(x.args->problem, x.split_queries, x.chunks, x.partial, r, out);
          }
        },
        &plan);
  }
  add_job_sums<A>(p, plan.chunks, plan.scale, plan.weight, args.grad_scale, args.grad_weight);
}

}  // namespace

void double_backward(const DoubleBackward& args, ParallelFor par) {
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
