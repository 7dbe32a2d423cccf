// Matching attention on the CPU, backward.
//
// Scores are computed again (small additive tasks: kept by the forward) and turned into dL/dz on
// the spot: with the share w of a support in its class, made from the scores of the whole class,
// and the amplitude G - P sum G per (class, query lane), made beforehand, dL/dz = w * amplitude:
// one exponential per pair. The slopes of a block of supports with some panels of queries are held
// in the L2 cache and multiplied with both sides: rows of grad_query and of grad_support are added
// to once for all of them. The parts along a vector itself (cosine, squared euclidean) are
// collected as one number per row.
//
// Classes too large for a block are measured by a pass before (matching_cpu_exact.h). Few-shot
// tasks go another way (matching_cpu_kept.h).
//
// Floor: 3 T*Q*S*D multiply-adds. Never [Q, S] in memory.
//
// A job is a task, or, where tasks are few, a chunk of the larger of S and Q; the gradient of the
// other side is then a private partial per chunk, added up in the order of the chunks. Jobs depend
// on shapes only, so results do not depend on the number of threads. Sums over supports have three
// levels: block, chunk, all.
#include "matching/matching_attention.h"
#include "matching/matching_cpu_backward_job.h"
#include "matching/matching_cpu_kept.h"

namespace fastmeta::matching::FASTMETA_ISA {

namespace {

thread_local Scratch call_scratch, exact_scratch;

template <class S>
void run_job(const BackwardPlan& plan, int64_t index) {
  BackwardJob<S>(plan, index).run(index);
}

// Maxima and sums of what blocks will cut, where there is such a class (for nll, task).
template <class S>
void measure(BackwardPlan* plan, ParallelFor par) {
  using A = Acc<S>;
  const Problem& p = plan->args->problem;
  const Panels<A> panels(p.num_queries);
  Exact& exact = plan->exact;
  for (int64_t t = 0; t < p.num_tasks; ++t) {
    const int64_t* start = plan->start + t * (p.num_classes + 1);
    const int64_t entries = p.targets == nullptr ? count_large(start, 0, p.num_classes)
                            : start[p.num_classes] > kWholeRows ? 2
                                                                : 0;
    exact.entries = max_of(exact.entries, entries);
  }
  if (exact.entries == 0) return;
  // A task in parts, unless there are jobs enough or many sums to keep; then by panels.
  constexpr int64_t kParts = 16, kPartRows = 1024, kSums = 1024;
  const int64_t parts = min_of(min_of(kParts, p.num_supports / kPartRows), kSums / exact.entries);
  exact.parts = p.num_tasks >= kParts ? 1 : max_of<int64_t>(1, parts);
  exact.panel_jobs = min_of(panels.count, ceil_div(kParts, p.num_tasks * exact.parts));
  const int64_t size = p.num_tasks * exact.parts * exact.entries * 2 * panels.lanes();
  exact_scratch.reset(Scratch::size_of<A>(size));
  exact.values = exact_scratch.take<A>(size);
  const int64_t jobs = p.num_tasks * exact.panel_jobs * exact.parts;
  par(
      jobs, max_of<int64_t>(1, kSerialWork / (p.num_tasks * task_work(p) / jobs + 1)),
      [](void* context, int64_t begin, int64_t end) {
        const BackwardPlan& x = *static_cast<const BackwardPlan*>(context);
        for (int64_t j = begin; j < end; ++j) {
          measure_classes<S>(x.args->problem, x.exact, x.order, x.start, j, backward_scratch);
        }
      },
      plan);
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
  if constexpr (!kIsHalf<S>) {
    if (keeps_slopes(p)) return run_kept<S>(args, par);
  }
  const Panels<A> panels(p.num_queries);
  BackwardPlan plan{
      &args,   1, p.num_queries > p.num_supports, nullptr, nullptr, nullptr, nullptr, nullptr,
      nullptr, {}};
  plan.chunks = gradient_chunks<A>(p, plan.split_queries, panels.count);
  if (plan.chunks > 1 || p.num_supports > kWholeRows) {
    const int64_t rows = tasks * p.num_supports, starts = tasks * (p.num_classes + 1);
    const int64_t jobs = tasks * plan.chunks;
    const bool split = plan.chunks > 1;
    const bool sums = split && p.targets == nullptr && !plan.split_queries;
    const int64_t private_rows = plan.split_queries ? p.num_supports : p.num_queries;
    const int64_t partial = split ? jobs * private_rows * p.dim : 0;
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
          const BackwardPlan& x = *static_cast<const BackwardPlan*>(context);
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
            const BackwardPlan& x = *static_cast<const BackwardPlan*>(context);
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
  if (p.num_supports > whole_rows(p)) measure<S>(&plan, par);
  const int64_t work = 3 * task_work(p) / plan.chunks;
  par(
      tasks * plan.chunks, max_of<int64_t>(1, kSerialWork / work),
      [](void* context, int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j)
          run_job<S>(*static_cast<const BackwardPlan*>(context), j);
      },
      &plan);
  if (plan.chunks == 1) return;
  const int64_t rows = tasks * (plan.split_queries ? p.num_supports : p.num_queries);
  par(
      rows, max_of<int64_t>(1, 32768 / (plan.chunks * (p.dim + 8))),
      [](void* context, int64_t begin, int64_t end) {
        const BackwardPlan& x = *static_cast<const BackwardPlan*>(context);
        void* out = x.split_queries ? x.args->grad_support : x.args->grad_query;
        for (int64_t r = begin; r < end; ++r) {
          add_partials<S>(x.args->problem, x.split_queries, x.chunks, x.partial, r, out);
        }
      },
      &plan);
  add_job_sums<A>(p, plan.chunks, plan.scale, plan.weight, args.grad_scale, args.grad_weight);
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
