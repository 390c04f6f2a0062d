// Top-k and top-p of one row, by one block: which is the smallest score that is kept, and of equal
// ones the lowest index.
//
// The k-th largest of V numbers, the number at which a share of the mass is reached, and the n-th
// tie from the end are one question: the largest key such that the weights of all keys from it on
// reach a goal. It is answered digit by digit from the highest one on, with a histogram of 2048
// bins in shared memory: three passes over the row, which lies in the second cache. Weights are
// integers (the mass in fixed point), so that the order of the atomic additions does not matter.
#pragma once

#include "csrc/tree_verification/row_block.cuh"

namespace speculators {

inline constexpr int kBins = 2048;

struct WeightedKey {
  unsigned key;
  unsigned long long weight;
};

struct SelectedKey {
  unsigned key;
  unsigned long long rest;  // what elements of this very key must still give
};

// Lane 0 of the first warp has the highest bins. Returns the bin in which the goal is reached, and
// makes *goal what is left of it there; -1 if there is nothing in any bin. With share > 0 the goal
// is that share of what is in all bins.
inline __device__ int find_bin(const unsigned long long* histogram, double share,
                               unsigned long long* goal) {
  constexpr int kPerLane = kBins / 32;
  const int lane = static_cast<int>(threadIdx.x);
  const int top = kBins - 1 - lane * kPerLane;
  unsigned long long mine = 0;
  for (int i = 0; i < kPerLane; ++i) mine += histogram[top - i];
  unsigned long long inclusive = mine;
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned long long other = __shfl_up_sync(0xffffffffu, inclusive, distance);
    if (lane >= distance) inclusive += other;
  }
  const unsigned long long total = __shfl_sync(0xffffffffu, inclusive, 31);
  if (share > 0) *goal = static_cast<unsigned long long>(ceil(share * static_cast<double>(total)));
  *goal = min(max(*goal, 1ull), max(total, 1ull));
  const unsigned reached = __ballot_sync(0xffffffffu, inclusive >= *goal);
  if (reached == 0) return -1;
  const int winner = __ffs(static_cast<int>(reached)) - 1;
  unsigned long long rest = *goal - (inclusive - mine);
  int bin = top;
  if (lane == winner) {
    while (histogram[bin] < rest) rest -= histogram[bin--];
  }
  *goal = __shfl_sync(0xffffffffu, rest, winner);
  return __shfl_sync(0xffffffffu, bin, winner);
}

// element(i) gives the key and weight of each of `size` elements. With share > 0 the goal is that
// share of all the weight. `histogram`: kBins in shared memory.
template <VerifyBug kBug, typename Element>
__device__ inline SelectedKey select_key(int size, Element element, unsigned long long goal,
                                         double share, unsigned long long* histogram,
                                         BlockScratch* scratch) {
  unsigned prefix = 0;
  for (int digit = 0; digit < 3; ++digit) {
    const int shift = digit == 0 ? 21 : digit == 1 ? 10 : 0;
    const int bits = digit == 2 ? 10 : 11;
    if (kBug != VerifyBug::kKeepsTheOldHistogram || digit == 0) {
      for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) histogram[bin] = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
      const WeightedKey one = element(i);
      if (one.weight == 0 || (digit > 0 && one.key >> (shift + bits) != prefix)) continue;
      atomicAdd(&histogram[(one.key >> shift) & ((1u << bits) - 1)], one.weight);
    }
    if (kBug != VerifyBug::kReadsTheHistogramTooEarly) __syncthreads();
    if (threadIdx.x < 32) {
      unsigned long long rest = goal;
      const int bin = find_bin(histogram, digit == 0 ? share : 0, &rest);
      if (threadIdx.x == 0) {
        scratch->found = bin;
        scratch->goal = rest;
      }
    }
    __syncthreads();
    const int bin = scratch->found;
    goal = scratch->goal;
    __syncthreads();
    if (bin < 0) return {0, 0};
    prefix = prefix << bits | static_cast<unsigned>(bin);
  }
  return {prefix, goal};
}

// Sets what the row keeps; row->max must be known.
template <typename T, VerifyBug kBug>
__device__ inline void filter_row(const VerifyCall& call, NodeRow<T>* row,
                                  unsigned long long* histogram, BlockScratch* scratch) {
  const T* const z = row->z;
  const float temperature = row->temperature;
  const auto score = [&](int i) { return score_of(to_float(z[i]), temperature); };
  row->least = 0;
  row->first_tie = 0;
  if (call.top_k > 0 && call.top_k < call.width) {
    const auto count = [&](int i) { return WeightedKey{key_of(score(i)), 1ull}; };
    const SelectedKey kth = select_key<kBug>(
        row->width, count, static_cast<unsigned long long>(call.top_k), 0.0, histogram, scratch);
    row->least = kth.key;
    if (kBug == VerifyBug::kTopKLosesTies) ++row->least;
  }
  if (call.top_p >= 1) return;
  // The largest weight is one; the sum of all fits 63 bits.
  const float largest = score_of(row->max, temperature);
  const int exponent = min(45, 30 + __clz(row->width));
  const float unit = exp2f(static_cast<float>(exponent));
  const unsigned least = kBug == VerifyBug::kTopPIgnoresTopK ? 0 : row->least;
  const auto mass = [&](int i) {
    const float value = score(i);
    const unsigned key = key_of(value);
    const float e = key < least ? 0.0f : weight_of(value, largest, kLog2E);
    return WeightedKey{key, static_cast<unsigned long long>(e * unit)};
  };
  const SelectedKey last = select_key<kBug>(row->width, mass, 0, call.top_p, histogram, scratch);
  if (last.key == 0) return;
  row->least = last.key;
  // Of equal ones as many as are needed stay, those with the highest indices.
  const unsigned bits = (last.key & 0x80000000u) != 0 ? last.key & 0x7fffffffu : ~last.key;
  const float e = weight_of(__uint_as_float(bits), largest, kLog2E);
  const auto each = max(static_cast<unsigned long long>(e * unit), 1ull);
  const auto tie = [&](int i) {
    const bool is_tie = key_of(score(i)) == last.key;
    return WeightedKey{static_cast<unsigned>(i), is_tie ? 1ull : 0ull};
  };
  const SelectedKey first =
      select_key<kBug>(row->width, tie, (last.rest + each - 1) / each, 0.0, histogram, scratch);
  row->first_tie = static_cast<int>(first.key);
  if (kBug == VerifyBug::kTopPKeepsAllTies) row->first_tie = 0;
}

}  // namespace speculators
