// The adaptation engine on the CPU, and its float kernels (adapt_double_cpu.cpp has the others).
#include "engine/adapt_cpu.h"

namespace fastmeta::engine::FASTMETA_ISA {

template void run<float>(const Adapt&, const AdaptGradients*, Mode, ParallelFor);
extern template void run<double>(const Adapt&, const AdaptGradients*, Mode, ParallelFor);

namespace {

void run_any(const Adapt& args, const AdaptGradients* gradients, Mode mode, ParallelFor par) {
  if (args.dtype == DType::kFloat64) {
    run<double>(args, gradients, mode, par);
  } else {
    run<float>(args, gradients, mode, par);
  }
}

}  // namespace

void adapt(const Adapt& args, ParallelFor par) { run_any(args, nullptr, Mode::kAdapt, par); }

void adapt_backward(const Adapt& args, const AdaptGradients& gradients, ParallelFor par) {
  run_any(args, &gradients, Mode::kBackward, par);
}

void meta_step(const Adapt& args, const AdaptGradients& gradients, ParallelFor par) {
  run_any(args, &gradients, Mode::kMetaStep, par);
}

}  // namespace fastmeta::engine::FASTMETA_ISA
