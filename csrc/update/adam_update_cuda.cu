// Launches of adam_update on the caller's stream.
#include "update/adam_update.h"
#include "update/adam_update_kernel.cuh"
#include "update/update_launch.cuh"

namespace fastmeta::update::cuda {

void adam(const Adam& args, void* stream) {
  run_step<AdamStep>("adam_update", args, stream, args.coefficients);
}

int64_t adam_backward_workspace(const AdamBackward& args) {
  return workspace_bytes("adam_update", args);
}

void adam_backward(const AdamBackward& args, void* workspace, void* stream) {
  run_backward<AdamBackwardStep>("adam_update", args, workspace, stream, args.coefficients);
}

}  // namespace fastmeta::update::cuda
