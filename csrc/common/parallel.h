// How a torch-free kernel asks for threads: the caller (torch bridge, test, benchmark) owns the
// pool.
#pragma once
#include <cstdint>

namespace fastmeta {

// Calls body(context, begin, end) over disjoint ranges that cover [0, total), none shorter than
// grain but the last, possibly from several threads at once, and returns when all are done.
// Ranges depend on the number of threads; a kernel whose result must not depend on it makes its
// jobs from shapes alone and treats every index of [0, total) as one job.
using RangeBody = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t total, int64_t grain, RangeBody body, void* context);

inline void serial_for(int64_t total, int64_t /*grain*/, RangeBody body, void* context) {
  if (total > 0) body(context, 0, total);
}

}  // namespace fastmeta
