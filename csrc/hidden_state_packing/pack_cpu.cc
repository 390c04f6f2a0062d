// The CPU kernels: row by row and layer by layer, a row being a few kilobytes.
//
// A magnitude is compared as an integer, the float's bits without the sign: so the search for the
// largest is one instruction for 32 entries of 16 bits, and an infinity or a NaN comes out as the
// largest of all. target_clones compiles the loops three times and lets the machine choose.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "csrc/hidden_state_packing/pack.h"

#if defined(__x86_64__) && defined(__linux__)
#define SPECULATORS_CLONES \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SPECULATORS_CLONES
#endif
#define SPECULATORS_INLINE inline __attribute__((always_inline))

namespace speculators {
namespace {

constexpr int64_t kBlock = 32;  // entries, whose bits fill one or two lines of a cache

// The bits of the largest magnitude, as those of a float.
template <StateFormat kFrom>
SPECULATORS_INLINE uint32_t largest_magnitude(const Bits<kFrom>* from, int64_t width) {
  using Signed = std::make_signed_t<Bits<kFrom>>;  // without the sign's bit they order the same
  constexpr auto kMagnitude = static_cast<Signed>(Bits<kFrom>(~Bits<kFrom>{0}) >> 1);
  Signed largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < width; ++i) {
    const auto magnitude = static_cast<Signed>(from[i] & kMagnitude);
    largest = magnitude > largest ? magnitude : largest;
  }
  return number_formats::as_bits(to_float<kFrom>(static_cast<Bits<kFrom>>(largest)));
}

// Asks for a block of the row that comes next, so that it is there when its turn comes: rows are
// found by an index, in which the machine itself sees no pattern.
template <StateFormat kFrom>
SPECULATORS_INLINE void prefetch(const Bits<kFrom>* next) {
  __builtin_prefetch(next);
  if constexpr (sizeof(Bits<kFrom>) > 2) __builtin_prefetch(next + kBlock / 2);
}

template <StateFormat kFrom, StateFormat kTo>
SPECULATORS_INLINE float pack_row(const Bits<kFrom>* from, const Bits<kFrom>* next, int64_t width,
                                  uint8_t* to) {
  const RowScale row = row_scale<kTo>(largest_magnitude<kFrom>(from, width));
  const float inverse = row.inverse;
  if (row.scale != row.scale) {
    std::memset(to, 0, static_cast<size_t>(width));
    return row.scale;
  }
  int64_t done = 0;
  for (; done + kBlock <= width; done += kBlock) {
    prefetch<kFrom>(next + done);
#pragma omp simd
    for (int64_t i = 0; i < kBlock; ++i) {
      to[done + i] = to_code<kTo>(to_float<kFrom>(from[done + i]) * inverse);
    }
  }
  for (; done < width; ++done) to[done] = to_code<kTo>(to_float<kFrom>(from[done]) * inverse);
  return row.scale;
}

// Where the row of a layer is that is packed as number row * num_layers + layer.
template <StateFormat kFrom>
SPECULATORS_INLINE const Bits<kFrom>* source(const PackCall& call, int64_t number) {
  const int64_t row = number / call.num_layers;
  const StateRows& rows = call.layers[number % call.num_layers];
  const int64_t token = call.index == nullptr ? row : call.index[row];
  return static_cast<const Bits<kFrom>*>(rows.data) + token * rows.row_stride;
}

template <StateFormat kFrom, StateFormat kTo>
SPECULATORS_INLINE void pack_rows(const PackCall& call, int64_t begin, int64_t end) {
  const int64_t last = end * call.num_layers - 1;
  for (int64_t number = begin * call.num_layers; number <= last; ++number) {
    call.scales[number] = pack_row<kFrom, kTo>(source<kFrom>(call, number),
                                               source<kFrom>(call, std::min(number + 1, last)),
                                               call.width, call.packed + number * call.width);
  }
}

template <StateFormat kFrom, StateFormat kTo>
SPECULATORS_INLINE void unpack_row(const Bits<kFrom>* from, float scale, int64_t width,
                                   Bits<kTo>* to) {
  if constexpr (kFrom == kTo) {
    if (width == 0) return;  // memcpy takes no null pointer, not even for nothing
    std::memcpy(to, from, static_cast<size_t>(width) * sizeof(Bits<kTo>));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) to[i] = from_float<kTo>(from_code<kFrom>(from[i]) * scale);
  }
}

template <StateFormat kFrom, StateFormat kTo>
SPECULATORS_INLINE void unpack_rows(const UnpackCall& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = call.index == nullptr ? row : call.index[row];
    const auto* from =
        static_cast<const Bits<kFrom>*>(call.packed.data) + row * call.packed.row_stride;
    for (int64_t layer = 0; layer < call.num_layers; ++layer) {
      const StateRows& rows = call.targets[layer];
      unpack_row<kFrom, kTo>(
          from + layer * call.width,
          kFrom == kTo ? 1 : call.scales[row * call.scales_row_stride + layer], call.width,
          static_cast<Bits<kTo>*>(const_cast<void*>(rows.data)) + target * rows.row_stride);
    }
  }
}

template <StateFormat kFrom>
SPECULATORS_INLINE void pack_rows_from(const PackCall& call, int64_t begin, int64_t end) {
  if (call.to == StateFormat::kInt8) {
    pack_rows<kFrom, StateFormat::kInt8>(call, begin, end);
  } else {
    pack_rows<kFrom, StateFormat::kFloat8>(call, begin, end);
  }
}

template <StateFormat kTo>
SPECULATORS_INLINE void unpack_rows_to(const UnpackCall& call, int64_t begin, int64_t end) {
  if (call.from == StateFormat::kInt8) {
    unpack_rows<StateFormat::kInt8, kTo>(call, begin, end);
  } else if (call.from == StateFormat::kFloat8) {
    unpack_rows<StateFormat::kFloat8, kTo>(call, begin, end);
  } else {
    unpack_rows<kTo, kTo>(call, begin, end);
  }
}

}  // namespace

SPECULATORS_CLONES
void pack_rows_cpu(const PackCall& call, int64_t begin, int64_t end) {
  if (call.from == StateFormat::kBFloat16) {
    pack_rows_from<StateFormat::kBFloat16>(call, begin, end);
  } else if (call.from == StateFormat::kFloat16) {
    pack_rows_from<StateFormat::kFloat16>(call, begin, end);
  } else {
    pack_rows_from<StateFormat::kFloat32>(call, begin, end);
  }
}

SPECULATORS_CLONES
void unpack_rows_cpu(const UnpackCall& call, int64_t begin, int64_t end) {
  if (call.to == StateFormat::kBFloat16) {
    unpack_rows_to<StateFormat::kBFloat16>(call, begin, end);
  } else if (call.to == StateFormat::kFloat16) {
    unpack_rows_to<StateFormat::kFloat16>(call, begin, end);
  } else {
    unpack_rows_to<StateFormat::kFloat32>(call, begin, end);
  }
}

}  // namespace speculators
