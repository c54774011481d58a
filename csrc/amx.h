// The matrix unit of Intel CPUs (AMX), and products of bfloat16 on it, added in float32. Products of
// floats are in digits.h.
//
// Operands lie in blocks of 32 x 32, in the order in which they are read, so a product of any size
// is one stream per operand.
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
  __attribute__((target( \
      "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,fma,f16c," \
      "amx-tile,amx-bf16,amx-int8")))

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
    constexpr unsigned kTiles = 1u << 24, kHalves = 1u << 22, kBytes = 1u << 25; // in d
    constexpr unsigned kPermutes = 1u << 1; // of bytes, in c
    constexpr unsigned kRounding = 1u << 5; // to bfloat16, in a of the next leaf
    constexpr unsigned kAll = kTiles | kHalves | kBytes;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll || !(c & kPermutes)) {
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

// One operand of a product: runs of blocks that follow each other. Distances are in elements.
struct Stream {
  const uint16_t* data;
  int64_t run = 0; // from a run to the next
  int64_t block = kBlock; // from a block of a run to the next
};

// C [32, 32] (+)= A B. Neighbouring products share A, which stays in the nearest cache because loads of B pass it
// by. Not inlined: what the unit reads has to be in memory by then, and the compiler does not see that it is read.
__attribute__((noinline)) MULKI_AMX_TARGET inline void multiply(
    const Stream& a,
    const Stream& b,
    int64_t runs,
    int64_t steps,
    float* c,
    int64_t ldc,
    bool add) {
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
  for (int64_t run = 0; run < runs; ++run) {
    const uint16_t* left = a.data + run * a.run;
    const uint16_t* right = b.data + run * b.run;
    for (int64_t step = 0; step < steps; ++step, left += a.block, right += b.block) {
      _tile_loadd(4, left, 64);
      _tile_stream_loadd(6, right, 64);
      _tile_stream_loadd(7, right + kTile, 64);
      _tile_loadd(5, left + kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + 16, ldc * 4);
  _tile_stored(2, c + 16 * ldc, ldc * 4);
  _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
}

// Lanes of a vector of `lanes` that hold `valid` elements, which may be more or negative.
inline uint32_t lanes(int64_t valid, int64_t lanes) {
  return valid <= 0    ? 0
      : valid >= lanes ? uint32_t((uint64_t(1) << lanes) - 1)
                       : (uint32_t(1) << valid) - 1;
}

// A corner [rows, columns] of a matrix as a block, with zeros elsewhere: a left operand.
MULKI_AMX_TARGET inline void pack_left(
    const at::BFloat16* in, int64_t ld, int64_t rows, int64_t columns, uint16_t* out) {
  const __mmask32 valid = lanes(columns, 32);
  for (int64_t i = 0; i < kEdge; ++i) {
    const __m512i row =
        i < rows ? _mm512_maskz_loadu_epi16(valid, in + i * ld) : _mm512_setzero_si512();
    _mm512_storeu_si512(out + i * kEdge, row);
  }
}

// The same of floats, rounded.
MULKI_AMX_TARGET inline void pack_left(
    const float* in, int64_t ld, int64_t rows, int64_t columns, uint16_t* out) {
  const __mmask16 first = __mmask16(lanes(columns, 16)),
                  second = __mmask16(lanes(columns - 16, 16));
  for (int64_t i = 0; i < kEdge; ++i) {
    __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
    if (i < rows) {
      low = _mm512_maskz_loadu_ps(first, in + i * ld);
      high = second ? _mm512_maskz_loadu_ps(second, in + i * ld + 16) : high;
    }
    _mm512_storeu_si512(out + i * kEdge, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

// Transposes a tile of 16 x 16 elements of four bytes.
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

// What a left operand becomes, M being its 32 x 32 elements.
enum class Form {
  kRight, // the right operand M
  kRightTurned, // the right operand M^T
  kLeftTurned, // the left operand M^T
};

MULKI_AMX_TARGET inline void arrange(Form form, const uint16_t* in, uint16_t* out) {
  alignas(64) uint16_t paired[kBlock];
  if (form == Form::kRight) {
    pair_rows(in, out);
    return;
  }
  if (form == Form::kLeftTurned) {
    pair_rows(in, paired);
    in = paired;
  }
  turn_tile(in, out);
  turn_tile(in + kTile, out + kTile);
}

// A right operand from a corner [rows, columns] of a matrix.
MULKI_AMX_TARGET inline void pack_right(
    Form form, const at::BFloat16* in, int64_t ld, int64_t rows, int64_t columns, uint16_t* out) {
  alignas(64) uint16_t block[kBlock];
  pack_left(in, ld, rows, columns, block);
  arrange(form, block, out);
}

} // namespace mulki::amx

#endif
