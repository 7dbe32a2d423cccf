// Batch norm by each task's own batch, and its first and second derivatives: what the kernels take.
// No torch, no CUDA.
#pragma once
#include "common/parallel.h"
#include "common/types.h"
#include "task_layers/per_task.h"

namespace fastmeta::task_layers {

// All of one dtype but mean and rstd, which have that of sums; contiguous but weight and bias.
struct BatchNorm {
  DType dtype;
  int64_t tasks, rows, channels, length;  // x is [T, N, C, L]
  double eps;
  const void* x;
  PerTask weight, bias;  // [C], or nullptr for 1 and 0
  void* mean;            // [T, C]: written by batch_norm, read by the derivatives
  void* rstd;            // the same
  const void* grad;      // as x: the cotangent of the output
  const void* u;         // as x: second derivative, the cotangents of the gradients to x,
  const void* v;         // [T, C] to the weight,
  const void* z;         // [T, C] to the bias
  void* out;             // as x: the output, or the gradient to x
  void* to_grad;         // as x: second derivative
  void* to_weight;       // [T, C]: derivatives
  void* to_bias;         // [T, C]: first derivative
};

#define FASTMETA_TASK_BATCH_NORM_CPU(ISA)                           \
  namespace ISA {                                                   \
  void batch_norm(const BatchNorm& args, ParallelFor par);          \
  void batch_norm_backward(const BatchNorm& args, ParallelFor par); \
  void batch_norm_second(const BatchNorm& args, ParallelFor par);   \
  }
FASTMETA_TASK_BATCH_NORM_CPU(baseline)
FASTMETA_TASK_BATCH_NORM_CPU(avx2)
FASTMETA_TASK_BATCH_NORM_CPU(avx512)
#undef FASTMETA_TASK_BATCH_NORM_CPU

namespace cuda {
void batch_norm(const BatchNorm& args, void* stream);
void batch_norm_backward(const BatchNorm& args, void* stream);
void batch_norm_second(const BatchNorm& args, void* stream);
}  // namespace cuda

}  // namespace fastmeta::task_layers
