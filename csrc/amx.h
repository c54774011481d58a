// Products on the matrix unit of Intel CPUs (AMX), which multiplies bfloat16 and adds in float32.
//
// Operands lie in blocks of 32 x 32, in the order in which they are read, so a product of any size
// is one stream per operand. A float is the sum of three bfloat16, x = x_1 + x_2 + x_3, each the
// rounded rest of what came before, and
//
//   x w = x_3 w_1 + x_2 w_1 + x_2 w_2 + x_1 w_2 + x_1 w_3 + x_1 w_1
//
// leaves out less than 2^-25 |x w|, half of what rounding x w to float32 may cost (Henry, Tang and
// Heinecke, arXiv 1904.06376). Six products in bfloat16 are faster here than one in float32.
#pragma once

#include "product.h"

#if defined(CPU_CAPABILITY_AVX512) && defined(__linux__) && defined(__x86_64__) && \
    defined(__GNUC__) && __has_include(<amxtileintrin.h>)
#define MULKI_AMX 1

#include <ATen/cpu/Utils.h>
#include <cpuid.h>
#include <immintrin.h>

#include <array>

// The rest of the library does without these instructions: `available` is asked before.
#define MULKI_AMX_TARGET \
  __attribute__(( \
      target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c,amx-tile,amx-bf16")))

namespace mulki::amx {

constexpr int64_t kEdge = 32; // of a block
constexpr int64_t kBlock = kEdge * kEdge; // elements
constexpr int64_t kTile = kBlock / 2; // of a register: 16 rows of 64 bytes

inline int64_t blocks(int64_t length) {
  return (length + kEdge - 1) / kEdge;
}

// Whether this CPU has the unit and the system lets this process use it.
inline bool available() {
  static const bool answer = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kTiles = 1u << 24, kProducts = 1u << 22, kRounding = 1u << 5;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTiles) || !(d & kProducts)) {
      return false;
    }
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kRounding) && at::cpu::init_amx();
  }();
  return answer;
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline const TileShapes kTileShapes;

// The unit's state of a thread, from the first product to the last.
struct Scope {
  MULKI_AMX_TARGET Scope() {
    _tile_loadconfig(&kTileShapes);
  }
  MULKI_AMX_TARGET ~Scope() {
    _tile_release();
  }
};

// One operand of a product: runs of blocks, each block one matrix for each part of its elements.
// Distances are in elements.
struct Stream {
  const uint16_t* data;
  int64_t part; // from a part of a block to the next
  int64_t block; // from a block of a run to the next
  int64_t run = 0; // from a run to the next
};

// Blocks that follow each other, with their parts.
template <int PARTS>
inline Stream packed(const void* data, int64_t run = 0) {
  return {static_cast<const uint16_t*>(data), kBlock, PARTS * kBlock, run};
}

// The part of the left operand is in registers 4 and 5, that of the right one in 6 and 7. The next part
// of one of them is loaded as soon as the last product with the present one is on its way.
#define MULKI_LOAD(i, j) \
  _tile_loadd(4, left + (i) * left_part, 64); \
  _tile_loadd(6, right + (j) * right_part, 64); \
  _tile_loadd(7, right + (j) * right_part + kTile, 64); \
  _tile_loadd(5, left + (i) * left_part + kTile, 64)
#define MULKI_MULTIPLY() \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7)
#define MULKI_MULTIPLY_THEN_LEFT(next) \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_loadd(4, left + (next) * left_part, 64); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7); \
  _tile_loadd(5, left + (next) * left_part + kTile, 64)
#define MULKI_MULTIPLY_THEN_RIGHT(next) \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_loadd(6, right + (next) * right_part, 64); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(3, 5, 7); \
  _tile_loadd(7, right + (next) * right_part + kTile, 64)

// C [32, 32] (+)= A B. Not inlined: what the unit reads has to be in memory by then, and the
// compiler does not see that it is read.
//
// Every sum is rounded at its size, so the small terms come first, all of them, and x_1 w_1 last.
template <int PARTS>
__attribute__((noinline)) MULKI_AMX_TARGET void multiply(
    const Stream& a,
    const Stream& b,
    int64_t runs,
    int64_t steps,
    float* c,
    int64_t ldc,
    bool add) {
  static_assert(PARTS == 1 || PARTS == 3);
  if (add) {
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(1, c + 16, ldc * 4);
    _tile_loadd(2, c + 16 * ldc, ldc * 4);
    _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const int64_t left_part = a.part, right_part = b.part;
  for (int64_t run = 0; run < runs && PARTS == 3; ++run) {
    const uint16_t* left = a.data + run * a.run;
    const uint16_t* right = b.data + run * b.run;
    for (int64_t step = 0; step < steps; ++step, left += a.block, right += b.block) {
      // From one product to the next one operand stays.
      MULKI_LOAD(2, 0);
      MULKI_MULTIPLY_THEN_LEFT(1);
      MULKI_MULTIPLY_THEN_RIGHT(1);
      MULKI_MULTIPLY_THEN_LEFT(0);
      MULKI_MULTIPLY_THEN_RIGHT(2);
      MULKI_MULTIPLY();
    }
  }
  for (int64_t run = 0; run < runs; ++run) {
    const uint16_t* left = a.data + run * a.run;
    const uint16_t* right = b.data + run * b.run;
    for (int64_t step = 0; step < steps; ++step, left += a.block, right += b.block) {
      MULKI_LOAD(0, 0);
      MULKI_MULTIPLY();
    }
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + 16, ldc * 4);
  _tile_stored(2, c + 16 * ldc, ldc * 4);
  _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
}

#undef MULKI_LOAD
#undef MULKI_MULTIPLY
#undef MULKI_MULTIPLY_THEN_LEFT
#undef MULKI_MULTIPLY_THEN_RIGHT

// Lanes of a vector of `lanes` that hold `valid` elements, which may be more or negative.
inline uint32_t lanes(int64_t valid, int64_t lanes) {
  return valid <= 0 ? 0 : valid >= lanes ? uint32_t((uint64_t(1) << lanes) - 1)
                                         : (uint32_t(1) << valid) - 1;
}

// Both halves of a row as floats, less `part` of them.
MULKI_AMX_TARGET inline void subtract(__m512i part, __m512& low, __m512& high) {
  const __m512i a = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(part));
  const __m512i b = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(part, 1));
  low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)));
  high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)));
}

// Parts [32][32], `distance` elements apart, from a corner [rows, columns] of a matrix, zeros
// elsewhere.
template <int PARTS>
MULKI_AMX_TARGET void split(
    const float* in,
    int64_t ld,
    int64_t rows,
    int64_t columns,
    uint16_t* out,
    int64_t distance = kBlock) {
  const __mmask16 first = __mmask16(lanes(columns, 16)), second = __mmask16(lanes(columns - 16, 16));
  for (int64_t i = 0; i < kEdge; ++i) {
    __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
    if (i < rows) {
      low = _mm512_maskz_loadu_ps(first, in + i * ld);
      high = second ? _mm512_maskz_loadu_ps(second, in + i * ld + 16) : high;
      // The block to the right is most often the next one.
      _mm_prefetch(reinterpret_cast<const char*>(in + i * ld + kEdge), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(in + i * ld + kEdge + 16), _MM_HINT_T0);
    }
    for (int part = 0; part < PARTS; ++part) {
      const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
      _mm512_storeu_si512(out + part * distance + i * kEdge, rounded);
      if (part + 1 < PARTS) {
        subtract(rounded, low, high);
      }
    }
  }
}

template <int PARTS>
MULKI_AMX_TARGET inline void split(
    const at::BFloat16* in, int64_t ld, int64_t rows, int64_t columns, uint16_t* out) {
  static_assert(PARTS == 1);
  const __mmask32 valid = lanes(columns, 32);
  for (int64_t i = 0; i < kEdge; ++i) {
    const __m512i row =
        i < rows ? _mm512_maskz_loadu_epi16(valid, in + i * ld) : _mm512_setzero_si512();
    _mm512_storeu_si512(out + i * kEdge, row);
  }
}

// Transposes a tile of 16 x 16 pairs.
MULKI_AMX_TARGET inline void turn_tile(const uint16_t* in, uint16_t* out) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) {
    a[i] = _mm512_loadu_si512(in + i * kEdge);
  }
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(out + i * kEdge, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 4) * kEdge, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
    _mm512_storeu_si512(out + (i + 8) * kEdge, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    _mm512_storeu_si512(out + (i + 12) * kEdge, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
  }
}

// What a split block becomes as an operand, M being its 32 x 32 elements. A left operand goes as
// it is.
enum class Form {
  kRight, // the right operand M
  kRightTurned, // the right operand M^T
  kLeftTurned, // the left operand M^T
};

MULKI_AMX_TARGET inline void pair_rows(const uint16_t* in, uint16_t* out) {
  alignas(64) static constexpr auto kLow = [] {
    std::array<uint16_t, 32> index{};
    for (int i = 0; i < 32; ++i) {
      index[i] = uint16_t(i / 2 + i % 2 * 32);
    }
    return index;
  }();
  const __m512i low = _mm512_load_si512(kLow.data());
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t i = 0; i < 16; ++i) {
    const __m512i even = _mm512_loadu_si512(in + 2 * i * kEdge);
    const __m512i odd = _mm512_loadu_si512(in + (2 * i + 1) * kEdge);
    _mm512_storeu_si512(out + i * kEdge, _mm512_permutex2var_epi16(even, low, odd));
    _mm512_storeu_si512(out + kTile + i * kEdge, _mm512_permutex2var_epi16(even, high, odd));
  }
}

template <int PARTS>
MULKI_AMX_TARGET inline void arrange(
    Form form,
    const uint16_t* in,
    int64_t distance_in,
    uint16_t* out,
    int64_t distance_out) {
  alignas(64) uint16_t paired[kBlock];
  for (int part = 0; part < PARTS; ++part, in += distance_in, out += distance_out) {
    if (form == Form::kRight) {
      pair_rows(in, out);
      continue;
    }
    const uint16_t* from = in;
    if (form == Form::kLeftTurned) {
      pair_rows(in, paired);
      from = paired;
    }
    turn_tile(from, out);
    turn_tile(from + kTile, out + kTile);
  }
}

// The operand that a corner [rows, columns] of a matrix makes, one block.
template <int PARTS, typename T>
MULKI_AMX_TARGET inline void pack_left(
    const T* in, int64_t ld, int64_t rows, int64_t columns, uint16_t* out) {
  split<PARTS>(in, ld, rows, columns, out);
}

template <int PARTS, typename T>
MULKI_AMX_TARGET inline void pack(
    Form form, const T* in, int64_t ld, int64_t rows, int64_t columns, uint16_t* out) {
  alignas(64) uint16_t block[PARTS * kBlock];
  split<PARTS>(in, ld, rows, columns, block);
  arrange<PARTS>(form, block, kBlock, out, kBlock);
}

} // namespace mulki::amx

#endif
