// The loops over tasks, steps and back: instantiated for float and double by adapt_*_cpu.cpp.
#pragma once
#include <atomic>
#include <vector>

#include "engine/task.h"

namespace fastmeta::engine::FASTMETA_ISA {

// A thread's memory, kept from call to call.
inline thread_local Scratch task_memory{int64_t{512} << 20};
inline thread_local Scratch call_memory{int64_t{64} << 20};

enum class Mode { kAdapt, kBackward, kMetaStep };

// Tasks [begin, end) of a group add to gradients of the group's own, in order. The more bytes these
// have, the fewer groups: each is cleared, and read once more for the sum.
inline int64_t num_groups(int64_t tasks, int64_t bytes) {
  const int64_t most = bytes > (int64_t{1} << 20) ? 8 : bytes > (int64_t{1} << 18) ? 16 : 32;
  return min_of<int64_t>(tasks, most);
}

template <class T>
class Run {
 public:
  Run(const Adapt& args, const AdaptGradients* gradients, Mode mode)
      : args_(args), gradients_(gradients), mode_(mode), plan_(args, kGrain<T>) {
    if (gradients != nullptr) {
      const AdaptGradients& g = *gradients;
      wants_.shared = g.shared != nullptr && args.num_shared > 0;
      wants_.rates = g.rates != nullptr;
      wants_.support_x = g.support_x != nullptr;
      wants_.query_x = g.query_x != nullptr;
      wants_.backward =
          g.fast != nullptr || wants_.shared || wants_.rates || wants_.support_x || wants_.query_x;
      const bool through_steps =
          g.fast != nullptr || wants_.shared || wants_.rates || wants_.support_x;
      wants_.second_order = through_steps && !g.first_order && args.steps > 0;
    }
  }

  const Plan& plan() const { return plan_; }

  void operator()(ParallelFor par) {
    check();
    if (args_.tasks == 0) {
      clear_gradients();
      write_loss(nullptr);
      return;
    }
    const Buffers<T> buffers(plan_, args_, wants_, mode_ == Mode::kMetaStep);
    rate_width_ = plan_.rate_width(args_);
    rate_size_ = wants_.rates ? args_.rate_rows * rate_width_ : 0;
    group_size_ = wants_.backward
                      ? plan_.fast.size + plan_.shared.size + plan_.factored_size + rate_size_
                      : 0;
    groups_ = num_groups(args_.tasks, group_size_ * static_cast<int64_t>(sizeof(T)));
    added_.assign(groups_, 0);
    writes_weights_ = mode_ == Mode::kMetaStep && args_.queries > 0;
    call_memory.reset(
        Scratch::size_of<T>(plan_.fast.size) + Scratch::size_of<T>(plan_.factored_size) +
        Scratch::size_of<T>(plan_.shared.size) +
        Scratch::size_of<T>(args_.rate_rows * rate_width_) +
        Scratch::size_of<T>(groups_ * group_size_) + Scratch::size_of<double>(args_.tasks));
    T* theta = call_memory.take<T>(plan_.fast.size);
    T* weights = call_memory.take<T>(plan_.factored_size);
    T* shared = call_memory.take<T>(plan_.shared.size);
    T* rates = call_memory.take<T>(args_.rate_rows * rate_width_);
    group_gradients_ = call_memory.take<T>(groups_ * group_size_);
    losses_ = call_memory.take<double>(args_.tasks);
    import_all(par, theta, weights, shared);
    import_rates(rates);
    const Common<T> common{args_, plan_, wants_, buffers, theta, weights, shared, rates};
    common_ = &common;
    next_group_ = 0;
    par(
        groups_, 1, [](void* context, int64_t, int64_t) { static_cast<Run*>(context)->work(); },
        this);
    if (wants_.backward) export_gradients(par);
    write_loss(losses_);
  }

 private:
  // What each thread does: groups, as long as there are any. A thread that comes late, or that the
  // machine takes away for a while, leaves them to the others; which thread does a group changes no
  // result.
  void work() {
    int64_t begin = 0, end = 0;
    if (!take_groups(&begin, &end)) return;
    const int64_t total = common_->buffers.total;
    task_memory.reset(Scratch::size_of<T>(total));
    Task<T> task(*common_, task_memory.take<T>(total));
    do {
      for (int64_t g = begin; g < end; ++g) {
        group(task, g);
        add_complete_pairs(begin, g + 1);
      }
    } while (take_groups(&begin, &end));
  }

  // Several at once in the beginning, whose sums then need no other thread: powers of two, from
  // multiples of them on.
  bool take_groups(int64_t* begin, int64_t* end) {
    *begin = next_group_.load(std::memory_order_relaxed);
    do {
      const int64_t left = groups_ - *begin;
      if (left <= 0) return false;
      *end = *begin + (left > 16 ? 4 : left > 8 ? 2 : 1);
    } while (!next_group_.compare_exchange_weak(*begin, *end, std::memory_order_relaxed));
    return true;
  }

  // The mean over the tasks, in their order; of no tasks NaN, as torch's.
  void write_loss(const double* losses) const {
    if (mode_ != Mode::kMetaStep) return;
    double sum = 0;
    for (int64_t t = 0; t < args_.tasks; ++t) sum += losses[t];
    *static_cast<T*>(args_.loss) = static_cast<T>(sum / static_cast<double>(args_.tasks));
  }

  void check() const {
    for (const Param& p : plan_.fast.params) {
      if (p.layout == Layout::kNone) {
        throw std::invalid_argument("fastmeta: an adapted parameter that the program does not use");
      }
    }
    for (int64_t i = 0; i < args_.num_fast + args_.num_shared; ++i) {
      const bool is_fast = i < args_.num_fast;
      const int64_t j = is_fast ? i : i - args_.num_fast;
      const Param& p = (is_fast ? plan_.fast : plan_.shared).params[j];
      if (p.layout != Layout::kNone &&
          p.numel != (is_fast ? args_.fast_numel : args_.shared_numel)[j]) {
        throw std::invalid_argument("fastmeta: a parameter of another size than the program says");
      }
    }
    if (plan_.is_static.back()) {
      throw std::invalid_argument("fastmeta: no adapted parameter influences the prediction");
    }
    const bool rates_fit = !args_.rate_each_number() || args_.rate_cols == plan_.fast.numel;
    if (!rates_fit || (args_.rate_rows != 1 && args_.rate_rows != args_.steps)) {
      throw std::invalid_argument("fastmeta: rates of an unexpected shape");
    }
  }

  void clear_sums(T* sums) const {
    const int64_t ahead = plan_.fast.size + plan_.shared.size;
    Task<T>::zero(sums, writes_weights_ ? ahead : ahead + plan_.factored_size);
    Task<T>::zero(sums + ahead + plan_.factored_size, rate_size_);
  }

  void group(Task<T>& task, int64_t g) {
    T* sums = group_gradients_ + g * group_size_;
    if (wants_.backward) clear_sums(sums);
    const int64_t begin = g * args_.tasks / groups_, end = (g + 1) * args_.tasks / groups_;
    for (int64_t t = begin; t < end; ++t) one(task, t, t == begin, sums);
  }

  // theta_k of the task at hand, for the backward pass.
  const T* theta_at(Task<T>& task, int64_t t, int64_t k) const {
    if (k == 0) return common_->theta;
    if (mode_ == Mode::kMetaStep) return task.trajectory() + (k - 1) * plan_.fast.size;
    unpack(plan_.fast, kept(t, k), task.trajectory());
    return task.trajectory();
  }

  // Where theta_k, k from 1, is kept between calls.
  T* kept(int64_t t, int64_t k) const {
    return static_cast<T*>(args_.trajectory) + (t * args_.steps + k - 1) * plan_.fast.numel;
  }

  // All steps; returns theta_K.
  const T* descend(Task<T>& task, int64_t t) {
    const T* theta = common_->theta;
    for (int64_t k = 0; k < args_.steps; ++k) {
      T* next = task.trajectory() + (mode_ == Mode::kMetaStep ? k : k % 2) * plan_.fast.size;
      task.descend(k, theta, next);
      theta = next;
      if (args_.trajectory != nullptr) pack(plan_.fast, theta, kept(t, k + 1));
    }
    return theta;
  }

  void one(Task<T>& task, int64_t t, bool first, T* sums) {
    const bool wanted = wants_.backward;
    task.begin(t, static_cast<T*>(wanted ? gradients_->support_x : nullptr),
               static_cast<T*>(wanted ? gradients_->query_x : nullptr));
    const T* last = mode_ == Mode::kBackward ? theta_at(task, t, args_.steps) : descend(task, t);
    if (mode_ == Mode::kAdapt && args_.adapted != nullptr) export_adapted(task, last, t);
    const bool from_prediction =
        mode_ == Mode::kMetaStep || (mode_ == Mode::kBackward && gradients_->prediction != nullptr);
    if (args_.queries > 0 && (mode_ == Mode::kAdapt || from_prediction)) task.query_forward(last);
    if (args_.prediction != nullptr && args_.queries > 0) {
      task.export_prediction(static_cast<T*>(args_.prediction));
    }
    if (mode_ == Mode::kMetaStep) {
      const T scale = T(1) / static_cast<T>(args_.tasks);
      losses_[t] = args_.queries > 0 ? task.query_loss(scale) : 0;
    }
    if (wants_.backward) back(task, t, last, from_prediction && args_.queries > 0, first, sums);
  }

  void back(Task<T>& task, int64_t t, const T* last, bool from_prediction, bool first, T* sums) {
    const int64_t size = plan_.fast.size;
    T* shared = wants_.shared ? sums + size : nullptr;
    T* weights = sums + size + plan_.shared.size;
    T* rates = wants_.rates ? weights + plan_.factored_size : nullptr;
    // The first task of a group gathers in the group's sums themselves.
    T* lambda = task.gather_in(first ? sums : nullptr);
    if (!first) Task<T>::zero(lambda, size);
    if (mode_ == Mode::kBackward && gradients_->adapted != nullptr) {
      import_adapted(task, last, lambda, weights, t);
    }
    if (from_prediction) {
      if (mode_ == Mode::kBackward) {
        task.import_prediction_gradient(static_cast<const T*>(gradients_->prediction));
      }
      task.query_backward(last, weights, shared, first && writes_weights_);
    }
    for (int64_t k = args_.steps - 1; k >= 0; --k) {
      if (wants_.second_order) {
        task.step_back(k, theta_at(task, t, k), shared, rates);
      } else if (rates != nullptr) {
        task.rates_back(k, theta_at(task, t, k), rates);
      }
    }
    task.finish(from_prediction, weights, shared);
    task.export_input_gradients(static_cast<T*>(gradients_->support_x),
                                static_cast<T*>(gradients_->query_x), from_prediction);
    for (int64_t i = 0; !first && i < size; ++i) sums[i] += lambda[i];
  }

  // A part of a parameter that goes from torch's tensor to the engine's vector, or back.
  struct Move {
    const Param* param;
    Part part;
    T* engine;
    T* torch;
  };
  void add_moves(const Param& p, T* engine, T* torch) {
    for_each_part<T>(p, [&](const Part& part) { moves_.push_back({&p, part, engine, torch}); });
  }
  void add_moves(const ParamList& list, T* engine, void* const* torch) {
    for (size_t i = 0; torch != nullptr && i < list.params.size(); ++i) {
      const Param& p = list.params[i];
      const bool whole = p.layout != Layout::kNone && p.layout != Layout::kFactored;
      if (whole) add_moves(p, engine + p.offset, static_cast<T*>(torch[i]));
    }
  }
  // body(move), by all threads where there is enough to do.
  template <class F>
  void each_move(ParallelFor par, bool together, F body) {
    const int64_t count = static_cast<int64_t>(moves_.size());
    if (!together) {
      for (const Move& move : moves_) body(move);
      return;
    }
    auto range = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(moves_[i]);
    };
    par(
        count, 1,
        [](void* context, int64_t begin, int64_t end) {
          (*static_cast<decltype(range)*>(context))(begin, end);
        },
        &range);
  }
  static constexpr int64_t kTogether = 1 << 15;  // numbers from which threads share

  void import_all(ParallelFor par, T* theta, T* weights, T* shared) {
    const auto input = [](const void* const* list) { return const_cast<void* const*>(list); };
    moves_.clear();
    add_moves(plan_.fast, theta, input(args_.fast));
    add_moves(plan_.shared, shared, input(args_.shared));
    for (const Factored& f : plan_.factored) {
      add_moves(f.weight, weights + f.weight.offset, static_cast<T*>(input(args_.fast)[f.param]));
    }
    for (const Param& p : plan_.fast.params) {
      if (p.layout == Layout::kFactored) Task<T>::zero(theta + p.offset, p.size);
    }
    pad(plan_.fast, theta);
    pad(plan_.shared, shared);
    const int64_t numbers = plan_.fast.size + plan_.shared.size + plan_.factored_size;
    each_move(par, numbers >= kTogether, [](const Move& m) {
      import_part(*m.param, m.part, static_cast<const T*>(m.torch), m.engine);
    });
  }

  // Zeros between parameters, which sums over whole vectors read.
  static void pad(const ParamList& list, T* to) {
    for (size_t i = 0; i < list.params.size(); ++i) {
      const int64_t end = i + 1 < list.params.size() ? list.params[i + 1].offset : list.size;
      for (int64_t j = list.params[i].offset + list.params[i].size; j < end; ++j) to[j] = 0;
    }
  }

  void import_rates(T* to) const {
    const T* from = static_cast<const T*>(args_.rates);
    for (int64_t r = 0; r < args_.rate_rows; ++r) {
      if (!args_.rate_each_number()) {
        std::copy(from, from + rate_width_, to);
      } else {
        for (const Param& p : plan_.fast.params)
          import_param(p, from + p.torch_offset, to + p.offset);
        pad(plan_.fast, to);
      }
      from += args_.rate_cols;
      to += rate_width_;
    }
  }

  int factored_index(int param) const {
    for (size_t i = 0; i < plan_.factored.size(); ++i) {
      if (plan_.factored[i].param == param) return static_cast<int>(i);
    }
    return -1;
  }

  void export_adapted(Task<T>& task, const T* theta, int64_t t) const {
    for (size_t i = 0; i < plan_.fast.params.size(); ++i) {
      const Param& p = plan_.fast.params[i];
      T* to = static_cast<T*>(args_.adapted[i]) + t * p.numel;
      if (const int f = factored_index(static_cast<int>(i)); f >= 0) {
        export_param(plan_.factored[f].weight, task.whole_weight(f, theta), to);
      } else {
        export_param(p, theta + p.offset, to);
      }
    }
  }

  void import_adapted(Task<T>& task, const T* theta, T* lambda, T* weights, int64_t t) const {
    for (size_t i = 0; i < plan_.fast.params.size(); ++i) {
      const Param& p = plan_.fast.params[i];
      if (gradients_->adapted[i] == nullptr) continue;
      const T* from = static_cast<const T*>(gradients_->adapted[i]) + t * p.numel;
      if (const int f = factored_index(static_cast<int>(i)); f >= 0) {
        task.whole_weight_backward(
            f, theta, weights, [&](T* to) { import_param(plan_.factored[f].weight, from, to); });
      } else {
        import_param(p, from, lambda + p.offset);
      }
    }
  }

  void clear_gradients() const {
    if (gradients_ == nullptr) return;
    const auto clear = [](const ParamList& list, void* const* out) {
      for (size_t i = 0; out != nullptr && i < list.params.size(); ++i) {
        Task<T>::zero(static_cast<T*>(out[i]), list.params[i].numel);
      }
    };
    clear(plan_.fast, gradients_->fast);
    clear(plan_.shared, gradients_->shared);
    if (gradients_->rates != nullptr) {
      Task<T>::zero(static_cast<T*>(gradients_->rates), args_.rate_rows * args_.rate_cols);
    }
  }

  // The gradients of the groups are summed in a binary tree: the first of 2 * span groups gets the
  // sum of all. What a thread made itself it sums itself, while that lies in its caches; added_
  // says of a group that its sum went to another.
  void add_pair(int64_t first, int64_t span) {
    T* sums = group_gradients_ + first * group_size_;
    const T* more = sums + span * group_size_;
    for (int64_t i = 0; i < group_size_; ++i) sums[i] += more[i];
    added_[first + span] = 1;
  }
  // The trees that end where a thread is, of its groups [begin, end).
  void add_complete_pairs(int64_t begin, int64_t end) {
    for (int64_t span = 1; end % (2 * span) == 0 && end - 2 * span >= begin; span *= 2) {
      add_pair(end - 2 * span, span);
    }
  }

  // Numbers [begin, begin + size) of the sum of all groups, in the first one.
  void sum_groups(int64_t begin, int64_t size) const {
    for (int64_t span = 1; span < groups_; span *= 2) {
      for (int64_t g = 0; g + span < groups_; g += 2 * span) {
        if (added_[g + span] != 0) continue;
        T* sums = group_gradients_ + g * group_size_ + begin;
        const T* more = sums + span * group_size_;
        for (int64_t i = 0; i < size; ++i) sums[i] += more[i];
      }
    }
  }

  void export_gradients(ParallelFor par) {
    T* sums = group_gradients_;
    T* weights = sums + plan_.fast.size + plan_.shared.size;
    moves_.clear();
    add_moves(plan_.fast, sums, gradients_->fast);
    add_moves(plan_.shared, sums + plan_.fast.size, gradients_->shared);
    for (const Factored& f : plan_.factored) {
      if (gradients_->fast == nullptr) break;
      add_moves(f.weight, weights + f.weight.offset, static_cast<T*>(gradients_->fast[f.param]));
    }
    const bool together = group_size_ >= kTogether;
    if (!together) sum_groups(0, group_size_);
    each_move(par, together, [&](const Move& m) {
      if (together) sum_groups(m.engine + m.part.begin - sums, m.part.size);
      export_part(*m.param, m.part, static_cast<const T*>(m.engine), m.torch);
    });
    if (!wants_.rates) return;
    if (together) sum_groups(group_size_ - rate_size_, rate_size_);
    const T* from = weights + plan_.factored_size;
    T* to = static_cast<T*>(gradients_->rates);
    for (int64_t r = 0; r < args_.rate_rows; ++r) {
      if (!args_.rate_each_number()) {
        std::copy(from, from + rate_width_, to);
      } else {
        for (const Param& p : plan_.fast.params)
          export_param(p, from + p.offset, to + p.torch_offset);
      }
      from += rate_width_;
      to += args_.rate_cols;
    }
  }

  const Adapt& args_;
  const AdaptGradients* gradients_;
  Mode mode_;
  Plan plan_;
  Wants wants_;
  int64_t rate_width_ = 0, rate_size_ = 0, group_size_ = 0, groups_ = 0;
  T* group_gradients_ = nullptr;
  double* losses_ = nullptr;  // of each task
  std::vector<char> added_;
  std::vector<Move> moves_;
  std::atomic<int64_t> next_group_{0};
  // The queries of a group's first task write what factored weights gain; nobody adds to it before.
  bool writes_weights_ = false;
  const Common<T>* common_ = nullptr;
};

template <class T>
void run(const Adapt& args, const AdaptGradients* gradients, Mode mode, ParallelFor par) {
  Run<T> run(args, gradients, mode);
  run(par);
}

}  // namespace fastmeta::engine::FASTMETA_ISA
