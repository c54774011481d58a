// Checks of arguments. `mulki.functional` checks first and says more; these keep a direct call of an
// operator, or one from compiled code, from reading where it must not.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>

namespace mulki {

using at::Tensor;

inline void check_number(const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(t.dim() == 0, name, ": got shape ", t.sizes(), ", wanted a 0-d tensor");
}

inline void check_matrices(const Tensor& x, const Tensor& w) {
  TORCH_CHECK_TYPE(
      x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 ||
          x.scalar_type() == at::kHalf,
      "x: got dtype ", x.scalar_type(), ", wanted float32, bfloat16 or float16");
  TORCH_CHECK_TYPE(
      w.scalar_type() == x.scalar_type(), "w: got dtype ", w.scalar_type(), ", wanted ",
      x.scalar_type(), " as x has; cast one to the other");
  TORCH_CHECK_VALUE(x.dim() == 2, "x: got shape ", x.sizes(), ", wanted [N, D]");
  TORCH_CHECK_VALUE(
      w.dim() == 2 && w.size(1) == x.size(1), "w: got shape ", w.sizes(), ", wanted [P, ",
      x.size(1), "] to match x");
}

inline void check_operands(const Tensor& x, const Tensor& w, const Tensor& scale) {
  check_matrices(x, w);
  TORCH_CHECK_VALUE(w.size(0) > 0, "w: got no rows, wanted at least one");
  check_number("scale", scale);
}

inline void check_pairs(const Tensor& x, const Tensor& w, const Tensor& scale) {
  check_matrices(x, w);
  TORCH_CHECK_VALUE(
      w.size(0) == x.size(0), "w: got shape ", w.sizes(), ", wanted ", x.sizes(),
      " as x: pairs match row by row");
  check_number("scale", scale);
}

inline void check_biased(
    const Tensor& x, const Tensor& w, const Tensor& scale, const Tensor& bias) {
  check_matrices(x, w);
  check_number("scale", scale);
  check_number("bias", bias);
}

inline void check_rows(const char* name, const Tensor& t, int64_t n) {
  TORCH_CHECK_VALUE(
      t.dim() == 1 && t.size(0) == n, name, ": got shape ", t.sizes(), ", wanted [", n, "]");
}

// A contiguous mask with at least one class that takes part.
inline std::optional<Tensor> checked_classes(const std::optional<Tensor>& mask, int64_t p) {
  if (!mask.has_value()) {
    return std::nullopt;
  }
  TORCH_CHECK_TYPE(
      mask->scalar_type() == at::kBool, "class_mask: got dtype ", mask->scalar_type(),
      ", wanted bool");
  check_rows("class_mask", *mask, p);
  const Tensor kept = mask->contiguous();
  const bool* begin = kept.const_data_ptr<bool>();
  TORCH_CHECK_VALUE(
      std::find(begin, begin + p, true) != begin + p,
      "class_mask: masks every class, wanted at least one True");
  return kept;
}

// Contiguous targets in [0, p), of classes that take part, or `ignored` where that is given.
inline Tensor checked_target(
    const Tensor& target,
    int64_t n,
    int64_t p,
    std::optional<int64_t> ignored,
    const std::optional<Tensor>& mask) {
  TORCH_CHECK_TYPE(
      target.scalar_type() == at::kLong, "target: got dtype ", target.scalar_type(),
      ", wanted int64");
  check_rows("target", target, n);
  const Tensor targets = target.contiguous();
  const int64_t* y = targets.const_data_ptr<int64_t>();
  const bool* kept = mask.has_value() ? mask->const_data_ptr<bool>() : nullptr;
  for (int64_t i = 0; i < n; ++i) {
    if (ignored.has_value() && y[i] == *ignored) {
      continue;
    }
    TORCH_CHECK_VALUE(
        y[i] >= 0 && y[i] < p, "target: got ", y[i], " in row ", i,
        ", wanted class indices in [0, ", p, ")");
    TORCH_CHECK_VALUE(
        kept == nullptr || kept[y[i]], "target: holds class ", y[i],
        ", which class_mask excludes; unmask it or leave its rows out");
  }
  return targets;
}

} // namespace mulki
