// Bridge of matching_attention and matching_nll: checks, allocation, registration.
#include <array>
#include <utility>

#include "common/torch_bridge.h"
#include "matching/matching_attention.h"

namespace fastmeta::matching {
namespace {

using bridge::ScalarType;
using bridge::Tensor;
using OptionalTensor = std::optional<Tensor>;

Similarity similarity_of(const std::string& name) {
  if (name == "dot") return Similarity::kDot;
  if (name == "cosine") return Similarity::kCosine;
  if (name == "sqeuclidean") return Similarity::kSqEuclidean;
  if (name == "euclidean") return Similarity::kEuclidean;
  STD_TORCH_CHECK(name == "additive", "fastmeta: unknown similarity ", name);
  return Similarity::kAdditive;
}

// Contiguous operands of a call, kept alive while the kernel's plain pointers are in use.
struct Operands {
  Tensor query, support, labels, scale;
  OptionalTensor targets, weight;
  Problem problem;

  Operands(const Tensor& q, const Tensor& s, const Tensor& y, const OptionalTensor& t,
           const Tensor& alpha, const OptionalTensor& w, int64_t num_classes,
           const std::string& similarity)
      : query(bridge::contiguous(q)),
        support(bridge::contiguous(s)),
        labels(bridge::contiguous(y)),
        scale(bridge::contiguous(alpha)) {
    STD_TORCH_CHECK(q.dim() == 3, "fastmeta: query must be [T, Q, D]");
    STD_TORCH_CHECK(num_classes >= 1 && num_classes <= INT32_MAX,
                    "fastmeta: num_classes out of range");  // kernels hold classes in 32 bits
    const int64_t tasks = q.size(0), queries = q.size(1), dim = q.size(2);
    const int64_t supports = s.dim() == 3 ? s.size(1) : 0;
    const ScalarType acc = bridge::acc_type(q);
    bridge::check_shape(s, "support", {tasks, supports, dim});
    bridge::check_dtype(s, "support", q.scalar_type());
    bridge::check_shape(y, "labels", {tasks, supports});
    bridge::check_dtype(y, "labels", ScalarType::Long);
    const bool shared_scale = alpha.dim() == 1 && alpha.size(0) == 1;
    bridge::check_shape(alpha, "scale", {shared_scale ? 1 : tasks});
    bridge::check_dtype(alpha, "scale", acc);
    problem = Problem{bridge::dtype_of(q),
                      similarity_of(similarity),
                      tasks,
                      queries,
                      supports,
                      num_classes,
                      dim,
                      query.const_data_ptr(),
                      support.const_data_ptr(),
                      labels.const_data_ptr<int64_t>(),
                      nullptr,
                      scale.const_data_ptr(),
                      shared_scale ? 0 : 1,
                      nullptr,
                      0};
#if !defined(FASTMETA_CUDA)
    problem.bf16_dots = current_isa() == Isa::kAvx512Bf16;
#endif
    if (t.has_value()) {
      bridge::check_shape(*t, "targets", {tasks, queries});
      bridge::check_dtype(*t, "targets", ScalarType::Long);
      targets = bridge::contiguous(*t);
      problem.targets = targets->const_data_ptr<int64_t>();
    }
    STD_TORCH_CHECK(additive() == w.has_value(), "fastmeta: weight goes with additive similarity");
    if (additive()) {
      const bool shared_weight = w->dim() == 2 && w->size(0) == 1;
      bridge::check_shape(*w, "weight", {shared_weight ? 1 : tasks, dim});
      bridge::check_dtype(*w, "weight", acc);
      weight = bridge::contiguous(*w);
      problem.weight = weight->const_data_ptr();
      problem.weight_stride = shared_weight ? 0 : dim;
    }
  }

  bool additive() const { return problem.similarity == Similarity::kAdditive; }
};

#if defined(FASTMETA_CUDA)
// The kernels want each task's supports in class order: sorted by a kernel where a task has few,
// else by torch, on the stream, in Python's fastmeta::class_order.
struct ClassOrder {
  Tensor order, class_start;

  ClassOrder(const Operands& ops, void* stream) : ClassOrder(sort(ops, stream)) {}
  cuda::Sorted view() const {
    return {order.const_data_ptr<int64_t>(), class_start.const_data_ptr<int64_t>()};
  }

 private:
  ClassOrder(Tensor o, Tensor start) : order(std::move(o)), class_start(std::move(start)) {}
  static ClassOrder sort(const Operands& ops, void* stream) {
    const Problem& p = ops.problem;
    if (cuda::sorts_by_class(p)) {
      ClassOrder made(bridge::empty(ops.query, {p.num_tasks, p.num_supports}, ScalarType::Long),
                      bridge::empty(ops.query, {p.num_tasks, p.num_classes + 1}, ScalarType::Long));
      cuda::sort_by_class(p, made.order.mutable_data_ptr<int64_t>(),
                          made.class_start.mutable_data_ptr<int64_t>(), stream);
      return made;
    }
    std::array<StableIValue, 2> stack{torch::stable::detail::from(ops.labels),
                                      torch::stable::detail::from(p.num_classes)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("fastmeta::class_order", "", stack.data(), TORCH_ABI_VERSION));
    return ClassOrder(torch::stable::detail::to<Tensor>(stack[0]),
                      torch::stable::detail::to<Tensor>(stack[1]));
  }
};

bool allow_tf32(const Problem& problem) {
  const bool multiplies =
      problem.similarity == Similarity::kDot || problem.similarity == Similarity::kCosine;
  return multiplies && bridge::allow_tf32(problem.dtype, "fastmeta::allow_tf32");
}

void run(const Operands& ops, Forward args) {
  const bridge::CudaScope scope(ops.query);
  args.problem.allow_tf32 = allow_tf32(args.problem);
  const ClassOrder sorted(ops, scope.stream());
  const Tensor space = bridge::workspace(ops.query, cuda::forward_workspace(args.problem));
  cuda::forward(args, sorted.view(), space.mutable_data_ptr(), scope.stream());
}
void run(const Operands& ops, Backward args) {
  const bridge::CudaScope scope(ops.query);
  args.problem.allow_tf32 = allow_tf32(args.problem);
  const ClassOrder sorted(ops, scope.stream());
  const Tensor space = bridge::workspace(ops.query, cuda::backward_workspace(args.problem));
  cuda::backward(args, sorted.view(), space.mutable_data_ptr(), scope.stream());
}
void run(const Operands& ops, const DoubleBackward& args) {
  const bridge::CudaScope scope(ops.query);
  const ClassOrder sorted(ops, scope.stream());
  const Tensor space = bridge::workspace(ops.query, cuda::double_backward_workspace(ops.problem));
  cuda::double_backward(args, sorted.view(), space.mutable_data_ptr(), scope.stream());
}
#else
void run(const Operands& /*ops*/, const Forward& args) {
  FASTMETA_DISPATCH(current_isa(), matching, forward, args, bridge::parallel_for);
}
void run(const Operands& /*ops*/, const Backward& args) {
  FASTMETA_DISPATCH(current_isa(), matching, backward, args, bridge::parallel_for);
}
void run(const Operands& /*ops*/, const DoubleBackward& args) {
  FASTMETA_DISPATCH(current_isa(), matching, double_backward, args, bridge::parallel_for);
}
#endif

// How many similarities of a task the forward leaves for the backward.
int64_t scores_size(const Problem& p) {
#if defined(FASTMETA_CUDA)
  return cuda::scores_size(p);
#else
  return keeps_scores(p) ? p.num_supports * kept_lanes(p) : 0;
#endif
}

std::tuple<Tensor, Tensor, Tensor> forward(const Operands& ops,
                                           const std::vector<int64_t>& out_shape,
                                           bool keep_scores) {
  const Problem& p = ops.problem;
  const ScalarType acc = bridge::acc_type(ops.query);
  Tensor out = bridge::empty(ops.query, out_shape, acc);
  Tensor lse = bridge::empty(ops.query, {p.num_tasks, p.num_queries}, acc);
  const int64_t size = keep_scores ? scores_size(p) : 0;
  Tensor scores = bridge::empty(ops.query, {p.num_tasks, size}, acc);
  run(ops, Forward{p, out.mutable_data_ptr(), lse.mutable_data_ptr(),
                   size > 0 ? scores.mutable_data_ptr() : nullptr});
  return {out, lse, scores};
}

// What the forward left and the gradient of its result, checked and contiguous.
struct Saved {
  Tensor grad, out, lse;

  Saved(const Operands& ops, const Tensor& grad_, const Tensor& out_, const Tensor& lse_,
        const std::vector<int64_t>& out_shape)
      : grad(bridge::contiguous(grad_)),
        out(bridge::contiguous(out_)),
        lse(bridge::contiguous(lse_)) {
    const ScalarType acc = bridge::acc_type(ops.query);
    bridge::check_shape(lse, "lse", {ops.problem.num_tasks, ops.problem.num_queries});
    bridge::check_shape(grad, "grad", out_shape);
    bridge::check_shape(out, "out", out_shape);
    bridge::check_dtype(lse, "lse", acc);
    bridge::check_dtype(grad, "grad", acc);
    bridge::check_dtype(out, "out", acc);
  }
};

// Gradients of the floating operands, yet to be written; the weight's is empty without weight.
struct Gradients {
  Tensor query, support, scale, weight;

  explicit Gradients(const Operands& ops) : Gradients(ops, ops.problem) {}
  void* weight_pointer(const Operands& ops) const {
    return ops.additive() ? weight.mutable_data_ptr() : nullptr;
  }

 private:
  Gradients(const Operands& ops, const Problem& p)
      : query(make(ops, {p.num_tasks, p.num_queries, p.dim}, ops.query.scalar_type())),
        support(make(ops, {p.num_tasks, p.num_supports, p.dim}, ops.query.scalar_type())),
        scale(make(ops, {p.num_tasks}, bridge::acc_type(ops.query))),
        weight(make(ops, {p.num_tasks, ops.additive() ? p.dim : 0}, bridge::acc_type(ops.query))) {}
  static Tensor make(const Operands& ops, const std::vector<int64_t>& size, ScalarType dtype) {
    return bridge::empty(ops.query, size, dtype);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Operands& ops, const Tensor& grad,
                                                    const Tensor& out, const Tensor& lse,
                                                    const Tensor& scores,
                                                    const std::vector<int64_t>& out_shape) {
  const Saved saved(ops, grad, out, lse, out_shape);
  const bool kept = scores.dim() == 2 && scores.size(1) > 0;
  const Tensor similarities = bridge::contiguous(scores);
  if (kept) {
    bridge::check_shape(scores, "scores", {ops.problem.num_tasks, scores_size(ops.problem)});
    bridge::check_dtype(scores, "scores", bridge::acc_type(ops.query));
  }
  const Gradients grads(ops);
  run(ops, Backward{ops.problem, saved.grad.const_data_ptr(), saved.out.const_data_ptr(),
                    saved.lse.const_data_ptr(), grads.query.mutable_data_ptr(),
                    grads.support.mutable_data_ptr(), grads.scale.mutable_data_ptr(),
                    grads.weight_pointer(ops), kept ? similarities.const_data_ptr() : nullptr});
  return {grads.query, grads.support, grads.scale, grads.weight};
}

// A direction of the double backward; no tensor stands for zero.
class Direction {
 public:
  Direction(const OptionalTensor& x, const char* name, const std::vector<int64_t>& size,
            ScalarType dtype) {
    if (!x.has_value()) return;
    bridge::check_shape(*x, name, size);
    bridge::check_dtype(*x, name, dtype);
    tensor_ = bridge::contiguous(*x);
  }
  const void* pointer() const { return tensor_.has_value() ? tensor_->const_data_ptr() : nullptr; }

 private:
  OptionalTensor tensor_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> double_backward(
    const Operands& ops, const OptionalTensor& query_dot, const OptionalTensor& support_dot,
    const OptionalTensor& scale_dot, const OptionalTensor& weight_dot, const Tensor& grad,
    const Tensor& out, const Tensor& lse, const std::vector<int64_t>& out_shape) {
  const Problem& p = ops.problem;
  const ScalarType scalar = ops.query.scalar_type(), acc = bridge::acc_type(ops.query);
  const Saved saved(ops, grad, out, lse, out_shape);
  const Direction query(query_dot, "grad_query", {p.num_tasks, p.num_queries, p.dim}, scalar);
  const Direction support(support_dot, "grad_support", {p.num_tasks, p.num_supports, p.dim},
                          scalar);
  const Direction scale(scale_dot, "grad_scale", {p.num_tasks}, acc);
  const bool additive = ops.additive();  // its weight may be empty: no pointer tells
  const Direction weight(weight_dot, "grad_weight", {p.num_tasks, additive ? p.dim : 0}, acc);
  Tensor grad_grad = bridge::empty(ops.query, out_shape, acc);
  const Gradients grads(ops);
  run(ops, DoubleBackward{p, query.pointer(), support.pointer(), scale.pointer(),
                          additive ? weight.pointer() : nullptr, saved.grad.const_data_ptr(),
                          saved.out.const_data_ptr(), saved.lse.const_data_ptr(),
                          grad_grad.mutable_data_ptr(), grads.query.mutable_data_ptr(),
                          grads.support.mutable_data_ptr(), grads.scale.mutable_data_ptr(),
                          grads.weight_pointer(ops)});
  return {grad_grad, grads.query, grads.support, grads.scale, grads.weight};
}

std::tuple<Tensor, Tensor, Tensor> matching_attention(const Tensor& query, const Tensor& support,
                                                      const Tensor& labels, const Tensor& scale,
                                                      const OptionalTensor& weight,
                                                      int64_t num_classes,
                                                      const bridge::Text& similarity,
                                                      bool keep_scores) {
  const Operands ops(query, support, labels, std::nullopt, scale, weight, num_classes,
                     similarity.value);
  return forward(ops, {query.size(0), query.size(1), num_classes}, keep_scores);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> matching_attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& support, const Tensor& labels,
    const Tensor& scale, const OptionalTensor& weight, const Tensor& logp, const Tensor& lse,
    const Tensor& scores, int64_t num_classes, const bridge::Text& similarity) {
  const Operands ops(query, support, labels, std::nullopt, scale, weight, num_classes,
                     similarity.value);
  return backward(ops, grad, logp, lse, scores, {query.size(0), query.size(1), num_classes});
}

std::tuple<Tensor, Tensor, Tensor> matching_nll(const Tensor& query, const Tensor& support,
                                                const Tensor& labels, const Tensor& targets,
                                                const Tensor& scale, const OptionalTensor& weight,
                                                int64_t num_classes, const bridge::Text& similarity,
                                                bool keep_scores) {
  const Operands ops(query, support, labels, targets, scale, weight, num_classes, similarity.value);
  return forward(ops, {query.size(0), query.size(1)}, keep_scores);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> matching_nll_backward(
    const Tensor& grad, const Tensor& query, const Tensor& support, const Tensor& labels,
    const Tensor& targets, const Tensor& scale, const OptionalTensor& weight, const Tensor& nll,
    const Tensor& lse, const Tensor& scores, int64_t num_classes, const bridge::Text& similarity) {
  const Operands ops(query, support, labels, targets, scale, weight, num_classes, similarity.value);
  return backward(ops, grad, nll, lse, scores, {query.size(0), query.size(1)});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> matching_attention_double_backward(
    const OptionalTensor& grad_query, const OptionalTensor& grad_support,
    const OptionalTensor& grad_scale, const OptionalTensor& grad_weight, const Tensor& grad,
    const Tensor& query, const Tensor& support, const Tensor& labels, const Tensor& scale,
    const OptionalTensor& weight, const Tensor& logp, const Tensor& lse, int64_t num_classes,
    const bridge::Text& similarity) {
  const Operands ops(query, support, labels, std::nullopt, scale, weight, num_classes,
                     similarity.value);
  return double_backward(ops, grad_query, grad_support, grad_scale, grad_weight, grad, logp, lse,
                         {query.size(0), query.size(1), num_classes});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> matching_nll_double_backward(
    const OptionalTensor& grad_query, const OptionalTensor& grad_support,
    const OptionalTensor& grad_scale, const OptionalTensor& grad_weight, const Tensor& grad,
    const Tensor& query, const Tensor& support, const Tensor& labels, const Tensor& targets,
    const Tensor& scale, const OptionalTensor& weight, const Tensor& nll, const Tensor& lse,
    int64_t num_classes, const bridge::Text& similarity) {
  const Operands ops(query, support, labels, targets, scale, weight, num_classes, similarity.value);
  return double_backward(ops, grad_query, grad_support, grad_scale, grad_weight, grad, nll, lse,
                         {query.size(0), query.size(1)});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, FASTMETA_DEVICE_KEY, m) {
  m.impl("matching_attention", TORCH_BOX(&matching_attention));
  m.impl("matching_attention_backward", TORCH_BOX(&matching_attention_backward));
  m.impl("matching_nll", TORCH_BOX(&matching_nll));
  m.impl("matching_nll_backward", TORCH_BOX(&matching_nll_backward));
  m.impl("matching_attention_double_backward", TORCH_BOX(&matching_attention_double_backward));
  m.impl("matching_nll_double_backward", TORCH_BOX(&matching_nll_double_backward));
}

}  // namespace fastmeta::matching
