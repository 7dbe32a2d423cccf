// The launchers, compiled for the host, as a Python module. Arrays come as addresses: the tests own
// them, place them on purpose (alignment, guard zones) and keep them alive.
// One translation unit: pybind11 takes longer to compile than all of this.
#include "bindings.h"

#include "bindings_task_layers.h"
#include "bindings_updates.h"
#include "common/launch.cuh"
#include "cuemu.h"
#include "matching/matching_attention.h"
#include "segment/segment_mean.h"

namespace py = pybind11;
using namespace fastmeta;  // NOLINT(build/namespaces): a test module

namespace {

void mean(const std::string& dtype, int64_t T, int64_t S, int64_t C, int64_t D, uintptr_t values,
          uintptr_t labels, uintptr_t mean, uintptr_t count) {
  segment::cuda::mean(
      {dtype_of(dtype), T, S, C, D, at(values), at<int64_t>(labels), at(mean), at(count)}, nullptr);
}

void mean_backward(const std::string& dtype, int64_t T, int64_t S, int64_t C, int64_t D,
                   uintptr_t grad, uintptr_t labels, uintptr_t count, uintptr_t grad_values) {
  segment::cuda::mean_backward(
      {dtype_of(dtype), T, S, C, D, at(grad), at<int64_t>(labels), at(count), at(grad_values)},
      nullptr);
}

struct MatchingProblem {
  std::string dtype, similarity;
  int64_t T, Q, S, C, D;
  uintptr_t query, support, labels, targets, scale, weight, order, class_start;
  int64_t scale_stride, weight_stride;
  bool allow_tf32 = false;

  matching::Problem get() const {
    static const std::map<std::string, matching::Similarity> similarities = {
        {"dot", matching::Similarity::kDot},
        {"cosine", matching::Similarity::kCosine},
        {"sqeuclidean", matching::Similarity::kSqEuclidean},
        {"euclidean", matching::Similarity::kEuclidean},
        {"additive", matching::Similarity::kAdditive}};
    return {dtype_of(dtype),
            similarities.at(similarity),
            T,
            Q,
            S,
            C,
            D,
            at(query),
            at(support),
            at<int64_t>(labels),
            at<int64_t>(targets),
            at(scale),
            scale_stride,
            at(weight),
            weight_stride,
            allow_tf32};
  }
  matching::cuda::Sorted sorted() const { return {at<int64_t>(order), at<int64_t>(class_start)}; }
};

bool matching_class_order(const MatchingProblem& problem) {
  const matching::Problem args = problem.get();
  if (!matching::cuda::sorts_by_class(args)) return false;
  matching::cuda::sort_by_class(args, at<int64_t>(problem.order), at<int64_t>(problem.class_start),
                                nullptr);
  return true;
}

int64_t matching_scores_size(const MatchingProblem& problem) {
  return matching::cuda::scores_size(problem.get());
}

void matching_forward(const MatchingProblem& problem, uintptr_t out, uintptr_t lse,
                      uintptr_t scores) {
  const matching::Forward args{problem.get(), at(out), at(lse), at(scores)};
  const auto workspace = cuemu::fresh_shared(matching::cuda::forward_workspace(args.problem));
  matching::cuda::forward(args, problem.sorted(), workspace.get(), nullptr);
}

void matching_backward(const MatchingProblem& problem, uintptr_t grad, uintptr_t out, uintptr_t lse,
                       uintptr_t grad_query, uintptr_t grad_support, uintptr_t grad_scale,
                       uintptr_t grad_weight, uintptr_t scores) {
  const matching::Backward args{problem.get(),  at(grad),        at(out),
                                at(lse),        at(grad_query),  at(grad_support),
                                at(grad_scale), at(grad_weight), at(scores)};
  const auto workspace = cuemu::fresh_shared(matching::cuda::backward_workspace(args.problem));
  matching::cuda::backward(args, problem.sorted(), workspace.get(), nullptr);
}

void matching_double_backward(const MatchingProblem& problem, uintptr_t query_dot,
                              uintptr_t support_dot, uintptr_t scale_dot, uintptr_t weight_dot,
                              uintptr_t grad, uintptr_t out, uintptr_t lse, uintptr_t grad_grad,
                              uintptr_t grad_query, uintptr_t grad_support, uintptr_t grad_scale,
                              uintptr_t grad_weight) {
  const matching::DoubleBackward args{
      problem.get(),    at(query_dot),  at(support_dot), at(scale_dot), at(weight_dot),
      at(grad),         at(out),        at(lse),         at(grad_grad), at(grad_query),
      at(grad_support), at(grad_scale), at(grad_weight)};
  const auto workspace =
      cuemu::fresh_shared(matching::cuda::double_backward_workspace(args.problem));
  matching::cuda::double_backward(args, problem.sorted(), workspace.get(), nullptr);
}

template <class scalar_t>
void convert(int64_t count, uintptr_t from, uintptr_t decoded, uintptr_t values,
             uintptr_t encoded) {
  for (int64_t i = 0; i < count; ++i) {
    at<float>(decoded)[i] = device::to_acc(at<scalar_t>(from)[i]);
    at<scalar_t>(encoded)[i] = device::from_acc<scalar_t>(at<float>(values)[i]);
  }
}

}  // namespace

PYBIND11_MODULE(FASTMETA_EMULATION, m) {
  py::register_exception<cuemu::Error>(m, "Error", PyExc_RuntimeError);
  py::class_<cuemu::LaunchRecord>(m, "LaunchRecord")
      .def_readonly("what", &cuemu::LaunchRecord::what)
      .def_readonly("grid", &cuemu::LaunchRecord::grid)
      .def_readonly("block", &cuemu::LaunchRecord::block)
      .def_readonly("shared_bytes", &cuemu::LaunchRecord::shared_bytes)
      .def_readonly("static_shared_bytes", &cuemu::LaunchRecord::static_shared_bytes);
  m.def("schedule", [](const std::string& order, uint64_t seed, int64_t max_grid) {
    cuemu::options().order = order == "forward"   ? cuemu::Order::kForward
                             : order == "reverse" ? cuemu::Order::kReverse
                                                  : cuemu::Order::kRandom;
    cuemu::options().seed = seed;
    cuemu::options().max_grid = max_grid;
  });
  m.def("tensor_cores", [](bool there) { cuemu::options().tensor_cores = there; });
  m.def("multiprocessors", [](int count) { cuemu::options().multiprocessors = count; });
  m.def("take_barriers", [] { return std::exchange(cuemu::barriers(), {}); });
  m.def("skip_barrier", [](const std::string& site) { cuemu::options().skipped_barrier = site; });
  m.def("take_launches", [] { return std::exchange(cuemu::launches(), {}); });

  m.def("segment_mean", &mean);
  m.def("segment_mean_backward", &mean_backward);
  update_bindings::bind(m);
  layer_bindings::bind(m);
  m.def("convert_bfloat16", &convert<bfloat16>);
  m.def("convert_float16", &convert<float16>);

  py::class_<MatchingProblem>(m, "MatchingProblem")
      .def(py::init<>())
#define FASTMETA_FIELD(name) .def_readwrite(#name, &MatchingProblem::name)
          FASTMETA_FIELD(dtype) FASTMETA_FIELD(similarity) FASTMETA_FIELD(T) FASTMETA_FIELD(Q)
              FASTMETA_FIELD(S) FASTMETA_FIELD(C) FASTMETA_FIELD(D) FASTMETA_FIELD(query)
                  FASTMETA_FIELD(support) FASTMETA_FIELD(labels) FASTMETA_FIELD(targets)
                      FASTMETA_FIELD(scale) FASTMETA_FIELD(weight) FASTMETA_FIELD(order)
                          FASTMETA_FIELD(class_start) FASTMETA_FIELD(scale_stride)
                              FASTMETA_FIELD(weight_stride) FASTMETA_FIELD(allow_tf32);
#undef FASTMETA_FIELD
  m.def("matching_class_order", &matching_class_order);
  m.def("matching_scores_size", &matching_scores_size);
  m.def("matching_forward", &matching_forward, py::arg("problem"), py::arg("out"), py::arg("lse"),
        py::arg("scores") = 0);
  m.def("matching_backward", &matching_backward, py::arg("problem"), py::arg("grad"),
        py::arg("out"), py::arg("lse"), py::arg("grad_query"), py::arg("grad_support"),
        py::arg("grad_scale"), py::arg("grad_weight"), py::arg("scores") = 0);
  m.def("matching_double_backward", &matching_double_backward);
}
