// Vectors of floats, as wide as the capability that is built for.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cmath>

namespace mulki {

using Vec = at::vec::Vectorized<float>;

inline float sum_of(const Vec& v) {
  const auto add = [](const Vec& a, const Vec& b) { return a + b; };
  return at::vec::VecReduceAllSIMD<float, decltype(add)>::apply(add, v);
}

inline float max_of(const Vec& v) {
  const auto maximum = [](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); };
  return at::vec::VecReduceAllSIMD<float, decltype(maximum)>::apply(maximum, v);
}

// The larger of each lane; `b` where either is a NaN. at::vec::maximum looks for NaN, which takes two more
// instructions.
inline Vec larger(const Vec& a, const Vec& b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(a, b);
#else
  return at::vec::maximum(a, b);
#endif
}

// One vector for each of as many rows as it has lanes, which are reduced together: row after row, every
// reduction would wait for its own shuffles.
class Lanes {
 public:
  void set(int64_t row, const Vec& v) {
    v.store(parts_ + row * Vec::size());
  }
  // Of each row, in its lane; zero where no row was set.
  Vec sums() const {
    return reduced([](const Vec& a, const Vec& b) { return a + b; });
  }
  Vec largest() const {
    return reduced([](const Vec& a, const Vec& b) { return larger(a, b); });
  }

 private:
  template <typename F>
  Vec reduced(const F& join) const {
    constexpr int64_t kSize = Vec::size();
    alignas(64) float turned[kSize * kSize];
    at::vec::transpose_mxn<float, kSize, kSize>(parts_, kSize, turned, kSize);
    for (int64_t half = kSize / 2; half > 0; half /= 2) {
      for (int64_t r = 0; r < half; ++r) {
        float* row = turned + r * kSize;
        join(Vec::loadu(row), Vec::loadu(row + half * kSize)).store(row);
      }
    }
    return Vec::loadu(turned);
  }

  alignas(64) float parts_[Vec::size() * Vec::size()] = {};
};

// v where `keep` is 1, `otherwise` where it is 0. What an excluded class holds may be anything, a NaN too, so it is
// replaced and not multiplied away.
inline Vec where_kept(const float* keep, float otherwise, const Vec& v) {
#if defined(CPU_CAPABILITY_AVX512)
  // blendv takes a mask as a vector, to and from which it is converted; loops with it ran at a third of the speed.
  const __mmask16 kept = _mm512_cmp_ps_mask(_mm512_loadu_ps(keep), _mm512_setzero_ps(), _CMP_GT_OQ);
  return _mm512_mask_blend_ps(kept, _mm512_set1_ps(otherwise), v);
#else
  return Vec::blendv(Vec(otherwise), v, Vec::loadu(keep) > Vec(0.0f));
#endif
}

// exp(v - n log 2), for n near v / log 2.
inline Vec exp_of_remainder(const Vec& v, const Vec& n) {
  Vec r = at::vec::fmadd(n, Vec(-0.693359375f), v);
  r = at::vec::fmadd(n, Vec(2.12194440e-4f), r);
  Vec p = at::vec::fmadd(Vec(1.9875691500e-4f), r, Vec(1.3981999507e-3f));
  p = at::vec::fmadd(p, r, Vec(8.3334519073e-3f));
  p = at::vec::fmadd(p, r, Vec(4.1665795894e-2f));
  p = at::vec::fmadd(p, r, Vec(1.6666665459e-1f));
  p = at::vec::fmadd(p, r, Vec(5.0000001201e-1f));
  return at::vec::fmadd(p, r * r, r) + Vec(1.0f);
}

// exp, good to about one unit in the last place. at::vec calls a library for it, at which all registers of
// a loop are spilled; this is 2^n times the polynomial of Cephes' expf, with x = n log 2 + r.
inline Vec exp_of(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  // Beyond these bounds the result is 0 or infinity. Of two operands with a NaN, max and min give
  // the second.
  __m512 v = _mm512_max_ps(_mm512_set1_ps(-110.0f), x);
  v = _mm512_min_ps(_mm512_set1_ps(100.0f), v);
  const __m512 n = _mm512_roundscale_ps(
      _mm512_mul_ps(v, _mm512_set1_ps(1.44269504088896341f)),
      _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp_of_remainder(v, n), n);
#elif defined(CPU_CAPABILITY_AVX2)
  __m256 v = _mm256_max_ps(_mm256_set1_ps(-110.0f), x);
  v = _mm256_min_ps(_mm256_set1_ps(100.0f), v);
  const __m256 n = _mm256_round_ps(
      _mm256_mul_ps(v, _mm256_set1_ps(1.44269504088896341f)),
      _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // 2^n in two factors: n is from -159 to 144, and a float's exponent from -126 to 127.
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  const auto power = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  const __m256 part = _mm256_mul_ps(exp_of_remainder(v, n), power(half));
  return _mm256_mul_ps(part, power(_mm256_sub_epi32(whole, half)));
#else
  return x.exp();
#endif
}

// exp(v c) for one c and many v, by fewer instructions than exp_of: 2^t is 2^floor(t) times a polynomial
// (minimax) of the rest, from 0 to 1. It has at most 7.8e-8 of error beside that of rounding t, which is as
// large as that of rounding v c, and is exactly 1 where v is 0.
class ExpOfProduct {
 public:
#if defined(CPU_CAPABILITY_AVX512)
  // In two parts: rounded to one, c would be another scale, with an error of one sign for all elements. Both
  // have the sign of c and none is zero beside the other, so that an infinity does not become a NaN.
  explicit ExpOfProduct(double c) : ExpOfProduct(c * kPerLog2, toward_zero(c * kPerLog2)) {}

  Vec operator()(const Vec& v) const {
    const __m512 t = at::vec::fmadd(v, low_, v * high_);
    // scalef takes the floor of t itself; of an infinity, reduce gives 0.
    const Vec rest = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    Vec p = at::vec::fmadd(Vec(2.16129192e-4f), rest, Vec(1.24678458e-3f));
    p = at::vec::fmadd(p, rest, Vec(9.67545155e-3f));
    p = at::vec::fmadd(p, rest, Vec(5.54852821e-2f));
    p = at::vec::fmadd(p, rest, Vec(2.40229309e-1f));
    p = at::vec::fmadd(p, rest, Vec(6.93147063e-1f));
    p = at::vec::fmadd(p, rest, Vec(1.0f));
    return _mm512_scalef_ps(p, t);
  }

 private:
  static constexpr double kPerLog2 = 1.44269504088896341;

  ExpOfProduct(double all, float high)
      : high_(high), low_(double(high) == all ? high * 0x1p-40f : float(all - double(high))) {}

  static float toward_zero(double value) {
    const float near = float(value);
    return std::abs(double(near)) > std::abs(value) ? std::nextafter(near, 0.0f) : near;
  }

  Vec high_, low_;
#else
  explicit ExpOfProduct(double c) : c_(float(c)) {}
  Vec operator()(const Vec& v) const {
    return exp_of(v * c_);
  }

 private:
  Vec c_;
#endif
};

// exp(a - b) where a float difference would be rounded, and the exponential with it.
inline Vec exp_of_difference(const Vec& a, const Vec& b) {
  const Vec d = a - b, back = d - a;
  const Vec lost = (a - (d - back)) - (b + back);
  const Vec e = exp_of(d);
  return at::vec::fmadd(e, lost, e);
}

// log(1 + x) for x from 0 to 1, good to two units in the last place: 2 artanh z with z = x / (2 + x), and artanh
// z / z by its Chebyshev interpolant in z^2. at::vec calls a library here too.
inline Vec log1p_of(const Vec& x) {
  const Vec z = x / (x + Vec(2.0f)), square = z * z;
  Vec p = at::vec::fmadd(square, Vec(2.8157778314e-1f), Vec(2.7965157757e-1f));
  p = at::vec::fmadd(square, p, Vec(4.0024595230e-1f));
  p = at::vec::fmadd(square, p, Vec(6.6666321641e-1f));
  return at::vec::fmadd(z * square, p, z + z);
}

// out [n] = in [n], halves as floats. at::vec::convert takes one after the other.
template <typename T>
inline void floats_of(const T* in, float* out, int64_t n) {
  int64_t j = 0;
  for (; j + Vec::size() <= n; j += Vec::size()) {
    Vec v;
    at::vec::load_to_float<T>(in + j, v);
    v.store(out + j);
  }
  for (; j < n; ++j) {
    out[j] = float(in[j]);
  }
}

} // namespace mulki
