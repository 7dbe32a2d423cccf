// The launchers of the layers with weights for each task.
#pragma once
#include "bindings.h"
#include "cuemu.h"
#include "task_layers/task_batch_norm.h"
#include "task_layers/task_conv2d.h"
#include "task_layers/task_linear.h"

namespace layer_bindings {

using namespace fastmeta;  // NOLINT(build/namespaces): a test module

using Strided = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address, task, row, column

inline task_layers::TaskMatrix matrix(const Strided& strided) {
  const auto& [address, task, row, column] = strided;
  return {at(address), task, row, column};
}

inline void linear(const std::string& dtype, int64_t T, int64_t N, int64_t I, int64_t O,
                   const Strided& x, const Strided& weight, const Strided& bias, uintptr_t out,
                   bool allow_tf32) {
  const task_layers::Linear args{
      dtype_of(dtype), T, N, I, O, matrix(x), matrix(weight), matrix(bias), at(out), allow_tf32};
  const auto workspace = cuemu::fresh_shared(task_layers::cuda::linear_workspace(args));
  task_layers::cuda::linear(args, workspace.get(), nullptr);
}

// Tensors by the names of BatchNorm's fields; what is not given is nullptr.
inline void batch_norm(const std::string& order, const std::string& dtype, int64_t T, int64_t N,
                       int64_t C, int64_t L, double eps,
                       const std::map<std::string, uintptr_t>& tensors) {
  const auto given = [&](const char* name) {
    const auto found = tensors.find(name);
    return at(found == tensors.end() ? 0 : found->second);
  };
  task_layers::BatchNorm args{};
  args.dtype = dtype_of(dtype);
  args.tasks = T;
  args.rows = N;
  args.channels = C;
  args.length = L;
  args.eps = eps;
  args.x = given("x");
  args.weight = {given("weight"), C};
  args.bias = {given("bias"), C};
  args.mean = given("mean");
  args.rstd = given("rstd");
  args.grad = given("grad");
  args.u = given("u");
  args.v = given("v");
  args.z = given("z");
  args.out = given("out");
  args.to_grad = given("to_grad");
  args.to_weight = given("to_weight");
  args.to_bias = given("to_bias");
  const auto run = order == "forward"    ? task_layers::cuda::batch_norm
                   : order == "backward" ? task_layers::cuda::batch_norm_backward
                                         : task_layers::cuda::batch_norm_second;
  run(args, nullptr);
}

using PerTask = std::pair<uintptr_t, int64_t>;  // address, elements from task to task

// Sizes in the order of Conv2d's fields.
inline void conv2d(const std::string& order, const std::string& dtype,
                   const std::array<int64_t, 17>& sizes,
                   const std::map<std::string, PerTask>& tensors, uintptr_t out, bool allow_tf32) {
  task_layers::Conv2d args{};
  args.dtype = dtype_of(dtype);
  int64_t* const fields[] = {&args.tasks,     &args.rows,      &args.channels,   &args.height,
                             &args.width,     &args.outputs,   &args.kernel_h,   &args.kernel_w,
                             &args.out_h,     &args.out_w,     &args.stride_h,   &args.stride_w,
                             &args.padding_h, &args.padding_w, &args.dilation_h, &args.dilation_w,
                             &args.groups};
  for (size_t i = 0; i < sizes.size(); ++i) *fields[i] = sizes[i];
  const auto given = [&](const char* name) {
    const auto found = tensors.find(name);
    if (found == tensors.end()) return task_layers::PerTask{};
    return task_layers::PerTask{at(found->second.first), found->second.second};
  };
  args.x = given("x");
  args.weight = given("weight");
  args.bias = given("bias");
  args.grad = given("grad");
  args.out = at(out);
  args.allow_tf32 = allow_tf32;
  const auto run = [&](auto bytes, auto launch) {
    const auto workspace = cuemu::fresh_shared(bytes(args));
    launch(args, workspace.get(), nullptr);
  };
  if (order == "forward") {
    run(task_layers::cuda::conv2d_workspace, task_layers::cuda::conv2d);
  } else if (order == "input") {
    run(task_layers::cuda::conv2d_input_workspace, task_layers::cuda::conv2d_input);
  } else {
    run(task_layers::cuda::conv2d_weight_workspace, task_layers::cuda::conv2d_weight);
  }
}

inline void bind(pybind11::module_& m) {
  m.def("task_linear", &linear);
  m.def("task_conv2d", &conv2d);
  m.def("task_batch_norm", &batch_norm);
}

}  // namespace layer_bindings
