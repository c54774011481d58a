// Common to the gradients of all engines: the tiling, and scaled stores to the result.
#pragma once

#include "matmul/engine.h"
#include "core/tiling.h"

#include <vector>

namespace mulki {

template <typename Engine>
class Gradients;

// The tiling of a problem for an engine. `models` counts the student and its teachers.
template <typename Engine>
Tiling tiling_for(int64_t n, int64_t p, int64_t models, bool gradient) {
  return {
      n,
      p,
      Gradients<Engine>::matrices(models),
      gradient,
      Engine::kMaxRows,
      Engine::kMatrices,
      Engine::kUnit,
      Engine::kWidth};
}

// Writes factor * in [n] to the elements of `out` from element `at` on.
inline void store_scaled(const float* in, int64_t n, float factor, Tensor& out, int64_t at) {
  switch (out.scalar_type()) {
    case at::kFloat: {
      float* to = out.mutable_data_ptr<float>() + at;
      for (int64_t j = 0; j < n; ++j) {
        to[j] = in[j] * factor;
      }
      break;
    }
    case at::kBFloat16: {
      at::BFloat16* to = out.mutable_data_ptr<at::BFloat16>() + at;
      for (int64_t j = 0; j < n; ++j) {
        to[j] = in[j] * factor;
      }
      break;
    }
    default: {
      at::Half* to = out.mutable_data_ptr<at::Half>() + at;
      for (int64_t j = 0; j < n; ++j) {
        to[j] = in[j] * factor;
      }
    }
  }
}

inline Tensor empty_float(at::IntArrayRef sizes) {
  return at::empty(sizes, at::kFloat);
}

} // namespace mulki
