// The operands X and W of a product X W^T, as rows in memory, and changes of their layout.
//
// Their elements are float or bfloat16, and sums are float. Of a product A B, brgemm reads B [k, n]
// of floats row by row, and of bfloat16 in pairs of rows, [k / 2][n][2] (the VNNI layout), so k has
// to be even; `interleave` writes this layout.
#pragma once

#include "common/vec_math.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace mulki {

using at::Tensor;

template <typename E>
constexpr bool kIsBFloat16 = std::is_same_v<E, at::BFloat16>;

// Writes out [n][2] from two rows of n elements. A null second row stands for zeros.
template <typename E>
inline void interleave(const E* first, const E* second, int64_t n, E* out) {
  const auto* a = reinterpret_cast<const uint16_t*>(first);
  const auto* b = reinterpret_cast<const uint16_t*>(second);
  auto* pairs = reinterpret_cast<uint32_t*>(out);
  if (b == nullptr) {
    for (int64_t j = 0; j < n; ++j) {
      pairs[j] = a[j];
    }
    return;
  }
  for (int64_t j = 0; j < n; ++j) {
    pairs[j] = uint32_t(a[j]) | (uint32_t(b[j]) << 16);
  }
}

// dst [cols, rows] = src [rows, cols]^T for elements of four bytes: float, or two bfloat16 as
// uint32_t. It works in blocks that fit into registers.
template <typename T, std::enable_if_t<sizeof(T) == 4, int> = 0>
inline void transpose(
    const T* src, int64_t ld_src, T* dst, int64_t ld_dst, int64_t rows, int64_t cols) {
  constexpr int64_t kBlock = Vec::size();
  for (int64_t r0 = 0; r0 < rows; r0 += kBlock) {
    const int64_t r1 = std::min(rows, r0 + kBlock);
    for (int64_t c0 = 0; c0 < cols; c0 += kBlock) {
      const int64_t c1 = std::min(cols, c0 + kBlock);
      if (r1 - r0 == kBlock && c1 - c0 == kBlock) {
        // Vector loads and stores do not change bits, so any four bytes can be moved as a float.
        at::vec::transpose_mxn<float, kBlock, kBlock>(
            reinterpret_cast<const float*>(src + r0 * ld_src + c0), ld_src,
            reinterpret_cast<float*>(dst + c0 * ld_dst + r0), ld_dst);
        continue;
      }
      for (int64_t c = c0; c < c1; ++c) {
        for (int64_t r = r0; r < r1; ++r) {
          std::memcpy(dst + c * ld_dst + r, src + r * ld_src + c, sizeof(T));
        }
      }
    }
  }
}

// The same for bfloat16, for an even number of columns and at most kMaxTransposeRows rows. Pairs of
// neighbours are transposed as four bytes, and then each row of pairs is split into two rows.
constexpr int64_t kMaxTransposeRows = 512;
template <typename E, std::enable_if_t<kIsBFloat16<E>, int> = 0>
inline void transpose(
    const E* src, int64_t ld_src, E* dst, int64_t ld_dst, int64_t rows, int64_t cols) {
  constexpr int64_t kPairs = 16;
  alignas(64) uint32_t transposed[kPairs * kMaxTransposeRows];
  for (int64_t c0 = 0; c0 < cols / 2; c0 += kPairs) {
    const int64_t pairs = std::min(kPairs, cols / 2 - c0);
    transpose(
        reinterpret_cast<const uint32_t*>(src) + c0, ld_src / 2, transposed, rows, rows, pairs);
    for (int64_t c = 0; c < pairs; ++c) {
      const uint32_t* pair = transposed + c * rows;
      auto* low = reinterpret_cast<uint16_t*>(dst + (c0 + c) * 2 * ld_dst);
      auto* high = low + ld_dst;
      for (int64_t r = 0; r < rows; ++r) {
        low[r] = uint16_t(pair[r]);
        high[r] = uint16_t(pair[r] >> 16);
      }
    }
  }
}

// A part of a matrix. Two rows are `stride` elements apart.
template <typename E>
struct Part {
  const E* data;
  int64_t stride;
};

// A contiguous matrix [count, padded] of bfloat16. The width is padded with zeros to an even number,
// so that two neighbours can be moved as four bytes.
struct BFloat16Matrix {
  explicit BFloat16Matrix(const Tensor& t)
      : count(t.size(0)), width(t.size(1)), padded((width + 1) / 2 * 2), storage(t.contiguous()) {
    const auto address = reinterpret_cast<uintptr_t>(storage.const_data_ptr());
    if (padded != width || address % sizeof(uint32_t) != 0) {
      storage = at::zeros({count, padded}, t.options());
      storage.narrow(1, 0, width).copy_(t);
    }
    data = storage.const_data_ptr<at::BFloat16>();
  }
  // Whether `read` returns the stored elements without a buffer.
  bool in_place() const {
    return true;
  }
  Part<at::BFloat16> read(
      int64_t first, int64_t /*rows*/, int64_t column, int64_t /*columns*/, at::BFloat16*) const {
    return {data + first * padded + column, padded};
  }

  int64_t count, width, padded;
  Tensor storage;
  const at::BFloat16* data;
};

// A matrix that is read as float. Half precision is converted block by block, so that there is no
// converted copy of the whole matrix.
class FloatMatrix {
 public:
  explicit FloatMatrix(const Tensor& t)
      : count(t.size(0)), width(t.size(1)), padded(width), storage_(t.contiguous()) {}

  bool in_place() const {
    return storage_.scalar_type() == at::kFloat;
  }
  Part<float> read(
      int64_t first, int64_t rows, int64_t column, int64_t columns, float* buffer) const {
    return with_type(storage_.scalar_type(), [&](auto element) -> Part<float> {
      using T = decltype(element);
      const T* from = storage_.template const_data_ptr<T>() + first * width + column;
      if constexpr (std::is_same_v<T, float>) {
        return {from, width};
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          to_floats(from + i * width, buffer + i * columns, columns);
        }
        return {buffer, columns};
      }
    });
  }

  int64_t count;
  int64_t width;
  int64_t padded; // equal to the width

 private:
  Tensor storage_;
};

// Where products are written or, with `add`, added.
struct Sums {
  float* data;
  int64_t ld; // distance of two rows
  bool add;
};

// A block of Y = X W^T in one tile.
struct TileProduct {
  int64_t first, begin,
      rows; // rows of X from `first` on, which are the packed ones from `begin` on
  const void *left, *right; // packed rows of X, and the packed tile of W^T
  int64_t valid, width; // columns of the tile; those from `valid` on are padding
  float* out; // [rows, width]
};

} // namespace mulki
