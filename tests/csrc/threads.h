// at::parallel_for on std::thread. ThreadSanitizer does not see how OpenMP's threads wait for each
// other, so it would report races that are none. `-include` puts this header before all others.
#pragma once

#define INTRA_OP_PARALLEL
#include <cstdint>

namespace at::internal {
template <typename F>
void invoke_parallel(int64_t begin, int64_t end, int64_t grain_size, const F& f);
}

#include <ATen/Parallel.h>

#include <algorithm>
#include <barrier>
#include <exception>
#include <thread>
#include <vector>

namespace at::internal {

// Divides the range as ATen/ParallelOpenMP.h does.
template <typename F>
void invoke_parallel(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  int64_t threads = get_num_threads();
  if (grain_size > 0) {
    threads = std::min(threads, divup(end - begin, grain_size));
  }
  const int64_t chunk = divup(end - begin, threads);
  std::vector<std::exception_ptr> errors(threads);
  // Without it, one thread would do most of the work before the others exist.
  std::barrier all_are_here(threads);
  const auto run = [&](int64_t id) {
    all_are_here.arrive_and_wait();
    const int64_t first = begin + id * chunk;
    if (first >= end) {
      return;
    }
    try {
      ThreadIdGuard guard{int(id)};
      f(first, std::min(end, first + chunk));
    } catch (...) {
      errors[id] = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  for (int64_t id = 1; id < threads; ++id) {
    others.emplace_back(run, id);
  }
  run(0);
  for (std::thread& thread : others) {
    thread.join();
  }
  for (const std::exception_ptr& error : errors) {
    if (error) {
      std::rethrow_exception(error);
    }
  }
}

} // namespace at::internal
