// What a program is for one call: what depends on what, which layers stay factored, how wide its
// values are and where its parameters stand.
//
// Free of devices, vector widths and scalar types: these come in as a Grain. (The namespace is that
// of who includes it, or a linker could take one set's code for another's.) How numbers get into
// the forms that it names is layout.h's.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "engine/adapt.h"

namespace fastmeta::engine::FASTMETA_ISA {

// What numbers come in: vectors of `lanes`, and parameters that begin at multiples of `line`.
struct Grain {
  int64_t lanes, line;
  int64_t padded(int64_t n) const { return (n + lanes - 1) / lanes * lanes; }
  int64_t aligned(int64_t n) const { return (n + line - 1) / line * line; }
};

// Whether a layer has so few outputs that many lanes along them would be empty, as the last of a
// regression or of a 5-way classifier: its weights lie as torch has them, lanes along the inputs.
// Their rows end in whole vectors, with zeros, which sums over parameters read.
inline bool is_narrow(const Node& node, const Grain& grain) {
  return node.kind == Kind::kLinear && node.out.channels <= grain.lanes * 5 / 8 &&
         node.in.ld % grain.lanes == 0;
}

enum class Layout {
  kNone,    // not used by the program: goes through as it is
  kMatrix,  // [groups] of Matrix [taps * channels of a group][padded outputs of a group], in panels
  kRows,    // [outputs][inputs], rows of whole vectors, of layers that are narrow
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

class Plan {
 public:
  Plan(const Adapt& args, const Grain& grain)
      : program(*args.program), nodes(program.nodes), grain_(grain) {
    shapes = program.shapes;
    // Images of few channels would grow by their padding: as they are where products alone read
    // them, which take any stride.
    bool as_it_is = program.shapes[0].pixels() > 1;
    for (const Node& n : nodes) {
      const bool product = n.kind == Kind::kLinear || n.kind == Kind::kConv2d;
      if ((n.input == 0 || n.input2 == 0) && !product) as_it_is = false;
    }
    for (size_t v = 0; v < shapes.size(); ++v) {
      shapes[v].ld = v == 0 && as_it_is ? shapes[v].channels : grain_.padded(shapes[v].channels);
    }
    fast.params.resize(args.num_fast);
    shared.params.resize(args.num_shared);
    is_static.assign(shapes.size(), true);
    for (size_t i = 0; i < nodes.size(); ++i) {
      Node& n = nodes[i];
      n.in = shapes[n.input];
      n.out = shapes[i + 1];
      // Of few outputs the prediction has its rows along the lanes: losses take it so.
      if (i + 1 == nodes.size() && is_narrow(n, grain_)) {
        shapes[i + 1].lanes = n.out.lanes = grain_.lanes;
      }
      place(n);
      is_static[i + 1] = is_static[n.input] && (n.input2 < 0 || is_static[n.input2]) &&
                         !n.w.adapted && !n.b.adapted && n.kind != Kind::kDropout;
    }
    if (program.loss.weight) use(program.loss.weight, vector(shapes.back().channels));
    join_activations();
    lay_out(fast);
    lay_out(shared);
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
    factor(args);
  }

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
      if (n.kind != Kind::kLinear || !is_static[n.input] || !n.w.adapted || !live[i + 1]) continue;
      Param& w = fast.params[n.w.index];
      // Padding of values other than the input may hold anything, and products of rows would take
      // it.
      const bool clean = n.in.ld % grain_.lanes == 0 && (n.in.ld == n.in.channels || n.input == 0);
      if (w.uses > 1 || !clean || s > n.in.channels) continue;
      const int64_t weights = w.size, in = n.in.channels;
      const int64_t state =
          n.out.lanes > 0 ? n.out.channels * grain_.padded(s) : s * grain_.padded(n.out.channels);
      const int64_t dense = k * (7 * s + kMemory) * weights;
      const int64_t grams = 3 * q * s * in + 2 * q * state;  // the queries', or through W_K
      const int64_t whole = (3 * s + 2 * kMemory) * weights;
      const int64_t factored_cost = 4 * s * weights + 2 * s * s * in +
                                    2 * k * (5 * s + kMemory) * state + std::min(grams, whole);
      if (factored_cost >= dense) continue;
      Factored f{static_cast<int>(i) + 1, n.w.index, w, whole < grams};
      f.weight.offset = factored_size;
      factored_size += grain_.aligned(weights);
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
      w.layout = is_narrow(n, grain_) ? Layout::kRows : Layout::kMatrix;
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

  void lay_out(ParamList& list) const {
    list.size = list.numel = 0;
    for (Param& p : list.params) {
      switch (p.layout) {
        case Layout::kMatrix:
          p.numel = p.groups * p.outputs * p.inputs * p.taps;
          p.size = p.groups * p.taps * p.inputs * grain_.padded(p.outputs);
          break;
        case Layout::kRows:
          p.numel = p.outputs * p.inputs;
          p.size = p.outputs * grain_.padded(p.inputs);
          break;
        case Layout::kVector:
        case Layout::kImage:
          p.numel = p.channels * p.pixels;
          p.size = p.pixels * grain_.padded(p.channels);
          break;
        case Layout::kFactored:
          p.size = p.rows * grain_.padded(p.cols);
          break;
        case Layout::kNone:
          break;
      }
      p.offset = list.size;
      p.torch_offset = list.numel;
      list.size += grain_.aligned(p.size);
      list.numel += p.numel;
    }
  }

  const Grain grain_;
};

}  // namespace fastmeta::engine::FASTMETA_ISA
