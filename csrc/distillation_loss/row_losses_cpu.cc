// The CPU kernel: a row at a time, so that its 4 W bytes stay in the first or second cache from
// the first pass to the last.
//
// Passes: the largest logit; exp and its sum; then block by block p, q and the sums that the losses
// need; then block by block the gradient, which may go where the logits are, since each block is
// read before it is written. Which losses are wanted is asked once per block, outside the loops
// over its elements. Those loops are vector code: `omp simd` allows the reductions to be reordered
// (-fopenmp-simd; nothing of OpenMP is linked), and target_clones compiles all of it three times
// and lets the machine choose.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "csrc/distillation_loss/row_formulas.h"
#include "csrc/distillation_loss/row_losses.h"
#include "csrc/distillation_loss/vector_math.h"

#if defined(__x86_64__) && defined(__linux__)
#define SPECULATORS_CLONES \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SPECULATORS_CLONES
#endif

namespace speculators {
namespace {

// Elements between two rounds of adding float sums to double ones; also fits the first cache.
constexpr int64_t kBlock = 512;

// One row, or one block of it: z are the logits, p and q the distributions.
struct Row {
  int64_t size;
  const float* z;
  const float* log_p;
  float* p;
  float* q;
  float max;      // of the logits
  float log_sum;  // log of the sum of exp(z - max)

  Row block(int64_t begin) const {
    return {std::min(kBlock, size - begin),
            z + begin,
            log_p + begin,
            p + begin,
            q + begin,
            max,
            log_sum};
  }
};

SPECULATORS_INLINE float log_q(const Row& row, int64_t i) {
  return (row.z[i] - row.max) - row.log_sum;
}

SPECULATORS_INLINE float bounded_log_p(const Row& row, int64_t i) {
  return row.log_p[i] < kMinLogP ? kMinLogP : row.log_p[i];
}

// NaN if either is: it must not pass for a perfect match.
SPECULATORS_INLINE float smaller(float a, float b) { return a < b || a != a ? a : b; }

// 2 x / (x + y), so guarded that it is 1 or less where both are 0.
SPECULATORS_INLINE float share(float x, float y) {
  constexpr float kTiny = std::numeric_limits<float>::min();
  const float sum = x + y;
  return 2 * x / (sum > kTiny ? sum : kTiny);
}

SPECULATORS_INLINE float log_share(float x, float y) { return logarithm(share(x, y)); }

SPECULATORS_INLINE float sign(float x) { return (x > 0 ? 1.0f : 0.0f) - (x < 0 ? 1.0f : 0.0f); }

// How much min(p, q) grows with q: 1 where q is the smaller, 1/2 where they are equal, else 0.
SPECULATORS_INLINE float openness(float p, float q) { return 0.5f + 0.5f * sign(p - q); }

// A NaN is not the largest, but it will be in the sum of exponentials.
SPECULATORS_INLINE float largest(const float* values, int64_t size) {
  float result = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : result)
  for (int64_t i = 0; i < size; ++i) result = values[i] > result ? values[i] : result;
  return result;
}

// The lowest index with this value, 0 if there is none.
SPECULATORS_INLINE int64_t first_equal(const float* values, int64_t size, float value) {
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = std::min(size, begin + kBlock);
    int found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t i = begin; i < end; ++i) found |= values[i] == value ? 1 : 0;
    if (found == 0) continue;
    for (int64_t i = begin; i < end; ++i) {
      if (values[i] == value) return i;
    }
  }
  return 0;
}

// Leaves exp(z - max) in q; returns the sum.
SPECULATORS_INLINE double exponentials(const Row& row) {
  double total = 0;
  for (int64_t begin = 0; begin < row.size; begin += kBlock) {
    const Row block = row.block(begin);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < block.size; ++i) {
      const float value = exponential(block.z[i] - block.max);
      block.q[i] = value;
      sum += value;
    }
    total += sum;
  }
  return total;
}

// Makes p, scales q; returns the acceptance sum min(coverage p, q).
SPECULATORS_INLINE float distributions(const Row& block, float scale, float coverage, double* p) {
  float sum = 0;
  float alpha = 0;
#pragma omp simd reduction(+ : sum, alpha)
  for (int64_t i = 0; i < block.size; ++i) {
    const float p_i = exponential(block.log_p[i]);
    const float q_i = block.q[i] * scale;
    block.p[i] = p_i;
    block.q[i] = q_i;
    sum += p_i;
    alpha += smaller(coverage * p_i, q_i);
  }
  *p += sum;
  return alpha;
}

SPECULATORS_INLINE void add_to_sums(const Row& block, const RowNeeds& needs,
                                    RowSums<double>* sums) {
  const float* p = block.p;
  const float* q = block.q;
  if (needs.cross_entropy) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < block.size; ++i) sum += p[i] * log_q(block, i);
    sums->p_log_q += sum;
  }
  if (needs.kl) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < block.size; ++i) {
      sum += p[i] * (bounded_log_p(block, i) - log_q(block, i));
    }
    sums->kl += sum;
  }
  if (needs.rkl) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < block.size; ++i) {
      sum += q[i] * (log_q(block, i) - bounded_log_p(block, i));
    }
    sums->rkl += sum;
  }
  if (needs.jsd) {
    float from_p = 0;
    float from_q = 0;
#pragma omp simd reduction(+ : from_p, from_q)
    for (int64_t i = 0; i < block.size; ++i) {
      from_p += p[i] * log_share(p[i], q[i]);
      from_q += q[i] * log_share(q[i], p[i]);
    }
    sums->jsd_p += from_p;
    sums->jsd_q += from_q;
  }
  if (needs.distance) {
    float distance = 0;
    float signed_q = 0;
#pragma omp simd reduction(+ : distance, signed_q)
    for (int64_t i = 0; i < block.size; ++i) {
      const float difference = q[i] - p[i];
      distance += std::abs(difference);
      signed_q += q[i] * sign(difference);
    }
    sums->distance += distance;
    sums->signed_q += signed_q;
  }
  if (needs.overlap) {
    float overlap = 0;
    float open = 0;
#pragma omp simd reduction(+ : overlap, open)
    for (int64_t i = 0; i < block.size; ++i) {
      const float value = smaller(p[i], q[i]);
      overlap += value;
      open += value * openness(p[i], q[i]);
    }
    sums->overlap += overlap;
    sums->open_overlap += open;
  }
}

// min(p, q) exp(-shift), from the logarithms.
SPECULATORS_INLINE float shifted_overlap(const Row& row, int64_t i, float shift) {
  return exponential(smaller(row.log_p[i], log_q(row, i)) - shift);
}

// Where p and q hardly overlap: sums the overlap anew in log space; returns the shift.
SPECULATORS_INLINE float overlap_in_log_space(const Row& row, RowSums<double>* sums) {
  float shift = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < row.size; ++i) {
    const float value = smaller(row.log_p[i], log_q(row, i));
    shift = value > shift ? value : shift;
  }
  sums->overlap = 0;
  sums->open_overlap = 0;
  for (int64_t i = 0; i < row.size; ++i) {
    const double value = shifted_overlap(row, i, shift);
    sums->overlap += value;
    sums->open_overlap += value * openness(row.log_p[i], log_q(row, i));
  }
  return shift;
}

// The gradient of a block but for the few places that ce_argmax, ce_data and topk add to. `out` may
// be the block's logits.
SPECULATORS_INLINE void write_gradient(const Row& block, const RowTerms<float>& terms, float shift,
                                       float weight, float* out) {
  const float* p = block.p;
  const float* q = block.q;
  float g[kBlock];
#pragma omp simd
  for (int64_t i = 0; i < block.size; ++i) g[i] = terms.on_p * p[i] - terms.total * q[i];
  if (terms.on_signed_q != 0) {
#pragma omp simd
    for (int64_t i = 0; i < block.size; ++i) g[i] += terms.on_signed_q * q[i] * sign(q[i] - p[i]);
  }
  if (terms.on_rkl != 0) {
#pragma omp simd
    for (int64_t i = 0; i < block.size; ++i) {
      g[i] += terms.on_rkl * q[i] * (log_q(block, i) - bounded_log_p(block, i) + 1);
    }
  }
  if (terms.on_jsd != 0) {
#pragma omp simd
    for (int64_t i = 0; i < block.size; ++i) g[i] += terms.on_jsd * q[i] * log_share(q[i], p[i]);
  }
  if (terms.on_overlap != 0 && shift == 0) {
#pragma omp simd
    for (int64_t i = 0; i < block.size; ++i) {
      g[i] += terms.on_overlap * smaller(p[i], q[i]) * openness(p[i], q[i]);
    }
  } else if (terms.on_overlap != 0) {
    for (int64_t i = 0; i < block.size; ++i) {
      const float open = openness(block.log_p[i], log_q(block, i));
      g[i] += terms.on_overlap * shifted_overlap(block, i, shift) * open;
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < block.size; ++i) out[i] = g[i] * weight;
}

SPECULATORS_INLINE void from_bfloat16(const uint16_t* values, int64_t size, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    out[i] = std::bit_cast<float>(static_cast<uint32_t>(values[i]) << 16);
  }
}

// To the nearest, ties to even. A NaN stays one.
SPECULATORS_INLINE void to_bfloat16(const float* values, int64_t size, uint16_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(values[i]);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    out[i] = static_cast<uint16_t>(values[i] != values[i] ? 0x7FC0u : rounded);
  }
}

// What the row's places of ce_argmax, ce_data and topk are, and how much p the last have.
struct Places {
  int64_t choice = -1;  // of ce_argmax
  int64_t token = -1;   // of ce_data
  const int64_t* top = nullptr;
  int64_t top_k = 0;
};

SPECULATORS_INLINE void add_places(const RowLossCall& call, const Places& places, const float* p,
                                   float weight, float* out) {
  if (places.choice >= 0) out[places.choice] -= call.factors.ce_argmax * weight;
  if (places.token >= 0) out[places.token] -= call.factors.ce_data * weight;
  for (int64_t k = 0; k < places.top_k; ++k) {
    out[places.top[k]] -= call.factors.topk * p[places.top[k]] * weight;
  }
}

RowTerms<float> to_float(const RowTerms<double>& terms) {
  const auto f = [](double value) { return static_cast<float>(value); };
  return {f(terms.loss),   f(terms.on_p),   f(terms.on_signed_q), f(terms.on_overlap),
          f(terms.on_rkl), f(terms.on_jsd), f(terms.total)};
}

// The loss of a row, and its gradient into `out` unless that is null.
SPECULATORS_INLINE float learn(const RowLossCall& call, const Row& row, int64_t r, int64_t target,
                               RowSums<double> sums, float* out) {
  Places places;
  if (call.factors.ce_argmax != 0) places.choice = call.likeliest[target];
  if (call.factors.ce_data != 0) places.token = call.data_tokens[r];
  if (call.factors.topk != 0) {
    places.top = call.top + target * call.top_k;
    places.top_k = call.top_k;
  }
  float shift = 0;
  if (call.factors.nla != 0 && sums.overlap < kLeastOverlap) {
    shift = overlap_in_log_space(row, &sums);
  }
  for (int64_t k = 0; k < places.top_k; ++k) {
    const double p = row.p[places.top[k]];
    sums.top_p += p;
    sums.top_p_log_q += p * log_q(row, places.top[k]);
  }
  const auto log_q_at = [&](int64_t i) { return i >= 0 ? double{log_q(row, i)} : 0.0; };
  const RowTerms<float> terms =
      to_float(row_terms<double>(call.factors, sums, shift, log_q_at(places.choice),
                                 log_q_at(places.token), places.token >= 0));
  if (out != nullptr) {
    const float weight = call.weights == nullptr ? 1.0f : call.weights[r];
    for (int64_t begin = 0; begin < row.size; begin += kBlock) {
      write_gradient(row.block(begin), terms, shift, weight, out + begin);
    }
    add_places(call, places, row.p, weight, out);
  }
  return terms.loss;
}

SPECULATORS_INLINE void compute_row(const RowLossCall& call, int64_t r, float* scratch) {
  const int64_t target = call.positions == nullptr ? r : call.positions[r];
  const int64_t width = call.width;
  const float coverage = call.coverage[target];
  Row row{width, nullptr, call.log_p + target * call.log_p_stride, scratch, scratch + width, 0, 0};
  float* out = nullptr;
  if (call.is_bfloat16) {
    float* converted = scratch + 2 * width;
    const auto* logits = static_cast<const uint16_t*>(call.logits);
    from_bfloat16(logits + r * call.logits_stride, width, converted);
    row.z = converted;
    if (call.gradient != nullptr) out = converted;
  } else {
    row.z = static_cast<const float*>(call.logits) + r * call.logits_stride;
    if (call.gradient != nullptr) {
      out = static_cast<float*>(call.gradient) + r * call.gradient_stride;
    }
  }
  row.max = largest(row.z, width);
  const int64_t guess = first_equal(row.z, width, row.max);
  const double sum = exponentials(row);
  row.log_sum = static_cast<float>(std::log(sum));

  const bool learns = row_learns(call, target);
  const RowNeeds needs = learns ? row_needs(call.factors) : RowNeeds{};
  RowSums<double> sums;
  double alpha = 0;
  for (int64_t begin = 0; begin < width; begin += kBlock) {
    const Row block = row.block(begin);
    alpha += distributions(block, static_cast<float>(1 / sum), coverage, &sums.p);
    add_to_sums(block, needs, &sums);
  }
  call.alpha[r] = static_cast<float>(std::min(alpha, 1.0));
  call.greedy_acceptance[r] = coverage * row.p[guess];
  call.agreement[r] = guess == call.best[target];
  call.in_vocabulary[r] = call.best[target] >= 0;
  call.loss[r] = learns ? learn(call, row, r, target, sums, out) : 0.0f;
  if (out != nullptr && !learns) std::memset(out, 0, static_cast<size_t>(width) * sizeof(float));
  if (out != nullptr && call.is_bfloat16) {
    to_bfloat16(out, width, static_cast<uint16_t*>(call.gradient) + r * call.gradient_stride);
  }
}

SPECULATORS_CLONES
void compute_rows(const RowLossCall& call, int64_t begin, int64_t end, float* scratch) {
  for (int64_t r = begin; r < end; ++r) compute_row(call, r, scratch);
}

// Whether an index is outside of [least, end).
bool any_outside(const int64_t* index, int64_t count, int64_t least, int64_t end) {
  return index != nullptr && std::any_of(index, index + count, [=](int64_t value) {
           return value < least || value >= end;
         });
}

}  // namespace

const char* index_out_of_range(const RowLossCall& call) {
  const int64_t targets = call.num_targets;
  if (any_outside(call.positions, call.num_rows, 0, targets)) return "positions";
  if (any_outside(call.best, targets, -1, call.width)) return "best";
  if (any_outside(call.likeliest, targets, 0, call.width)) return "likeliest";
  if (any_outside(call.top, targets * call.top_k, 0, call.width)) return "top";
  if (any_outside(call.data_tokens, call.num_rows, -1, call.width)) return "data_tokens";
  return nullptr;
}

void row_losses_cpu(const RowLossCall& call, int64_t begin, int64_t end) {
  const int64_t rows_of_scratch = call.is_bfloat16 ? 3 : 2;
  const auto scratch =
      std::make_unique_for_overwrite<float[]>(static_cast<size_t>(rows_of_scratch * call.width));
  compute_rows(call, begin, end, scratch.get());
}

}  // namespace speculators
