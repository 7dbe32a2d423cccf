// Class means on the CPU.
//
// Rows are sorted by class first, so that a strip of a class sum stays in registers while its rows
// stream by and every output is written once. The work is memory traffic: values read once, in
// order of class, means written once. Jobs are fixed by shapes (task x classes x strip of columns)
// and each (class, column) sum is formed by one job in the order of the rows, so threads change no
// bit.
#include "common/class_order.h"
#include "common/scratch.h"
#include "common/vec.h"
#include "segment/segment_mean.h"

namespace fastmeta::segment::FASTMETA_ISA {

using namespace fastmeta::FASTMETA_ISA;

namespace {

constexpr int64_t kRowsPerSum = 256;        // rows added up before the sum joins the total
constexpr int64_t kSerialElements = 16384;  // elements worth handing to another thread

thread_local Scratch call_scratch;

// ---- forward
struct MeanPlan {
  const Mean* args;
  int64_t* order;  // [T, S]
  int64_t* start;  // [T, C + 1]
  int64_t class_blocks, classes_per_block, strips, columns_per_strip;
};

// Sum over rows order[0..count) of NV vectors of columns, or of the first `tail` columns,
// divided by the count.
template <class S, int NV, bool kTail>
void mean_columns(const S* values, int64_t dim, const int64_t* order, int64_t count, int tail,
                  S* out) {
  using A = Acc<S>;
  Vec<A> total[NV] = {};
  for (int64_t begin = 0; begin < count; begin += kRowsPerSum) {
    const int64_t end = min_of(count, begin + kRowsPerSum);
    Vec<A> sum[NV] = {};
    for (int64_t i = begin; i < end; ++i) {
      const S* row = values + order[i] * dim;
      FASTMETA_UNROLL
      for (int v = 0; v < NV; ++v) sum[v] += kTail ? load_n(row, tail) : load(row + v * kWidth<A>);
    }
    FASTMETA_UNROLL
    for (int v = 0; v < NV; ++v) total[v] += sum[v];
  }
  const Vec<A> n = splat<A>(static_cast<A>(count > 0 ? count : 1));
  FASTMETA_UNROLL
  for (int v = 0; v < NV; ++v) {
    if (kTail) {
      store_n(out, total[v] / n, tail);
    } else {
      store(out + v * kWidth<A>, total[v] / n);
    }
  }
}

template <class S>
void mean_job(const MeanPlan& plan, int64_t job) {
  using A = Acc<S>;
  constexpr int kW = kWidth<A>;
  const Mean& args = *plan.args;
  const int64_t rows = args.num_rows, classes = args.num_classes, dim = args.dim;
  const int64_t strip = job % plan.strips, rest = job / plan.strips;
  const int64_t block = rest % plan.class_blocks, task = rest / plan.class_blocks;
  const int64_t* order = plan.order + task * rows;
  const int64_t* start = plan.start + task * (classes + 1);
  const S* values = static_cast<const S*>(args.values) + task * rows * dim;
  S* mean = static_cast<S*>(args.mean) + task * classes * dim;
  A* counts = static_cast<A*>(args.count) + task * classes;
  const int64_t d_begin = strip * plan.columns_per_strip;
  const int64_t d_end = min_of(dim, d_begin + plan.columns_per_strip);
  const int64_t c_end = min_of(classes, (block + 1) * plan.classes_per_block);
  for (int64_t c = block * plan.classes_per_block; c < c_end; ++c) {
    const int64_t count = start[c + 1] - start[c];
    const int64_t* of_class = order + start[c];
    if (strip == 0) counts[c] = static_cast<A>(count);
    int64_t d = d_begin;
    for (; d + 8 * kW <= d_end; d += 8 * kW) {
      mean_columns<S, 8, false>(values + d, dim, of_class, count, 0, mean + c * dim + d);
    }
    for (; d + 2 * kW <= d_end; d += 2 * kW) {
      mean_columns<S, 2, false>(values + d, dim, of_class, count, 0, mean + c * dim + d);
    }
    for (; d + kW <= d_end; d += kW) {
      mean_columns<S, 1, false>(values + d, dim, of_class, count, 0, mean + c * dim + d);
    }
    if (d < d_end) {
      mean_columns<S, 1, true>(values + d, dim, of_class, count, static_cast<int>(d_end - d),
                               mean + c * dim + d);
    }
  }
}

template <class S>
void run_mean(const Mean& args, ParallelFor par) {
  const int64_t tasks = args.num_tasks, rows = args.num_rows, classes = args.num_classes;
  if (tasks == 0 || classes == 0) return;
  MeanPlan plan;
  plan.args = &args;
  call_scratch.reset(Scratch::size_of<int64_t>(tasks * rows) +
                     Scratch::size_of<int64_t>(tasks * (classes + 1)));
  plan.order = call_scratch.take<int64_t>(tasks * rows);
  plan.start = call_scratch.take<int64_t>(tasks * (classes + 1));
  // Few tasks: classes and then columns make the jobs.
  const int64_t elements = max_of(rows, classes) * args.dim;
  const int64_t wanted =
      tasks >= 16 ? 1 : max_of<int64_t>(1, min_of<int64_t>(32 / tasks, elements / kSerialElements));
  plan.class_blocks = min_of(classes, wanted);
  plan.classes_per_block = ceil_div(classes, plan.class_blocks);
  plan.class_blocks = ceil_div(classes, plan.classes_per_block);
  constexpr int64_t kLine = 64 / sizeof(S);
  plan.strips = max_of<int64_t>(1, min_of(ceil_div(wanted, plan.class_blocks), args.dim / kLine));
  plan.columns_per_strip =
      max_of<int64_t>(1, ceil_div(ceil_div(args.dim, plan.strips), kLine) * kLine);
  plan.strips = max_of<int64_t>(1, ceil_div(args.dim, plan.columns_per_strip));

  const int64_t sort_grain = max_of<int64_t>(1, kSerialElements / (2 * rows + classes + 1));
  const int64_t jobs = tasks * plan.class_blocks * plan.strips;
  const int64_t per_job = elements / (plan.class_blocks * plan.strips) + 64;
  const int64_t grain = max_of<int64_t>(1, kSerialElements / per_job);
  par(
      tasks, sort_grain,
      [](void* context, int64_t begin, int64_t end) {
        const MeanPlan& p = *static_cast<const MeanPlan*>(context);
        const int64_t s = p.args->num_rows, c = p.args->num_classes;
        for (int64_t t = begin; t < end; ++t) {
          sort_by_class(p.args->labels + t * s, s, c, p.order + t * s, p.start + t * (c + 1));
        }
      },
      &plan);
  par(
      jobs, grain,
      [](void* context, int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j)
          mean_job<S>(*static_cast<const MeanPlan*>(context), j);
      },
      &plan);
}

// ---- backward
template <class S>
void backward_rows(const MeanBackward& args, int64_t begin, int64_t end) {
  using A = Acc<S>;
  constexpr int kW = kWidth<A>;
  const int64_t rows = args.num_rows, classes = args.num_classes, dim = args.dim;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t task = row / rows, label = args.labels[row];
    S* out = static_cast<S*>(args.grad_values) + row * dim;
    int64_t d = 0;
    if (static_cast<uint64_t>(label) >= static_cast<uint64_t>(classes)) {
      for (; d + kW <= dim; d += kW) store(out + d, Vec<A>{});
      if (d < dim) store_n(out + d, Vec<A>{}, static_cast<int>(dim - d));
      continue;
    }
    const S* grad = static_cast<const S*>(args.grad) + (task * classes + label) * dim;
    const Vec<A> n = splat<A>(static_cast<const A*>(args.count)[task * classes + label]);
    for (; d + kW <= dim; d += kW) store(out + d, load(grad + d) / n);
    if (d < dim) {
      const int tail = static_cast<int>(dim - d);
      store_n(out + d, load_n(grad + d, tail) / n, tail);
    }
  }
}

template <class S>
void run_backward(const MeanBackward& args, ParallelFor par) {
  const int64_t grain = max_of<int64_t>(1, kSerialElements / (args.dim + 16));
  par(
      args.num_tasks * args.num_rows, grain,
      [](void* context, int64_t begin, int64_t end) {
        backward_rows<S>(*static_cast<const MeanBackward*>(context), begin, end);
      },
      const_cast<MeanBackward*>(&args));
}

}  // namespace

void mean(const Mean& args, ParallelFor par) {
  switch (args.dtype) {
    case DType::kFloat32:
      return run_mean<float>(args, par);
    case DType::kFloat64:
      return run_mean<double>(args, par);
    case DType::kBFloat16:
      return run_mean<bfloat16>(args, par);
    case DType::kFloat16:
      return run_mean<float16>(args, par);
  }
}

void mean_backward(const MeanBackward& args, ParallelFor par) {
  switch (args.dtype) {
    case DType::kFloat32:
      return run_backward<float>(args, par);
    case DType::kFloat64:
      return run_backward<double>(args, par);
    case DType::kBFloat16:
      return run_backward<bfloat16>(args, par);
    case DType::kFloat16:
      return run_backward<float16>(args, par);
  }
}

}  // namespace fastmeta::segment::FASTMETA_ISA
