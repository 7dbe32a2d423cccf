// What the updates share on the CPU: the loops over pieces of tensors. An update is a formula of
// one element; see sgd_update_cpu.cpp for the simplest.
//
// Pure memory traffic: every operand read once, every result written once. Results that do not fit
// the last-level cache are stored past it.
//
// A formula F of forward or backward has
//   Tensor              the plain struct of one tensor, which lists operands and results
//   kHasLrTerm          whether it is a backward formula
//   apply(in, lr, out)  the element itself, on vectors; a backward formula's apply returns the
//                       element's share of lr's gradient, negated
// Operands and results are of storage type S, and the state of Acc<S>.
#pragma once
#include "common/scratch.h"
#include "common/vec.h"
#include "update/sgd_update.h"
#include "update/update_cpu_pieces.h"

namespace fastmeta::update::FASTMETA_ISA {

using namespace fastmeta::FASTMETA_ISA;

constexpr int64_t kElementsPerSum = 1024;  // elements added up before the sum joins the total

FASTMETA_INLINE bool is_dense(const Operand& x, int64_t tasks, int64_t elements) {
  return x.element_stride == 1 && (x.task_stride == elements || tasks == 1);
}
FASTMETA_INLINE bool is_constant(const Operand& x, int64_t tasks) {
  return x.element_stride == 0 && (x.task_stride == 0 || tasks == 1);
}

template <class Tensor>
FASTMETA_INLINE const Operand& operand(const Tensor& x, int i) {
  return x.*Tensor::kOperands[i].at;
}
template <class Tensor>
FASTMETA_INLINE void* result(const Tensor& x, int i) {
  return x.*Tensor::kResults[i];
}

// Whether tasks and elements are one long row for every operand.
template <class F>
FASTMETA_INLINE bool folds(const typename F::Tensor& x) {
  const int64_t t = x.num_tasks, n = x.num_elements;
  bool fold = is_dense(x.lr, t, n) || is_constant(x.lr, t);
  for (int i = 0; i < F::Tensor::kIn + F::Tensor::kStateIn; ++i) {
    fold = fold && (is_dense(operand(x, i), t, n) || is_constant(operand(x, i), t));
  }
  return fold;
}

// Bytes that all operands and results of a call touch from which on its results are stored past the
// caches: what one core complex shares on the machines measured. Not asked of the machine, since
// where rows begin within a line then decides which lanes are summed together.
constexpr int64_t kPastCacheBytes = int64_t{32} << 20;

template <class S, class F>
FASTMETA_INLINE bool streams(const typename F::Tensor* tensors, int64_t num_tensors) {
  if (kIsHalf<S>) return false;  // results of two widths, which are not aligned alike
  int64_t elements = 0;
  for (int64_t k = 0; k < num_tensors; ++k) {
    elements += tensors[k].num_tasks * tensors[k].num_elements;
  }
  constexpr int64_t kNumbers =
      F::Tensor::kIn + F::Tensor::kStateIn + F::Tensor::kOut + F::Tensor::kStateOut;
  return elements * kNumbers * static_cast<int64_t>(sizeof(S)) >= kPastCacheBytes;
}

// A pointer that walks along the elements of a row, or stays at one value for the row.
template <class T>
struct Walk {
  const T* data;
  bool along;

  Walk() = default;
  Walk(const Operand& x, int64_t task, int64_t element)
      : data(static_cast<const T*>(x.data) + task * x.task_stride + element * x.element_stride),
        along(x.element_stride != 0) {}
  // Elements i to i + n, n at most a vector; lanes past n hold anything.
  FASTMETA_INLINE Vec<Acc<T>> read(const Walk& w, int64_t i, int n) {
    if (!w.along) return splat<Acc<T>>(load_one(w.data));
    return n == kWidth<Acc<T>> ? load(w.data + i) : load_n(w.data + i, n);
  }
};

template <bool kWhole, bool kStream, class T>
FASTMETA_INLINE void put(T* p, Vec<Acc<T>> x, int n) {
  if constexpr (kStream && !kIsHalf<T>) {
    stream(p, x);
  } else if constexpr (kWhole) {
    store(p, x);
  } else {
    store_n(p, x, n);
  }
}

// The operands and results of a formula in a row, from element `begin` of task `task` on.
template <class S, class F>
struct Row {
  using A = Acc<S>;
  using Tensor = typename F::Tensor;
  static constexpr int kStates = Tensor::kStateIn > 0 ? Tensor::kStateIn : 1;
  static constexpr int kStateResults = Tensor::kStateOut > 0 ? Tensor::kStateOut : 1;
  Walk<S> in[Tensor::kIn];
  Walk<A> state[kStates];
  Walk<A> lr;
  S* out[Tensor::kOut];
  A* state_out[kStateResults];
  bool plain;  // every operand but lr walks along

  Row(const Tensor& x, int64_t task, int64_t begin, int64_t elements) {
    plain = true;
    for (int k = 0; k < Tensor::kIn; ++k) {
      in[k] = Walk<S>(operand(x, k), task, begin);
      plain = plain && in[k].along;
    }
    for (int k = 0; k < Tensor::kStateIn; ++k) {
      state[k] = Walk<A>(operand(x, Tensor::kIn + k), task, begin);
      plain = plain && state[k].along;
    }
    lr = Walk<A>(x.lr, task, begin);
    const int64_t offset = task * elements + begin;
    for (int k = 0; k < Tensor::kOut; ++k) out[k] = static_cast<S*>(result(x, k)) + offset;
    for (int k = 0; k < Tensor::kStateOut; ++k) {
      state_out[k] = static_cast<A*>(result(x, Tensor::kOut + k)) + offset;
    }
  }

  // Elements from i on before the next line of the cache begins in every result; -1 if their lines
  // begin at different elements.
  int64_t unaligned(int64_t i) const {
    constexpr uintptr_t kLine = 64;
    const auto offset = [&](const A* p) { return reinterpret_cast<uintptr_t>(p + i) % kLine; };
    const uintptr_t first = offset(reinterpret_cast<const A*>(out[0]));
    for (int k = 1; k < Tensor::kOut; ++k) {
      if (offset(reinterpret_cast<const A*>(out[k])) != first) return -1;
    }
    for (int k = 0; k < Tensor::kStateOut; ++k) {
      if (offset(state_out[k]) != first) return -1;
    }
    return static_cast<int64_t>((kLine - first) % kLine / sizeof(A));
  }

  // Elements i to i + n of the row; n is a whole vector where kWhole. Where kPlain, no operand but
  // lr is checked for standing still. Returns what the formula does.
  template <bool kPlain, bool kWhole, bool kStream = false>
  FASTMETA_INLINE auto step(const F& formula, const Row& r, int64_t i, int n) {
    constexpr int kAll = Tensor::kIn + Tensor::kStateIn,
                  kResults = Tensor::kOut + Tensor::kStateOut;
    const int m = kWhole ? kWidth<A> : n;
    Vec<A> x[kAll], y[kResults];
    FASTMETA_UNROLL
    for (int k = 0; k < Tensor::kIn; ++k) {
      x[k] = kPlain && kWhole ? load(r.in[k].data + i) : Walk<S>::read(r.in[k], i, m);
    }
    FASTMETA_UNROLL
    for (int k = 0; k < Tensor::kStateIn; ++k) {
      x[Tensor::kIn + k] =
          kPlain && kWhole ? load(r.state[k].data + i) : Walk<A>::read(r.state[k], i, m);
    }
    const auto finish = [&] {
      FASTMETA_UNROLL
      for (int k = 0; k < Tensor::kOut; ++k) put<kWhole, kStream>(r.out[k] + i, y[k], m);
      FASTMETA_UNROLL
      for (int k = 0; k < Tensor::kStateOut; ++k) {
        put<kWhole, kStream>(r.state_out[k] + i, y[Tensor::kOut + k], m);
      }
    };
    const Vec<A> lr = Walk<A>::read(r.lr, i, m);
    if constexpr (F::kHasLrTerm) {
      const Vec<A> term = formula.template apply<A>(x, lr, y);
      finish();
      return term;
    } else {
      formula.template apply<A>(x, lr, y);
      finish();
    }
  }
};

// ---- forward
template <class S, class F>
struct StepPlan {
  const F& formula;
  const typename F::Tensor* tensors;
  int64_t num_tensors;
  const Cutting* cuts;
  bool past_cache;
};

// Calls visit(whole, i, n) with the vectors of elements [begin, end) in order: whole is a constant
// that says whether n is a full vector, and how it may be handled (see Row::step).
template <bool kPlain, bool kWhole, bool kStream>
struct Way {
  static constexpr bool plain = kPlain, whole = kWhole, stream = kStream;
};
template <class S, class F, class Visit>
FASTMETA_INLINE void for_vectors(const Row<S, F>& row, bool past_cache, int64_t begin, int64_t end,
                                 const Visit& visit) {
  constexpr int kW = kWidth<Acc<S>>;
  int64_t i = begin;
  if (row.plain) {
    const int64_t head = past_cache ? row.unaligned(i) : -1;
    if (head >= 0) {
      for (const int64_t stop = min_of(end, i + head); i < stop;) {
        const int n = static_cast<int>(min_of<int64_t>(kW, stop - i));
        visit(Way<false, false, false>{}, i, n);
        i += n;
      }
      for (; i + 2 * kW <= end; i += 2 * kW) {
        visit(Way<true, true, true>{}, i, kW);
        visit(Way<true, true, true>{}, i + kW, kW);
      }
    }
    for (; i + 2 * kW <= end; i += 2 * kW) {
      visit(Way<true, true, false>{}, i, kW);
      visit(Way<true, true, false>{}, i + kW, kW);
    }
  }
  for (; i + kW <= end; i += kW) visit(Way<false, true, false>{}, i, kW);
  if (i < end) visit(Way<false, false, false>{}, i, static_cast<int>(end - i));
}

template <class S, class F>
void step_piece(const StepPlan<S, F>& plan, int64_t index) {
  const Piece piece = find_piece(plan.cuts, plan.num_tensors, index);
  for (int64_t t = piece.task_begin; t < piece.task_end; ++t) {
    const Row<S, F> row(plan.tensors[piece.tensor], t, piece.begin,
                        plan.cuts[piece.tensor].elements);
    for_vectors(row, plan.past_cache, 0, piece.end - piece.begin, [&](auto way, int64_t i, int n) {
      using W = decltype(way);
      Row<S, F>::template step<W::plain, W::whole, W::stream>(plan.formula, row, i, n);
    });
  }
}

template <class S, class F>
void run_step(const F& formula, const typename F::Tensor* tensors, int64_t num_tensors,
              ParallelFor par) {
  static thread_local Scratch scratch;
  scratch.reset(Scratch::size_of<Cutting>(num_tensors));
  Cutting* cuts = scratch.take<Cutting>(num_tensors);
  int64_t pieces = 0;
  for (int64_t k = 0; k < num_tensors; ++k) {
    cuts[k] = cut_tensor(tensors[k].num_tasks, tensors[k].num_elements, folds<F>(tensors[k]), false,
                         pieces);
    pieces += cuts[k].pieces;
  }
  StepPlan<S, F> plan{formula, tensors, num_tensors, cuts, streams<S, F>(tensors, num_tensors)};
  par(
      pieces, 2,
      [](void* context, int64_t begin, int64_t end) {
        const auto& p = *static_cast<const StepPlan<S, F>*>(context);
        for (int64_t i = begin; i < end; ++i) step_piece<S, F>(p, i);
        if (p.past_cache) stream_fence();
      },
      &plan);
}

// ---- backward
// What becomes of the terms of lr's gradient: nothing, their sum over the row returned, written to
// grad_lr element by element, or added there.
enum class LrGrad { kNone, kSum, kWrite, kAdd };

template <LrGrad kMode, class S, class F>
double backward_row(const F& formula, const Row<S, F>& row, bool past_cache, Acc<S>* grad_lr,
                    int64_t n) {
  using A = Acc<S>;
  constexpr int kW = kWidth<A>;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kElementsPerSum) {
    const int64_t end = min_of(n, begin + kElementsPerSum);
    Vec<A> sums[2] = {};
    for_vectors(row, past_cache, begin, end, [&](auto way, int64_t i, int m) {
      using W = decltype(way);
      Vec<A> term = Row<S, F>::template step<W::plain, W::whole, W::stream>(formula, row, i, m);
      if constexpr (kMode == LrGrad::kSum) {
        if constexpr (!W::whole) {
          for (int l = m; l < kW; ++l) term[l] = 0;  // lanes past the end of constant operands
        }
        const Vec<A> other = sums[1];  // two sums by turns
        sums[1] = sums[0] + term;
        sums[0] = other;
      } else if constexpr (kMode != LrGrad::kNone) {
        const Vec<A> before = kMode == LrGrad::kAdd ? load_n(grad_lr + i, m) : Vec<A>{};
        store_n(grad_lr + i, before - term, m);
      }
    });
    if constexpr (kMode == LrGrad::kSum) total += static_cast<double>(hsum<A>(sums[0] + sums[1]));
  }
  return total;
}

template <class S, class F>
struct BackwardPlan {
  const F& formula;
  const typename F::Tensor* tensors;
  int64_t num_tensors;
  const Cutting* cuts;
  double* partial;  // [pieces]: sums of the pieces that a later step adds up
  bool past_cache;
};

// A piece of columns of a rate shared by the tasks: sums over kTasksPerSum tasks join the total.
template <class S, class F>
void backward_columns(const F& formula, const typename F::Tensor& x, const Cutting& cut,
                      const Piece& piece, bool past_cache) {
  using A = Acc<S>;
  constexpr int64_t kColumns = 512, kTasksPerSum = 16;
  alignas(64) A sum[kColumns];
  for (int64_t n0 = piece.begin; n0 < piece.end; n0 += kColumns) {
    const int64_t n = min_of(kColumns, piece.end - n0);
    A* grad_lr = static_cast<A*>(x.grad_lr) + n0;
    for (int64_t t = 0; t < cut.tasks; ++t) {
      const Row<S, F> row(x, t, n0, cut.elements);
      if (t % kTasksPerSum == 0) {
        backward_row<LrGrad::kWrite>(formula, row, past_cache, sum, n);
      } else {
        backward_row<LrGrad::kAdd>(formula, row, past_cache, sum, n);
      }
      if ((t + 1) % kTasksPerSum != 0 && t + 1 < cut.tasks) continue;
      for (int64_t i = 0; i < n; ++i) grad_lr[i] = (t < kTasksPerSum ? A(0) : grad_lr[i]) + sum[i];
    }
  }
}

template <class S, class F>
void backward_piece(const BackwardPlan<S, F>& plan, int64_t index) {
  using A = Acc<S>;
  const Piece piece = find_piece(plan.cuts, plan.num_tensors, index);
  const typename F::Tensor& x = plan.tensors[piece.tensor];
  const Cutting& cut = plan.cuts[piece.tensor];
  const int64_t n = piece.end - piece.begin;
  A* grad_lr = static_cast<A*>(x.grad_lr);
  if (grad_lr != nullptr && cut.cut == Cut::kColumns) {
    return backward_columns<S>(plan.formula, x, cut, piece, plan.past_cache);
  }
  double total = 0;
  for (int64_t t = piece.task_begin; t < piece.task_end; ++t) {
    const Row<S, F> row(x, t, piece.begin, cut.elements);
    if (grad_lr == nullptr) {
      backward_row<LrGrad::kNone>(plan.formula, row, plan.past_cache, grad_lr, n);
    } else if (x.lr.element_stride != 0) {
      backward_row<LrGrad::kWrite>(plan.formula, row, plan.past_cache,
                                   grad_lr + t * x.lr.task_stride + piece.begin, n);
    } else {
      const double sum = backward_row<LrGrad::kSum>(plan.formula, row, plan.past_cache, grad_lr, n);
      if (x.lr.task_stride != 0 && cut.cut == Cut::kRows) {
        grad_lr[t * x.lr.task_stride] = static_cast<A>(-sum);
      }
      total += sum;
    }
  }
  plan.partial[index] = total;
}

// The gradient of a rate that is one number, or one a task, from the sums of its pieces.
template <class A, class Tensor>
void finish_lr(const Tensor& x, const Cutting& c, const double* partial) {
  A* grad_lr = static_cast<A*>(x.grad_lr);
  if (x.lr.element_stride != 0) {
    // An [N] rate under no task at all still has a gradient to fill: zero.
    if (x.num_tasks == 0 && x.lr.task_stride == 0) {
      for (int64_t i = 0; i < x.num_elements; ++i) grad_lr[i] = 0;
    }
    return;
  }
  if (x.lr.task_stride == 0) {
    double total = 0;
    for (int64_t i = 0; i < c.pieces; ++i) total += partial[c.first_piece + i];
    grad_lr[0] = static_cast<A>(-total);
  } else if (c.cut == Cut::kWithinRows) {
    for (int64_t t = 0; t < c.tasks; ++t) {
      double total = 0;
      for (int64_t i = 0; i < c.pieces_per_row; ++i) {
        total += partial[c.first_piece + t * c.pieces_per_row + i];
      }
      grad_lr[t * x.lr.task_stride] = static_cast<A>(-total);
    }
  } else if (c.pieces == 0) {
    for (int64_t t = 0; t < x.num_tasks; ++t) grad_lr[t * x.lr.task_stride] = 0;
  }
}

template <class S, class F>
void run_backward(const F& formula, const typename F::Tensor* tensors, int64_t num_tensors,
                  ParallelFor par) {
  static thread_local Scratch scratch;
  int64_t pieces = 0;
  const auto cut_at = [&](int64_t k) {
    const typename F::Tensor& x = tensors[k];
    const bool columns = x.lr.element_stride != 0 && x.lr.task_stride == 0 && x.num_tasks > 1;
    return cut_tensor(x.num_tasks, x.num_elements, folds<F>(x), columns, pieces);
  };
  // Cutting twice is cheaper than a second block of memory: the number of pieces sizes the partial
  // sums.
  for (int64_t k = 0; k < num_tensors; ++k) pieces += cut_at(k).pieces;
  scratch.reset(Scratch::size_of<Cutting>(num_tensors) + Scratch::size_of<double>(pieces));
  Cutting* cuts = scratch.take<Cutting>(num_tensors);
  BackwardPlan<S, F> plan{formula,
                          tensors,
                          num_tensors,
                          cuts,
                          scratch.take<double>(pieces),
                          streams<S, F>(tensors, num_tensors)};
  pieces = 0;
  for (int64_t k = 0; k < num_tensors; ++k) {
    cuts[k] = cut_at(k);
    pieces += cuts[k].pieces;
  }
  par(
      pieces, 2,
      [](void* context, int64_t begin, int64_t end) {
        const auto& p = *static_cast<const BackwardPlan<S, F>*>(context);
        for (int64_t i = begin; i < end; ++i) backward_piece<S, F>(p, i);
        if (p.past_cache) stream_fence();
      },
      &plan);
  for (int64_t k = 0; k < num_tensors; ++k) {
    if (tensors[k].grad_lr != nullptr) finish_lr<Acc<S>>(tensors[k], cuts[k], plan.partial);
  }
}

// Calls run(S{}) with the storage type that dtype names.
template <class Run>
void with_storage(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat64:
      return run(double{});
    case DType::kBFloat16:
      return run(bfloat16{});
    case DType::kFloat16:
      return run(float16{});
  }
}

}  // namespace fastmeta::update::FASTMETA_ISA
