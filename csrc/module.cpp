// The pybind11 module fastmeta._C: importing it registers the CPU kernels with torch. What it
// offers itself is no torch op: how it was built, the instruction sets, and the torch-free kernels
// on NumPy arrays, for tests and micro-benchmarks of one instruction set at a time.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "matching/matching_attention.h"
#include "segment/segment_mean.h"
#include "update/sgd_update.h"

namespace py = pybind11;

namespace fastmeta {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
constexpr DType dtype_of() {
  return sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
    names.emplace_back(isa_name(static_cast<Isa>(isa)));
  }
  return names;
}

// Whether `count` labels at `address`, the data of an int64 tensor, are in [0, num_classes) or
// ignore_index: the check that every call pays for, without a tensor op.
bool labels_fit(uintptr_t address, int64_t count, int64_t num_classes, int64_t ignore_index) {
  const int64_t* labels = reinterpret_cast<const int64_t*>(address);
  bool fit = true;
  for (int64_t i = 0; i < count; ++i) {
    const bool inside = static_cast<uint64_t>(labels[i]) < static_cast<uint64_t>(num_classes);
    fit &= inside | (labels[i] == ignore_index);
  }
  return fit;
}

Isa checked_isa(const std::string& name) {
  const Isa isa = parse_isa(name);
  if (isa > best_isa()) throw std::invalid_argument("this machine cannot run " + name);
  return isa;
}

matching::Similarity similarity_of(const std::string& name) {
  const std::vector<std::string> names{"dot", "cosine", "sqeuclidean", "euclidean", "additive"};
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == name) return static_cast<matching::Similarity>(i);
  }
  throw std::invalid_argument("unknown similarity " + name);
}

// The arrays of one call and the plain struct that points into them.
template <class T>
struct MatchingCall {
  Array<T> query, support, scale;
  Array<int64_t> labels;
  std::optional<Array<int64_t>> targets;
  std::optional<Array<T>> weight;
  matching::Problem problem{};

  MatchingCall(Array<T> q, Array<T> s, Array<int64_t> y, Array<T> a, int64_t num_classes,
               const std::string& similarity, std::optional<Array<int64_t>> t,
               std::optional<Array<T>> w)
      : query(q), support(s), scale(a), labels(y), targets(t), weight(w) {
    if (q.ndim() != 3 || s.ndim() != 3 || y.ndim() != 2 || a.ndim() != 1) {
      throw std::invalid_argument(
          "expected query [T,Q,D], support [T,S,D], labels [T,S], scale [T or 1]");
    }
    problem.dtype = dtype_of<T>();
    problem.similarity = similarity_of(similarity);
    problem.num_tasks = q.shape(0);
    problem.num_queries = q.shape(1);
    problem.num_supports = s.shape(1);
    problem.num_classes = num_classes;
    problem.dim = q.shape(2);
    const bool fits =
        s.shape(0) == q.shape(0) && s.shape(2) == q.shape(2) && y.shape(0) == q.shape(0) &&
        y.shape(1) == s.shape(1) && (a.shape(0) == 1 || a.shape(0) == q.shape(0)) &&
        (!t || (t->ndim() == 2 && t->shape(0) == q.shape(0) && t->shape(1) == q.shape(1))) &&
        (w.has_value() == (similarity == "additive")) &&
        (!w || (w->ndim() == 2 && w->shape(1) == q.shape(2) &&
                (w->shape(0) == 1 || w->shape(0) == q.shape(0))));
    if (!fits) throw std::invalid_argument("array shapes do not fit together");
    problem.query = query.data();
    problem.support = support.data();
    problem.labels = labels.data();
    problem.scale = scale.data();
    problem.scale_stride = a.shape(0) == 1 ? 0 : 1;
    if (targets) problem.targets = targets->data();
    if (weight) {
      problem.weight = weight->data();
      problem.weight_stride = weight->shape(0) == 1 ? 0 : problem.dim;
    }
  }

  std::vector<py::ssize_t> out_shape() const {
    if (targets) return {problem.num_tasks, problem.num_queries};
    return {problem.num_tasks, problem.num_queries, problem.num_classes};
  }
};

template <class T>
py::tuple matching_forward(const std::string& isa, Array<T> query, Array<T> support,
                           Array<int64_t> labels, Array<T> scale, int64_t num_classes,
                           const std::string& similarity, std::optional<Array<int64_t>> targets,
                           std::optional<Array<T>> weight) {
  const MatchingCall<T> call(query, support, labels, scale, num_classes, similarity, targets,
                             weight);
  py::array_t<T> out(call.out_shape());
  py::array_t<T> lse({call.problem.num_tasks, call.problem.num_queries});
  const matching::Forward args{call.problem, out.mutable_data(), lse.mutable_data()};
  FASTMETA_DISPATCH(checked_isa(isa), matching, forward, args, serial_for);
  return py::make_tuple(out, lse);
}

template <class T>
py::tuple matching_backward(const std::string& isa, Array<T> grad, Array<T> out, Array<T> lse,
                            Array<T> query, Array<T> support, Array<int64_t> labels, Array<T> scale,
                            int64_t num_classes, const std::string& similarity,
                            std::optional<Array<int64_t>> targets, std::optional<Array<T>> weight) {
  const MatchingCall<T> call(query, support, labels, scale, num_classes, similarity, targets,
                             weight);
  const matching::Problem& p = call.problem;
  int64_t out_size = p.num_tasks * p.num_queries * (targets ? 1 : num_classes);
  if (grad.size() != out_size || out.size() != out_size ||
      lse.size() != p.num_tasks * p.num_queries) {
    throw std::invalid_argument("grad, out or lse does not fit the problem");
  }
  py::array_t<T> grad_query({p.num_tasks, p.num_queries, p.dim});
  py::array_t<T> grad_support({p.num_tasks, p.num_supports, p.dim});
  py::array_t<T> grad_scale(p.num_tasks);
  py::array_t<T> grad_weight({p.num_tasks, weight ? p.dim : 0});
  const matching::Backward args{p,
                                grad.data(),
                                out.data(),
                                lse.data(),
                                grad_query.mutable_data(),
                                grad_support.mutable_data(),
                                grad_scale.mutable_data(),
                                weight ? grad_weight.mutable_data() : nullptr};
  FASTMETA_DISPATCH(checked_isa(isa), matching, backward, args, serial_for);
  return py::make_tuple(grad_query, grad_support, grad_scale, grad_weight);
}

template <class T>
py::tuple segment_mean(const std::string& isa, Array<T> values, Array<int64_t> labels,
                       int64_t num_classes) {
  if (values.ndim() != 3 || labels.ndim() != 2 || labels.shape(0) != values.shape(0) ||
      labels.shape(1) != values.shape(1)) {
    throw std::invalid_argument("expected values [T,S,D] and labels [T,S]");
  }
  py::array_t<T> mean({values.shape(0), static_cast<py::ssize_t>(num_classes), values.shape(2)});
  py::array_t<T> count({values.shape(0), static_cast<py::ssize_t>(num_classes)});
  const segment::Mean args{dtype_of<T>(), values.shape(0),     values.shape(1),
                           num_classes,   values.shape(2),     values.data(),
                           labels.data(), mean.mutable_data(), count.mutable_data()};
  FASTMETA_DISPATCH(checked_isa(isa), segment, mean, args, serial_for);
  return py::make_tuple(mean, count);
}

template <class T>
py::array_t<T> sgd_update(const std::string& isa, Array<T> param, Array<T> grad, T lr) {
  if (param.size() != grad.size()) throw std::invalid_argument("param and grad differ in size");
  py::array_t<T> out(std::vector<py::ssize_t>(grad.shape(), grad.shape() + grad.ndim()));
  const update::SgdTensor tensor{
      1, grad.size(), {param.data(), 0, 1}, {grad.data(), 0, 1}, {&lr, 0, 0}, out.mutable_data()};
  const update::Sgd args{dtype_of<T>(), dtype_of<T>(), 1, &tensor};
  FASTMETA_DISPATCH(checked_isa(isa), update, sgd, args, serial_for);
  return out;
}

template <class T>
void bind_kernels(py::module_& m) {
  m.def("matching_forward", &matching_forward<T>, py::arg("isa"), py::arg("query").noconvert(),
        py::arg("support"), py::arg("labels"), py::arg("scale"), py::arg("num_classes"),
        py::arg("similarity"), py::arg("targets") = py::none(), py::arg("weight") = py::none());
  m.def("matching_backward", &matching_backward<T>, py::arg("isa"), py::arg("grad").noconvert(),
        py::arg("out"), py::arg("lse"), py::arg("query"), py::arg("support"), py::arg("labels"),
        py::arg("scale"), py::arg("num_classes"), py::arg("similarity"),
        py::arg("targets") = py::none(), py::arg("weight") = py::none());
  m.def("segment_mean", &segment_mean<T>, py::arg("isa"), py::arg("values").noconvert(),
        py::arg("labels"), py::arg("num_classes"));
  m.def("sgd_update", &sgd_update<T>, py::arg("isa"), py::arg("param").noconvert(), py::arg("grad"),
        py::arg("lr"));
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "g++ " __VERSION__;
#endif
}

}  // namespace
}  // namespace fastmeta

PYBIND11_MODULE(_C, m) {
  using namespace fastmeta;
  m.doc() = "CPU kernels of fastmeta; importing registers them with torch.";
  m.def("compiler", &compiler, "Compiler that built this module.");
  m.def("labels_fit", &labels_fit,
        "Whether int64 labels at an address are in [0, num_classes) or ignore_index.");
  m.def("available_isas", &available_isas, "Instruction sets that this build and machine have.");
  m.def(
      "default_isa", [] { return std::string(isa_name(default_isa())); },
      "Instruction set that is taken where none is asked for.");
  m.def(
      "current_isa", [] { return std::string(isa_name(current_isa())); },
      "Instruction set whose kernels run.");
  m.def(
      "set_isa", [](const std::string& name) { mutable_isa() = checked_isa(name); },
      "Choose the instruction set, for tests that walk all of them; not thread safe.");
  py::module_ kernels =
      m.def_submodule("kernels", "The torch-free kernels on NumPy arrays, serial.");
  bind_kernels<float>(kernels);
  bind_kernels<double>(kernels);
  current_isa();  // a wrong FASTMETA_CPU_ISA is reported at import
}
