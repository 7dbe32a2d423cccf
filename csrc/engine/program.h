// A program: the layers and the loss of a module that adapts, parsed from its text. Free of torch
// and of instruction sets.
//
// The text (fastmeta/ops/_engine_program.py writes it) has parts separated by ';':
//
//   fm1;in=1x28x28;conv2d(0,w=f0,b=f1,out=64,k=3x3,s=2x2,p=1x1,d=1x1,g=1);...;loss=mse()
//
// Node i (from 1) makes value i; value 0 is the input. Parameters are f<i> (adapted) or s<i>
// (shared, does not adapt).
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace fastmeta::engine {

enum class Kind : int {
  kLinear,
  kConv2d,
  kBatchNorm,
  kLayerNorm,
  kGroupNorm,
  kRelu,
  kLeakyRelu,
  kElu,
  kGelu,
  kSilu,
  kTanh,
  kSigmoid,
  kSoftplus,
  kMaxPool,
  kAvgPool,
  kMeanPool,
  kFlatten,
  kDropout,
  kAdd,
};

enum class LossKind : int { kCrossEntropy, kMse, kHuber, kBce };

// A reference from a node: which list, which entry; index -1 where the layer has none.
struct ParamRef {
  bool adapted = false;
  int index = -1;
  explicit operator bool() const { return index >= 0; }
};

struct Shape {
  int64_t channels = 0, height = 1, width = 1;
  bool flat = true;  // [features], not [channels, height, width]
  int64_t ld = 0;  // channels as stored: a multiple of the vector width, or channels (input alone)
  // Where not 0, the value lies as [channels][rows], rows padded to a multiple of this.
  int64_t lanes = 0;
  int64_t pixels() const { return height * width; }
  int64_t row() const { return pixels() * ld; }  // numbers a row takes in memory
  int64_t padded_rows(int64_t rows) const { return (rows + lanes - 1) / lanes * lanes; }
  // Numbers that `rows` rows take.
  int64_t size(int64_t rows) const {
    return lanes > 0 ? channels * padded_rows(rows) : rows * row();
  }
};

struct Node {
  Kind kind;
  int input = 0, input2 = -1;  // value numbers
  Shape in, out;
  ParamRef w, b, mean, var;
  // conv2d and pools: kernel, stride, padding, dilation (height, width)
  int64_t k[2] = {1, 1}, s[2] = {1, 1}, p[2] = {0, 0}, d[2] = {1, 1};
  int64_t groups = 1;
  std::optional<Kind> activation;  // batch_norm: what is applied to its output (Plan)
  bool ceil = false;               // pools
  bool include_pad = true;         // avg_pool
  bool tanh_gelu = false;          // gelu(approximate="tanh")
  double eps = 1e-5;               // norms
  double a = 0, threshold = 0;     // slope, alpha, beta, p of dropout
  int64_t id = 0;                  // dropout
};

struct Loss {
  LossKind kind = LossKind::kMse;
  double smoothing = 0, delta = 1;
  int64_t ignore = -100;
  ParamRef weight;
};

struct Program {
  std::vector<Node> nodes;
  std::vector<Shape> shapes;  // of every value: the input, then each node's
  Loss loss;
};

}  // namespace fastmeta::engine
