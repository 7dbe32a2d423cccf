// Bridge of segment_mean: checks, allocation, registration.
#include "common/torch_bridge.h"
#include "segment/segment_mean.h"

namespace fastmeta::segment {
namespace {

using bridge::ScalarType;
using bridge::Tensor;

std::tuple<Tensor, Tensor> segment_mean(const Tensor& values, const Tensor& labels,
                                        int64_t num_classes) {
  STD_TORCH_CHECK(values.dim() == 3 && num_classes >= 1, "fastmeta: values must be [T, S, D]");
  const int64_t tasks = values.size(0), rows = values.size(1), dim = values.size(2);
  bridge::check_shape(labels, "labels", {tasks, rows});
  bridge::check_dtype(labels, "labels", ScalarType::Long);
  const Tensor v = bridge::contiguous(values), y = bridge::contiguous(labels);
  Tensor mean = bridge::empty(v, {tasks, num_classes, dim}, v.scalar_type());
  Tensor count = bridge::empty(v, {tasks, num_classes}, bridge::acc_type(v));
  const Mean args{bridge::dtype_of(v),
                  tasks,
                  rows,
                  num_classes,
                  dim,
                  v.const_data_ptr(),
                  y.const_data_ptr<int64_t>(),
                  mean.mutable_data_ptr(),
                  count.mutable_data_ptr()};
#if defined(FASTMETA_CUDA)
  const bridge::CudaScope scope(v);
  cuda::mean(args, scope.stream());
#else
  FASTMETA_DISPATCH(current_isa(), segment, mean, args, bridge::parallel_for);
#endif
  return {mean, count};
}

Tensor segment_mean_backward(const Tensor& grad, const Tensor& labels, const Tensor& count) {
  STD_TORCH_CHECK(grad.dim() == 3 && labels.dim() == 2, "fastmeta: grad must be [T, C, D]");
  const int64_t tasks = grad.size(0), classes = grad.size(1), dim = grad.size(2);
  const int64_t rows = labels.size(1);
  bridge::check_shape(labels, "labels", {tasks, rows});
  bridge::check_dtype(labels, "labels", ScalarType::Long);
  bridge::check_shape(count, "count", {tasks, classes});
  bridge::check_dtype(count, "count", bridge::acc_type(grad));
  const Tensor g = bridge::contiguous(grad), y = bridge::contiguous(labels);
  const Tensor n = bridge::contiguous(count);
  Tensor grad_values = bridge::empty(g, {tasks, rows, dim}, g.scalar_type());
  const MeanBackward args{bridge::dtype_of(g),
                          tasks,
                          rows,
                          classes,
                          dim,
                          g.const_data_ptr(),
                          y.const_data_ptr<int64_t>(),
                          n.const_data_ptr(),
                          grad_values.mutable_data_ptr()};
#if defined(FASTMETA_CUDA)
  const bridge::CudaScope scope(g);
  cuda::mean_backward(args, scope.stream());
#else
  FASTMETA_DISPATCH(current_isa(), segment, mean_backward, args, bridge::parallel_for);
#endif
  return grad_values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, FASTMETA_DEVICE_KEY, m) {
  m.impl("segment_mean", TORCH_BOX(&segment_mean));
  m.impl("segment_mean_backward", TORCH_BOX(&segment_mean_backward));
}

}  // namespace fastmeta::segment
