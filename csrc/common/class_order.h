// The rows of a task sorted by class, by counting: stable, and rows with a label outside [0, C)
// left out.
#pragma once
#include <cstdint>

#include "common/vec.h"

namespace fastmeta::FASTMETA_ISA {

// order [num_rows] receives the valid rows class by class, start [num_classes + 1] where each
// begins. Returns the number of valid rows, which is start[num_classes].
static inline int64_t sort_by_class(const int64_t* labels, int64_t num_rows, int64_t num_classes,
                                    int64_t* order, int64_t* start) {
  for (int64_t c = 0; c <= num_classes; ++c) start[c] = 0;
  const uint64_t limit = static_cast<uint64_t>(num_classes);
  for (int64_t i = 0; i < num_rows; ++i) {
    if (static_cast<uint64_t>(labels[i]) < limit) ++start[labels[i] + 1];
  }
  for (int64_t c = 0; c < num_classes; ++c) start[c + 1] += start[c];
  const int64_t valid = start[num_classes];
  // Placing moves each start to the next class's; moving them back one place restores them.
  for (int64_t i = 0; i < num_rows; ++i) {
    if (static_cast<uint64_t>(labels[i]) < limit) order[start[labels[i]]++] = i;
  }
  for (int64_t c = num_classes; c > 0; --c) start[c] = start[c - 1];
  start[0] = 0;
  return valid;
}

}  // namespace fastmeta::FASTMETA_ISA
