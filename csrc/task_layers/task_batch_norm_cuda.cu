// Launches of task_batch_norm and its derivatives on the caller's stream.
#include "common/launch.cuh"
#include "task_layers/task_batch_norm.h"
#include "task_layers/task_batch_norm_kernel.cuh"

namespace fastmeta::task_layers::cuda {
namespace {

template <class scalar_t>
BatchNormParams<scalar_t> params_of(const BatchNorm& args) {
  using acc = acc_t<scalar_t>;
  BatchNormParams<scalar_t> p{};
  p.tasks = args.tasks;
  p.rows = args.rows;
  p.channels = args.channels;
  p.length = args.length;
  p.slices = args.length == 1 ? ceil_div(args.channels, kWarpSize) : args.channels;
  p.eps = static_cast<acc>(args.eps);
  p.x = static_cast<const scalar_t*>(args.x);
  p.weight = static_cast<const scalar_t*>(args.weight.data);
  p.bias = static_cast<const scalar_t*>(args.bias.data);
  p.weight_stride = args.weight.stride;
  p.bias_stride = args.bias.stride;
  p.mean = static_cast<acc*>(args.mean);
  p.rstd = static_cast<acc*>(args.rstd);
  p.grad = static_cast<const scalar_t*>(args.grad);
  p.u = static_cast<const scalar_t*>(args.u);
  p.v = static_cast<const scalar_t*>(args.v);
  p.z = static_cast<const scalar_t*>(args.z);
  p.out = static_cast<scalar_t*>(args.out);
  p.to_grad = static_cast<scalar_t*>(args.to_grad);
  p.to_weight = static_cast<scalar_t*>(args.to_weight);
  p.to_bias = static_cast<scalar_t*>(args.to_bias);
  // What an op does not take is nullptr, which is aligned.
  p.vector = packable(p.x, p.length) && packable(p.grad, p.length) && packable(p.u, p.length) &&
             packable(p.out, p.length) && packable(p.to_grad, p.length);
  return p;
}

template <class scalar_t>
void launch_norm(const char* what, void (*kernel)(BatchNormParams<scalar_t>), const BatchNorm& args,
                 void* stream) {
  const auto params = params_of<scalar_t>(args);
  launch(what, kernel, geometry(params.tasks * params.slices, kNormThreads), stream, params);
}

}  // namespace

void batch_norm(const BatchNorm& args, void* stream) {
  dispatch(args.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    launch_norm<scalar_t>("task_batch_norm", batch_norm_kernel<scalar_t>, args, stream);
  });
}

void batch_norm_backward(const BatchNorm& args, void* stream) {
  dispatch(args.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    launch_norm<scalar_t>("task_batch_norm_backward", batch_norm_backward_kernel<scalar_t>, args,
                          stream);
  });
}

void batch_norm_second(const BatchNorm& args, void* stream) {
  dispatch(args.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    launch_norm<scalar_t>("task_batch_norm_second", batch_norm_second_kernel<scalar_t>, args,
                          stream);
  });
}

}  // namespace fastmeta::task_layers::cuda
