// What operators return, and the upstream gradient that enters a backward pass.
#pragma once

#include "common/vec_math.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <cmath>

namespace mulki {

using at::Tensor;

// The gradients of x and w. One that is not wanted is empty.
struct Grads {
  // `dtype` is that of x in a backward operator, and float in an operator that returns the loss
  // too.
  Grads(const Tensor& x, const Tensor& w, at::ScalarType dtype, bool wanted_x, bool wanted_w)
      : x(wanted_x ? at::empty(x.sizes(), dtype) : at::empty({0}, dtype)),
        w(wanted_w ? at::empty(w.sizes(), dtype) : at::empty({0}, dtype)) {
    if (wanted_w && x.size(0) == 0) {
      this->w.zero_();
    }
    if (wanted_x && w.size(0) == 0) {
      this->x.zero_();
    }
  }
  Tensor x, w;
};

inline Tensor empty_float(at::IntArrayRef sizes) {
  return at::empty(sizes, at::kFloat);
}

// Writes factor * in [n] to the elements of `out` from element `at` on, which may be `in` itself.
inline void store_scaled(const float* in, int64_t n, float factor, Tensor& out, int64_t at) {
  with_type(out.scalar_type(), [&](auto element) {
    auto* to = out.mutable_data_ptr<decltype(element)>() + at;
    if constexpr (std::is_same_v<decltype(element), float>) {
      at::vec::map([factor](Vec v) { return v * Vec(factor); }, to, in, n);
    } else {
      for (int64_t j = 0; j < n; ++j) {
        to[j] = in[j] * factor;
      }
    }
  });
}

inline Tensor scalar(double value) {
  return at::scalar_tensor(value, at::kFloat);
}

inline Tensor scalar_if(bool wanted, double value) {
  return wanted ? scalar(value) : at::empty({0}, at::kFloat);
}

// The factor of each row's loss in the total: for a mean over `count` rows, or for the sum.
inline double row_weight(bool mean, int64_t count) {
  return mean ? 1.0 / double(std::max<int64_t>(count, 1)) : 1.0;
}

inline double value_of(const Tensor& t) {
  return t.item().toDouble();
}

// The gradient of the total with respect to the loss of each row: a tensor [N], or one number.
struct Upstream {
  explicit Upstream(double each) : each(each) {}
  explicit Upstream(const Tensor& grad)
      : rows(grad.to(at::kFloat).contiguous()), data(rows.const_data_ptr<float>()) {}
  double operator[](int64_t row) const {
    return data == nullptr ? each : data[row];
  }

  double each = 0;
  Tensor rows;
  const float* data = nullptr;
};

// Adds in the order of the rows, so that the sum does not depend on the number of threads.
inline double sum_of_rows(const Tensor& loss) {
  const float* values = loss.const_data_ptr<float>();
  double sum = 0;
  for (int64_t i = 0; i < loss.size(0); ++i) {
    sum += values[i];
  }
  return sum;
}

} // namespace mulki
