// How a program lies in memory for one scalar type and vector width: strides of values, layouts and
// places of parameters, what depends on what.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "common/gemm.h"
#include "engine/adapt.h"
#include "engine/layers/narrow.h"

namespace fastmeta::engine::FASTMETA_ISA {

using namespace fastmeta::FASTMETA_ISA;

enum class Layout {
  kNone,    // not used by the program: goes through as it is
  kMatrix,  // [groups] of Matrix [taps * channels of a group][padded outputs of a group], in panels
  kRows,    // [outputs][inputs], rows of whole vectors (layers/narrow.h)
  kVector,  // [channels], padded
  kImage,   // [pixels][padded channels]
  kFactored,  // of a weight in factored form: as its layer's output (factored.h)
};

// A parameter in torch's layout and in the engine's.
struct Param {
  Layout layout = Layout::kNone;
  int64_t outputs = 0, inputs = 0, taps = 1, groups = 1;  // kMatrix: of a group; kRows
  int64_t channels = 0, pixels = 1;                       // kVector, kImage
  int64_t rows = 0, cols = 0;                             // kFactored, cols padded
  int64_t offset = 0, size = 0;                           // in the engine's buffer
  int64_t torch_offset = 0, numel = 0;  // among the parameters of its list, flattened
  int uses = 0;
};

// A layer in factored form: its value, its weight's place in the lists and among whole weights.
struct Factored {
  int value;
  int param;
  Param weight;  // whole, its offset in a buffer of all factored layers' weights
  bool whole;    // the queries go through the whole W_K (factored.h)
};

// One of the two lists of parameters.
struct ParamList {
  std::vector<Param> params;
  int64_t size = 0, numel = 0;
};

template <class T>
class Plan {
 public:
  explicit Plan(const Adapt& args) : program(*args.program), nodes(program.nodes) {
    shapes = program.shapes;
    // Images of few channels would grow by their padding: as they are where products alone read
    // them, which take any stride.
    bool as_it_is = program.shapes[0].pixels() > 1;
    for (const Node& n : nodes) {
      const bool product = n.kind == Kind::kLinear || n.kind == Kind::kConv2d;
      if ((n.input == 0 || n.input2 == 0) && !product) as_it_is = false;
    }
    for (size_t v = 0; v < shapes.size(); ++v) {
      shapes[v].ld = v == 0 && as_it_is ? shapes[v].channels : padded<T>(shapes[v].channels);
    }
    fast.params.resize(args.num_fast);
    shared.params.resize(args.num_shared);
    is_static.assign(shapes.size(), true);
    for (size_t i = 0; i < nodes.size(); ++i) {
      Node& n = nodes[i];
      n.in = shapes[n.input];
      n.out = shapes[i + 1];
      // Of few outputs the prediction has its rows along the lanes: losses take it so.
      if (i + 1 == nodes.size() && narrow::applies<T>(n)) {
        shapes[i + 1].lanes = n.out.lanes = kWidth<T>;
      }
      place(n);
      is_static[i + 1] = is_static[n.input] && (n.input2 < 0 || is_static[n.input2]) &&
                         !n.w.adapted && !n.b.adapted && n.kind != Kind::kDropout;
    }
    if (program.loss.weight) use(program.loss.weight, vector(shapes.back().channels));
    join_activations();
    lay_out(fast);
    lay_out(shared);
    factor(args);
    live.assign(shapes.size(), false);
    live.back() = true;
    last_use.assign(shapes.size(), 0);
    readers.assign(shapes.size(), 0);
    for (int v = static_cast<int>(nodes.size()); v > 0; --v) {
      if (!live[v]) continue;
      const Node& n = nodes[v - 1];
      for (int u : {n.input, n.input2}) {
        if (u < 0) continue;
        live[u] = true;
        ++readers[u];
        last_use[u] = std::max(last_use[u], v);
      }
    }
  }

  Param& param(const ParamRef& ref) { return list(ref).params[ref.index]; }
  const Param& param(const ParamRef& ref) const {
    return (ref.adapted ? fast : shared).params[ref.index];
  }
  const Shape& out() const { return shapes.back(); }
  // Whether the prediction has its rows along the lanes, of an input that no step changes.
  bool turns_input() const {
    return out().lanes > 0 && is_static[nodes.back().input] &&
           !(factored.size() > 0 && factored.back().value == static_cast<int>(nodes.size()));
  }
  // Numbers of one step's rates: those of each number lie as the parameters do.
  int64_t rate_width(const Adapt& args) const {
    return args.rate_each_number() ? fast.size : args.rate_cols;
  }

  const Program& program;
  std::vector<Node> nodes;
  std::vector<Shape> shapes;    // with ld
  std::vector<bool> is_static;  // value is the same in all steps of a task
  std::vector<bool> live;       // the prediction depends on the value
  std::vector<int> last_use;    // number of the last live node that reads the value, 0 if none
  std::vector<int> readers;     // how many live inputs the value is
  ParamList fast, shared;
  std::vector<Factored> factored;
  int64_t factored_size = 0;  // numbers of their whole weights

 private:
  // A batch norm that only a piecewise linear activation reads becomes one node with it, in the
  // activation's place: values are written once, and its derivative needs no more than the norm's
  // input. The norm's own value is then read by nobody.
  void join_activations() {
    std::vector<int> readers(shapes.size(), 0);
    for (const Node& n : nodes) {
      ++readers[n.input];
      if (n.input2 >= 0) ++readers[n.input2];
    }
    for (Node& n : nodes) {
      const bool straight = n.kind == Kind::kRelu || n.kind == Kind::kLeakyRelu;
      if (!straight || n.input == 0 || readers[n.input] > 1) continue;
      Node joined = nodes[n.input - 1];
      if (joined.kind != Kind::kBatchNorm || joined.activation) continue;
      joined.activation = n.kind;
      joined.a = n.a;
      n = joined;
    }
  }

  // Chooses the linear layers to keep factored: by multiply-adds of all steps and the queries, a
  // weight that goes through memory counting as kMemory of them, and the small products of a
  // factored step twice.
  void factor(const Adapt& args) {
    constexpr int64_t kMemory = 16;
    if (args.rate_each_number() || args.steps == 0) return;
    const int64_t s = args.supports, q = args.queries, k = args.steps;
    for (size_t i = 0; i < nodes.size(); ++i) {
      const Node& n = nodes[i];
      if (n.kind != Kind::kLinear || !is_static[n.input] || !n.w.adapted) continue;
      Param& w = fast.params[n.w.index];
      // Padding of values other than the input may hold anything, and products of rows would take
      // it.
      const bool clean = n.in.ld % kWidth<T> == 0 && (n.in.ld == n.in.channels || n.input == 0);
      if (w.uses > 1 || !clean || s > n.in.channels) continue;
      const int64_t weights = w.size, in = n.in.channels;
      const int64_t state =
          n.out.lanes > 0 ? n.out.channels * padded<T>(s) : s * padded<T>(n.out.channels);
      const int64_t dense = k * (7 * s + kMemory) * weights;
      const int64_t grams = 3 * q * s * in + 2 * q * state;  // the queries', or through W_K
      const int64_t whole = (3 * s + 2 * kMemory) * weights;
      const int64_t factored_cost = 4 * s * weights + 2 * s * s * in +
                                    2 * k * (5 * s + kMemory) * state + std::min(grams, whole);
      if (factored_cost >= dense) continue;
      Factored f{static_cast<int>(i) + 1, n.w.index, w, whole < grams};
      f.weight.offset = factored_size;
      factored_size += ceil_div(weights, int64_t{64 / sizeof(T)}) * int64_t{64 / sizeof(T)};
      factored.push_back(f);
      w.layout = Layout::kFactored;
      w.rows = n.out.lanes > 0 ? n.out.channels : s;
      w.cols = n.out.lanes > 0 ? s : n.out.channels;
    }
    if (!factored.empty()) lay_out(fast);
  }

  ParamList& list(const ParamRef& ref) { return ref.adapted ? fast : shared; }

  static Param vector(int64_t channels) {
    Param p;
    p.layout = Layout::kVector;
    p.channels = channels;
    return p;
  }

  void use(const ParamRef& ref, const Param& as) {
    if (!ref) return;
    ParamList& of = list(ref);
    if (ref.index >= static_cast<int>(of.params.size())) {
      throw std::invalid_argument("fastmeta: the program names a parameter that was not given");
    }
    Param& p = of.params[ref.index];
    const int uses = p.uses + 1;
    if (p.layout != Layout::kNone &&
        (p.layout != as.layout || p.outputs != as.outputs || p.inputs != as.inputs ||
         p.taps != as.taps || p.groups != as.groups || p.channels != as.channels ||
         p.pixels != as.pixels)) {
      throw std::invalid_argument("fastmeta: the program uses a parameter in two shapes");
    }
    p = as;
    p.uses = uses;
  }

  void place(const Node& n) {
    if (n.kind == Kind::kLinear || n.kind == Kind::kConv2d) {
      Param w;
      w.layout = narrow::applies<T>(n) ? Layout::kRows : Layout::kMatrix;
      w.groups = n.groups;
      w.outputs = n.out.channels / n.groups;
      w.inputs = n.in.channels / n.groups;
      w.taps = n.k[0] * n.k[1];
      use(n.w, w);
      use(n.b, vector(n.out.channels));
      return;
    }
    Param p = vector(n.in.channels);
    if (n.kind == Kind::kLayerNorm && n.in.pixels() > 1) {
      p.layout = Layout::kImage;
      p.pixels = n.in.pixels();
    }
    for (const ParamRef* ref : {&n.w, &n.b, &n.mean, &n.var}) use(*ref, p);
  }

  static void lay_out(ParamList& list) {
    list.size = list.numel = 0;
    for (Param& p : list.params) {
      switch (p.layout) {
        case Layout::kMatrix:
          p.numel = p.groups * p.outputs * p.inputs * p.taps;
          p.size = p.groups * p.taps * p.inputs * padded<T>(p.outputs);
          break;
        case Layout::kRows:
          p.numel = p.outputs * p.inputs;
          p.size = p.outputs * padded<T>(p.inputs);
          break;
        case Layout::kVector:
        case Layout::kImage:
          p.numel = p.channels * p.pixels;
          p.size = p.pixels * padded<T>(p.channels);
          break;
        case Layout::kFactored:
          p.size = p.rows * padded<T>(p.cols);
          break;
        case Layout::kNone:
          break;
      }
      p.offset = list.size;
      p.torch_offset = list.numel;
      list.size += ceil_div(p.size, int64_t{64 / sizeof(T)}) * int64_t{64 / sizeof(T)};
      list.numel += p.numel;
    }
  }
};

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
