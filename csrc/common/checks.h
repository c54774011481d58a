// Checks that keep a kernel from reading or writing out of bounds: ranks, sizes, dtypes and class
// indices. Small calls come here first (mulki/ops/calls.py); what is refused is explained by the
// checks of Python, mulki/ops/checks.py.
//
// `name` is the argument's name in the schema of the operator.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>

namespace mulki {

using at::Tensor;

inline void check_shape(const char* name, const Tensor& t, at::IntArrayRef wanted) {
  TORCH_CHECK_VALUE(t.sizes() == wanted, name, ": got shape ", t.sizes(), ", wanted ", wanted);
}

inline void check_dtype(const char* name, const Tensor& t, at::ScalarType wanted) {
  TORCH_CHECK_TYPE(
      t.scalar_type() == wanted, name, ": got dtype ", t.scalar_type(), ", wanted ", wanted);
}

inline void check_positive(const char* name, double value) {
  TORCH_CHECK_VALUE(
      value > 0 && std::isfinite(value), name, ": got ", value, ", wanted a positive number");
}

// x [N, D] and w [P, D] of one dtype that the kernels multiply.
inline void check_matrices(
    const char* x_name, const Tensor& x, const char* w_name, const Tensor& w) {
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, x_name, ": got dtype ",
      dtype, ", wanted float32, bfloat16 or float16");
  check_dtype(w_name, w, dtype);
  TORCH_CHECK_VALUE(x.dim() == 2, x_name, ": got shape ", x.sizes(), ", wanted [N, D]");
  TORCH_CHECK_VALUE(
      w.dim() == 2 && w.size(1) == x.size(1), w_name, ": got shape ", w.sizes(), ", wanted [P, ",
      x.size(1), "]");
}

// Image features and text features, row by row.
inline void check_pairs(
    const Tensor& image_features, const Tensor& text_features, const Tensor& logit_scale) {
  check_matrices("image_features", image_features, "text_features", text_features);
  check_shape("text_features", text_features, image_features.sizes());
  check_shape("logit_scale", logit_scale, {});
}

// Features against at least one prototype.
inline void check_prototypes(
    const Tensor& features, const Tensor& prototypes, const Tensor& scale) {
  check_matrices("features", features, "prototypes", prototypes);
  TORCH_CHECK_VALUE(prototypes.size(0) > 0, "prototypes: got no rows, wanted at least one");
  check_shape("scale", scale, {});
}

// At least one teacher of the student's dtype: features [N, D_k], prototypes [P, D_k] and a scale.
inline void check_teachers(
    const char* x_name,
    at::TensorList xs,
    const char* w_name,
    at::TensorList ws,
    at::TensorList scales,
    const Tensor& student_x,
    const Tensor& student_w) {
  const int64_t k = int64_t(xs.size());
  TORCH_CHECK_VALUE(k > 0, x_name, ": got no teacher, wanted at least one");
  TORCH_CHECK_VALUE(
      int64_t(ws.size()) == k, x_name, ": got ", k, " teachers, wanted ", ws.size(), " as ",
      w_name);
  TORCH_CHECK_VALUE(
      int64_t(scales.size()) == k, "teacher_scales: got ", scales.size(), ", wanted ", k, " as ",
      x_name);
  for (int64_t i = 0; i < k; ++i) {
    check_shape("teacher_scales", scales[i], {});
    check_matrices(x_name, xs[i], w_name, ws[i]);
    check_dtype(x_name, xs[i], student_x.scalar_type());
    check_shape(x_name, xs[i], {student_x.size(0), xs[i].size(1)});
    check_shape(w_name, ws[i], {student_w.size(0), xs[i].size(1)});
  }
}

// Returns the mask [P], contiguous. At least one class is active.
inline std::optional<Tensor> checked_class_mask(const std::optional<Tensor>& mask, int64_t p) {
  if (!mask.has_value()) {
    return std::nullopt;
  }
  check_dtype("class_mask", *mask, at::kBool);
  check_shape("class_mask", *mask, {p});
  const Tensor active = mask->contiguous();
  const bool* begin = active.const_data_ptr<bool>();
  TORCH_CHECK_VALUE(
      std::find(begin, begin + p, true) != begin + p,
      "class_mask: got no True, wanted at least one");
  return active;
}

// Returns the targets [N], contiguous: each is an active class in [0, P), or `ignored` if given.
// `mask` comes from checked_class_mask.
inline Tensor checked_target(
    const Tensor& target,
    int64_t n,
    int64_t p,
    std::optional<int64_t> ignored,
    const std::optional<Tensor>& mask) {
  check_dtype("target", target, at::kLong);
  check_shape("target", target, {n});
  const Tensor targets = target.contiguous();
  const int64_t* y = targets.const_data_ptr<int64_t>();
  const bool* active = mask.has_value() ? mask->const_data_ptr<bool>() : nullptr;
  for (int64_t i = 0; i < n; ++i) {
    if (ignored.has_value() && y[i] == *ignored) {
      continue;
    }
    TORCH_CHECK_VALUE(
        y[i] >= 0 && y[i] < p, "target: got ", y[i], " in row ", i, ", wanted a class in [0, ", p,
        ")");
    TORCH_CHECK_VALUE(
        active == nullptr || active[y[i]], "target: got ", y[i], " in row ", i,
        ", which class_mask excludes");
  }
  return targets;
}

} // namespace mulki
