// similarity: Z = scale X W^T [N, P], of the rows as they are or L2-normalised.
//
// X are the features [N, D] and W the prototypes [P, D]. Norms are factors of the rows and columns
// of the product, so normalised operands are never stored or rounded. Tiles of the product are
// written to the result as they are computed (logits.h). The backward pass scales the upstream
// gradient to that of the plain product, super-block by super-block (gradients.h), and then
// projects it. Where there is nothing to project, bfloat16 takes torch's products, whose sums may be
// in another order with another number of threads.
#include "common/checks.h"
#include "common/results.h"
#include "core/gradients.h"
#include "core/logits.h"

#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <numeric>
#include <vector>

namespace mulki {
namespace {

constexpr double kMinNorm = 1e-12; // lower bound of a norm, as in F.normalize

// Reads rows of an operand in the dtype in which they are multiplied.
template <typename Engine>
class RowReader {
 public:
  explicit RowReader(const typename Engine::Operand& rows) : rows_(rows), buffer_(rows.width) {}
  const typename Engine::Element* operator()(int64_t i) {
    return rows_.read(i, 1, 0, rows_.width, buffer_.data()).data;
  }

 private:
  const typename Engine::Operand& rows_;
  std::vector<typename Engine::Element> buffer_;
};

template <typename Engine>
std::vector<double> norms(const typename Engine::Operand& rows, bool wanted) {
  if (!wanted) {
    return {};
  }
  std::vector<double> out(rows.count);
  at::parallel_for(0, rows.count, 64, [&](int64_t begin, int64_t end) {
    RowReader<Engine> read(rows);
    for (int64_t i = begin; i < end; ++i) {
      const auto* row = read(i);
      double sum = 0;
      for (int64_t j = 0; j < rows.width; ++j) {
        sum += double(row[j]) * double(row[j]);
      }
      out[i] = std::sqrt(sum);
    }
  });
  return out;
}

// 1 / norm of each row, or ones.
std::vector<float> factors(const std::vector<double>& norm, int64_t count) {
  std::vector<float> out(count, 1.0f);
  for (size_t i = 0; i < norm.size(); ++i) {
    out[i] = float(1 / std::max(norm[i], kMinNorm));
  }
  return out;
}

template <typename Engine, typename Out>
void forward(
    const Tensor& features, const Tensor& prototypes, float scale, bool normalize, Tensor& out) {
  const Tiling t(features.size(0), prototypes.size(0), 1, false);
  const typename Engine::Operand x(features), w(prototypes);
  Logits<Engine> logits(t, {{&x, &w}}, t.tiles);
  const std::vector<float> row_factors = factors(norms<Engine>(x, normalize), t.n);
  std::vector<float> column_factors = factors(norms<Engine>(w, normalize), t.p);
  for (float& f : column_factors) {
    f *= scale;
  }
  Out* data = out.mutable_data_ptr<Out>();
  for (int64_t first = 0; first < t.n; first += t.rows) {
    logits.run(
        first, std::min(t.rows, t.n - first), [](int64_t) { return true; },
        [&](int64_t tile, int64_t begin, int64_t end) {
          alignas(64) float y[64 * 128];
          TORCH_INTERNAL_ASSERT_DEBUG_ONLY(t.block <= 64 && t.width <= 128);
          logits.multiply(0, tile, begin, end, y);
          const int64_t valid = t.valid(tile);
          const float* column = &column_factors[tile * t.width];
          for (int64_t i = begin; i < end; ++i) {
            const float row = row_factors[first + i];
            const float* from = y + (i - begin) * t.width;
            Out* to = data + (first + i) * t.p + tile * t.width;
            for (int64_t j = 0; j < valid; ++j) {
              to[j] = static_cast<Out>(from[j] * column[j] * row);
            }
          }
        });
  }
}

// Writes dx_i = f (a_i - n_i (n_i . a_i)), where n_i is the normalised row of x and a_i the
// gradient of that row in the scaled product; without normalisation dx_i = f a_i.
template <typename Engine>
void project(
    const Tensor& sums,
    const typename Engine::Operand& rows,
    const std::vector<double>& norm,
    bool normalize,
    float factor,
    Tensor& out) {
  const int64_t width = rows.width;
  at::parallel_for(0, rows.count, 16, [&](int64_t begin, int64_t end) {
    RowReader<Engine> read(rows);
    std::vector<float> row(width);
    for (int64_t i = begin; i < end; ++i) {
      const float* a = sums.const_data_ptr<float>() + i * width;
      std::copy(a, a + width, row.begin());
      if (normalize && norm[i] > kMinNorm) {
        const auto* input = read(i);
        double along = 0;
        for (int64_t j = 0; j < width; ++j) {
          along += double(input[j]) * a[j];
        }
        along /= norm[i] * norm[i];
        for (int64_t j = 0; j < width; ++j) {
          row[j] = float(a[j] - along * float(input[j]));
        }
      }
      store_scaled(row.data(), width, factor, out, i * width);
    }
  });
}

// `grad` is contiguous and has elements of type In.
template <typename Engine, typename In>
double backward(
    const Tensor& grad,
    const Tensor& features,
    const Tensor& prototypes,
    double scale,
    bool normalize,
    std::array<bool, 3> wanted,
    Grads& grads) {
  const typename Engine::Operand x(features), w(prototypes);
  const Tiling t(features.size(0), prototypes.size(0), 1, true);
  const std::vector<double> norm_x = norms<Engine>(x, normalize);
  const std::vector<double> norm_w = norms<Engine>(w, normalize);
  const std::vector<float> row_factors = factors(norm_x, t.n);
  const std::vector<float> column_factors = factors(norm_w, t.p);
  // dloss/dscale is the sum over all elements of X times the unscaled dX.
  const bool needs_dx = wanted[0] || wanted[2];
  Gradients<Engine> gradients(t, x, w, needs_dx, wanted[1]);
  Grads sums(features, prototypes, at::kFloat, needs_dx, wanted[1]);
  const In* g = grad.const_data_ptr<In>();
  for (int64_t first = 0; first < t.n && gradients.any(); first += t.rows) {
    const int64_t count = std::min(t.rows, t.n - first);
    const int64_t blocks = (count + t.block - 1) / t.block;
    parallel_tasks(t.tiles * blocks, [&](int64_t task) {
      const int64_t tile = task / blocks, b = task % blocks * t.block;
      const int64_t size = std::min(t.block, count - b), valid = t.valid(tile);
      for (int64_t i = b; i < b + size; ++i) {
        float* out = gradients.values(0, tile, i);
        const In* from = g + (first + i) * t.p + tile * t.width;
        if constexpr (std::is_same_v<In, float>) {
          std::copy(from, from + valid, out);
        } else {
          to_floats(from, out, valid);
        }
        const float* column = &column_factors[tile * t.width];
        const float row = row_factors[first + i];
        for (int64_t j = 0; j < valid; ++j) {
          out[j] *= column[j] * row;
        }
        std::fill(out + valid, out + t.width, 0.0f);
      }
    });
    gradients.accumulate(first, count, 1.0f, sums.x, sums.w);
  }

  double dscale = 0;
  if (wanted[2]) {
    std::vector<double> along(x.count);
    at::parallel_for(0, x.count, 64, [&](int64_t begin, int64_t end) {
      RowReader<Engine> read(x);
      for (int64_t i = begin; i < end; ++i) {
        const float* a = sums.x.template const_data_ptr<float>() + i * x.width;
        const auto* row = read(i);
        for (int64_t j = 0; j < x.width; ++j) {
          along[i] += double(row[j]) * a[j];
        }
      }
    });
    dscale = std::accumulate(along.begin(), along.end(), 0.0);
  }
  if (wanted[0]) {
    project<Engine>(sums.x, x, norm_x, normalize, float(scale), grads.x);
  }
  if (wanted[1]) {
    project<Engine>(sums.w, w, norm_w, normalize, float(scale), grads.w);
  }
  return dscale;
}

// Whether torch multiplies by the upstream gradient as it is, and faster: a super-block would be
// packed twice for that. Where oneDNN has no bfloat16 (brgemm.h), torch took twice as long.
bool takes_plain_products(const Tensor& grad, const Tensor& features, bool normalize) {
  return !normalize && grad.scalar_type() == at::kBFloat16 &&
      features.scalar_type() == at::kBFloat16 && brgemm_has_bfloat16();
}

// The sum of all elements of a * b; both are contiguous.
double inner_product(const Tensor& a, const Tensor& b) {
  const int64_t width = a.size(1);
  const auto *a_data = a.const_data_ptr<at::BFloat16>(), *b_data = b.const_data_ptr<at::BFloat16>();
  std::vector<double> rows(a.size(0));
  at::parallel_for(0, a.size(0), 64, [&](int64_t begin, int64_t end) {
    std::vector<float> x(width), y(width);
    for (int64_t i = begin; i < end; ++i) {
      to_floats(a_data + i * width, x.data(), width);
      to_floats(b_data + i * width, y.data(), width);
      rows[i] = at::vec::map2_reduce_all<float>(
          [](Vec u, Vec v) { return u * v; }, [](Vec u, Vec v) { return u + v; }, x.data(),
          y.data(), width);
    }
  });
  return std::accumulate(rows.begin(), rows.end(), 0.0);
}

double plain_backward(
    const Tensor& grad,
    const Tensor& features,
    const Tensor& prototypes,
    double scale,
    std::array<bool, 3> wanted,
    Grads& grads) {
  // A backward pass may run under autocast, which would round to another dtype.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  double dscale = 0;
  if (wanted[0] || wanted[2]) {
    Tensor dx = at::mm(grad, prototypes);
    if (wanted[2]) {
      dscale = inner_product(features.contiguous(), dx);
    }
    if (wanted[0]) {
      grads.x = dx.mul_(scale);
    }
  }
  if (wanted[1]) {
    grads.w = at::mm(grad.t(), features).mul_(scale);
  }
  return dscale;
}

// Fills `grads`, and returns that of the scale.
double gradients_of(
    const Tensor& grad,
    const Tensor& features,
    const Tensor& prototypes,
    double scale,
    bool normalize,
    std::array<bool, 3> wanted,
    Grads& grads) {
  check_shape("grad", grad, {features.size(0), prototypes.size(0)});
  if (takes_plain_products(grad, features, normalize)) {
    return plain_backward(grad, features, prototypes, scale, wanted, grads);
  }
  const at::ScalarType dtype = features.scalar_type();
  grads = Grads(features, prototypes, dtype, wanted[0], wanted[1]);
  const bool half = at::isReducedFloatingType(grad.scalar_type());
  const Tensor upstream = (half ? grad : grad.to(at::kFloat)).contiguous();
  return with_engine(dtype, [&](auto engine) {
    return with_type(upstream.scalar_type(), [&](auto element) {
      return backward<decltype(engine), decltype(element)>(
          upstream, features, prototypes, scale, normalize, wanted, grads);
    });
  });
}

// The matrix, or its gradients for an upstream gradient.
std::tuple<Tensor, Tensor, Tensor, Tensor> similarity(
    const Tensor& features,
    const Tensor& prototypes,
    const Tensor& scale,
    bool normalize,
    const std::optional<Tensor>& grad,
    c10::string_view reduction,
    std::array<bool, 3> wanted) {
  check_prototypes(features, prototypes, scale);
  TORCH_CHECK_VALUE(reduction == "none", "reduction: got '", reduction, "', wanted none");
  const bool any = wanted[0] || wanted[1] || wanted[2];
  TORCH_CHECK_VALUE(
      grad.has_value() || !any, "wanted: got True without grad, wanted an upstream gradient");
  const double s = value_of(scale);
  const at::ScalarType dtype = features.scalar_type();
  Grads grads(features, prototypes, grad.has_value() ? dtype : at::kFloat, false, false);
  if (grad.has_value()) {
    const double dscale = gradients_of(*grad, features, prototypes, s, normalize, wanted, grads);
    return {at::empty({0}, dtype), grads.x, grads.w, scalar_if(wanted[2], dscale)};
  }
  Tensor out = at::empty({features.size(0), prototypes.size(0)}, dtype);
  with_engine(features, prototypes, [&](auto engine) {
    with_type(dtype, [&](auto element) {
      forward<decltype(engine), decltype(element)>(features, prototypes, float(s), normalize, out);
    });
  });
  return {out, grads.x, grads.w, scalar_if(false, 0)};
}

} // namespace

TORCH_LIBRARY_IMPL(mulki_cpp, CPU, m) {
  m.impl("similarity", &similarity);
}

} // namespace mulki
