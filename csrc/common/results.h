// What operators return, and the upstream gradient that enters a backward pass.
#pragma once

#include "common/checks.h"
#include "common/vec_math.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace mulki {

using at::Tensor;

// The gradients of x and w. One that is not wanted is empty.
struct Grads {
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

// Infinite where the value is too large for a float, which at::scalar_tensor refuses.
inline Tensor scalar(double value) {
  Tensor out = at::empty({}, at::kFloat);
  *out.mutable_data_ptr<float>() = float(value);
  return out;
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
  for (int64_t i = 0; i < loss.numel(); ++i) {
    sum += values[i];
  }
  return sum;
}

// What is asked of an operator by its last arguments, but for `wanted`. With an upstream gradient of
// the loss there are gradients alone, in the dtype of x. Without one they are those of the sum of the
// loss, in float.
class Request {
 public:
  Request(const std::optional<Tensor>& grad, c10::string_view reduction)
      : grad_(grad), rows_(reduction == "none"), mean_(reduction == "mean") {
    TORCH_CHECK_VALUE(
        rows_ || mean_ || reduction == "sum", "reduction: got '", reduction,
        "', wanted none, sum or mean");
  }

  at::ScalarType dtype(const Tensor& x) const {
    return grad_.has_value() ? x.scalar_type() : at::kFloat;
  }
  // The gradient with respect to the loss of each of n rows; a mean is over `count` of them.
  Upstream upstream(int64_t n, int64_t count) const {
    if (grad_.has_value()) {
      check_shape("grad", *grad_, rows_ ? at::IntArrayRef(n) : at::IntArrayRef());
    }
    if (rows_ && grad_.has_value()) {
      return Upstream(*grad_);
    }
    return Upstream((grad_.has_value() ? value_of(*grad_) : 1.0) * row_weight(mean_, count));
  }
  // The loss, of that of each row.
  Tensor loss(const Tensor& rows, int64_t count) const {
    if (grad_.has_value()) {
      return empty_float({0});
    }
    if (rows_) {
      return rows;
    }
    const double sum = sum_of_rows(rows);
    return scalar(mean_ ? sum / double(count) : sum);
  }
  // The same of losses in double.
  Tensor loss(const std::vector<double>& rows) const {
    if (grad_.has_value()) {
      return empty_float({0});
    }
    const auto n = int64_t(rows.size());
    if (rows_) {
      Tensor out = empty_float({n});
      std::copy(rows.begin(), rows.end(), out.mutable_data_ptr<float>());
      return out;
    }
    const double sum = std::accumulate(rows.begin(), rows.end(), 0.0);
    return scalar(mean_ ? sum / double(n) : sum);
  }
  Tensor detail(const Tensor& found) const {
    return grad_.has_value() ? empty_float({0}) : found;
  }

 private:
  const std::optional<Tensor> grad_;
  const bool rows_, mean_;
};

} // namespace mulki
