// The adaptation engine: what its CPU kernels take.
//
// For each of T tasks, from parameters theta_0 that the tasks share,
//
//   theta_{k+1} = theta_k - rate_k * grad L_S(theta_k),   k = 0 .. K-1     (L_S: loss on the
//   supports)
//
// and then predictions for the queries with theta_K. Backward is mixed-mode differentiation
// (forward over reverse): with lambda_K = dL_Q / dtheta_K,
//
//   lambda_k = lambda_{k+1} - H_S(theta_k) (rate_k * lambda_{k+1}),        k = K-1 .. 0
//
// recomputing each step's activations, so that of the whole loop only theta_1 .. theta_K are kept:
// K x P numbers a task. The same sweep gives the gradients of the rates (-g_k . lambda_{k+1}), of
// the support inputs and of the shared parameters. See fastmeta/ops/engine.py for shapes.
//
// A thread takes whole tasks. Sums over tasks run over fixed groups of tasks, then over the groups
// in order, so results do not depend on the number of threads.
#pragma once
#include <cstdint>

#include "common/parallel.h"
#include "common/types.h"
#include "engine/program.h"

namespace fastmeta::engine {

struct Adapt {
  DType dtype;  // float32 or float64, of everything but labels
  const Program* program;
  int64_t num_fast, num_shared;
  const int64_t* fast_numel;    // numbers in each, held against the program
  const int64_t* shared_numel;  //
  const void* const* fast;      // contiguous, in torch's layout
  const void* const* shared;    //
  int64_t tasks, supports, queries, steps;
  const void* rates;  // [rate_rows, rate_cols]
  int64_t rate_rows, rate_cols;
  // Not one for all, nor one for each parameter: one for each of the parameters' numbers.
  bool rate_each_number() const { return rate_cols != 1 && rate_cols != num_fast; }
  const void* support_x;  // [T, S, *in]
  const void* support_y;  // [T, S] int64, or [T, S, *out]
  const void* query_x;    // [T, Q, *in]
  const void* query_y;    // as support_y; meta_step alone
  uint64_t seed;

  void* prediction;      // [T, Q, *out]; nullptr: not wanted, as in meta_step
  void* const* adapted;  // [T, *shape] each, or nullptr
  void* trajectory;      // [T, K, numbers of fast], in the engine's order; nullptr: not kept
  void* loss;            // [], the mean over the tasks; meta_step alone
};

struct AdaptGradients {
  bool first_order;
  const void* prediction;      // gradient that comes in, [T, Q, *out], or nullptr
  const void* const* adapted;  // likewise, [T, *shape] each, or nullptr
  // What goes out; nullptr where it is not wanted.
  void* const* fast;
  void* const* shared;
  void* rates;
  void* support_x;
  void* query_x;
};

#define FASTMETA_ENGINE_CPU(ISA)                                                                  \
  namespace ISA {                                                                                 \
  void adapt(const Adapt& args, ParallelFor par);                                                 \
  void adapt_backward(const Adapt& args, const AdaptGradients& gradients, ParallelFor par);       \
  /* Loss on query_y, predictions, and the gradients of the mean loss over the tasks, at once. */ \
  void meta_step(const Adapt& args, const AdaptGradients& gradients, ParallelFor par);            \
  }
FASTMETA_ENGINE_CPU(baseline)
FASTMETA_ENGINE_CPU(avx2)
FASTMETA_ENGINE_CPU(avx512)
#undef FASTMETA_ENGINE_CPU

}  // namespace fastmeta::engine
