// Parallel loops over tasks. Results do not depend on which thread takes a task.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace mulki {

// The number of threads that a parallel loop may use here.
inline int64_t threads_here() {
  return at::in_parallel_region() ? 1 : at::get_num_threads();
}

// For tasks that multiply nothing.
struct NoEngine {
  struct Scope {};
};

// Calls run(i) for each task; each thread holds a Scope of the engine. Each thread has a range of
// tasks, which is the same in all loops with the same number of tasks, so that the thread finds in
// its cache what it wrote before. A thread that has completed its range takes remaining tasks from
// the ranges of the other threads.
template <typename Engine = NoEngine, typename F>
inline void parallel_tasks(int64_t tasks, const F& run) {
  using Scope = typename Engine::Scope;
  const int64_t threads = std::min(threads_here(), tasks);
  if (threads <= 1) {
    [[maybe_unused]] const Scope scope;
    for (int64_t i = 0; i < tasks; ++i) {
      run(i);
    }
    return;
  }
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Range> ranges(threads);
  for (int64_t t = 0; t < threads; ++t) {
    ranges[t].next = t * tasks / threads;
    ranges[t].end = (t + 1) * tasks / threads;
  }
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const Scope scope;
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t step = 0; step < threads; ++step) {
        Range& range = ranges[(t + step) % threads];
        for (int64_t i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) {
          run(i);
        }
      }
    }
  });
}

} // namespace mulki
