// Launches of sgd_update on the caller's stream.
#include "update/sgd_update.h"
#include "update/sgd_update_kernel.cuh"
#include "update/update_launch.cuh"

namespace fastmeta::update::cuda {

void sgd(const Sgd& args, void* stream) { run_step<SgdStep>("sgd_update", args, stream); }

int64_t sgd_backward_workspace(const SgdBackward& args) {
  return workspace_bytes("sgd_update", args);
}

void sgd_backward(const SgdBackward& args, void* workspace, void* stream) {
  run_backward<SgdBackwardStep>("sgd_update", args, workspace, stream);
}

}  // namespace fastmeta::update::cuda
