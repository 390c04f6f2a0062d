// The CUDA kernel's source on the host: right under every schedule, and wrong with each planted
// bug.
//
// `--plant=NAME` runs the kernel with one bug; the program then fails, by a wrong result, an
// exception or a sanitizer's report. tests/csrc asserts that, build by build.
#include "csrc/common/cuda_emulator.h"
// The emulator comes first: it stands in for <cuda_runtime.h>.
#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "csrc/common/testing.h"
#include "csrc/distillation_loss/row_losses.cuh"
#include "csrc/distillation_loss/row_losses_testing.h"

namespace {

using speculators::GradientPlace;
using speculators::kEveryLoss;
using speculators::kMaxRowThreads;
using speculators::LossFactors;
using speculators::row_losses_kernel;
using speculators::RowLossBug;
using speculators::RowLossCall;
using speculators::RowLossCase;
using speculators::RowLossShape;

constexpr unsigned kThreads = 64;  // several warps, and few enough to be quick

template <RowLossBug kBug = RowLossBug::kNone>
void run(const RowLossCall& call, unsigned blocks, unsigned seed, unsigned threads = kThreads) {
  const size_t shared_bytes = static_cast<size_t>(call.top_k + 2) * sizeof(float);
  speculators::emulator::launch(
      dim3(blocks), dim3(threads), shared_bytes,
      [&] {
        if (call.is_bfloat16) {
          row_losses_kernel<__nv_bfloat16, kBug>(call);
        } else {
          row_losses_kernel<float, kBug>(call);
        }
      },
      seed);
}

const std::vector<RowLossShape> kShapes = {
    {3, 90, 2, false, GradientPlace::kOverTheLogits, kEveryLoss},  // two rounds of the block
    {3, 40, 3, true, GradientPlace::kOverTheLogits, kEveryLoss, 3},
    {2, 7, 5, true, GradientPlace::kItsOwn, kEveryLoss},  // most threads have no element
    {4, 33, 6, false, GradientPlace::kNone, kEveryLoss},
    {2, 1, 1, false, GradientPlace::kItsOwn, kEveryLoss},  // the least there is
};

TEST(every_shape_under_every_schedule) {
  for (const RowLossShape& shape : kShapes) {
    for (unsigned seed = 0; seed < 5; ++seed) {
      RowLossCase c(shape, seed);
      run(c.call, 2, seed);
      EXPECT_TRUE(c.is_right());
    }
  }
}

TEST(the_largest_block) {
  RowLossCase c({1, 300, 1, false, GradientPlace::kOverTheLogits, kEveryLoss}, 0);
  run(c.call, 1, 0, kMaxRowThreads);
  EXPECT_TRUE(c.is_right());
}

TEST(each_loss_by_itself) {
  for (int number = 0; number < speculators::kNumLosses; ++number) {
    LossFactors factors = {};
    reinterpret_cast<float*>(&factors)[number] = 1;
    RowLossCase c({3, 20, 3, false, GradientPlace::kOverTheLogits, factors}, number);
    run(c.call, 1, number);
    EXPECT_TRUE(c.is_right());
  }
}

TEST(rows_that_are_not_masked) {
  RowLossCase c({6, 20, 6, false, GradientPlace::kItsOwn, kEveryLoss}, 1);
  c.call.only_in_vocabulary = false;
  run(c.call, 3, 1);
  EXPECT_TRUE(c.is_right());
}

TEST(hardly_any_overlap) {
  LossFactors nla = {};
  nla.nla = 1;
  RowLossCase c({2, 20, 1, false, GradientPlace::kOverTheLogits, nla}, 3);
  for (int64_t row = 0; row < 2; ++row) c.set_logit(row, 3, 90.0f + 80 * row);  // p is 0 there
  run(c.call, 1, 0);
  EXPECT_TRUE(c.is_right());
  EXPECT_TRUE(c.loss[1] > 100);
}

TEST(a_logit_that_is_not_a_number_shows) {
  RowLossCase c({2, 40, 1, false, GradientPlace::kItsOwn, kEveryLoss}, 5);
  c.set_logit(1, 17, NAN);
  run(c.call, 1, 0);
  EXPECT_TRUE(std::isfinite(c.loss[0]));
  EXPECT_TRUE(std::isnan(c.loss[1]));
  EXPECT_TRUE(std::isnan(c.gradient(1, 0)));
}

TEST(what_is_no_number_is_no_acceptance) {
  EXPECT_TRUE(
      speculators::what_is_no_number_shows([](const RowLossCall& call) { run(call, 1, 0); }));
}

void run_with(void (*spoil)(RowLossCase&)) {
  RowLossCase c({2, 5, 1, false, GradientPlace::kNone, kEveryLoss}, 6);
  spoil(c);
  run(c.call, 1, 0);
}

TEST(an_index_out_of_range_stops_the_kernel) {
  EXPECT_THROWS(run_with([](RowLossCase& c) { c.positions[1] = 1; }), "positions has an index");
  EXPECT_THROWS(run_with([](RowLossCase& c) { c.positions[0] = -1; }), "positions has an index");
  EXPECT_THROWS(run_with([](RowLossCase& c) { c.likeliest[0] = 5; }), "top, likeliest or data");
  EXPECT_THROWS(run_with([](RowLossCase& c) { c.top[2] = -1; }), "top, likeliest or data");
  EXPECT_THROWS(run_with([](RowLossCase& c) { c.data_tokens[0] = 5; }), "top, likeliest or data");
}

TEST(no_thread_reads_at_a_place_before_another_has_checked_it) {
  LossFactors ce_argmax = {};
  ce_argmax.ce_argmax = 1;  // without topk, whose sum is a barrier by itself
  for (unsigned seed = 0; seed < 10; ++seed) {
    RowLossCase c({1, 5, 1, false, GradientPlace::kNone, ce_argmax}, 6);
    c.likeliest[0] = int64_t{1} << 40;
    EXPECT_THROWS(run(c.call, 1, seed), "top, likeliest or data");
  }
}

// Runs the first shapes with a bug; returns whether nobody noticed.
template <RowLossBug kBug>
bool goes_unnoticed() {
  bool right = true;
  for (size_t number = 0; number < 3; ++number) {
    RowLossCase c(kShapes[number], 0);
    run<kBug>(c.call, 1, 0);
    right = c.is_right() && right;
  }
  return right;
}

const std::map<std::string, bool (*)()> kPlants = {
    {"ignores_positions", goes_unnoticed<RowLossBug::kIgnoresPositions>},
    {"forgets_to_rescale", goes_unnoticed<RowLossBug::kForgetsToRescale>},
    {"takes_the_last_of_equal_logits", goes_unnoticed<RowLossBug::kTakesTheLastOfEqualLogits>},
    {"reads_logits_after_they_are_gone", goes_unnoticed<RowLossBug::kReadsLogitsAfterTheyAreGone>},
    {"forgets_the_weight", goes_unnoticed<RowLossBug::kForgetsTheWeight>},
    {"reads_the_total_too_early", goes_unnoticed<RowLossBug::kReadsTheTotalTooEarly>},
    {"writes_places_too_early", goes_unnoticed<RowLossBug::kWritesPlacesTooEarly>},
    {"reads_past_the_row", goes_unnoticed<RowLossBug::kReadsPastTheRow>},
    {"stops_after_one_row", goes_unnoticed<RowLossBug::kStopsAfterOneRow>},
};

}  // namespace

int main(int argc, char** argv) {
  return speculators::testing::run_all_tests_or_plant(argc, argv, kPlants);
}
