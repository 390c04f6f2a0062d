// The CUDA kernel of the row losses: one block per row.
//
// A row is read three times: for the largest logit with the sum of exponentials (one pass, each
// thread keeps both and rescales), for the sums that the losses need, and for the gradient. Only
// the first read is sure to come from memory; a row of 4 to 500 KB is then in the second cache.
// Which losses are wanted is the same for the whole launch, so no warp diverges over it.
//
// The few places at which ce_argmax, ce_data and topk add to the gradient are done by themselves:
// their logits are kept in shared memory before the gradient may overwrite them, and each place is
// written once more, with everything that belongs to it and one rounding.
//
// Compiled by nvcc through row_losses_cuda.cu, and by g++ under csrc/common/cuda_emulator.h in
// tests.
#pragma once

#include <cmath>
#include <cstdint>

#include "csrc/common/cuda_portability.h"
#include "csrc/distillation_loss/row_formulas.h"
#include "csrc/distillation_loss/row_losses.h"
#include "cuda_bf16.h"

namespace speculators {

// The most threads of a block, whose size is a multiple of 32.
inline constexpr int kMaxRowThreads = 256;
inline constexpr int kMaxRowWarps = kMaxRowThreads / 32;

// Deliberate mistakes that tests compile in, to show that they would be noticed.
enum class RowLossBug {
  kNone,
  kIgnoresPositions,
  kForgetsToRescale,
  kTakesTheLastOfEqualLogits,
  kReadsLogitsAfterTheyAreGone,
  kForgetsTheWeight,
  kReadsTheTotalTooEarly,
  kWritesPlacesTooEarly,
  kReadsPastTheRow,
  kStopsAfterOneRow,
};

inline __device__ float to_float(float value) { return value; }
inline __device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
inline __device__ void store(float value, float* to) { *to = value; }
inline __device__ void store(float value, __nv_bfloat16* to) { *to = __float2bfloat16(value); }

// The largest logit so far, the lowest of its indices, and the sum of exp(z - largest).
struct RunningSoftmax {
  float max;
  float sum;
  int index;
};

template <RowLossBug kBug>
__device__ inline RunningSoftmax join(const RunningSoftmax& a, const RunningSoftmax& b) {
  const bool first = kBug == RowLossBug::kTakesTheLastOfEqualLogits
                         ? a.max > b.max || (a.max == b.max && a.index > b.index)
                         : a.max > b.max || (a.max == b.max && a.index < b.index);
  const float max = first ? a.max : b.max;
  if (kBug == RowLossBug::kForgetsToRescale) return {max, a.sum + b.sum, first ? a.index : b.index};
  // A thread without elements has the sum 0 and the largest -inf: exp(-inf - -inf) is NaN.
  const float from_a = a.sum == 0 ? 0 : a.sum * expf(a.max - max);
  const float from_b = b.sum == 0 ? 0 : b.sum * expf(b.max - max);
  return {max, from_a + from_b, first ? a.index : b.index};
}

template <RowLossBug kBug>
__device__ inline RunningSoftmax join_warp(RunningSoftmax mine) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const RunningSoftmax other = {__shfl_xor_sync(0xffffffffu, mine.max, distance),
                                  __shfl_xor_sync(0xffffffffu, mine.sum, distance),
                                  __shfl_xor_sync(0xffffffffu, mine.index, distance)};
    mine = join<kBug>(mine, other);
  }
  return mine;
}

inline __device__ float add_warp(float value) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

// The sum over the block, for every thread. `partial` holds one float per warp.
template <RowLossBug kBug>
__device__ inline float add_block(float value, float* partial) {
  value = add_warp(value);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  if (kBug != RowLossBug::kReadsTheTotalTooEarly) __syncthreads();
  float total = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += partial[warp];
  __syncthreads();  // `partial` may be used again
  return total;
}

inline __device__ float max_block(float value, float* partial) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  float result = partial[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) result = fmaxf(result, partial[warp]);
  __syncthreads();
  return result;
}

// One token's two probabilities and their logarithms.
struct TokenPair {
  float p, q, log_p, log_q;
};

inline __device__ TokenPair token_pair(float z, float log_p, float max, float log_sum) {
  const float log_q = (z - max) - log_sum;
  return {expf(log_p), expf(log_q), log_p, log_q};
}

// NaN if either is, unlike fminf, which would take a NaN for a perfect match.
inline __device__ float smaller_of(float a, float b) { return a < b || a != a ? a : b; }

// Stays NaN, unlike with fmaxf.
inline __device__ float bounded_log_p_of(const TokenPair& token) {
  return token.log_p < kMinLogP ? kMinLogP : token.log_p;
}

inline __device__ float sign_of(float x) { return (x > 0 ? 1.0f : 0.0f) - (x < 0 ? 1.0f : 0.0f); }

inline __device__ float openness_of(const TokenPair& token) {
  return 0.5f + 0.5f * sign_of(token.log_p - token.log_q);
}

// log(2 x / (x + y)), finite where x is 0.
inline __device__ float log_share_of(float x, float y) {
  constexpr float kTiny = 1.17549435e-38f;
  return logf(fmaxf(2 * x / fmaxf(x + y, kTiny), kTiny));
}

inline __device__ void add_token(const TokenPair& token, const RowNeeds& needs,
                                 RowSums<float>* sums) {
  const float bounded = bounded_log_p_of(token);
  sums->p += token.p;
  if (needs.cross_entropy) sums->p_log_q += token.p * token.log_q;
  if (needs.kl) sums->kl += token.p * (bounded - token.log_q);
  if (needs.rkl) sums->rkl += token.q * (token.log_q - bounded);
  if (needs.jsd) {
    sums->jsd_p += token.p * log_share_of(token.p, token.q);
    sums->jsd_q += token.q * log_share_of(token.q, token.p);
  }
  if (needs.distance) {
    sums->distance += fabsf(token.p - token.q);
    sums->signed_q += token.q * sign_of(token.q - token.p);
  }
  if (needs.overlap) {
    const float overlap = smaller_of(token.p, token.q);
    sums->overlap += overlap;
    sums->open_overlap += overlap * openness_of(token);
  }
}

// min(p, q) exp(-shift).
inline __device__ float shifted_overlap_of(const TokenPair& token, float shift) {
  return expf(smaller_of(token.log_p, token.log_q) - shift);
}

inline __device__ float gradient_of(const TokenPair& token, const RowTerms<float>& terms,
                                    float shift) {
  float g = terms.on_p * token.p - terms.total * token.q;
  if (terms.on_signed_q != 0) g += terms.on_signed_q * token.q * sign_of(token.q - token.p);
  if (terms.on_rkl != 0) {
    g += terms.on_rkl * token.q * (token.log_q - bounded_log_p_of(token) + 1);
  }
  if (terms.on_jsd != 0) g += terms.on_jsd * token.q * log_share_of(token.q, token.p);
  if (terms.on_overlap != 0) {
    g += terms.on_overlap * shifted_overlap_of(token, shift) * openness_of(token);
  }
  return g;
}

// The places of one row: the top k, then the choice, then the data's token; -1 where there is none.
struct PlacesOfRow {
  const int64_t* top;
  int top_k;
  int64_t choice, token;

  __device__ int count() const { return top_k + 2; }
  __device__ int64_t operator[](int number) const {
    if (number < top_k) return top[number];
    return number == top_k ? choice : token;
  }
};

inline __device__ PlacesOfRow places_of(const RowLossCall& call, int64_t row, int64_t target) {
  PlacesOfRow places = {nullptr, 0, -1, -1};
  if (call.factors.topk != 0) {
    places.top = call.top + target * call.top_k;
    places.top_k = static_cast<int>(call.top_k);
  }
  if (call.factors.ce_argmax != 0) places.choice = call.likeliest[target];
  if (call.factors.ce_data != 0) places.token = call.data_tokens[row];
  for (int number = threadIdx.x; number < places.count(); number += blockDim.x) {
    const int64_t least = number < places.top_k ? 0 : -1;
    DEVICE_CHECK(places[number] >= least && places[number] < call.width,
                 "distillation_loss: top, likeliest or data_tokens has an index out of range");
  }
  __syncthreads();  // every thread will read at places that another one has checked
  return places;
}

// What the losses of few places add to d loss / d log q at one of them.
inline __device__ float gradient_of_place(const LossFactors& factors, const PlacesOfRow& places,
                                          int64_t place, float p) {
  float g = 0;
  for (int number = 0; number < places.top_k; ++number) {
    if (places[number] == place) g -= factors.topk * p;
  }
  if (places.choice == place) g -= factors.ce_argmax;
  if (places.token == place) g -= factors.ce_data;
  return g;
}

// Whether an earlier place is the same, and will be written for both.
inline __device__ bool is_repeated(const PlacesOfRow& places, int number) {
  for (int earlier = 0; earlier < number; ++earlier) {
    if (places[earlier] == places[number]) return true;
  }
  return false;
}

template <RowLossBug kBug>
__device__ inline RowSums<float> add_sums(const RowSums<float>& mine, const RowNeeds& needs,
                                          float* partial) {
  RowSums<float> sums;
  sums.p = add_block<kBug>(mine.p, partial);
  if (needs.cross_entropy) sums.p_log_q = add_block<kBug>(mine.p_log_q, partial);
  if (needs.kl) sums.kl = add_block<kBug>(mine.kl, partial);
  if (needs.rkl) sums.rkl = add_block<kBug>(mine.rkl, partial);
  if (needs.jsd) {
    sums.jsd_p = add_block<kBug>(mine.jsd_p, partial);
    sums.jsd_q = add_block<kBug>(mine.jsd_q, partial);
  }
  if (needs.distance) {
    sums.distance = add_block<kBug>(mine.distance, partial);
    sums.signed_q = add_block<kBug>(mine.signed_q, partial);
  }
  if (needs.overlap) {
    sums.overlap = add_block<kBug>(mine.overlap, partial);
    sums.open_overlap = add_block<kBug>(mine.open_overlap, partial);
  }
  return sums;
}

// The whole block computes the row's largest logit, its first index, and the sum.
template <typename T, RowLossBug kBug>
__device__ inline RunningSoftmax softmax_of_row(const T* z, int width, RunningSoftmax* partial) {
  RunningSoftmax mine = {-INFINITY, 0, 0x7fffffff};
  const int last = width + (kBug == RowLossBug::kReadsPastTheRow ? 1 : 0);
  for (int i = threadIdx.x; i < last; i += blockDim.x) {
    const float value = to_float(z[i]);
    if (value > mine.max) {
      if (kBug != RowLossBug::kForgetsToRescale) mine.sum *= expf(mine.max - value);
      mine.max = value;
      mine.index = i;
      mine.sum += 1;
    } else {
      mine.sum += value == mine.max ? 1 : expf(value - mine.max);  // both may be -inf
    }
  }
  mine = join_warp<kBug>(mine);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
  __syncthreads();
  RunningSoftmax whole = partial[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) whole = join<kBug>(whole, partial[warp]);
  __syncthreads();
  return whole;
}

// One row's tokens, as long as its logits are there.
template <typename T>
struct RowTokens {
  const T* z;
  const float* log_p;
  int width;
  float max;
  float log_sum;

  __device__ TokenPair operator[](int64_t i) const {
    return token_pair(to_float(z[i]), log_p[i], max, log_sum);
  }
};

// Where p and q hardly overlap: sums the overlap anew in log space; returns the shift.
template <typename T, RowLossBug kBug>
__device__ inline float overlap_in_log_space(const RowTokens<T>& tokens, RowSums<float>* sums,
                                             float* partial) {
  float my_shift = -INFINITY;
  for (int i = threadIdx.x; i < tokens.width; i += blockDim.x) {
    const TokenPair token = tokens[i];
    my_shift = fmaxf(my_shift, smaller_of(token.log_p, token.log_q));
  }
  const float shift = max_block(my_shift, partial);
  float overlap = 0;
  float open = 0;
  for (int i = threadIdx.x; i < tokens.width; i += blockDim.x) {
    const TokenPair token = tokens[i];
    const float value = shifted_overlap_of(token, shift);
    overlap += value;
    open += value * openness_of(token);
  }
  sums->overlap = add_block<kBug>(overlap, partial);
  sums->open_overlap = add_block<kBug>(open, partial);
  return shift;
}

// Keeps the logits of the places, and adds up what topk needs.
template <typename T, RowLossBug kBug>
__device__ inline void visit_places(const RowTokens<T>& tokens, const PlacesOfRow& places,
                                    float* kept, RowSums<float>* sums, float* partial) {
  float top_p = 0;
  float top_p_log_q = 0;
  for (int number = threadIdx.x; number < places.count(); number += blockDim.x) {
    if (places[number] < 0) continue;
    kept[number] = to_float(tokens.z[places[number]]);
    if (number >= places.top_k) continue;
    const TokenPair token = tokens[places[number]];
    top_p += token.p;
    top_p_log_q += token.p * token.log_q;
  }
  if (places.top_k > 0) {
    sums->top_p = add_block<kBug>(top_p, partial);
    sums->top_p_log_q = add_block<kBug>(top_p_log_q, partial);
  }
}

// `out` may be where the logits are.
template <typename T, RowLossBug kBug>
__device__ inline void write_gradient(const LossFactors& factors, const RowTokens<T>& tokens,
                                      const PlacesOfRow& places, const RowTerms<float>& terms,
                                      float shift, float weight, const float* kept, T* out) {
  __syncthreads();  // every thread has read the logits that others will overwrite
  for (int i = threadIdx.x; i < tokens.width; i += blockDim.x) {
    store(gradient_of(tokens[i], terms, shift) * weight, out + i);
  }
  if (kBug != RowLossBug::kWritesPlacesTooEarly) __syncthreads();
  for (int number = threadIdx.x; number < places.count(); number += blockDim.x) {
    const int64_t place = places[number];
    if (place < 0 || is_repeated(places, number)) continue;
    const float z =
        kBug == RowLossBug::kReadsLogitsAfterTheyAreGone ? to_float(tokens.z[place]) : kept[number];
    const TokenPair token = token_pair(z, tokens.log_p[place], tokens.max, tokens.log_sum);
    const float g =
        gradient_of(token, terms, shift) + gradient_of_place(factors, places, place, token.p);
    store(g * weight, out + place);
  }
}

// Dynamic shared memory: top_k + 2 floats, each of which one thread alone reads and writes. T is
// float or __nv_bfloat16, the type of the logits.
template <typename T, RowLossBug kBug = RowLossBug::kNone>
__global__ void __launch_bounds__(kMaxRowThreads)
    row_losses_kernel(const __grid_constant__ RowLossCall call) {
  SPECULATORS_SHARED(RunningSoftmax[kMaxRowWarps], softmax_partial);
  SPECULATORS_SHARED(float[kMaxRowWarps], partial);
  SPECULATORS_DYNAMIC_SHARED(float, kept);
  const int width = static_cast<int>(call.width);
  for (int64_t r = blockIdx.x; r < call.num_rows; r += gridDim.x) {
    const int64_t target =
        call.positions == nullptr || kBug == RowLossBug::kIgnoresPositions ? r : call.positions[r];
    DEVICE_CHECK(target >= 0 && target < call.num_targets,
                 "distillation_loss: positions has an index out of range");
    const T* z = static_cast<const T*>(call.logits) + r * call.logits_stride;
    const RunningSoftmax softmax = softmax_of_row<T, kBug>(z, width, softmax_partial);
    const RowTokens<T> tokens = {z, call.log_p + target * call.log_p_stride, width, softmax.max,
                                 logf(softmax.sum)};

    const bool learns = row_learns(call, target);
    const RowNeeds needs = learns ? row_needs(call.factors) : RowNeeds{};
    const float coverage = call.coverage[target];
    RowSums<float> mine;
    float my_alpha = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
      const TokenPair token = tokens[i];
      add_token(token, needs, &mine);
      my_alpha += smaller_of(coverage * token.p, token.q);
    }
    const float alpha = add_block<kBug>(my_alpha, partial);
    if (threadIdx.x == 0) {
      const int guess = softmax.index < width ? softmax.index : 0;  // if all of them are NaN
      call.alpha[r] = alpha > 1 ? 1 : alpha;
      call.greedy_acceptance[r] = coverage * expf(tokens.log_p[guess]);
      call.agreement[r] = guess == call.best[target];
      call.in_vocabulary[r] = call.best[target] >= 0;
      if (!learns) call.loss[r] = 0;
    }
    T* out = call.gradient == nullptr ? nullptr
                                      : static_cast<T*>(call.gradient) + r * call.gradient_stride;
    if (learns) {
      RowSums<float> sums = add_sums<kBug>(mine, needs, partial);
      float shift = 0;
      if (needs.overlap && sums.overlap < kLeastOverlap) {
        shift = overlap_in_log_space<T, kBug>(tokens, &sums, partial);
      }
      const PlacesOfRow places = places_of(call, r, target);
      visit_places<T, kBug>(tokens, places, kept, &sums, partial);
      const auto log_q_at = [&](int64_t i) { return i >= 0 ? tokens[i].log_q : 0.0f; };
      const RowTerms<float> terms =
          row_terms<float>(call.factors, sums, shift, log_q_at(places.choice),
                           log_q_at(places.token), places.token >= 0);
      if (threadIdx.x == 0) call.loss[r] = terms.loss;
      if (out != nullptr) {
        float weight = call.weights == nullptr ? 1.0f : call.weights[r];
        if (kBug == RowLossBug::kForgetsTheWeight) weight = 1;
        write_gradient<T, kBug>(call.factors, tokens, places, terms, shift, weight, kept, out);
      }
    } else if (out != nullptr) {
      for (int i = threadIdx.x; i < width; i += blockDim.x) store(0, out + i);
    }
    if (kBug == RowLossBug::kStopsAfterOneRow) break;
  }
}

}  // namespace speculators
