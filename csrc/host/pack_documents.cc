#include "csrc/host/pack_documents.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace speculators {

std::vector<std::vector<int64_t>> pack_documents(const std::vector<int64_t>& lengths,
                                                 int64_t budget) {
  if (budget < 1) {
    throw std::invalid_argument("budget is " + std::to_string(budget) +
                                " tokens, expected at least 1");
  }
  for (size_t document = 0; document < lengths.size(); ++document) {
    if (lengths[document] < 1 || lengths[document] > budget) {
      throw std::invalid_argument(
          "document " + std::to_string(document) + " has " + std::to_string(lengths[document]) +
          " tokens, expected between 1 and the budget of " + std::to_string(budget) +
          ": truncate or drop it, or raise the budget");
    }
  }
  std::vector<int64_t> order(lengths.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });

  std::vector<std::vector<int64_t>> rows;
  std::set<std::pair<int64_t, size_t>> room;  // (tokens left, row) of every row that is not full
  for (const int64_t document : order) {
    const int64_t length = lengths[document];
    int64_t left = budget;
    size_t row = rows.size();
    if (const auto best = room.lower_bound({length, 0}); best != room.end()) {
      std::tie(left, row) = *best;
      room.erase(best);
    } else {
      rows.emplace_back();
    }
    rows[row].push_back(document);
    if (left > length) room.emplace(left - length, row);
  }
  return rows;
}

}  // namespace speculators
