#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "csrc/tree_verification/logit_rows.h"
#include "csrc/tree_verification/node_sampler.h"
#include "csrc/tree_verification/verification.h"

namespace speculators {
namespace {

// Where the running sum of weights passes `target`: an index, and what is left of the target there.
// Rounding may keep it from passing; then it is the last that weighs anything, or -1.
template <typename Weight>
int64_t pass(const Weight* weights, int64_t size, double* target) {
  int64_t last = -1;
  for (int64_t i = 0; i < size; ++i) {
    if (!(weights[i] > 0)) continue;
    if (*target < weights[i]) return i;
    *target -= weights[i];
    last = i;
  }
  return last;
}

// As pass, block by block and then in the block: most of the work is vector code.
int64_t pass_in_blocks(const float* weights, int64_t size, double target) {
  int64_t last = -1;
  double rest = target;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t count = std::min(kBlock, size - begin);
    const double mass = sum_of(weights + begin, count);
    if (!(mass > 0)) continue;
    last = begin;
    if (rest < mass) break;
    rest -= mass;
  }
  if (last < 0) return -1;
  return last + std::max<int64_t>(0, pass(weights + last, std::min(kBlock, size - last), &rest));
}

constexpr int64_t kFirstGuess = 256;  // of how many tokens top-p keeps
constexpr int64_t kGuessGrowth = 8;

}  // namespace

NodeSampler::NodeSampler(const VerifyCall& call)
    : call_(call), filtered_(is_filtered(call)), scale_(1 / call.temperature) {
  maxima_.resize(static_cast<size_t>(blocks_of(call.width)));
  sums_.resize(static_cast<size_t>(chunks_of(call.width)));
  masses_.resize(sums_.size());
  part_.resize(static_cast<size_t>(kChunk));
}

void NodeSampler::enter(int64_t sequence, int64_t node) {
  const int64_t offset = sequence * call_.batch_stride + node * call_.node_stride;
  const auto* data = static_cast<const char*>(call_.logits);
  const auto bytes = static_cast<int64_t>(call_.is_bfloat16 ? sizeof(uint16_t) : sizeof(float));
  row_ = {data + offset * bytes, call_.is_bfloat16, call_.width};
  has_weights_ = false;
  q_ = nullptr;
  if (filtered_) {
    select();
  } else {
    summarise();
  }
}

void NodeSampler::summarise() {
  summarise_row(row_, scale_, maxima_.data(), sums_.data());
  max_ = *std::max_element(maxima_.begin(), maxima_.begin() + std::ssize(sums_));
  for (size_t chunk = 0; chunk < sums_.size(); ++chunk) {
    const double less = double{maxima_[chunk] - max_} * scale_;
    masses_[chunk] = sums_[chunk] > 0 ? sums_[chunk] * std::exp(less) : 0;
  }
  total_ = masses_total();
}

double NodeSampler::masses_total() const {
  return std::accumulate(masses_.begin(), masses_.end(), 0.0);
}

void NodeSampler::select() {
  if (call_.top_k > 0 && call_.top_k < call_.width) {
    block_maxima(row_, maxima_.data());
    max_ = *std::max_element(maxima_.begin(), maxima_.end());
    keep_top_k();
    weigh_candidates();
    total_ = sum_of(kept_.data(), std::ssize(kept_));
  } else {
    gather_for_top_p();
  }
  if (call_.top_p < 1) {
    keep_top_p();
    total_ = sum_of(kept_.data(), std::ssize(kept_));
  }
  rest_ = kept_;
}

// All that are among the `count` largest, and perhaps some more. The comparison is between z / T,
// which may be equal where z is not.
void NodeSampler::gather_largest(int64_t count) {
  float least = -std::numeric_limits<float>::infinity();
  if (count < std::ssize(maxima_)) {
    std::vector<float> sorted = maxima_;
    std::nth_element(sorted.begin(), sorted.begin() + (count - 1), sorted.end(), std::greater<>());
    least = sorted[static_cast<size_t>(count - 1)] / call_.temperature;
  }
  candidates_.clear();
  for (size_t block = 0; block < maxima_.size(); ++block) {
    if (!(maxima_[block] / call_.temperature >= least)) continue;
    const int64_t begin = static_cast<int64_t>(block) * kBlock;
    for (int64_t i = begin; i < std::min(begin + kBlock, call_.width); ++i) {
      const float score = logit_at(row_, i) / call_.temperature;
      if (score >= least) candidates_.push_back({score, i});
    }
  }
}

void NodeSampler::keep_top_k() {
  gather_largest(call_.top_k);
  if (std::ssize(candidates_) <= call_.top_k) return;
  std::vector<Candidate> sorted = candidates_;
  const auto kth = sorted.begin() + (call_.top_k - 1);
  std::nth_element(sorted.begin(), kth, sorted.end(),
                   [](const Candidate& a, const Candidate& b) { return a.score > b.score; });
  std::erase_if(candidates_, [least = kth->score](const Candidate& c) { return c.score < least; });
}

// Gathers as many of the largest as have a share top_p of all the mass.
void NodeSampler::gather_for_top_p() {
  summarise();
  const double total = total_;
  block_maxima(row_, maxima_.data());
  for (int64_t count = kFirstGuess;; count *= kGuessGrowth) {
    gather_largest(count);
    weigh_candidates();
    const double mass = sum_of(kept_.data(), std::ssize(kept_));
    total_ = total;
    if (mass >= call_.top_p * total || count >= std::ssize(maxima_)) return;
  }
}

// Keeps the fewest that have a share top_p of the total; of equal ones those with higher numbers.
// The last of them is found by halving the range that it is in, in linear time, and the candidates
// stay in the order of their numbers.
void NodeSampler::keep_top_p() {
  struct Weighted : Candidate {
    float weight;
  };
  const auto before = [](const Candidate& a, const Candidate& b) {
    return a.score != b.score ? a.score > b.score : a.token > b.token;
  };
  std::vector<Weighted> ordered;
  ordered.reserve(candidates_.size());
  for (size_t i = 0; i < candidates_.size(); ++i) ordered.push_back({candidates_[i], kept_[i]});
  const double target = call_.top_p * total_;
  double head = 0;  // the mass of all before `begin`
  auto begin = ordered.begin(), end = ordered.end();
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, before);
    double mass = 0;
    for (auto it = begin; it != middle; ++it) mass += it->weight;
    if (head + mass >= target) {
      end = middle;
    } else {
      head += mass;
      begin = middle;
    }
  }
  if (begin == end) return;
  size_t count = 0;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    if (before(*begin, candidates_[i])) continue;
    candidates_[count] = candidates_[i];
    kept_[count++] = kept_[i];
  }
  candidates_.resize(count);
  kept_.resize(count);
}

void NodeSampler::weigh_candidates() {
  const float largest = max_ / call_.temperature;
  kept_.clear();
  for (const Candidate& candidate : candidates_) {
    const float e = std::exp(candidate.score - largest);
    kept_.push_back(e > 0 ? e : 0);  // not what is NaN, -inf less -inf
  }
}

double NodeSampler::weight_of(int64_t token) const {
  if (!filtered_) {
    const float e = std::exp((logit_at(row_, token) - max_) * scale_);
    return e > 0 ? e : 0;
  }
  const auto found = std::lower_bound(candidates_.begin(), candidates_.end(), token,
                                      [](const Candidate& a, int64_t b) { return a.token < b; });
  if (found == candidates_.end() || found->token != token) return 0;
  return kept_[static_cast<size_t>(found - candidates_.begin())];
}

double NodeSampler::subtract_from_weights(const float* q, double c) {
  q_ = q;
  c_ = static_cast<float>(c);
  if (filtered_) {
    for (size_t i = 0; i < candidates_.size(); ++i) {
      rest_[i] = std::max(0.0f, kept_[i] - c_ * q[candidates_[i].token]);
    }
    return sum_of(rest_.data(), std::ssize(rest_));
  }
  if (!has_weights_) {
    weights_.resize(static_cast<size_t>(call_.width));
    weigh(row_, 0, call_.width, max_, scale_, weights_.data());
    has_weights_ = true;
  }
  residual_masses(weights_.data(), q, c_, call_.width, masses_.data());
  return masses_total();
}

int64_t NodeSampler::draw(double uniform) {
  const int64_t token = filtered_ ? draw_among_candidates(uniform) : draw_among_all(uniform);
  return token >= 0 ? token : index_of_largest(row_);
}

int64_t NodeSampler::draw_among_candidates(double uniform) const {
  double target = uniform * std::accumulate(rest_.begin(), rest_.end(), 0.0);
  const int64_t place = pass(rest_.data(), std::ssize(rest_), &target);
  return place < 0 ? -1 : candidates_[static_cast<size_t>(place)].token;
}

int64_t NodeSampler::draw_among_all(double uniform) {
  double target = uniform * masses_total();
  const int64_t chunk = pass(masses_.data(), std::ssize(masses_), &target);
  if (chunk < 0) return -1;
  const int64_t begin = chunk * kChunk;
  const int64_t end = std::min(begin + kChunk, call_.width);
  if (q_ == nullptr) {
    weigh(row_, begin, end, max_, scale_, part_.data());
  } else {
    subtract(weights_.data() + begin, q_ + begin, c_, end - begin, part_.data());
  }
  const int64_t place = pass_in_blocks(part_.data(), end - begin, target);
  return place < 0 ? -1 : begin + place;
}

}  // namespace speculators
