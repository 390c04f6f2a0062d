// Packs chosen rows of several hidden-state tensors into one buffer: the raw-pointer interface.
//
// A verifier leaves one [T, H] tensor per captured layer. A store wants, for the tokens that are
// kept, all layers of a token side by side: out[row] = concat(layer_0[index[row]], layer_1[...],
// ...). The operation moves bytes and never computes, so it knows row lengths and no element types.
//
// Nothing here depends on torch, Python or CUDA headers; every binding includes this file.
#pragma once

#include <cstdint>

namespace speculators {

// One layer's hidden states: `num_tokens` rows of `row_bytes` bytes (both given with the call),
// each contiguous in itself and `row_stride_bytes` after the one before it.
struct GatherSource {
  const void* data;
  int64_t row_stride_bytes;
};

// The position of the first index outside [0, num_tokens), or -1 if there is none.
int64_t first_index_out_of_range(const int64_t* index, int64_t num_rows, int64_t num_tokens);

// Writes rows [begin, end) of `out`, [num_rows, num_layers * row_bytes] bytes, contiguous. Ranges
// that do not overlap may be written by different threads. Indices must have been checked.
void gather_rows_cpu(const GatherSource* sources, int64_t num_layers, int64_t row_bytes,
                     const int64_t* index, int64_t begin, int64_t end, void* out);

// Enqueues the whole gather on `stream` (a cudaStream_t) and returns a cudaError_t as int.
// `sources` is read before the call returns; its pointers, `index` and `out` are device memory. An
// index out of range stops the kernel with a message; the error surfaces at the stream's next
// synchronisation.
int gather_rows_cuda(const GatherSource* sources, int64_t num_layers, int64_t num_tokens,
                     int64_t row_bytes, const int64_t* index, int64_t num_rows, void* out,
                     void* stream);

// What cudaGetErrorString says of a code that gather_rows_cuda returned.
const char* cuda_error_message(int code);

}  // namespace speculators
