// CPU kernels of task_linear: one small matrix product a task, by the tiles of common/gemm.h.
//
// The strides of x cost nothing. Of the weights,
//   rows that are contiguous, [O, I], and few rows of x (the supports of an inner step): sums run
//     along the inputs, and nothing is laid out anew;
//   columns that are contiguous, as in either derivative: the weights are the panels already, but
//     for the last columns that fill no vector;
//   all else: transposed into panels once.
// A job is some outputs of a task, so that no weight is laid out twice.
#include <cstring>

#include "common/gemm_transposed.h"
#include "common/scratch.h"
#include "common/vec.h"
#include "task_layers/task_linear.h"

namespace fastmeta::task_layers::FASTMETA_ISA {

using namespace fastmeta::FASTMETA_ISA;

namespace {

constexpr int64_t kFewRows = 8;
constexpr int64_t kWantedJobs = 8;  // of few tasks, outputs are split into about that
constexpr int64_t kRowsAtOnce = 96;

thread_local Scratch scratch;

template <class T>
struct Plan {
  const Linear* args;
  int64_t block, blocks;  // outputs a job

  explicit Plan(const Linear& a) : args(&a) {
    const int64_t wanted = max_of<int64_t>(1, kWantedJobs / max_of<int64_t>(1, a.tasks));
    block = ceil_div(ceil_div(a.outputs, wanted), kPanel<T>) * kPanel<T>;
    blocks = ceil_div(a.outputs, max_of<int64_t>(1, block));
  }
};

// panels [inputs, padded(n)] = the transpose of n rows of weights.
template <class T>
void lay_out(const T* weight, int64_t row, int64_t column, int64_t n, const Matrix<T>& panels) {
  constexpr int kW = kWidth<T>;
  for (int64_t o = 0; o < panels.cols; o += kW) {
    const int64_t stride = panels.stride(panels.panel_of(o));
    T* to = panels.at(0, o);
    const T* from = weight + o * row;
    const int64_t lanes = min_of<int64_t>(kW, n - o);
    int64_t i = 0;
    if (lanes == kW && column == 1) {
      for (; i + kW <= panels.rows; i += kW) {
        Vec<T> r[kW];
        for (int l = 0; l < kW; ++l) r[l] = load(from + l * row + i);
        transpose<T>(r);
        for (int l = 0; l < kW; ++l) store(to + (i + l) * stride, r[l]);
      }
    }
    for (; i < panels.rows; ++i) {
      for (int64_t l = 0; l < kW; ++l) {
        to[i * stride + l] = l < lanes ? from[l * row + i * column] : T(0);
      }
    }
  }
}

// A part of the outputs of all rows: rows of x times panels, with the bias, to out [N, ldo].
template <class T>
void multiply(const Linear& a, const T* x, ConstMatrix<T> panels, int64_t n, const T* bias, T* out,
              T* room) {
  for (int64_t i = 0; i < a.rows; i += kRowsAtOnce) {
    const int64_t rows = min_of(kRowsAtOnce, a.rows - i);
    const bool whole = panels.cols == n;
    GemmStart<T> start;
    start.bias = bias;
    Matrix<T> c{room, rows, panels.cols, panels.cols};
    if (whole) c = {out + i * a.outputs, rows, n, a.outputs};
    gemm<T>(rows, a.inputs, x + i * a.x.row, a.x.row, a.x.column, panels, c, start);
    if (whole) continue;
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(out + (i + r) * a.outputs, room + r * panels.cols,
                  static_cast<size_t>(n) * sizeof(T));
    }
  }
}

// Few rows times weights with contiguous rows.
template <class T>
void multiply_few(const Linear& a, const T* x, const T* weight, int64_t n, const T* bias, T* out,
                  T* own_x, T* room) {
  const int64_t width = padded<T>(n);
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t i = 0; i < a.inputs; ++i)
      own_x[r * a.inputs + i] = x[r * a.x.row + i * a.x.column];
  }
  gemm_transposed<T, 1>(a.rows, {{own_x, a.inputs, {weight, n, a.inputs, a.weight.row}, a.inputs}},
                        room, width, {T(1), bias});
  for (int64_t r = 0; r < a.rows; ++r) {
    std::memcpy(out + r * a.outputs, room + r * width, static_cast<size_t>(n) * sizeof(T));
  }
}

template <class T>
void linear_job(const Plan<T>& plan, int64_t job) {
  const Linear& a = *plan.args;
  const int64_t task = job / plan.blocks, first = job % plan.blocks * plan.block;
  const int64_t n = min_of(plan.block, a.outputs - first), width = padded<T>(n);
  const T* x = static_cast<const T*>(a.x.data) + task * a.x.task;
  const T* weight =
      static_cast<const T*>(a.weight.data) + task * a.weight.task + first * a.weight.row;
  T* out = static_cast<T*>(a.out) + task * a.rows * a.outputs + first;
  // Strides of 0 (an expanded weight) are laid out: to a Matrix they would mean panels.
  const bool few =
      a.rows <= kFewRows && a.weight.column == 1 && a.weight.row > 0 && a.inputs >= kWidth<T>;
  const bool ready = a.weight.row == 1 && a.weight.column > 1;
  const int64_t laid_out = few ? 0 : ready ? kWidth<T> : width;
  const int64_t rows = min_of(a.rows, kRowsAtOnce);
  scratch.reset(Scratch::size_of<T>(width) + Scratch::size_of<T>(a.inputs * laid_out) +
                Scratch::size_of<T>(rows * width) +
                Scratch::size_of<T>(few ? a.rows * a.inputs : 0));
  T* bias = scratch.take<T>(width);
  T* panels = scratch.take<T>(a.inputs * laid_out);
  T* room = scratch.take<T>(rows * width);
  std::memset(bias, 0, static_cast<size_t>(width) * sizeof(T));
  if (a.bias.data != nullptr) {
    const T* from = static_cast<const T*>(a.bias.data) + task * a.bias.task;
    for (int64_t o = 0; o < n; ++o) bias[o] = from[(first + o) * a.bias.column];
  }
  if (few) {
    multiply_few(a, x, weight, n, bias, out, scratch.take<T>(a.rows * a.inputs), room);
    return;
  }
  int64_t done = 0;
  if (ready) {
    done = n / kWidth<T> * kWidth<T>;
    multiply<T>(a, x, {weight, a.inputs, done, a.weight.column}, done, bias, out, room);
    if (done == n) return;
  }
  const Matrix<T> own{panels, a.inputs, padded<T>(n - done), 0};
  lay_out(weight + done * a.weight.row, a.weight.row, a.weight.column, n - done, own);
  multiply<T>(a, x, {own.data, own.rows, own.cols, 0}, n - done, bias + done, out + done, room);
}

template <class T>
void run(const Linear& args, ParallelFor par) {
  const Plan<T> plan(args);
  const int64_t jobs = args.rows == 0 || args.outputs == 0 ? 0 : args.tasks * plan.blocks;
  if (jobs == 0) return;
  const double work = 2.0 * static_cast<double>(args.rows) * static_cast<double>(args.inputs) *
                      static_cast<double>(min_of(plan.block, args.outputs));
  const int64_t grain = max_of<int64_t>(1, static_cast<int64_t>(2e5 / (work + 1000.0)));
  par(
      jobs, grain,
      [](void* context, int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) linear_job(*static_cast<const Plan<T>*>(context), j);
      },
      const_cast<Plan<T>*>(&plan));
}

}  // namespace

void linear(const Linear& args, ParallelFor par) {
  args.dtype == DType::kFloat64 ? run<double>(args, par) : run<float>(args, par);
}

}  // namespace fastmeta::task_layers::FASTMETA_ISA
