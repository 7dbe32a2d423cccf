// One step of Adam for all parameters of all tasks.
//
//   forward    mean'   = beta1 * mean + (1 - beta1) * grad
//              square' = beta2 * square + (1 - beta2) * grad^2
//              root    = sqrt(square_scale * square' + eps_root)
//              step    = mean_scale * mean' / (root + eps)
//              param'  = param - lr * step
//   backward   with the cotangents of param', mean' and square' called o, a and b:
//              M = a - lr * o * mean_scale / (root + eps)
//              V = b + lr * o * step * square_scale / (2 * root * (root + eps)), the last term 0
//                  where root = 0
//              grad_grad = (1 - beta1) * M + 2 * (1 - beta2) * grad * V
//              grad_mean = beta1 * M,   grad_square = beta2 * V
//              grad_lr   = -sum over the broadcast of (o * step)
//
// The scales correct the bias of step t: mean_scale = 1 / (1 - beta1^t), square_scale likewise.
// Tensors and operands are as in sgd_update.h; mean and square are of the accumulation type, and
// (0, 0) strides make them one number.
#pragma once
#include "update/sgd_update.h"

namespace fastmeta::update {

struct AdamCoefficients {
  double beta1, beta2, eps, eps_root, mean_scale, square_scale;
};

struct AdamTensor {
  int64_t num_tasks, num_elements;
  Operand param, grad, mean, square, lr;
  void* out;         // [T_p, N_p] contiguous, in dtype
  void* out_mean;    // likewise, in lr_dtype
  void* out_square;  // likewise

  static constexpr int kIn = 2, kStateIn = 2, kOut = 1, kStateOut = 2;
  static constexpr Field<AdamTensor> kOperands[] = {{"param", &AdamTensor::param},
                                                    {"grad", &AdamTensor::grad},
                                                    {"mean", &AdamTensor::mean},
                                                    {"square", &AdamTensor::square}};
  static constexpr void* AdamTensor::* kResults[] = {&AdamTensor::out, &AdamTensor::out_mean,
                                                     &AdamTensor::out_square};
};

struct Adam {
  DType dtype;     // of params, grads and out
  DType lr_dtype;  // acc type of dtype: of lr, means and squares
  AdamCoefficients coefficients;
  int64_t num_tensors;
  const AdamTensor* tensors;  // host array
};

struct AdamBackwardTensor {
  int64_t num_tasks, num_elements;
  Operand grad_out, grad, grad_out_mean, grad_out_square, mean, square, lr;
  void* grad_grad;    // [T_p, N_p] contiguous, in dtype
  void* grad_mean;    // likewise, in lr_dtype
  void* grad_square;  // likewise
  void* grad_lr;      // acc, laid out by lr's strides; nullptr: not wanted

  static constexpr int kIn = 2, kStateIn = 4, kOut = 1, kStateOut = 2;
  static constexpr Field<AdamBackwardTensor> kOperands[] = {
      {"grad_out", &AdamBackwardTensor::grad_out},
      {"grad", &AdamBackwardTensor::grad},
      {"grad_out_mean", &AdamBackwardTensor::grad_out_mean},
      {"grad_out_square", &AdamBackwardTensor::grad_out_square},
      {"mean", &AdamBackwardTensor::mean},
      {"square", &AdamBackwardTensor::square}};
  static constexpr void* AdamBackwardTensor::* kResults[] = {&AdamBackwardTensor::grad_grad,
                                                             &AdamBackwardTensor::grad_mean,
                                                             &AdamBackwardTensor::grad_square};
};

struct AdamBackward {
  DType dtype;
  DType lr_dtype;
  AdamCoefficients coefficients;
  int64_t num_tensors;
  const AdamBackwardTensor* tensors;
};

#define FASTMETA_UPDATE_CPU(ISA)                                 \
  namespace ISA {                                                \
  void adam(const Adam& args, ParallelFor par);                  \
  void adam_backward(const AdamBackward& args, ParallelFor par); \
  }
FASTMETA_UPDATE_CPU(baseline)
FASTMETA_UPDATE_CPU(avx2)
FASTMETA_UPDATE_CPU(avx512)
#undef FASTMETA_UPDATE_CPU

namespace cuda {
// Launchers of adam_update_cuda.cu, as in sgd_update.h.
void adam(const Adam& args, void* stream);
int64_t adam_backward_workspace(const AdamBackward& args);
void adam_backward(const AdamBackward& args, void* workspace, void* stream);
}  // namespace cuda

}  // namespace fastmeta::update
