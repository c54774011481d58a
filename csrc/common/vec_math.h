// Arithmetic on vectors of floats, which are as wide as those of the CPU capability of the build:
// reductions, exponential and logarithm; and the types of elements. at::vec calls library functions
// for exponentials and logarithms, which spill all registers of a loop.
#pragma once

#include <ATen/core/Tensor.h>
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

// The maximum in each lane, or `b` where one of the two is NaN. at::vec::maximum returns the NaN,
// which takes two more instructions.
inline Vec larger(const Vec& a, const Vec& b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(a, b);
#else
  return at::vec::maximum(a, b);
#endif
}

// As many vectors as a vector has lanes, one for each row, which are reduced together. One row
// after the other, each reduction would wait for its shuffles.
class RowVectors {
 public:
  void set(int64_t row, const Vec& v) {
    v.store(parts_ + row * Vec::size());
  }
  // Row r's sum or maximum is in lane r. A row that was not set has the sum 0.
  Vec sums() const {
    return reduced([](const Vec& a, const Vec& b) { return a + b; });
  }
  Vec maxima() const {
    return reduced([](const Vec& a, const Vec& b) { return larger(a, b); });
  }

 private:
  template <typename F>
  Vec reduced(const F& join) const {
    constexpr int64_t kSize = Vec::size();
    alignas(64) float transposed[kSize * kSize];
    at::vec::transpose_mxn<float, kSize, kSize>(parts_, kSize, transposed, kSize);
    for (int64_t half = kSize / 2; half > 0; half /= 2) {
      for (int64_t r = 0; r < half; ++r) {
        float* row = transposed + r * kSize;
        join(Vec::loadu(row), Vec::loadu(row + half * kSize)).store(row);
      }
    }
    return Vec::loadu(transposed);
  }

  alignas(64) float parts_[Vec::size() * Vec::size()] = {};
};

// v where `mask` is 1, and `otherwise` where it is 0. A product with the mask would not do: where
// it is 0, v may be infinite or NaN.
inline Vec where_active(const float* mask, float otherwise, const Vec& v) {
#if defined(CPU_CAPABILITY_AVX512)
  // blendv takes its mask as a vector and would convert twice: loops with it ran at a third of the
  // speed.
  const __mmask16 active =
      _mm512_cmp_ps_mask(_mm512_loadu_ps(mask), _mm512_setzero_ps(), _CMP_GT_OQ);
  return _mm512_mask_blend_ps(active, _mm512_set1_ps(otherwise), v);
#else
  return Vec::blendv(Vec(otherwise), v, Vec::loadu(mask) > Vec(0.0f));
#endif
}

// exp(v - n log 2), where n is v / log 2 rounded to an integer.
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

// exp with an error of about one unit in the last place: with x = n log 2 + r it is 2^n times the
// polynomial in r of Cephes' expf.
inline Vec exp_of(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  // Beyond these bounds the result is 0 or infinity. max and min return their second argument if one
  // of the two is NaN, so a NaN in x is kept.
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
  // 2^n as a product of two factors: n lies in [-159, 144], but the exponent of a float in [-126,
  // 127].
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

// exp(v c) for one c and many v, in fewer instructions than exp_of: with t = v c / log 2 it is
// 2^floor(t) times a minimax polynomial in t - floor(t), which lies in [0, 1). The polynomial adds
// an error of at most 7.8e-8 to that of rounding t, which equals the error of rounding v c. The
// result for v = 0 is exactly 1.
class ExpOfProduct {
 public:
#if defined(CPU_CAPABILITY_AVX512)
  // c / log 2 is a sum of two floats. Rounded to one float it would give all elements an error of
  // the same sign. Both parts have the sign of c, and both are nonzero unless c is 0: for an
  // infinite v, infinity minus infinity or infinity times zero would give a NaN.
  explicit ExpOfProduct(double c) : ExpOfProduct(c * kLog2E, toward_zero(c * kLog2E)) {}

  Vec operator()(const Vec& v) const {
    const __m512 t = at::vec::fmadd(v, low_, v * high_);
    // scalef takes the floor of t by itself. For an infinite t, reduce gives 0.
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
  static constexpr double kLog2E = 1.44269504088896341;

  ExpOfProduct(double value, float high)
      : high_(high), low_(double(high) == value ? high * 0x1p-40f : float(value - double(high))) {}

  static float toward_zero(double value) {
    const float rounded = float(value);
    return std::abs(double(rounded)) > std::abs(value) ? std::nextafter(rounded, 0.0f) : rounded;
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

// exp(a - b), corrected by the rounding error of a - b.
inline Vec exp_of_difference(const Vec& a, const Vec& b) {
  const Vec d = a - b, back = d - a;
  const Vec rounding = (a - (d - back)) - (b + back);
  const Vec e = exp_of(d);
  return at::vec::fmadd(e, rounding, e);
}

// log(1 + x) for x in [0, 1], with an error of two units in the last place: 2 artanh z with
// z = x / (2 + x), where artanh(z) / z is a Chebyshev interpolant in z^2.
inline Vec log1p_of(const Vec& x) {
  const Vec z = x / (x + Vec(2.0f)), square = z * z;
  Vec p = at::vec::fmadd(square, Vec(2.8157778314e-1f), Vec(2.7965157757e-1f));
  p = at::vec::fmadd(square, p, Vec(4.0024595230e-1f));
  p = at::vec::fmadd(square, p, Vec(6.6666321641e-1f));
  return at::vec::fmadd(z * square, p, z + z);
}

// Calls run(T()) with the type T of a tensor's elements: float or half precision.
template <typename F>
auto with_type(at::ScalarType dtype, const F& run) {
  switch (dtype) {
    case at::kBFloat16:
      return run(at::BFloat16());
    case at::kHalf:
      return run(at::Half());
    default:
      return run(float());
  }
}

// Converts n elements of half precision to float. at::vec::convert would convert one at a time.
template <typename T>
inline void to_floats(const T* in, float* out, int64_t n) {
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
