// An index over token sequences that says what followed the same last tokens before, and how often.
//
// SuffixDecoding (Oliaro et al., 2024, arXiv:2411.04975) keeps a counted suffix tree: tens of bytes
// for each token, times the depth if its edges are not compressed. Here the places of the text are
// sorted by what stands BEFORE them, read backwards. Then the places that follow a pattern are a
// range, the ranges of longer patterns lie in those of shorter ones, and a count is the size of a
// range: 8 bytes for each token. Another token adds one place and leaves the order of the others as
// it is, which an order by what comes after would not.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace speculators {

// How far a draft may go.
struct SuffixDraftLimits {
  int32_t max_tokens = 0;        // of the draft
  double factor = 1.0;           // a match of m tokens drafts at most floor(factor * m)
  int32_t min_match = 1;         // shorter matches draft nothing
  double min_probability = 0.0;  // less likely tokens are left out
  double doubt = 0.0;            // see SuffixIndex::propose
  int64_t max_occurrences = 1;   // of a match that are looked at
  bool tree = false;             // else a chain
};

// Drafted tokens, parents before children. `parents` has the number of the token before each, -1
// for the first ones; `probabilities` are of the whole path from the root. `score` is their sum,
// the number of tokens that are expected to be accepted.
struct SuffixDraft {
  std::vector<int32_t> tokens;
  std::vector<int32_t> parents;
  std::vector<double> probabilities;
  double score = 0.0;
  int32_t match_length = 0;
};

// Sequences of tokens, the last of which can grow. Only the newest `capacity` entries are kept (an
// entry is a token, or the end of a sequence); a place that is kept also keeps the max_match tokens
// before it.
class SuffixIndex {
 public:
  // Throws std::invalid_argument where not 1 <= capacity <= 2^29 or not 1 <= max_match <= 2^16.
  SuffixIndex(int64_t capacity, int64_t max_match);

  // Continues the last sequence. O(tokens * log(size)) comparisons, and one move of the order.
  // Throws std::invalid_argument, and adds nothing, if a token is not in [0, 2^31).
  void extend(std::span<const int64_t> tokens);

  // The next tokens begin another sequence; what precedes them is no context of theirs.
  void end_sequence();

  // How many of the context's last tokens, at most max_match, occur with a token after them, and
  // how often. (0, 0) if not even the last one does.
  std::pair<int32_t, int64_t> longest_match(std::span<const int64_t> context) const;

  // A draft of what comes after the context.
  //
  // Each match length, from the longest down to min_match, gives a draft; the one with the highest
  // score is returned, the longer match on ties. A draft grows by the token with the highest
  // estimated probability, on ties the one nearer to the root, then the one seen last; a chain only
  // ever takes the likeliest child of its end. A child that follows c of the n occurrences that go
  // on has the probability c / (n + doubt / (match + depth)) of its parent's: `doubt` is what is
  // held back for tokens that were not seen, the less the longer the context; 0 gives the plain
  // ratio of counts, with which a single occurrence is certain.
  SuffixDraft propose(std::span<const int64_t> context, const SuffixDraftLimits& limits) const;

  // The same after the end of the last sequence. An occurrence that reaches that end goes on with
  // what is drafted, so that a repetition does so too.
  SuffixDraft propose(const SuffixDraftLimits& limits) const;

  int64_t size() const { return static_cast<int64_t>(order_.size()); }  // tokens kept
  int64_t bytes() const;      // of the two arrays, as allocated
  int64_t max_bytes() const;  // what bytes() never exceeds

 private:
  struct Range {
    int64_t begin;
    int64_t end;
    int64_t size() const { return end - begin; }
  };
  class Growth;

  bool precedes(int32_t a, int32_t b) const;
  void append(std::span<const int64_t> tokens);
  void make_room(int64_t entries);
  void forget_old_places();
  void insert_places(std::vector<int32_t> places);
  std::vector<Range> matches(std::span<const int32_t> context) const;
  SuffixDraft best_draft(std::span<const int32_t> context, const SuffixDraftLimits& limits,
                         bool own) const;
  std::vector<int32_t> last_of(std::span<const int64_t> context) const;
  int64_t text_limit() const { return 2 * (capacity_ + max_match_) + 1; }

  int64_t capacity_;
  int64_t max_match_;
  std::vector<int32_t> text_;   // tokens, and kEnd before, between and after sequences
  std::vector<int32_t> order_;  // the places of tokens in text_, by what stands before them
};

}  // namespace speculators
