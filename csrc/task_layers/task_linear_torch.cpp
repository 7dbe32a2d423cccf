// Bridge of task_linear: checks, allocation, registration.
#include "task_layers/per_task_torch.h"
#include "task_layers/task_linear.h"

namespace fastmeta::task_layers {
namespace {

using bridge::Tensor;

TaskMatrix matrix(const Tensor& tensor) {
  const bool rows = tensor.dim() == 3;
  return {tensor.const_data_ptr(), tensor.stride(0), rows ? tensor.stride(1) : 0,
          tensor.stride(rows ? 2 : 1)};
}

Tensor task_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 3, "fastmeta: expected x [T, N, I]");
  const int64_t tasks = x.size(0), rows = x.size(1), inputs = x.size(2), outputs = weight.size(1);
  bridge::check_shape(weight, "weight", {tasks, outputs, inputs});
  check_same_dtype(weight, "weight", x);
  if (bias.has_value()) {
    bridge::check_shape(*bias, "bias", {tasks, outputs});
    check_same_dtype(*bias, "bias", x);
  }
  const Tensor own_x = computed(x), own_weight = computed(weight);
  const std::optional<Tensor> own_bias = computed(bias);
  Tensor out = bridge::empty(own_x, {tasks, rows, outputs}, own_x.scalar_type());
  Linear args{bridge::dtype_of(own_x),
              tasks,
              rows,
              inputs,
              outputs,
              matrix(own_x),
              matrix(own_weight),
              own_bias.has_value() ? matrix(*own_bias) : TaskMatrix{},
              out.mutable_data_ptr()};
#if defined(FASTMETA_CUDA)
  const bridge::CudaScope scope(x);
  args.allow_tf32 = bridge::allow_tf32(args.dtype, "fastmeta::allow_tf32");
  const Tensor space = bridge::workspace(x, cuda::linear_workspace(args));
  cuda::linear(args, space.mutable_data_ptr(), scope.stream());
#else
  FASTMETA_DISPATCH(current_isa(), task_layers, linear, args, bridge::parallel_for);
#endif
  return narrowed(out, x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, FASTMETA_DEVICE_KEY, m) {
  m.impl("task_linear", TORCH_BOX(&task_linear));
}

}  // namespace fastmeta::task_layers
