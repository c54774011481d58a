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

  static int64_t left_bytes(const Operand& x, int64_t rows) {
    return right_bytes(rows, x.padded);
  }
  static int64_t right_bytes(int64_t width, int64_t depth) {
    return amx::blocks(width) * amx::blocks(depth) * amx::kBlock * int64_t(sizeof(Element));
  }

  // At most 32 rows.
  static void pack_left(const Operand& x, int64_t first, int64_t rows, void* out) {
    const Part<Element> in = x.read(first, rows, 0, x.width);
    for (int64_t d = 0; d < x.width; d += amx::kEdge) {
      amx::pack_left(in.from(0, d), block(out, d / amx::kEdge));
    }
  }
  static void pack_right(const Operand& w, int64_t first, int64_t width, void* out) {
    for (int64_t j = 0; j < width; j += amx::kEdge) {
      const Part<Element> in = w.read(first + j, w.count - first - j, 0, w.width);
      for (int64_t d = 0; d < w.width; d += amx::kEdge) {
        amx::pack_right(
            amx::Layout::kRightTransposed, in.from(0, d),
            block(out, (j / amx::kEdge) * amx::blocks(w.width) + d / amx::kEdge));
      }
    }
  }

  // Packs the first 32 columns of a part as right operand, with zeros beyond its rows.
  static void pack_columns(
      const Part<Element>& in, int64_t depth, const float* /*factors*/, void* out) {
    for (int64_t i = 0; i < depth; i += amx::kEdge) {
      amx::pack_right(amx::Layout::kRight, in.from(i, 0), block(out, i / amx::kEdge));
    }
  }

  // Writes whole blocks of 32 rows.
  static void multiply(const Operand& x, const TileProduct& y) {
    const int64_t steps = amx::blocks(x.width);
    each_block_of_tile(
        y, right_bytes(amx::kEdge, x.width), [&](const char* a, const char* b, float* c) {
          amx::multiply(
              {reinterpret_cast<const uint16_t*>(a)}, {reinterpret_cast<const uint16_t*>(b)}, 1,
              steps, c, y.width, false);
        });
  }

 private:
  static uint16_t* block(void* out, int64_t i) {
    return static_cast<uint16_t*>(out) + i * amx::kBlock;
  }
};

} // namespace mulki

#endif
