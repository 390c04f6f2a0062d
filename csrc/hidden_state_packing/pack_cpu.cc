// The CPU kernels: row by row and layer by layer, a row being a few kilobytes.
//
// A magnitude is compared as an integer, the float's bits without the sign: so the search for the
// largest is one instruction for 32 entries of 16 bits, and an infinity or a NaN comes out as the
// largest of all. target_clones compiles the loops three times and lets the machine choose.
#include <cmath>
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

template <StateFormat kFrom, StateFormat kTo>
SPECULATORS_INLINE float pack_row(const Bits<kFrom>* from, int64_t width, uint8_t* to) {
  const RowScale row = row_scale<kTo>(largest_magnitude<kFrom>(from, width));
  const float inverse = row.inverse;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) to[i] = to_code<kTo>(to_float<kFrom>(from[i]) * inverse);
  return row.scale;
}

template <StateFormat kFrom, StateFormat kTo>
SPECULATORS_INLINE void pack_rows(const PackCall& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = call.index == nullptr ? row : call.index[row];
    for (int64_t layer = 0; layer < call.num_layers; ++layer) {
      const StateRows& source = call.layers[layer];
      const int64_t place = row * call.num_layers + layer;
      call.scales[place] = pack_row<kFrom, kTo>(
          static_cast<const Bits<kFrom>*>(source.data) + token * source.row_stride, call.width,
          call.packed + place * call.width);
    }
  }
}

template <StateFormat kFrom, StateFormat kTo>
SPECULATORS_INLINE void unpack_row(const Bits<kFrom>* from, float scale, int64_t width,
                                   Bits<kTo>* to) {
  if constexpr (kFrom == kTo) {
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
    const auto* from = static_cast<const Bits<kFrom>*>(call.packed.data) +
                       row * call.packed.row_stride;
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
