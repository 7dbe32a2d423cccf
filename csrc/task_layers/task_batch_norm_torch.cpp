// Bridge of task_batch_norm and its derivatives: checks, allocation, registration.
#include "task_layers/per_task_torch.h"
#include "task_layers/task_batch_norm.h"

namespace fastmeta::task_layers {
namespace {

using bridge::ScalarType;
using bridge::Tensor;
using std::optional;

#if defined(FASTMETA_CUDA)
#define FASTMETA_RUN(function, call)       \
  const bridge::CudaScope scope((call).x); \
  cuda::function((call).args, scope.stream())
#else
#define FASTMETA_RUN(function, call) \
  FASTMETA_DISPATCH(current_isa(), task_layers, function, (call).args, bridge::parallel_for)
#endif

struct Call {
  Tensor x;
  Operand weight, bias;
  BatchNorm args{};
  std::vector<int64_t> shape, columns;

  Call(const Tensor& given, const optional<Tensor>& w, const optional<Tensor>& b, double eps)
      : x(bridge::contiguous(given)), weight(operand(w)), bias(operand(b)) {
    STD_TORCH_CHECK(x.dim() == 4, "fastmeta: x must be [T, N, C, L]");
    shape = {x.size(0), x.size(1), x.size(2), x.size(3)};
    columns = {x.size(0), x.size(2)};
    for (const auto* column : {&w, &b}) {
      if (!column->has_value()) continue;
      bridge::check_shape(**column, "weight or bias", columns);
      check_same_dtype(**column, "weight or bias", x);
    }
    args.dtype = bridge::dtype_of(x);
    args.tasks = shape[0];
    args.rows = shape[1];
    args.channels = shape[2];
    args.length = shape[3];
    args.eps = eps;
    args.x = x.const_data_ptr();
    args.weight = weight.view();
    args.bias = bias.view();
  }
  Tensor like_x() const { return bridge::empty(x, shape, x.scalar_type()); }
  Tensor column(ScalarType dtype) const { return bridge::empty(x, columns, dtype); }
  Tensor checked(const Tensor& tensor, const char* name, bool is_column) const {
    bridge::check_shape(tensor, name, is_column ? columns : shape);
    check_same_dtype(tensor, name, x);
    return bridge::contiguous(tensor);
  }
  Tensor statistic(const Tensor& tensor) {
    bridge::check_shape(tensor, "mean or rstd", columns);
    bridge::check_dtype(tensor, "mean or rstd", bridge::acc_type(x));
    return bridge::contiguous(tensor);
  }
};

std::tuple<Tensor, Tensor, Tensor> task_batch_norm(const Tensor& x, const optional<Tensor>& weight,
                                                   const optional<Tensor>& bias, double eps) {
  Call call(x, weight, bias, eps);
  Tensor out = call.like_x();
  Tensor mean = call.column(bridge::acc_type(x)), rstd = call.column(bridge::acc_type(x));
  call.args.out = out.mutable_data_ptr();
  call.args.mean = mean.mutable_data_ptr();
  call.args.rstd = rstd.mutable_data_ptr();
  FASTMETA_RUN(batch_norm, call);
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> task_batch_norm_backward(const Tensor& grad, const Tensor& x,
                                                            const optional<Tensor>& weight,
                                                            const Tensor& mean, const Tensor& rstd,
                                                            double eps) {
  Call call(x, weight, std::nullopt, eps);
  const Tensor g = call.checked(grad, "grad", false);
  const Tensor own_mean = call.statistic(mean), own_rstd = call.statistic(rstd);
  Tensor to_x = call.like_x();
  Tensor to_weight = call.column(x.scalar_type()), to_bias = call.column(x.scalar_type());
  call.args.grad = g.const_data_ptr();
  call.args.mean = const_cast<void*>(own_mean.const_data_ptr());
  call.args.rstd = const_cast<void*>(own_rstd.const_data_ptr());
  call.args.out = to_x.mutable_data_ptr();
  call.args.to_weight = to_weight.mutable_data_ptr();
  call.args.to_bias = to_bias.mutable_data_ptr();
  FASTMETA_RUN(batch_norm_backward, call);
  return {to_x, to_weight, to_bias};
}

std::tuple<Tensor, Tensor, Tensor> task_batch_norm_second(
    const Tensor& u, const Tensor& v, const Tensor& z, const Tensor& grad, const Tensor& x,
    const optional<Tensor>& weight, const Tensor& mean, const Tensor& rstd, double eps) {
  Call call(x, weight, std::nullopt, eps);
  const Tensor own_u = call.checked(u, "u", false), own_v = call.checked(v, "v", true);
  const Tensor own_z = call.checked(z, "z", true), g = call.checked(grad, "grad", false);
  const Tensor own_mean = call.statistic(mean), own_rstd = call.statistic(rstd);
  Tensor to_grad = call.like_x(), to_x = call.like_x(), to_weight = call.column(x.scalar_type());
  call.args.u = own_u.const_data_ptr();
  call.args.v = own_v.const_data_ptr();
  call.args.z = own_z.const_data_ptr();
  call.args.grad = g.const_data_ptr();
  call.args.mean = const_cast<void*>(own_mean.const_data_ptr());
  call.args.rstd = const_cast<void*>(own_rstd.const_data_ptr());
  call.args.to_grad = to_grad.mutable_data_ptr();
  call.args.out = to_x.mutable_data_ptr();
  call.args.to_weight = to_weight.mutable_data_ptr();
  FASTMETA_RUN(batch_norm_second, call);
  return {to_grad, to_x, to_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, FASTMETA_DEVICE_KEY, m) {
  m.impl("task_batch_norm", TORCH_BOX(&task_batch_norm));
  m.impl("task_batch_norm_backward", TORCH_BOX(&task_batch_norm_backward));
  m.impl("task_batch_norm_second", TORCH_BOX(&task_batch_norm_second));
}

}  // namespace fastmeta::task_layers
