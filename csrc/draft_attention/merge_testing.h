// A call of the merge with random vectors, and what it should leave behind, in float64.
//
// The definition is the other formulation: one softmax over all scores of a row, step 0's written
// out, and the derivative of that by the chain rule; the kernels see step 0 only as (o0, lse0).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "csrc/draft_attention/merge.h"

namespace speculators {

struct MergeShape {
  int64_t batch, rows, query_heads, key_heads, head_size, num_diagonals;
  bool is_bfloat16;
  bool rows_first = false;  // memory is [batch, rows, heads, D], not [batch, heads, rows, D]
  int64_t padding = 0;      // elements between two vectors
};

// A call and the memory that it points to: neither copied nor moved.
class MergeCase {
 public:
  MergeCase(const MergeShape& shape, unsigned seed) : shape_(shape), random_(seed * 7919 + 1) {
    call.batch = shape.batch;
    call.rows = shape.rows;
    call.query_heads = shape.query_heads;
    call.key_heads = shape.key_heads;
    call.head_size = shape.head_size;
    call.num_diagonals = shape.num_diagonals;
    call.scale = 0.3f;
    call.is_bfloat16 = shape.is_bfloat16;
    buffers_.reserve(static_cast<size_t>(5 + 2 * shape.num_diagonals));  // pointers stay
    call.query = make(shape.query_heads, 1.5f);
    for (int64_t i = 0; i < shape.num_diagonals; ++i) {
      call.keys[i] = make(shape.key_heads, 1.5f);
      call.values[i] = make(shape.key_heads, 1);
    }
    call.output = make(shape.query_heads, 1);
    call.grad_output = make(shape.query_heads, 1);
    call.grad_query = make(shape.query_heads, 1);
    make_step_zero();
    const int64_t gradients =
        2 * shape.num_diagonals * shape.batch * shape.rows * shape.key_heads * shape.head_size;
    grad_keys_values_.resize(static_cast<size_t>(gradients) * (shape.is_bfloat16 ? 1 : 2));
    call.grad_keys_values = grad_keys_values_.data();
  }
  MergeCase(const MergeCase&) = delete;
  MergeCase& operator=(const MergeCase&) = delete;

  DraftMergeCall call;

  // Lets a row see nothing of step 0.
  void hide_step_zero(int64_t b, int64_t r) {
    for (int64_t h = 0; h < shape_.query_heads; ++h) {
      const size_t at = static_cast<size_t>(logsumexp_at(b, h, r));
      logsumexp_[at] = static_cast<float>(before_[at] = -std::numeric_limits<double>::infinity());
    }
  }

  // Puts the merged output and logsumexp in their places, rounded once, as forward leaves them.
  void finish_forward() {
    for_each_head([&](int64_t b, int64_t h, int64_t r) {
      const Merged merged = merged_of(b, h, r);
      for (int64_t d = 0; d < shape_.head_size; ++d) set(call.output, b, h, r, d, merged.output[d]);
      logsumexp_[static_cast<size_t>(logsumexp_at(b, h, r))] = static_cast<float>(merged.lse);
    });
  }

  bool forward_is_right() const {
    bool right = true;
    for_each_head([&](int64_t b, int64_t h, int64_t r) {
      const Merged merged = merged_of(b, h, r);
      right = near(logsumexp_[static_cast<size_t>(logsumexp_at(b, h, r))], merged.lse, 1e-5, 1e-5,
                   "lse", b, h, r) &&
              right;
      for (int64_t d = 0; d < shape_.head_size; ++d) {
        right = near(get(call.output, b, h, r, d), merged.output[d], rounding(), 2e-6, "output", b,
                     h, r) &&
                right;
      }
    });
    return right;
  }

  // After finish_forward and backward.
  bool backward_is_right() const {
    const int64_t group = shape_.query_heads / shape_.key_heads;
    const int64_t size = shape_.head_size;
    bool right = true;
    std::vector<double> expected(
        static_cast<size_t>(2 * shape_.num_diagonals * num_units(call) * size));
    for_each_head([&](int64_t b, int64_t h, int64_t r) {
      const int64_t keys = h / group;
      const Merged merged = merged_of(b, h, r);
      double delta = 0;  // of the output that was rounded, as the kernels read it
      for (int64_t d = 0; d < size; ++d) {
        delta += get(call.grad_output, b, h, r, d) * get(call.output, b, h, r, d);
      }
      std::vector<double> dq(static_cast<size_t>(size));
      for (int64_t d = 0; d < size; ++d) dq[d] = original_grad_query(b, h, r, d);
      for (int64_t i = 0; i < shape_.num_diagonals; ++i) {
        const double p = merged.weights[static_cast<size_t>(i)];
        double dp = 0;
        for (int64_t d = 0; d < size; ++d) {
          dp += get(call.grad_output, b, h, r, d) * get(call.values[i], b, keys, r, d);
        }
        const double dl = double{call.scale} * p * (dp - delta);
        for (int64_t d = 0; d < size; ++d) {
          dq[d] += dl * get(call.keys[i], b, keys, r, d);
          expected[place(i, b, r, keys, d)] += dl * get(call.query, b, h, r, d);
          expected[place(shape_.num_diagonals + i, b, r, keys, d)] +=
              p * get(call.grad_output, b, h, r, d);
        }
      }
      for (int64_t d = 0; d < size; ++d) {
        right =
            near(get(call.grad_query, b, h, r, d), dq[d], rounding(), 1e-4, "dq", b, h, r) && right;
      }
    });
    for (size_t i = 0; i < expected.size(); ++i) {
      right = near(grad_keys_values_at(i), expected[i], rounding(), 1e-4, "dk or dv", 0,
                   static_cast<int64_t>(i), 0) &&
              right;
    }
    return right;
  }

  // Every byte that a call may leave behind, to compare two runs.
  std::vector<std::vector<uint16_t>> bytes() const {
    std::vector<std::vector<uint16_t>> all = buffers_;
    all.push_back(grad_keys_values_);
    return all;
  }

  double logsumexp(int64_t b, int64_t h, int64_t r) const {
    return logsumexp_[static_cast<size_t>(logsumexp_at(b, h, r))];
  }

  static double value_of(bool is_bfloat16, const uint16_t* bits) {
    const uint32_t high = is_bfloat16 ? bits[0] : bits[1];
    const uint32_t low = is_bfloat16 ? 0 : bits[0];
    return double{std::bit_cast<float>(high << 16 | low)};
  }

 private:
  struct Merged {
    double lse;
    std::vector<double> output, weights;
  };

  // Memory is counted in halves of a float, so that one type holds both dtypes.
  int64_t halves() const { return shape_.is_bfloat16 ? 1 : 2; }

  HeadRows make(int64_t heads, float deviation) {
    const int64_t vector = shape_.head_size + shape_.padding;
    HeadRows rows;
    rows.row_stride = shape_.rows_first ? heads * vector : vector;
    rows.head_stride = shape_.rows_first ? vector : shape_.rows * vector;
    rows.batch_stride = heads * shape_.rows * vector;
    // Exactly up to the last element, so that a sanitizer sees what is read behind it.
    const int64_t elements = shape_.batch * heads * shape_.rows * vector - shape_.padding;
    buffers_.emplace_back(static_cast<size_t>(elements * halves()), uint16_t{0x7FC5});
    rows.data = buffers_.back().data();
    std::normal_distribution<float> normal(0, deviation);
    for (int64_t b = 0; b < shape_.batch; ++b) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t r = 0; r < shape_.rows; ++r) {
          for (int64_t d = 0; d < shape_.head_size; ++d) set(rows, b, h, r, d, normal(random_));
        }
      }
    }
    return rows;
  }

  void make_step_zero() {
    const auto count = static_cast<size_t>(shape_.batch * shape_.query_heads * shape_.rows);
    logsumexp_.resize(count);
    call.logsumexp = {logsumexp_.data(), shape_.query_heads * shape_.rows, shape_.rows, 1};
    if (shape_.rows_first) {
      call.logsumexp = {logsumexp_.data(), shape_.query_heads * shape_.rows, 1, shape_.query_heads};
    }
    std::normal_distribution<float> normal(0, 2);
    for (float& value : logsumexp_) value = normal(random_);
    before_.assign(logsumexp_.begin(), logsumexp_.end());
    output_before_ = values_of(call.output);
    grad_query_before_ = values_of(call.grad_query);
  }

  template <typename Action>
  void for_each_head(Action action) const {
    for (int64_t b = 0; b < shape_.batch; ++b) {
      for (int64_t h = 0; h < shape_.query_heads; ++h) {
        for (int64_t r = 0; r < shape_.rows; ++r) action(b, h, r);
      }
    }
  }

  std::vector<double> values_of(const HeadRows& rows) const {
    std::vector<double> values;
    for_each_head([&](int64_t b, int64_t h, int64_t r) {
      for (int64_t d = 0; d < shape_.head_size; ++d) values.push_back(get(rows, b, h, r, d));
    });
    return values;
  }

  size_t dense(int64_t b, int64_t h, int64_t r, int64_t d) const {
    const int64_t row = (b * shape_.query_heads + h) * shape_.rows + r;
    return static_cast<size_t>(row * shape_.head_size + d);
  }

  double original_grad_query(int64_t b, int64_t h, int64_t r, int64_t d) const {
    return grad_query_before_[dense(b, h, r, d)];
  }

  int64_t logsumexp_at(int64_t b, int64_t h, int64_t r) const {
    const HeadRows& lse = call.logsumexp;
    return b * lse.batch_stride + h * lse.head_stride + r * lse.row_stride;
  }

  // In the gradient, as the interface numbers it.
  size_t place(int64_t part, int64_t b, int64_t r, int64_t key_head, int64_t d) const {
    const int64_t unit = (b * shape_.rows + r) * shape_.key_heads + key_head;
    return static_cast<size_t>((part * num_units(call) + unit) * shape_.head_size + d);
  }

  uint16_t* at(const HeadRows& rows, int64_t b, int64_t h, int64_t r, int64_t d) const {
    const int64_t element = b * rows.batch_stride + h * rows.head_stride + r * rows.row_stride + d;
    return static_cast<uint16_t*>(const_cast<void*>(rows.data)) + element * halves();
  }

  double get(const HeadRows& rows, int64_t b, int64_t h, int64_t r, int64_t d) const {
    return value_of(shape_.is_bfloat16, at(rows, b, h, r, d));
  }

  double grad_keys_values_at(size_t element) const {
    return value_of(shape_.is_bfloat16,
                    grad_keys_values_.data() + element * static_cast<size_t>(halves()));
  }

  void set(const HeadRows& rows, int64_t b, int64_t h, int64_t r, int64_t d, double value) {
    const auto bits = std::bit_cast<uint32_t>(static_cast<float>(value));
    uint16_t* const to = at(rows, b, h, r, d);
    if (shape_.is_bfloat16) {
      to[0] = static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
    } else {
      to[0] = static_cast<uint16_t>(bits);
      to[1] = static_cast<uint16_t>(bits >> 16);
    }
  }

  // One softmax over step 0, as a single term of weight exp(lse0), and the diagonals.
  Merged merged_of(int64_t b, int64_t h, int64_t r) const {
    const int64_t keys = h / (shape_.query_heads / shape_.key_heads);
    Merged merged;
    merged.output.assign(static_cast<size_t>(shape_.head_size), 0);
    const double first = std::exp(before_[static_cast<size_t>(logsumexp_at(b, h, r))]);
    double total = first;
    for (int64_t i = 0; i < shape_.num_diagonals; ++i) {
      double score = 0;
      for (int64_t d = 0; d < shape_.head_size; ++d) {
        score += get(call.query, b, h, r, d) * get(call.keys[i], b, keys, r, d);
      }
      merged.weights.push_back(std::exp(double{call.scale} * score));
      total += merged.weights.back();
    }
    merged.lse = std::log(total);
    for (double& weight : merged.weights) weight /= total;
    for (int64_t d = 0; d < shape_.head_size; ++d) {
      merged.output[static_cast<size_t>(d)] = first / total * output_before_[dense(b, h, r, d)];
      for (int64_t i = 0; i < shape_.num_diagonals; ++i) {
        merged.output[static_cast<size_t>(d)] +=
            merged.weights[static_cast<size_t>(i)] * get(call.values[i], b, keys, r, d);
      }
    }
    return merged;
  }

  double rounding() const { return shape_.is_bfloat16 ? 1.0 / 256 : 1e-4; }

  static bool near(double found, double expected, double relative, double absolute,
                   const char* what, int64_t b, int64_t h, int64_t r) {
    if (std::abs(found - expected) <= relative * std::abs(expected) + absolute) return true;
    std::printf("%s at %ld, %ld, %ld: found %.9g, expected %.9g\n", what, static_cast<long>(b),
                static_cast<long>(h), static_cast<long>(r), found, expected);
    return false;
  }

  MergeShape shape_;
  std::mt19937 random_;
  std::vector<std::vector<uint16_t>> buffers_;
  std::vector<uint16_t> grad_keys_values_;
  std::vector<float> logsumexp_;
  std::vector<double> before_, output_before_, grad_query_before_;
};

}  // namespace speculators
