// Bridge of task_conv2d and its adjoints: checks, allocation, registration.
#include "task_layers/per_task_torch.h"
#include "task_layers/task_conv2d.h"

namespace fastmeta::task_layers {
namespace {

using bridge::Tensor;

struct Geometry {
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups;

  int64_t out_h(int64_t height, int64_t kernel) const {
    return (height + 2 * padding_h - dilation_h * (kernel - 1) - 1) / stride_h + 1;
  }
  int64_t out_w(int64_t width, int64_t kernel) const {
    return (width + 2 * padding_w - dilation_w * (kernel - 1) - 1) / stride_w + 1;
  }
};

// Sizes that x and weight state; they need not be there.
Conv2d problem(const Tensor& like, const std::vector<int64_t>& x, const std::vector<int64_t>& w,
               const Geometry& g) {
  STD_TORCH_CHECK(x.size() == 5 && w.size() == 5, "fastmeta: expected [T, N, C, H, W]");
  STD_TORCH_CHECK(g.groups >= 1 && g.stride_h >= 1 && g.stride_w >= 1 && g.padding_h >= 0 &&
                      g.padding_w >= 0 && g.dilation_h >= 1 && g.dilation_w >= 1,
                  "fastmeta: stride, padding, dilation or groups out of range");
  STD_TORCH_CHECK(x[0] == w[0] && x[2] == w[2] * g.groups && w[1] % g.groups == 0 && w[1] > 0 &&
                      w[2] > 0 && w[3] > 0 && w[4] > 0,
                  "fastmeta: weight does not fit x");
  // What comes now must not overflow: sizes in 31 bits, and all padded images in memory's.
  for (const int64_t value :
       {g.stride_h, g.stride_w, g.padding_h, g.padding_w, g.dilation_h, g.dilation_w, w[3], w[4]}) {
    STD_TORCH_CHECK(value <= INT32_MAX, "fastmeta: stride, padding or dilation out of range");
  }
  const double pixels = static_cast<double>(x[3] + 2 * g.padding_h) *
                        static_cast<double>(x[4] + 2 * g.padding_w) * static_cast<double>(x[2]);
  STD_TORCH_CHECK(pixels < 0x1p48, "fastmeta: padded x is too large");
  const int64_t out_h = g.out_h(x[3], w[3]), out_w = g.out_w(x[4], w[4]);
  STD_TORCH_CHECK(x[3] + 2 * g.padding_h > g.dilation_h * (w[3] - 1) &&
                      x[4] + 2 * g.padding_w > g.dilation_w * (w[4] - 1),
                  "fastmeta: x is smaller than the window");
  return Conv2d{bridge::dtype_of(like),
                x[0],
                x[1],
                x[2],
                x[3],
                x[4],
                w[1],
                w[3],
                w[4],
                out_h,
                out_w,
                g.stride_h,
                g.stride_w,
                g.padding_h,
                g.padding_w,
                g.dilation_h,
                g.dilation_w,
                g.groups,
                {},
                {},
                {},
                {},
                nullptr,
                false};
}

#if defined(FASTMETA_CUDA)
using Workspace = int64_t (*)(const Conv2d&);
using Launch = void (*)(const Conv2d&, void*, void*);

void launch(Conv2d args, const Tensor& like, Workspace bytes, Launch function) {
  const bridge::CudaScope scope(like);
  args.allow_tf32 = bridge::allow_tf32(args.dtype, "fastmeta::allow_tf32_conv");
  const Tensor space = bridge::workspace(like, bytes(args));
  function(args, space.mutable_data_ptr(), scope.stream());
}
#define FASTMETA_RUN(function, args, like) \
  launch(args, like, cuda::function##_workspace, cuda::function)
#else
#define FASTMETA_RUN(function, args, like) \
  FASTMETA_DISPATCH(current_isa(), task_layers, function, args, bridge::parallel_for)
#endif

std::vector<int64_t> shape(const Tensor& tensor) {
  std::vector<int64_t> sizes(tensor.dim());
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes[d] = tensor.size(d);
  return sizes;
}

Tensor task_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
                   int64_t dilation_h, int64_t dilation_w, int64_t groups) {
  check_same_dtype(weight, "weight", x);
  const Tensor wide = computed(x);
  Conv2d args = problem(wide, shape(x), shape(weight),
                        {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups});
  if (bias.has_value()) {
    bridge::check_shape(*bias, "bias", {args.tasks, args.outputs});
    check_same_dtype(*bias, "bias", x);
  }
  const Operand own_x(wide), own_weight(computed(weight)), own_bias = operand(computed(bias));
  Tensor out = bridge::empty(wide, {args.tasks, args.rows, args.outputs, args.out_h, args.out_w},
                             wide.scalar_type());
  args.x = own_x.view();
  args.weight = own_weight.view();
  args.bias = own_bias.view();
  args.out = out.mutable_data_ptr();
  FASTMETA_RUN(conv2d, args, wide);
  return narrowed(out, x);
}

Tensor task_conv2d_input(const Tensor& grad, const Tensor& weight, int64_t height, int64_t width,
                         int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
                         int64_t dilation_h, int64_t dilation_w, int64_t groups) {
  STD_TORCH_CHECK(grad.dim() == 5 && weight.dim() == 5, "fastmeta: expected five dimensions");
  check_same_dtype(weight, "weight", grad);
  const Tensor wide = computed(grad);
  const std::vector<int64_t> x{grad.size(0), grad.size(1), weight.size(2) * groups, height, width};
  Conv2d args = problem(wide, x, shape(weight),
                        {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups});
  bridge::check_shape(grad, "grad", {args.tasks, args.rows, args.outputs, args.out_h, args.out_w});
  const Operand own_grad(wide), own_weight(computed(weight));
  Tensor out = bridge::empty(wide, x, wide.scalar_type());
  args.grad = own_grad.view();
  args.weight = own_weight.view();
  args.out = out.mutable_data_ptr();
  FASTMETA_RUN(conv2d_input, args, wide);
  return narrowed(out, grad);
}

Tensor task_conv2d_weight(const Tensor& grad, const Tensor& x, int64_t height, int64_t width,
                          int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
                          int64_t dilation_h, int64_t dilation_w, int64_t groups) {
  STD_TORCH_CHECK(grad.dim() == 5 && x.dim() == 5 && groups >= 1,
                  "fastmeta: expected five dimensions");
  check_same_dtype(x, "x", grad);
  const Tensor wide = computed(grad);
  const std::vector<int64_t> w{grad.size(0), grad.size(2), x.size(2) / groups, height, width};
  Conv2d args = problem(wide, shape(x), w,
                        {stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups});
  bridge::check_shape(grad, "grad", {args.tasks, args.rows, args.outputs, args.out_h, args.out_w});
  const Operand own_grad(wide), own_x(computed(x));
  Tensor out = bridge::empty(wide, w, wide.scalar_type());
  args.grad = own_grad.view();
  args.x = own_x.view();
  args.out = out.mutable_data_ptr();
  FASTMETA_RUN(conv2d_weight, args, wide);
  return narrowed(out, grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, FASTMETA_DEVICE_KEY, m) {
  m.impl("task_conv2d", TORCH_BOX(&task_conv2d));
  m.impl("task_conv2d_input", TORCH_BOX(&task_conv2d_input));
  m.impl("task_conv2d_weight", TORCH_BOX(&task_conv2d_weight));
}

}  // namespace fastmeta::task_layers
