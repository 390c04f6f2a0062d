// Packs chosen rows of several hidden-state tensors into one buffer of int8 or float8 with scales,
// and puts packed rows back where they are wanted: the raw-pointer interface.
//
// Packing reads each entry once from memory and writes one byte: a row's largest magnitude is found
// first, and its entries are still in the nearest cache (in registers on CUDA) when they are scaled
// by it. number_formats.h defines the numbers. Unpacking is the inverse: each row goes to its place
// in the tensors that training takes, so that nothing between the two is made. It also places rows
// that were packed as they are (by the gather).
//
// Nothing here depends on torch, Python or CUDA headers; every binding includes this file.
#pragma once

#include <cstdint>

#include "csrc/hidden_state_packing/number_formats.h"

namespace speculators {

// Rows of entries, contiguous in themselves; the stride counts entries.
struct StateRows {
  const void* data = nullptr;
  int64_t row_stride = 0;
};

struct PackCall {
  StateFormat from;  // of the layers: kBFloat16, kFloat16 or kFloat32
  StateFormat to;    // kInt8 or kFloat8
  int64_t num_layers = 0;
  int64_t num_tokens = 0;             // rows of a layer
  int64_t width = 0;                  // entries of a row
  int64_t num_rows = 0;               // to pack
  const StateRows* layers = nullptr;  // [num_layers]
  const int64_t* index = nullptr;     // [num_rows], which token; null: row r is token r
  uint8_t* packed = nullptr;          // [num_rows, num_layers * width], contiguous
  float* scales = nullptr;            // [num_rows, num_layers], contiguous
};

struct UnpackCall {
  StateFormat from;  // kInt8, kFloat8, or that of the targets
  StateFormat to;    // of the targets: kBFloat16, kFloat16 or kFloat32
  int64_t num_layers = 0;
  int64_t num_targets = 0;        // rows of a target
  int64_t width = 0;              // entries of a row
  int64_t num_rows = 0;           // to unpack
  StateRows packed;               // num_rows rows of num_layers * width entries
  const float* scales = nullptr;  // num_rows rows of num_layers; null where from is to
  int64_t scales_row_stride = 0;
  const int64_t* index = nullptr;      // [num_rows], all different; null: row r goes to row r
  const StateRows* targets = nullptr;  // [num_layers], written
};

// Computes rows [begin, end). Ranges that do not overlap may be computed by different threads.
// Indices must have been checked (first_index_out_of_range in gather.h).
void pack_rows_cpu(const PackCall& call, int64_t begin, int64_t end);
void unpack_rows_cpu(const UnpackCall& call, int64_t begin, int64_t end);

// Enqueues the whole call on `stream` (a cudaStream_t) and returns a cudaError_t as int. `layers`
// and `targets` are read before the call returns; all other pointers are device memory. An index
// out of range stops the kernel with a message; the error surfaces at the stream's next
// synchronisation.
int pack_rows_cuda(const PackCall& call, void* stream);
int unpack_rows_cuda(const UnpackCall& call, void* stream);

// What cudaGetErrorString says of a code that they returned.
const char* pack_error_message(int code);

}  // namespace speculators
