// The adaptation engine in double precision, a file of its own so that compilers work side by side.
#include "engine/adapt_cpu.h"

namespace fastmeta::engine::FASTMETA_ISA {

template void run<double>(const Adapt&, const AdaptGradients*, Mode, ParallelFor);

}  // namespace fastmeta::engine::FASTMETA_ISA
