// The launchers of the layers with weights for each task.
#include "bindings.h"
#include "cuemu.h"
#include "task_layers/task_linear.h"

using namespace fastmeta;  // NOLINT(build/namespaces): a test module

namespace {

using Strided = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address, task, row, column

task_layers::TaskMatrix matrix(const Strided& strided) {
  const auto& [address, task, row, column] = strided;
  return {at(address), task, row, column};
}

void linear(const std::string& dtype, int64_t T, int64_t N, int64_t I, int64_t O, const Strided& x,
            const Strided& weight, const Strided& bias, uintptr_t out, bool allow_tf32) {
  const task_layers::Linear args{
      dtype_of(dtype), T, N, I, O, matrix(x), matrix(weight), matrix(bias), at(out), allow_tf32};
  const auto workspace = cuemu::fresh_shared(task_layers::cuda::linear_workspace(args));
  task_layers::cuda::linear(args, workspace.get(), nullptr);
}

}  // namespace

void bind_task_layers(pybind11::module_& m) { m.def("task_linear", &linear); }
