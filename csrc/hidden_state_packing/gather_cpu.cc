// The CPU kernel: one memcpy per row and layer. A row is kilobytes long, so the C library's copy
// runs at the machine's bandwidth and there is nothing left to vectorise by hand.
#include <cstring>

#include "csrc/hidden_state_packing/gather.h"

namespace speculators {

int64_t first_index_out_of_range(const int64_t* index, int64_t num_rows, int64_t num_tokens) {
  for (int64_t row = 0; row < num_rows; ++row) {
    if (index[row] < 0 || index[row] >= num_tokens) return row;
  }
  return -1;
}

void gather_rows_cpu(const GatherSource* sources, int64_t num_layers, int64_t row_bytes,
                     const int64_t* index, int64_t begin, int64_t end, void* out) {
  char* destination = static_cast<char*>(out) + begin * num_layers * row_bytes;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t layer = 0; layer < num_layers; ++layer) {
      const GatherSource& source = sources[layer];
      const char* from =
          static_cast<const char*>(source.data) + index[row] * source.row_stride_bytes;
      std::memcpy(destination, from, static_cast<size_t>(row_bytes));
      destination += row_bytes;
    }
  }
}

}  // namespace speculators
