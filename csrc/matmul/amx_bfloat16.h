// The engine for bfloat16 on the matrix unit (engine.h, amx.h): X is packed in strips of 32 rows,
// W^T in strips of 32 columns, and sums are float.
#pragma once

#include "matmul/amx_engine.h"

#if defined(MULKI_AMX)

namespace mulki {

struct AmxBFloat16 {
  using Element = at::BFloat16;
  using Operand = Matrix<Element>;
  using Scope = amx::Scope;

  static constexpr int64_t kMaxRows = 256;
  static constexpr bool kOneTaskPerTile = false; // not measured
  static constexpr int64_t kMatrices = int64_t(16) << 20;
  static constexpr int64_t kScratch = int64_t(30) << 20;
  static constexpr int64_t kUnit = amx::kEdge, kWidth = 128;

  static int64_t strip_elements(int64_t depth) { // of 32 rows or columns
    return amx::blocks(depth) * amx::kBlock;
  }
  static int64_t left_bytes(const Operand& x, int64_t rows) {
    return right_bytes(rows, x.padded);
  }
  static int64_t right_bytes(int64_t width, int64_t depth) {
    return amx::blocks(width) * strip_elements(depth) * 2;
  }

  // At most 32 rows.
  static void pack_left(const Operand& x, int64_t first, int64_t rows, void* out) {
    auto* to = static_cast<uint16_t*>(out);
    for (int64_t d = 0; d < x.width; d += amx::kEdge, to += amx::kBlock) {
      amx::pack_left(x.row(first) + d, x.padded, rows, x.width - d, to);
    }
  }
  static void pack_right(const Operand& w, int64_t first, int64_t width, void* out) {
    auto* to = static_cast<uint16_t*>(out);
    for (int64_t j = 0; j < width; j += amx::kEdge) {
      const int64_t rows = w.count - first - j;
      for (int64_t d = 0; d < w.width; d += amx::kEdge, to += amx::kBlock) {
        amx::pack_right(
            amx::Layout::kRightTransposed, w.data + (first + j) * w.padded + d, w.padded, rows,
            w.width - d, to);
      }
    }
  }

  // Packs at most 32 columns as right operand, with zeros from row `rows` on.
  static void pack_columns(
      const Element* in,
      int64_t ld,
      int64_t rows,
      int64_t columns,
      int64_t depth,
      const float* /*factors*/,
      void* out) {
    auto* to = static_cast<uint16_t*>(out);
    for (int64_t i = 0; i < depth; i += amx::kEdge, to += amx::kBlock) {
      amx::pack_right(amx::Layout::kRight, in + i * ld, ld, rows - i, columns, to);
    }
  }

  // Writes whole blocks of 32 rows.
  static void multiply(
      const Operand& x,
      int64_t /*first*/,
      int64_t rows,
      const void* left,
      int64_t begin,
      const void* right,
      int64_t /*valid*/,
      int64_t width,
      const void* next,
      float* out) {
    const int64_t steps = amx::blocks(x.width);
    each_block_of_tile(
        left, begin, rows, right, width, right_bytes(amx::kEdge, x.width), next, out,
        [&](const char* a, const char* b, float* c) {
          amx::multiply(
              {reinterpret_cast<const uint16_t*>(a)}, {reinterpret_cast<const uint16_t*>(b)}, 1,
              steps, c, width, false);
        });
  }
};

} // namespace mulki

#endif
