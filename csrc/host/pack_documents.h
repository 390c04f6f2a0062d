// Packs documents into rows of a token budget: which documents share a training row.
#pragma once

#include <cstdint>
#include <vector>

namespace speculators {

// Best-fit decreasing: documents from the longest to the shortest (ties: the lower number first),
// each into the row with the least room that still holds it (ties: the lower row), else into a new
// row. At most 11/9 of the fewest possible rows, plus four (D. S. Johnson, "Near-optimal bin
// packing algorithms", 1973), in O(n log n).
//
// `lengths` are in tokens; returns, per row, the numbers of its documents in the order of
// placement. Throws std::invalid_argument if budget < 1 or a length is not in [1, budget].
std::vector<std::vector<int64_t>> pack_documents(const std::vector<int64_t>& lengths,
                                                 int64_t budget);

}  // namespace speculators
