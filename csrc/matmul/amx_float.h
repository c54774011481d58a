// The engine for float on the matrix unit, as digits of integers (engine.h, digits.h): X is packed in
// strips of 32 rows, W^T in strips of 32 columns.
#pragma once

#include "matmul/amx_engine.h"
#include "matmul/digits.h"

#if defined(MULKI_AMX)

namespace mulki {

struct AmxFloat {
  using Element = float;
  using Operand = Matrix<Element>;
  using Scope = amx::Scope;

  static constexpr int64_t kMaxRows = 256;
  static constexpr bool kOneTaskPerTile = false; // not measured
  static constexpr int64_t kMatrices = int64_t(16) << 20;
  static constexpr int64_t kScratch = int64_t(46) << 20;
  static constexpr int64_t kUnit = digits::kDepth, kWidth = 128;

  static int64_t left_bytes(const Operand& x, int64_t rows) {
    return right_bytes(rows, x.padded);
  }
  static int64_t right_bytes(int64_t width, int64_t depth) {
    return amx::blocks(width) * digits::strip_bytes(depth);
  }

  // At most 32 rows.
  static void pack_left(const Operand& x, int64_t first, int64_t rows, void* out) {
    digits::pack_strip_of_rows(false, x.read(first, rows, 0, x.width), out);
  }
  static void pack_right(const Operand& w, int64_t first, int64_t width, void* out) {
    auto* to = static_cast<uint8_t*>(out);
    for (int64_t j = first; j < first + width; j += digits::kLines) {
      digits::pack_strip_of_rows(true, w.read(j, w.count - j, 0, w.width), to);
      to += digits::strip_bytes(w.width);
    }
  }

  // Packs the first 32 columns of a part as right operand.
  static void pack_columns(
      const Part<Element>& in, int64_t /*depth*/, const float* factors, void* out) {
    digits::pack_strip_of_columns(in, factors, out);
  }

  // Writes whole blocks of 32 rows.
  static void multiply(const Operand& x, const TileProduct& y) {
    const int64_t steps = digits::blocks(x.width);
    each_block_of_tile(
        y, right_bytes(amx::kEdge, x.width), [&](const char* a, const char* b, float* c) {
          digits::multiply(
              a, b, 0, steps, c, y.width, false, digits::logits_need_eight_products(a, b, x.width));
        });
  }
};

} // namespace mulki

#endif
