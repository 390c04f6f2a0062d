// `omp simd` allows sums to be reordered (-fopenmp-simd; nothing of OpenMP is linked), and
// target_clones compiles each of these functions three times and lets the machine choose.
#include <algorithm>
#include <bit>
#include <limits>

#include "csrc/distillation_loss/vector_math.h"
#include "csrc/tree_verification/logit_rows.h"

#if defined(__x86_64__) && defined(__linux__)
#define SPECULATORS_CLONES \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SPECULATORS_CLONES
#endif

namespace speculators {
namespace {

using bfloat16_bits = uint16_t;

constexpr float kNone = -std::numeric_limits<float>::infinity();
// Floats that are added up before the sum goes on in double.
constexpr int64_t kFloatSum = 512;

SPECULATORS_INLINE float to_float(float value) { return value; }
SPECULATORS_INLINE float to_float(bfloat16_bits bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// A NaN is never the largest.
template <typename T>
SPECULATORS_INLINE float largest_of(const T* z, int64_t size) {
  float result = kNone;
#pragma omp simd reduction(max : result)
  for (int64_t i = 0; i < size; ++i) {
    const float value = to_float(z[i]);
    result = value > result ? value : result;
  }
  return result;
}

// Numbers in the order of these integers, the negative ones turned around; and its inverse.
SPECULATORS_INLINE int16_t ordered(int16_t bits) {
  return static_cast<int16_t>(bits ^ ((bits >> 15) & 0x7FFF));
}

// Compared as integers, of which a vector holds twice as many as of floats.
SPECULATORS_INLINE float largest_of(const bfloat16_bits* z, int64_t size) {
  constexpr int16_t kInfinity = 0x7F80;
  constexpr int16_t kMinusInfinity = static_cast<int16_t>(0xFF80);
  int16_t result = ordered(kMinusInfinity);  // a NaN below zero is less
#pragma omp simd reduction(max : result)
  for (int64_t i = 0; i < size; ++i) {
    const int16_t value = ordered(static_cast<int16_t>(z[i]));
    result = value > result ? value : result;
  }
  if (result > kInfinity) return largest_of<bfloat16_bits>(z, size);  // a NaN above zero
  return to_float(static_cast<bfloat16_bits>(ordered(result)));
}

template <typename T>
SPECULATORS_INLINE int64_t index_of_largest_of(const T* z, int64_t width) {
  float largest = kNone;
  int64_t chunk = 0;
  for (int64_t begin = 0; begin < width; begin += kChunk) {
    const float value = largest_of(z + begin, std::min(kChunk, width - begin));
    if (value > largest) {
      largest = value;
      chunk = begin;
    }
  }
  if (largest == kNone) return 0;
  int64_t begin = chunk;  // of the block that it is in
  while (largest_of(z + begin, std::min(kBlock, width - begin)) != largest) begin += kBlock;
  while (to_float(z[begin]) != largest) ++begin;
  return begin;
}

template <typename T>
SPECULATORS_INLINE void summarise_chunks(const T* z, int64_t width, float scale, float* maxima,
                                         float* sums) {
  for (int64_t begin = 0; begin < width; begin += kChunk) {
    const int64_t end = std::min(begin + kChunk, width);
    const float max = largest_of(z + begin, end - begin);
    float sum = 0;
#pragma omp simd simdlen(16) reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i)
      sum += exponential_or_zero((to_float(z[i]) - max) * scale);
    *maxima++ = max;
    *sums++ = sum;
  }
}

template <typename T>
SPECULATORS_INLINE void maxima_of_blocks(const T* z, int64_t width, float* maxima) {
  for (int64_t begin = 0; begin < width; begin += kBlock) {
    *maxima++ = largest_of(z + begin, std::min(kBlock, width - begin));
  }
}

template <typename T>
SPECULATORS_INLINE void weigh_all(const T* z, int64_t size, float max, float scale,
                                  float* weights) {
#pragma omp simd simdlen(64)
  for (int64_t i = 0; i < size; ++i)
    weights[i] = exponential_or_zero((to_float(z[i]) - max) * scale);
}

SPECULATORS_INLINE float residual(float e, float q, float c) {
  const float rest = e - c * q;
  return rest > 0 ? rest : 0.0f;
}

const float* floats(const LogitRow& row) { return static_cast<const float*>(row.data); }
const bfloat16_bits* halves(const LogitRow& row) {
  return static_cast<const bfloat16_bits*>(row.data);
}

}  // namespace

float logit_at(const LogitRow& row, int64_t index) {
  return row.is_bfloat16 ? to_float(halves(row)[index]) : floats(row)[index];
}

SPECULATORS_CLONES
int64_t index_of_largest(const LogitRow& row) {
  return row.is_bfloat16 ? index_of_largest_of(halves(row), row.width)
                         : index_of_largest_of(floats(row), row.width);
}

SPECULATORS_CLONES
void summarise_row(const LogitRow& row, float scale, float* maxima, float* sums) {
  if (row.is_bfloat16) {
    summarise_chunks(halves(row), row.width, scale, maxima, sums);
  } else {
    summarise_chunks(floats(row), row.width, scale, maxima, sums);
  }
}

SPECULATORS_CLONES
void block_maxima(const LogitRow& row, float* maxima) {
  if (row.is_bfloat16) {
    maxima_of_blocks(halves(row), row.width, maxima);
  } else {
    maxima_of_blocks(floats(row), row.width, maxima);
  }
}

SPECULATORS_CLONES
void weigh(const LogitRow& row, int64_t begin, int64_t end, float max, float scale,
           float* weights) {
  if (row.is_bfloat16) {
    weigh_all(halves(row) + begin, end - begin, max, scale, weights);
  } else {
    weigh_all(floats(row) + begin, end - begin, max, scale, weights);
  }
}

SPECULATORS_CLONES
void subtract(const float* e, const float* q, float c, int64_t size, float* weights) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) weights[i] = residual(e[i], q[i], c);
}

SPECULATORS_CLONES
void residual_masses(const float* e, const float* q, float c, int64_t width, double* masses) {
  for (int64_t begin = 0; begin < width; begin += kChunk) {
    const int64_t end = std::min(begin + kChunk, width);
    double mass = 0;
    for (int64_t part = begin; part < end; part += kFloatSum) {
      const int64_t part_end = std::min(part + kFloatSum, end);
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = part; i < part_end; ++i) sum += residual(e[i], q[i], c);
      mass += sum;
    }
    *masses++ = mass;
  }
}

SPECULATORS_CLONES
double sum_of(const float* values, int64_t size) {
  double total = 0;
  for (int64_t begin = 0; begin < size; begin += kFloatSum) {
    const int64_t end = std::min(begin + kFloatSum, size);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += values[i];
    total += sum;
  }
  return total;
}

}  // namespace speculators
