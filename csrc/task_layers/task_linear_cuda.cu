// Launch of task_linear on the caller's stream.
#include "task_layers/task_linear.h"
#include "task_layers/task_product_launch.cuh"

namespace fastmeta::task_layers::cuda {
namespace {

ProductShape shape_of(const Linear& args) {
  return {args.tasks, 1, args.rows, args.outputs, args.inputs};
}

template <class scalar_t>
Matrix<scalar_t> operand(const TaskMatrix& matrix, int64_t inputs) {
  const auto* data = static_cast<const scalar_t*>(matrix.data);
  const bool across = matrix.row < matrix.column;
  const bool packs = matrix.column == 1 && (matrix.row | matrix.task) % kPack == 0;
  return {data,       matrix.task, 0,
          matrix.row, 0,           matrix.column,
          inputs,     across,      packs && !across && packable(data, inputs)};
}

}  // namespace

int64_t linear_workspace(const Linear& args) { return shape_of(args).workspace(args.dtype); }

void linear(const Linear& args, void* workspace, void* stream) {
  dispatch(args.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    auto* out = static_cast<scalar_t*>(args.out);
    Result<scalar_t> result{};
    result.data = out;
    result.task = args.rows * args.outputs;
    result.row = result.inner = args.outputs;
    result.vector = packable(out, args.outputs);
    result.bias = static_cast<const scalar_t*>(args.bias.data);
    result.bias_task = args.bias.task;
    result.bias_column = args.bias.column;
    launch_product("task_linear", shape_of(args), operand<scalar_t>(args.x, args.inputs),
                   operand<scalar_t>(args.weight, args.inputs), result, args.allow_tf32, workspace,
                   stream);
  });
}

}  // namespace fastmeta::task_layers::cuda
