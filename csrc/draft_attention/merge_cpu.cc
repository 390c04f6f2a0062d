// The CPU kernels: row by row, each vector of D elements is read once from memory.
//
// A row's vectors are a few hundred bytes, so what is needed again (the keys for every query head
// that shares them, the queries for the second sum) comes from the first cache. The loops over D
// are vector code: `omp simd` allows sums to be reordered (-fopenmp-simd; nothing of OpenMP is
// linked), target_clones compiles all of it three times and lets the machine choose, and the usual
// D are compile-time constants, since loops of a few vectors are mostly their beginnings and ends.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>

#include "csrc/draft_attention/merge.h"

#if defined(__x86_64__) && defined(__linux__)
#define SPECULATORS_CLONES \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SPECULATORS_CLONES
#endif
#define SPECULATORS_INLINE inline __attribute__((always_inline))

namespace speculators {
namespace {

using bfloat16_bits = uint16_t;

SPECULATORS_INLINE float to_float(float value) { return value; }
SPECULATORS_INLINE float to_float(bfloat16_bits bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

SPECULATORS_INLINE void round_to(float value, float* to) { *to = value; }

// To the nearest, ties to even. A NaN stays one.
SPECULATORS_INLINE void round_to(float value, bfloat16_bits* to) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  *to = static_cast<bfloat16_bits>(value != value ? 0x7FC0u : rounded);
}

// Which row, and which key head.
struct Unit {
  int64_t b, r, key_head;
};

SPECULATORS_INLINE Unit unit_at(const DraftMergeCall& call, int64_t number) {
  const int64_t row = number / call.key_heads;
  return {row / call.rows, row % call.rows, number % call.key_heads};
}

template <typename T>
SPECULATORS_INLINE T* vector_at(const HeadRows& of, const Unit& unit, int64_t head) {
  const int64_t offset = unit.b * of.batch_stride + head * of.head_stride + unit.r * of.row_stride;
  return static_cast<T*>(const_cast<void*>(of.data)) + offset;
}

template <typename T>
SPECULATORS_INLINE float dot(const T* a, const T* b, int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < size; ++d) sum += to_float(a[d]) * to_float(b[d]);
  return sum;
}

template <typename T>
SPECULATORS_INLINE void add_scaled(float factor, const T* values, int64_t size, float* sum) {
#pragma omp simd
  for (int64_t d = 0; d < size; ++d) sum[d] += factor * to_float(values[d]);
}

// sum: scratch of D floats.
template <typename T, int64_t kSize>
SPECULATORS_INLINE void merge_head(const DraftMergeCall& call, const Unit& unit, int64_t head,
                                   float* sum) {
  const int64_t size = kSize > 0 ? kSize : call.head_size;
  const int64_t count = call.num_diagonals;
  const T* q = vector_at<T>(call.query, unit, head);
  float* const lse = vector_at<float>(call.logsumexp, unit, head);
  float weights[kMaxDiagonals];
  float largest = *lse;
  for (int64_t i = 0; i < count; ++i) {
    weights[i] = call.scale * dot(q, vector_at<T>(call.keys[i], unit, unit.key_head), size);
    largest = std::max(largest, weights[i]);
  }
  // Where a row sees nothing of step 0, lse is -inf, and its weight becomes 0.
  const float first = std::exp(*lse - largest);
  float total = first;
  for (int64_t i = 0; i < count; ++i) total += weights[i] = std::exp(weights[i] - largest);
  *lse = largest + std::log(total);
  T* const o = vector_at<T>(call.output, unit, head);
  const float scale = 1 / total;
#pragma omp simd
  for (int64_t d = 0; d < size; ++d) sum[d] = first * scale * to_float(o[d]);
  for (int64_t i = 0; i < count; ++i) {
    add_scaled(weights[i] * scale, vector_at<T>(call.values[i], unit, unit.key_head), size, sum);
  }
#pragma omp simd
  for (int64_t d = 0; d < size; ++d) round_to(sum[d], o + d);
}

template <typename T, int64_t kSize>
SPECULATORS_INLINE void merge_units(const DraftMergeCall& call, int64_t begin, int64_t end,
                                    float* scratch) {
  const int64_t group = call.query_heads / call.key_heads;
  for (int64_t number = begin; number < end; ++number) {
    const Unit unit = unit_at(call, number);
    for (int64_t g = 0; g < group; ++g) {
      merge_head<T, kSize>(call, unit, unit.key_head * group + g, scratch);
    }
  }
}

// What one query head adds: into dk and dv, [num_diagonals, D] each, and into its own dq.
template <typename T, int64_t kSize>
SPECULATORS_INLINE void add_head_gradient(const DraftMergeCall& call, const Unit& unit,
                                          int64_t head, float* dq, float* dk, float* dv) {
  const int64_t size = kSize > 0 ? kSize : call.head_size;
  const T* q = vector_at<T>(call.query, unit, head);
  const T* grad = vector_at<T>(call.grad_output, unit, head);
  T* const grad_query = vector_at<T>(call.grad_query, unit, head);
  const float lse = *vector_at<float>(call.logsumexp, unit, head);
  const float delta = dot(grad, vector_at<T>(call.output, unit, head), size);
#pragma omp simd
  for (int64_t d = 0; d < size; ++d) dq[d] = to_float(grad_query[d]);
  for (int64_t i = 0; i < call.num_diagonals; ++i) {
    const T* k = vector_at<T>(call.keys[i], unit, unit.key_head);
    const T* v = vector_at<T>(call.values[i], unit, unit.key_head);
    const float p = std::exp(call.scale * dot(q, k, size) - lse);
    const float dl = call.scale * p * (dot(grad, v, size) - delta);
    add_scaled(dl, k, size, dq);
    add_scaled(dl, q, size, dk + i * size);
    add_scaled(p, grad, size, dv + i * size);
  }
#pragma omp simd
  for (int64_t d = 0; d < size; ++d) round_to(dq[d], grad_query + d);
}

template <typename T, int64_t kSize>
SPECULATORS_INLINE void merge_backward_units(const DraftMergeCall& call, int64_t begin, int64_t end,
                                             float* scratch) {
  const int64_t group = call.query_heads / call.key_heads;
  const int64_t size = kSize > 0 ? kSize : call.head_size;
  const int64_t sums = call.num_diagonals * size;
  float* const dq = scratch;
  float* const dk = dq + size;
  float* const dv = dk + sums;
  for (int64_t number = begin; number < end; ++number) {
    const Unit unit = unit_at(call, number);
    std::fill(dk, dv + sums, 0.0f);
    for (int64_t g = 0; g < group; ++g) {
      add_head_gradient<T, kSize>(call, unit, unit.key_head * group + g, dq, dk, dv);
    }
    // dk and dv lie one after the other, as the 2 num_diagonals parts of the result do.
    for (int64_t part = 0; part < 2 * call.num_diagonals; ++part) {
      T* const to =
          static_cast<T*>(call.grad_keys_values) + (part * num_units(call) + number) * size;
      const float* from = dk + part * size;
#pragma omp simd
      for (int64_t d = 0; d < size; ++d) round_to(from[d], to + d);
    }
  }
}

template <typename T, int64_t kSize>
SPECULATORS_INLINE void units_of_size(bool backward, const DraftMergeCall& call, int64_t begin,
                                      int64_t end, float* scratch) {
  if (backward) {
    merge_backward_units<T, kSize>(call, begin, end, scratch);
  } else {
    merge_units<T, kSize>(call, begin, end, scratch);
  }
}

template <typename T>
SPECULATORS_INLINE void units_of(bool backward, const DraftMergeCall& call, int64_t begin,
                                 int64_t end, float* scratch) {
  if (call.head_size == 64) {
    units_of_size<T, 64>(backward, call, begin, end, scratch);
  } else if (call.head_size == 128) {
    units_of_size<T, 128>(backward, call, begin, end, scratch);
  } else {
    units_of_size<T, 0>(backward, call, begin, end, scratch);
  }
}

// All that it calls is inlined, and so compiled for each machine; a lambda would not be.
SPECULATORS_CLONES
void merge_units_for_this_machine(bool backward, const DraftMergeCall& call, int64_t begin,
                                  int64_t end, float* scratch) {
  if (call.is_bfloat16) {
    units_of<bfloat16_bits>(backward, call, begin, end, scratch);
  } else {
    units_of<float>(backward, call, begin, end, scratch);
  }
}

std::unique_ptr<float[]> floats(int64_t count) {
  return std::make_unique_for_overwrite<float[]>(static_cast<size_t>(count));
}

}  // namespace

void draft_merge_cpu(const DraftMergeCall& call, int64_t begin, int64_t end) {
  merge_units_for_this_machine(false, call, begin, end, floats(call.head_size).get());
}

void draft_merge_backward_cpu(const DraftMergeCall& call, int64_t begin, int64_t end) {
  const auto scratch = floats((1 + 2 * call.num_diagonals) * call.head_size);
  merge_units_for_this_machine(true, call, begin, end, scratch.get());
}

}  // namespace speculators
