// Parses the text of a program (program.h has the grammar) and infers every shape.
#pragma once
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "engine/program.h"

namespace fastmeta::engine {

class ProgramText {
 public:
  static Program parse(const std::string& text) { return ProgramText(text).run(); }

 private:
  using Keys = std::map<std::string_view, std::string_view>;

  explicit ProgramText(const std::string& text) : text_(text) {}

  [[noreturn]] void fail(const std::string& what) const {
    throw std::invalid_argument("fastmeta: program: " + what + " in '" + text_ + "'");
  }

  static std::vector<std::string_view> split(std::string_view text, char at) {
    std::vector<std::string_view> parts;
    for (size_t begin = 0;;) {
      const size_t end = text.find(at, begin);
      parts.push_back(text.substr(begin, end == text.npos ? text.npos : end - begin));
      if (end == text.npos) return parts;
      begin = end + 1;
    }
  }

  int64_t integer(std::string_view text) const {
    const std::string word(text);
    char* end = nullptr;
    const int64_t value = std::strtoll(word.c_str(), &end, 10);
    if (word.empty() || *end != '\0') fail("no integer: '" + word + "'");
    return value;
  }

  double real(std::string_view text) const {
    const std::string word(text);
    char* end = nullptr;
    const double value = std::strtod(word.c_str(), &end);
    if (word.empty() || *end != '\0') fail("no number: '" + word + "'");
    return value;
  }

  void pair(const Keys& keys, const char* key, int64_t* out) const {
    const auto found = keys.find(key);
    if (found == keys.end()) return;
    const auto parts = split(found->second, 'x');
    if (parts.size() != 2) fail(std::string("no pair: ") + key);
    out[0] = integer(parts[0]);
    out[1] = integer(parts[1]);
  }

  ParamRef param(const Keys& keys, const char* key) const {
    const auto found = keys.find(key);
    if (found == keys.end()) return {};
    const std::string_view word = found->second;
    if (word.size() < 2 || (word[0] != 'f' && word[0] != 's')) fail("no parameter");
    return {word[0] == 'f', static_cast<int>(integer(word.substr(1)))};
  }

  // "name(inputs,key=value,...)" -> name; inputs come under the key "".
  std::string_view call(std::string_view part, Keys* keys) const {
    const size_t open = part.find('(');
    if (open == part.npos || part.back() != ')') fail("no call: '" + std::string(part) + "'");
    for (std::string_view word : split(part.substr(open + 1, part.size() - open - 2), ',')) {
      const size_t equal = word.find('=');
      if (equal == word.npos) {
        (*keys)[""] = word;
      } else {
        (*keys)[word.substr(0, equal)] = word.substr(equal + 1);
      }
    }
    return part.substr(0, open);
  }

  Program run() {
    const auto parts = split(text_, ';');
    if (parts.size() < 4 || parts[0] != "fm1" || !parts[1].starts_with("in=") ||
        !parts.back().starts_with("loss=")) {
      fail("not of the form fm1;in=...;nodes;loss=...");
    }
    const auto dims = split(parts[1].substr(3), 'x');
    Shape input;
    if (dims.size() != 1 && dims.size() != 3) fail("input of neither 1 nor 3 dimensions");
    input.channels = integer(dims[0]);
    input.flat = dims.size() == 1;
    if (!input.flat) {
      input.height = integer(dims[1]);
      input.width = integer(dims[2]);
    }
    program_.shapes.push_back(input);
    for (size_t i = 2; i + 1 < parts.size(); ++i) node(parts[i]);
    loss(parts.back().substr(5));
    return program_;
  }

  void loss(std::string_view text) {
    Keys keys;
    const std::string_view name = call(text, &keys);
    Loss& loss = program_.loss;
    if (name == "cross_entropy") {
      loss.kind = LossKind::kCrossEntropy;
      if (!program_.shapes.back().flat) fail("cross_entropy of an image");
    } else if (name == "mse") {
      loss.kind = LossKind::kMse;
    } else if (name == "huber") {
      loss.kind = LossKind::kHuber;
    } else if (name == "bce") {
      loss.kind = LossKind::kBce;
    } else {
      fail("unknown loss");
    }
    if (keys.contains("smoothing")) loss.smoothing = real(keys["smoothing"]);
    if (keys.contains("delta")) loss.delta = real(keys["delta"]);
    if (keys.contains("ignore")) loss.ignore = integer(keys["ignore"]);
    loss.weight = param(keys, "weight");
    if (loss.weight.adapted) fail("class weights that adapt");
  }

  void node(std::string_view part) {
    static const std::map<std::string_view, Kind> kinds = {{"linear", Kind::kLinear},
                                                           {"conv2d", Kind::kConv2d},
                                                           {"batch_norm", Kind::kBatchNorm},
                                                           {"layer_norm", Kind::kLayerNorm},
                                                           {"group_norm", Kind::kGroupNorm},
                                                           {"relu", Kind::kRelu},
                                                           {"leaky_relu", Kind::kLeakyRelu},
                                                           {"elu", Kind::kElu},
                                                           {"gelu", Kind::kGelu},
                                                           {"silu", Kind::kSilu},
                                                           {"tanh", Kind::kTanh},
                                                           {"sigmoid", Kind::kSigmoid},
                                                           {"softplus", Kind::kSoftplus},
                                                           {"max_pool", Kind::kMaxPool},
                                                           {"avg_pool", Kind::kAvgPool},
                                                           {"mean_pool", Kind::kMeanPool},
                                                           {"flatten", Kind::kFlatten},
                                                           {"dropout", Kind::kDropout},
                                                           {"add", Kind::kAdd}};
    Keys keys;
    const auto found = kinds.find(call(part, &keys));
    if (found == kinds.end()) fail("unknown kind: '" + std::string(part) + "'");
    Node n;
    n.kind = found->second;
    const int values = static_cast<int>(program_.shapes.size());
    const auto inputs = split(keys[""], '+');
    if (inputs.size() != (n.kind == Kind::kAdd ? 2 : 1)) fail("wrong number of inputs");
    n.input = static_cast<int>(integer(inputs[0]));
    if (inputs.size() == 2) n.input2 = static_cast<int>(integer(inputs[1]));
    const auto known = [&](int input) { return input >= 0 && input < values; };
    if (!known(n.input) || (n.kind == Kind::kAdd && !known(n.input2))) {
      fail("input of the future");
    }
    n.w = param(keys, "w");
    n.b = param(keys, "b");
    n.mean = param(keys, "mean");
    n.var = param(keys, "var");
    pair(keys, "k", n.k);
    n.s[0] = n.k[0];
    n.s[1] = n.k[1];
    if (n.kind == Kind::kConv2d) n.s[0] = n.s[1] = 1;
    pair(keys, "s", n.s);
    if (n.kind == Kind::kDropout) {
      n.a = real(keys["p"]);
    } else {
      pair(keys, "p", n.p);
    }
    pair(keys, "d", n.d);
    if (keys.contains("g")) n.groups = integer(keys["g"]);
    if (keys.contains("groups")) n.groups = integer(keys["groups"]);
    if (n.groups < 1) fail("groups out of range");
    if (static_cast<bool>(n.mean) != static_cast<bool>(n.var) || n.mean.adapted || n.var.adapted) {
      fail("statistics that adapt, or one without the other");
    }
    if (keys.contains("ceil")) n.ceil = integer(keys["ceil"]) != 0;
    if (keys.contains("include_pad")) n.include_pad = integer(keys["include_pad"]) != 0;
    if (keys.contains("eps")) n.eps = real(keys["eps"]);
    for (const char* key : {"slope", "alpha", "beta"}) {
      if (keys.contains(key)) n.a = real(keys[key]);
    }
    if (keys.contains("threshold")) n.threshold = real(keys["threshold"]);
    if (keys.contains("id")) n.id = integer(keys["id"]);
    n.tanh_gelu = keys.contains("approximate") && keys["approximate"] == "tanh";
    n.in = program_.shapes[n.input];
    n.out = out_shape(n, keys);
    if (n.out.channels < 0) fail("a negative number of channels");
    program_.nodes.push_back(n);
    program_.shapes.push_back(n.out);
  }

  int64_t window(const Node& n, int axis, int64_t size) const {
    for (const int64_t value : {n.k[axis], n.s[axis], n.d[axis], n.p[axis] + 1}) {
      if (value < 1 || value > kMostPixels) fail("window out of range");
    }
    const int64_t span = size + 2 * n.p[axis] - n.d[axis] * (n.k[axis] - 1) - 1;
    if (span < 0) fail("window larger than its input");
    int64_t out = (n.ceil ? (span + n.s[axis] - 1) / n.s[axis] : span / n.s[axis]) + 1;
    // The last window starts inside the input or its left padding.
    if (n.ceil && (out - 1) * n.s[axis] >= size + n.p[axis]) --out;
    return out;
  }

  Shape out_shape(const Node& n, Keys& keys) const {
    Shape out = n.in;
    switch (n.kind) {
      case Kind::kLinear:
        if (!n.in.flat) fail("linear of an image");
        out.channels = integer(keys["out"]);
        if (!n.w) fail("linear without a weight");
        break;
      case Kind::kConv2d:
        if (n.in.flat || !n.w) fail("conv2d of flat rows or without a weight");
        out.channels = integer(keys["out"]);
        if (n.groups < 1 || n.in.channels % n.groups != 0 || out.channels % n.groups != 0) {
          fail("groups that do not divide the channels");
        }
        [[fallthrough]];
      case Kind::kMaxPool:
      case Kind::kAvgPool:
        if (n.in.flat) fail("a window over flat rows");
        out.height = window(n, 0, n.in.height);
        out.width = window(n, 1, n.in.width);
        break;
      case Kind::kMeanPool:
        if (n.in.flat) fail("mean_pool of flat rows");
        out.height = out.width = 1;
        break;
      case Kind::kFlatten:
        out = Shape{};
        out.channels = n.in.channels * n.in.pixels();
        break;
      case Kind::kGroupNorm:
        if (n.groups < 1 || n.in.channels % n.groups != 0) fail("groups that do not divide");
        break;
      case Kind::kAdd: {
        const Shape& other = program_.shapes[n.input2];
        if (other.channels != n.in.channels || other.height != n.in.height ||
            other.width != n.in.width || other.flat != n.in.flat) {
          fail("add of unlike shapes");
        }
        break;
      }
      default:
        break;
    }
    return out;
  }

  static constexpr int64_t kMostPixels = 1 << 20;  // a side of a window: no product overflows
  const std::string& text_;
  Program program_;
};

}  // namespace fastmeta::engine
