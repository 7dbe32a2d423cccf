// Launches of sgd_update on the caller's stream: as many tensors a launch as its parameters hold.
#include <utility>
#include <vector>

#include "common/launch.cuh"
#include "update/sgd_update.h"
#include "update/sgd_update_kernel.cuh"

namespace fastmeta::update::cuda {
namespace {

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

template <class Tensor>
auto batches(const char* what, void (*kernel)(const TensorList<Tensor>), void* stream) {
  static_assert(sizeof(TensorList<Tensor>) <= 4096, "kernel parameters of sm_75 hold 4 KB");
  const auto run = [=](const TensorList<Tensor>& list) {
    launch(what, kernel, geometry(list.blocks, kThreads), stream, list);
  };
  return Batches<Tensor, decltype(run)>(run);
}

Layout layout_of(const char* name, const Operand& operand, int64_t num_tasks,
                 int64_t num_elements) {
  const int64_t by_task = operand.task_stride, by_element = operand.element_stride;
  if (by_element == 1) {
    if (num_tasks <= 1 || by_task == num_elements) return Layout::kOwn;
    if (by_task == 0) return Layout::kShared;
  } else if (by_element == 0) {
    if (by_task == 0) return Layout::kOne;
    if (by_task == 1) return Layout::kPerTask;
  }
  throw std::runtime_error(
      "fastmeta: sgd_update: strides of " + std::string(name) + " are (" + std::to_string(by_task) +
      ", " + std::to_string(by_element) +
      "), wanted (N, 1), (0, 1), (1, 0) or (0, 0) with N = " + std::to_string(num_elements));
}

// Whether packs can be read or written at every multiple of kPack: a number is never read as a
// pack.
template <class T>
bool packs(const T* data, Layout layout, int64_t num_elements) {
  return layout == Layout::kPerTask || layout == Layout::kOne || packable(data, num_elements);
}

// Rows of lr's gradient that are sums over `length` neighbouring elements, cut into `chunks`.
struct Rows {
  int64_t rows, length, chunks;
};

Rows rows_of(Layout lr, int64_t num_tasks, int64_t num_elements) {
  const int64_t rows = lr == Layout::kPerTask ? num_tasks : 1;
  const int64_t length = lr == Layout::kPerTask ? num_elements : num_tasks * num_elements;
  return {rows, length, std::max<int64_t>(1, ceil_div(length, kReduceChunk))};
}

bool reduced(Layout lr) { return lr == Layout::kPerTask || lr == Layout::kOne; }

void check_lr_dtype(DType dtype, DType lr_dtype) {
  const DType wanted = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  if (lr_dtype != wanted) {
    throw std::runtime_error("fastmeta: sgd_update: lr must be of the accumulation type, " +
                             std::string(wanted == DType::kFloat64 ? "float64" : "float32"));
  }
}

template <class scalar_t>
void run_sgd(const Sgd& args, void* stream) {
  using Item = SgdItem<scalar_t>;
  auto list = batches<Item>("sgd_update", sgd_kernel<scalar_t>, stream);
  for (int64_t k = 0; k < args.num_tensors; ++k) {
    const SgdTensor& tensor = args.tensors[k];
    const int64_t T = tensor.num_tasks, N = tensor.num_elements;
    Item item{};
    item.total = T * N;
    item.num_elements = N;
    item.param = static_cast<const scalar_t*>(tensor.param.data);
    item.grad = static_cast<const scalar_t*>(tensor.grad.data);
    item.lr = static_cast<const acc_t<scalar_t>*>(tensor.lr.data);
    item.out = static_cast<scalar_t*>(tensor.out);
    item.param_layout = layout_of("param", tensor.param, T, N);
    item.grad_layout = layout_of("grad", tensor.grad, T, N);
    item.lr_layout = layout_of("lr", tensor.lr, T, N);
    item.vector = packs(item.param, item.param_layout, N) &&
                  packs(item.grad, item.grad_layout, N) && packs(item.lr, item.lr_layout, N) &&
                  packable(item.out, N);
    list.add(item, ceil_div(item.total, kChunk));
  }
  list.flush();
}

template <class scalar_t>
void run_sgd_backward(const SgdBackward& args, void* workspace, void* stream) {
  using acc = acc_t<scalar_t>;
  using Item = SgdBackwardItem<scalar_t>;
  using Reduce = ReduceItem<scalar_t>;
  using Finish = FinishItem<acc>;
  acc* partial = static_cast<acc*>(workspace);

  auto elements = batches<Item>("sgd_update_backward", sgd_backward_kernel<scalar_t>, stream);
  auto sums = batches<Reduce>("sgd_update_backward: sums", sgd_reduce_kernel<scalar_t>, stream);
  std::vector<std::pair<Finish, int64_t>>
      ends;  // launched after every sum, whichever list it was in
  for (int64_t k = 0; k < args.num_tensors; ++k) {
    const SgdBackwardTensor& tensor = args.tensors[k];
    const int64_t T = tensor.num_tasks, N = tensor.num_elements;
    const Layout lr_layout = layout_of("lr", tensor.lr, T, N);
    acc* grad_lr = static_cast<acc*>(tensor.grad_lr);

    Item item{};
    item.total = T * N;
    item.num_elements = N;
    item.grad_out = static_cast<const scalar_t*>(tensor.grad_out.data);
    item.grad = static_cast<const scalar_t*>(tensor.grad.data);
    item.lr = static_cast<const acc*>(tensor.lr.data);
    item.grad_grad = static_cast<scalar_t*>(tensor.grad_grad);
    // With one task, a number per element is nobody's sum.
    item.grad_lr = lr_layout == Layout::kOwn && T > 0 ? grad_lr : nullptr;
    item.grad_out_layout = layout_of("grad_out", tensor.grad_out, T, N);
    item.grad_layout = layout_of("grad", tensor.grad, T, N);
    item.lr_layout = lr_layout;
    const bool vector =
        packs(item.grad_out, item.grad_out_layout, N) && packs(item.grad, item.grad_layout, N);
    item.vector = vector && packs(item.lr, lr_layout, N) &&
                  (item.grad_grad == nullptr || packable(item.grad_grad, N)) &&
                  (item.grad_lr == nullptr || packable(item.grad_lr, N));
    if (item.grad_grad != nullptr || item.grad_lr != nullptr) {
      elements.add(item, ceil_div(item.total, kChunk));
    }

    if (grad_lr == nullptr || item.grad_lr != nullptr) continue;
    Reduce reduce{};
    reduce.num_tasks = T;
    reduce.num_elements = N;
    reduce.grad_out = item.grad_out;
    reduce.grad = item.grad;
    reduce.grad_out_layout = item.grad_out_layout;
    reduce.grad_layout = item.grad_layout;
    if (!reduced(lr_layout)) {  // a number per element, shared by the tasks
      reduce.target = grad_lr;
      sums.add(reduce, tensor.lr.task_stride == 0 ? ceil_div(N, kThreads) : 0);
      continue;
    }
    const Rows rows = rows_of(lr_layout, T, N);
    reduce.length = rows.length;
    reduce.chunks = rows.chunks;
    reduce.vector = vector;
    reduce.final = rows.chunks == 1;
    reduce.target = reduce.final ? grad_lr : partial;
    sums.add(reduce, rows.rows * rows.chunks);
    if (!reduce.final) {
      ends.emplace_back(Finish{0, rows.chunks, partial, grad_lr}, rows.rows);
      partial += rows.rows * rows.chunks;
    }
  }
  elements.flush();
  sums.flush();
  auto totals = batches<Finish>("sgd_update_backward: totals", sgd_finish_kernel<acc>, stream);
  for (const auto& [finish, blocks] : ends) totals.add(finish, blocks);
  totals.flush();
}

}  // namespace

void sgd(const Sgd& args, void* stream) {
  check_lr_dtype(args.dtype, args.lr_dtype);
  dispatch(args.dtype, [&](auto type) { run_sgd<typename decltype(type)::type>(args, stream); });
}

int64_t sgd_backward_workspace(const SgdBackward& args) {
  int64_t partials = 0;
  for (int64_t k = 0; k < args.num_tensors; ++k) {
    const SgdBackwardTensor& tensor = args.tensors[k];
    const Layout lr = layout_of("lr", tensor.lr, tensor.num_tasks, tensor.num_elements);
    if (tensor.grad_lr == nullptr || !reduced(lr)) continue;
    const Rows rows = rows_of(lr, tensor.num_tasks, tensor.num_elements);
    if (rows.chunks > 1) partials += rows.rows * rows.chunks;
  }
  return partials * (args.dtype == DType::kFloat64 ? 8 : 4);
}

void sgd_backward(const SgdBackward& args, void* workspace, void* stream) {
  check_lr_dtype(args.dtype, args.lr_dtype);
  dispatch(args.dtype, [&](auto type) {
    run_sgd_backward<typename decltype(type)::type>(args, workspace, stream);
  });
}

}  // namespace fastmeta::update::cuda
