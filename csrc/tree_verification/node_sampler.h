// The distribution after one node of a tree, on the CPU: reads the node's row once, applies
// temperature, top-k and top-p, draws tokens, and subtracts q after rejections.
//
// Without top-k and top-p all V tokens have a weight, and the row's chunks are what is kept of it.
// With them, few have: these are kept as a list. To find the k largest without sorting V logits,
// take the k-th largest of the blocks' maxima: at least k logits are not less than that, and few
// more are. For top-p k is guessed, and raised until they have enough of the mass.
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/tree_verification/logit_rows.h"
#include "csrc/tree_verification/verification.h"

namespace speculators {

class NodeSampler {
 public:
  explicit NodeSampler(const VerifyCall& call);

  // Reads the row after a node.
  void enter(int64_t sequence, int64_t node);

  // E, the sum of all weights.
  double total() const { return total_; }

  // e of a token, 0 if top-k or top-p cut it off.
  double weight_of(int64_t token) const;

  // Replaces the weights e by (e - c q)+; returns their sum.
  double subtract_from_weights(const float* q, double c);

  // Draws from the weights as they are now, by inversion of their cumulative sum in the order of
  // the tokens; never a token of weight 0, unless all are: then the largest logit.
  int64_t draw(double uniform);

 private:
  struct Candidate {
    float score;  // z / T
    int64_t token;
  };

  void summarise();
  void select();
  void gather_largest(int64_t count);
  void keep_top_k();
  void gather_for_top_p();
  void keep_top_p();
  void weigh_candidates();
  double masses_total() const;
  int64_t draw_among_all(double uniform);
  int64_t draw_among_candidates(double uniform) const;

  const VerifyCall& call_;
  const bool filtered_;
  const float scale_;  // 1 / T
  LogitRow row_{};
  float max_ = 0;
  double total_ = 0;

  // Not filtered: of each chunk the mass, and of each token e, once q has been subtracted.
  std::vector<float> maxima_, sums_, weights_, part_;
  std::vector<double> masses_;
  bool has_weights_ = false;
  const float* q_ = nullptr;
  float c_ = 0;

  // Filtered: the tokens kept, in the order of their numbers, their e, and what is left of that.
  std::vector<Candidate> candidates_;
  std::vector<float> kept_, rest_;
};

}  // namespace speculators
