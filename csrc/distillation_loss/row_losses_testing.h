// For the tests of both kernels: calls with all their memory, and the definition in float64.
//
// The definition writes each loss as its formula and takes the gradient from differences of it, so
// that it shares no derivation with the kernels.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "csrc/distillation_loss/row_losses.h"

namespace speculators {

enum class GradientPlace { kNone, kItsOwn, kOverTheLogits };

struct RowLossShape {
  int64_t num_rows, width, num_targets;
  bool is_bfloat16;
  GradientPlace gradient;
  LossFactors factors;
  int64_t padding = 0;  // elements between two rows
};

inline constexpr LossFactors kEveryLoss = {0.7f,  0.3f,  -0.4f, 1.1f, 0.2f,
                                           -0.6f, 0.25f, 0.15f, 0.8f, 0.9f};

inline uint16_t to_bfloat16_bits(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

inline float from_bfloat16_bits(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// A call and the memory that it points to: neither copied nor moved.
class RowLossCase {
 public:
  RowLossCase(const RowLossShape& shape, unsigned seed) : shape_(shape), random_(seed * 7919 + 1) {
    make_draft();
    make_targets();
    loss.resize(shape.num_rows);
    alpha.resize(shape.num_rows);
    greedy.resize(shape.num_rows);
    agreement.resize(shape.num_rows);
    in_vocabulary.resize(shape.num_rows);
    point();
  }
  RowLossCase(const RowLossCase&) = delete;
  RowLossCase& operator=(const RowLossCase&) = delete;

  RowLossCall call;
  std::vector<float> loss, alpha, greedy;
  std::vector<uint8_t> agreement, in_vocabulary;  // one byte each, as bool
  std::vector<float> log_p, coverage, weights;
  std::vector<int64_t> best, likeliest, top, positions, data_tokens;
  std::vector<std::vector<double>> logits;  // [rows][W], as they are before the call

  // Writes one logit, where the kernel will read it and where the definition will.
  void set_logit(int64_t row, int64_t column, float value) {
    const int64_t place = row * stride() + column;
    if (shape_.is_bfloat16) {
      half_[place] = to_bfloat16_bits(value);
      logits[row][column] = from_bfloat16_bits(half_[place]);
    } else {
      single_[place] = value;
      logits[row][column] = value;
    }
  }

  double gradient(int64_t row, int64_t column) const {
    const bool over = shape_.gradient == GradientPlace::kOverTheLogits;
    const int64_t place = row * stride() + column;
    if (shape_.is_bfloat16) return from_bfloat16_bits((over ? half_ : half_gradient_)[place]);
    return (over ? single_ : single_gradient_)[place];
  }

  // Whether the results are those of the definition; says which is not.
  bool is_right() const {
    bool right = true;
    for (int64_t row = 0; row < shape_.num_rows; ++row) right = row_is_right(row) && right;
    return right;
  }

 private:
  int64_t stride() const { return shape_.width + shape_.padding; }
  int64_t target_of(int64_t row) const { return positions[row]; }

  void make_draft() {
    std::normal_distribution<float> normal(0, 2);
    const auto size = static_cast<size_t>(shape_.num_rows * stride() - shape_.padding);
    (shape_.is_bfloat16 ? half_ : half_gradient_).resize(shape_.is_bfloat16 ? size : 0);
    (shape_.is_bfloat16 ? half_gradient_ : half_).resize(shape_.is_bfloat16 ? size : 0);
    single_.resize(shape_.is_bfloat16 ? 0 : size);
    single_gradient_.resize(shape_.is_bfloat16 ? 0 : size);
    logits.assign(shape_.num_rows, std::vector<double>(shape_.width));
    for (int64_t row = 0; row < shape_.num_rows; ++row) {
      for (int64_t i = 0; i < shape_.width; ++i) set_logit(row, i, normal(random_));
      // Several largest logits, of which the first counts.
      for (int copy = 0; copy < 3; ++copy) set_logit(row, random_() % shape_.width, 8);
      weights.push_back(0.25f + static_cast<float>(row % 3));
      positions.push_back(static_cast<int64_t>(random_() % shape_.num_targets));
      data_tokens.push_back(row % 4 == 1 ? -1 : static_cast<int64_t>(random_() % shape_.width));
    }
  }

  void make_targets() {
    std::normal_distribution<double> normal(0, 2);
    const int64_t width = shape_.width;
    top_k_ = std::min<int64_t>(width, 3);
    log_p.resize(shape_.num_targets * width);
    for (int64_t target = 0; target < shape_.num_targets; ++target) {
      std::vector<double> values(width);
      double sum = 0;
      for (double& value : values) sum += std::exp(value = normal(random_));
      std::vector<std::pair<double, int64_t>> order;
      for (int64_t i = 0; i < width; ++i) {
        double value = values[i] - std::log(sum);
        if (i % 7 == 3) value = -std::numeric_limits<double>::infinity();
        log_p[target * width + i] = static_cast<float>(value);
        order.emplace_back(-value, i);
      }
      std::sort(order.begin(), order.end());
      for (int64_t k = 0; k < top_k_; ++k) top.push_back(order[k].second);
      likeliest.push_back(order[0].second);
      best.push_back(target % 3 == 2 ? -1 : order[0].second);
      coverage.push_back(target % 5 == 4 ? 0.0f : 0.8f);
    }
  }

  void point() {
    call.num_rows = shape_.num_rows;
    call.width = shape_.width;
    call.factors = shape_.factors;
    const bool half = shape_.is_bfloat16;
    call.is_bfloat16 = half;
    void* const over = half ? static_cast<void*>(half_.data()) : single_.data();
    void* const own = half ? static_cast<void*>(half_gradient_.data()) : single_gradient_.data();
    call.logits = over;
    call.logits_stride = call.gradient_stride = stride();
    if (shape_.gradient == GradientPlace::kOverTheLogits) call.gradient = over;
    if (shape_.gradient == GradientPlace::kItsOwn) call.gradient = own;
    call.data_tokens = data_tokens.data();
    call.weights = weights.data();
    call.positions = positions.data();
    call.num_targets = shape_.num_targets;
    call.log_p = log_p.data();
    call.log_p_stride = shape_.width;
    call.coverage = coverage.data();
    call.best = best.data();
    call.likeliest = likeliest.data();
    call.top = top.data();
    call.top_k = top_k_;
    call.loss = loss.data();
    call.alpha = alpha.data();
    call.greedy_acceptance = greedy.data();
    call.agreement = reinterpret_cast<bool*>(agreement.data());
    call.in_vocabulary = reinterpret_cast<bool*>(in_vocabulary.data());
  }

  static std::vector<double> log_softmax(const std::vector<double>& z) {
    const double max = *std::max_element(z.begin(), z.end());
    double sum = 0;
    for (const double value : z) sum += std::exp(value - max);
    std::vector<double> result;
    for (const double value : z) result.push_back(value - max - std::log(sum));
    return result;
  }

  // The loss as a function of the logits; `share` is lk_hybrid's weight of kl, or NaN for its own.
  double loss_of(int64_t row, const std::vector<double>& z, double* share) const {
    const int64_t target = target_of(row);
    const LossFactors& f = shape_.factors;
    const std::vector<double> log_q = log_softmax(z);
    double kl = 0, rkl = 0, jsd = 0, ce = 0, distance = 0, topk = 0;
    double least = -std::numeric_limits<double>::infinity();
    const auto lp = [&](int64_t i) { return double{log_p[target * shape_.width + i]}; };
    for (int64_t i = 0; i < shape_.width; ++i) least = std::max(least, std::min(lp(i), log_q[i]));
    double overlap = 0;
    for (int64_t i = 0; i < shape_.width; ++i) {
      const double p = std::exp(lp(i));
      const double q = std::exp(log_q[i]);
      const double bounded = std::max(lp(i), -100.0);
      kl += p * (bounded - log_q[i]);
      rkl += q * (log_q[i] - bounded);
      jsd += (p > 0 ? p * std::log(2 * p / (p + q)) : 0) / 2;
      jsd += (q > 0 ? q * std::log(2 * q / (p + q)) : 0) / 2;
      ce -= p * log_q[i];
      distance += std::abs(p - q) / 2;
      overlap += std::exp(std::min(lp(i), log_q[i]) - least);
    }
    for (int64_t k = 0; k < top_k_; ++k) {
      const int64_t i = top[target * top_k_ + k];
      topk -= std::exp(lp(i)) * log_q[i];
    }
    if (std::isnan(*share)) *share = std::exp(-3 * (1 - distance));
    const int64_t token = data_tokens[row];
    return f.kl * kl + f.rkl * rkl + f.jsd * jsd + f.ce_soft * ce -
           f.ce_argmax * log_q[likeliest[target]] - (token < 0 ? 0 : f.ce_data * log_q[token]) +
           f.tv * distance - f.nla * (least + std::log(overlap)) +
           f.lk_hybrid * (*share * kl + (1 - *share) * distance) + f.topk * topk;
  }

  bool near(double found, double expected, double relative, double absolute, const char* what,
            int64_t row, int64_t column) const {
    if (std::abs(found - expected) <= relative * std::abs(expected) + absolute) return true;
    std::printf("%s of row %ld, column %ld: found %.9g, expected %.9g\n", what,
                static_cast<long>(row), static_cast<long>(column), found, expected);
    return false;
  }

  bool row_is_right(int64_t row) const {
    const int64_t target = target_of(row);
    const std::vector<double>& z = logits[row];
    const std::vector<double> log_q = log_softmax(z);
    const auto guess = std::max_element(z.begin(), z.end()) - z.begin();
    double expected_alpha = 0;
    for (int64_t i = 0; i < shape_.width; ++i) {
      const double p = coverage[target] * std::exp(double{log_p[target * shape_.width + i]});
      expected_alpha += std::min(p, std::exp(log_q[i]));
    }
    const double full_p = coverage[target] * std::exp(double{log_p[target * shape_.width + guess]});
    bool right = near(alpha[row], expected_alpha, 1e-5, 1e-7, "alpha", row, 0) &&
                 near(greedy[row], full_p, 1e-5, 1e-7, "greedy acceptance", row, 0) &&
                 near(agreement[row], guess == best[target], 0, 0, "agreement", row, 0) &&
                 near(in_vocabulary[row], best[target] >= 0, 0, 0, "in vocabulary", row, 0);
    const bool learns = coverage[target] > 0 && (best[target] >= 0 || !call.only_in_vocabulary);
    double share = std::numeric_limits<double>::quiet_NaN();
    const double expected = loss_of(row, z, &share);
    right = near(loss[row], learns ? expected : 0, 1e-5, 1e-5, "loss", row, 0) && right;
    if (shape_.gradient == GradientPlace::kNone) return right;
    for (int64_t i = 0; i < shape_.width; ++i) {
      constexpr double kStep = 1e-4;
      std::vector<double> up = z;
      std::vector<double> down = z;
      up[i] += kStep;
      down[i] -= kStep;
      const double slope = (loss_of(row, up, &share) - loss_of(row, down, &share)) / (2 * kStep);
      const double relative = shape_.is_bfloat16 ? 1.0 / 256 : 1e-4;
      right = near(gradient(row, i), learns ? slope * weights[row] : 0, relative, 2e-6, "gradient",
                   row, i) &&
              right;
    }
    return right;
  }

  RowLossShape shape_;
  std::mt19937 random_;
  int64_t top_k_ = 0;
  std::vector<float> single_, single_gradient_;
  std::vector<uint16_t> half_, half_gradient_;
};

// Whether what is no number shows: acceptance and each loss by itself are NaN in the row whose
// logit or target is spoilt, and in no other. `run` computes a call.
template <typename Run>
bool what_is_no_number_shows(const Run& run) {
  bool right = true;
  const auto expect = [&](int number, const char* what, auto spoil) {
    LossFactors factors = {};
    reinterpret_cast<float*>(&factors)[number] = 1;
    RowLossCase c({2, 40, 2, false, GradientPlace::kNone, factors}, 5);
    for (int64_t row = 0; row < 2; ++row) c.positions[row] = c.data_tokens[row] = row;
    spoil(c);
    run(c.call);
    if (std::isfinite(c.alpha[0]) && std::isfinite(c.loss[0]) && std::isnan(c.alpha[1]) &&
        std::isnan(c.loss[1])) {
      return;
    }
    std::printf("loss %d, %s: alpha %g and %g, loss %g and %g\n", number, what, c.alpha[0],
                c.alpha[1], c.loss[0], c.loss[1]);
    right = false;
  };
  for (int number = 0; number < kNumLosses; ++number) {
    expect(number, "a logit is NaN", [](RowLossCase& c) { c.set_logit(1, 18, NAN); });
    expect(number, "a logit is infinite", [](RowLossCase& c) { c.set_logit(1, 18, INFINITY); });
    if (number == 4 || number == 5) continue;  // ce_argmax and ce_data do not read p
    expect(number, "p is NaN",
           [](RowLossCase& c) { std::fill(c.log_p.begin() + 40, c.log_p.end(), NAN); });
  }
  return right;
}

}  // namespace speculators
