#include "csrc/host/suffix_index.h"

#include <algorithm>
#include <cmath>
#include <queue>
#include <stdexcept>
#include <string>
#include <tuple>

namespace speculators {
namespace {

constexpr int32_t kEnd = -1;  // between sequences; smaller than every token
constexpr int64_t kMaxToken = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxCapacity = int64_t{1} << 29;  // places are int32, with room for twice as many
constexpr int64_t kMaxMatch = int64_t{1} << 16;

void check_range(const char* name, int64_t value, int64_t most) {
  if (value < 1 || value > most) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) +
                                ", expected between 1 and " + std::to_string(most));
  }
}

void check_tokens(std::span<const int64_t> tokens) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] > kMaxToken) {
      throw std::invalid_argument("token " + std::to_string(i) + " is " +
                                  std::to_string(tokens[i]) + ", expected an id between 0 and " +
                                  std::to_string(kMaxToken));
    }
  }
}

void check_limits(const SuffixDraftLimits& limits) {
  check_range("max_tokens", limits.max_tokens, kMaxMatch);
  check_range("min_match", limits.min_match, kMaxMatch);
  check_range("max_occurrences", limits.max_occurrences, kMaxToken);
  // Negated, so that NaN is refused, too.
  if (!(limits.factor > 0.0)) {
    throw std::invalid_argument("factor is " + std::to_string(limits.factor) +
                                ", expected more than 0");
  }
  if (!(limits.doubt >= 0.0)) {
    throw std::invalid_argument("doubt is " + std::to_string(limits.doubt) +
                                ", expected at least 0");
  }
  if (!(limits.min_probability >= 0.0 && limits.min_probability <= 1.0)) {
    throw std::invalid_argument("min_probability is " + std::to_string(limits.min_probability) +
                                ", expected between 0 and 1");
  }
}

// As std::vector grows by itself, but never beyond `most`.
void reserve_for(std::vector<int32_t>& values, int64_t size, int64_t most) {
  const auto capacity = static_cast<int64_t>(values.capacity());
  if (size > capacity) values.reserve(std::min(most, std::max(size, 2 * capacity)));
}

}  // namespace

SuffixIndex::SuffixIndex(int64_t capacity, int64_t max_match)
    : capacity_(capacity), max_match_(max_match) {
  check_range("capacity", capacity, kMaxCapacity);
  check_range("max_match", max_match, kMaxMatch);
  text_.push_back(kEnd);
}

int64_t SuffixIndex::bytes() const {
  return static_cast<int64_t>(sizeof(int32_t) * (text_.capacity() + order_.capacity()));
}

int64_t SuffixIndex::max_bytes() const {
  return static_cast<int64_t>(sizeof(int32_t)) * (text_limit() + capacity_);
}

void SuffixIndex::extend(std::span<const int64_t> tokens) {
  check_tokens(tokens);
  while (!tokens.empty()) {
    const size_t part = std::min(tokens.size(), static_cast<size_t>(capacity_));
    append(tokens.first(part));
    tokens = tokens.subspan(part);
  }
}

void SuffixIndex::append(std::span<const int64_t> tokens) {
  make_room(static_cast<int64_t>(tokens.size()));
  std::vector<int32_t> places;
  places.reserve(tokens.size());
  for (const int64_t token : tokens) {
    places.push_back(static_cast<int32_t>(text_.size()));
    text_.push_back(static_cast<int32_t>(token));
  }
  forget_old_places();
  insert_places(std::move(places));
}

void SuffixIndex::end_sequence() {
  if (text_.back() == kEnd) return;
  make_room(1);
  text_.push_back(kEnd);
  forget_old_places();
}

// Drops the front of the text where so many more entries would exceed the limit. Twice as much as
// is needed may stand there, so that it happens rarely.
void SuffixIndex::make_room(int64_t entries) {
  const auto size = static_cast<int64_t>(text_.size());
  if (size + entries > text_limit()) {
    const int64_t dropped = size - (capacity_ + max_match_);
    text_.erase(text_.begin(), text_.begin() + dropped);
    for (int32_t& place : order_) place -= static_cast<int32_t>(dropped);
  }
  reserve_for(text_, static_cast<int64_t>(text_.size()) + entries, text_limit());
}

void SuffixIndex::forget_old_places() {
  const auto begin = static_cast<int64_t>(text_.size()) - capacity_;
  if (begin > 1) std::erase_if(order_, [&](int32_t place) { return place < begin; });
}

bool SuffixIndex::precedes(int32_t a, int32_t b) const {
  const int32_t* left = text_.data() + a;
  const int32_t* right = text_.data() + b;
  for (int64_t i = 0; i < max_match_; ++i) {
    const int32_t x = *--left;
    const int32_t y = *--right;
    if (x != y) return x < y;
    if (x == kEnd) break;  // both sequences begin here; what stands before is not theirs
  }
  return a < b;
}

void SuffixIndex::insert_places(std::vector<int32_t> places) {
  const auto less = [this](int32_t a, int32_t b) { return precedes(a, b); };
  std::sort(places.begin(), places.end(), less);
  const auto old_size = static_cast<int64_t>(order_.size());
  const auto added = static_cast<int64_t>(places.size());
  reserve_for(order_, old_size + added, capacity_);
  order_.resize(static_cast<size_t>(old_size + added));
  auto end = order_.begin() + old_size;
  for (int64_t i = added; i-- > 0;) {  // from the back, so that each block moves once
    const auto at = std::upper_bound(order_.begin(), end, places[static_cast<size_t>(i)], less);
    std::move_backward(at, end, end + i + 1);
    *(at + i) = places[static_cast<size_t>(i)];
    end = at;
  }
}

std::vector<int32_t> SuffixIndex::last_of(std::span<const int64_t> context) const {
  const size_t length = std::min(context.size(), static_cast<size_t>(max_match_));
  const auto last = context.last(length);
  check_tokens(last);
  return {last.begin(), last.end()};
}

// The ranges of order_ that the last 1, 2, ... tokens of the context have, until one is empty.
std::vector<SuffixIndex::Range> SuffixIndex::matches(std::span<const int32_t> context) const {
  std::vector<Range> found;
  Range range{0, size()};
  for (size_t length = 1; length <= context.size(); ++length) {
    const auto token_before = [&](int32_t place) {
      return text_[static_cast<size_t>(place) - length];
    };
    const auto begin = order_.begin() + range.begin;
    const auto end = order_.begin() + range.end;
    const int32_t token = context[context.size() - length];
    const auto low = std::lower_bound(
        begin, end, token, [&](int32_t place, int32_t t) { return token_before(place) < t; });
    const auto high = std::upper_bound(
        low, end, token, [&](int32_t t, int32_t place) { return t < token_before(place); });
    if (low == high) break;
    range = {low - order_.begin(), high - order_.begin()};
    found.push_back(range);
  }
  return found;
}

std::pair<int32_t, int64_t> SuffixIndex::longest_match(std::span<const int64_t> context) const {
  const std::vector<Range> found = matches(last_of(context));
  if (found.empty()) return {0, 0};
  return {static_cast<int32_t>(found.size()), found.back().size()};
}

// One draft while it grows. The occurrences of a node are a part of `occurrences_`, and those of
// its children are parts of that part, so that a tree needs no more memory than its root.
class SuffixIndex::Growth {
 public:
  Growth(const SuffixIndex& index, Range range, int32_t match_length, int64_t most_tokens, bool own,
         const SuffixDraftLimits& limits)
      : index_(index), limits_(limits), own_(own), most_tokens_(most_tokens) {
    draft_.match_length = match_length;
    const int64_t step = (range.size() + limits.max_occurrences - 1) / limits.max_occurrences;
    for (int64_t i = range.begin; i < range.end; i += step) {
      occurrences_.push_back({kEnd, index.order_[static_cast<size_t>(i)]});
    }
  }

  SuffixDraft run() {
    expand({.probability = 1.0, .end = occurrences_.size()}, -1);
    while (!candidates_.empty() && static_cast<int64_t>(draft_.tokens.size()) < most_tokens_) {
      const Node node = candidates_.top();
      candidates_.pop();
      const auto number = static_cast<int32_t>(draft_.tokens.size());
      draft_.tokens.push_back(node.token);
      draft_.parents.push_back(node.parent);
      draft_.probabilities.push_back(node.probability);
      draft_.score += node.probability;
      expand(node, number);
    }
    return std::move(draft_);
  }

 private:
  struct Occurrence {
    int32_t token;  // that comes next, kEnd if none does
    int32_t place;
    bool operator<(const Occurrence& other) const {
      return std::tie(token, place) < std::tie(other.token, other.place);
    }
  };
  struct Node {
    int32_t token = kEnd;
    int32_t parent = -1;
    int32_t depth = 0;
    int32_t last_place = 0;
    double probability = 0.0;
    size_t begin = 0;  // of its occurrences
    size_t end = 0;
    bool operator<(const Node& other) const {  // drafted later
      return std::tuple(probability, -depth, last_place) <
             std::tuple(other.probability, -other.depth, other.last_place);
    }
  };

  // Makes candidates of the children of a node.
  void expand(const Node& node, int32_t number) {
    const auto begin = occurrences_.begin() + static_cast<int64_t>(node.begin);
    const auto end = occurrences_.begin() + static_cast<int64_t>(node.end);
    const std::vector<int32_t> path = path_to(number);
    for (auto it = begin; it != end; ++it) it->token = token_after(*it, path);
    std::sort(begin, end);
    const auto first =
        std::find_if(begin, end, [](const Occurrence& o) { return o.token != kEnd; });
    const double total =
        static_cast<double>(end - first) + limits_.doubt / (draft_.match_length + node.depth);
    Node best;
    for (auto run = first; run != end;) {
      const int32_t token = run->token;
      const auto run_end =
          std::find_if(run, end, [&](const Occurrence& o) { return o.token != token; });
      Node child;
      child.token = token;
      child.parent = number;
      child.depth = node.depth + 1;
      child.last_place = std::prev(run_end)->place;
      child.probability = node.probability * (static_cast<double>(run_end - run) / total);
      child.begin = static_cast<size_t>(run - occurrences_.begin());
      child.end = static_cast<size_t>(run_end - occurrences_.begin());
      if (limits_.tree) {
        add(child);
      } else if (best < child) {
        best = child;
      }
      run = run_end;
    }
    if (best.token != kEnd) add(best);
  }

  void add(const Node& node) {
    if (node.probability >= limits_.min_probability) candidates_.push(node);
  }

  // The drafted tokens from the root to one of them, itself included.
  std::vector<int32_t> path_to(int32_t number) const {
    std::vector<int32_t> path;
    for (; number >= 0; number = draft_.parents[static_cast<size_t>(number)]) {
      path.push_back(draft_.tokens[static_cast<size_t>(number)]);
    }
    std::reverse(path.begin(), path.end());
    return path;
  }

  int32_t token_after(const Occurrence& occurrence, const std::vector<int32_t>& path) const {
    const size_t next = static_cast<size_t>(occurrence.place) + path.size();
    if (next < index_.text_.size()) {
      // An occurrence that has ended stays so: its children's parts are without it.
      return index_.text_[next];
    }
    return own_ ? path[next - index_.text_.size()] : kEnd;
  }

  const SuffixIndex& index_;
  const SuffixDraftLimits& limits_;
  bool own_;
  int64_t most_tokens_;
  std::vector<Occurrence> occurrences_;
  std::priority_queue<Node> candidates_;
  SuffixDraft draft_;
};

SuffixDraft SuffixIndex::best_draft(std::span<const int32_t> context,
                                    const SuffixDraftLimits& limits, bool own) const {
  const std::vector<Range> ranges = matches(context);
  SuffixDraft best;
  int64_t size_before = 0;
  for (size_t length = ranges.size(); length >= static_cast<size_t>(limits.min_match); --length) {
    const Range range = ranges[length - 1];
    // The same occurrences as of the longer match: with less context they promise no more.
    if (range.size() == size_before) continue;
    size_before = range.size();
    const double most = std::floor(limits.factor * static_cast<double>(length));
    const auto most_tokens =
        static_cast<int64_t>(std::min(most, static_cast<double>(limits.max_tokens)));
    if (static_cast<double>(most_tokens) <= best.score) break;  // and those of shorter ones neither
    SuffixDraft draft =
        Growth(*this, range, static_cast<int32_t>(length), most_tokens, own, limits).run();
    if (draft.score > best.score) best = std::move(draft);
  }
  return best;
}

SuffixDraft SuffixIndex::propose(std::span<const int64_t> context,
                                 const SuffixDraftLimits& limits) const {
  check_limits(limits);
  return best_draft(last_of(context), limits, /*own=*/false);
}

SuffixDraft SuffixIndex::propose(const SuffixDraftLimits& limits) const {
  check_limits(limits);
  auto begin = text_.end();
  while (text_.end() - begin < max_match_ && *std::prev(begin) != kEnd) --begin;
  return best_draft({begin, text_.end()}, limits, /*own=*/true);
}

}  // namespace speculators
