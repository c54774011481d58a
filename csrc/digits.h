// Products of floats on the matrix unit, which multiplies bytes exactly and adds them in 32 bits.
//
// A line, a row of the left or a column of the right operand, is a number times integers of 24 bits, and an
// integer is three digits to the base 256, from -128 to 127:
//
//   x = s (x_1 2^16 + x_2 2^8 + x_3),   |x - s integer| <= 2^-24 max |x|
//
// Of the nine products of digits the six largest are formed, in three sums by their weight; the only
// rounding is of those sums to float32 (the scheme of Ozaki et al., Numer. Algorithms 59, 2012, doi
// 10.1007/s11075-011-9478-1, on integers as by Ootomo et al., arXiv 2306.11975). An error is thus relative
// to the largest element of a line. What is left out is about 2^-25 max |x| max |w| a term, at most 2^-23; where the
// largest elements of both lines stand far above the others (`peak`) it would show, and there two more
// products are formed.
//
// In the products with G a line is a column of X or W, or one of G's: there rows of X or W that are far smaller
// or larger than others are brought to one level first, and G makes up for it (level_of).
//
// 32 lines are a strip: their scales, then blocks of a depth of 64, each of a digit after the other, in
// the order in which they are read.
#pragma once

#include "amx.h"

#if defined(MULKI_AMX)

#include <cmath>
#include <cstring>
#include <limits>

namespace mulki::digits {

constexpr int64_t kLines = amx::kEdge; // of a strip
constexpr int64_t kDepth = 64; // of a block
constexpr int kDigits = 3;
constexpr int64_t kTile = 1024; // bytes of a register
constexpr int64_t kDigit = 2 * kTile; // bytes of one digit of a block
constexpr int64_t kBlock = kDigits * kDigit;

inline int64_t blocks(int64_t depth) {
  return (depth + kDepth - 1) / kDepth;
}

// What stands before the blocks of a strip.
struct alignas(64) Head {
  float scale[kLines]; // 2^16 s
  // The largest element of a line over the root of its mean square, the most of all lines.
  float peak;
};

inline int64_t strip_bytes(int64_t depth) {
  return int64_t(sizeof(Head)) + blocks(depth) * kBlock;
}
inline uint8_t* block(void* strip, int64_t i) {
  return static_cast<uint8_t*>(strip) + sizeof(Head) + i * kBlock;
}
inline const uint8_t* block(const void* strip, int64_t i) {
  return static_cast<const uint8_t*>(strip) + sizeof(Head) + i * kBlock;
}

// What the lines of a strip are multiplied by to become integers, in two parts: rounded to one, it would make
// all of a line too large or too small, which sums do not average out.
struct alignas(64) Inverse {
  float high[kLines], low[kLines];
};

// The bits of |x|, which are ordered as numbers are, with infinity and then NaN beyond all others.
MULKI_AMX_TARGET inline __m512i magnitude(__m512 x) {
  return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

// The bits of the largest magnitude of a line, and the sum of its squares.
struct Extent {
  uint32_t most;
  float squares;
};
MULKI_AMX_TARGET inline Extent extent_of(const float* in, int64_t columns) {
  __m512i most = _mm512_setzero_si512();
  __m512 squares = _mm512_setzero_ps();
  for (int64_t j = 0; j < columns; j += 16) {
    const __m512 x = _mm512_maskz_loadu_ps(__mmask16(amx::lanes(columns - j, 16)), in + j);
    most = _mm512_max_epu32(most, magnitude(x));
    squares = _mm512_fmadd_ps(x, x, squares);
  }
  return {_mm512_reduce_max_epu32(most), _mm512_reduce_add_ps(squares)};
}

// Sets a line's scale, and raises the strip's peak. A line with an infinity or a NaN gets NaN.
inline void set_line(Extent extent, int64_t depth, int64_t line, Head& head, Inverse& inverse) {
  constexpr float kMost = float(0x7f7f7f); // 127 (2^16 + 2^8 + 1)
  float value;
  std::memcpy(&value, &extent.most, sizeof(value));
  if (!(value > 0.0f) || !(value <= std::numeric_limits<float>::max())) {
    head.scale[line] = value == 0.0f ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    inverse.high[line] = inverse.low[line] = 0.0f;
    return;
  }
  // Of a line below 1e-30 less than 24 bits are kept, so that the inverse stays finite. The largest
  // must not become one more than digits can say.
  const float scale = std::max(value * (float(1 + 0x1p-22) / kMost), 0x1p-122f);
  const float high = 1.0f / scale;
  inverse.high[line] = high;
  inverse.low[line] = std::fma(-high, scale, 1.0f) * high;
  head.scale[line] = 65536.0f * scale;
  if (extent.squares > 0) {
    head.peak = std::max(head.peak, value / std::sqrt(extent.squares / float(depth)));
  }
}

// Integers, their digits in bytes 2, 1 and 0 of each lane.
MULKI_AMX_TARGET inline __m512i digits_of(__m512 x, __m512 high, __m512 low) {
  const __m512i carry = _mm512_set1_epi32(0x00808080);
  const __m512i integer = _mm512_cvtps_epi32(_mm512_fmadd_ps(x, high, _mm512_mul_ps(x, low)));
  return _mm512_xor_si512(_mm512_add_epi32(integer, carry), carry);
}

template <typename F>
constexpr std::array<uint8_t, 64> byte_indices(const F& index) {
  std::array<uint8_t, 64> out{};
  for (int i = 0; i < 64; ++i) {
    out[i] = uint8_t(index(i));
  }
  return out;
}
// Of 16 + 16 lanes, byte 0 of each and byte 1 of each; byte 2 of each.
alignas(64) inline constexpr auto kLowOfRow = byte_indices([](int i) {
  return i % 32 * 4 + i / 32;
});
alignas(64) inline constexpr auto kHighOfRow = byte_indices([](int i) { return i % 32 * 4 + 2; });
// Of two rows of 16 lanes, bytes 0 side by side and bytes 1; bytes 2.
alignas(64) inline constexpr auto kLowOfPair = byte_indices([](int i) {
  return i / 4 * 4 + i % 2 * 64 + i % 4 / 2;
});
alignas(64) inline constexpr auto kHighOfPair = byte_indices([](int i) {
  return i / 4 * 4 + i % 2 * 64 + 2;
});

// A block, in the order of the left operand, becomes one in that of the right operand, or back.
MULKI_AMX_TARGET inline void turn_block(uint8_t* tiles) {
  for (int64_t i = 0; i < kBlock; i += kTile) {
    auto* tile = reinterpret_cast<uint16_t*>(tiles + i);
    amx::turn_tile(tile, tile);
  }
}

// 64 elements of line i of a block that are next to each other, `columns` of them, zeros beyond, in the
// order of the left operand. `by`, if any, multiplies them.
MULKI_AMX_TARGET inline void put_row(
    const float* in,
    int64_t columns,
    const float* by,
    const Inverse& inverse,
    int64_t i,
    uint8_t* block) {
  const __m512i low = _mm512_load_si512(kLowOfRow.data());
  const __m512i high = _mm512_load_si512(kHighOfRow.data());
  const __m512 most = _mm512_set1_ps(inverse.high[i]), rest = _mm512_set1_ps(inverse.low[i]);
  __m512i q[4];
  for (int v = 0; v < 4; ++v) {
    const __mmask16 valid = __mmask16(amx::lanes(columns - 16 * v, 16));
    __m512 x = _mm512_maskz_loadu_ps(valid, in + 16 * v);
    if (by != nullptr) {
      x = _mm512_mul_ps(x, _mm512_maskz_loadu_ps(valid, by + 16 * v));
    }
    q[v] = digits_of(x, most, rest);
  }
  const __m512i low_a = _mm512_permutex2var_epi8(q[0], low, q[1]);
  const __m512i low_b = _mm512_permutex2var_epi8(q[2], low, q[3]);
  const __m512i high_a = _mm512_permutex2var_epi8(q[0], high, q[1]);
  const __m512i high_b = _mm512_permutex2var_epi8(q[2], high, q[3]);
  uint8_t* out = block + 64 * i;
  _mm512_store_si512(out, _mm512_shuffle_i64x2(high_a, high_b, 0x44));
  _mm512_store_si512(out + kDigit, _mm512_shuffle_i64x2(low_a, low_b, 0xee));
  _mm512_store_si512(out + 2 * kDigit, _mm512_shuffle_i64x2(low_a, low_b, 0x44));
}

MULKI_AMX_TARGET inline void put_zeros(int64_t i, uint8_t* block) {
  for (int d = 0; d < kDigits; ++d) {
    _mm512_store_si512(block + d * kDigit + 64 * i, _mm512_setzero_si512());
  }
}

// A block of lines that are rows of a corner [rows, columns] of a matrix, zeros elsewhere, of the left
// operand.
MULKI_AMX_TARGET inline void block_of_rows(
    const float* in,
    int64_t ld,
    int64_t rows,
    int64_t columns,
    const float* by,
    const Inverse& inverse,
    uint8_t* out) {
  for (int64_t i = 0; i < kLines; ++i) {
    if (i < rows) {
      put_row(in + i * ld, columns, by, inverse, i, out);
    } else {
      put_zeros(i, out);
    }
  }
}

// A block of lines that are columns: of the right operand, or, turned, of the left one. `by`, if any,
// multiplies the rows.
MULKI_AMX_TARGET inline void block_of_columns(
    bool turned,
    const float* in,
    int64_t ld,
    int64_t rows,
    int64_t columns,
    const float* by,
    const Inverse& inverse,
    uint8_t* out) {
  const __m512i low = _mm512_load_si512(kLowOfPair.data());
  const __m512i high = _mm512_load_si512(kHighOfPair.data());
  constexpr __mmask32 kOdd = 0xaaaaaaaa, kEven = 0x55555555;
  for (int64_t half = 0; half < 2; ++half) {
    uint8_t* tile = out + half * kTile;
    const __mmask16 valid = __mmask16(amx::lanes(columns - 16 * half, 16));
    const __m512 most = _mm512_load_ps(inverse.high + 16 * half);
    const __m512 rest = _mm512_load_ps(inverse.low + 16 * half);
    for (int64_t r = 0; r < 16; ++r) {
      __m512i q[4];
      for (int v = 0; v < 4; ++v) {
        const int64_t i = 4 * r + v;
        __m512 x =
            i < rows ? _mm512_maskz_loadu_ps(valid, in + i * ld + 16 * half) : _mm512_setzero_ps();
        if (by != nullptr && i < rows) {
          x = _mm512_mul_ps(x, _mm512_set1_ps(by[i]));
        }
        q[v] = digits_of(x, most, rest);
      }
      const __m512i low_a = _mm512_permutex2var_epi8(q[0], low, q[1]);
      const __m512i low_b = _mm512_permutex2var_epi8(q[2], low, q[3]);
      const __m512i high_a = _mm512_permutex2var_epi8(q[0], high, q[1]);
      const __m512i high_b = _mm512_permutex2var_epi8(q[2], high, q[3]);
      _mm512_store_si512(
          tile + 64 * r, _mm512_mask_mov_epi16(high_a, kOdd, _mm512_slli_epi32(high_b, 16)));
      _mm512_store_si512(
          tile + kDigit + 64 * r,
          _mm512_mask_mov_epi16(low_b, kEven, _mm512_srli_epi32(low_a, 16)));
      _mm512_store_si512(
          tile + 2 * kDigit + 64 * r,
          _mm512_mask_mov_epi16(low_a, kOdd, _mm512_slli_epi32(low_b, 16)));
    }
  }
  if (turned) {
    turn_block(out);
  }
}

// The power of two below the largest magnitude of a row. Not below 2^-64 nor above 2^120, so that a gradient
// times a level keeps its digits.
inline float level_of(uint32_t most) {
  return std::ldexp(1.0f, std::clamp(int(most >> 23) - 127, -64, 120));
}

// A strip of at most 32 rows, of the left operand, or, turned, of the right one.
MULKI_AMX_TARGET inline void strip_of_rows(
    bool turned, const float* in, int64_t ld, int64_t rows, int64_t columns, void* out) {
  Head& head = *static_cast<Head*>(out);
  Inverse inverse;
  const int64_t steps = blocks(columns);
  head.peak = 0;
  // Row by row, so that the second look at a row finds it in the nearest cache.
  for (int64_t i = 0; i < kLines; ++i) {
    const float* row = in + i * ld;
    set_line(i < rows ? extent_of(row, columns) : Extent{0, 0}, columns, i, head, inverse);
    for (int64_t s = 0; s < steps; ++s) {
      if (i < rows) {
        put_row(row + s * kDepth, columns - s * kDepth, nullptr, inverse, i, block(out, s));
      } else {
        put_zeros(i, block(out, s));
      }
    }
  }
  for (int64_t s = 0; s < steps && turned; ++s) {
    turn_block(block(out, s));
  }
}

// A strip of at most 32 columns, the right operand. `by`, if any, multiplies the rows.
MULKI_AMX_TARGET inline void strip_of_columns(
    const float* in, int64_t ld, int64_t rows, int64_t columns, const float* by, void* out) {
  Head& head = *static_cast<Head*>(out);
  Inverse inverse;
  const __mmask16 first = __mmask16(amx::lanes(columns, 16));
  const __mmask16 second = __mmask16(amx::lanes(columns - 16, 16));
  __m512i low = _mm512_setzero_si512(), high = _mm512_setzero_si512();
  __m512 low_squares = _mm512_setzero_ps(), high_squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < rows; ++i) {
    const __m512 factor = _mm512_set1_ps(by == nullptr ? 1.0f : by[i]);
    const __m512 a = _mm512_mul_ps(_mm512_maskz_loadu_ps(first, in + i * ld), factor);
    const __m512 b = _mm512_mul_ps(_mm512_maskz_loadu_ps(second, in + i * ld + 16), factor);
    low = _mm512_max_epu32(low, magnitude(a));
    high = _mm512_max_epu32(high, magnitude(b));
    low_squares = _mm512_fmadd_ps(a, a, low_squares);
    high_squares = _mm512_fmadd_ps(b, b, high_squares);
  }
  alignas(64) uint32_t most[kLines];
  alignas(64) float squares[kLines];
  _mm512_store_si512(most, low);
  _mm512_store_si512(most + 16, high);
  _mm512_store_ps(squares, low_squares);
  _mm512_store_ps(squares + 16, high_squares);
  head.peak = 0;
  for (int64_t j = 0; j < kLines; ++j) {
    set_line({most[j], squares[j]}, rows, j, head, inverse);
  }
  for (int64_t i = 0; i < rows; i += kDepth) {
    block_of_columns(
        false, in + i * ld, ld, rows - i, columns, by == nullptr ? nullptr : by + i, inverse,
        block(out, i / kDepth));
  }
}

#define MULKI_PRODUCT(i, j) \
  _tile_loadd(4, left + (i) * kDigit, 64); \
  _tile_stream_loadd(6, right + (j) * kDigit, 64); \
  _tile_dpbssd(0, 4, 6); \
  _tile_stream_loadd(7, right + (j) * kDigit + kTile, 64); \
  _tile_dpbssd(1, 4, 7); \
  _tile_loadd(5, left + (i) * kDigit + kTile, 64); \
  _tile_dpbssd(2, 5, 6); \
  _tile_dpbssd(3, 5, 7)
// The sums of one weight over some blocks, which go on from those of the blocks before.
#define MULKI_SUM(sums, products) \
  if (from == 0) { \
    _tile_zero(0); \
    _tile_zero(1); \
    _tile_zero(2); \
    _tile_zero(3); \
  } else { \
    _tile_loadd(0, sums, 128); \
    _tile_loadd(1, sums + 16, 128); \
    _tile_loadd(2, sums + 512, 128); \
    _tile_loadd(3, sums + 528, 128); \
  } \
  for (int64_t s = from; s < to; ++s) { \
    const uint8_t* left = a + s * kBlock; \
    const uint8_t* right = b + s * kBlock; \
    products; \
  } \
  _tile_stored(0, sums, 128); \
  _tile_stored(1, sums + 16, 128); \
  _tile_stored(2, sums + 512, 128); \
  _tile_stored(3, sums + 528, 128)

// `sums` by weight, the largest first. A few blocks at a time take all their products, while those of the left
// operand are in the nearest cache; the right one passes it by (amx::multiply). Not inlined: see there.
template <int WEIGHTS>
__attribute__((noinline)) MULKI_AMX_TARGET void sums_of(
    const uint8_t* a, const uint8_t* b, int64_t steps, int32_t (*sums)[kLines * kLines]) {
  constexpr int64_t kNear = 8; // blocks
  for (int64_t from = 0; from < steps; from += kNear) {
    const int64_t to = std::min(steps, from + kNear);
    if constexpr (WEIGHTS == 4) {
      MULKI_SUM(sums[3], MULKI_PRODUCT(2, 1); MULKI_PRODUCT(1, 2));
    }
    MULKI_SUM(sums[2], MULKI_PRODUCT(2, 0); MULKI_PRODUCT(1, 1); MULKI_PRODUCT(0, 2));
    MULKI_SUM(sums[1], MULKI_PRODUCT(1, 0); MULKI_PRODUCT(0, 1));
    MULKI_SUM(sums[0], MULKI_PRODUCT(0, 0));
  }
}

#undef MULKI_PRODUCT
#undef MULKI_SUM

// C [32, 32] (+)= A B over `steps` blocks, those of b from block `first` on. `fine` forms the two more
// products.
MULKI_AMX_TARGET inline void multiply(
    const void* a,
    const void* b,
    int64_t first,
    int64_t steps,
    float* c,
    int64_t ldc,
    bool add,
    bool fine = false) {
  // Three products of 64 terms of at most 2^14 a block have to stay below 2^31.
  constexpr int64_t kMost = 512;
  alignas(64) int32_t sums[4][kLines * kLines];
  const Head& rows = *static_cast<const Head*>(a);
  const Head& columns = *static_cast<const Head*>(b);
  const __m512 down = _mm512_set1_ps(1.0f / 256.0f);
  const __m512 scale[2] = {_mm512_load_ps(columns.scale), _mm512_load_ps(columns.scale + 16)};
  for (int64_t i = 0; i < kLines && steps == 0 && !add; ++i) {
    std::fill(c + i * ldc, c + i * ldc + kLines, 0.0f);
  }
  for (int64_t done = 0; done < steps; done += kMost, add = true) {
    const int64_t some = std::min(kMost, steps - done);
    if (fine) {
      sums_of<4>(block(a, done), block(b, first + done), some, sums);
    } else {
      sums_of<3>(block(a, done), block(b, first + done), some, sums);
    }
    for (int64_t i = 0; i < kLines; ++i) {
      const __m512 of_row = _mm512_set1_ps(rows.scale[i]);
      for (int64_t h = 0; h < 2; ++h) {
        const int64_t at = i * kLines + h * 16;
        __m512 v = _mm512_cvtepi32_ps(_mm512_load_si512(sums[2] + at));
        if (fine) {
          v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[3] + at)), down, v);
        }
        v = _mm512_fmadd_ps(v, down, _mm512_cvtepi32_ps(_mm512_load_si512(sums[1] + at)));
        v = _mm512_fmadd_ps(v, down, _mm512_cvtepi32_ps(_mm512_load_si512(sums[0] + at)));
        v = _mm512_mul_ps(v, _mm512_mul_ps(of_row, scale[h]));
        float* out = c + i * ldc + h * 16;
        _mm512_storeu_ps(out, add ? _mm512_add_ps(_mm512_loadu_ps(out), v) : v);
      }
    }
  }
}

// Whether two strips want the two more products. What six leave out is about 2^-25 peak peak |x| |w| /
// sqrt(depth). Of logits, that may be what float32 rounds a sum near |x| |w| at; of gradients, 2^-20 of a
// sum whose terms have any sign, which is |x| |w| / sqrt(depth). With 2^-19 gradients over 256 classes or
// pairs, where G is 1 at the match and small elsewhere, had six times the error of float32.
inline float peaks(const void* a, const void* b) {
  return static_cast<const Head*>(a)->peak * static_cast<const Head*>(b)->peak;
}
inline bool fine_logits(const void* a, const void* b, int64_t depth) {
  return peaks(a, b) > 0.9f * std::sqrt(float(depth));
}
inline bool fine_gradients(const void* a, const void* b) {
  return peaks(a, b) > 32.0f;
}

} // namespace mulki::digits

#endif
