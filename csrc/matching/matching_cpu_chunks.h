// Chunks of a task's sorted supports and the last step of the forward, which merges them.
#pragma once
#include <cstdint>

#include "matching/matching_cpu_plan.h"

namespace fastmeta::matching::FASTMETA_ISA {

constexpr int kClassBuffer = 32;  // class values held back per panel before they are written out

// What a chunk leaves per query lane, `stride` lanes apart.
enum Field {
  kReference,
  kMaximum,
  kSum,
  kHeadMaximum,
  kHeadSum,
  kTailMaximum,
  kTailSum,
  kTarget,
  kFields
};

// Which classes a chunk of sorted supports covers. head: continued from the chunk before, or ending
// here having begun here but not ending here; such classes are partial and kept apart.
struct Chunk {
  int64_t begin, end;              // sorted supports
  int64_t head_class, tail_class;  // partial classes at its ends, -1 where none
  int64_t class_begin, class_end;  // classes wholly inside or empty, for which this chunk answers
};

static inline Chunk make_chunk(const int64_t* start, int64_t num_classes, int64_t index,
                               int64_t chunks) {
  const int64_t valid = start[num_classes];
  Chunk c;
  c.begin = valid * index / chunks;
  c.end = valid * (index + 1) / chunks;
  c.head_class = c.tail_class = -1;
  if (c.begin == c.end) {
    // Only where supports are fewer than chunks; without any, the first chunk answers for all
    // classes.
    c.class_begin = c.class_end = 0;
    if (valid == 0 && index == 0) c.class_end = num_classes;
    return c;
  }
  const int64_t first = class_at(start, num_classes, c.begin);
  const int64_t last = class_at(start, num_classes, c.end - 1);
  const bool head = start[first] < c.begin || (first == last && start[first + 1] > c.end);
  const bool tail = start[last + 1] > c.end && !(head && first == last);
  if (head) c.head_class = first;
  if (tail) c.tail_class = last;
  c.class_begin = head ? first + 1 : first;
  c.class_end = tail || (head && first == last) ? last : last + 1;
  // Empty classes before the first and after the last support of the task, and those in the gap
  // behind this chunk.
  if (c.begin == 0) c.class_begin = 0;
  if (start[last + 1] == c.end) {
    int64_t next = last + 1;
    while (next < num_classes && start[next + 1] == c.end) ++next;
    c.class_end = next;
  }
  if (c.class_end < c.class_begin) c.class_end = c.class_begin;
  return c;
}

// Last step of a panel: merges its chunks and writes log-probabilities (or nll) and lse.
template <class A, int NV>
static void finish_panel(const Forward& args, int64_t chunks, int64_t t, const int64_t* start,
                         int64_t query, int count, const A* fields, int64_t stride,
                         const IntVec<A>* targets, const A* held_values) {
  constexpr int kW = kWidth<A>, kL = NV * kW;
  const Problem& p = args.problem;
  const int64_t classes = p.num_classes, valid = start[classes];
  A* out = static_cast<A*>(args.out) + t * p.num_queries * (p.targets != nullptr ? 1 : classes);
  A* lse = static_cast<A*>(args.lse) + t * p.num_queries + query;
  const auto field = [&](int64_t chunk, Field f) {
    return fields + (chunk * kFields + f) * stride;
  };
  alignas(64) A boundary[kL], natural[kL], log_sum[kL], maximum[kL];
  for (int v = 0; v < NV; ++v) {
    const Vec<A> reference = load(field(0, kReference) + v * kW);
    Vec<A> most = splat<A>(Const<A>::kLowest), sum{}, target = splat<A>(-Const<A>::kInfinity);
    const auto merge = [&](Vec<A> m, Vec<A> s) {
      const Vec<A> higher = vmax<A>(splat<A>(Const<A>::kLowest), vmax<A>(most, m));
      sum = sum * vexp2<A>(most - higher) + s * vexp2<A>(m - higher);
      most = higher;
    };
    Vec<A> run_most{}, run_sum{};
    int64_t run_class = -1;
    const auto close = [&] {
      if (run_class < 0) return;
      merge(run_most, run_sum);
      const Vec<A> value = run_most + vlog2<A>(run_sum);
      if (p.targets != nullptr) {
        const IntVec<A> wanted = IntVec<A>{} + static_cast<decltype(IntVec<A>{}[0] + 0)>(run_class);
        target = targets[v] == wanted ? value : target;
      } else {
        store(boundary, value);
        for (int l = 0; l < kW && v * kW + l < count; ++l) {
          out[(query + v * kW + l) * classes + run_class] = boundary[l];
        }
      }
      run_class = -1;
    };
    const auto join = [&](int64_t id, Vec<A> m, Vec<A> s) {  // m relative to the first reference
      if (id == run_class) {
        const Vec<A> higher = vmax<A>(run_most, m);
        run_sum = run_sum * vexp2<A>(run_most - higher) + s * vexp2<A>(m - higher);
        run_most = higher;
      } else {
        close();
        run_class = id;
        run_most = m;
        run_sum = s;
      }
    };
    for (int64_t k = 0; k < chunks; ++k) {
      const Chunk chunk = make_chunk(start, classes, k, chunks);
      if (chunk.begin == chunk.end && !(valid == 0 && k == 0)) continue;
      const Vec<A> shift = load(field(k, kReference) + v * kW) - reference;
      const auto at = [&](Field f) { return load(field(k, f) + v * kW); };
      if (chunk.head_class >= 0) join(chunk.head_class, at(kHeadMaximum) - reference, at(kHeadSum));
      merge(at(kMaximum) + shift, at(kSum));
      if (p.targets != nullptr) {
        const Vec<A> x = at(kTarget);
        target = x == -Const<A>::kInfinity ? target : x + shift;
      }
      if (chunk.tail_class >= 0) join(chunk.tail_class, at(kTailMaximum) - reference, at(kTailSum));
    }
    close();
    const Vec<A> log2_sum = vlog2<A>(sum);
    store(maximum + v * kW, most);
    store(log_sum + v * kW, log2_sum);
    const Vec<A> total =
        valid == 0 ? splat<A>(-Const<A>::kInfinity) : reference + (most + log2_sum);
    store(natural + v * kW, total * Const<A>::kLn2);
    if (p.targets != nullptr) {
      Vec<A> nll = -((target - most) - log2_sum) * Const<A>::kLn2;
      if (valid == 0) nll = splat<A>(Const<A>::kInfinity);
      const Vec<A> none{};
      nll = targets[v] < 0 ? none : nll;
      A* to = out + query + v * kW;
      if (count >= (v + 1) * kW) {
        store(to, nll);
      } else {
        store_n(to, nll, count - v * kW);
      }
    }
  }
  for (int l = 0; l < count; ++l) lse[l] = natural[l];
  if (p.targets != nullptr) return;
  if (held_values != nullptr) {
    alignas(64) A values[kClassBuffer * kL];
    for (int64_t c = 0; c < classes; ++c) {
      for (int v = 0; v < NV; ++v) {
        const Vec<A> x =
            (load(held_values + c * kL + v * kW) - load(maximum + v * kW)) - load(log_sum + v * kW);
        store(values + c * kL + v * kW,
              valid == 0 ? splat<A>(-Const<A>::kInfinity) : x * Const<A>::kLn2);
      }
    }
    unpack_transposed<A>(values, kL, classes, count, out + query * classes, classes);
    return;
  }
  for (int l = 0; l < count; ++l) {
    A* row = out + (query + l) * classes;
    const auto finish = [&](int64_t from, int64_t to, A shift) {
      const Vec<A> minus = splat<A>(maximum[l] - shift), log2_sum = splat<A>(log_sum[l]);
      for (int64_t c = from; c < to; c += kW) {
        const int n = static_cast<int>(min_of<int64_t>(kW, to - c));
        const Vec<A> x = ((n == kW ? load(row + c) : load_n(row + c, n)) - minus) - log2_sum;
        const Vec<A> y = valid == 0 ? splat<A>(-Const<A>::kInfinity) : x * Const<A>::kLn2;
        if (n == kW) {
          store(row + c, y);
        } else {
          store_n(row + c, y, n);
        }
      }
    };
    int64_t done = 0;
    for (int64_t k = 0; k < chunks; ++k) {
      const Chunk chunk = make_chunk(start, classes, k, chunks);
      if (chunk.begin == chunk.end && !(valid == 0 && k == 0)) continue;
      finish(done, chunk.class_begin,
             0);  // partial classes, relative to the first reference already
      finish(chunk.class_begin, chunk.class_end, field(k, kReference)[l] - field(0, kReference)[l]);
      done = max_of(done, chunk.class_end);
    }
    finish(done, classes, 0);
  }
}

}  // namespace fastmeta::matching::FASTMETA_ISA
