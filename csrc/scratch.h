// Working memory. It comes from torch's allocator, so that memory profilers see it, in huge pages
// where the system has them, and a little of it stays with the thread for its next call: touching
// fresh memory page by page took a quarter of the time of a problem of 256 x 1000.
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

// A block of bytes for the lifetime of the object, which is made and destroyed by one thread.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t bytes) : block_(take(bytes)) {}
  Scratch(Scratch&& other) noexcept : block_(std::move(other.block_)) {}
  Scratch& operator=(Scratch&& other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~Scratch() {
    if (block_.defined()) {
      give_back(std::move(block_));
    }
  }

  template <typename T>
  T* data() const {
    const auto start = reinterpret_cast<uintptr_t>(block_.mutable_data_ptr());
    return reinterpret_cast<T*>((start + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  static constexpr int64_t kAlignment = 64;
  static constexpr int64_t kKept = int64_t(24) << 20; // bytes that stay with a thread
  static constexpr uintptr_t kHugePage = uintptr_t(2) << 20;

  static std::vector<Tensor>& kept() {
    static thread_local std::vector<Tensor> blocks;
    return blocks;
  }

  static Tensor take(int64_t bytes) {
    bytes += kAlignment;
    auto& blocks = kept();
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
    const uintptr_t from = (start + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t to = (start + uintptr_t(bytes)) / kHugePage * kHugePage;
    if (to > from) {
      // Advice: where the system does not take it, nothing changes.
      madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
    }
#endif
    return block;
  }

  static void give_back(Tensor block) {
    if (block.numel() > kKept) {
      return;
    }
    auto& blocks = kept();
    blocks.push_back(std::move(block));
    int64_t total = 0;
    for (const Tensor& b : blocks) {
      total += b.numel();
    }
    // The oldest go first: they are the ones that nothing fitted into.
    while (total > kKept) {
      total -= blocks.front().numel();
      blocks.erase(blocks.begin());
    }
  }

  Tensor block_;
};

} // namespace mulki
