// Working memory of a kernel: one block per thread and purpose, grown on demand and kept for the
// next call up to a limit, so that calls on small problems allocate nothing.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

#include "common/vec.h"

namespace fastmeta::FASTMETA_ISA {

class Scratch {
 public:
  explicit Scratch(int64_t keep = int64_t{4} << 20) : keep_(keep) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // Forgets what was handed out and makes room for `bytes` (the sum of size_of() of what follows).
  void reset(int64_t bytes) {
    used_ = 0;
    if (bytes > capacity_ || (capacity_ > keep_ && bytes <= keep_)) {
      std::free(data_);
      data_ = nullptr;
      capacity_ = 0;
      const int64_t wanted = (bytes + kAlign - 1) / kAlign * kAlign;
      data_ = static_cast<char*>(std::aligned_alloc(kAlign, static_cast<size_t>(wanted)));
      if (data_ == nullptr) throw std::bad_alloc();
      capacity_ = wanted;
    }
  }
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(data_ + used_);
    used_ += size_of<T>(count);
    return p;
  }
  template <class T>
  static int64_t size_of(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
  }

 private:
  static constexpr int64_t kAlign = 64;
  const int64_t keep_;  // bytes
  char* data_ = nullptr;
  int64_t capacity_ = 0, used_ = 0;
};

}  // namespace fastmeta::FASTMETA_ISA
