// pair_kl: the weighted KL divergence of K teachers to a student over N pairs, in both directions.
//
//   loss_i = weight/2 (R_i + C_i) + label_weight L_i
//   R_i = sum_k w_ik KL_ik,   KL_ik = t sum_j p_ijk (log p_ijk - log q_ij)
//   dloss/du_ij = t/2 sum_k [g_i w_ik (q_ij - p_ijk) + g_j w'_jk (q'_ij - p'_ijk)],   u = scale Y / T
//
// q and p_k are the softmax of u of the student and of teacher k over the columns of a row; C_i and
// what has a dash are the same over the rows of a column. T is the temperature, t is T^2 or 1, g_i
// weight times the upstream gradient of loss_i. The weights w are given, or come from a gate (gate.h) whose label is
// the row's or the column's own pair. With expectations E over p_k and lse = log sum exp:
//
//   KL_k = t (E[u_k] - lse_k - E[u] + lse)
//
// L_i is the loss of contrastive, computed from the same products of the student, and, if T is 1,
// from the same exponentials. Tiling, memory and passes are those of
// pair_softmax.h.
#include "common/checks.h"
#include "core/gate.h"
#include "core/pair_softmax.h"

#include <torch/library.h>

#include <tuple>

namespace mulki {
namespace {

struct Arguments {
  const Tensor &image_features, &text_features, &logit_scale;
  at::TensorList teacher_image_features, teacher_text_features;
  at::TensorList teacher_scales;
  const std::optional<Tensor>& weights;
  double temperature;
  Gate gate;
  bool scale_by_t2;
  double weight, label_weight;

  int64_t n() const {
    return image_features.size(0);
  }
  int64_t k() const {
    return int64_t(teacher_image_features.size());
  }
  double t2() const {
    return scale_by_t2 ? temperature * temperature : 1.0;
  }
  bool labels() const {
    return label_weight != 0;
  }
  // The place of the labels' distribution.
  int64_t place_of_labels() const {
    return temperature == 1 ? 0 : k() + 1;
  }
};

void check_shapes(const Arguments& a) {
  check_pairs(a.image_features, a.text_features, a.logit_scale);
  check_positive("temperature", a.temperature);
  check_positive("gate_temperature", a.gate.temperature);
  check_teachers(
      "teacher_image_features", a.teacher_image_features, "teacher_text_features",
      a.teacher_text_features, a.teacher_scales, a.image_features, a.text_features);
  if (a.weights.has_value()) {
    check_shape("weights", *a.weights, {2, a.n(), a.k()});
  }
}

std::vector<PairFeatures> models_of(const Arguments& a) {
  std::vector<PairFeatures> models{{a.image_features, a.text_features}};
  for (int64_t i = 0; i < a.k(); ++i) {
    models.push_back({a.teacher_image_features[i], a.teacher_text_features[i]});
  }
  return models;
}

// That of the student, and those of the teachers. If the labels need another temperature, theirs
// is the last one.
std::vector<PairDistribution> distributions_of(const Arguments& a) {
  const double scale = value_of(a.logit_scale);
  std::vector<PairDistribution> out{{0, float(scale / a.temperature)}};
  for (int64_t i = 0; i < a.k(); ++i) {
    out.push_back({i + 1, float(value_of(a.teacher_scales[i]) / a.temperature)});
  }
  if (a.labels() && a.temperature != 1) {
    out.push_back({0, float(scale)});
  }
  return out;
}

// By-products: [2, N, K], of the rows, then of the columns, and the labels' losses [N].
struct Details {
  explicit Details(const Arguments& a)
      : kl(empty_float({2, a.n(), a.k()})),
        weights(empty_float(kl.sizes())),
        entropy(empty_float(kl.sizes())),
        labels(empty_float({a.labels() ? a.n() : 0})) {
    if (a.weights.has_value()) {
      weights.copy_(*a.weights);
    }
  }
  Tensor kl, weights, entropy, labels;
};

// Fills the details of one side, the rows (0) or the columns (1), and adds its part of the loss.
void finish_side(
    const Arguments& a,
    int64_t side,
    const SumsOfPairs& sums,
    const std::vector<PairDistribution>& distributions,
    const Details& details,
    std::vector<double>& loss) {
  const int64_t n = a.n(), k = a.k();
  const std::vector<PairSums>& of = side == 0 ? sums.rows : sums.columns;
  float* kl = details.kl.mutable_data_ptr<float>() + side * n * k;
  float* w = details.weights.mutable_data_ptr<float>() + side * n * k;
  float* entropy = details.entropy.mutable_data_ptr<float>() + side * n * k;
  for (int64_t i = 0; i < n; ++i, kl += k, w += k, entropy += k) {
    for (int64_t t = 0; t < k; ++t) {
      const PairSums& teacher = of[t + 1];
      const double negative_entropy = teacher.own[i] - teacher.lse[i];
      kl[t] = float(a.t2() * (negative_entropy - (teacher.student[i] - of[0].lse[i])));
      entropy[t] = float(-negative_entropy);
    }
    if (!a.weights.has_value()) {
      const auto log_p = [&](int64_t t) {
        const auto& [model, c] = distributions[t + 1];
        return double(sums.match[model][i] * c) - of[t + 1].lse[i];
      };
      a.gate.weights(k, entropy, log_p, w);
    }
    for (int64_t t = 0; t < k; ++t) {
      loss[i] += a.weight / 2 * w[t] * kl[t];
    }
  }
}

// Adds the coefficients of the divergences, in units of dloss/dz with z = scale Y.
void add_divergences(
    const Arguments& a,
    const Tensor& weights,
    const Upstream& upstream,
    std::vector<PairCoefficients>& out) {
  const int64_t n = a.n(), k = a.k();
  const double factor = a.weight * a.t2() / a.temperature / 2;
  for (int64_t side = 0; side < 2; ++side) {
    const float* w = weights.const_data_ptr<float>() + side * n * k;
    const auto coefficients = [&](int64_t d) -> std::vector<float>& {
      return side == 0 ? out[d].row : out[d].column;
    };
    for (int64_t i = 0; i < n; ++i, w += k) {
      // Summed as floats, so that one teacher's coefficient is the student's but for the sign.
      float of_student = 0;
      for (int64_t t = 0; t < k; ++t) {
        const float of_teacher = float(factor * upstream[i] * w[t]);
        coefficients(t + 1)[i] -= of_teacher;
        of_student += of_teacher;
      }
      coefficients(0)[i] += of_student;
    }
  }
}

// Both passes: fills `details`, adds the losses, and returns the gradient of the scale.
template <typename Engine>
double compute(
    const Arguments& a,
    const Upstream& upstream,
    std::array<bool, 3> wanted,
    Details& details,
    std::vector<double>& loss,
    Grads& grads) {
  const bool any = wanted[0] || wanted[1] || wanted[2];
  const std::vector<PairDistribution> distributions = distributions_of(a);
  PairSoftmax<Engine> pairs(models_of(a), distributions, wanted[0], wanted[1]);
  const std::optional<ProductCache> cache = pairs.cache_if(any);
  SumsOfPairs sums = pairs.sums(cache);
  for (int64_t side = 0; side < 2; ++side) {
    finish_side(a, side, sums, distributions, details, loss);
  }
  const int64_t place = a.place_of_labels();
  float* labels = details.labels.mutable_data_ptr<float>();
  for (int64_t i = 0; i < a.n() && a.labels(); ++i) {
    const double of_labels = sums.loss_of_labels(distributions[place], place, i);
    labels[i] = float(of_labels);
    loss[i] += a.label_weight * of_labels;
  }
  if (!any) {
    return 0.0;
  }
  std::vector<PairCoefficients> coefficients;
  for (size_t d = 0; d < sums.rows.size(); ++d) {
    coefficients.emplace_back(std::move(sums.rows[d].lse), std::move(sums.columns[d].lse));
  }
  add_divergences(a, details.weights, upstream, coefficients);
  if (a.labels()) {
    coefficients[place].add_labels(upstream, a.label_weight);
  }
  return pairs.gradients(coefficients, float(value_of(a.logit_scale)), grads, cache);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pair_kl(
    const Tensor& image_features,
    const Tensor& text_features,
    const Tensor& logit_scale,
    at::TensorList teacher_image_features,
    at::TensorList teacher_text_features,
    at::TensorList teacher_scales,
    const std::optional<Tensor>& weights,
    double temperature,
    double gate_temperature,
    double gate_entropy,
    double gate_label,
    bool scale_by_t2,
    double weight,
    double label_weight,
    const std::optional<Tensor>& grad,
    c10::string_view reduction,
    std::array<bool, 3> wanted) {
  const Arguments a{
      image_features,
      text_features,
      logit_scale,
      teacher_image_features,
      teacher_text_features,
      teacher_scales,
      weights,
      temperature,
      {gate_entropy, gate_label, gate_temperature},
      scale_by_t2,
      weight,
      label_weight};
  check_shapes(a);
  const int64_t n = a.n();
  const Request request(grad, reduction);
  const Upstream upstream = request.upstream(n, n);
  Details details(a);
  Grads grads(image_features, text_features, request.dtype(image_features), wanted[0], wanted[1]);
  std::vector<double> loss(n);
  double dscale = 0;
  if (n > 0) {
    dscale = with_engine(image_features.scalar_type(), [&](auto engine) {
      return compute<decltype(engine)>(a, upstream, wanted, details, loss, grads);
    });
  }
  return {
      request.loss(loss),
      request.detail(details.kl),
      request.detail(details.weights),
      request.detail(details.entropy),
      request.detail(details.labels),
      grads.x,
      grads.w,
      scalar_if(wanted[2], dscale)};
}

} // namespace

TORCH_LIBRARY_IMPL(mulki_cpp, CPU, m) {
  m.impl("pair_kl", &pair_kl);
}

} // namespace mulki
