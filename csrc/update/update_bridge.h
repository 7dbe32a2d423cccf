// What the bridges of the updates share: checks, how a tensor and its operands split into tasks and
// elements, and the way back of a rate's gradient.
#pragma once
#include <initializer_list>

#include "common/torch_bridge.h"
#include "update/sgd_update.h"

namespace fastmeta::update {

using bridge::ScalarType;
using bridge::Tensor;
using Tensors = std::vector<Tensor>;

// Strides of `tensor` aligned to the right of a shape of `rank` dimensions; 0 where it broadcasts.
inline std::vector<int64_t> broadcast_strides(const Tensor& tensor, int64_t rank) {
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
inline int64_t range_stride(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                            int64_t first, int64_t last, int64_t width) {
  bool dense = true, constant = true;
  int64_t expected = width;
  for (int64_t d = last - 1; d >= first; --d) {
    if (shape[d] != 1) {
      dense = dense && strides[d] == expected;
      constant = constant && strides[d] == 0;
    }
    expected *= std::max<int64_t>(shape[d], 1);  // as torch strides what is empty
  }
  if (constant) return 0;
  return dense ? width : -1;
}

inline bool describe(const Tensor& tensor, const std::vector<int64_t>& shape, const Split& split,
                     Operand* operand) {
  const auto strides = broadcast_strides(tensor, static_cast<int64_t>(shape.size()));
  const int64_t rank = static_cast<int64_t>(shape.size());
  const int64_t element = range_stride(shape, strides, split.cut, rank, 1);
  if (element < 0) return false;
  const int64_t task = range_stride(shape, strides, 0, split.cut,
                                    element == 0 ? 1 : std::max<int64_t>(split.elements, 1));
  if (task < 0) return false;
  *operand = Operand{tensor.const_data_ptr(), task, element};
  return true;
}

// Where broadcasting stops: the shortest prefix after which every operand is dense or constant.
inline Split find_split(const std::vector<int64_t>& shape, const Tensors& operands) {
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

inline Tensor expand_dense(const Tensor& tensor, const std::vector<int64_t>& shape) {
  std::vector<int64_t> padded(shape.size(), 1);
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    padded[shape.size() - tensor.dim() + d] = tensor.size(d);
  }
  Tensor dense = bridge::empty(tensor, shape, tensor.scalar_type());
  torch::stable::copy_(dense, torch::stable::reshape(bridge::contiguous(tensor), padded));
  return dense;
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  std::vector<int64_t> shape(tensor.dim());
  for (int64_t d = 0; d < tensor.dim(); ++d) shape[d] = tensor.size(d);
  return shape;
}

// Splits `shape` and describes the operands, the last of which is the rate; what the kernels cannot
// walk over is replaced by a copy in `operands`: the others by contiguous ones, the rate by one of
// the whole shape.
inline Split place(const std::vector<int64_t>& shape, Tensors& operands,
                   std::initializer_list<Operand*> places) {
  Split split = find_split(shape, operands);
  if (split.cut < 0) {
    for (size_t i = 0; i + 1 < operands.size(); ++i) operands[i] = bridge::contiguous(operands[i]);
    split = find_split(shape, operands);
  }
  if (split.cut < 0) {
    operands.back() = expand_dense(operands.back(), shape);
    split = find_split(shape, operands);
  }
  const Tensor* operand = operands.data();
  for (Operand* place : places) describe(*operand++, shape, split, place);
  return split;
}

// The safety net of those who call the ops themselves: `own` lists have the dtype and shapes of
// grads, `states` the accumulation dtype and these shapes, lrs broadcast to them.
inline void check_lists(const Tensors& grads, std::initializer_list<const Tensors*> own,
                        std::initializer_list<const Tensors*> states, const Tensors& lrs) {
  const auto check = [&](const Tensors& list, const char* name, ScalarType dtype) {
    STD_TORCH_CHECK(list.size() == grads.size(), "fastmeta: lists of unequal length");
    for (size_t i = 0; i < grads.size(); ++i) {
      bridge::check_dtype(list[i], name, dtype);
      bridge::check_shape(list[i], name, shape_of(grads[i]));
    }
  };
  STD_TORCH_CHECK(lrs.size() == grads.size(), "fastmeta: lists of unequal length");
  if (grads.empty()) return;
  const ScalarType acc = bridge::acc_type(grads[0]);
  check(grads, "grads", grads[0].scalar_type());
  for (const Tensors* list : own) check(*list, "params or grad_outs", grads[0].scalar_type());
  for (const Tensors* list : states) check(*list, "state", acc);
  for (size_t i = 0; i < grads.size(); ++i) {
    bridge::check_dtype(lrs[i], "lrs", acc);
    bool fits = lrs[i].dim() <= grads[i].dim();
    for (int64_t d = 1; fits && d <= lrs[i].dim(); ++d) {
      const int64_t size = lrs[i].size(lrs[i].dim() - d);
      fits = size == 1 || size == grads[i].size(grads[i].dim() - d);
    }
    STD_TORCH_CHECK(fits, "fastmeta: lrs do not broadcast to grads");
  }
}

// A new tensor at the end of `list`; returns where its data goes.
inline void* grow(Tensors& list, const Tensor& like, const std::vector<int64_t>& shape,
                  ScalarType dtype) {
  list.push_back(bridge::empty(like, shape, dtype));
  return list.back().mutable_data_ptr();
}

// The gradient of a rate that `place` expanded, summed back to the rate's shape.
inline Tensor sum_to(const Tensor& grad_lr, const std::vector<int64_t>& wanted) {
  const std::vector<int64_t> got = shape_of(grad_lr);
  if (wanted == got) return grad_lr;
  std::vector<int64_t> dims;
  const int64_t offset = static_cast<int64_t>(got.size() - wanted.size());
  for (int64_t d = 0; d < static_cast<int64_t>(got.size()); ++d) {
    if (d < offset || wanted[d - offset] == 1) dims.push_back(d);
  }
  return torch::stable::reshape(torch::stable::sum(grad_lr, dims, true, std::nullopt), wanted);
}

}  // namespace fastmeta::update
