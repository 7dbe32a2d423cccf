// The module fastmeta._C_cuda: importing it registers the CUDA kernels with torch. It is apart from
// fastmeta._C so that a build with CUDA still serves its CPU kernels where torch has no CUDA.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C_cuda, m) { m.doc() = "CUDA kernels of fastmeta; importing registers them."; }
