// Random calls of the tree operators, with their memory, and the definition in float64 to compare
// the results with: for the tests of the CPU kernels and of the CUDA kernels under the emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "csrc/tree_verification/build_tree.h"
#include "csrc/tree_verification/verification.h"

namespace speculators {

// Random parents: of the first of `count` always -1, of some others too.
inline std::vector<int64_t> random_parents(int64_t count, double missing, std::mt19937& random) {
  std::vector<int64_t> parents;
  for (int64_t i = 0; i < count; ++i) {
    const bool gone = i == 0 || random() % 1000 < 1000 * missing;
    // Half of them continue the node before, so that there are long paths.
    parents.push_back(gone ? -1 : random() % 2 ? i - 1 : static_cast<int64_t>(random() % i));
  }
  return parents;
}

class BuildCase {
 public:
  BuildCase(int64_t batch, int64_t candidates, int64_t nodes, unsigned seed) {
    std::mt19937 random(seed * 7919 + 1);
    for (int64_t b = 0; b < batch; ++b) {
      const auto row = random_parents(candidates, 0.2, random);
      parents.insert(parents.end(), row.begin(), row.end());
      root_tokens.push_back(random() % 1000);
      root_positions.push_back(random() % 1000);
    }
    for (int64_t i = 0; i < batch * candidates; ++i) {
      tokens.push_back(random() % 1000);
      const unsigned kind = random() % 20;
      scores.push_back(kind == 0   ? -INFINITY
                       : kind == 1 ? NAN
                                   : -static_cast<float>(random() % 12) / 4);
    }
    columns.assign(7, std::vector<int64_t>(batch * nodes, -77));
    ancestors.assign(batch * nodes * mask_words(nodes), ~uint64_t{0});
    call = {batch,
            candidates,
            nodes,
            tokens.data(),
            parents.data(),
            scores.data(),
            root_tokens.data(),
            root_positions.data(),
            columns[0].data(),
            columns[1].data(),
            columns[2].data(),
            columns[3].data(),
            ancestors.data(),
            columns[4].data(),
            columns[5].data(),
            columns[6].data()};
  }
  BuildCase(const BuildCase&) = delete;
  BuildCase& operator=(const BuildCase&) = delete;

  TreeBuildCall call;
  std::vector<int64_t> tokens, parents, root_tokens, root_positions;
  std::vector<float> scores;
  std::vector<std::vector<int64_t>> columns;
  std::vector<uint64_t> ancestors;

  bool is_right() const {
    bool right = true;
    for (int64_t b = 0; b < call.batch; ++b) right = sequence_is_right(b) && right;
    return right;
  }

 private:
  struct Node {
    int64_t token, parent, depth, position, child = -1, sibling = -1, candidate;
    std::set<int64_t> seen;
  };

  // As the definition says: the candidates kept, one at a time, the best of those that can come.
  std::vector<Node> expected(int64_t b) const {
    const auto parent = [&](int64_t i) { return parents[b * call.candidates + i]; };
    std::vector<std::pair<int64_t, int64_t>> kept;  // depth, candidate
    std::set<int64_t> taken = {-1};
    while (static_cast<int64_t>(kept.size()) + 1 < call.nodes) {
      int64_t best = -1;
      float best_score = -INFINITY;
      for (int64_t i = 0; i < call.candidates; ++i) {
        float score = INFINITY;
        for (int64_t at = i; at >= 0; at = parent(at)) {
          const float own = scores[b * call.candidates + at];
          score = std::isnan(own) ? -INFINITY : std::min(score, own);
        }
        if (taken.count(i) == 0 && score > best_score) {
          best = i;
          best_score = score;
        }
      }
      if (best < 0) break;
      taken.insert(best);
      int64_t depth = 0;
      for (int64_t at = best; at >= 0; at = parent(at)) ++depth;
      kept.emplace_back(depth, best);
    }
    std::stable_sort(kept.begin(), kept.end(),
                     [](const auto& x, const auto& y) { return x.first < y.first; });
    const int64_t root_token = root_tokens[b];
    const int64_t root_position = root_positions[b];
    std::vector<Node> nodes = {{root_token, -1, 0, root_position, -1, -1, -1, {0}}};
    for (const auto& [depth, candidate] : kept) {
      const auto is_parent = [&](const Node& n) { return n.candidate == parent(candidate); };
      const int64_t above = std::find_if(nodes.begin(), nodes.end(), is_parent) - nodes.begin();
      const auto node = static_cast<int64_t>(nodes.size());
      std::set<int64_t> seen = nodes[above].seen;
      seen.insert(node);
      int64_t* link = &nodes[above].child;
      while (*link >= 0) link = &nodes[*link].sibling;
      *link = node;
      nodes.push_back({tokens[b * call.candidates + candidate], above, depth, root_position + depth,
                       -1, -1, candidate, seen});
    }
    while (static_cast<int64_t>(nodes.size()) < call.nodes) {
      const auto node = static_cast<int64_t>(nodes.size());
      nodes.push_back({root_token, -1, -1, root_position, -1, -1, -1, {node}});
    }
    return nodes;
  }

  bool sequence_is_right(int64_t b) const {
    const std::vector<Node> nodes = expected(b);
    bool right = true;
    for (int64_t n = 0; n < call.nodes; ++n) {
      const Node& node = nodes[n];
      const int64_t values[] = {node.token, node.parent,  node.depth,    node.position,
                                node.child, node.sibling, node.candidate};
      for (int column = 0; column < 7; ++column) {
        const int64_t found = columns[column][b * call.nodes + n];
        if (found == values[column]) continue;
        std::printf("column %d of node [%ld, %ld]: found %ld, expected %ld\n", column,
                    static_cast<long>(b), static_cast<long>(n), static_cast<long>(found),
                    static_cast<long>(values[column]));
        right = false;
      }
      const int64_t words = mask_words(call.nodes);
      for (int64_t bit = 0; bit < 64 * words; ++bit) {
        const uint64_t word = ancestors[(b * call.nodes + n) * words + bit / 64];
        right = right && ((word >> (bit % 64) & 1) != 0) == (node.seen.count(bit) != 0);
      }
    }
    return right;
  }
};

struct VerifyShape {
  int64_t batch, nodes, width;
  bool is_bfloat16 = false;
  SamplingMode mode = SamplingMode::kPointMass;
  float temperature = 1;
  int64_t top_k = 0;
  double top_p = 1;
  int64_t padding = 0;      // elements between rows
  bool few_values = false;  // many equal logits
};

class VerifyCase {
 public:
  VerifyCase(const VerifyShape& shape, unsigned seed) : shape_(shape), random_(seed * 101 + 3) {
    make_logits();
    make_trees();
    make_q();
    path.assign(shape.batch * (shape.nodes - 1), -77);
    accepted.assign(shape.batch, -77);
    next_tokens.assign(shape.batch, -77);
    point();
  }
  VerifyCase(const VerifyCase&) = delete;
  VerifyCase& operator=(const VerifyCase&) = delete;

  VerifyCall call;
  std::vector<int64_t> tokens, parents, path, accepted, next_tokens;
  std::vector<double> uniforms;
  std::vector<float> q;

  bool greedy_is_right() const {
    return all_are_right([this](int64_t b, std::vector<int64_t>* steps) {
      return walk_by_token(b, steps, [&](int64_t node) { return largest(b, node); });
    });
  }

  bool sampling_is_right() const {
    return all_are_right([this](int64_t b, std::vector<int64_t>* steps) {
      if (shape_.mode != SamplingMode::kPointMass) return walk_by_siblings(b, steps);
      return walk_by_token(b, steps, [&](int64_t node) {
        return draw(distribution(b, node), uniforms[b * shape_.nodes + node]);
      });
    });
  }

  int64_t total_accepted() const {
    int64_t total = 0;
    for (const int64_t count : accepted) total += count;
    return total;
  }

 private:
  using Weights = std::vector<double>;

  int64_t stride() const { return shape_.width + shape_.padding; }
  int64_t rows() const { return shape_.batch * shape_.nodes; }
  float logit(int64_t b, int64_t node, int64_t i) const {
    const int64_t place = (b * shape_.nodes + node) * stride() + i;
    if (!shape_.is_bfloat16) return single_[place];
    const uint32_t bits = static_cast<uint32_t>(half_[place]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  void make_logits() {
    std::normal_distribution<float> normal(0, 2);
    const auto size = static_cast<size_t>(rows() * stride() - shape_.padding);
    (shape_.is_bfloat16 ? half_.resize(size) : single_.resize(size));
    for (size_t i = 0; i < size; ++i) {
      float value = normal(random_);
      if (shape_.few_values) value = std::round(value);
      if (random_() % 16 == 0) value = -INFINITY;
      if (random_() % 300 == 0) value = NAN;
      // One token of a row is likely, and equal to another one, so that paths are long.
      const auto column = static_cast<int64_t>(i) % stride();
      const int64_t favourite = static_cast<int64_t>(i) / stride() * 311 % shape_.width;
      if (column == favourite || column == (favourite + 40) % shape_.width) value = 9;
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      if (shape_.is_bfloat16) {
        half_[i] = static_cast<uint16_t>(bits >> 16);
      } else {
        single_[i] = value;
      }
    }
  }

  void make_trees() {
    for (int64_t b = 0; b < shape_.batch; ++b) {
      const auto row = random_parents(shape_.nodes, 0.1, random_);
      parents.insert(parents.end(), row.begin(), row.end());
      std::set<std::pair<int64_t, int64_t>> used;
      for (int64_t n = 0; n < shape_.nodes; ++n) {
        int64_t token = random_() % shape_.width;
        if (row[n] >= 0 && random_() % 4 != 0) token = largest(b, row[n]);
        if (shape_.mode == SamplingMode::kWithoutReplacement && row[n] >= 0) {
          while (!used.insert({row[n], token}).second) token = (token + 1) % shape_.width;
        }
        tokens.push_back(token);
        uniforms.push_back(std::uniform_real_distribution<double>(0, 1)(random_));
      }
    }
  }

  // Somewhat like p, and nowhere 0.
  void make_q() {
    if (shape_.mode == SamplingMode::kPointMass) return;
    std::normal_distribution<double> normal(0, 1);
    q.resize(rows() * stride() - shape_.padding, NAN);
    for (int64_t row = 0; row < rows(); ++row) {
      Weights values(shape_.width);
      double sum = 0;
      for (int64_t i = 0; i < shape_.width; ++i) {
        const double z = logit(row / shape_.nodes, row % shape_.nodes, i);
        sum += values[i] = std::exp((std::isfinite(z) ? 0.7 * z : -3) + normal(random_));
      }
      for (int64_t i = 0; i < shape_.width; ++i) {
        q[row * stride() + i] = static_cast<float>(values[i] / sum);
      }
    }
  }

  void point() {
    call.batch = shape_.batch;
    call.nodes = shape_.nodes;
    call.width = shape_.width;
    call.logits = shape_.is_bfloat16 ? static_cast<const void*>(half_.data()) : single_.data();
    call.batch_stride = call.q_batch_stride = shape_.nodes * stride();
    call.node_stride = call.q_node_stride = stride();
    call.is_bfloat16 = shape_.is_bfloat16;
    call.tokens = tokens.data();
    call.parents = parents.data();
    call.mode = shape_.mode;
    call.temperature = shape_.temperature;
    call.top_k = shape_.top_k;
    call.top_p = shape_.top_p;
    call.uniforms = uniforms.data();
    call.q = q.empty() ? nullptr : q.data();
    call.q_nodes = shape_.nodes;
    call.path = path.data();
    call.accepted = accepted.data();
    call.next_tokens = next_tokens.data();
  }

  int64_t largest(int64_t b, int64_t node) const {
    int64_t best = 0;
    for (int64_t i = 0; i < shape_.width; ++i) {
      const float present = logit(b, node, best);
      if (logit(b, node, i) > (std::isnan(present) ? -INFINITY : present)) best = i;
    }
    return best;
  }

  // p of a row: temperature, top-k, top-p.
  Weights distribution(int64_t b, int64_t node) const {
    std::vector<std::pair<float, int64_t>> order;  // of scores, and of equal ones the last first
    for (int64_t i = 0; i < shape_.width; ++i) {
      const float z = logit(b, node, i);
      order.emplace_back(std::isnan(z) ? -INFINITY : z / shape_.temperature, i);
    }
    std::sort(order.rbegin(), order.rend());
    const float max = order[0].first;
    size_t count = order.size();
    if (shape_.top_k > 0 && shape_.top_k < shape_.width) {
      const float kth = order[shape_.top_k - 1].first;
      while (order[count - 1].first < kth) --count;
    }
    double total = 0;
    for (size_t i = 0; i < count; ++i) total += std::exp(double{order[i].first} - max);
    Weights p(shape_.width);
    double head = 0;
    for (size_t i = 0; i < count && (i == 0 || head < shape_.top_p * total); ++i) {
      head += p[order[i].second] = std::exp(double{order[i].first} - max);
    }
    for (double& value : p) value /= head;
    return p;
  }

  static int64_t draw(const Weights& weights, double uniform) {
    double total = 0;
    for (const double weight : weights) total += weight;
    double target = uniform * total;
    int64_t last = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      if (weights[i] <= 0) continue;
      last = static_cast<int64_t>(i);
      if (target < weights[i]) break;
      target -= weights[i];
    }
    return last;
  }

  std::vector<int64_t> children(int64_t b, int64_t node) const {
    std::vector<int64_t> result;
    for (int64_t n = 1; n < shape_.nodes; ++n) {
      if (parents[b * shape_.nodes + n] == node) result.push_back(n);
    }
    return result;
  }

  template <typename Choose>
  int64_t walk_by_token(int64_t b, std::vector<int64_t>* steps, Choose choose) const {
    int64_t node = 0;
    for (;;) {
      const int64_t token = choose(node);
      const auto family = children(b, node);
      const auto child = std::find_if(family.begin(), family.end(), [&](int64_t n) {
        return tokens[b * shape_.nodes + n] == token;
      });
      if (child == family.end()) return token;
      steps->push_back(node = *child);
    }
  }

  int64_t walk_by_siblings(int64_t b, std::vector<int64_t>* steps) const {
    int64_t node = 0;
    for (;;) {
      Weights r = distribution(b, node);
      const float* row = q.data() + (b * shape_.nodes + node) * stride();
      Weights rest(row, row + shape_.width);
      int64_t taken = -1;
      for (const int64_t child : children(b, node)) {
        const int64_t place = b * shape_.nodes + child;
        const int64_t token = tokens[place];
        if (uniforms[place] * rest[token] < r[token]) {
          taken = child;
          break;
        }
        double sum = 0;
        for (int64_t i = 0; i < shape_.width; ++i) sum += r[i] = std::max(0.0, r[i] - rest[i]);
        for (double& value : r) value /= sum;
        if (shape_.mode == SamplingMode::kWithReplacement) continue;
        rest[token] = 0;
        double left = 0;
        for (const double value : rest) left += value;
        for (double& value : rest) value /= left;
      }
      if (taken < 0) return draw(r, uniforms[b * shape_.nodes]);
      steps->push_back(node = taken);
    }
  }

  template <typename Walk>
  bool all_are_right(Walk walk) const {
    bool right = true;
    for (int64_t b = 0; b < shape_.batch; ++b) {
      std::vector<int64_t> steps;
      const int64_t token = walk(b, &steps);
      const auto count = static_cast<int64_t>(steps.size());
      steps.resize(shape_.nodes - 1, -1);
      const bool same =
          std::equal(steps.begin(), steps.end(), path.begin() + b * (shape_.nodes - 1));
      if (same && accepted[b] == count && next_tokens[b] == token) continue;
      std::printf("sequence %ld: found %ld accepted and token %ld, expected %ld and %ld\n",
                  static_cast<long>(b), static_cast<long>(accepted[b]),
                  static_cast<long>(next_tokens[b]), static_cast<long>(count),
                  static_cast<long>(token));
      right = false;
    }
    return right;
  }

  VerifyShape shape_;
  std::mt19937 random_;
  std::vector<float> single_;
  std::vector<uint16_t> half_;
};

}  // namespace speculators
