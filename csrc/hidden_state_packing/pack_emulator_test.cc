// The CUDA kernels' source on the host: right under every schedule, and wrong with each planted
// bug.
//
// `--plant=NAME` runs a kernel with one bug; the program then fails, by a wrong result, an
// exception or a sanitizer's report. tests/csrc asserts that, build by build.
#include "csrc/common/cuda_emulator.h"
// The emulator comes first: it stands in for <cuda_runtime.h>.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "csrc/common/testing.h"
#include "csrc/hidden_state_packing/pack.cuh"
#include "csrc/hidden_state_packing/pack_testing.h"

namespace {

using speculators::Bits;
using speculators::pack_rows_kernel;
using speculators::PackBug;
using speculators::PackCall;
using speculators::PackCase;
using speculators::PackLayers;
using speculators::PackShape;
using speculators::StateRows;
using speculators::unpack_rows_kernel;
using speculators::UnpackCall;
using speculators::UnpackCase;
using speculators::emulator::launch;
using Format = speculators::StateFormat;

struct Grid {
  unsigned blocks, warps, seed;
};

PackLayers table_of(const StateRows* rows, int64_t count) {
  PackLayers layers{};
  std::copy_n(rows, count, layers.rows);
  return layers;
}

template <Format kFrom, Format kTo, int kWidth, PackBug kBug = PackBug::kNone>
void run(const PackCall& call, const Grid& grid) {
  launch(
      dim3(grid.blocks, static_cast<unsigned>(call.num_layers)), dim3(32 * grid.warps), 0,
      [&] {
        pack_rows_kernel<kFrom, kTo, kWidth, kBug>(
            table_of(call.layers, call.num_layers), call.num_layers, call.num_tokens, call.width,
            call.index, call.num_rows, call.packed, call.scales);
      },
      grid.seed);
}

template <Format kFrom, Format kTo, int kWidth, PackBug kBug = PackBug::kNone>
void run(const UnpackCall& call, const Grid& grid) {
  launch(
      dim3(grid.blocks, static_cast<unsigned>(call.num_layers)), dim3(32 * grid.warps), 0,
      [&] {
        unpack_rows_kernel<kFrom, kTo, kWidth, kBug>(
            table_of(call.targets, call.num_layers), call.num_targets, call.width,
            static_cast<const Bits<kFrom>*>(call.packed.data), call.packed.row_stride, call.scales,
            call.scales_row_stride, call.index, call.num_rows);
      },
      grid.seed);
}

// Layers, rows, vectors of a row, vectors between rows, and whether there is an index.
struct Size {
  int64_t num_layers, num_rows, length, padding;
  bool has_index;
};

const std::vector<Size> kSizes = {
    {3, 5, 70, 0, true},   // a row is more than one round of a warp or two
    {2, 4, 300, 2, true},  // and more than the threads hold
    {2, 3, 5, 0, false},   // most threads have no entry
    {1, 1, 1, 0, true},    // the least there is
};

template <int kWidth>
PackShape shape_of(Format from, Format to, const Size& size) {
  return {from,
          to,
          size.num_layers,
          size.num_rows,
          size.length * kWidth,
          size.padding * kWidth,
          size.has_index};
}

template <Format kFrom, Format kTo, int kWidth>
void expect_packing_is_right() {
  for (const Size& size : kSizes) {
    for (unsigned seed = 0; seed < 5; ++seed) {
      PackCase c(shape_of<kWidth>(kFrom, kTo, size), seed);
      run<kFrom, kTo, kWidth>(c.call, {1 + seed % 3, 1 + seed % 2, seed});
      EXPECT_TRUE(c.is_right());
    }
  }
}

TEST(packing_bfloat16) {
  expect_packing_is_right<Format::kBFloat16, Format::kInt8, 8>();
  expect_packing_is_right<Format::kBFloat16, Format::kInt8, 1>();
  expect_packing_is_right<Format::kBFloat16, Format::kFloat8, 8>();
}

TEST(packing_float16) {
  expect_packing_is_right<Format::kFloat16, Format::kInt8, 8>();
  expect_packing_is_right<Format::kFloat16, Format::kFloat8, 1>();
}

TEST(packing_float32) {
  expect_packing_is_right<Format::kFloat32, Format::kInt8, 1>();
  expect_packing_is_right<Format::kFloat32, Format::kFloat8, 4>();
}

template <Format kFrom, Format kTo, int kWidth>
void expect_unpacking_is_right() {
  for (const Size& size : kSizes) {
    for (unsigned seed = 0; seed < 5; ++seed) {
      UnpackCase c(shape_of<kWidth>(kFrom, kTo, size), seed);
      run<kFrom, kTo, kWidth>(c.call, {1 + seed % 3, 1 + seed % 2, seed});
      EXPECT_TRUE(c.is_right());
    }
  }
}

TEST(unpacking_int8) {
  expect_unpacking_is_right<Format::kInt8, Format::kBFloat16, 8>();
  expect_unpacking_is_right<Format::kInt8, Format::kFloat16, 1>();
  expect_unpacking_is_right<Format::kInt8, Format::kFloat32, 4>();
}

TEST(unpacking_float8) {
  expect_unpacking_is_right<Format::kFloat8, Format::kBFloat16, 1>();
  expect_unpacking_is_right<Format::kFloat8, Format::kFloat16, 8>();
  expect_unpacking_is_right<Format::kFloat8, Format::kFloat32, 1>();
}

TEST(placing_rows_as_they_are) {
  expect_unpacking_is_right<Format::kBFloat16, Format::kBFloat16, 8>();
  expect_unpacking_is_right<Format::kFloat32, Format::kFloat32, 1>();
}

// A row of infinities, NaN and zeros, each in the last entry of a layer.
template <Format kTo, PackBug kBug = PackBug::kNone>
bool special_rows_are_right() {
  PackCase c({Format::kBFloat16, kTo, 3, 2, 70, 0, false}, 7);
  c.set(0, 0, 69, -std::numeric_limits<float>::infinity());
  c.set(1, 0, 69, std::numeric_limits<float>::quiet_NaN());
  c.fill(2, 0, 0);
  c.set(0, 1, 69, -1000);
  run<Format::kBFloat16, kTo, 1, kBug>(c.call, {1, 2, 0});
  return c.is_right();
}

TEST(rows_of_special_numbers) {
  EXPECT_TRUE(special_rows_are_right<Format::kInt8>());
  EXPECT_TRUE(special_rows_are_right<Format::kFloat8>());
}

template <PackBug kBug>
void pack_token(int64_t token) {
  PackCase c({Format::kFloat32, Format::kInt8, 1, 1, 3}, 0);
  c.set_index(0, token);
  run<Format::kFloat32, Format::kInt8, 1, kBug>(c.call, {1, 1, 0});
}

template <PackBug kBug>
void unpack_to_target(int64_t target) {
  UnpackCase c({Format::kInt8, Format::kFloat32, 1, 1, 3}, 0);
  c.set_index(0, target);
  run<Format::kInt8, Format::kFloat32, 1, kBug>(c.call, {1, 1, 0});
}

TEST(an_index_out_of_range_stops_the_kernel) {
  for (const int64_t index : {-1, 9}) {
    EXPECT_THROWS(pack_token<PackBug::kNone>(index), "index out of range");
    EXPECT_THROWS(unpack_to_target<PackBug::kNone>(index), "index out of range");
  }
}

// Each runs the first sizes with a bug, and returns whether nobody noticed.
template <PackBug kBug>
bool packing_goes_unnoticed() {
  bool right = special_rows_are_right<Format::kFloat8, kBug>();
  for (size_t number = 0; number < 2; ++number) {
    for (unsigned seed = 0; seed < 4; ++seed) {
      PackCase c(shape_of<8>(Format::kBFloat16, Format::kInt8, kSizes[number]), seed);
      run<Format::kBFloat16, Format::kInt8, 8, kBug>(c.call, {1, 2, seed});
      right = c.is_right() && right;
    }
  }
  return right;
}

template <PackBug kBug>
bool unpacking_goes_unnoticed() {
  bool right = true;
  for (size_t number = 0; number < 2; ++number) {
    UnpackCase c(shape_of<8>(Format::kFloat8, Format::kBFloat16, kSizes[number]), 0);
    run<Format::kFloat8, Format::kBFloat16, 8, kBug>(c.call, {1, 2, 0});
    right = c.is_right() && right;
  }
  return right;
}

bool packing_without_the_check_goes_unnoticed() {
  pack_token<PackBug::kSkipsTheIndexCheck>(1 << 30);  // a sanitizer's business
  return true;
}

bool unpacking_without_the_check_goes_unnoticed() {
  unpack_to_target<PackBug::kSkipsTheIndexCheck>(1 << 30);
  return true;
}

const std::map<std::string, bool (*)()> kPlants = {
    {"pack_goes_past_the_row", packing_goes_unnoticed<PackBug::kGoesPastTheRow>},
    {"pack_ignores_row_stride", packing_goes_unnoticed<PackBug::kIgnoresRowStride>},
    {"pack_wrong_layer_offset", packing_goes_unnoticed<PackBug::kWrongLayerOffset>},
    {"pack_skips_the_index_check", packing_without_the_check_goes_unnoticed},
    {"pack_stops_after_one_row", packing_goes_unnoticed<PackBug::kStopsAfterOneRow>},
    {"forgets_the_sign", packing_goes_unnoticed<PackBug::kForgetsTheSign>},
    {"forgets_the_last_warp", packing_goes_unnoticed<PackBug::kForgetsTheLastWarp>},
    {"forgets_the_long_rows_end", packing_goes_unnoticed<PackBug::kForgetsTheLongRowsEnd>},
    {"reads_maxima_too_early", packing_goes_unnoticed<PackBug::kReadsMaximaTooEarly>},
    {"overwrites_maxima_too_early", packing_goes_unnoticed<PackBug::kOverwritesMaximaTooEarly>},
    {"scales_by_the_inverse", packing_goes_unnoticed<PackBug::kScalesByTheInverse>},
    {"ignores_infinity", packing_goes_unnoticed<PackBug::kIgnoresInfinity>},
    {"unpack_goes_past_the_row", unpacking_goes_unnoticed<PackBug::kGoesPastTheRow>},
    {"unpack_ignores_row_stride", unpacking_goes_unnoticed<PackBug::kIgnoresRowStride>},
    {"unpack_wrong_layer_offset", unpacking_goes_unnoticed<PackBug::kWrongLayerOffset>},
    {"unpack_skips_the_index_check", unpacking_without_the_check_goes_unnoticed},
    {"unpack_stops_after_one_row", unpacking_goes_unnoticed<PackBug::kStopsAfterOneRow>},
    {"takes_the_first_layers_scale", unpacking_goes_unnoticed<PackBug::kTakesTheFirstLayersScale>},
    {"ignores_the_index", unpacking_goes_unnoticed<PackBug::kIgnoresTheIndex>},
    {"all_warps_take_the_same_row", unpacking_goes_unnoticed<PackBug::kAllWarpsTakeTheSameRow>},
};

}  // namespace

int main(int argc, char** argv) {
  return speculators::testing::run_all_tests_or_plant(argc, argv, kPlants);
}
