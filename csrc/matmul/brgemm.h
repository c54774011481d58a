// Products by at::native::cpublas::brgemm, which runs on any CPU and uses a matrix unit for bfloat16
// by itself:
//
//   product<E>: C [m, n] (+)= A [m, k] B [k, n], C in float32
//
// E is the type of the elements of A and B, float or bfloat16. `Brgemm` is the engine made of it,
// which computes Y = X W^T; with_engine chooses E. X is multiplied where it is, or as blocks
// converted from half precision; W^T is packed (operands.h), one tile of columns at a time. The
// products with G are in core/gradient_products.h.
#pragma once

#include "core/tiling.h"
#include "matmul/operands.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include <exception>
#include <vector>

namespace mulki {

// For float, torch falls back to a plain gemm if oneDNN has no brgemm kernel for the CPU.
template <typename E>
inline void product(
    int64_t m,
    int64_t n,
    int64_t k,
    const E* a,
    int64_t lda,
    const E* b,
    int64_t ldb,
    const Sums& c) {
  if (k > 0) {
    at::native::cpublas::brgemm(m, n, k, lda, ldb, c.ld, c.add, a, b, c.data, kIsBFloat16<E>);
    return;
  }
  for (int64_t i = 0; i < m && !c.add; ++i) {
    std::fill_n(c.data + i * c.ld, n, 0.0f);
  }
}

// The engine; in bfloat16 only if brgemm_has_bfloat16.
template <typename T>
struct Brgemm {
  using Element = T;
  using Operand = std::conditional_t<kIsBFloat16<T>, BFloat16Matrix, FloatMatrix>;

  // Releases the state of the matrix unit when a thread leaves a parallel region.
  struct Scope {
    ~Scope() {
      if (kIsBFloat16<T>) {
        at::native::cpublas::brgemm_release(true);
      }
    }
  };

  // Bytes of packed rows of X, which is on the left. Floats need no packing.
  static int64_t left_bytes(const Operand& x, int64_t rows) {
    return x.in_place() ? 0 : right_bytes(rows, x.padded);
  }
  static void pack_left(const Operand& x, int64_t first, int64_t rows, void* out) {
    x.read(first, rows, 0, x.padded, static_cast<T*>(out));
  }

  // Bytes of W^T in one tile, which is on the right.
  static int64_t right_bytes(int64_t width, int64_t depth) {
    return width * depth * int64_t(sizeof(T));
  }
  // Packs [depth, width], for bfloat16 in VNNI layout, with zeros beyond the last row of W.
  static void pack_right(const Operand& w, int64_t first, int64_t width, void* out) {
    const int64_t rows = std::min(width, w.count - first);
    if (rows < width) {
      std::memset(out, 0, size_t(right_bytes(width, w.padded)));
    }
    // Two neighbours in a row of W are a VNNI pair of W^T, so pairs are transposed as four bytes.
    using Unit = std::conditional_t<kIsBFloat16<T>, uint32_t, float>;
    constexpr int64_t kColumns = 64, kToUnit = int64_t(sizeof(Unit) / sizeof(T));
    alignas(64) T buffer[kColumns * kTileWidth];
    for (int64_t c = 0; c < w.padded; c += kColumns) {
      const int64_t columns = std::min(kColumns, w.padded - c);
      const Part<T> part = w.read(first, rows, c, columns, buffer);
      transpose(
          reinterpret_cast<const Unit*>(part.data), part.stride / kToUnit,
          static_cast<Unit*>(out) + c / kToUnit * width, width, rows, columns / kToUnit);
    }
  }

  // Writes a block of Y in one tile. In the padding the result is 0, or NaN if X is not finite.
  static void multiply(const Operand& x, const TileProduct& y) {
    const T* a = x.in_place() ? x.read(y.first, y.rows, 0, x.padded, nullptr).data
                              : static_cast<const T*>(y.left) + y.begin * x.padded;
    const T* b = static_cast<const T*>(y.right);
    const int64_t width = y.width;
    // One sum over a depth of 512 has twice the rounding error of two sums over 256.
    constexpr int64_t kDepth = 256;
    const int64_t columns = (y.valid + 15) / 16 * 16;
    int64_t d = 0;
    do {
      const int64_t depth = kIsBFloat16<T> ? x.padded : std::min(kDepth, x.padded - d);
      product(y.rows, columns, depth, a + d, x.padded, b + d * width, width, {y.out, width, d > 0});
      d += depth;
    } while (d < x.padded);
    for (int64_t i = 0; i < y.rows && columns < width; ++i) {
      std::fill(y.out + i * width + columns, y.out + (i + 1) * width, 0.0f);
    }
  }
};

// Whether brgemm multiplies bfloat16. A small product is tried, because brgemm throws if the CPU,
// or ONEDNN_MAX_CPU_ISA, allows neither AMX nor AVX512-BF16, which is twice as fast as float.
// torch's `could_pack` would not do: it knows AMX only. brgemm also throws while oneDNN is switched
// off.
inline bool brgemm_has_bfloat16() {
  if (!at::globalContext().userEnabledMkldnn()) {
    return false;
  }
  static const bool answer = [] {
    constexpr int64_t kSize = 32;
    std::vector<at::BFloat16> left(kSize * kSize, 1.0f), right(kSize * kSize);
    std::vector<float> sums(kSize * kSize);
    // In VNNI layout: row i has i + 1 in column i % 4, and zeros elsewhere.
    for (int64_t i = 0; i < kSize; ++i) {
      right[(i / 2 * kSize + i % 4) * 2 + i % 2] = float(i + 1);
    }
    try {
      product(
          kSize, kSize, kSize, left.data(), kSize, right.data(), kSize,
          {sums.data(), kSize, false});
      at::native::cpublas::brgemm_release(true);
    } catch (const std::exception&) {
      return false;
    }
    for (int64_t i = 0; i < kSize * kSize; ++i) {
      const int64_t column = i % kSize;
      // The sum over eight rows: (column + 1) + (column + 5) + ...
      if (sums[i] != (column < 4 ? float(8 * (column + 1) + 4 * 28) : 0.0f)) {
        return false;
      }
    }
    return true;
  }();
  return answer;
}

// Calls run(engine) with the engine for matrices of `dtype`. bfloat16 is multiplied as such if the
// CPU can, else as float, to which it converts without loss. float16 is always multiplied as float.
template <typename F>
auto with_engine(at::ScalarType dtype, const F& run) {
  if (dtype == at::kBFloat16 && brgemm_has_bfloat16()) {
    return run(Brgemm<at::BFloat16>{});
  }
  return run(Brgemm<float>{});
}

} // namespace mulki
