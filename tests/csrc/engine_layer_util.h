// A harness for the layers of the engine: from a layer's definition in long double on torch's
// layout, checks of all its passes, in every memory layout and with every pointer that may be null.
#pragma once
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "engine/layers/layers.h"

namespace fastmeta::engine::FASTMETA_ISA {

using Real = long double;
using Numbers =
    std::vector<Real>;  // values are [rows, channels, pixels], weights [channels, pixels]

inline int64_t size_of(const Numbers& x) { return static_cast<int64_t>(x.size()); }

// What a layer takes, or tangents of it; an empty vector is an absent one.
struct Inputs {
  Numbers x, x2, w, b, mean, var;
};
// Outputs are zero where nobody wanted them.
struct Outputs {
  Numbers y, dy, gx, gx2, gw, gb, dgx, dgx2, dgw, dgb;
};
struct Layer {
  Node node;
  int64_t rows;
  std::function<Numbers(const Inputs&)> define;
};

inline Shape shape(int64_t channels, int64_t height = 1, int64_t width = 1) {
  Shape s;
  s.channels = channels;
  s.height = height;
  s.width = width;
  return s;
}

// Normal numbers that float holds exactly.
inline Numbers draw(std::mt19937& random, int64_t n, double mean = 0) {
  std::normal_distribution<float> normal(static_cast<float>(mean), 1);
  Numbers x(static_cast<size_t>(n));
  for (Real& v : x) v = normal(random);
  return x;
}
inline Numbers moved(const Numbers& x, const Numbers& d, Real by) {
  Numbers to = x;
  for (size_t i = 0; i < d.size(); ++i) to[i] += by * d[i];
  return to;
}
inline Inputs moved(const Inputs& in, const Inputs& d, Real by) {
  Inputs to = in;
  to.x = moved(in.x, d.x, by);
  to.x2 = moved(in.x2, d.x2, by);
  to.w = moved(in.w, d.w, by);
  to.b = moved(in.b, d.b, by);
  return to;
}
inline Numbers slope(const Numbers& up, const Numbers& down, Real step) {
  Numbers to(up.size());
  for (size_t i = 0; i < up.size(); ++i) to[i] = (up[i] - down[i]) / (2 * step);
  return to;
}
inline Real dot(const Numbers& a, const Numbers& b) {
  Real sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}
inline void expect_near(const Numbers& got, const Numbers& want, Real tolerance, const char* what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  Real scale = 1;
  for (Real v : want) scale = std::max(scale, std::fabs(v));
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_LE(std::fabs(got[i] - want[i]), tolerance * scale)
        << what << " at " << i << ": got " << got[i] << ", want " << want[i];
  }
}

// Wishes to leave out: tangents that are zero, outputs that nobody wants, places to add to.
struct Options {
  bool no_dx = false, no_dw = false, no_db = false;
  bool no_gx = false, no_dgx = false, no_gw = false, no_dgw = false;
  bool add = false;  // to what is there: ones
};

// The layer in the engine's memory, padded as for T; padding lanes of values hold garbage.
template <class T>
class Engine {
 public:
  explicit Engine(const Layer& layer, int64_t more = 0) : node_(layer.node), rows_(layer.rows) {
    for (Shape* s : {&node_.in, &node_.out}) {
      s->ld = (ceil_div(s->channels, int64_t{kWidth<T>}) + more) * kWidth<T>;
    }
  }

  Numbers forward(const Inputs& in) {
    Outputs out;
    LayerCall<T> call = start(in, {}, {}, {}, {});
    layers::forward(call);
    read_values(&out);
    return out.y;
  }
  Outputs backward(const Inputs& in, const Numbers& gy, const Options& options = {}) {
    Outputs out;
    LayerCall<T> call = start(in, {}, gy, {}, options);
    layers::forward(call);
    layers::backward(call);
    read_values(&out);
    read_gradients(call, &out);
    return out;
  }
  Outputs dual(const Inputs& in, const Inputs& d, const Numbers& gy, const Numbers& dgy,
               const Options& options = {}) {
    Outputs out;
    LayerCall<T> call = start(in, d, gy, dgy, options);
    layers::dual_forward(call);
    layers::dual_backward(call);
    read_values(&out);
    read_gradients(call, &out);
    return out;
  }

 private:
  using Memory = std::vector<T>;

  static Memory pack(const Numbers& from, int64_t rows, const Shape& s, T padding) {
    if (from.empty()) return {};
    Memory to(static_cast<size_t>(rows * s.row()), padding);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < s.channels; ++c) {
        for (int64_t p = 0; p < s.pixels(); ++p) {
          to[r * s.row() + p * s.ld + c] =
              static_cast<T>(from[(r * s.channels + c) * s.pixels() + p]);
        }
      }
    }
    return to;
  }
  // Padding lanes must be zero, or at least finite.
  static Numbers unpack(const Memory& from, int64_t rows, const Shape& s, bool zero, T offset) {
    Numbers to(static_cast<size_t>(rows * s.channels * s.pixels()));
    for (int64_t i = 0; i < rows * s.pixels(); ++i) {
      for (int64_t c = 0; c < s.ld; ++c) {
        const T v = from[i * s.ld + c] - offset;
        if (c < s.channels) {
          to[((i / s.pixels()) * s.channels + c) * s.pixels() + i % s.pixels()] = v;
        } else if (zero) {
          EXPECT_EQ(v, T(0)) << "padding of a cotangent";
        } else {
          EXPECT_TRUE(std::isfinite(v)) << "padding of a value";
        }
      }
    }
    return to;
  }
  static T* data(Memory& m) { return m.empty() ? nullptr : m.data(); }

  Shape weights(const Numbers& w) const {
    Shape s = node_.in;
    if (static_cast<int64_t>(w.size()) == s.channels) s.height = s.width = 1;
    return s;
  }
  Memory parameter(const Numbers& w) const { return pack(w, 1, weights(w), T(0)); }
  Memory blank(bool wanted, int64_t rows, const Shape& s, T value) const {
    return Memory(wanted ? static_cast<size_t>(rows * s.row()) : 0, value);
  }

  LayerCall<T> start(const Inputs& in, const Inputs& d, const Numbers& gy, const Numbers& dgy,
                     const Options& options) {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    const Shape ws = weights(in.w);
    const bool two = !in.x2.empty(), dual = !dgy.empty();
    offset_ = options.add ? T(1) : T(0);
    const T fill = options.add ? T(1) : nan;
    memory_ = {
        pack(in.x, rows_, node_.in, T(0.75)),
        pack(in.x2, rows_, node_.in, T(-0.5)),
        parameter(in.w),
        parameter(in.b),
        parameter(in.mean),
        parameter(in.var),
        pack(options.no_dx ? Numbers{} : d.x, rows_, node_.in, T(-1.5)),
        pack(options.no_dx ? Numbers{} : d.x2, rows_, node_.in, T(2)),
        parameter(options.no_dw ? Numbers{} : d.w),
        parameter(options.no_db ? Numbers{} : d.b),
        pack(gy, rows_, node_.out, T(0)),
        pack(dgy, rows_, node_.out, T(0)),
        blank(true, rows_, node_.out, nan),
        blank(dual, rows_, node_.out, nan),
        blank(!options.no_gx, rows_, node_.in, fill),
        blank(!options.no_gx && two, rows_, node_.in, fill),
        blank(!options.no_dgx && dual, rows_, node_.in, fill),
        blank(!options.no_dgx && dual && two, rows_, node_.in, fill),
        blank(!options.no_gw && !in.w.empty(), 1, ws, offset_),
        blank(!options.no_gw && !in.b.empty(), 1, ws, offset_),
        blank(!options.no_dgw && dual && !in.w.empty(), 1, ws, offset_),
        blank(!options.no_dgw && dual && !in.b.empty(), 1, ws, offset_),
        Memory(static_cast<size_t>(layers::saved_bytes<T>(node_, rows_)) / sizeof(T), nan),
        Memory(static_cast<size_t>(layers::scratch_bytes<T>(node_, rows_)) / sizeof(T), nan)};
    LayerCall<T> call;
    call.node = &node_;
    call.rows = rows_;
    const T** const inputs[] = {&call.x,  &call.x2,  &call.w,  &call.b,  &call.mean, &call.var,
                                &call.dx, &call.dx2, &call.dw, &call.db, &call.gy,   &call.dgy};
    T** const outputs[] = {&call.y,    &call.dy, &call.gx, &call.gx2, &call.dgx,
                           &call.dgx2, &call.gw, &call.gb, &call.dgw, &call.dgb};
    size_t next = 0;
    for (const T** p : inputs) *p = data(memory_[next++]);
    for (T** p : outputs) *p = data(memory_[next++]);
    call.add_gx = call.add_gx2 = options.add;
    call.saved = data(memory_[next++]);
    call.scratch = data(memory_[next++]);
    call.seed = 11;
    call.pass = -1;
    call.task = 5;
    return call;
  }

  void read_values(Outputs* out) const {
    out->y = unpack(memory_[12], rows_, node_.out, false, T(0));
    if (!memory_[13].empty()) out->dy = unpack(memory_[13], rows_, node_.out, false, T(0));
  }
  void read_gradients(const LayerCall<T>&, Outputs* out) const {
    Numbers* const values[] = {&out->gx, &out->gx2, &out->dgx, &out->dgx2};
    for (size_t i = 0; i < 4; ++i) {
      const Memory& m = memory_[14 + i];
      if (!m.empty()) *values[i] = unpack(m, rows_, node_.in, true, offset_);
    }
    Numbers* const parameters[] = {&out->gw, &out->gb, &out->dgw, &out->dgb};
    Shape flat = node_.in;
    flat.height = flat.width = 1;
    for (size_t i = 0; i < 4; ++i) {
      const Memory& m = memory_[18 + i];
      if (m.empty()) continue;
      const bool image = static_cast<int64_t>(m.size()) != flat.row();
      *parameters[i] = unpack(m, 1, image ? node_.in : flat, true, offset_);
    }
  }

  Node node_;
  int64_t rows_;
  T offset_ = 0;
  std::vector<Memory> memory_;
};

// Gradients of <gy, layer> at one of its inputs, by central differences of the definition.
inline Numbers gradient(const Layer& layer, const Inputs& in, const Numbers& gy,
                        Numbers Inputs::* of) {
  constexpr Real kStep = 1e-6L;
  Numbers to((in.*of).size());
  Inputs at = in;
  for (size_t i = 0; i < to.size(); ++i) {
    const Real here = (in.*of)[i];
    (at.*of)[i] = here + kStep;
    const Real up = dot(gy, layer.define(at));
    (at.*of)[i] = here - kStep;
    to[i] = (up - dot(gy, layer.define(at))) / (2 * kStep);
    (at.*of)[i] = here;
  }
  return to;
}

inline void expect_same(const Outputs& got, const Outputs& want, Real tolerance) {
  const std::pair<Numbers Outputs::*, const char*> all[] = {
      {&Outputs::y, "y"},     {&Outputs::dy, "dy"},     {&Outputs::gx, "gx"},
      {&Outputs::gx2, "gx2"}, {&Outputs::gw, "gw"},     {&Outputs::gb, "gb"},
      {&Outputs::dgx, "dgx"}, {&Outputs::dgx2, "dgx2"}, {&Outputs::dgw, "dgw"},
      {&Outputs::dgb, "dgb"}};
  for (const auto& [member, name] : all) {
    if (!(got.*member).empty()) expect_near(got.*member, want.*member, tolerance, name);
  }
}

// All passes of a layer; d holds the tangents of in.
inline void check_layer(const Layer& layer, const Inputs& in, const Inputs& d, std::mt19937& random,
                        Real float_tolerance = 2e-5L) {
  Engine<double> engine(layer), wide(layer, 2);
  const Numbers y = layer.define(in);
  const Numbers gy = draw(random, size_of(y)), dgy = draw(random, size_of(y));
  expect_near(engine.forward(in), y, 1e-13L, "y");

  const Outputs back = engine.backward(in, gy);
  Outputs want;
  want.y = y;
  want.gx = gradient(layer, in, gy, &Inputs::x);
  want.gx2 = gradient(layer, in, gy, &Inputs::x2);
  want.gw = gradient(layer, in, gy, &Inputs::w);
  want.gb = gradient(layer, in, gy, &Inputs::b);
  expect_same(back, want, 1e-9L);

  const Outputs dual = engine.dual(in, d, gy, dgy);
  expect_same(back, dual, 1e-13L);
  constexpr Real kStep = 1e-5L;
  want.dy = slope(layer.define(moved(in, d, kStep)), layer.define(moved(in, d, -kStep)), kStep);
  const Outputs up = engine.backward(moved(in, d, kStep), moved(gy, dgy, kStep));
  const Outputs down = engine.backward(moved(in, d, -kStep), moved(gy, dgy, -kStep));
  want.dgx = slope(up.gx, down.gx, kStep);
  want.dgx2 = slope(up.gx2, down.gx2, kStep);
  want.dgw = slope(up.gw, down.gw, kStep);
  want.dgb = slope(up.gb, down.gb, kStep);
  expect_same(dual, want, 1e-8L);

  // Wider padding, places to add to, outputs that nobody wants.
  expect_same(wide.dual(in, d, gy, dgy), dual, 1e-13L);
  for (int k = 0; k < 4; ++k) {
    Options options;
    options.add = k % 2 == 0;
    options.no_gx = k == 0;
    options.no_dgx = k == 1;
    options.no_gw = k == 2;
    options.no_dgw = k == 3;
    expect_same(engine.dual(in, d, gy, dgy, options), dual, 1e-13L);
    expect_same(engine.backward(in, gy, options), back, 1e-13L);
  }
  // Tangents that are absent are zero.
  for (int k = 0; k < 3; ++k) {
    Options options;
    Inputs zeroed = d;
    const auto zero = [](Numbers& x) { std::fill(x.begin(), x.end(), 0); };
    if (k != 1) {
      options.no_dx = true;
      zero(zeroed.x);
      zero(zeroed.x2);
    }
    if (k != 2) {
      options.no_dw = options.no_db = true;
      zero(zeroed.w);
      zero(zeroed.b);
    }
    expect_same(engine.dual(in, d, gy, dgy, options), engine.dual(in, zeroed, gy, dgy), 1e-13L);
  }
  expect_same(Engine<float>(layer).dual(in, d, gy, dgy), dual, float_tolerance);
}

}  // namespace fastmeta::engine::FASTMETA_ISA
