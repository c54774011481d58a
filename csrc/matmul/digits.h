// Products of floats on the matrix unit, which multiplies 8-bit integers exactly and sums in 32
// bits.
//
// A line is a row of the left operand or a column of the right one. Each line has a scale s, and
// its elements are s times integers of 24 bits. An integer is written with three digits to the base
// 256. A digit is a number from -128 to 127, stored in one byte:
//
//   x = s (x_1 2^16 + x_2 2^8 + x_3),   |x - s integer| <= 2^-24 max |x|
//
// A product of two elements has nine products of digits. The six largest are computed, in three
// sums, one for each weight 2^32, 2^24 and 2^16. The only rounding is the conversion of these sums
// to float32. This is the scheme of Ozaki et al. (Numer. Algorithms 59, 2012, doi
// 10.1007/s11075-011-9478-1) on integers as by Ootomo et al. (arXiv 2306.11975).
//
// So the error is relative to the largest element of a line. The missing three products are about
// 2^-25 max |x| max |w| per term, at most 2^-23. If the largest elements of both lines are far
// above their root mean square, this error is too large, and two more products are computed, of
// weight 2^8.
//
// In the products with G, a line is a column of X, of W, of G or of G^T. If the rows of X or W
// differ much in size, each row is first divided by a power of two (level_of), and the elements of
// G are multiplied by it.
//
// A strip is 32 lines in the order in which the product reads them: a Head with the scales, then
// blocks of depth 64, each with all first digits, then all second, then all third ones.
#pragma once

#include "matmul/amx.h"

#if defined(MULKI_AMX)

#include <cmath>
#include <cstring>
#include <limits>

namespace mulki::digits {

constexpr int64_t kLines = amx::kEdge; // lines of a strip
constexpr int64_t kDepth = 64; // elements of each line in a block
constexpr int kDigits = 3;
constexpr int64_t kTile = 1024; // bytes of a register
constexpr int64_t kDigit = 2 * kTile; // bytes of one digit of a block
constexpr int64_t kBlock = kDigits * kDigit;

inline int64_t blocks(int64_t depth) {
  return (depth + kDepth - 1) / kDepth;
}

// The beginning of a strip.
struct alignas(64) Head {
  float scale[kLines]; // 2^16 s
  // The largest element of a line divided by its root mean square; the maximum over the lines.
  float peak_to_rms;
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

// 1 / s of each line of a strip, as the sum of two floats. Rounded to one float, it would make all
// elements of a line too large or all too small, and sums would not average this out.
struct alignas(64) InverseScale {
  float high[kLines], low[kLines];
};

// The bits of |x|. As integers they have the order of |x|, followed by infinity and then NaN.
MULKI_AMX_TARGET inline __m512i magnitude(__m512 x) {
  return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

// The bits of the largest |x| of a line, and the sum of its squares.
struct Extent {
  uint32_t max_bits;
  float sum_squares;
};
MULKI_AMX_TARGET inline Extent extent_of(const float* in, int64_t columns) {
  __m512i max_bits = _mm512_setzero_si512();
  __m512 sum_squares = _mm512_setzero_ps();
  for (int64_t j = 0; j < columns; j += 16) {
    const __m512 x = _mm512_maskz_loadu_ps(__mmask16(amx::lane_mask(columns - j, 16)), in + j);
    max_bits = _mm512_max_epu32(max_bits, magnitude(x));
    sum_squares = _mm512_fmadd_ps(x, x, sum_squares);
  }
  return {_mm512_reduce_max_epu32(max_bits), _mm512_reduce_add_ps(sum_squares)};
}

// Sets the scale of a line, and updates peak_to_rms of the strip. The scale of a line with an
// infinity or a NaN is NaN.
inline void set_line(
    Extent extent, int64_t depth, int64_t line, Head& head, InverseScale& inverse) {
  constexpr float kMaxInteger = float(0x7f7f7f); // 127 (2^16 + 2^8 + 1)
  float value;
  std::memcpy(&value, &extent.max_bits, sizeof(value));
  if (!(value > 0.0f) || !(value <= std::numeric_limits<float>::max())) {
    head.scale[line] = value == 0.0f ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    inverse.high[line] = inverse.low[line] = 0.0f;
    return;
  }
  // The lower bound keeps the inverse finite; lines below 1e-30 lose some of the 24 bits. The
  // factor 1 + 2^-22 keeps the largest integer within kMaxInteger in spite of rounding.
  const float scale = std::max(value * (float(1 + 0x1p-22) / kMaxInteger), 0x1p-122f);
  const float high = 1.0f / scale;
  inverse.high[line] = high;
  inverse.low[line] = std::fma(-high, scale, 1.0f) * high;
  head.scale[line] = 65536.0f * scale;
  if (extent.sum_squares > 0) {
    head.peak_to_rms =
        std::max(head.peak_to_rms, value / std::sqrt(extent.sum_squares / float(depth)));
  }
}

// Returns the integer of each lane, with its digits in bytes 2, 1 and 0.
MULKI_AMX_TARGET inline __m512i digits_of(__m512 x, __m512 high, __m512 low) {
  const __m512i carry = _mm512_set1_epi32(0x00808080);
  const __m512i integer = _mm512_cvtps_epi32(_mm512_fmadd_ps(x, high, _mm512_mul_ps(x, low)));
  return _mm512_xor_si512(_mm512_add_epi32(integer, carry), carry);
}

using ByteIndices = std::array<uint8_t, 64>;
template <typename F>
constexpr ByteIndices byte_indices(const F& index) {
  ByteIndices out{};
  for (int i = 0; i < 64; ++i) {
    out[i] = uint8_t(index(i));
  }
  return out;
}
// Byte indices into two vectors of 16 lanes. For rows: byte 0 of all lanes, then byte 1; byte 2.
alignas(64) inline constexpr auto kLowOfRow = byte_indices([](int i) {
  return i % 32 * 4 + i / 32;
});
alignas(64) inline constexpr auto kHighOfRow = byte_indices([](int i) { return i % 32 * 4 + 2; });
// For columns: the bytes 0 of the two vectors as neighbours, then the bytes 1; the bytes 2.
alignas(64) inline constexpr auto kLowOfPair = byte_indices([](int i) {
  return i / 4 * 4 + i % 2 * 64 + i % 4 / 2;
});
alignas(64) inline constexpr auto kHighOfPair = byte_indices([](int i) {
  return i / 4 * 4 + i % 2 * 64 + 2;
});

// Moves the bytes of four vectors: bytes 0 and 1 of the first two vectors and of the last two, then
// bytes 2 of both.
struct SplitDigits {
  __m512i low_a, low_b, high_a, high_b;
};
MULKI_AMX_TARGET inline SplitDigits split(
    const __m512i* q, const ByteIndices& low_bytes, const ByteIndices& high_bytes) {
  const __m512i low = _mm512_load_si512(low_bytes.data());
  const __m512i high = _mm512_load_si512(high_bytes.data());
  return {
      _mm512_permutex2var_epi8(q[0], low, q[1]), _mm512_permutex2var_epi8(q[2], low, q[3]),
      _mm512_permutex2var_epi8(q[0], high, q[1]), _mm512_permutex2var_epi8(q[2], high, q[3])};
}

// Changes a block from the layout of the left operand to that of the right one, or back.
MULKI_AMX_TARGET inline void transpose_block(uint8_t* tiles) {
  for (int64_t i = 0; i < kBlock; i += kTile) {
    auto* tile = reinterpret_cast<uint16_t*>(tiles + i);
    amx::transpose_tile(tile, tile);
  }
}

// Packs line i of a block, for the left operand, from up to 64 neighbouring elements, with zeros
// beyond `columns`. `factors`, if not null, multiplies them.
MULKI_AMX_TARGET inline void pack_row(
    const float* in,
    int64_t columns,
    const float* factors,
    const InverseScale& inverse,
    int64_t i,
    uint8_t* block) {
  const __m512 high_part = _mm512_set1_ps(inverse.high[i]),
               low_part = _mm512_set1_ps(inverse.low[i]);
  __m512i q[4];
  for (int v = 0; v < 4; ++v) {
    const __mmask16 valid = __mmask16(amx::lane_mask(columns - 16 * v, 16));
    __m512 x = _mm512_maskz_loadu_ps(valid, in + 16 * v);
    if (factors != nullptr) {
      x = _mm512_mul_ps(x, _mm512_maskz_loadu_ps(valid, factors + 16 * v));
    }
    q[v] = digits_of(x, high_part, low_part);
  }
  const auto [low_a, low_b, high_a, high_b] = split(q, kLowOfRow, kHighOfRow);
  uint8_t* out = block + 64 * i;
  _mm512_store_si512(out, _mm512_shuffle_i64x2(high_a, high_b, 0x44));
  _mm512_store_si512(out + kDigit, _mm512_shuffle_i64x2(low_a, low_b, 0xee));
  _mm512_store_si512(out + 2 * kDigit, _mm512_shuffle_i64x2(low_a, low_b, 0x44));
}

MULKI_AMX_TARGET inline void pack_zero_row(int64_t i, uint8_t* block) {
  for (int d = 0; d < kDigits; ++d) {
    _mm512_store_si512(block + d * kDigit + 64 * i, _mm512_setzero_si512());
  }
}

// Packs a block of the left operand, whose lines are the first 32 rows of a part, with zeros beyond
// its rows and columns.
MULKI_AMX_TARGET inline void pack_block_of_rows(
    const Part<float>& in, const float* factors, const InverseScale& inverse, uint8_t* out) {
  for (int64_t i = 0; i < kLines; ++i) {
    if (i < in.rows) {
      pack_row(in.data + i * in.stride, in.columns, factors, inverse, i, out);
    } else {
      pack_zero_row(i, out);
    }
  }
}

// Packs a block whose lines are the first 32 columns of a part: of the right operand or, if
// `transposed`, of the left one. `factors`, if not null, multiplies the rows.
MULKI_AMX_TARGET inline void pack_block_of_columns(
    bool transposed,
    const Part<float>& in,
    const float* factors,
    const InverseScale& inverse,
    uint8_t* out) {
  constexpr __mmask32 kOdd = 0xaaaaaaaa, kEven = 0x55555555;
  for (int64_t half = 0; half < 2; ++half) {
    uint8_t* tile = out + half * kTile;
    const __mmask16 valid = __mmask16(amx::lane_mask(in.columns - 16 * half, 16));
    const __m512 high_part = _mm512_load_ps(inverse.high + 16 * half);
    const __m512 low_part = _mm512_load_ps(inverse.low + 16 * half);
    for (int64_t r = 0; r < 16; ++r) {
      __m512i q[4];
      for (int v = 0; v < 4; ++v) {
        const int64_t i = 4 * r + v;
        __m512 x = i < in.rows ? _mm512_maskz_loadu_ps(valid, in.data + i * in.stride + 16 * half)
                               : _mm512_setzero_ps();
        if (factors != nullptr && i < in.rows) {
          x = _mm512_mul_ps(x, _mm512_set1_ps(factors[i]));
        }
        q[v] = digits_of(x, high_part, low_part);
      }
      const auto [low_a, low_b, high_a, high_b] = split(q, kLowOfPair, kHighOfPair);
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
  if (transposed) {
    transpose_block(out);
  }
}

// The level of a row: the largest power of two that is not above its largest |x|, within 2^-64 and
// 2^120, so that a gradient times a level keeps its precision.
inline float level_of(uint32_t max_bits) {
  return std::ldexp(1.0f, std::clamp(int(max_bits >> 23) - 127, -64, 120));
}

// Packs a strip whose lines are the first 32 rows of a part: of the left operand or, if
// `transposed`, of the right one.
MULKI_AMX_TARGET inline void pack_strip_of_rows(bool transposed, const Part<float>& in, void* out) {
  const int64_t columns = in.columns;
  Head& head = *static_cast<Head*>(out);
  InverseScale inverse;
  const int64_t steps = blocks(columns);
  head.peak_to_rms = 0;
  // Row by row, so that each row is still in the L1 cache when it is packed.
  for (int64_t i = 0; i < kLines; ++i) {
    const float* row = in.data + i * in.stride;
    set_line(i < in.rows ? extent_of(row, columns) : Extent{0, 0}, columns, i, head, inverse);
    for (int64_t s = 0; s < steps; ++s) {
      if (i < in.rows) {
        pack_row(row + s * kDepth, columns - s * kDepth, nullptr, inverse, i, block(out, s));
      } else {
        pack_zero_row(i, block(out, s));
      }
    }
  }
  for (int64_t s = 0; s < steps && transposed; ++s) {
    transpose_block(block(out, s));
  }
}

// Packs a strip of the right operand, whose lines are the first 32 columns of a part. `factors`, if
// not null, multiplies the rows.
MULKI_AMX_TARGET inline void pack_strip_of_columns(
    const Part<float>& in, const float* factors, void* out) {
  Head& head = *static_cast<Head*>(out);
  InverseScale inverse;
  const __mmask16 first = __mmask16(amx::lane_mask(in.columns, 16));
  const __mmask16 second = __mmask16(amx::lane_mask(in.columns - 16, 16));
  __m512i low = _mm512_setzero_si512(), high = _mm512_setzero_si512();
  __m512 low_squares = _mm512_setzero_ps(), high_squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < in.rows; ++i) {
    const float* row = in.data + i * in.stride;
    const __m512 factor = _mm512_set1_ps(factors == nullptr ? 1.0f : factors[i]);
    const __m512 a = _mm512_mul_ps(_mm512_maskz_loadu_ps(first, row), factor);
    const __m512 b = _mm512_mul_ps(_mm512_maskz_loadu_ps(second, row + 16), factor);
    low = _mm512_max_epu32(low, magnitude(a));
    high = _mm512_max_epu32(high, magnitude(b));
    low_squares = _mm512_fmadd_ps(a, a, low_squares);
    high_squares = _mm512_fmadd_ps(b, b, high_squares);
  }
  alignas(64) uint32_t max_bits[kLines];
  alignas(64) float sum_squares[kLines];
  _mm512_store_si512(max_bits, low);
  _mm512_store_si512(max_bits + 16, high);
  _mm512_store_ps(sum_squares, low_squares);
  _mm512_store_ps(sum_squares + 16, high_squares);
  head.peak_to_rms = 0;
  for (int64_t j = 0; j < kLines; ++j) {
    set_line({max_bits[j], sum_squares[j]}, in.rows, j, head, inverse);
  }
  for (int64_t i = 0; i < in.rows; i += kDepth) {
    pack_block_of_columns(
        false, in.from(i, 0), factors == nullptr ? nullptr : factors + i, inverse,
        block(out, i / kDepth));
  }
}

// Adds digits i of the left operand times digits j of the right one.
#define MULKI_PRODUCT(i, j) \
  _tile_loadd(4, left + (i) * kDigit, 64); \
  _tile_stream_loadd(6, right + (j) * kDigit, 64); \
  _tile_dpbssd(0, 4, 6); \
  _tile_stream_loadd(7, right + (j) * kDigit + kTile, 64); \
  _tile_dpbssd(1, 4, 7); \
  _tile_loadd(5, left + (i) * kDigit + kTile, 64); \
  _tile_dpbssd(2, 5, 6); \
  _tile_dpbssd(3, 5, 7)
// Adds the products of one weight over blocks [from, to) to the sums over the blocks before.
#define MULKI_SUM(sums, products) \
  if (from == 0) { \
    MULKI_ZERO_SUMS(); \
  } else { \
    MULKI_EACH_SUM(_tile_loadd, sums, kLines); \
  } \
  for (int64_t s = from; s < to; ++s) { \
    const uint8_t* left = a + s * kBlock; \
    const uint8_t* right = b + s * kBlock; \
    products; \
  } \
  MULKI_EACH_SUM(_tile_stored, sums, kLines)

// Writes one sum for each weight, the largest weight first. All products are computed for a few
// blocks at a time, while the left operand's blocks are in the L1 cache; the right operand bypasses
// it. For this, and the reason against inlining, see amx::multiply.
template <int WEIGHTS>
__attribute__((noinline)) MULKI_AMX_TARGET void sums_of(
    const uint8_t* a, const uint8_t* b, int64_t steps, int32_t (*sums)[kLines * kLines]) {
  constexpr int64_t kBlocksInL1 = 8;
  for (int64_t from = 0; from < steps; from += kBlocksInL1) {
    const int64_t to = std::min(steps, from + kBlocksInL1);
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

// C [32, 32] (+)= A B over `steps` blocks, where those of b begin at block `first`.
// `eight_products` chooses eight products of digits, else six.
MULKI_AMX_TARGET inline void multiply(
    const void* a, const void* b, int64_t first, int64_t steps, Sums c, bool eight_products) {
  // A block adds three products of 64 terms of at most 2^14. The sum has to stay below 2^31.
  constexpr int64_t kMaxBlocks = 512;
  alignas(64) int32_t sums[4][kLines * kLines];
  const Head& rows = *static_cast<const Head*>(a);
  const Head& columns = *static_cast<const Head*>(b);
  const __m512 inverse_base = _mm512_set1_ps(1.0f / 256.0f);
  const __m512 scale[2] = {_mm512_load_ps(columns.scale), _mm512_load_ps(columns.scale + 16)};
  for (int64_t i = 0; i < kLines && steps == 0 && !c.add; ++i) {
    std::fill_n(c.data + i * c.ld, kLines, 0.0f);
  }
  for (int64_t done = 0; done < steps; done += kMaxBlocks, c.add = true) {
    const int64_t count = std::min(kMaxBlocks, steps - done);
    if (eight_products) {
      sums_of<4>(block(a, done), block(b, first + done), count, sums);
    } else {
      sums_of<3>(block(a, done), block(b, first + done), count, sums);
    }
    for (int64_t i = 0; i < kLines; ++i) {
      const __m512 of_row = _mm512_set1_ps(rows.scale[i]);
      for (int64_t h = 0; h < 2; ++h) {
        const int64_t at = i * kLines + h * 16;
        __m512 v = _mm512_cvtepi32_ps(_mm512_load_si512(sums[2] + at));
        if (eight_products) {
          v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[3] + at)), inverse_base, v);
        }
        v = _mm512_fmadd_ps(v, inverse_base, _mm512_cvtepi32_ps(_mm512_load_si512(sums[1] + at)));
        v = _mm512_fmadd_ps(v, inverse_base, _mm512_cvtepi32_ps(_mm512_load_si512(sums[0] + at)));
        v = _mm512_mul_ps(v, _mm512_mul_ps(of_row, scale[h]));
        float* out = c.data + i * c.ld + h * 16;
        _mm512_storeu_ps(out, c.add ? _mm512_add_ps(_mm512_loadu_ps(out), v) : v);
      }
    }
  }
}

// Whether the product of two strips needs eight products of digits. With r = peak_to_rms of both,
// six products leave an error of about 2^-25 r_x r_w |x| |w| / sqrt(depth). For logits, the limit
// is the rounding error of a float32 near |x| |w|. For gradients, it is 2^-20 of |x| |w| /
// sqrt(depth), the size of a sum whose terms have random signs. With 2^-19, gradients over 256
// classes or pairs, where G is 1 at the match and small elsewhere, had six times the error of
// float32.
inline float product_of_peaks(const void* a, const void* b) {
  return static_cast<const Head*>(a)->peak_to_rms * static_cast<const Head*>(b)->peak_to_rms;
}
inline bool logits_need_eight_products(const void* a, const void* b, int64_t depth) {
  return product_of_peaks(a, b) > 0.9f * std::sqrt(float(depth));
}
inline bool gradients_need_eight_products(const void* a, const void* b) {
  return product_of_peaks(a, b) > 32.0f;
}

} // namespace mulki::digits

#endif
