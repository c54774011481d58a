// The instructions of the matrix unit that amx.h and digits.h use, on arrays of the thread: for
// tests on a CPU without the unit. A build with MULKI_EMULATE_AMX takes them in place of the real
// ones, and is slow.
//
// As on the unit, _tile_dpbf16ps adds the products of even and of odd elements apart, in float32,
// and flushes denormals. A tile that is used outside of a Scope is an error here, and an illegal
// instruction there.
#pragma once

#include <c10/util/Exception.h>

#include <immintrin.h>

#include <cfloat>
#include <cstdint>

namespace mulki::amx::emulated {

constexpr int kRows = 16; // of 64 bytes

struct Tile {
  __m512i rows[kRows];
};

struct Unit {
  static Unit& here() {
    static thread_local Unit unit;
    return unit;
  }
  static Tile& tile(int i) {
    TORCH_CHECK(here().configured, "a tile register is used outside of amx::Scope");
    return here().tiles[i];
  }

  Tile tiles[8];
  bool configured = false;
};

inline void zero(int to) {
  for (__m512i& row : Unit::tile(to).rows) {
    row = _mm512_setzero_si512();
  }
}

inline void load(int to, const void* from, int64_t stride) {
  Tile& tile = Unit::tile(to);
  for (int64_t i = 0; i < kRows; ++i) {
    tile.rows[i] = _mm512_loadu_si512(static_cast<const char*>(from) + i * stride);
  }
}

inline void store(int from, void* to, int64_t stride) {
  const Tile& tile = Unit::tile(from);
  for (int64_t i = 0; i < kRows; ++i) {
    _mm512_storeu_si512(static_cast<char*>(to) + i * stride, tile.rows[i]);
  }
}

// The four bytes in lane k of a row, in all lanes.
inline __m512i lane(const __m512i& row, int k) {
  return _mm512_set1_epi32(reinterpret_cast<const int32_t*>(&row)[k]);
}

inline __m512 flushed(__m512 v) {
  const __mmask16 denormal =
      _mm512_cmp_ps_mask(_mm512_abs_ps(v), _mm512_set1_ps(FLT_MIN), _CMP_LT_OQ);
  return _mm512_mask_mov_ps(v, denormal, _mm512_setzero_ps());
}
inline __m512 even_bfloat16(__m512i v) {
  return flushed(_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)));
}
inline __m512 odd_bfloat16(__m512i v) {
  return flushed(_mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(int32_t(0xffff0000)))));
}

inline void multiply_bfloat16(int sums, int left, int right) {
  const Tile &a = Unit::tile(left), &b = Unit::tile(right);
  for (int i = 0; i < kRows; ++i) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int k = 0; k < kRows; ++k) {
      const __m512i pair = lane(a.rows[i], k);
      even = flushed(_mm512_fmadd_ps(even_bfloat16(pair), even_bfloat16(b.rows[k]), even));
      odd = flushed(_mm512_fmadd_ps(odd_bfloat16(pair), odd_bfloat16(b.rows[k]), odd));
    }
    __m512i& c = Unit::tile(sums).rows[i];
    const __m512 total = _mm512_add_ps(flushed(_mm512_castsi512_ps(c)), _mm512_add_ps(even, odd));
    c = _mm512_castps_si512(flushed(total));
  }
}

inline __m512i even_bytes(__m512i v) {
  return _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8);
}
inline __m512i odd_bytes(__m512i v) {
  return _mm512_srai_epi16(v, 8);
}

inline void multiply_int8(int sums, int left, int right) {
  const Tile &a = Unit::tile(left), &b = Unit::tile(right);
  for (int i = 0; i < kRows; ++i) {
    __m512i& c = Unit::tile(sums).rows[i];
    for (int k = 0; k < kRows; ++k) {
      const __m512i four = lane(a.rows[i], k);
      const __m512i even = _mm512_madd_epi16(even_bytes(four), even_bytes(b.rows[k]));
      const __m512i odd = _mm512_madd_epi16(odd_bytes(four), odd_bytes(b.rows[k]));
      c = _mm512_add_epi32(c, _mm512_add_epi32(even, odd));
    }
  }
}

} // namespace mulki::amx::emulated

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig(shapes) \
  ((void)(shapes), ::mulki::amx::emulated::Unit::here().configured = true)
#define _tile_release() (::mulki::amx::emulated::Unit::here().configured = false)
#define _tile_zero(to) ::mulki::amx::emulated::zero(to)
#define _tile_loadd(to, from, stride) ::mulki::amx::emulated::load(to, from, stride)
#define _tile_stream_loadd(to, from, stride) ::mulki::amx::emulated::load(to, from, stride)
#define _tile_stored(from, to, stride) ::mulki::amx::emulated::store(from, to, stride)
#define _tile_dpbf16ps(sums, a, b) ::mulki::amx::emulated::multiply_bfloat16(sums, a, b)
#define _tile_dpbssd(sums, a, b) ::mulki::amx::emulated::multiply_int8(sums, a, b)
