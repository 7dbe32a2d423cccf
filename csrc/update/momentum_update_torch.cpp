// Bridge of momentum_update: checks, allocation, and momentum's numbers as coefficients.
#include "update/momentum_update.h"
#include "update/update_bridge.h"

namespace fastmeta::update {
namespace {

MomentumCoefficients coefficients(double momentum, double dampening, bool nesterov) {
  const double keep = 1 - dampening;
  if (!nesterov) return {keep, momentum, keep, momentum};
  return {1 + momentum * keep, momentum * momentum, keep, momentum};
}

std::tuple<Tensors, Tensors> momentum_update(const Tensors& params, const Tensors& grads,
                                             const Tensors& buffers, const Tensors& lrs,
                                             double momentum, double dampening, bool nesterov) {
  check_lists(grads, {&params}, {&buffers}, lrs);
  Tensors out, out_buffers;
  if (grads.empty()) return {out, out_buffers};
  std::vector<MomentumTensor> tensors(grads.size());
  std::vector<Tensors> alive;
  for (size_t i = 0; i < grads.size(); ++i) {
    const std::vector<int64_t> shape = shape_of(grads[i]);
    MomentumTensor& t = tensors[i];
    Tensors operands{params[i], grads[i], buffers[i], lrs[i]};
    const Split split = place(shape, operands, {&t.param, &t.grad, &t.buffer, &t.lr});
    t.num_tasks = split.tasks;
    t.num_elements = split.elements;
    t.out = grow(out, grads[i], shape, grads[i].scalar_type());
    t.out_buffer = grow(out_buffers, grads[i], shape, bridge::acc_type(grads[i]));
    alive.push_back(std::move(operands));
  }
  const Momentum args{bridge::dtype_of(grads[0]), bridge::acc_dtype_of(grads[0]),
                      coefficients(momentum, dampening, nesterov),
                      static_cast<int64_t>(tensors.size()), tensors.data()};
#if defined(FASTMETA_CUDA)
  const bridge::CudaScope scope(grads[0]);
  cuda::momentum(args, scope.stream());
#else
  FASTMETA_DISPATCH(current_isa(), update, momentum, args, bridge::parallel_for);
#endif
  return {out, out_buffers};
}

std::tuple<Tensors, Tensors, Tensors> momentum_update_backward(
    const Tensors& grad_outs, const Tensors& grad_out_buffers, const Tensors& grads,
    const Tensors& buffers, const Tensors& lrs, double momentum, double dampening, bool nesterov,
    bool with_lr) {
  check_lists(grads, {&grad_outs}, {&grad_out_buffers, &buffers}, lrs);
  Tensors grad_grads, grad_buffers, grad_lrs;
  if (grads.empty()) return {grad_grads, grad_buffers, grad_lrs};
  std::vector<MomentumBackwardTensor> tensors(grads.size());
  std::vector<Tensors> alive;
  const ScalarType acc = bridge::acc_type(grads[0]);
  for (size_t i = 0; i < grads.size(); ++i) {
    const std::vector<int64_t> shape = shape_of(grads[i]);
    MomentumBackwardTensor& t = tensors[i];
    Tensors operands{grad_outs[i], grads[i], grad_out_buffers[i], buffers[i],
                     bridge::contiguous(lrs[i])};
    const Split split =
        place(shape, operands, {&t.grad_out, &t.grad, &t.grad_out_buffer, &t.buffer, &t.lr});
    t.num_tasks = split.tasks;
    t.num_elements = split.elements;
    t.grad_grad = grow(grad_grads, grads[i], shape, grads[i].scalar_type());
    t.grad_buffer = grow(grad_buffers, grads[i], shape, acc);
    const auto lr_shape = with_lr ? shape_of(operands.back()) : std::vector<int64_t>{0};
    void* grad_lr = grow(grad_lrs, grads[i], lr_shape, acc);
    t.grad_lr = with_lr ? grad_lr : nullptr;
    alive.push_back(std::move(operands));
  }
  const MomentumBackward args{bridge::dtype_of(grads[0]), bridge::acc_dtype_of(grads[0]),
                              coefficients(momentum, dampening, nesterov),
                              static_cast<int64_t>(tensors.size()), tensors.data()};
#if defined(FASTMETA_CUDA)
  const bridge::CudaScope scope(grads[0]);
  const Tensor workspace = bridge::workspace(grads[0], cuda::momentum_backward_workspace(args));
  cuda::momentum_backward(args, workspace.mutable_data_ptr(), scope.stream());
#else
  FASTMETA_DISPATCH(current_isa(), update, momentum_backward, args, bridge::parallel_for);
#endif
  for (size_t i = 0; with_lr && i < grads.size(); ++i) {
    grad_lrs[i] = sum_to(grad_lrs[i], shape_of(lrs[i]));
  }
  return {grad_grads, grad_buffers, grad_lrs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, FASTMETA_DEVICE_KEY, m) {
  m.impl("momentum_update", TORCH_BOX(&momentum_update));
  m.impl("momentum_update_backward", TORCH_BOX(&momentum_update_backward));
}

}  // namespace fastmeta::update
