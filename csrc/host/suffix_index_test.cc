// The index against a naive one, which keeps its tokens in a list and looks at all of them.
#include "csrc/host/suffix_index.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "csrc/common/testing.h"

namespace {

using speculators::SuffixDraft;
using speculators::SuffixDraftLimits;
using speculators::SuffixIndex;
using Tokens = std::vector<int64_t>;

// Every entry ever added with the context that it had; the newest `capacity` count.
class Naive {
 public:
  Naive(int64_t capacity, int64_t max_match) : capacity_(capacity), max_match_(max_match) {}

  void extend(const Tokens& tokens) { text_.insert(text_.end(), tokens.begin(), tokens.end()); }
  void end_sequence() {
    if (!text_.empty() && text_.back() != -1) text_.push_back(-1);
  }

  // How often a token of the window stands after the pattern.
  int64_t count(std::span<const int64_t> pattern) const {
    return static_cast<int64_t>(places(pattern).size());
  }

  std::vector<int64_t> places(std::span<const int64_t> pattern) const {
    std::vector<int64_t> found;
    const auto length = static_cast<int64_t>(pattern.size());
    for (int64_t place = std::max(begin(), length); place < size(); ++place) {
      if (text_[place] == -1) continue;
      if (std::equal(pattern.begin(), pattern.end(), text_.begin() + (place - length))) {
        found.push_back(place);
      }
    }
    return found;
  }

  int64_t kept() const {
    return static_cast<int64_t>(
        std::count_if(text_.begin() + begin(), text_.end(), [](int64_t t) { return t != -1; }));
  }

  std::pair<int32_t, int64_t> longest_match(const Tokens& context) const {
    std::pair<int32_t, int64_t> found{0, 0};
    const auto most = std::min(max_match_, static_cast<int64_t>(context.size()));
    for (int64_t length = 1; length <= most; ++length) {
      const int64_t n = count(std::span(context).last(length));
      if (n > 0) found = {static_cast<int32_t>(length), n};
    }
    return found;
  }

  Tokens own_context() const {
    auto from = text_.end();
    while (from != text_.begin() && *std::prev(from) != -1 && text_.end() - from < max_match_) {
      --from;
    }
    return {from, text_.end()};
  }

  // The token that follows an occurrence after `path`; -1 if none.
  int64_t after(int64_t place, const Tokens& path, bool own) const {
    for (size_t i = 0; i < path.size(); ++i) {
      if (at(place + static_cast<int64_t>(i), path, own) != path[i]) return -1;
    }
    return at(place + static_cast<int64_t>(path.size()), path, own);
  }

  const Tokens& text() const { return text_; }

 private:
  int64_t size() const { return static_cast<int64_t>(text_.size()); }
  // The index begins with the end of a sequence, which counts as an entry like any other.
  int64_t begin() const { return std::max<int64_t>(0, size() - capacity_); }
  int64_t at(int64_t place, const Tokens& path, bool own) const {
    if (place < size()) return text_[place];
    return own && place - size() < static_cast<int64_t>(path.size()) ? path[place - size()] : -1;
  }

  int64_t capacity_;
  int64_t max_match_;
  Tokens text_;
};

struct NaiveNode {
  Tokens path;
  int32_t parent;
  double probability;
  int64_t last_place;
};

// The draft of one match length, from counts of whole paths, without any of the index's order.
SuffixDraft naive_growth(const Naive& naive, const Tokens& pattern, int64_t most,
                         const SuffixDraftLimits& limits, bool own) {
  SuffixDraft draft;
  draft.match_length = static_cast<int32_t>(pattern.size());
  const std::vector<int64_t> places = naive.places(pattern);
  std::vector<NaiveNode> candidates;
  const auto expand = [&](const Tokens& path, int32_t number, double probability) {
    std::map<int64_t, std::pair<int64_t, int64_t>> children;  // token to count and last place
    int64_t total = 0;
    for (const int64_t place : places) {
      const int64_t token = naive.after(place, path, own);
      if (token == -1) continue;
      ++total;
      ++children[token].first;
      children[token].second = place;
    }
    std::vector<NaiveNode> found;
    for (const auto& [token, child] : children) {
      Tokens longer = path;
      longer.push_back(token);
      const double n = static_cast<double>(total) +
                       limits.doubt / static_cast<double>(pattern.size() + path.size());
      found.push_back(
          {longer, number, probability * (static_cast<double>(child.first) / n), child.second});
    }
    if (!limits.tree && !found.empty()) {
      found = {*std::max_element(found.begin(), found.end(), [](const auto& a, const auto& b) {
        return std::pair(a.probability, a.last_place) < std::pair(b.probability, b.last_place);
      })};
    }
    for (const NaiveNode& node : found) {
      if (node.probability >= limits.min_probability) candidates.push_back(node);
    }
  };
  expand({}, -1, 1.0);
  while (!candidates.empty() && static_cast<int64_t>(draft.tokens.size()) < most) {
    const auto best = std::max_element(
        candidates.begin(), candidates.end(), [](const NaiveNode& a, const NaiveNode& b) {
          const auto key = [](const NaiveNode& node) {
            return std::tuple(node.probability, -static_cast<int64_t>(node.path.size()),
                              node.last_place);
          };
          return key(a) < key(b);
        });
    const NaiveNode node = *best;
    candidates.erase(best);
    draft.tokens.push_back(static_cast<int32_t>(node.path.back()));
    draft.parents.push_back(node.parent);
    draft.probabilities.push_back(node.probability);
    draft.score += node.probability;
    expand(node.path, static_cast<int32_t>(draft.tokens.size()) - 1, node.probability);
  }
  return draft;
}

SuffixDraft naive_draft(const Naive& naive, const Tokens& context, const SuffixDraftLimits& limits,
                        bool own) {
  SuffixDraft best;
  for (int32_t length = naive.longest_match(context).first; length >= limits.min_match; --length) {
    const Tokens pattern(context.end() - length, context.end());
    const auto most =
        std::min<int64_t>(limits.max_tokens, static_cast<int64_t>(limits.factor * length));
    SuffixDraft draft = naive_growth(naive, pattern, most, limits, own);
    if (draft.score > best.score) best = draft;
  }
  return best;
}

void expect_same(const SuffixDraft& found, const SuffixDraft& expected) {
  EXPECT_EQ(found.tokens, expected.tokens);
  EXPECT_EQ(found.parents, expected.parents);
  EXPECT_EQ(found.probabilities, expected.probabilities);
  EXPECT_EQ(found.score, expected.score);
  EXPECT_EQ(found.match_length, expected.match_length);
}

Tokens random_tokens(std::mt19937& random, int64_t length, int64_t alphabet) {
  Tokens tokens(static_cast<size_t>(length));
  for (int64_t& token : tokens) token = static_cast<int64_t>(random() % alphabet);
  return tokens;
}

SuffixDraftLimits random_limits(std::mt19937& random) {
  SuffixDraftLimits limits;
  limits.max_tokens = static_cast<int32_t>(1 + random() % 9);
  limits.factor = 0.5 + static_cast<double>(random() % 8) / 2.0;
  limits.min_match = static_cast<int32_t>(1 + random() % 3);
  limits.min_probability = random() % 2 ? 0.0 : 0.2;
  limits.doubt = random() % 2 ? 0.0 : 0.75;
  limits.max_occurrences = 1000;
  limits.tree = random() % 2 == 0;
  return limits;
}

struct Shape {
  int64_t alphabet;
  int64_t capacity;
  int64_t max_match;
};
const std::vector<Shape> kShapes = {{1, 9, 4},  {2, 50, 3}, {2, 1000, 8},
                                    {3, 40, 5}, {4, 1, 2},  {5, 300, 1}};

TEST(matches_and_drafts_are_those_of_a_naive_search) {
  int drafted = 0;
  int forgotten = 0;
  for (const Shape& shape : kShapes) {
    std::mt19937 random(static_cast<uint32_t>(shape.alphabet * 100 + shape.capacity));
    SuffixIndex index(shape.capacity, shape.max_match);
    Naive naive(shape.capacity, shape.max_match);
    for (int step = 0; step < 80; ++step) {
      if (random() % 6 == 0) {
        index.end_sequence();
        naive.end_sequence();
      }
      const Tokens tokens = random_tokens(random, random() % 12, shape.alphabet);
      index.extend(tokens);
      naive.extend(tokens);
      EXPECT_EQ(index.size(), naive.kept());
      forgotten += naive.kept() < static_cast<int64_t>(naive.text().size()) / 2;
      const Tokens context =
          random_tokens(random, random() % (shape.max_match + 3), shape.alphabet);
      EXPECT_EQ(index.longest_match(context), naive.longest_match(context));
      const SuffixDraftLimits limits = random_limits(random);
      const SuffixDraft draft = index.propose(context, limits);
      expect_same(draft, naive_draft(naive, context, limits, false));
      expect_same(index.propose(limits), naive_draft(naive, naive.own_context(), limits, true));
      drafted += draft.tokens.size() > 2;
    }
  }
  EXPECT_TRUE(drafted > 50);
  EXPECT_TRUE(forgotten > 50);
}

TEST(how_tokens_are_cut_into_calls_does_not_matter) {
  std::mt19937 random(7);
  const Tokens tokens = random_tokens(random, 400, 3);
  SuffixIndex whole(100, 6);
  SuffixIndex single(100, 6);
  whole.extend(tokens);
  for (const int64_t token : tokens) single.extend(std::span(&token, 1));
  SuffixDraftLimits limits{.max_tokens = 20, .factor = 4.0, .max_occurrences = 100, .tree = true};
  for (int64_t length = 0; length < 9; ++length) {
    const Tokens context = random_tokens(random, length, 3);
    EXPECT_EQ(whole.longest_match(context), single.longest_match(context));
    expect_same(whole.propose(context, limits), single.propose(context, limits));
  }
  expect_same(whole.propose(limits), single.propose(limits));
}

TEST(memory_never_exceeds_its_bound) {
  for (const Shape& shape : kShapes) {
    std::mt19937 random(3);
    SuffixIndex index(shape.capacity, shape.max_match);
    EXPECT_EQ(index.max_bytes(), 4 * (2 * (shape.capacity + shape.max_match) + 1 + shape.capacity));
    for (int step = 0; step < 200; ++step) {
      index.extend(random_tokens(random, random() % 40, shape.alphabet));
      if (random() % 4 == 0) index.end_sequence();
      EXPECT_TRUE(index.bytes() <= index.max_bytes());
      EXPECT_TRUE(index.size() <= shape.capacity);
    }
  }
  EXPECT_TRUE(SuffixIndex(1 << 29, 8).bytes() < 100);  // nothing is taken before it is needed
}

TEST(a_draft_is_what_followed_most_often) {
  SuffixIndex index(100, 8);
  index.extend(Tokens{1, 2, 3, 4});
  index.end_sequence();
  index.extend(Tokens{1, 2, 3, 5});
  index.end_sequence();
  index.extend(Tokens{1, 2, 6, 7});
  index.end_sequence();
  SuffixDraftLimits limits{.max_tokens = 9, .factor = 9.0, .max_occurrences = 100, .tree = true};
  const SuffixDraft tree = index.propose(Tokens{9, 1, 2}, limits);
  EXPECT_EQ(tree.tokens, (std::vector<int32_t>{3, 6, 7, 5, 4}));
  EXPECT_EQ(tree.parents, (std::vector<int32_t>{-1, -1, 1, 0, 0}));
  EXPECT_NEAR(tree.score, 2.0 / 3 + 1.0 / 3 * 4, 1e-12);
  EXPECT_EQ(tree.match_length, 2);
  limits.tree = false;
  limits.doubt = 1.0;
  const SuffixDraft chain = index.propose(Tokens{9, 1, 2}, limits);
  EXPECT_EQ(chain.tokens, (std::vector<int32_t>{3, 5}));
  EXPECT_NEAR(chain.probabilities[0], 2 / 3.5, 1e-12);
  EXPECT_NEAR(chain.probabilities[1], 2 / 3.5 * (1 / (2 + 1 / 3.0)), 1e-12);
}

TEST(a_repetition_goes_on_beyond_the_end) {
  SuffixIndex index(100, 8);
  index.extend(Tokens{9, 1, 2, 1, 2, 1});
  const SuffixDraftLimits limits{.max_tokens = 6, .factor = 9.0, .max_occurrences = 100};
  EXPECT_EQ(index.propose(limits).tokens, (std::vector<int32_t>{2, 1, 2, 1, 2, 1}));
  EXPECT_EQ(index.propose(Tokens{9, 1}, limits).tokens, (std::vector<int32_t>{2, 1, 2, 1}));
}

TEST(of_many_occurrences_some_are_looked_at) {
  SuffixIndex index(10000, 4);
  for (int64_t i = 0; i < 3000; ++i) index.extend(Tokens{1, i % 3 == 0 ? 2 : 3});
  SuffixDraftLimits limits{.max_tokens = 1, .max_occurrences = 200};
  const SuffixDraft draft = index.propose(Tokens{8, 1}, limits);
  EXPECT_EQ(draft.tokens, (std::vector<int32_t>{3}));
  EXPECT_NEAR(draft.score, 2.0 / 3, 0.05);
}

TEST(what_is_wrong_is_named) {
  EXPECT_THROWS(SuffixIndex(0, 3), "capacity is 0, expected between 1 and");
  EXPECT_THROWS(SuffixIndex(3, 0), "max_match is 0");
  EXPECT_THROWS(SuffixIndex((int64_t{1} << 29) + 1, 3), "capacity is 536870913");
  SuffixIndex index(9, 3);
  EXPECT_THROWS(index.extend(Tokens{1, -1}), "token 1 is -1, expected an id between 0 and");
  EXPECT_THROWS(index.extend(Tokens{int64_t{1} << 31}), "token 0 is 2147483648");
  EXPECT_EQ(index.size(), 0);
  EXPECT_THROWS(index.longest_match(Tokens{-4}), "token 0 is -4");
  const SuffixDraftLimits good{.max_tokens = 1};
  const double nan = std::numeric_limits<double>::quiet_NaN();
  auto limits = good;
  limits.max_tokens = 0;
  EXPECT_THROWS(index.propose(limits), "max_tokens is 0");
  limits = good;
  limits.min_match = 0;
  EXPECT_THROWS(index.propose(limits), "min_match is 0");
  limits = good;
  limits.max_occurrences = 0;
  EXPECT_THROWS(index.propose(limits), "max_occurrences is 0");
  limits = good;
  limits.factor = nan;
  EXPECT_THROWS(index.propose(limits), "factor is nan");
  limits = good;
  limits.doubt = -1.0;
  EXPECT_THROWS(index.propose(limits), "doubt is -1");
  limits = good;
  limits.min_probability = 1.5;
  EXPECT_THROWS(index.propose(Tokens{1}, limits), "min_probability is 1.5");
}

}  // namespace

int main(int argc, char** argv) { return speculators::testing::run_all_tests(argc, argv); }
