// Layers of csrc/engine/layers against their definitions in long double: values, gradients, and the
// tangents of both.
//
// Tests the vectors of the flags this file is compiled with; compile it once per instruction set
// with -DFASTMETA_ISA=<name> to test each.
#ifndef FASTMETA_ISA
#define FASTMETA_ISA engine_layers_test
#endif
#include "engine_layer_util.h"

namespace fastmeta::engine::FASTMETA_ISA {
namespace {

#define FASTMETA_CONCAT_(a, b) a##b
#define FASTMETA_CONCAT(a, b) FASTMETA_CONCAT_(a, b)
#define FASTMETA_TEST_(suite, name) TEST(suite, name)
#define FASTMETA_TEST(name) FASTMETA_TEST_(FASTMETA_CONCAT(EngineLayers_, FASTMETA_ISA), name)

struct Sizes {
  int64_t rows, channels, height, width;
};
const std::vector<Sizes>& all_sizes() {
  static const std::vector<Sizes> sizes{{1, 1, 1, 2},  {3, 1, 1, 1},  {1, 5, 1, 1},
                                        {7, 3, 2, 3},  {2, 8, 1, 1},  {4, 8, 2, 2},
                                        {3, 17, 2, 1}, {70, 2, 1, 1}, {1, 3, 5, 13}};
  return sizes;
}

Layer make(Kind kind, const Sizes& s) {
  Layer layer;
  layer.rows = s.rows;
  layer.node.kind = kind;
  layer.node.in = layer.node.out = shape(s.channels, s.height, s.width);
  return layer;
}
int64_t size(const Layer& layer) {
  return layer.rows * layer.node.in.channels * layer.node.in.pixels();
}

// ---- elementwise
void check_elementwise(Kind kind, const std::function<void(Node*)>& set,
                       Real (*f)(Real, const Node&)) {
  std::mt19937 random(1);
  for (const Sizes& s : all_sizes()) {
    Layer layer = make(kind, s);
    set(&layer.node);
    layer.define = [&](const Inputs& in) {
      Numbers y = in.x;
      for (Real& v : y) v = f(v, layer.node);
      return y;
    };
    Inputs in, d;
    in.x = draw(random, size(layer));
    for (Real& v : in.x) v *= 2;
    d.x = draw(random, size(layer));
    check_layer(layer, in, d, random);
  }
}
Real normal_cdf(Real x) { return 0.5L * std::erfc(-x / std::sqrt(2.0L)); }

FASTMETA_TEST(Relu) {
  check_elementwise(Kind::kRelu, [](Node*) {}, [](Real x, const Node&) { return x > 0 ? x : 0; });
}
FASTMETA_TEST(LeakyRelu) {
  check_elementwise(
      Kind::kLeakyRelu, [](Node* n) { n->a = 0.25; },
      [](Real x, const Node& n) { return x > 0 ? x : n.a * x; });
}
FASTMETA_TEST(Elu) {
  check_elementwise(
      Kind::kElu, [](Node* n) { n->a = 1.5; },
      [](Real x, const Node& n) { return x > 0 ? x : n.a * std::expm1(x); });
}
FASTMETA_TEST(Tanh) {
  check_elementwise(Kind::kTanh, [](Node*) {}, [](Real x, const Node&) { return std::tanh(x); });
}
FASTMETA_TEST(Sigmoid) {
  check_elementwise(
      Kind::kSigmoid, [](Node*) {}, [](Real x, const Node&) { return 1 / (1 + std::exp(-x)); });
}
FASTMETA_TEST(Silu) {
  check_elementwise(
      Kind::kSilu, [](Node*) {}, [](Real x, const Node&) { return x / (1 + std::exp(-x)); });
}
FASTMETA_TEST(Softplus) {
  check_elementwise(
      Kind::kSoftplus,
      [](Node* n) {
        n->a = 1.5;
        n->threshold = 3;
      },
      [](Real x, const Node& n) {
        return n.a * x > n.threshold ? x : std::log1p(std::exp(n.a * x)) / n.a;
      });
}
FASTMETA_TEST(Gelu) {
  check_elementwise(
      Kind::kGelu, [](Node*) {}, [](Real x, const Node&) { return x * normal_cdf(x); });
}
FASTMETA_TEST(GeluTanh) {
  check_elementwise(
      Kind::kGelu, [](Node* n) { n->tanh_gelu = true; },
      [](Real x, const Node&) {
        const Real scale = std::sqrt(2 / 3.14159265358979323846L);
        return 0.5L * x * (1 + std::tanh(scale * (x + 0.044715L * x * x * x)));
      });
}

FASTMETA_TEST(ActivationsFarOutAndAtZero) {
  const auto at = [](Kind kind, double a, double x, bool tanh_gelu = false) {
    Layer layer = make(kind, {1, 1, 1, 1});
    layer.node.a = a;
    layer.node.threshold = 20;
    layer.node.tanh_gelu = tanh_gelu;
    Inputs in, d;
    in.x = d.x = {x};
    d.x[0] = 1;
    const Outputs out = Engine<float>(layer).dual(in, d, {1}, {0});
    return Numbers{out.y[0], out.gx[0], out.dgx[0]};
  };
  for (Kind kind : {Kind::kSilu, Kind::kGelu, Kind::kRelu}) {
    EXPECT_EQ(at(kind, 0, 1e6), (Numbers{1000000, 1, 0}));
    expect_near(at(kind, 0, -1e30), {0, 0, 0}, 1e-6L, "far below zero");
  }
  EXPECT_EQ(at(Kind::kGelu, 0, 1e30, true)[1], 1);
  EXPECT_EQ(at(Kind::kSoftplus, 1, 100), (Numbers{100, 1, 0}));
  EXPECT_EQ(at(Kind::kElu, 2, -1e30), (Numbers{-2, 0, 0}));
  EXPECT_EQ(at(Kind::kRelu, 0, 0)[1], 0);
  EXPECT_EQ(at(Kind::kElu, 2, 0)[1], 2);
  EXPECT_EQ(at(Kind::kLeakyRelu, 0.5, 0)[1], 0.5L);
  for (Kind kind : {Kind::kRelu, Kind::kElu, Kind::kGelu, Kind::kSoftplus, Kind::kTanh}) {
    EXPECT_TRUE(std::isnan(at(kind, 1, std::nan(""))[0]));
  }
}

// ---- norms
// Normalises x by statistics of sets of numbers: set_of(row, channel) names a number's set.
Numbers normalized(const Layer& layer, const Inputs& in,
                   const std::function<int64_t(int64_t, int64_t)>& set_of, int64_t sets) {
  const int64_t channels = layer.node.in.channels, pixels = layer.node.in.pixels();
  const auto set = [&](int64_t i) { return set_of(i / pixels / channels, i / pixels % channels); };
  const int64_t n = size_of(in.x);
  Numbers count(sets), mean(sets), var(sets), y = in.x;
  for (int64_t i = 0; i < n; ++i) count[set(i)] += 1, mean[set(i)] += in.x[i];
  for (int64_t s = 0; s < sets; ++s) mean[s] /= count[s];
  for (int64_t i = 0; i < n; ++i) {
    const Real d = in.x[i] - mean[set(i)];
    var[set(i)] += d * d / count[set(i)];
  }
  if (!in.mean.empty()) mean = in.mean, var = in.var;
  for (int64_t i = 0; i < n; ++i) {
    y[i] = (in.x[i] - mean[set(i)]) / std::sqrt(var[set(i)] + static_cast<Real>(layer.node.eps));
    const int64_t in_row = i % (channels * pixels);
    const bool image = size_of(in.w) != channels;
    if (!in.w.empty()) y[i] *= in.w[image ? in_row : in_row / pixels];
    if (!in.b.empty()) y[i] += in.b[image ? in_row : in_row / pixels];
  }
  return y;
}

void check_norm(Layer layer, const std::function<int64_t(int64_t, int64_t)>& set_of, int64_t sets,
                int64_t weights, bool running = false) {
  std::mt19937 random(2);
  layer.node.eps = 0.125;  // keeps the statistics of few numbers smooth
  layer.define = [&](const Inputs& in) { return normalized(layer, in, set_of, sets); };
  Inputs in, d;
  in.x = draw(random, size(layer), 1);
  d.x = draw(random, size(layer));
  if (running) {
    in.mean = draw(random, layer.node.in.channels);
    in.var = draw(random, layer.node.in.channels);
    for (Real& v : in.var) v = std::fabs(v);
  }
  check_layer(layer, in, d, random, 5e-5L);
  in.w = draw(random, weights);
  d.w = draw(random, weights);
  check_layer(layer, in, d, random, 5e-5L);
  in.b = draw(random, weights);
  d.b = draw(random, weights);
  check_layer(layer, in, d, random, 5e-5L);
}

FASTMETA_TEST(BatchNorm) {
  for (const Sizes& s : all_sizes()) {
    for (bool running : {false, true}) {
      check_norm(
          make(Kind::kBatchNorm, s), [](int64_t, int64_t c) { return c; }, s.channels, s.channels,
          running);
    }
  }
}
FASTMETA_TEST(BatchNormOfManyChannels) {
  const Sizes s{2, 75, 1, 2};
  check_norm(
      make(Kind::kBatchNorm, s), [](int64_t, int64_t c) { return c; }, s.channels, s.channels);
}
FASTMETA_TEST(LayerNorm) {
  for (const Sizes& s : all_sizes()) {
    check_norm(
        make(Kind::kLayerNorm, s), [](int64_t r, int64_t) { return r; }, s.rows,
        s.channels * s.height * s.width);
  }
}
FASTMETA_TEST(GroupNorm) {
  for (const auto& [s, groups] : std::vector<std::pair<Sizes, int64_t>>{{{2, 6, 2, 3}, 3},
                                                                        {{3, 6, 2, 1}, 1},
                                                                        {{1, 17, 1, 3}, 17},
                                                                        {{2, 12, 1, 1}, 2},
                                                                        {{1, 2, 10, 9}, 2}}) {
    Layer layer = make(Kind::kGroupNorm, s);
    layer.node.groups = groups;
    const int64_t width = s.channels / groups;
    check_norm(
        layer, [=, groups = groups](int64_t r, int64_t c) { return r * groups + c / width; },
        s.rows * groups, s.channels);
  }
}
// Sums of squares around a far mean lose nothing that the numbers still have.
FASTMETA_TEST(NormsFarFromZero) {
  for (Kind kind : {Kind::kBatchNorm, Kind::kLayerNorm, Kind::kGroupNorm}) {
    Layer layer = make(kind, {kind == Kind::kBatchNorm ? 300 : 1, 3, 20, 10});
    std::mt19937 random(5);
    Inputs in;
    in.x = draw(random, size(layer), 1000);
    const Numbers y = Engine<float>(layer).forward(in);
    expect_near(y, Engine<double>(layer).forward(in), 1e-4L, "y");
  }
}
FASTMETA_TEST(BatchNormWithoutSpreadOrEps) {
  Layer layer = make(Kind::kBatchNorm, {2, 3, 1, 1});
  layer.node.eps = 0;
  Inputs in;
  in.x = {1, 2, 3, 4, 5, 6};
  const Numbers y = Engine<float>(layer).forward(in);  // checks that padding lanes stay finite
  expect_near(y, {-1, -1, -1, 1, 1, 1}, 1e-6L, "y");
}

// ---- pools
struct Window {
  Sizes sizes;
  int64_t k[2], s[2], p[2], d[2];
  bool ceil;
};
const std::vector<Window>& windows() {
  static const std::vector<Window> all{
      {{2, 3, 4, 6}, {2, 2}, {2, 2}, {0, 0}, {1, 1}, false},
      {{1, 9, 5, 7}, {2, 3}, {2, 3}, {0, 0}, {1, 1}, false},
      {{2, 2, 5, 5}, {2, 2}, {2, 2}, {0, 0}, {1, 1}, true},
      {{1, 5, 6, 5}, {3, 3}, {2, 1}, {1, 1}, {1, 1}, false},
      {{1, 1, 7, 6}, {3, 2}, {2, 2}, {1, 1}, {2, 1}, true},
      {{3, 17, 3, 4}, {2, 2}, {3, 3}, {1, 1}, {1, 1}, true},
      {{1, 2, 1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, false},
  };
  return all;
}
int64_t outputs(const Window& v, int axis, int64_t size) {
  const int64_t span = size + 2 * v.p[axis] - v.d[axis] * (v.k[axis] - 1) - 1;
  int64_t out = (v.ceil ? ceil_div(span, v.s[axis]) : span / v.s[axis]) + 1;
  if (v.ceil && (out - 1) * v.s[axis] >= size + v.p[axis]) --out;
  return out;
}
Layer make_pool(Kind kind, const Window& v) {
  Layer layer = make(kind, v.sizes);
  for (int i = 0; i < 2; ++i) {
    layer.node.k[i] = v.k[i];
    layer.node.s[i] = v.s[i];
    layer.node.p[i] = v.p[i];
    layer.node.d[i] = kind == Kind::kMaxPool ? v.d[i] : 1;
  }
  layer.node.out.height = outputs(v, 0, v.sizes.height);
  layer.node.out.width = outputs(v, 1, v.sizes.width);
  return layer;
}
// One window at a time over an image that is padded in the mind: each tap is in the image, in its
// padding, or beyond.
Numbers pooled(const Layer& layer, const Numbers& x) {
  const Node& n = layer.node;
  Numbers y;
  for (int64_t plane = 0; plane < layer.rows * n.in.channels; ++plane) {
    for (int64_t o = 0; o < n.out.pixels(); ++o) {
      Real top = -std::numeric_limits<Real>::infinity(), sum = 0, inside = 0, padded = 0;
      for (int64_t t = 0; t < n.k[0] * n.k[1]; ++t) {
        const int64_t h = o / n.out.width * n.s[0] - n.p[0] + t / n.k[1] * n.d[0];
        const int64_t w = o % n.out.width * n.s[1] - n.p[1] + t % n.k[1] * n.d[1];
        if (h < n.in.height + n.p[0] && w < n.in.width + n.p[1]) padded += 1;
        if (h < 0 || w < 0 || h >= n.in.height || w >= n.in.width) continue;
        const Real v = x[(plane * n.in.height + h) * n.in.width + w];
        top = std::max(top, v);
        sum += v;
        inside += 1;
      }
      y.push_back(n.kind == Kind::kMaxPool ? top : sum / (n.include_pad ? padded : inside));
    }
  }
  return y;
}
FASTMETA_TEST(Pools) {
  std::mt19937 random(3);
  for (const Window& v : windows()) {
    for (int which = 0; which < 3; ++which) {
      const bool dilated = v.d[0] > 1;
      if (which > 0 && dilated) continue;
      Layer layer = make_pool(which == 0 ? Kind::kMaxPool : Kind::kAvgPool, v);
      layer.node.include_pad = which == 1;
      layer.define = [&](const Inputs& in) { return pooled(layer, in.x); };
      Inputs in, d;
      in.x = draw(random, size(layer));
      d.x = draw(random, size(layer));
      check_layer(layer, in, d, random);
    }
  }
}
FASTMETA_TEST(MaxPoolTiesAndNaN) {
  Layer layer = make_pool(Kind::kMaxPool, {{1, 1, 2, 4}, {2, 2}, {2, 2}, {0, 0}, {1, 1}, false});
  Inputs in;
  in.x = {1, 2, std::nan(""), 3, 2, 2, 5, std::nan("")};
  const Outputs out = Engine<float>(layer).backward(in, {1, 10});
  EXPECT_EQ(out.y[0], 2);
  EXPECT_TRUE(std::isnan(out.y[1]));
  EXPECT_EQ(out.gx, (Numbers{0, 1, 0, 0, 0, 0, 0, 10}));
  in.x.assign(8, -std::numeric_limits<Real>::infinity());
  EXPECT_EQ(Engine<double>(layer).backward(in, {1, 10}).gx, (Numbers{1, 0, 10, 0, 0, 0, 0, 0}));
}
FASTMETA_TEST(MeanPool) {
  std::mt19937 random(4);
  for (const Sizes& s : all_sizes()) {
    Layer layer = make(Kind::kMeanPool, s);
    layer.node.out = shape(s.channels);
    layer.define = [&](const Inputs& in) {
      Numbers y(static_cast<size_t>(s.rows * s.channels));
      const int64_t pixels = s.height * s.width;
      for (int64_t i = 0; i < size_of(in.x); ++i) y[i / pixels] += in.x[i] / pixels;
      return y;
    };
    Inputs in, d;
    in.x = draw(random, size(layer));
    d.x = draw(random, size(layer));
    check_layer(layer, in, d, random);
  }
}

// ---- shape and dropout
FASTMETA_TEST(FlattenAndAdd) {
  std::mt19937 random(6);
  std::vector<Sizes> sizes = all_sizes();
  sizes.push_back({2, 19, 3, 7});
  for (const Sizes& s : sizes) {
    Layer layer = make(Kind::kFlatten, s);
    layer.node.out = shape(s.channels * s.height * s.width);
    layer.define = [](const Inputs& in) { return in.x; };
    Inputs in, d;
    in.x = draw(random, size(layer));
    d.x = draw(random, size(layer));
    check_layer(layer, in, d, random);
    layer = make(Kind::kAdd, s);
    layer.define = [](const Inputs& given) { return moved(given.x, given.x2, 1); };
    in.x2 = draw(random, size(layer));
    d.x2 = draw(random, size(layer));
    check_layer(layer, in, d, random);
  }
}

FASTMETA_TEST(Dropout) {
  // Worked out from the definition with Python's integers.
  const uint64_t known = dropout::key_of(1, 2, -1, 3);
  EXPECT_EQ(dropout::mix(known + dropout::kGolden) >> 40, 0x524fc8u);
  EXPECT_EQ(dropout::mix(known + 2 * dropout::kGolden) >> 40, 0x10d136u);
  EXPECT_EQ(dropout::mix(known + 3 * dropout::kGolden) >> 40, 0x37e7cbu);
  std::mt19937 random(7);
  for (double p : {0.0, 0.3, 1.0}) {
    for (const Sizes& s : all_sizes()) {
      Layer layer = make(Kind::kDropout, s);
      layer.node.a = p;
      layer.node.id = 4;
      layer.define = [&](const Inputs& in) {
        Numbers y = in.x;
        for (size_t i = 0; i < y.size(); ++i) {
          const uint64_t key = dropout::key_of(11, 4, -1, 5);
          const uint64_t bits = dropout::mix(key + (i + 1) * dropout::kGolden) >> 40;
          const bool keep = p < 1 && static_cast<double>(bits) >= std::round(p * 0x1p24);
          y[i] = keep ? y[i] / (1 - static_cast<Real>(p)) : 0;
        }
        return y;
      };
      Inputs in, d;
      in.x = draw(random, size(layer));
      d.x = draw(random, size(layer));
      check_layer(layer, in, d, random);
    }
  }
}

FASTMETA_TEST(NoRows) {
  for (Kind kind : {Kind::kRelu, Kind::kBatchNorm, Kind::kLayerNorm, Kind::kGroupNorm,
                    Kind::kMeanPool, Kind::kFlatten, Kind::kDropout, Kind::kAdd}) {
    Layer layer = make(kind, {0, 3, 1, 1});
    Inputs in;
    in.w = in.b = {1, 2, 3};
    const Outputs out = Engine<double>(layer).backward(in, {});
    EXPECT_EQ(out.gw, (Numbers{0, 0, 0}));
  }
}

}  // namespace
}  // namespace fastmeta::engine::FASTMETA_ISA
