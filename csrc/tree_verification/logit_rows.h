// The loops over whole rows of logits, for the CPU: everything that is read from memory is read
// here, by vector code.
//
// A row is a quarter of a megabyte and more. So the first pass keeps, for each chunk of it, the
// largest logit and the sum of exponentials; to draw a token, only the chunk that it lies in is
// read again. kChunk logits fit the first cache.
#pragma once

#include <cstdint>

namespace speculators {

struct LogitRow {
  const void* data;  // float or bfloat16, contiguous
  bool is_bfloat16;
  int64_t width;
};

inline constexpr int64_t kChunk = 4096;
inline constexpr int64_t kBlock = 64;  // logits that block_maxima gives one number for

inline int64_t chunks_of(int64_t width) { return (width + kChunk - 1) / kChunk; }
inline int64_t blocks_of(int64_t width) { return (width + kBlock - 1) / kBlock; }

float logit_at(const LogitRow& row, int64_t index);

// The lowest index of the largest logit; 0 if all are -inf or NaN.
int64_t index_of_largest(const LogitRow& row);

// Of each chunk the largest logit, -inf if there is none, and the sum of exp((z - it) * scale).
void summarise_row(const LogitRow& row, float scale, float* maxima, float* sums);

// The largest logit of each block.
void block_maxima(const LogitRow& row, float* maxima);

// exp((z - max) * scale) of the logits from `begin` to `end`; 0 for NaN.
void weigh(const LogitRow& row, int64_t begin, int64_t end, float max, float scale, float* weights);

// (e - c q)+ into `weights`, which may be e.
void subtract(const float* e, const float* q, float c, int64_t size, float* weights);

// Of each chunk the sum of (e - c q)+.
void residual_masses(const float* e, const float* q, float c, int64_t width, double* masses);

double sum_of(const float* values, int64_t size);

}  // namespace speculators
