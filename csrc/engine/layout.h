// How a plan's parameters and values lie in memory on the CPU, and the way there from torch's
// tensors and back.
#pragma once
#include <algorithm>

#include "common/gemm.h"
#include "engine/plan.h"

namespace fastmeta::engine::FASTMETA_ISA {

using namespace fastmeta::FASTMETA_ISA;

template <class T>
constexpr Grain kGrain{kWidth<T>, 64 / sizeof(T)};

// A part of a parameter that lies together: a panel of a matrix, or all of another layout.
struct Part {
  int64_t begin, size;           // in the engine's numbers
  int64_t group, output, count;  // of a matrix: the outputs that it has
};
template <class T, class F>
void for_each_part(const Param& p, F f) {
  if (p.layout != Layout::kMatrix) return f(Part{0, p.size, 0, 0, 0});
  const int64_t rows = p.taps * p.inputs, cols = padded<T>(p.outputs);
  const Matrix<T> m{nullptr, rows, cols, 0};
  for (int64_t g = 0; g < p.groups; ++g) {
    for (int64_t panel = 0; panel < m.panels(); ++panel) {
      const int64_t first = panel * kPanel<T>, width = m.width(panel);
      f(Part{g * rows * cols + first * rows, rows * width, g, first,
             min_of(width, p.outputs - first)});
    }
  }
}

// ---- torch's layouts to the engine's and back
// Calls f(engine index, torch index) for each number of a part of a parameter; of a matrix from the
// input `first` on.
template <class T, class F>
void for_each_number(const Param& p, const Part& part, int64_t first, F f) {
  if (p.layout == Layout::kRows) {
    const int64_t ld = padded<T>(p.inputs);
    for (int64_t o = 0; o < p.outputs; ++o) {
      for (int64_t i = 0; i < p.inputs; ++i) f(o * ld + i, o * p.inputs + i);
    }
    return;
  }
  if (p.layout != Layout::kMatrix) {
    const int64_t ld = padded<T>(p.channels);
    for (int64_t i = 0; i < p.pixels; ++i) {
      for (int64_t c = 0; c < p.channels; ++c) f(i * ld + c, c * p.pixels + i);
    }
    return;
  }
  const int64_t stride = part.size / (p.taps * p.inputs);
  for (int64_t o = 0; o < part.count; ++o) {
    const int64_t column = part.begin + o;
    const int64_t from = (part.group * p.outputs + part.output + o) * p.inputs * p.taps;
    for (int64_t t = 0; t < p.taps; ++t) {
      for (int64_t i = first; i < p.inputs; ++i) {
        f(column + (t * p.inputs + i) * stride, from + i * p.taps + t);
      }
    }
  }
}

// Calls f(engine index, compact index, count) for the runs of a parameter's numbers that are not
// padding, in the engine's order.
template <class T, class F>
void for_each_run(const Param& p, F f) {
  int64_t compact = 0;
  const auto run = [&](int64_t engine, int64_t count) {
    f(engine, compact, count);
    compact += count;
  };
  if (p.layout == Layout::kRows) {
    for (int64_t o = 0; o < p.outputs; ++o) run(o * padded<T>(p.inputs), p.inputs);
    return;
  }
  if (p.layout == Layout::kFactored) {
    for (int64_t i = 0; i < p.rows; ++i) run(i * padded<T>(p.cols), p.cols);
    return;
  }
  if (p.layout != Layout::kMatrix) {
    for (int64_t i = 0; i < p.pixels; ++i) run(i * padded<T>(p.channels), p.channels);
    return;
  }
  const int64_t rows = p.taps * p.inputs;
  for_each_part<T>(p, [&](const Part& part) {
    const int64_t width = part.size / rows;
    if (part.count == width) return run(part.begin, part.size);
    for (int64_t r = 0; r < rows; ++r) run(part.begin + r * width, part.count);
  });
}

// A list of parameters without its padding, as it is kept between forward and backward: as many
// numbers as torch's tensors have.
template <class T>
void pack(const ParamList& list, const T* engine, T* compact) {
  for (const Param& p : list.params) {
    for_each_run<T>(p, [&](int64_t e, int64_t c, int64_t count) {
      std::copy_n(engine + p.offset + e, count, compact + p.torch_offset + c);
    });
  }
}
template <class T>
void unpack(const ParamList& list, const T* compact, T* engine) {
  std::fill_n(engine, list.size, T(0));
  for (const Param& p : list.params) {
    for_each_run<T>(p, [&](int64_t e, int64_t c, int64_t count) {
      std::copy_n(compact + p.torch_offset + c, count, engine + p.offset + e);
    });
  }
}

// The inputs of a panel that lie in whole vectors in torch's tensor, which is the transposed
// matrix.
template <class T>
int64_t whole_inputs(const Param& p) {
  const bool transposed = p.layout == Layout::kMatrix && p.taps == 1;
  return transposed ? p.inputs / kWidth<T> * kWidth<T> : 0;
}
template <class T>
void import_part(const Param& p, const Part& part, const T* torch, T* engine) {
  const int64_t whole = whole_inputs<T>(p), width = part.size / max_of<int64_t>(1, p.inputs);
  const int64_t done = whole * width;
  if (whole > 0) {
    const T* from = torch + (part.group * p.outputs + part.output) * p.inputs;
    transpose_rows<T>({from, part.count, whole, p.inputs}, 0, part.count, whole,
                      {engine + part.begin, whole, width, width}, 0);
  }
  std::fill_n(engine + part.begin + done, part.size - done, T(0));
  for_each_number<T>(p, part, whole, [=](int64_t e, int64_t t) { engine[e] = torch[t]; });
}
template <class T>
void export_part(const Param& p, const Part& part, const T* engine, T* torch) {
  const int64_t whole = whole_inputs<T>(p), width = part.size / max_of<int64_t>(1, p.inputs);
  if (whole > 0) {
    T* to = torch + (part.group * p.outputs + part.output) * p.inputs;
    transpose_rows<T>({engine + part.begin, whole, width, width}, 0, whole, part.count,
                      {to, part.count, whole, p.inputs}, 0);
  }
  for_each_number<T>(p, part, whole, [=](int64_t e, int64_t t) { torch[t] = engine[e]; });
}
template <class T>
void import_param(const Param& p, const T* torch, T* engine) {
  for_each_part<T>(p, [&](const Part& part) { import_part(p, part, torch, engine); });
}
template <class T>
void export_param(const Param& p, const T* engine, T* torch) {
  for_each_part<T>(p, [&](const Part& part) { export_part(p, part, engine, torch); });
}

// Rows of a value, [rows, channels, pixels] in torch's layout.
template <class T>
void import_rows(const Shape& s, int64_t rows, const T* torch, T* engine) {
  const int64_t pixels = s.pixels();
  if (s.lanes > 0) {
    const int64_t ld = s.padded_rows(rows);
    std::fill_n(engine, s.channels * ld, T(0));
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t c = 0; c < s.channels; ++c) engine[c * ld + n] = torch[n * s.channels + c];
    }
    return;
  }
  if (s.channels == 1 && s.ld == 1) {
    std::copy_n(torch, rows * pixels, engine);
    return;
  }
  if (pixels == 1) {
    for (int64_t n = 0; n < rows; ++n) {
      std::copy_n(torch + n * s.channels, s.channels, engine + n * s.ld);
      std::fill_n(engine + n * s.ld + s.channels, s.ld - s.channels, T(0));
    }
    return;
  }
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t i = 0; i < pixels; ++i) {
      T* to = engine + (n * pixels + i) * s.ld;
      const T* from = torch + n * s.channels * pixels + i;
      for (int64_t c = 0; c < s.channels; ++c) to[c] = from[c * pixels];
      for (int64_t c = s.channels; c < s.ld; ++c) to[c] = 0;
    }
  }
}
template <class T>
void export_rows(const Shape& s, int64_t rows, const T* engine, T* torch) {
  const int64_t pixels = s.pixels();
  if (s.lanes > 0) {
    const int64_t ld = s.padded_rows(rows);
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t c = 0; c < s.channels; ++c) torch[n * s.channels + c] = engine[c * ld + n];
    }
    return;
  }
  if (pixels == 1) {
    for (int64_t n = 0; n < rows; ++n) {
      std::copy_n(engine + n * s.ld, s.channels, torch + n * s.channels);
    }
    return;
  }
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t i = 0; i < pixels; ++i) {
      const T* from = engine + (n * pixels + i) * s.ld;
      T* to = torch + n * s.channels * pixels + i;
      for (int64_t c = 0; c < s.channels; ++c) to[c * pixels] = from[c];
    }
  }
}

}  // namespace fastmeta::engine::FASTMETA_ISA
