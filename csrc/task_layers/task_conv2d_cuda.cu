// Launches of task_conv2d and its adjoints on the caller's stream.
#include "task_layers/task_conv2d.h"
#include "task_layers/task_conv2d_kernel.cuh"
#include "task_layers/task_product_launch.cuh"

namespace fastmeta::task_layers::cuda {
namespace {

struct Sizes {
  int64_t group_channels, group_outputs, taps, inner, pixels, positions;

  explicit Sizes(const Conv2d& a)
      : group_channels(a.channels / a.groups),
        group_outputs(a.outputs / a.groups),
        taps(a.kernel_h * a.kernel_w),
        inner(group_channels * taps),
        pixels(a.height * a.width),
        positions(a.out_h * a.out_w) {}
};

// A place on an axis, which device code keeps in 32 bits beside the mark of no place, 2^30 below
// zero.
int place(int64_t value) {
  if (value >= (int64_t{1} << 30)) {
    throw std::runtime_error(
        "fastmeta: sides of a padded image, window and stride must be below 2^30, got " +
        std::to_string(value));
  }
  return static_cast<int>(value);
}

// Where the window at an output's position reads x.
Axis forward_axis(int64_t size, int64_t out, int64_t taps, int64_t stride, int64_t padding,
                  int64_t dilation) {
  place(size + 2 * padding);
  return {place(size), place(taps), place(out), place(stride), place(dilation), -place(padding), 1};
}

// Which output a position of x reached through a tap.
Axis input_axis(int64_t size, int64_t out, int64_t taps, int64_t stride, int64_t padding,
                int64_t dilation) {
  place(size + 2 * padding);
  return {place(out), place(taps), place(size), 1, -place(dilation), place(padding), place(stride)};
}

template <class scalar_t>
Patches<scalar_t> patches_of_x(const Conv2d& a, bool across) {
  const Sizes n(a);
  return {static_cast<const scalar_t*>(a.x.data),
          a.x.stride,
          n.group_channels * n.pixels,
          a.channels * n.pixels,
          n.pixels,
          forward_axis(a.height, a.out_h, a.kernel_h, a.stride_h, a.padding_h, a.dilation_h),
          forward_axis(a.width, a.out_w, a.kernel_w, a.stride_w, a.padding_w, a.dilation_w),
          across};
}

template <class scalar_t>
Patches<scalar_t> patches_of_grad(const Conv2d& a) {
  const Sizes n(a);
  return {static_cast<const scalar_t*>(a.grad.data),
          a.grad.stride,
          n.group_outputs * n.positions,
          a.outputs * n.positions,
          n.positions,
          input_axis(a.height, a.out_h, a.kernel_h, a.stride_h, a.padding_h, a.dilation_h),
          input_axis(a.width, a.out_w, a.kernel_w, a.stride_w, a.padding_w, a.dilation_w),
          true};
}

// The matrix with these strides, by packs where they allow it.
template <class scalar_t>
Matrix<scalar_t> matrix_of(const PerTask& tensor, int64_t group, int64_t row, int64_t outer,
                           int64_t inner) {
  const auto* data = static_cast<const scalar_t*>(tensor.data);
  const bool packs = (tensor.stride | group | row | outer) % kPack == 0;
  return {data, tensor.stride, group, row, outer, 1, inner, false, packs && packable(data, inner)};
}

// The result with these strides; without bias.
template <class scalar_t>
Result<scalar_t> result_of(const Conv2d& a, int64_t task, int64_t group, int64_t row, int64_t outer,
                           int64_t inner) {
  Result<scalar_t> result{};
  result.data = static_cast<scalar_t*>(a.out);
  result.task = task;
  result.group = group;
  result.row = row;
  result.outer = outer;
  result.inner = inner;
  result.vector = packable(result.data, inner) && row % kPack == 0;
  return result;
}

ProductShape forward_shape(const Conv2d& a) {
  const Sizes n(a);
  return {a.tasks, a.groups, n.group_outputs, a.rows * n.positions, n.inner};
}
ProductShape input_shape(const Conv2d& a) {
  const Sizes n(a);
  return {a.tasks, a.groups, n.group_channels, a.rows * n.pixels, n.group_outputs * n.taps};
}
ProductShape weight_shape(const Conv2d& a) {
  const Sizes n(a);
  return {a.tasks, a.groups, n.group_outputs, n.inner, a.rows * n.positions};
}

}  // namespace

int64_t conv2d_workspace(const Conv2d& args) { return forward_shape(args).workspace(args.dtype); }
int64_t conv2d_input_workspace(const Conv2d& args) {
  return input_shape(args).workspace(args.dtype);
}
int64_t conv2d_weight_workspace(const Conv2d& args) {
  return weight_shape(args).workspace(args.dtype);
}

void conv2d(const Conv2d& args, void* workspace, void* stream) {
  const Sizes n(args);
  dispatch(args.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    auto result = result_of<scalar_t>(args, args.rows * args.outputs * n.positions,
                                      n.group_outputs * n.positions, n.positions,
                                      args.outputs * n.positions, n.positions);
    result.bias = static_cast<const scalar_t*>(args.bias.data);
    result.bias_task = args.bias.stride;
    result.bias_group = n.group_outputs;
    result.bias_row = 1;
    const auto weight =
        matrix_of<scalar_t>(args.weight, n.group_outputs * n.inner, n.inner, 0, n.inner);
    launch_product("task_conv2d", forward_shape(args), weight, patches_of_x<scalar_t>(args, true),
                   result, args.allow_tf32, workspace, stream);
  });
}

void conv2d_input(const Conv2d& args, void* workspace, void* stream) {
  const Sizes n(args);
  dispatch(args.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const auto result =
        result_of<scalar_t>(args, args.rows * args.channels * n.pixels, n.group_channels * n.pixels,
                            n.pixels, args.channels * n.pixels, n.pixels);
    const auto weight =
        matrix_of<scalar_t>(args.weight, n.group_outputs * n.inner, n.taps, n.inner, n.taps);
    launch_product("task_conv2d_input", input_shape(args), weight, patches_of_grad<scalar_t>(args),
                   result, args.allow_tf32, workspace, stream);
  });
}

void conv2d_weight(const Conv2d& args, void* workspace, void* stream) {
  const Sizes n(args);
  dispatch(args.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const auto result = result_of<scalar_t>(args, args.outputs * n.inner, n.group_outputs * n.inner,
                                            n.inner, 0, n.inner);
    const auto grad = matrix_of<scalar_t>(args.grad, n.group_outputs * n.positions, n.positions,
                                          args.outputs * n.positions, n.positions);
    launch_product("task_conv2d_weight", weight_shape(args), grad,
                   patches_of_x<scalar_t>(args, false), result, args.allow_tf32, workspace, stream);
  });
}

}  // namespace fastmeta::task_layers::cuda
