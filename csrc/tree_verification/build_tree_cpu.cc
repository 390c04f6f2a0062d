// The CPU kernel of build_tree: sort, keep, sort again, for one sequence after the other. A tree
// has tens of nodes and hundreds of candidates, so this is microseconds of integers.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "csrc/tree_verification/build_tree.h"

namespace speculators {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// What is kept of the candidates while one tree is built; made once for many trees.
struct Candidates {
  std::vector<float> scores;     // never more than the parent's
  std::vector<int64_t> depths;   // of children of the root 1
  std::vector<int64_t> order;    // by score, then by index
  std::vector<int64_t> node_of;  // the node that a candidate became, or -1
};

void order_candidates(const TreeBuildCall& call, int64_t sequence, Candidates* of) {
  const auto size = static_cast<size_t>(call.candidates);
  const int64_t* parents = call.parents + sequence * call.candidates;
  const float* scores = call.scores + sequence * call.candidates;
  of->scores.resize(size);
  of->depths.resize(size);
  of->order.resize(size);
  for (int64_t i = 0; i < call.candidates; ++i) {
    const float score = std::isnan(scores[i]) ? kNone : scores[i];
    const bool from_root = parents[i] < 0;
    of->scores[i] = from_root ? score : std::min(score, of->scores[parents[i]]);
    of->depths[i] = from_root ? 1 : of->depths[parents[i]] + 1;
  }
  std::iota(of->order.begin(), of->order.end(), 0);
  std::stable_sort(of->order.begin(), of->order.end(),
                   [of](int64_t a, int64_t b) { return of->scores[a] > of->scores[b]; });
}

// Keeps the first `most` that are candidates at all, and sorts those by depth.
void keep_best(int64_t most, Candidates* of) {
  auto& order = of->order;
  if (static_cast<int64_t>(order.size()) > most) order.resize(static_cast<size_t>(most));
  while (!order.empty() && of->scores[order.back()] == kNone) order.pop_back();
  std::stable_sort(order.begin(), order.end(),
                   [of](int64_t a, int64_t b) { return of->depths[a] < of->depths[b]; });
}

void write_node(const TreeBuildCall& call, int64_t sequence, int64_t node, int64_t candidate,
                int64_t parent, int64_t depth) {
  const int64_t place = sequence * call.nodes + node;
  const int64_t words = mask_words(call.nodes);
  const bool is_drafted = candidate >= 0;
  call.node_tokens[place] =
      is_drafted ? call.tokens[sequence * call.candidates + candidate] : call.root_tokens[sequence];
  call.node_parents[place] = parent;
  call.node_depths[place] = depth;
  call.node_positions[place] = call.root_positions[sequence] + std::max<int64_t>(depth, 0);
  call.node_candidates[place] = candidate;
  call.first_children[place] = -1;
  call.next_siblings[place] = -1;
  uint64_t* const mask = call.ancestors + place * words;
  if (parent < 0) {
    std::fill(mask, mask + words, 0);
  } else {
    std::copy_n(mask + (parent - node) * words, words, mask);
  }
  mask[node / 64] |= uint64_t{1} << (node % 64);
}

// From the last node to the first, so that a parent's list begins with its best child.
void link(const TreeBuildCall& call, int64_t sequence, int64_t count) {
  const int64_t first = sequence * call.nodes;
  for (int64_t node = count - 1; node > 0; --node) {
    int64_t* const head = call.first_children + first + call.node_parents[first + node];
    call.next_siblings[first + node] = *head;
    *head = node;
  }
}

void build(const TreeBuildCall& call, int64_t sequence, Candidates* of) {
  order_candidates(call, sequence, of);
  keep_best(call.nodes - 1, of);
  of->node_of.assign(static_cast<size_t>(call.candidates), -1);
  write_node(call, sequence, 0, -1, -1, 0);
  int64_t node = 1;
  for (const int64_t candidate : of->order) {
    const int64_t parent = call.parents[sequence * call.candidates + candidate];
    write_node(call, sequence, node, candidate, parent < 0 ? 0 : of->node_of[parent],
               of->depths[candidate]);
    of->node_of[candidate] = node++;
  }
  link(call, sequence, node);
  for (; node < call.nodes; ++node) write_node(call, sequence, node, -1, -1, -1);
}

}  // namespace

int64_t first_parent_out_of_range(const TreeBuildCall& call) {
  for (int64_t place = 0; place < call.batch * call.candidates; ++place) {
    const int64_t parent = call.parents[place];
    if (parent < -1 || parent >= place % call.candidates) return place;
  }
  return -1;
}

void build_tree_cpu(const TreeBuildCall& call, int64_t begin, int64_t end) {
  Candidates candidates;
  for (int64_t sequence = begin; sequence < end; ++sequence) build(call, sequence, &candidates);
}

}  // namespace speculators
