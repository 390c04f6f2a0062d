// The formats of hidden states: in a verifier bfloat16, float16 or float; in a store also int8 and
// float8 (e4m3fn) with a scale for each row and layer. For the CPU and for CUDA.
//
// A row is scaled so that its largest magnitude becomes the largest number of the format, 127 or
// 448, and each entry is rounded to the nearest, ties to even. Reciprocals are IEEE divisions, each
// product is rounded once, and nothing small enough to be flushed to zero decides: so every
// implementation gives the same bits.
//
// All of it is arithmetic on vectors for a compiler that vectorises: no tables, no branches.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include "cuda_fp16.h"
#include "cuda_fp8.h"
#define SPECULATORS_HOST_DEVICE __host__ __device__
#else
#define SPECULATORS_HOST_DEVICE
#endif
// Always: a function that is compiled for several machines passes its machine on only this way.
#define SPECULATORS_FORMAT SPECULATORS_HOST_DEVICE inline __attribute__((always_inline))

namespace speculators {

enum class StateFormat { kBFloat16, kFloat16, kFloat32, kInt8, kFloat8 };

constexpr bool is_quantized(StateFormat format) {
  return format == StateFormat::kInt8 || format == StateFormat::kFloat8;
}

// The bits of an entry.
template <StateFormat kFormat>
using Bits =
    std::conditional_t<is_quantized(kFormat), uint8_t,
                       std::conditional_t<kFormat == StateFormat::kFloat32, uint32_t, uint16_t>>;

namespace number_formats {

SPECULATORS_FORMAT float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
SPECULATORS_FORMAT uint32_t as_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

// One of two values, both computed: a compiler makes no branch of it, which it could not vectorise.
SPECULATORS_FORMAT uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

// A number of `kMantissa` bits behind `kExponent` bits of bias `kBias`, all below the sign, that
// is no infinity and no NaN; as the bits of a float. The subnormal ones are multiples of
// `smallest`.
template <int kMantissa, int kBias>
SPECULATORS_FORMAT uint32_t decode_magnitude(uint32_t bits, float smallest) {
  const uint32_t normal = (bits << (23 - kMantissa)) + ((127u - kBias) << 23);
  const float subnormal = static_cast<float>(static_cast<int32_t>(bits)) * smallest;
  return select(bits < (1u << kMantissa), as_bits(subnormal), normal);
}

// The inverse, to the nearest, ties to even; `per_smallest` is 1 / smallest. What is too large ends
// in exponents beyond the largest.
template <int kMantissa, int kBias>
SPECULATORS_FORMAT uint32_t encode_magnitude(uint32_t magnitude, float per_smallest) {
  constexpr int kDropped = 23 - kMantissa;
  constexpr uint32_t kLeastNormal = (128u - kBias) << 23;
  const uint32_t half = (1u << (kDropped - 1)) - 1 + ((magnitude >> kDropped) & 1u);
  const uint32_t normal = (magnitude - ((127u - kBias) << 23) + half) >> kDropped;
  // A large magnitude is not wanted here, and must not overflow an integer.
  const bool is_small = magnitude < kLeastNormal;
  const float small = as_float(select(is_small, magnitude, 0));
  const auto subnormal = static_cast<uint32_t>(static_cast<int32_t>(rintf(small * per_smallest)));
  return select(is_small, subnormal, normal);
}

}  // namespace number_formats

// ---- Formats of verifiers.

template <StateFormat kFormat>
SPECULATORS_FORMAT float to_float(Bits<kFormat> bits) {
  using namespace number_formats;
  if constexpr (kFormat == StateFormat::kFloat32) {
    return as_float(bits);
  } else if constexpr (kFormat == StateFormat::kBFloat16) {
    return as_float(uint32_t{bits} << 16);
  } else {
    static_assert(kFormat == StateFormat::kFloat16);
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t sign = (bits & 0x8000u) << 16;
    const uint32_t magnitude = bits & 0x7FFFu;
    const uint32_t finite = decode_magnitude<10, 15>(magnitude, 0x1p-24f);
    const uint32_t rest = 0x7F800000u | (magnitude << 13);  // infinity and NaN
    return as_float(sign | select(magnitude < 0x7C00u, finite, rest));
#endif
  }
}

// To the nearest, ties to even; what is too large becomes infinite, and a NaN stays one.
template <StateFormat kFormat>
SPECULATORS_FORMAT Bits<kFormat> from_float(float value) {
  using namespace number_formats;
  const uint32_t bits = as_bits(value);
  if constexpr (kFormat == StateFormat::kFloat32) {
    return bits;
  } else if constexpr (kFormat == StateFormat::kBFloat16) {
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    return static_cast<uint16_t>(select(is_nan, 0x7FC0u, rounded));
  } else {
    static_assert(kFormat == StateFormat::kFloat16);
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(value));
#else
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    constexpr uint32_t kTooLarge = 0x47800000u;  // 65536, and all that rounds to it is in encode's
    const uint32_t rounded = encode_magnitude<10, 15>(magnitude, 0x1p24f);
    const uint32_t limited = select(magnitude >= kTooLarge, 0x7C00u, rounded);
    return static_cast<uint16_t>(sign | select(magnitude > 0x7F800000u, 0x7E00u, limited));
#endif
  }
}

// ---- Formats with a scale.

// Rows whose largest magnitude is below this are stored as zeros.
inline constexpr float kLeastMagnitude = 0x1p-100f;

template <StateFormat kFormat>
inline constexpr float kLargestCode = kFormat == StateFormat::kInt8 ? 127.0f : 448.0f;

// An entry is `to_code(entry * inverse)`, and read back as `from_code(code) * scale`.
struct RowScale {
  float scale;
  float inverse;
};

// Of a row whose largest magnitude is given, as the bits of a float: those of an infinity if it has
// one, of a NaN if it has one. Then the scale is NaN, all codes must be 0, and NaN is what is read.
template <StateFormat kFormat>
SPECULATORS_FORMAT RowScale row_scale(uint32_t largest_bits) {
  const float largest = number_formats::as_float(largest_bits);
  if (largest_bits >= 0x7F800000u) return {number_formats::as_float(0x7FC00000u), 0};
  if (largest < kLeastMagnitude) return {0, 0};
  return {largest / kLargestCode<kFormat>, kLargestCode<kFormat> / largest};
}

// For a number whose magnitude is at most the largest code's, but for rounding.
template <StateFormat kFormat>
SPECULATORS_FORMAT uint8_t to_code(float value) {
  using namespace number_formats;
  if constexpr (kFormat == StateFormat::kInt8) {
    return static_cast<uint8_t>(static_cast<int32_t>(rintf(value)));
  } else {
    static_assert(kFormat == StateFormat::kFloat8);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    return __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);  // one instruction
#else
    const uint32_t bits = as_bits(value);
    const uint32_t code = encode_magnitude<3, 7>(bits & 0x7FFFFFFFu, 512);
    return static_cast<uint8_t>(((bits >> 24) & 0x80u) | code);
#endif
  }
}

template <StateFormat kFormat>
SPECULATORS_FORMAT float from_code(uint8_t code) {
  using namespace number_formats;
  if constexpr (kFormat == StateFormat::kInt8) {
    return static_cast<float>(static_cast<int8_t>(code));
  } else {
    static_assert(kFormat == StateFormat::kFloat8);
    const uint32_t magnitude = code & 0x7Fu;
    const uint32_t finite = decode_magnitude<3, 7>(magnitude, 0x1p-9f);
    const uint32_t sign = (code & 0x80u) << 24;
    return as_float(sign | select(magnitude == 0x7Fu, 0x7FC00000u, finite));
  }
}

}  // namespace speculators
