// Working memory. It comes from torch's allocator, so that memory profilers see it, and lies in
// huge pages if the system has them. Each thread caches a few blocks for its next call: the first
// access to each page of new memory took a quarter of the time of a problem of 256 x 1000.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mulki {

using at::Tensor;

// A block of bytes. One thread constructs and destroys it.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t bytes) : block_(acquire(bytes)) {
    const auto start = reinterpret_cast<uintptr_t>(block_.mutable_data_ptr());
    data_ = reinterpret_cast<void*>((start + kAlignment - 1) / kAlignment * kAlignment);
  }
  Scratch(Scratch&& other) noexcept {
    *this = std::move(other);
  }
  Scratch& operator=(Scratch&& other) noexcept {
    std::swap(block_, other.block_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Scratch() {
    if (block_.defined()) {
      release(std::move(block_));
    }
  }

  template <typename T>
  T* data() const {
    return static_cast<T*>(data_);
  }

 private:
  static constexpr int64_t kAlignment = 64;
#if defined(__SANITIZE_ADDRESS__)
  // A longer block, such as a cached one, would hide an access beyond the end. Those of torch are
  // aligned; one byte more makes the address of an empty block valid.
  static constexpr int64_t kMaxCached = 0, kForAlignment = 1;
#else
  static constexpr int64_t kMaxCached = int64_t(24) << 20; // bytes that a thread caches
  static constexpr int64_t kForAlignment = kAlignment;
#endif
  static constexpr uintptr_t kHugePage = uintptr_t(2) << 20;

  static std::vector<Tensor>& cached() {
    static thread_local std::vector<Tensor> blocks;
    return blocks;
  }

  static Tensor acquire(int64_t bytes) {
    bytes += kForAlignment;
    auto& blocks = cached();
    int64_t best = -1;
    for (int64_t i = 0; i < int64_t(blocks.size()); ++i) {
      const int64_t size = blocks[i].numel();
      if (size >= bytes && (best < 0 || size < blocks[best].numel())) {
        best = i;
      }
    }
    if (best >= 0) {
      Tensor block = std::move(blocks[best]);
      blocks.erase(blocks.begin() + best);
      return block;
    }
    Tensor block = at::empty({bytes}, at::kByte);
#if defined(__linux__)
    const auto start = reinterpret_cast<uintptr_t>(block.mutable_data_ptr());
    const uintptr_t begin = (start + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t end = (start + uintptr_t(bytes)) / kHugePage * kHugePage;
    if (end > begin) {
      // Only advice: it may fail without harm.
      madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    }
#endif
    return block;
  }

  static void release(Tensor block) {
    if (block.numel() > kMaxCached) {
      return;
    }
    auto& blocks = cached();
    blocks.push_back(std::move(block));
    int64_t total = 0;
    for (const Tensor& b : blocks) {
      total += b.numel();
    }
    // The oldest blocks go first: no request has used them for the longest time.
    while (total > kMaxCached) {
      total -= blocks.front().numel();
      blocks.erase(blocks.begin());
    }
  }

  Tensor block_;
  void* data_ = nullptr; // the first aligned byte of the block
};

} // namespace mulki
