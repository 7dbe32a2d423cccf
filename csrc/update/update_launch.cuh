// What the launchers of the updates share: layouts of operands, and launches on the caller's stream
// of as many tensors as a kernel's parameters hold.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "common/launch.cuh"
#include "update/sgd_update.h"
#include "update/update_kernel.cuh"

namespace fastmeta::update::cuda {

// Collects tensors and launches whenever the list is full, and once more at flush().
template <class Tensor, class Launch>
class Batches {
 public:
  explicit Batches(Launch launch) : launch_(launch) {}

  void add(Tensor tensor, int64_t blocks) {
    if (blocks == 0) return;
    if (list_.count == TensorList<Tensor>::kCapacity) flush();
    tensor.first_block = list_.blocks;
    list_.tensors[list_.count++] = tensor;
    list_.blocks += blocks;
  }

  void flush() {
    if (list_.count > 0) launch_(list_);
    list_ = {};
  }

 private:
  Launch launch_;
  TensorList<Tensor> list_ = {};
};

template <class Tensor, class Launch>
Batches<Tensor, Launch> batches(Launch launch) {
  return Batches<Tensor, Launch>(launch);
}

// Launches a kernel that takes a list, and after it a formula, if any.
template <class Tensor, class... Formula>
void launch_list(const std::string& what,
                 void (*kernel)(TensorList<Tensor>, std::type_identity_t<Formula>...), void* stream,
                 const TensorList<Tensor>& list, const Formula&... formula) {
  static_assert(sizeof(list) + (0 + ... + sizeof(Formula)) <= 4096,
                "kernel parameters of sm_75 hold 4 KB");
  launch(what.c_str(), kernel, geometry(list.blocks, kThreads), stream, list, formula...);
}

inline Layout layout_of(const char* what, const char* name, const Operand& operand,
                        int64_t num_tasks, int64_t num_elements) {
  const int64_t by_task = operand.task_stride, by_element = operand.element_stride;
  if (by_element == 1) {
    if (num_tasks == 1 || by_task == std::max<int64_t>(num_elements, 1)) return Layout::kOwn;
    if (by_task == 0) return Layout::kShared;
  } else if (by_element == 0) {
    if (by_task == 0) return Layout::kOne;
    if (by_task == 1) return Layout::kPerTask;
  }
  throw std::runtime_error(
      "fastmeta: " + std::string(what) + ": strides of " + name + " are (" +
      std::to_string(by_task) + ", " + std::to_string(by_element) +
      "), wanted (N, 1), (0, 1), (1, 0) or (0, 0) with N = " + std::to_string(num_elements));
}

// Whether packs can be read or written from `data` on: a number is never read as a pack.
template <class T>
bool aligned(const void* data, Layout layout) {
  return layout == Layout::kPerTask || layout == Layout::kOne ||
         packable(static_cast<const T*>(data), 0);
}

inline void check_lr_dtype(const char* what, DType dtype, DType lr_dtype) {
  const DType wanted = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  if (lr_dtype != wanted) {
    throw std::runtime_error("fastmeta: " + std::string(what) +
                             ": lr must be of the accumulation type, " +
                             (wanted == DType::kFloat64 ? "float64" : "float32"));
  }
}

// Operands and results of a tensor; `lr_target` is written like a result, or nullptr.
template <class scalar_t, class Item, class Tensor>
void describe(const char* what, const Tensor& tensor, const void* lr_target, Item& item) {
  using acc = acc_t<scalar_t>;
  const int64_t T = tensor.num_tasks, N = tensor.num_elements;
  item.total = T * N;
  item.lr = static_cast<const acc*>(tensor.lr.data);
  item.lr_layout = layout_of(what, "lr", tensor.lr, T, N);
  item.vector = aligned<acc>(item.lr, item.lr_layout) && aligned<acc>(lr_target, Layout::kOwn);
  const auto needs_task = [](Layout x) { return x == Layout::kShared || x == Layout::kPerTask; };
  item.by_task = needs_task(item.lr_layout);
  for (int k = 0; k < Item::kOperands; ++k) {
    const auto& [name, at] = Tensor::kOperands[k];
    const Operand& operand = tensor.*at;
    item.in[k] = operand.data;
    item.layouts[k] = layout_of(what, name, operand, T, N);
    item.by_task = item.by_task || needs_task(item.layouts[k]);
    item.vector = item.vector && (k < Tensor::kIn ? aligned<scalar_t>(item.in[k], item.layouts[k])
                                                  : aligned<acc>(item.in[k], item.layouts[k]));
  }
  for (int k = 0; k < Item::kResults; ++k) {
    item.out[k] = tensor.*Tensor::kResults[k];
    item.vector = item.vector && (k < Tensor::kOut ? aligned<scalar_t>(item.out[k], Layout::kOwn)
                                                   : aligned<acc>(item.out[k], Layout::kOwn));
  }
  item.num_elements = item.by_task ? N : T * N;
  item.vector = item.vector && (!item.by_task || N % kPack == 0);
}

// ---- forward
template <template <class> class F, class Args, class... Numbers>
void run_step(const char* what, const Args& args, void* stream, const Numbers&... numbers) {
  check_lr_dtype(what, args.dtype, args.lr_dtype);
  dispatch(args.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using Formula = F<acc_t<scalar_t>>;
    using Tensor = typename Formula::Tensor;
    const Formula formula{numbers...};
    using Item = StepItem<scalar_t, Tensor>;
    auto list = batches<Item>([&](const TensorList<Item>& items) {
      launch_list(what, &step_kernel<scalar_t, F>, stream, items, formula);
    });
    for (int64_t k = 0; k < args.num_tensors; ++k) {
      Item item{};
      describe<scalar_t>(what, args.tensors[k], nullptr, item);
      list.add(item, ceil_div(item.total, kChunk<scalar_t, Tensor>));
    }
    list.flush();
  });
}

// ---- backward
// How the gradient of a tensor's rate is taken, and the blocks that take it.
struct LrPlan {
  LrGrad kind;
  int64_t rows, length, chunks;  // as in BackwardItem; rows: of the target, or blocks of columns
  int64_t partials;              // numbers of workspace, in packs; 0 where the sums are final
};

template <class scalar_t, class Tensor>
LrPlan lr_plan(const char* what, const Tensor& tensor) {
  const int64_t T = tensor.num_tasks, N = tensor.num_elements;
  const Layout lr = layout_of(what, "lr", tensor.lr, T, N);
  LrPlan plan{};
  if (tensor.grad_lr == nullptr || lr == Layout::kOwn) {
    plan.kind = tensor.grad_lr == nullptr ? LrGrad::kNone : LrGrad::kElement;
    plan.rows = 1;
    plan.length = T * N;
    plan.chunks = ceil_div(T * N, kChunk<scalar_t, Tensor>);
    return plan;
  }
  if (lr == Layout::kShared) {
    plan.kind = LrGrad::kColumns;
    plan.rows = N;
    plan.length = T;
    plan.chunks = std::max<int64_t>(1, ceil_div(T, kTaskGroup));
  } else {
    plan.kind = LrGrad::kRows;
    plan.rows = lr == Layout::kPerTask ? T : 1;
    plan.length = lr == Layout::kPerTask ? N : T * N;
    plan.chunks = std::max<int64_t>(1, ceil_div(plan.length, kSumChunk));
  }
  if (plan.chunks > 1) plan.partials = ceil_div(plan.rows * plan.chunks, kPack) * kPack;
  return plan;
}

template <class Args>
int64_t workspace_bytes(const char* what, const Args& args) {
  int64_t bytes = 0;
  dispatch(args.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    for (int64_t k = 0; k < args.num_tensors; ++k) {
      bytes += lr_plan<scalar_t>(what, args.tensors[k]).partials * sizeof(acc_t<scalar_t>);
    }
  });
  return bytes;
}

template <template <class> class F, class Args, class... Numbers>
void run_backward(const char* what, const Args& args, void* workspace, void* stream,
                  const Numbers&... numbers) {
  check_lr_dtype(what, args.dtype, args.lr_dtype);
  dispatch(args.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using acc = acc_t<scalar_t>;
    using Formula = F<acc>;
    using Finish = FinishItem<acc>;
    acc* partial = static_cast<acc*>(workspace);
    const Formula formula{numbers...};
    const std::string name = std::string(what) + "_backward";
    using Item = BackwardItem<scalar_t, typename Formula::Tensor>;
    auto list = batches<Item>([&](const TensorList<Item>& items) {
      launch_list(name, &backward_kernel<scalar_t, F>, stream, items, formula);
    });
    std::vector<std::pair<Finish, int64_t>> ends;  // launched after every sum, whatever its list
    for (int64_t k = 0; k < args.num_tensors; ++k) {
      const auto& tensor = args.tensors[k];
      const LrPlan plan = lr_plan<scalar_t>(what, tensor);
      acc* grad_lr = static_cast<acc*>(tensor.grad_lr);
      const bool by_column = plan.kind == LrGrad::kColumns;
      Item item{};
      item.lr_grad = plan.kind;
      item.length = plan.length;
      item.chunks = plan.chunks;
      item.final = plan.partials == 0;
      item.lr_target = item.final ? grad_lr : partial;
      const bool numbers_only = plan.kind == LrGrad::kRows;  // each written by one thread
      describe<scalar_t>(name.c_str(), tensor, numbers_only ? nullptr : item.lr_target, item);
      const int64_t width = item.vector ? kPack : 1;
      const int64_t rows = by_column ? ceil_div(plan.rows, kThreads * width) : plan.rows;
      list.add(item, rows * plan.chunks);
      if (item.final) continue;
      const int64_t blocks = by_column ? ceil_div(plan.rows, kThreads) : plan.rows;
      ends.emplace_back(Finish{0, plan.chunks, by_column ? plan.rows : 0, partial, grad_lr},
                        blocks);
      partial += plan.partials;
    }
    list.flush();
    auto totals = batches<Finish>([&](const TensorList<Finish>& items) {
      launch_list(name + ": totals", &finish_kernel<acc>, stream, items);
    });
    for (const auto& [finish, blocks] : ends) totals.add(finish, blocks);
    totals.flush();
  });
}

}  // namespace fastmeta::update::cuda
