// A linear layer with weights for each task: what the kernels take. No torch, no CUDA.
#pragma once
#include "common/parallel.h"
#include "common/types.h"

namespace fastmeta::task_layers {

// A matrix for each task, with the strides of its tasks, rows and columns in elements.
struct TaskMatrix {
  const void* data = nullptr;
  int64_t task = 0, row = 0, column = 0;
};

// out[t] = x[t] weight[t]^T + bias[t].
struct Linear {
  DType dtype;  // of all tensors; kFloat32 or kFloat64 on the CPU
  int64_t tasks, rows, inputs, outputs;
  TaskMatrix x;             // [N, I]
  TaskMatrix weight;        // [O, I]
  TaskMatrix bias;          // [O] along its columns, or nullptr
  void* out;                // contiguous [T, N, O]
  bool allow_tf32 = false;  // CUDA: float32 products may be rounded to TF32
};

#define FASTMETA_TASK_LINEAR_CPU(ISA)               \
  namespace ISA {                                   \
  void linear(const Linear& args, ParallelFor par); \
  }
FASTMETA_TASK_LINEAR_CPU(baseline)
FASTMETA_TASK_LINEAR_CPU(avx2)
FASTMETA_TASK_LINEAR_CPU(avx512)
#undef FASTMETA_TASK_LINEAR_CPU

namespace cuda {
int64_t linear_workspace(const Linear& args);  // bytes
void linear(const Linear& args, void* workspace, void* stream);
}  // namespace cuda

}  // namespace fastmeta::task_layers
