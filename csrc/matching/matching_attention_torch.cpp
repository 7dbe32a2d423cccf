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
    STD_TORCH_CHECK(q.dim() == 3 && num_classes >= 1, "fastmeta: query must be [T, Q, D]");
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
    if (t.has_value()) {
      bridge::check_shape(*t, "targets", {tasks, queries});
      bridge::check_dtype(*t, "targets", ScalarType::Long);
      targets = bridge::contiguous(*t);
      problem.targets = targets->const_data_ptr<int64_t>();
    }
    const bool additive = problem.similarity == Similarity::kAdditive;
    STD_TORCH_CHECK(additive == w.has_value(), "fastmeta: weight goes with additive similarity");
    if (additive) {
      const bool shared_weight = w->dim() == 2 && w->size(0) == 1;
      bridge::check_shape(*w, "weight", {shared_weight ? 1 : tasks, dim});
      bridge::check_dtype(*w, "weight", acc);
      weight = bridge::contiguous(*w);
      problem.weight = weight->const_data_ptr();
      problem.weight_stride = shared_weight ? 0 : dim;
    }
  }
};

#if defined(FASTMETA_CUDA)
// The kernels want each task's supports in class order: sorted by torch, on the stream, in Python's
// fastmeta::class_order.
struct ClassOrder {
  Tensor order, class_start;

  explicit ClassOrder(const Operands& ops) : ClassOrder(sort(ops)) {}
  cuda::Sorted view() const {
    return {order.const_data_ptr<int64_t>(), class_start.const_data_ptr<int64_t>()};
  }

 private:
  ClassOrder(Tensor o, Tensor start) : order(std::move(o)), class_start(std::move(start)) {}
  static ClassOrder sort(const Operands& ops) {
    std::array<StableIValue, 2> stack{torch::stable::detail::from(ops.labels),
                                      torch::stable::detail::from(ops.problem.num_classes)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("fastmeta::class_order", "", stack.data(), TORCH_ABI_VERSION));
    return ClassOrder(torch::stable::detail::to<Tensor>(stack[0]),
                      torch::stable::detail::to<Tensor>(stack[1]));
  }
};

Tensor workspace(const Operands& ops, int64_t bytes) {
  return bridge::empty(ops.query, {(bytes + 7) / 8}, ScalarType::Long);
}

void run(const Operands& ops, const Forward& args) {
  const bridge::CudaScope scope(ops.query);
  const ClassOrder sorted(ops);
  const Tensor space = workspace(ops, cuda::forward_workspace(ops.problem));
  cuda::forward(args, sorted.view(), space.mutable_data_ptr(), scope.stream());
}
void run(const Operands& ops, const Backward& args) {
  const bridge::CudaScope scope(ops.query);
  const ClassOrder sorted(ops);
  const Tensor space = workspace(ops, cuda::backward_workspace(ops.problem));
  cuda::backward(args, sorted.view(), space.mutable_data_ptr(), scope.stream());
}
#else
void run(const Operands& /*ops*/, const Forward& args) {
  FASTMETA_DISPATCH(current_isa(), matching, forward, args, bridge::parallel_for);
}
void run(const Operands& /*ops*/, const Backward& args) {
  FASTMETA_DISPATCH(current_isa(), matching, backward, args, bridge::parallel_for);
}
#endif

std::tuple<Tensor, Tensor> forward(const Operands& ops, const std::vector<int64_t>& out_shape) {
  const ScalarType acc = bridge::acc_type(ops.query);
  Tensor out = bridge::empty(ops.query, out_shape, acc);
  Tensor lse = bridge::empty(ops.query, {ops.problem.num_tasks, ops.problem.num_queries}, acc);
  run(ops, Forward{ops.problem, out.mutable_data_ptr(), lse.mutable_data_ptr()});
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Operands& ops, const Tensor& grad,
                                                    const Tensor& out, const Tensor& lse,
                                                    const std::vector<int64_t>& out_shape) {
  const Problem& problem = ops.problem;
  const ScalarType acc = bridge::acc_type(ops.query);
  for (const auto& [tensor, name] : {std::pair{&grad, "grad"}, std::pair{&out, "out"}}) {
    bridge::check_shape(*tensor, name, out_shape);
    bridge::check_dtype(*tensor, name, acc);
  }
  bridge::check_shape(lse, "lse", {problem.num_tasks, problem.num_queries});
  bridge::check_dtype(lse, "lse", acc);
  const Tensor grad_c = bridge::contiguous(grad), out_c = bridge::contiguous(out);
  const Tensor lse_c = bridge::contiguous(lse);
  const ScalarType scalar = ops.query.scalar_type();
  const bool additive = problem.weight != nullptr;
  Tensor grad_query =
      bridge::empty(ops.query, {problem.num_tasks, problem.num_queries, problem.dim}, scalar);
  Tensor grad_support =
      bridge::empty(ops.query, {problem.num_tasks, problem.num_supports, problem.dim}, scalar);
  Tensor grad_scale = bridge::empty(ops.query, {problem.num_tasks}, acc);
  Tensor grad_weight =
      bridge::empty(ops.query, {problem.num_tasks, additive ? problem.dim : 0}, acc);
  run(ops,
      Backward{problem, grad_c.const_data_ptr(), out_c.const_data_ptr(), lse_c.const_data_ptr(),
               grad_query.mutable_data_ptr(), grad_support.mutable_data_ptr(),
               grad_scale.mutable_data_ptr(), additive ? grad_weight.mutable_data_ptr() : nullptr});
  return {grad_query, grad_support, grad_scale, grad_weight};
}

std::tuple<Tensor, Tensor> matching_attention(const Tensor& query, const Tensor& support,
                                              const Tensor& labels, const Tensor& scale,
                                              const OptionalTensor& weight, int64_t num_classes,
                                              const std::string& similarity) {
  const Operands ops(query, support, labels, std::nullopt, scale, weight, num_classes, similarity);
  return forward(ops, {query.size(0), query.size(1), num_classes});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> matching_attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& support, const Tensor& labels,
    const Tensor& scale, const OptionalTensor& weight, const Tensor& logp, const Tensor& lse,
    int64_t num_classes, const std::string& similarity) {
  const Operands ops(query, support, labels, std::nullopt, scale, weight, num_classes, similarity);
  return backward(ops, grad, logp, lse, {query.size(0), query.size(1), num_classes});
}

std::tuple<Tensor, Tensor> matching_nll(const Tensor& query, const Tensor& support,
                                        const Tensor& labels, const Tensor& targets,
                                        const Tensor& scale, const OptionalTensor& weight,
                                        int64_t num_classes, const std::string& similarity) {
  const Operands ops(query, support, labels, targets, scale, weight, num_classes, similarity);
  return forward(ops, {query.size(0), query.size(1)});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> matching_nll_backward(
    const Tensor& grad, const Tensor& query, const Tensor& support, const Tensor& labels,
    const Tensor& targets, const Tensor& scale, const OptionalTensor& weight, const Tensor& nll,
    const Tensor& lse, int64_t num_classes, const std::string& similarity) {
  const Operands ops(query, support, labels, targets, scale, weight, num_classes, similarity);
  return backward(ops, grad, nll, lse, {query.size(0), query.size(1)});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, FASTMETA_DEVICE_KEY, m) {
  m.impl("matching_attention", TORCH_BOX(&matching_attention));
  m.impl("matching_attention_backward", TORCH_BOX(&matching_attention_backward));
  m.impl("matching_nll", TORCH_BOX(&matching_nll));
  m.impl("matching_nll_backward", TORCH_BOX(&matching_nll_backward));
}

}  // namespace fastmeta::matching
