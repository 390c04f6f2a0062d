// The CUDA kernels' source on the host: right under every schedule, and wrong with each planted
// bug.
//
// `--plant=NAME` runs a kernel with one bug; the program then fails, by a wrong result, an
// exception or a sanitizer's report. tests/csrc asserts that, build by build.
#include "csrc/common/cuda_emulator.h"
// The emulator comes first: it stands in for <cuda_runtime.h>.
#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "csrc/common/testing.h"
#include "csrc/draft_attention/merge.cuh"
#include "csrc/draft_attention/merge_testing.h"

namespace {

using speculators::draft_merge_backward_kernel;
using speculators::draft_merge_kernel;
using speculators::DraftMergeCall;
using speculators::MergeBug;
using speculators::MergeCase;
using speculators::MergeFactors;
using speculators::MergeShape;

enum class Direction { kForward, kBackward };

struct Grid {
  unsigned blocks, warps, seed;
};

template <typename T, int kPerLane, Direction kDirection, MergeBug kBug>
void run_as(const DraftMergeCall& call, const Grid& grid) {
  const auto pairs =
      static_cast<size_t>(call.query_heads / call.key_heads * call.num_diagonals) * grid.warps;
  speculators::emulator::launch(
      dim3(grid.blocks), dim3(32 * grid.warps),
      kDirection == Direction::kForward ? 0 : pairs * sizeof(MergeFactors),
      [&] {
        if constexpr (kDirection == Direction::kForward) {
          draft_merge_kernel<T, kPerLane, kBug>(call);
        } else {
          draft_merge_backward_kernel<T, kPerLane, kBug>(call);
        }
      },
      grid.seed);
}

template <Direction kDirection, MergeBug kBug = MergeBug::kNone>
void run(const DraftMergeCall& call, const Grid& grid) {
  if (call.is_bfloat16) {
    run_as<__nv_bfloat16, 2, kDirection, kBug>(call, grid);
  } else if (call.head_size <= 64) {
    run_as<float, 2, kDirection, kBug>(call, grid);
  } else {
    run_as<float, 4, kDirection, kBug>(call, grid);
  }
}

const std::vector<MergeShape> kShapes = {
    {2, 3, 4, 2, 40, 3, false, true},    // a vector is more than one round of a warp
    {1, 5, 6, 2, 64, 2, true, false},    // all of the lanes' elements
    {2, 2, 2, 2, 7, 4, false, true, 3},  // no shared keys; most lanes have no element
    {1, 3, 3, 1, 100, 1, false, false, 5}, {1, 1, 1, 1, 1, 1, true},  // the least there is
};

TEST(every_shape_under_every_schedule) {
  for (const MergeShape& shape : kShapes) {
    for (unsigned seed = 0; seed < 4; ++seed) {
      MergeCase c(shape, seed);
      run<Direction::kForward>(c.call, {2, 1 + seed % 2, seed});
      EXPECT_TRUE(c.forward_is_right());
      c.finish_forward();
      run<Direction::kBackward>(c.call, {2, 1 + seed % 2, seed});
      EXPECT_TRUE(c.backward_is_right());
    }
  }
}

TEST(a_row_that_sees_nothing_of_step_zero) {
  MergeCase c({2, 2, 2, 1, 8, 2, false}, 5);
  c.hide_step_zero(1, 0);
  run<Direction::kForward>(c.call, {1, 2, 0});
  EXPECT_TRUE(std::isfinite(c.logsumexp(1, 1, 0)));
  EXPECT_TRUE(c.forward_is_right());
  c.finish_forward();
  run<Direction::kBackward>(c.call, {1, 2, 0});
  EXPECT_TRUE(c.backward_is_right());
}

TEST(large_scores_do_not_overflow) {
  MergeCase c({1, 2, 2, 2, 8, 3, false}, 6);
  c.call.scale = 100;
  run<Direction::kForward>(c.call, {1, 1, 0});
  EXPECT_TRUE(std::isfinite(c.logsumexp(0, 0, 0)));
  EXPECT_TRUE(c.forward_is_right());
}

// Runs the first shapes with a bug; returns whether nobody noticed.
template <Direction kDirection, MergeBug kBug>
bool goes_unnoticed() {
  bool right = true;
  for (size_t number = 0; number < 3; ++number) {
    MergeCase c(kShapes[number], 0);
    if constexpr (kDirection == Direction::kForward) {
      run<kDirection, kBug>(c.call, {1, 2, 0});
      right = c.forward_is_right() && right;
    } else {
      c.finish_forward();
      run<kDirection, kBug>(c.call, {1, 2, 0});
      right = c.backward_is_right() && right;
    }
  }
  return right;
}

template <MergeBug kBug>
constexpr auto kForwardWith = goes_unnoticed<Direction::kForward, kBug>;
template <MergeBug kBug>
constexpr auto kBackwardWith = goes_unnoticed<Direction::kBackward, kBug>;

const std::map<std::string, bool (*)()> kPlants = {
    {"forward_forgets_the_scale", kForwardWith<MergeBug::kForgetsTheScale>},
    {"forward_reads_past_the_head", kForwardWith<MergeBug::kReadsPastTheHead>},
    {"forward_takes_the_query_heads_keys", kForwardWith<MergeBug::kTakesTheQueryHeadsKeys>},
    {"forward_stops_after_one_unit", kForwardWith<MergeBug::kStopsAfterOneUnit>},
    {"forward_ignores_row_stride", kForwardWith<MergeBug::kIgnoresRowStride>},
    {"forgets_to_rescale", kForwardWith<MergeBug::kForgetsToRescale>},
    {"starts_from_nothing", kForwardWith<MergeBug::kStartsFromNothing>},
    {"forgets_the_logarithm", kForwardWith<MergeBug::kForgetsTheLogarithm>},
    {"all_warps_take_the_same_unit", kForwardWith<MergeBug::kAllWarpsTakeTheSameUnit>},
    {"backward_forgets_the_scale", kBackwardWith<MergeBug::kForgetsTheScale>},
    {"backward_reads_past_the_head", kBackwardWith<MergeBug::kReadsPastTheHead>},
    {"backward_takes_the_query_heads_keys", kBackwardWith<MergeBug::kTakesTheQueryHeadsKeys>},
    {"backward_stops_after_one_unit", kBackwardWith<MergeBug::kStopsAfterOneUnit>},
    {"backward_ignores_row_stride", kBackwardWith<MergeBug::kIgnoresRowStride>},
    {"forgets_delta", kBackwardWith<MergeBug::kForgetsDelta>},
    {"overwrites_the_gradient", kBackwardWith<MergeBug::kOverwritesTheGradient>},
    {"keeps_only_the_last_head", kBackwardWith<MergeBug::kKeepsOnlyTheLastHead>},
    {"reads_factors_too_early", kBackwardWith<MergeBug::kReadsFactorsTooEarly>},
    {"warps_share_factors", kBackwardWith<MergeBug::kWarpsShareFactors>},
};

}  // namespace

int main(int argc, char** argv) {
  return speculators::testing::run_all_tests_or_plant(argc, argv, kPlants);
}
