// Launches of segment_mean on the caller's stream.
#include "common/launch.cuh"
#include "segment/segment_mean.h"
#include "segment/segment_mean_kernel.cuh"

namespace fastmeta::segment::cuda {
namespace {

template <class scalar_t, int width>
void launch_mean(MeanParams<scalar_t> params, void* stream) {
  // A mean of no features still counts its rows.
  params.slices = std::max<int64_t>(1, ceil_div(params.dim, int64_t{kThreads} * width));
  const int64_t blocks = params.num_tasks * params.num_classes * params.slices;
  launch("segment_mean", mean_kernel<scalar_t, width>, geometry(blocks, kThreads), stream, params);
}

template <class scalar_t, int width>
void launch_mean_backward(const MeanBackwardParams<scalar_t>& params, void* stream) {
  const int64_t threads = params.num_tasks * params.num_rows * (params.dim / width);
  launch("segment_mean_backward", mean_backward_kernel<scalar_t, width>,
         geometry(ceil_div(threads, kThreads), kThreads), stream, params);
}

}  // namespace

void mean(const Mean& args, void* stream) {
  if (args.num_tasks == 0 || args.num_classes == 0) return;
  dispatch(args.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const MeanParams<scalar_t> params{args.num_tasks,
                                      args.num_rows,
                                      args.num_classes,
                                      args.dim,
                                      1,
                                      static_cast<const scalar_t*>(args.values),
                                      args.labels,
                                      static_cast<scalar_t*>(args.mean),
                                      static_cast<acc_t<scalar_t>*>(args.count)};
    if (packable(params.values, args.dim) && packable(params.mean, args.dim)) {
      launch_mean<scalar_t, kPack>(params, stream);
    } else {
      launch_mean<scalar_t, 1>(params, stream);
    }
  });
}

void mean_backward(const MeanBackward& args, void* stream) {
  if (args.num_tasks == 0 || args.num_rows == 0 || args.dim == 0) return;
  dispatch(args.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const MeanBackwardParams<scalar_t> params{args.num_tasks,
                                              args.num_rows,
                                              args.num_classes,
                                              args.dim,
                                              static_cast<const scalar_t*>(args.grad),
                                              args.labels,
                                              static_cast<const acc_t<scalar_t>*>(args.count),
                                              static_cast<scalar_t*>(args.grad_values)};
    if (packable(params.grad, args.dim) && packable(params.grad_values, args.dim)) {
      launch_mean_backward<scalar_t, kPack>(params, stream);
    } else {
      launch_mean_backward<scalar_t, 1>(params, stream);
    }
  });
}

}  // namespace fastmeta::segment::cuda
