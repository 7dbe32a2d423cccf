// Bridge of sgd_update: checks, allocation, how each tensor splits into tasks and elements.
#include "common/torch_bridge.h"
#include "update/sgd_update.h"

namespace fastmeta::update {
namespace {

using bridge::ScalarType;
using bridge::Tensor;
using Tensors = std::vector<Tensor>;

// Strides of `tensor` aligned to the right of a shape of `rank` dimensions; 0 where it broadcasts.
std::vector<int64_t> broadcast_strides(const Tensor& tensor, int64_t rank) {
  std::vector<int64_t> strides(rank, 0);
  const int64_t offset = rank - tensor.dim();
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1) strides[offset + d] = tensor.stride(d);
  }
  return strides;
}

// A shape seen as [tasks, elements], cut before dimension `cut`.
struct Split {
  int64_t cut, tasks, elements;
};

// Whether the dims [first, last) advance through memory as a contiguous array does, or not at all.
// Returns the stride per element of that range: 1, 0, or -1 for neither. `width` is the number of
// elements that one step of the range's last dimension moves over.
int64_t range_stride(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                     int64_t first, int64_t last, int64_t width) {
  bool dense = true, constant = true;
  int64_t expected = width;
  for (int64_t d = last - 1; d >= first; --d) {
    if (shape[d] != 1) {
      dense = dense && strides[d] == expected;
      constant = constant && strides[d] == 0;
    }
    expected *= shape[d];
  }
  if (constant) return 0;
  return dense ? width : -1;
}

bool describe(const Tensor& tensor, const std::vector<int64_t>& shape, const Split& split,
              Operand* operand) {
  const auto strides = broadcast_strides(tensor, static_cast<int64_t>(shape.size()));
  const int64_t rank = static_cast<int64_t>(shape.size());
  const int64_t element = range_stride(shape, strides, split.cut, rank, 1);
  if (element < 0) return false;
  const int64_t task =
      range_stride(shape, strides, 0, split.cut, element == 0 ? 1 : split.elements);
  if (task < 0) return false;
  *operand = Operand{tensor.const_data_ptr(), task, element};
  return true;
}

// Where broadcasting stops: the shortest prefix after which both operands are dense.
Split find_split(const std::vector<int64_t>& shape, const std::vector<Tensor>& operands) {
  const int64_t rank = static_cast<int64_t>(shape.size());
  Operand unused;
  for (int64_t cut = 0; cut <= rank; ++cut) {
    Split split{cut, 1, 1};
    for (int64_t d = 0; d < rank; ++d) (d < cut ? split.tasks : split.elements) *= shape[d];
    bool fits = true;
    for (const Tensor& operand : operands) fits = fits && describe(operand, shape, split, &unused);
    if (fits) return split;
  }
  return Split{-1, 0, 0};
}

Tensor expand_dense(const Tensor& tensor, const std::vector<int64_t>& shape) {
  std::vector<int64_t> padded(shape.size(), 1);
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    padded[shape.size() - tensor.dim() + d] = tensor.size(d);
  }
  Tensor dense = bridge::empty(tensor, shape, tensor.scalar_type());
  torch::stable::copy_(dense, torch::stable::reshape(bridge::contiguous(tensor), padded));
  return dense;
}

std::vector<int64_t> shape_of(const Tensor& tensor) {
  std::vector<int64_t> shape(tensor.dim());
  for (int64_t d = 0; d < tensor.dim(); ++d) shape[d] = tensor.size(d);
  return shape;
}

void check_lists(const Tensors& first, const Tensors& grads, const Tensors& lrs) {
  STD_TORCH_CHECK(first.size() == grads.size() && lrs.size() == grads.size(),
                  "fastmeta: lists of unequal length");
  for (size_t i = 0; i < grads.size(); ++i) {
    bridge::check_dtype(grads[i], "grads", grads[0].scalar_type());
    bridge::check_dtype(first[i], "params or grad_outs", grads[0].scalar_type());
    bridge::check_dtype(lrs[i], "lrs", bridge::acc_type(grads[0]));
    bridge::check_shape(first[i], "params or grad_outs", shape_of(grads[i]));
    bool fits = lrs[i].dim() <= grads[i].dim();
    for (int64_t d = 1; fits && d <= lrs[i].dim(); ++d) {
      const int64_t size = lrs[i].size(lrs[i].dim() - d);
      fits = size == 1 || size == grads[i].size(grads[i].dim() - d);
    }
    STD_TORCH_CHECK(fits, "fastmeta: lrs do not broadcast to grads");
  }
}

Tensors sgd_update(const Tensors& params, const Tensors& grads, const Tensors& lrs) {
  check_lists(params, grads, lrs);
  Tensors out, alive;
  if (grads.empty()) return out;
  out.reserve(grads.size());
  std::vector<SgdTensor> tensors(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const std::vector<int64_t> shape = shape_of(grads[i]);
    Tensor grad = bridge::contiguous(grads[i]), param = params[i], lr = lrs[i];
    Split split = find_split(shape, {grad, param, lr});
    if (split.cut < 0) {
      param = bridge::contiguous(param);
      split = find_split(shape, {grad, param, lr});
    }
    if (split.cut < 0) {
      lr = expand_dense(lr, shape);
      split = find_split(shape, {grad, param, lr});
    }
    out.push_back(bridge::empty(grad, shape, grad.scalar_type()));
    SgdTensor& t = tensors[i];
    t.num_tasks = split.tasks;
    t.num_elements = split.elements;
    describe(grad, shape, split, &t.grad);
    describe(param, shape, split, &t.param);
    describe(lr, shape, split, &t.lr);
    t.out = out.back().mutable_data_ptr();
    for (Tensor& tensor : std::vector<Tensor>{grad, param, lr}) alive.push_back(tensor);
  }
  const Sgd args{bridge::dtype_of(grads[0]),
                 grads[0].scalar_type() == ScalarType::Double ? DType::kFloat64 : DType::kFloat32,
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
  check_lists(grad_outs, grads, lrs);
  Tensors grad_grads, grad_lrs, dense_grad_lrs, alive;
  if (grads.empty()) return {grad_grads, grad_lrs};
  std::vector<SgdBackwardTensor> tensors(grads.size());
  const ScalarType acc = bridge::acc_type(grads[0]);
  for (size_t i = 0; i < grads.size(); ++i) {
    const std::vector<int64_t> shape = shape_of(grads[i]);
    const Tensor out = bridge::contiguous(grad_outs[i]), grad = bridge::contiguous(grads[i]);
    Tensor lr = bridge::contiguous(lrs[i]);
    Split split = find_split(shape, {out, grad, lr});
    if (split.cut < 0) {
      lr = expand_dense(lr, shape);
      split = find_split(shape, {out, grad, lr});
    }
    grad_grads.push_back(bridge::empty(grad, shape, grad.scalar_type()));
    dense_grad_lrs.push_back(
        bridge::empty(lr, with_lr ? shape_of(lr) : std::vector<int64_t>{0}, acc));
    SgdBackwardTensor& t = tensors[i];
    t.num_tasks = split.tasks;
    t.num_elements = split.elements;
    describe(out, shape, split, &t.grad_out);
    describe(grad, shape, split, &t.grad);
    describe(lr, shape, split, &t.lr);
    t.grad_grad = grad_grads.back().mutable_data_ptr();
    t.grad_lr = with_lr ? dense_grad_lrs.back().mutable_data_ptr() : nullptr;
    for (const Tensor& tensor : std::vector<Tensor>{out, grad, lr}) alive.push_back(tensor);
  }
  const SgdBackward args{
      bridge::dtype_of(grads[0]),
      grads[0].scalar_type() == ScalarType::Double ? DType::kFloat64 : DType::kFloat32,
      static_cast<int64_t>(tensors.size()), tensors.data()};
#if defined(FASTMETA_CUDA)
  const bridge::CudaScope scope(grads[0]);
  const int64_t bytes = cuda::sgd_backward_workspace(args);
  Tensor workspace = bridge::empty(grads[0], {(bytes + 7) / 8}, ScalarType::Long);
  cuda::sgd_backward(args, workspace.mutable_data_ptr(), scope.stream());
#else
  FASTMETA_DISPATCH(current_isa(), update, sgd_backward, args, bridge::parallel_for);
#endif
  for (size_t i = 0; i < grads.size(); ++i) {
    Tensor grad_lr = dense_grad_lrs[i];
    const std::vector<int64_t> wanted = shape_of(lrs[i]), got = shape_of(grad_lr);
    if (with_lr && wanted != got) {
      std::vector<int64_t> dims;
      const int64_t offset = static_cast<int64_t>(got.size() - wanted.size());
      for (int64_t d = 0; d < static_cast<int64_t>(got.size()); ++d) {
        if (d < offset || wanted[d - offset] == 1) dims.push_back(d);
      }
      grad_lr =
          torch::stable::reshape(torch::stable::sum(grad_lr, dims, true, std::nullopt), wanted);
    }
    grad_lrs.push_back(grad_lr);
  }
  return {grad_grads, grad_lrs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, FASTMETA_DEVICE_KEY, m) {
  m.impl("sgd_update", TORCH_BOX(&sgd_update));
  m.impl("sgd_update_backward", TORCH_BOX(&sgd_update_backward));
}

}  // namespace fastmeta::update
