// One step of gradient descent with momentum for all parameters of all tasks.
//
//   forward    buffer' = keep_grad * grad + keep_buffer * buffer
//              param'  = param - lr * step,   step = step_grad * grad + step_buffer * buffer
//   backward   grad_grad   = keep_grad * grad_out_buffer - lr * step_grad * grad_out
//              grad_buffer = keep_buffer * grad_out_buffer - lr * step_buffer * grad_out
//              grad_lr     = -sum over the broadcast of (grad_out * step)
//
// With momentum mu and dampening d, keep_grad = 1 - d, keep_buffer = mu, and step is buffer', or
// grad + mu * buffer' by Nesterov: both are linear in grad and buffer. Tensors and operands are as
// in sgd_update.h; the buffer is of the accumulation type, and (0, 0) strides make it one number.
#pragma once
#include "update/sgd_update.h"

namespace fastmeta::update {

struct MomentumCoefficients {
  double step_grad, step_buffer, keep_grad, keep_buffer;
};

struct MomentumTensor {
  int64_t num_tasks, num_elements;
  Operand param, grad, buffer, lr;
  void* out;         // [T_p, N_p] contiguous, in dtype
  void* out_buffer;  // likewise, in lr_dtype

  static constexpr int kIn = 2, kStateIn = 1, kOut = 1, kStateOut = 1;
  static constexpr Field<MomentumTensor> kOperands[] = {{"param", &MomentumTensor::param},
                                                        {"grad", &MomentumTensor::grad},
                                                        {"buffer", &MomentumTensor::buffer}};
  static constexpr void* MomentumTensor::* kResults[] = {&MomentumTensor::out,
                                                         &MomentumTensor::out_buffer};
};

struct Momentum {
  DType dtype;     // of params, grads and out
  DType lr_dtype;  // acc type of dtype: of lr and buffers
  MomentumCoefficients coefficients;
  int64_t num_tensors;
  const MomentumTensor* tensors;  // host array
};

struct MomentumBackwardTensor {
  int64_t num_tasks, num_elements;
  Operand grad_out, grad, grad_out_buffer, buffer, lr;
  void* grad_grad;    // [T_p, N_p] contiguous, in dtype
  void* grad_buffer;  // likewise, in lr_dtype
  void* grad_lr;      // acc, laid out by lr's strides; nullptr: not wanted

  static constexpr int kIn = 2, kStateIn = 2, kOut = 1, kStateOut = 1;
  static constexpr Field<MomentumBackwardTensor> kOperands[] = {
      {"grad_out", &MomentumBackwardTensor::grad_out},
      {"grad", &MomentumBackwardTensor::grad},
      {"grad_out_buffer", &MomentumBackwardTensor::grad_out_buffer},
      {"buffer", &MomentumBackwardTensor::buffer}};
  static constexpr void* MomentumBackwardTensor::* kResults[] = {
      &MomentumBackwardTensor::grad_grad, &MomentumBackwardTensor::grad_buffer};
};

struct MomentumBackward {
  DType dtype;
  DType lr_dtype;
  MomentumCoefficients coefficients;
  int64_t num_tensors;
  const MomentumBackwardTensor* tensors;
};

#define FASTMETA_UPDATE_CPU(ISA)                                         \
  namespace ISA {                                                        \
  void momentum(const Momentum& args, ParallelFor par);                  \
  void momentum_backward(const MomentumBackward& args, ParallelFor par); \
  }
FASTMETA_UPDATE_CPU(baseline)
FASTMETA_UPDATE_CPU(avx2)
FASTMETA_UPDATE_CPU(avx512)
#undef FASTMETA_UPDATE_CPU

namespace cuda {
// Launchers of momentum_update_cuda.cu, as in sgd_update.h.
void momentum(const Momentum& args, void* stream);
int64_t momentum_backward_workspace(const MomentumBackward& args);
void momentum_backward(const MomentumBackward& args, void* workspace, void* stream);
}  // namespace cuda

}  // namespace fastmeta::update
