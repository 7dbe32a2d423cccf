// Bridge of the adaptation engine: parses programs, once each, checks, allocates. On CUDA the ops
// run their reference, so there is nothing here for that build.
#if !defined(FASTMETA_CUDA)
#include <memory>
#include <mutex>
#include <unordered_map>

#include "common/torch_bridge.h"
#include "engine/adapt.h"
#include "engine/program_text.h"

namespace fastmeta::engine {
namespace {

using bridge::ScalarType;
using bridge::Tensor;
using Tensors = std::vector<Tensor>;

// Programs by their text. There are as many as a process has kinds of models.
std::shared_ptr<const Program> program_of(const std::string& text) {
  static std::mutex mutex;
  static std::unordered_map<std::string, std::shared_ptr<const Program>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& program = known[text];
  if (program == nullptr) program = std::make_shared<const Program>(ProgramText::parse(text));
  return program;
}

enum Wanted : int64_t { kFast = 1, kShared = 2, kRates = 4, kSupportX = 8, kQueryX = 16 };

std::vector<int64_t> row_shape(const Shape& s) {
  if (s.flat) return {s.channels};
  return {s.channels, s.height, s.width};
}
std::vector<int64_t> concatenate(std::vector<int64_t> first, const std::vector<int64_t>& more) {
  first.insert(first.end(), more.begin(), more.end());
  return first;
}
std::vector<int64_t> shape_of(const Tensor& tensor) {
  std::vector<int64_t> shape(tensor.dim());
  for (int64_t d = 0; d < tensor.dim(); ++d) shape[d] = tensor.size(d);
  return shape;
}

// The inputs of a call, contiguous and checked, and the Adapt that points to them.
class Inputs {
 public:
  Inputs(const std::string& program, const Tensors& fast, const Tensors& shared,
         const Tensor& rates, const Tensor& support_x, const Tensor& support_y,
         const Tensor& query_x, int64_t steps, int64_t seed)
      : program_(program_of(program)) {
    STD_TORCH_CHECK(!fast.empty(), "fastmeta: fast is empty");
    STD_TORCH_CHECK(support_x.dim() >= 2 && query_x.dim() >= 2 && rates.dim() == 2,
                    "fastmeta: support_x, query_x or rates have an unexpected shape");
    STD_TORCH_CHECK(steps >= 0, "fastmeta: steps is negative");
    dtype_ = fast[0].scalar_type();
    STD_TORCH_CHECK(dtype_ == ScalarType::Float || dtype_ == ScalarType::Double,
                    "fastmeta: the engine takes float32 and float64");
    args.dtype = bridge::dtype_of(fast[0]);
    args.program = program_.get();
    args.num_fast = hold_all(fast, "fast", &fast_);
    for (const Tensor& tensor : fast) {
      fast_numel_.push_back(tensor.numel());
      fast_numbers_ += tensor.numel();
    }
    for (const Tensor& tensor : shared) shared_numel_.push_back(tensor.numel());
    check_parameters(fast, shared);
    args.fast_numel = fast_numel_.data();
    args.shared_numel = shared_numel_.data();
    args.num_shared = hold_all(shared, "shared", &shared_);
    args.fast = fast_.data();
    args.shared = shared_.data();
    args.tasks = support_x.size(0);
    args.supports = support_x.size(1);
    args.queries = query_x.size(1);
    args.steps = steps;
    args.rates = hold(rates, "rates", dtype_);
    args.rate_rows = rates.size(0);
    args.rate_cols = rates.size(1);
    const auto in = row_shape(program_->shapes.front());
    bridge::check_shape(support_x, "support_x", concatenate({args.tasks, args.supports}, in));
    bridge::check_shape(query_x, "query_x", concatenate({args.tasks, args.queries}, in));
    args.support_x = hold(support_x, "support_x", dtype_);
    args.query_x = hold(query_x, "query_x", dtype_);
    args.support_y = target(support_y, "support_y", args.supports);
    args.seed = static_cast<uint64_t>(seed);
  }

  const void* target(const Tensor& y, const char* name, int64_t rows) {
    std::vector<int64_t> shape{args.tasks, rows};
    const bool labels = program_->loss.kind == LossKind::kCrossEntropy;
    if (!labels) shape = concatenate(shape, row_shape(program_->shapes.back()));
    bridge::check_shape(y, name, shape);
    const void* data = hold(y, name, labels ? ScalarType::Long : dtype_);
    if (labels) check_labels(static_cast<const int64_t*>(data), args.tasks * rows, name);
    return data;
  }

  // The tensor's numbers in order: its own, for as long as it lives, or those of a copy.
  const void* hold(const Tensor& tensor, const char* name, ScalarType dtype) {
    bridge::check_dtype(tensor, name, dtype);
    if (tensor.is_contiguous()) return tensor.const_data_ptr();
    copies_.push_back(bridge::contiguous(tensor));
    return copies_.back().const_data_ptr();
  }

  std::vector<int64_t> prediction_shape() const {
    return concatenate({args.tasks, args.queries}, row_shape(program_->shapes.back()));
  }
  std::vector<int64_t> trajectory_shape() const { return {args.tasks, args.steps, fast_numbers_}; }
  ScalarType dtype() const { return dtype_; }

  Adapt args{};

 private:
  // Whether each parameter has the shape that torch's layer has it in.
  void check_parameters(const Tensors& fast, const Tensors& shared) const {
    const auto check = [&](const ParamRef& ref, std::initializer_list<int64_t> size) {
      if (!ref) return;
      const Tensors& list = ref.adapted ? fast : shared;
      STD_TORCH_CHECK(ref.index < static_cast<int>(list.size()),
                      "fastmeta: the program names a parameter that was not given");
      const Tensor& tensor = list[ref.index];
      bool same = tensor.dim() == static_cast<int64_t>(size.size());
      for (size_t i = 0; same && i < size.size(); ++i) same = tensor.size(i) == size.begin()[i];
      STD_TORCH_CHECK(same, "fastmeta: ", ref.adapted ? "fast[" : "shared[", ref.index,
                      "] has an unexpected shape");
    };
    for (const Node& n : program_->nodes) {
      const int64_t inputs = n.in.channels, outputs = n.out.channels;
      if (n.kind == Kind::kLinear) {
        check(n.w, {outputs, inputs});
      } else if (n.kind == Kind::kConv2d) {
        check(n.w, {outputs, inputs / n.groups, n.k[0], n.k[1]});
      } else if (n.kind == Kind::kLayerNorm && !n.in.flat) {
        for (const ParamRef& ref : {n.w, n.b}) check(ref, {inputs, n.in.height, n.in.width});
        continue;
      } else {
        check(n.w, {inputs});
      }
      for (const ParamRef& ref : {n.b, n.mean, n.var}) check(ref, {outputs});
    }
    check(program_->loss.weight, {program_->shapes.back().channels});
  }
  int64_t hold_all(const Tensors& tensors, const char* name, std::vector<const void*>* out) {
    for (const Tensor& tensor : tensors) out->push_back(hold(tensor, name, dtype_));
    return static_cast<int64_t>(tensors.size());
  }
  void check_labels(const int64_t* labels, int64_t count, const char* name) const {
    const int64_t classes = program_->shapes.back().channels, ignore = program_->loss.ignore;
    const auto bad = [=](int64_t y) { return (y != ignore) & ((y < 0) | (y >= classes)); };
    bool any = false;  // without a way out the loop is one of vectors
    for (int64_t i = 0; i < count; ++i) any |= bad(labels[i]);
    if (!any) return;
    STD_TORCH_CHECK(false, "fastmeta: ", name, " must be labels in [0, ", classes, ") or ", ignore,
                    ", got ", *std::find_if(labels, labels + count, bad));
  }

  std::shared_ptr<const Program> program_;
  ScalarType dtype_;
  int64_t fast_numbers_ = 0;
  std::vector<int64_t> fast_numel_, shared_numel_;
  std::vector<Tensor> copies_;
  std::vector<const void*> fast_, shared_;
};

// The gradients that go out: tensors of the asked shapes, and of shape [0] where nobody asked.
class Outputs {
 public:
  Outputs(const Inputs& in, const Tensors& fast, const Tensors& shared, const Tensor& rates,
          const Tensor& support_x, const Tensor& query_x, bool first_order, int64_t wanted)
      : like_(fast[0]), dtype_(in.dtype()) {
    gradients.first_order = first_order;
    list(fast, wanted & kFast, &grad_fast, &fast_, false);
    list(shared, wanted & kShared, &grad_shared, &shared_, true);
    gradients.fast = wanted & kFast ? fast_.data() : nullptr;
    gradients.shared = wanted & kShared && !shared.empty() ? shared_.data() : nullptr;
    one(rates, wanted & kRates, &grad_rates, &gradients.rates);
    one(support_x, wanted & kSupportX, &grad_support_x, &gradients.support_x);
    one(query_x, wanted & kQueryX, &grad_query_x, &gradients.query_x);
  }

  AdaptGradients gradients{};
  Tensors grad_fast, grad_shared, grad_rates, grad_support_x,
      grad_query_x;  // lists of one, the last

 private:
  Tensor make(const Tensor& like, bool wanted) const {
    if (wanted) return bridge::empty(like_, like.sizes().data(), like.dim(), dtype_);
    const int64_t none = 0;
    return bridge::empty(like_, &none, 1, dtype_);
  }
  void one(const Tensor& like, bool wanted, Tensors* out, void** data) const {
    out->push_back(make(like, wanted));
    if (wanted) *data = out->back().mutable_data_ptr();
  }
  // Zeros where the program may leave a gradient alone: of what it does not use.
  void list(const Tensors& like, bool wanted, Tensors* out, std::vector<void*>* data, bool zeros) {
    for (const Tensor& tensor : like) {
      Tensor made = make(tensor, wanted);
      if (wanted && zeros) torch::stable::zero_(made);
      data->push_back(made.mutable_data_ptr());
      out->push_back(made);
    }
  }

  const Tensor like_;
  ScalarType dtype_;
  std::vector<void*> fast_, shared_;
};

std::tuple<Tensor, Tensors, Tensor> adapt(const bridge::Text& program, Tensors fast, Tensors shared,
                                          Tensor rates, Tensor support_x, Tensor support_y,
                                          Tensor query_x, int64_t steps, int64_t seed,
                                          bool /*first_order*/, bool weights, bool record) {
  Inputs in(program.value, fast, shared, rates, support_x, support_y, query_x, steps, seed);
  Tensor prediction = bridge::empty(fast[0], in.prediction_shape(), in.dtype());
  Tensors adapted;
  std::vector<void*> data;
  for (const Tensor& tensor : fast) {
    adapted.push_back(bridge::empty(
        fast[0], weights ? concatenate({in.args.tasks}, shape_of(tensor)) : std::vector<int64_t>{0},
        in.dtype()));
    data.push_back(adapted.back().mutable_data_ptr());
  }
  Tensor trajectory =
      bridge::empty(fast[0], record ? in.trajectory_shape() : std::vector<int64_t>{0}, in.dtype());
  in.args.prediction = prediction.mutable_data_ptr();
  in.args.adapted = weights ? data.data() : nullptr;
  in.args.trajectory = record ? trajectory.mutable_data_ptr() : nullptr;
  FASTMETA_DISPATCH(current_isa(), engine, adapt, in.args, bridge::parallel_for);
  return {prediction, adapted, trajectory};
}

std::tuple<Tensors, Tensors, Tensor, Tensor, Tensor> adapt_backward(
    const bridge::Text& program, Tensors fast, Tensors shared, Tensor rates, Tensor support_x,
    Tensor support_y, Tensor query_x, int64_t steps, int64_t seed, bool first_order, int64_t wanted,
    Tensor trajectory, Tensor grad_prediction, Tensors grad_adapted) {
  Inputs in(program.value, fast, shared, rates, support_x, support_y, query_x, steps, seed);
  bridge::check_shape(trajectory, "trajectory", in.trajectory_shape());
  Outputs out(in, fast, shared, rates, support_x, query_x, first_order, wanted);
  in.args.trajectory =
      const_cast<void*>(in.hold(trajectory, "trajectory", in.dtype()));  // read alone here
  const auto undefined = [](const Tensor& t) { return t.dim() == 1 && t.size(0) == 0; };
  if (!undefined(grad_prediction)) {
    bridge::check_shape(grad_prediction, "grad_prediction", in.prediction_shape());
    out.gradients.prediction = in.hold(grad_prediction, "grad_prediction", in.dtype());
  }
  STD_TORCH_CHECK(grad_adapted.size() == fast.size(), "fastmeta: lists of unequal length");
  std::vector<const void*> adapted(fast.size(), nullptr);
  for (size_t i = 0; i < fast.size(); ++i) {
    if (undefined(grad_adapted[i])) continue;
    bridge::check_shape(grad_adapted[i], "grad_adapted",
                        concatenate({in.args.tasks}, shape_of(fast[i])));
    adapted[i] = in.hold(grad_adapted[i], "grad_adapted", in.dtype());
    out.gradients.adapted = adapted.data();
  }
  FASTMETA_DISPATCH(current_isa(), engine, adapt_backward, in.args, out.gradients,
                    bridge::parallel_for);
  return {out.grad_fast, out.grad_shared, out.grad_rates[0], out.grad_support_x[0],
          out.grad_query_x[0]};
}

std::tuple<Tensor, Tensors, Tensors, Tensor, Tensor, Tensor> meta_step(
    const bridge::Text& program, Tensors fast, Tensors shared, Tensor rates, Tensor support_x,
    Tensor support_y, Tensor query_x, Tensor query_y, int64_t steps, int64_t seed, bool first_order,
    int64_t wanted) {
  Inputs in(program.value, fast, shared, rates, support_x, support_y, query_x, steps, seed);
  in.args.query_y = in.target(query_y, "query_y", in.args.queries);
  Outputs out(in, fast, shared, rates, support_x, query_x, first_order, wanted);
  Tensor loss = bridge::empty(fast[0], {}, in.dtype());
  in.args.loss = loss.mutable_data_ptr();
  FASTMETA_DISPATCH(current_isa(), engine, meta_step, in.args, out.gradients, bridge::parallel_for);
  return {loss,
          out.grad_fast,
          out.grad_shared,
          out.grad_rates[0],
          out.grad_support_x[0],
          out.grad_query_x[0]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, FASTMETA_DEVICE_KEY, m) {
  m.impl("adapt", TORCH_BOX(&adapt));
  m.impl("adapt_backward", TORCH_BOX(&adapt_backward));
  m.impl("meta_step", TORCH_BOX(&meta_step));
}

}  // namespace fastmeta::engine
#endif
