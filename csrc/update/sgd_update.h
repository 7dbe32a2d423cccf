// One gradient step for all parameters of all tasks: what the CPU and CUDA kernels take.
//
//   forward    out  = param - lr * grad
//   backward   grad_grad = -lr * grad_out,   grad_lr = -sum over the broadcast of (grad_out * grad)
//
// Tensor p of the list is seen as [T_p, N_p] (tasks by elements of one task). An operand's value at
// (t, n) is data[t * task_stride + n * element_stride]: (N, 1) for a tensor of its own per task,
// (0, 1) for one shared by the tasks, (1, 0) for a number per task, (0, 0) for one number.
#pragma once
#include <cstdint>

#include "common/parallel.h"
#include "common/types.h"

namespace fastmeta::update {

struct Operand {
  const void* data;
  int64_t task_stride, element_stride;
};

// A member of the struct that describes one tensor of the list, and its name. The structs of all
// updates list what their formulas take besides the rate and what they give in this way, so that
// the loops of both devices are written once: first kIn operands of dtype, then kStateIn of the
// accumulation type, and kOut and kStateOut results likewise.
template <class Tensor>
struct Field {
  const char* name;
  Operand Tensor::* at;
};

struct SgdTensor {
  int64_t num_tasks, num_elements;  // T_p, N_p
  Operand param, grad, lr;
  void* out;  // [T_p, N_p] contiguous

  static constexpr int kIn = 2, kStateIn = 0, kOut = 1, kStateOut = 0;
  static constexpr Field<SgdTensor> kOperands[] = {{"param", &SgdTensor::param},
                                                   {"grad", &SgdTensor::grad}};
  static constexpr void* SgdTensor::* kResults[] = {&SgdTensor::out};
};

struct Sgd {
  DType dtype;     // of params, grads and out
  DType lr_dtype;  // acc type of dtype: float32, or float64
  int64_t num_tensors;
  const SgdTensor* tensors;  // host array
};

struct SgdBackwardTensor {
  int64_t num_tasks, num_elements;
  Operand grad_out, grad, lr;
  void* grad_grad;  // [T_p, N_p] contiguous, in dtype
  void* grad_lr;    // acc, laid out by lr's strides: [T, N], [N], [T] or [1]; nullptr: not wanted

  static constexpr int kIn = 2, kStateIn = 0, kOut = 1, kStateOut = 0;
  static constexpr Field<SgdBackwardTensor> kOperands[] = {
      {"grad_out", &SgdBackwardTensor::grad_out}, {"grad", &SgdBackwardTensor::grad}};
  static constexpr void* SgdBackwardTensor::* kResults[] = {&SgdBackwardTensor::grad_grad};
};

struct SgdBackward {
  DType dtype;
  DType lr_dtype;
  int64_t num_tensors;
  const SgdBackwardTensor* tensors;
};

#define FASTMETA_UPDATE_CPU(ISA)                               \
  namespace ISA {                                              \
  void sgd(const Sgd& args, ParallelFor par);                  \
  void sgd_backward(const SgdBackward& args, ParallelFor par); \
  }
FASTMETA_UPDATE_CPU(baseline)
FASTMETA_UPDATE_CPU(avx2)
FASTMETA_UPDATE_CPU(avx512)
#undef FASTMETA_UPDATE_CPU

namespace cuda {
// Launchers of sgd_update_cuda.cu. stream is a cudaStream_t of the current device; the tensor lists
// are read on the host before the call returns. workspace is device memory of
// sgd_backward_workspace() bytes, 16-byte aligned.
void sgd(const Sgd& args, void* stream);
int64_t sgd_backward_workspace(const SgdBackward& args);
void sgd_backward(const SgdBackward& args, void* workspace, void* stream);
}  // namespace cuda

}  // namespace fastmeta::update
