// A convolution with weights for each task, and its adjoints to the input and to the weights: what
// the kernels take. No torch, no CUDA.
#pragma once
#include "common/parallel.h"
#include "common/types.h"
#include "task_layers/per_task.h"

namespace fastmeta::task_layers {

struct Conv2d {
  DType dtype;  // of all tensors; kFloat32 or kFloat64 on the CPU
  int64_t tasks, rows, channels, height, width;
  int64_t outputs, kernel_h, kernel_w, out_h, out_w;
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups;
  PerTask x;       // [N, C, H, W]; what it is convolved to: conv2d and conv2d_weight read it
  PerTask weight;  // [O, C / groups, kh, kw]: conv2d and conv2d_input
  PerTask bias;    // [O] or nullptr: conv2d
  PerTask grad;    // [N, O, H', W']: conv2d_input and conv2d_weight
  void* out;       // contiguous [T, ...]
  bool allow_tf32 = false;  // CUDA: float32 products may be rounded to TF32
};

#define FASTMETA_TASK_CONV2D_CPU(ISA)                      \
  namespace ISA {                                          \
  void conv2d(const Conv2d& args, ParallelFor par);        \
  void conv2d_input(const Conv2d& args, ParallelFor par);  \
  void conv2d_weight(const Conv2d& args, ParallelFor par); \
  }
FASTMETA_TASK_CONV2D_CPU(baseline)
FASTMETA_TASK_CONV2D_CPU(avx2)
FASTMETA_TASK_CONV2D_CPU(avx512)
#undef FASTMETA_TASK_CONV2D_CPU

namespace cuda {
int64_t conv2d_workspace(const Conv2d& args);  // bytes
int64_t conv2d_input_workspace(const Conv2d& args);
int64_t conv2d_weight_workspace(const Conv2d& args);
void conv2d(const Conv2d& args, void* workspace, void* stream);
void conv2d_input(const Conv2d& args, void* workspace, void* stream);
void conv2d_weight(const Conv2d& args, void* workspace, void* stream);
}  // namespace cuda

}  // namespace fastmeta::task_layers
