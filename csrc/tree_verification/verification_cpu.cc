// The walks through a tree on the CPU. Only rows of nodes that the walk comes to are read.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "csrc/tree_verification/logit_rows.h"
#include "csrc/tree_verification/node_sampler.h"
#include "csrc/tree_verification/verification.h"

namespace speculators {
namespace {

// One sequence's tree, and the way that has been gone.
class Walk {
 public:
  Walk(const VerifyCall& call, int64_t sequence)
      : call_(call),
        sequence_(sequence),
        tokens_(call.tokens + sequence * call.nodes),
        parents_(call.parents + sequence * call.nodes) {}

  int64_t node() const { return node_; }
  int64_t token_of(int64_t node) const { return tokens_[node]; }

  // The node's child after another one (or after the node itself), or -1.
  int64_t child_after(int64_t other) const {
    for (int64_t child = other + 1; child < call_.nodes; ++child) {
      if (parents_[child] == node_) return child;
    }
    return -1;
  }

  // The node's first child with this token, or -1.
  int64_t child_with(int64_t token) const {
    int64_t child = child_after(node_);
    while (child >= 0 && tokens_[child] != token) child = child_after(child);
    return child;
  }

  void accept(int64_t child) {
    call_.path[sequence_ * (call_.nodes - 1) + accepted_++] = child;
    node_ = child;
  }

  void end(int64_t token) const {
    int64_t* const path = call_.path + sequence_ * (call_.nodes - 1);
    std::fill(path + accepted_, path + call_.nodes - 1, -1);
    call_.accepted[sequence_] = accepted_;
    call_.next_tokens[sequence_] = token;
  }

 private:
  const VerifyCall& call_;
  const int64_t sequence_;
  const int64_t* tokens_;
  const int64_t* parents_;
  int64_t node_ = 0;
  int64_t accepted_ = 0;
};

// Goes to the child that is the one token which `choose` gives of a node's row, until there is
// none.
template <typename Choose>
void walk_by_token(const VerifyCall& call, int64_t sequence, Choose choose) {
  Walk walk(call, sequence);
  for (;;) {
    const int64_t token = choose(walk.node());
    const int64_t child = walk.child_with(token);
    if (child < 0) return walk.end(token);
    walk.accept(child);
  }
}

// Tests the children of a walk's node one by one; verification.h has the formulas.
class Siblings {
 public:
  Siblings(const VerifyCall& call, int64_t sequence, NodeSampler* sampler, std::vector<float>* q)
      : call_(call), sequence_(sequence), sampler_(sampler), rest_of_q_(q) {}

  // The child of the walk's node that is accepted, or -1; -2 if q cannot have drawn one, whose
  // place is then in *impossible.
  int64_t accepted_child(const Walk& walk, int64_t* impossible) {
    sampler_->enter(sequence_, walk.node());
    int64_t child = walk.child_after(walk.node());
    if (child < 0) return -1;
    const int64_t row = sequence_ * call_.q_batch_stride + walk.node() * call_.q_node_stride;
    q_ = call_.q + row;
    c_ = 0;
    s_ = sampler_->total();
    m_ = 1;
    is_first_ = true;
    while (child >= 0) {
      const int64_t place = sequence_ * call_.nodes + child;
      const int64_t token = walk.token_of(child);
      const double q = is_first_ ? q_[token] : current_q()[token];
      if (!(q > 0)) {
        *impossible = place;
        return -2;
      }
      const double rest = sampler_->weight_of(token) - c_ * q;
      if (call_.uniforms[place] * q * s_ < rest * m_) return child;
      const int64_t next = walk.child_after(child);
      if (!reject(token, next >= 0)) return -1;
      child = next;
    }
    return -1;
  }

 private:
  const float* current_q() const {
    return call_.mode == SamplingMode::kWithoutReplacement ? rest_of_q_->data() : q_;
  }

  // Returns whether other children may be tested. If nothing is left of p, it is q but for
  // rounding, and the rejection was rounding, too: the token then comes from what was before it.
  bool reject(int64_t token, bool has_next) {
    const double before = c_;
    c_ += s_ / m_;
    s_ = sampler_->subtract_from_weights(q_, c_);
    if (!(s_ > 0)) {
      sampler_->subtract_from_weights(q_, before);
      return false;
    }
    if (has_next && call_.mode == SamplingMode::kWithoutReplacement) {
      if (is_first_) rest_of_q_->assign(q_, q_ + call_.width);
      (*rest_of_q_)[static_cast<size_t>(token)] = 0;
      m_ = sum_of(rest_of_q_->data(), call_.width);
    }
    is_first_ = false;
    return true;
  }

  const VerifyCall& call_;
  const int64_t sequence_;
  NodeSampler* const sampler_;
  std::vector<float>* const rest_of_q_;  // without replacement: what can still be drawn
  const float* q_ = nullptr;
  double c_ = 0, s_ = 0, m_ = 1;
  bool is_first_ = true;
};

// Returns the place of a token that cannot have been drawn, or -1.
int64_t walk_by_siblings(const VerifyCall& call, int64_t sequence, NodeSampler* sampler,
                         std::vector<float>* rest_of_q) {
  Walk walk(call, sequence);
  Siblings siblings(call, sequence, sampler, rest_of_q);
  for (;;) {
    int64_t impossible = -1;
    const int64_t child = siblings.accepted_child(walk, &impossible);
    if (impossible >= 0) return impossible;
    if (child < 0) break;
    walk.accept(child);
  }
  walk.end(sampler->draw(call.uniforms[sequence * call.nodes]));
  return -1;
}

}  // namespace

OutOfRange first_out_of_range(const VerifyCall& call) {
  for (int64_t place = 0; place < call.batch * call.nodes; ++place) {
    const int64_t node = place % call.nodes;
    const int64_t parent = call.parents[place];
    if (parent < -1 || parent >= node) return {"parents", place};
    const bool is_drafted = parent >= 0;
    if (is_drafted && (call.tokens[place] < 0 || call.tokens[place] >= call.width)) {
      return {"tokens", place};
    }
    if (is_drafted && call.q != nullptr && parent >= call.q_nodes) {
      return {"draft_probabilities", place};
    }
    if (call.uniforms != nullptr && !(call.uniforms[place] >= 0 && call.uniforms[place] < 1)) {
      return {"uniforms", place};
    }
  }
  return {};
}

void verify_greedy_cpu(const VerifyCall& call, int64_t begin, int64_t end) {
  const auto bytes = static_cast<int64_t>(call.is_bfloat16 ? sizeof(uint16_t) : sizeof(float));
  const auto* data = static_cast<const char*>(call.logits);
  for (int64_t sequence = begin; sequence < end; ++sequence) {
    walk_by_token(call, sequence, [&](int64_t node) {
      const int64_t offset = sequence * call.batch_stride + node * call.node_stride;
      return index_of_largest({data + offset * bytes, call.is_bfloat16, call.width});
    });
  }
}

int64_t verify_sampling_cpu(const VerifyCall& call, int64_t begin, int64_t end) {
  NodeSampler sampler(call);
  std::vector<float> rest_of_q;
  for (int64_t sequence = begin; sequence < end; ++sequence) {
    if (call.mode == SamplingMode::kPointMass) {
      walk_by_token(call, sequence, [&](int64_t node) {
        sampler.enter(sequence, node);
        return sampler.draw(call.uniforms[sequence * call.nodes + node]);
      });
    } else {
      const int64_t impossible = walk_by_siblings(call, sequence, &sampler, &rest_of_q);
      if (impossible >= 0) return impossible;
    }
  }
  return -1;
}

}  // namespace speculators
