// Bridge of sgd_update: checks, allocation, how each tensor splits into tasks and elements.
#include "update/sgd_update.h"
#include "update/update_bridge.h"

namespace fastmeta::update {
namespace {

Tensors sgd_update(const Tensors& params, const Tensors& grads, const Tensors& lrs) {
  check_lists(grads, {&params}, {}, lrs);
  Tensors out;
  if (grads.empty()) return out;
  out.reserve(grads.size());
  std::vector<SgdTensor> tensors(grads.size());
  std::vector<Tensors> alive;
  for (size_t i = 0; i < grads.size(); ++i) {
    const std::vector<int64_t> shape = shape_of(grads[i]);
    SgdTensor& t = tensors[i];
    Tensors operands{grads[i], params[i], lrs[i]};
    const Split split = place(shape, operands, {&t.grad, &t.param, &t.lr});
    t.num_tasks = split.tasks;
    t.num_elements = split.elements;
    t.out = grow(out, grads[i], shape, grads[i].scalar_type());
    alive.push_back(std::move(operands));
  }
  const Sgd args{bridge::dtype_of(grads[0]), bridge::acc_dtype_of(grads[0]),
                 static_cast<int64_t>(tensors.size()), tensors.data()};
#if defined(FASTMETA_CUDA)
  const bridge::CudaScope scope(grads[0]);
  cuda::sgd(args, scope.stream());
#else
  FASTMETA_DISPATCH(current_isa(), update, sgd, args, bridge::parallel_for);
#endif
  return out;
}

// The kernels write grad_lr in the layout of lr's strides, so lr must itself be dense; one that
// broadcasts in a pattern they do not have is expanded, and its gradient summed back.
std::tuple<Tensors, Tensors> sgd_update_backward(const Tensors& grad_outs, const Tensors& grads,
                                                 const Tensors& lrs, bool with_lr) {
  check_lists(grads, {&grad_outs}, {}, lrs);
  Tensors grad_grads, grad_lrs;
  if (grads.empty()) return {grad_grads, grad_lrs};
  std::vector<SgdBackwardTensor> tensors(grads.size());
  std::vector<Tensors> alive;
  const ScalarType acc = bridge::acc_type(grads[0]);
  for (size_t i = 0; i < grads.size(); ++i) {
    const std::vector<int64_t> shape = shape_of(grads[i]);
    SgdBackwardTensor& t = tensors[i];
    Tensors operands{grad_outs[i], grads[i], bridge::contiguous(lrs[i])};
    const Split split = place(shape, operands, {&t.grad_out, &t.grad, &t.lr});
    t.num_tasks = split.tasks;
    t.num_elements = split.elements;
    t.grad_grad = grow(grad_grads, grads[i], shape, grads[i].scalar_type());
    const auto lr_shape = with_lr ? shape_of(operands.back()) : std::vector<int64_t>{0};
    void* grad_lr = grow(grad_lrs, grads[i], lr_shape, acc);
    t.grad_lr = with_lr ? grad_lr : nullptr;
    alive.push_back(std::move(operands));
  }
  const SgdBackward args{bridge::dtype_of(grads[0]), bridge::acc_dtype_of(grads[0]),
                         static_cast<int64_t>(tensors.size()), tensors.data()};
#if defined(FASTMETA_CUDA)
  const bridge::CudaScope scope(grads[0]);
  const Tensor workspace = bridge::workspace(grads[0], cuda::sgd_backward_workspace(args));
  cuda::sgd_backward(args, workspace.mutable_data_ptr(), scope.stream());
#else
  FASTMETA_DISPATCH(current_isa(), update, sgd_backward, args, bridge::parallel_for);
#endif
  for (size_t i = 0; with_lr && i < grads.size(); ++i) {
    grad_lrs[i] = sum_to(grad_lrs[i], shape_of(lrs[i]));
  }
  return {grad_grads, grad_lrs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, FASTMETA_DEVICE_KEY, m) {
  m.impl("sgd_update", TORCH_BOX(&sgd_update));
  m.impl("sgd_update_backward", TORCH_BOX(&sgd_update_backward));
}

}  // namespace fastmeta::update
