// The matrix unit of Intel CPUs (AMX), and products of bfloat16 on it, which are summed in float32.
// Products of floats are in digits.h.
//
// Both operands are packed in blocks of 32 x 32 elements in the order in which the product reads
// them: C [32, 32] += A B reads one sequence of blocks for A and one for B, whatever the depth. A
// block has two tiles, which are what one register holds: 16 rows of 64 bytes.
#pragma once

#include "matmul/operands.h"

#if defined(CPU_CAPABILITY_AVX512) && defined(__linux__) && defined(__x86_64__) && \
    defined(__GNUC__) && __has_include(<amxtileintrin.h>)
#define MULKI_AMX 1

#include <ATen/cpu/Utils.h>
#include <cpuid.h>
#include <immintrin.h>

#include <array>

#if defined(MULKI_EMULATE_AMX)
#include "matmul/amx_emulation.h"
#endif

// Only these functions use AMX instructions. The caller checks `available` first.
#define MULKI_AMX_TARGET \
  __attribute__((target( \
      "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,fma,f16c," \
      "amx-tile,amx-bf16,amx-int8")))

namespace mulki::amx {

constexpr int64_t kEdge = 32; // of a block
constexpr int64_t kBlock = kEdge * kEdge; // elements
constexpr int64_t kTile = kBlock / 2; // elements

inline int64_t blocks(int64_t length) {
  return (length + kEdge - 1) / kEdge;
}

// Whether this CPU has AMX and the system permits its use by this process. Packing needs two more
// sets of instructions, which all CPUs with AMX have.
inline bool available() {
  static const bool answer = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    // CPUID leaf 7, subleaf 0: register d, then c; subleaf 1: register a.
    constexpr unsigned kVbmi = 1u << 1;
    constexpr unsigned kAvx512Bf16 = 1u << 5;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(c & kVbmi)) {
      return false;
    }
#if !defined(MULKI_EMULATE_AMX)
    constexpr unsigned kAmxTile = 1u << 24, kAmxBf16 = 1u << 22, kAmxInt8 = 1u << 25;
    constexpr unsigned kAll = kAmxTile | kAmxBf16 | kAmxInt8;
    if ((d & kAll) != kAll || !at::cpu::init_amx()) {
      return false;
    }
#endif
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvx512Bf16);
  }();
  return answer;
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline const TileShapes kTileShapes;

// Configures the tile registers of this thread, and releases them at the end of the scope.
struct Scope {
  MULKI_AMX_TARGET Scope() {
    _tile_loadconfig(&kTileShapes);
  }
  MULKI_AMX_TARGET ~Scope() {
    _tile_release();
  }
};

// The sums of a block, c [32, 32], in tiles 0 to 3: set to zero, loaded and stored. `stride` is the
// distance of two rows in elements of four bytes.
#define MULKI_ZERO_SUMS() \
  _tile_zero(0); \
  _tile_zero(1); \
  _tile_zero(2); \
  _tile_zero(3)
#define MULKI_EACH_SUM(move, c, stride) \
  move(0, c, (stride) * 4); \
  move(1, (c) + 16, (stride) * 4); \
  move(2, (c) + 16 * (stride), (stride) * 4); \
  move(3, (c) + 16 * (stride) + 16, (stride) * 4)

// The blocks of one operand: `runs` runs of `steps` blocks. Distances are in elements.
struct Stream {
  const uint16_t* data;
  int64_t run = 0; // distance of two runs
  int64_t block = kBlock; // distance of two blocks of a run
};

// C [32, 32] (+)= A B. The next product uses the same A. Loads of B bypass the L1 cache, so that A
// stays there. Not inlined: AMX reads the operands from memory, which the compiler does not know,
// so all stores to them have to be complete at the call.
__attribute__((noinline)) MULKI_AMX_TARGET inline void multiply(
    const Stream& a, const Stream& b, int64_t runs, int64_t steps, const Sums& c) {
  if (c.add) {
    MULKI_EACH_SUM(_tile_loadd, c.data, c.ld);
  } else {
    MULKI_ZERO_SUMS();
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
  MULKI_EACH_SUM(_tile_stored, c.data, c.ld);
}

// The mask of the first `valid` of `lanes` lanes. `valid` may be negative or larger than `lanes`.
inline uint32_t lane_mask(int64_t valid, int64_t lanes) {
  return valid <= 0    ? 0
      : valid >= lanes ? uint32_t((uint64_t(1) << lanes) - 1)
                       : (uint32_t(1) << valid) - 1;
}

// Packs the first 32 x 32 elements of a part as a block of the left operand, with zeros beyond its
// rows and columns.
MULKI_AMX_TARGET inline void pack_left(const Part<at::BFloat16>& in, uint16_t* out) {
  const __mmask32 valid = lane_mask(in.columns, 32);
  for (int64_t i = 0; i < kEdge; ++i) {
    const __m512i row = i < in.rows ? _mm512_maskz_loadu_epi16(valid, in.data + i * in.stride)
                                    : _mm512_setzero_si512();
    _mm512_storeu_si512(out + i * kEdge, row);
  }
}

// The same for floats, which it rounds.
MULKI_AMX_TARGET inline void pack_left(const Part<float>& in, uint16_t* out) {
  const __mmask16 first = __mmask16(lane_mask(in.columns, 16)),
                  second = __mmask16(lane_mask(in.columns - 16, 16));
  for (int64_t i = 0; i < kEdge; ++i) {
    __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
    if (i < in.rows) {
      low = _mm512_maskz_loadu_ps(first, in.data + i * in.stride);
      high = second ? _mm512_maskz_loadu_ps(second, in.data + i * in.stride + 16) : high;
    }
    _mm512_storeu_si512(out + i * kEdge, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

// Transposes a tile as 16 x 16 elements of four bytes.
MULKI_AMX_TARGET inline void transpose_tile(const uint16_t* in, uint16_t* out) {
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

// Interleaves each pair of rows of a block: the elements of a column become neighbours.
MULKI_AMX_TARGET inline void interleave_row_pairs(const uint16_t* in, uint16_t* out) {
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

// Layouts of a block M of 32 x 32 elements other than that of M as left operand.
enum class Layout {
  kRight, // M as right operand
  kRightTransposed, // M^T as right operand
  kLeftTransposed, // M^T as left operand
};

// Changes a block from the layout of the left operand to `layout`.
MULKI_AMX_TARGET inline void rearrange(Layout layout, const uint16_t* in, uint16_t* out) {
  alignas(64) uint16_t paired[kBlock];
  if (layout == Layout::kRight) {
    interleave_row_pairs(in, out);
    return;
  }
  if (layout == Layout::kLeftTransposed) {
    interleave_row_pairs(in, paired);
    in = paired;
  }
  transpose_tile(in, out);
  transpose_tile(in + kTile, out + kTile);
}

// Packs the first 32 x 32 elements of a part in `layout`, with zeros beyond its rows and columns.
MULKI_AMX_TARGET inline void pack_right(
    Layout layout, const Part<at::BFloat16>& in, uint16_t* out) {
  alignas(64) uint16_t block[kBlock];
  pack_left(in, block);
  rearrange(layout, block, out);
}

} // namespace mulki::amx

#endif
