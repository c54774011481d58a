// The engine for floats where torch allows products of less precision and the CPU has a matrix unit,
// which multiplies bfloat16 but no floats. A float becomes the sum of two bfloat16, its parts: the
// float rounded, and the first digits of what is left. Of four products of parts the least one is
// left out:
//
//   x w = x_2 w_1 + x_1 w_2 + x_1 w_1, with an error of about 2^-16
//
// The parts of a row of X lie side by side, and those of W^T one after the other.
#pragma once

#include "common/scratch.h"
#include "matmul/brgemm.h"

#include <bit>

namespace mulki {

// Writes the N parts of n floats, `distance` apart. One part is the float rounded. A finite float has
// finite parts, and one that is not finite has a part that is not finite.
template <int N>
inline void split(
    const float* __restrict in, int64_t n, at::BFloat16* __restrict out, int64_t distance) {
  if constexpr (N == 1) {
    at::vec::convert<float, at::BFloat16>(in, out, n);
    return;
  }
  auto* __restrict high = reinterpret_cast<uint16_t*>(out);
  auto* __restrict low = high + distance;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(in[i]);
    const uint32_t half = (bits & 0x7fffffff) < 0x7f000000 ? 0x8000 : 0;
    const uint32_t rounded = (bits + half) & 0xffff0000;
    high[i] = uint16_t(rounded >> 16);
    low[i] = uint16_t(std::bit_cast<uint32_t>(in[i] - std::bit_cast<float>(rounded)) >> 16);
  }
}

// c (+)= a b, of which two parts lie `a_part` and `b_part` apart.
template <int N>
inline void product_of_parts(
    int64_t m,
    int64_t n,
    int64_t k,
    const at::BFloat16* a,
    int64_t lda,
    int64_t a_part,
    const at::BFloat16* b,
    int64_t ldb,
    int64_t b_part,
    Sums c) {
  if constexpr (N == 2) {
    product(m, n, k, a + a_part, lda, b, ldb, c);
    c.add = true;
    product(m, n, k, a, lda, b + b_part, ldb, c);
  }
  product(m, n, k, a, lda, b, ldb, c);
}

// Elements from one row of parts to the next: for two parts an odd number of cache lines, so that
// rows of one column lie in different sets of the nearest cache.
template <int N>
constexpr int64_t row_of_parts(int64_t depth) {
  return N == 1 ? depth : N * depth + 32;
}

// Y = X W^T and dW are computed from parts, and dX from floats, because it would need all of W once
// more in parts.
struct BrgemmOfParts : Brgemm<float> {
  using Factor = at::BFloat16;
  using Scope = Brgemm<Factor>::Scope;
  static constexpr int kParts = 2;

  static int64_t left_bytes(const Operand& x, int64_t rows) {
    return rows * row_of_parts<2>(depth_of(x.width)) * int64_t(sizeof(Factor));
  }
  static void pack_left(const Operand& x, int64_t first, int64_t rows, void* out) {
    const int64_t depth = depth_of(x.width);
    std::memset(out, 0, size_t(left_bytes(x, rows)));
    for (int64_t i = 0; i < rows; ++i) {
      const float* row = x.read(first + i, 1, 0, x.width, nullptr).data;
      split<2>(row, x.width, static_cast<Factor*>(out) + i * row_of_parts<2>(depth), depth);
    }
  }

  static int64_t right_bytes(int64_t width, int64_t depth) {
    return 2 * width * depth_of(depth) * int64_t(sizeof(Factor));
  }
  // Packs W^T in VNNI layout, with zeros beyond the last row and column of W.
  static void pack_right(const Operand& w, int64_t first, int64_t width, void* out) {
    const int64_t rows = std::min(width, w.count - first), depth = depth_of(w.width);
    if (rows < width || depth > w.width) {
      std::memset(out, 0, size_t(right_bytes(width, w.width)));
    }
    constexpr int64_t kColumns = 64, kPart = kTileWidth * kColumns;
    for (int64_t c = 0; c < w.width; c += kColumns) {
      alignas(64) Factor parts[2 * kPart] = {};
      const int64_t columns = std::min(kColumns, w.width - c);
      const Part<float> in = w.read(first, rows, c, columns, nullptr);
      for (int64_t i = 0; i < rows; ++i) {
        split<2>(in.data + i * in.stride, columns, parts + i * kColumns, kPart);
      }
      for (int64_t part = 0; part < 2; ++part) {
        transpose(
            reinterpret_cast<const uint32_t*>(parts + part * kPart), kColumns / 2,
            static_cast<uint32_t*>(out) + (part * depth + c) / 2 * width, width, rows,
            (columns + 1) / 2);
      }
    }
  }

  static void multiply(const Operand& x, const Operand& w, const TileProduct& y) {
    const int64_t depth = depth_of(x.width), row = row_of_parts<2>(depth);
    product_of_parts<2>(
        y.rows, y.width, depth, static_cast<const Factor*>(y.left) + y.begin * row, row, depth,
        static_cast<const Factor*>(y.right), y.width, depth * y.width, {y.out, y.width, false});
    if (is_finite(y)) {
      return;
    }
    // Infinity times the second part of a float may be NaN.
    const Scratch floats(Brgemm<float>::right_bytes(y.width, w.width));
    Brgemm<float>::pack_right(w, y.column, y.width, floats.data<float>());
    TileProduct of_floats = y;
    of_floats.right = floats.data<float>();
    Brgemm<float>::multiply(x, w, of_floats);
  }

 private:
  // The second parts begin at a cache line.
  static int64_t depth_of(int64_t width) {
    return (width + 31) / 32 * 32;
  }

  static bool is_finite(const TileProduct& y) {
    Vec sum(0.0f);
    for (int64_t i = 0; i < y.rows * y.width; i += Vec::size()) {
      sum = at::vec::fmadd(Vec::loadu(y.out + i), Vec(0.0f), sum);
    }
    return sum_of(sum) == 0.0f;
  }
};

// Whether X W^T is computed from parts: where torch's own products of floats may be less precise.
inline bool multiplies_parts(const Tensor& x, const Tensor& w) {
  constexpr int64_t kLeast = 96; // With fewer rows or columns, splitting takes what it saves.
  using Precision = at::Float32Precision;
  const Precision allowed =
      at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  return (allowed == Precision::TF32 || allowed == Precision::BF16) &&
      x.scalar_type() == at::kFloat && std::min({x.size(0), x.size(1), w.size(0)}) >= kLeast &&
      at::native::cpublas::could_pack(at::kBFloat16);
}

// with_engine for kernels that compute X W^T.
template <typename F>
auto with_engine(const Tensor& x, const Tensor& w, const F& run) {
  if (multiplies_parts(x, w)) {
    return run(BrgemmOfParts{});
  }
  return with_engine(x.scalar_type(), run);
}

} // namespace mulki
