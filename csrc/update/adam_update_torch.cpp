// Bridge of adam_update: checks, allocation, and the bias corrections of the step.
#include <cmath>

#include "update/adam_update.h"
#include "update/update_bridge.h"

namespace fastmeta::update {
namespace {

AdamCoefficients coefficients(double beta1, double beta2, double eps, double eps_root,
                              int64_t step) {
  const double t = static_cast<double>(step);
  return {beta1, beta2, eps, eps_root, 1 / (1 - std::pow(beta1, t)), 1 / (1 - std::pow(beta2, t))};
}

std::tuple<Tensors, Tensors, Tensors> adam_update(const Tensors& params, const Tensors& grads,
                                                  const Tensors& means, const Tensors& squares,
                                                  const Tensors& lrs, double beta1, double beta2,
                                                  double eps, double eps_root, int64_t step) {
  check_lists(grads, {&params}, {&means, &squares}, lrs);
  Tensors out, out_means, out_squares;
  if (grads.empty()) return {out, out_means, out_squares};
  std::vector<AdamTensor> tensors(grads.size());
  std::vector<Tensors> alive;
  const ScalarType acc = bridge::acc_type(grads[0]);
  for (size_t i = 0; i < grads.size(); ++i) {
    const std::vector<int64_t> shape = shape_of(grads[i]);
    AdamTensor& t = tensors[i];
    Tensors operands{params[i], grads[i], means[i], squares[i], lrs[i]};
    const Split split = place(shape, operands, {&t.param, &t.grad, &t.mean, &t.square, &t.lr});
    t.num_tasks = split.tasks;
    t.num_elements = split.elements;
    t.out = grow(out, grads[i], shape, grads[i].scalar_type());
    t.out_mean = grow(out_means, grads[i], shape, acc);
    t.out_square = grow(out_squares, grads[i], shape, acc);
    alive.push_back(std::move(operands));
  }
  const Adam args{bridge::dtype_of(grads[0]), bridge::acc_dtype_of(grads[0]),
                  coefficients(beta1, beta2, eps, eps_root, step),
                  static_cast<int64_t>(tensors.size()), tensors.data()};
#if defined(FASTMETA_CUDA)
  const bridge::CudaScope scope(grads[0]);
  cuda::adam(args, scope.stream());
#else
  FASTMETA_DISPATCH(current_isa(), update, adam, args, bridge::parallel_for);
#endif
  return {out, out_means, out_squares};
}

std::tuple<Tensors, Tensors, Tensors, Tensors> adam_update_backward(
    const Tensors& grad_outs, const Tensors& grad_out_means, const Tensors& grad_out_squares,
    const Tensors& grads, const Tensors& means, const Tensors& squares, const Tensors& lrs,
    double beta1, double beta2, double eps, double eps_root, int64_t step, bool with_lr) {
  check_lists(grads, {&grad_outs}, {&grad_out_means, &grad_out_squares, &means, &squares}, lrs);
  Tensors grad_grads, grad_means, grad_squares, grad_lrs;
  if (grads.empty()) return {grad_grads, grad_means, grad_squares, grad_lrs};
  std::vector<AdamBackwardTensor> tensors(grads.size());
  std::vector<Tensors> alive;
  const ScalarType acc = bridge::acc_type(grads[0]);
  for (size_t i = 0; i < grads.size(); ++i) {
    const std::vector<int64_t> shape = shape_of(grads[i]);
    AdamBackwardTensor& t = tensors[i];
    Tensors operands{grad_outs[i], grads[i],   grad_out_means[i],         grad_out_squares[i],
                     means[i],     squares[i], bridge::contiguous(lrs[i])};
    const Split split = place(
        shape, operands,
        {&t.grad_out, &t.grad, &t.grad_out_mean, &t.grad_out_square, &t.mean, &t.square, &t.lr});
    t.num_tasks = split.tasks;
    t.num_elements = split.elements;
    t.grad_grad = grow(grad_grads, grads[i], shape, grads[i].scalar_type());
    t.grad_mean = grow(grad_means, grads[i], shape, acc);
    t.grad_square = grow(grad_squares, grads[i], shape, acc);
    const auto lr_shape = with_lr ? shape_of(operands.back()) : std::vector<int64_t>{0};
    void* grad_lr = grow(grad_lrs, grads[i], lr_shape, acc);
    t.grad_lr = with_lr ? grad_lr : nullptr;
    alive.push_back(std::move(operands));
  }
  const AdamBackward args{bridge::dtype_of(grads[0]), bridge::acc_dtype_of(grads[0]),
                          coefficients(beta1, beta2, eps, eps_root, step),
                          static_cast<int64_t>(tensors.size()), tensors.data()};
#if defined(FASTMETA_CUDA)
  const bridge::CudaScope scope(grads[0]);
  const Tensor workspace = bridge::workspace(grads[0], cuda::adam_backward_workspace(args));
  cuda::adam_backward(args, workspace.mutable_data_ptr(), scope.stream());
#else
  FASTMETA_DISPATCH(current_isa(), update, adam_backward, args, bridge::parallel_for);
#endif
  for (size_t i = 0; with_lr && i < grads.size(); ++i) {
    grad_lrs[i] = sum_to(grad_lrs[i], shape_of(lrs[i]));
  }
  return {grad_grads, grad_means, grad_squares, grad_lrs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, FASTMETA_DEVICE_KEY, m) {
  m.impl("adam_update", TORCH_BOX(&adam_update));
  m.impl("adam_update_backward", TORCH_BOX(&adam_update_backward));
}

}  // namespace fastmeta::update
