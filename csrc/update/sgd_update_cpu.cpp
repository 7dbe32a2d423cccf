// One gradient step for all parameters of all tasks, on the CPU.
//
// Pure memory traffic: every operand read once, every result written once. All tensors together are
// cut into pieces of about kPieceElements, so that threads share the elements evenly however
// unequal the tensors are; a piece is a range of whole task rows or a range within one row. Pieces
// depend on shapes only and partial sums of the backward are added in the order of the pieces.
#include "common/scratch.h"
#include "common/vec.h"
#include "update/sgd_update.h"

namespace fastmeta::update::FASTMETA_ISA {

using namespace fastmeta::FASTMETA_ISA;

namespace {

constexpr int64_t kPieceElements = 16384;
constexpr int64_t kElementsPerSum = 1024;  // elements added up before the sum joins the total

thread_local Scratch call_scratch;

enum class Cut { kRows, kWithinRows, kColumns };

// How a tensor seen as [T, N] is cut: pieces of rows_per_piece whole rows, of columns_per_piece
// elements of one row, or of columns_per_piece columns through all rows.
struct Cutting {
  Cut cut;
  int64_t tasks, elements;  // T and N, T folded into N where that changes nothing
  int64_t size, pieces_per_row, pieces;
  int64_t first_piece;
};

Cutting cut_tensor(int64_t tasks, int64_t elements, bool fold, bool columns, int64_t first_piece) {
  Cutting c;
  c.tasks = fold ? 1 : tasks;
  c.elements = fold ? tasks * elements : elements;
  c.first_piece = first_piece;
  c.pieces_per_row = 1;
  if (c.tasks == 0 || c.elements == 0) {
    c.cut = Cut::kRows;
    c.size = 1;
    c.pieces = 0;
  } else if (columns) {
    c.cut = Cut::kColumns;
    c.size = max_of<int64_t>(64, ceil_div(kPieceElements, c.tasks * 64) * 64);
    c.pieces = ceil_div(c.elements, c.size);
  } else if (c.elements > kPieceElements) {
    c.cut = Cut::kWithinRows;
    c.pieces_per_row = ceil_div(c.elements, kPieceElements);
    c.size = ceil_div(ceil_div(c.elements, c.pieces_per_row), 64) * 64;
    c.pieces_per_row = ceil_div(c.elements, c.size);
    c.pieces = c.tasks * c.pieces_per_row;
  } else {
    c.cut = Cut::kRows;
    c.size = max_of<int64_t>(1, kPieceElements / c.elements);
    c.pieces = ceil_div(c.tasks, c.size);
  }
  return c;
}

// The rectangle [task_begin, task_end) x [begin, end) of a piece.
struct Piece {
  int64_t tensor, task_begin, task_end, begin, end;
};
Piece find_piece(const Cutting* cuts, int64_t num_tensors, int64_t index) {
  int64_t low = 0, high = num_tensors;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (cuts[middle].first_piece <= index ? low : high) = middle;
  }
  const Cutting& c = cuts[low];
  const int64_t k = index - c.first_piece;
  switch (c.cut) {
    case Cut::kRows:
      return {low, k * c.size, min_of(c.tasks, (k + 1) * c.size), 0, c.elements};
    case Cut::kColumns:
      return {low, 0, c.tasks, k * c.size, min_of(c.elements, (k + 1) * c.size)};
    case Cut::kWithinRows:
      break;
  }
  const int64_t task = k / c.pieces_per_row, part = k % c.pieces_per_row;
  return {low, task, task + 1, part * c.size, min_of(c.elements, (part + 1) * c.size)};
}

template <class S>
const S* at(const Operand& x, int64_t task, int64_t element) {
  return static_cast<const S*>(x.data) + task * x.task_stride + element * x.element_stride;
}
bool dense(const Operand& x, int64_t tasks, int64_t elements) {
  return (x.element_stride == 1 && (x.task_stride == elements || tasks == 1));
}
bool constant(const Operand& x, int64_t tasks) {
  return x.element_stride == 0 && (x.task_stride == 0 || tasks == 1);
}

// A row of operands, each along the elements or one value for the row.
template <class S>
FASTMETA_INLINE Vec<Acc<S>> row_load(const S* p, int64_t i, int n, bool along) {
  if (!along) return splat<Acc<S>>(load_one(p));
  return n == kWidth<Acc<S>> ? load(p + i) : load_n(p + i, n);
}

// ---- forward
template <class S, bool kLrAlong>
void step_row(const S* param, bool param_along, const S* grad, bool grad_along, const Acc<S>* lr,
              S* out, int64_t n) {
  using A = Acc<S>;
  constexpr int kW = kWidth<A>;
  int64_t i = 0;
  if (param_along && grad_along) {
    const Vec<A> rate = splat<A>(*lr);
    for (; i + 4 * kW <= n; i += 4 * kW) {
      FASTMETA_UNROLL
      for (int v = 0; v < 4; ++v) {
        const int64_t k = i + v * kW;
        store(out + k, load(param + k) - (kLrAlong ? load(lr + k) : rate) * load(grad + k));
      }
    }
  }
  for (; i < n; i += kW) {
    const int m = static_cast<int>(min_of<int64_t>(kW, n - i));
    const Vec<A> r = row_load(param, i, m, param_along) -
                     row_load(lr, i, m, kLrAlong) * row_load(grad, i, m, grad_along);
    store_n(out + i, r, m);
  }
}

struct StepPlan {
  const Sgd* args;
  const Cutting* cuts;
};
template <class S>
void step_piece(const StepPlan& plan, int64_t index) {
  using A = Acc<S>;
  const Piece piece = find_piece(plan.cuts, plan.args->num_tensors, index);
  const SgdTensor& x = plan.args->tensors[piece.tensor];
  const int64_t elements = plan.cuts[piece.tensor].elements;
  for (int64_t t = piece.task_begin; t < piece.task_end; ++t) {
    const S* param = at<S>(x.param, t, piece.begin);
    const S* grad = at<S>(x.grad, t, piece.begin);
    const A* lr = at<A>(x.lr, t, piece.begin);
    S* out = static_cast<S*>(x.out) + t * elements + piece.begin;
    const bool p = x.param.element_stride != 0, g = x.grad.element_stride != 0;
    if (x.lr.element_stride != 0) {
      step_row<S, true>(param, p, grad, g, lr, out, piece.end - piece.begin);
    } else {
      step_row<S, false>(param, p, grad, g, lr, out, piece.end - piece.begin);
    }
  }
}

template <class S>
void run_step(const Sgd& args, ParallelFor par) {
  call_scratch.reset(Scratch::size_of<Cutting>(args.num_tensors));
  Cutting* cuts = call_scratch.take<Cutting>(args.num_tensors);
  int64_t pieces = 0;
  for (int64_t k = 0; k < args.num_tensors; ++k) {
    const SgdTensor& x = args.tensors[k];
    const int64_t t = x.num_tasks, n = x.num_elements;
    const bool fold =
        dense(x.param, t, n) && dense(x.grad, t, n) && (dense(x.lr, t, n) || constant(x.lr, t));
    cuts[k] = cut_tensor(t, n, fold, false, pieces);
    pieces += cuts[k].pieces;
  }
  StepPlan plan{&args, cuts};
  par(
      pieces, 2,
      [](void* context, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          step_piece<S>(*static_cast<const StepPlan*>(context), i);
      },
      &plan);
}

// ---- backward
// grad_grad = -lr * grad_out along a row; returns sum grad_out * grad when kSum, and otherwise adds
// -grad_out * grad to grad_lr (kAdd) or writes it there. With kNone grad is not even read.
enum class LrGrad { kNone, kSum, kWrite, kAdd };
template <class S, LrGrad kMode>
double backward_row(const S* grad_out, bool out_along, const S* grad, bool grad_along,
                    const Acc<S>* lr, bool lr_along, S* grad_grad, Acc<S>* grad_lr, int64_t n) {
  using A = Acc<S>;
  constexpr int kW = kWidth<A>;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kElementsPerSum) {
    const int64_t end = min_of(n, begin + kElementsPerSum);
    Vec<A> sum[2] = {};
    for (int64_t i = begin; i < end; i += 2 * kW) {
      FASTMETA_UNROLL
      for (int v = 0; v < 2; ++v) {
        const int64_t k = i + v * kW;
        if (k >= end) break;
        const int m = static_cast<int>(min_of<int64_t>(kW, end - k));
        const Vec<A> go = row_load(grad_out, k, m, out_along);
        const Vec<A> gg = -row_load(lr, k, m, lr_along) * go;
        Vec<A> product = {};
        if constexpr (kMode != LrGrad::kNone) product = go * row_load(grad, k, m, grad_along);
        if (m == kW) {
          store(grad_grad + k, gg);
        } else {
          store_n(grad_grad + k, gg, m);
          for (int l = m; l < kW; ++l)
            product[l] = 0;  // lanes past the end of operands held constant
        }
        if constexpr (kMode == LrGrad::kSum) {
          sum[v] += product;
        } else if constexpr (kMode != LrGrad::kNone) {
          const Vec<A> before = kMode == LrGrad::kAdd ? load_n(grad_lr + k, m) : Vec<A>{};
          store_n(grad_lr + k, before - product, m);
        }
      }
    }
    if constexpr (kMode == LrGrad::kSum) total += static_cast<double>(hsum<A>(sum[0] + sum[1]));
  }
  return total;
}

struct BackwardPlan {
  const SgdBackward* args;
  const Cutting* cuts;
  double* partial;  // [pieces]: sums of the pieces that a later step adds up
};

// A piece of columns of a rate shared by the tasks: sums over kTasksPerSum tasks join the total.
template <class S>
void backward_columns(const SgdBackwardTensor& x, const Cutting& cut, const Piece& piece) {
  using A = Acc<S>;
  constexpr int64_t kColumns = 512, kTasksPerSum = 16;
  alignas(64) A sum[kColumns];
  const bool o = x.grad_out.element_stride != 0, g = x.grad.element_stride != 0;
  for (int64_t n0 = piece.begin; n0 < piece.end; n0 += kColumns) {
    const int64_t n = min_of(kColumns, piece.end - n0);
    A* grad_lr = static_cast<A*>(x.grad_lr) + n0;
    for (int64_t t = 0; t < cut.tasks; ++t) {
      const S* grad_out = at<S>(x.grad_out, t, n0);
      const S* grad = at<S>(x.grad, t, n0);
      const A* lr = at<A>(x.lr, t, n0);
      S* grad_grad = static_cast<S*>(x.grad_grad) + t * cut.elements + n0;
      if (t % kTasksPerSum == 0) {
        backward_row<S, LrGrad::kWrite>(grad_out, o, grad, g, lr, true, grad_grad, sum, n);
      } else {
        backward_row<S, LrGrad::kAdd>(grad_out, o, grad, g, lr, true, grad_grad, sum, n);
      }
      if ((t + 1) % kTasksPerSum != 0 && t + 1 < cut.tasks) continue;
      for (int64_t i = 0; i < n; ++i) grad_lr[i] = (t < kTasksPerSum ? A(0) : grad_lr[i]) + sum[i];
    }
  }
}

template <class S>
void backward_piece_without_lr(const SgdBackwardTensor& x, const Cutting& cut, const Piece& piece) {
  const bool columns = cut.cut == Cut::kColumns;
  const bool along = x.lr.element_stride != 0, o = x.grad_out.element_stride != 0;
  const int64_t last = columns ? cut.tasks : piece.task_end;
  for (int64_t t = columns ? 0 : piece.task_begin; t < last; ++t) {
    S* grad_grad = static_cast<S*>(x.grad_grad) + t * cut.elements + piece.begin;
    backward_row<S, LrGrad::kNone>(at<S>(x.grad_out, t, piece.begin), o, nullptr, false,
                                   at<Acc<S>>(x.lr, t, piece.begin), along, grad_grad, nullptr,
                                   piece.end - piece.begin);
  }
}

template <class S>
void backward_piece(const BackwardPlan& plan, int64_t index) {
  using A = Acc<S>;
  const Piece piece = find_piece(plan.cuts, plan.args->num_tensors, index);
  const SgdBackwardTensor& x = plan.args->tensors[piece.tensor];
  const Cutting& cut = plan.cuts[piece.tensor];
  const bool along = x.lr.element_stride != 0;
  const bool o = x.grad_out.element_stride != 0, g = x.grad.element_stride != 0;
  const int64_t n = piece.end - piece.begin;
  if (x.grad_lr == nullptr) return backward_piece_without_lr<S>(x, cut, piece);
  if (cut.cut == Cut::kColumns) return backward_columns<S>(x, cut, piece);
  double total = 0;
  for (int64_t t = piece.task_begin; t < piece.task_end; ++t) {
    const S* grad_out = at<S>(x.grad_out, t, piece.begin);
    const S* grad = at<S>(x.grad, t, piece.begin);
    const A* lr = at<A>(x.lr, t, piece.begin);
    S* grad_grad = static_cast<S*>(x.grad_grad) + t * cut.elements + piece.begin;
    A* grad_lr = static_cast<A*>(x.grad_lr);
    if (along) {
      grad_lr += t * x.lr.task_stride + piece.begin;
      backward_row<S, LrGrad::kWrite>(grad_out, o, grad, g, lr, true, grad_grad, grad_lr, n);
      continue;
    }
    const double sum =
        backward_row<S, LrGrad::kSum>(grad_out, o, grad, g, lr, false, grad_grad, grad_lr, n);
    if (x.lr.task_stride != 0 && cut.cut == Cut::kRows) {
      grad_lr[t * x.lr.task_stride] = static_cast<A>(-sum);
    }
    total += sum;
  }
  plan.partial[index] = total;
}

template <class S>
void run_backward(const SgdBackward& args, ParallelFor par) {
  using A = Acc<S>;
  Cutting* cuts;
  int64_t pieces = 0;
  // Cutting twice is cheaper than a second block of memory: the number of pieces sizes the partial
  // sums.
  const auto cut_at = [&](int64_t k) {
    const SgdBackwardTensor& x = args.tensors[k];
    const int64_t t = x.num_tasks, n = x.num_elements;
    const bool fold =
        dense(x.grad_out, t, n) && dense(x.grad, t, n) && (dense(x.lr, t, n) || constant(x.lr, t));
    const bool columns = x.lr.element_stride != 0 && x.lr.task_stride == 0 && t > 1;
    return cut_tensor(t, n, fold, columns, pieces);
  };
  for (int64_t k = 0; k < args.num_tensors; ++k) pieces += cut_at(k).pieces;
  call_scratch.reset(Scratch::size_of<Cutting>(args.num_tensors) +
                     Scratch::size_of<double>(pieces));
  cuts = call_scratch.take<Cutting>(args.num_tensors);
  BackwardPlan plan{&args, cuts, call_scratch.take<double>(pieces)};
  pieces = 0;
  for (int64_t k = 0; k < args.num_tensors; ++k) {
    cuts[k] = cut_at(k);
    pieces += cuts[k].pieces;
  }
  par(
      pieces, 2,
      [](void* context, int64_t begin, int64_t end) {
        const BackwardPlan& p = *static_cast<const BackwardPlan*>(context);
        for (int64_t i = begin; i < end; ++i) backward_piece<S>(p, i);
      },
      &plan);
  for (int64_t k = 0; k < args.num_tensors; ++k) {
    const SgdBackwardTensor& x = args.tensors[k];
    const Cutting& c = cuts[k];
    A* grad_lr = static_cast<A*>(x.grad_lr);
    if (grad_lr == nullptr) continue;
    if (x.lr.element_stride != 0) {
      // An [N] rate under no task at all still has a gradient to fill: zero.
      if (x.num_tasks == 0 && x.lr.task_stride == 0) {
        for (int64_t i = 0; i < x.num_elements; ++i) grad_lr[i] = 0;
      }
      continue;
    }
    if (x.lr.task_stride == 0) {
      double total = 0;
      for (int64_t i = 0; i < c.pieces; ++i) total += plan.partial[c.first_piece + i];
      grad_lr[0] = static_cast<A>(-total);
    } else if (c.cut == Cut::kWithinRows) {
      for (int64_t t = 0; t < c.tasks; ++t) {
        double total = 0;
        for (int64_t i = 0; i < c.pieces_per_row; ++i) {
          total += plan.partial[c.first_piece + t * c.pieces_per_row + i];
        }
        grad_lr[t * x.lr.task_stride] = static_cast<A>(-total);
      }
    } else if (c.pieces == 0) {
      for (int64_t t = 0; t < x.num_tasks; ++t) grad_lr[t * x.lr.task_stride] = 0;
    }
  }
}

}  // namespace

void sgd(const Sgd& args, ParallelFor par) {
  switch (args.dtype) {
    case DType::kFloat32:
      return run_step<float>(args, par);
    case DType::kFloat64:
      return run_step<double>(args, par);
    case DType::kBFloat16:
      return run_step<bfloat16>(args, par);
    case DType::kFloat16:
      return run_step<float16>(args, par);
  }
}

void sgd_backward(const SgdBackward& args, ParallelFor par) {
  switch (args.dtype) {
    case DType::kFloat32:
      return run_backward<float>(args, par);
    case DType::kFloat64:
      return run_backward<double>(args, par);
    case DType::kBFloat16:
      return run_backward<bfloat16>(args, par);
    case DType::kFloat16:
      return run_backward<float16>(args, par);
  }
}

}  // namespace fastmeta::update::FASTMETA_ISA
