// What the files of the test module share: arguments as Python hands them over.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "common/types.h"

template <class T = void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline fastmeta::DType dtype_of(const std::string& name) {
  using fastmeta::DType;
  static const std::map<std::string, DType> dtypes = {{"float32", DType::kFloat32},
                                                      {"float64", DType::kFloat64},
                                                      {"bfloat16", DType::kBFloat16},
                                                      {"float16", DType::kFloat16}};
  return dtypes.at(name);
}
