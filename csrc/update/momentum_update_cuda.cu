// Launches of momentum_update on the caller's stream.
#include "update/momentum_update.h"
#include "update/momentum_update_kernel.cuh"
#include "update/update_launch.cuh"

namespace fastmeta::update::cuda {

void momentum(const Momentum& args, void* stream) {
  run_step<MomentumStep>("momentum_update", args, stream, args.coefficients);
}

int64_t momentum_backward_workspace(const MomentumBackward& args) {
  return workspace_bytes("momentum_update", args);
}

void momentum_backward(const MomentumBackward& args, void* workspace, void* stream) {
  run_backward<MomentumBackwardStep>("momentum_update", args, workspace, stream, args.coefficients);
}

}  // namespace fastmeta::update::cuda
