// The launchers of the updates.
#pragma once
#include <pybind11/functional.h>

#include <cstring>
#include <functional>

#include "bindings.h"
#include "cuemu.h"
#include "update/adam_update.h"
#include "update/momentum_update.h"
#include "update/sgd_update.h"

namespace update_bindings {

using namespace fastmeta;  // NOLINT(build/namespaces): a test module

using Strided = std::tuple<uintptr_t, int64_t, int64_t>;  // address, task stride, element stride

inline update::Operand operand(const Strided& strided) {
  const auto& [address, task_stride, element_stride] = strided;
  return {at(address), task_stride, element_stride};
}

// A tensor of an update: tasks, elements, operands and results in the order of its struct's tables.
using Row =
    std::tuple<int64_t, int64_t, std::vector<Strided>, Strided, std::vector<uintptr_t>, uintptr_t>;

template <class Tensor>
std::vector<Tensor> tensors_of(const std::vector<Row>& rows) {
  std::vector<Tensor> list;
  for (const auto& [tasks, elements, operands, lr, results, grad_lr] : rows) {
    Tensor tensor{};
    tensor.num_tasks = tasks;
    tensor.num_elements = elements;
    tensor.lr = operand(lr);
    for (size_t k = 0; k < std::size(Tensor::kOperands); ++k) {
      tensor.*Tensor::kOperands[k].at = operand(operands.at(k));
    }
    for (size_t k = 0; k < std::size(Tensor::kResults); ++k) {
      tensor.*Tensor::kResults[k] = at(results.at(k));
    }
    if constexpr (requires { tensor.grad_lr; }) tensor.grad_lr = at(grad_lr);
    list.push_back(tensor);
  }
  return list;
}

// `numbers` are the update's coefficients, in the order of their struct.
template <class Args, class Tensor>
Args args_of(const std::string& dtype, const std::vector<Tensor>& list,
             const std::vector<double>& numbers) {
  Args args{};
  args.dtype = dtype_of(dtype);
  args.lr_dtype = args.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  args.num_tensors = static_cast<int64_t>(list.size());
  args.tensors = list.data();
  if constexpr (requires { args.coefficients; }) {
    if (sizeof(args.coefficients) != numbers.size() * sizeof(double)) {
      throw std::invalid_argument("an update takes as many numbers as its coefficients");
    }
    std::memcpy(&args.coefficients, numbers.data(), sizeof(args.coefficients));
  }
  return args;
}

using Call = std::function<void(const std::string&, const std::vector<Row>&, std::vector<double>)>;

template <class Tensor, class Args>
Call step_of(void (*step)(const Args&, void*)) {
  return [=](const std::string& dtype, const std::vector<Row>& rows,
             const std::vector<double>& numbers) {
    const auto list = tensors_of<Tensor>(rows);
    step(args_of<Args>(dtype, list, numbers), nullptr);
  };
}

template <class Tensor, class Args>
Call backward_of(void (*backward)(const Args&, void*, void*),
                 int64_t (*workspace_bytes)(const Args&)) {
  return [=](const std::string& dtype, const std::vector<Row>& rows,
             const std::vector<double>& numbers) {
    const auto list = tensors_of<Tensor>(rows);
    const Args args = args_of<Args>(dtype, list, numbers);
    const auto workspace = cuemu::fresh_shared(workspace_bytes(args));
    backward(args, workspace.get(), nullptr);
  };
}

inline void bind(pybind11::module_& m) {
  m.def("sgd", step_of<update::SgdTensor>(update::cuda::sgd));
  m.def("sgd_backward", backward_of<update::SgdBackwardTensor>(
                            update::cuda::sgd_backward, update::cuda::sgd_backward_workspace));
  m.def("momentum", step_of<update::MomentumTensor>(update::cuda::momentum));
  m.def("momentum_backward",
        backward_of<update::MomentumBackwardTensor>(update::cuda::momentum_backward,
                                                    update::cuda::momentum_backward_workspace));
  m.def("adam", step_of<update::AdamTensor>(update::cuda::adam));
  m.def("adam_backward", backward_of<update::AdamBackwardTensor>(
                             update::cuda::adam_backward, update::cuda::adam_backward_workspace));
}

}  // namespace update_bindings
