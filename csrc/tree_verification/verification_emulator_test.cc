// The CUDA kernels' source on the host: right under every schedule, and wrong with each planted
// bug.
//
// `--plant=NAME` runs a kernel with one bug; the program then fails, by a wrong result, an
// exception or a sanitizer's report. tests/csrc asserts that, build by build.
#include "csrc/common/cuda_emulator.h"
// The emulator comes first: it stands in for <cuda_runtime.h>.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "csrc/common/testing.h"
#include "csrc/tree_verification/row_summary.cuh"
#include "csrc/tree_verification/tree_verification_testing.h"
#include "csrc/tree_verification/tree_walk.cuh"

namespace {

using speculators::SamplingMode;
using speculators::VerifyBug;
using speculators::VerifyCall;
using speculators::VerifyCase;
using speculators::VerifyShape;
using speculators::VerifyWorkspace;

constexpr SamplingMode kPointMass = SamplingMode::kPointMass;
constexpr SamplingMode kWith = SamplingMode::kWithReplacement;
constexpr SamplingMode kWithout = SamplingMode::kWithoutReplacement;

// Threads of the operating system are slow, and need no luck to show a race.
#if defined(SPECULATORS_EMULATOR_THREADS)
constexpr unsigned kSeeds = 1;
constexpr unsigned kManySeeds = 4;
#else
constexpr unsigned kSeeds = 5;
constexpr unsigned kManySeeds = 40;
#endif

// One call's launches, in blocks of few threads, and so with small chunks.
class Launcher {
 public:
  Launcher(const VerifyCall& call, unsigned seed, unsigned threads = 32, unsigned blocks = 3)
      : call_(call), seed_(seed), threads_(threads), blocks_(blocks) {
    const int chunk = static_cast<int>(threads) * speculators::kItems;
    const int64_t chunks = (call.width + chunk - 1) / chunk;
    memory_.resize(speculators::bytes_of(call, chunks) / sizeof(double) + 1);
    std::memset(memory_.data(), 0xFE, memory_.size() * sizeof(double));
    work_ = speculators::workspace_in(memory_.data(), call, chunk);
  }

  template <VerifyBug kBug = VerifyBug::kNone>
  void greedy() const {
    launch([this] {
      if (call_.is_bfloat16) {
        speculators::summarise_rows_kernel<__nv_bfloat16, true, kBug>(call_, work_);
      } else {
        speculators::summarise_rows_kernel<float, true, kBug>(call_, work_);
      }
    });
    launch([this] { speculators::walk_greedy_kernel<kBug>(call_, work_); });
  }

  template <VerifyBug kBug = VerifyBug::kNone>
  void sampling() const {
    if (call_.is_bfloat16) {
      sampling_of<__nv_bfloat16, kBug>();
    } else {
      sampling_of<float, kBug>();
    }
  }

  template <typename T, VerifyBug kBug>
  void sampling_of() const {
    launch([this] { speculators::summarise_rows_kernel<T, false, kBug>(call_, work_); });
    if (call_.mode == kPointMass) {
      launch([this] { speculators::walk_point_mass_kernel<T, kBug>(call_, work_); });
      return;
    }
    launch([this] { speculators::walk_siblings_kernel<T, false, kBug>(call_, work_); });
    launch([this] { speculators::residual_kernel<T, kBug>(call_, work_); });
    launch([this] { speculators::walk_siblings_kernel<T, true, kBug>(call_, work_); });
  }

 private:
  void launch(const std::function<void()>& kernel) const {
    speculators::emulator::launch(dim3(blocks_), dim3(threads_), 0, kernel, seed_);
  }

  const VerifyCall& call_;
  unsigned seed_, threads_, blocks_;
  std::vector<double> memory_;
  VerifyWorkspace work_;
};

const std::vector<VerifyShape> kShapes = {
    {4, 9, 1500, false},                             // three chunks or two, the last one not full
    {3, 40, 70, true, kPointMass, 0.7f, 0, 1.0, 3},  // more nodes than threads
    {3, 6, 1030, true, kPointMass, 1.0f, 30, 1.0, 1, true},
    {3, 6, 600, false, kPointMass, 1.0f, 0, 0.9, 0, true},  // many equal logits
    {3, 6, 600, false, kPointMass, 1.7f, 40, 0.8, 5, true},
    {2, 1, 1, false},  // the least there is
    {4, 9, 1100, false, kWith, 0.8f},
    {3, 9, 600, true, kWith, 1.3f, 50, 0.9, 3, true},
    {4, 9, 1100, true, kWithout, 1.0f, 0, 1.0, 4},
    {3, 12, 70, false, kWithout, 1.5f, 20, 1.0},
};

TEST(every_shape_under_every_schedule) {
  int64_t accepted = 0;
  for (const VerifyShape& shape : kShapes) {
    for (unsigned seed = 0; seed < kSeeds; ++seed) {
      VerifyCase c(shape, seed);
      const Launcher launcher(c.call, seed, seed % 2 == 0 ? 32 : 64);
      launcher.greedy();
      EXPECT_TRUE(c.greedy_is_right());
      launcher.sampling();
      EXPECT_TRUE(c.sampling_is_right());
      accepted += c.total_accepted();
    }
  }
  EXPECT_TRUE(accepted > static_cast<int64_t>(20 * kSeeds));
}

TEST(many_seeds_of_siblings) {
  for (unsigned seed = 0; seed < kManySeeds; ++seed) {
    VerifyCase c({4, 10, 90, false, seed % 2 == 0 ? kWith : kWithout}, seed);
    Launcher(c.call, seed).sampling();
    EXPECT_TRUE(c.sampling_is_right());
  }
}

TEST(the_largest_block) {
  VerifyCase c({1, 3, 5000, true, kWith}, 0);
  Launcher(c.call, 0, speculators::kMaxTreeThreads, 1).sampling();
  EXPECT_TRUE(c.sampling_is_right());
  Launcher(c.call, 0, speculators::kMaxTreeThreads, 1).greedy();
  EXPECT_TRUE(c.greedy_is_right());
}

TEST(rows_without_any_number_give_token_0) {
  for (const double top_p : {1.0, 0.9}) {
    VerifyShape shape = {1, 1, 40, false};
    shape.top_p = top_p;
    VerifyCase c(shape, 0);
    const std::vector<float> nothing(40, -INFINITY);
    c.call.logits = nothing.data();
    Launcher(c.call, 0).sampling();
    EXPECT_EQ(c.next_tokens[0], 0);
    Launcher(c.call, 0).greedy();
    EXPECT_EQ(c.next_tokens[0], 0);
  }
}

void run_with(void (*spoil)(VerifyCase&)) {
  VerifyCase c({1, 4, 9, false, kWithout}, 5);
  c.parents = {-1, 0, 0, 0};
  c.tokens = {0, 1, 2, 3};
  spoil(c);
  Launcher(c.call, 0).sampling();
}

TEST(what_is_out_of_range_or_impossible_stops_the_kernel) {
  EXPECT_THROWS(run_with([](VerifyCase& c) { c.parents[0] = 0; }), "a parent is out of range");
  EXPECT_THROWS(run_with([](VerifyCase& c) { c.parents[2] = 2; }), "a parent is out of range");
  EXPECT_THROWS(run_with([](VerifyCase& c) { c.tokens[3] = 9; }), "a token is out of range");
  EXPECT_THROWS(run_with([](VerifyCase& c) { c.tokens[3] = -1; }), "a token is out of range");
  EXPECT_THROWS(run_with([](VerifyCase& c) { c.call.q_nodes = 0; }), "has no row for a parent");
  EXPECT_THROWS(run_with([](VerifyCase& c) { c.uniforms[0] = 1; }), "a uniform number is not");
  EXPECT_THROWS(run_with([](VerifyCase& c) { c.uniforms[3] = -0.1; }), "a uniform number is not");
  EXPECT_THROWS(run_with([](VerifyCase& c) { c.uniforms[2] = NAN; }), "a uniform number is not");
  EXPECT_THROWS(run_with([](VerifyCase& c) { c.q[1] = 0; }), "cannot have been drawn");
  EXPECT_THROWS(run_with([](VerifyCase& c) {
                  c.tokens[2] = 1;
                  c.uniforms[1] = 0.999999999;
                  c.q[1] = 0.9f;
                }),
                "cannot have been drawn");
}

// Each runs some shapes with a bug, and returns whether nobody noticed.

template <VerifyBug kBug>
bool greedy_unnoticed() {
  bool right = true;
  for (const size_t number : {0, 1, 4}) {
    for (unsigned seed = 0; seed < kSeeds; ++seed) {
      VerifyShape shape = kShapes[number];
      shape.is_bfloat16 = false;
      shape.padding = 5;
      VerifyCase c(shape, seed);
      Launcher(c.call, seed, 64, 1).greedy<kBug>();
      right = c.greedy_is_right() && right;
    }
  }
  return right;
}

template <VerifyBug kBug, size_t kFirst, size_t kLast>
bool sampling_unnoticed() {
  bool right = true;
  for (size_t number = kFirst; number <= kLast; ++number) {
    for (unsigned seed = 0; seed < kSeeds; ++seed) {
      VerifyShape shape = kShapes[number];
      shape.is_bfloat16 = false;
      VerifyCase c(shape, seed);
      Launcher(c.call, seed, 64, 1).sampling_of<float, kBug>();
      right = c.sampling_is_right() && right;
    }
  }
  return right;
}

template <VerifyBug kBug>
constexpr auto plain_unnoticed = sampling_unnoticed<kBug, 0, 1>;
template <VerifyBug kBug>
constexpr auto filtered_unnoticed = sampling_unnoticed<kBug, 2, 4>;
template <VerifyBug kBug>
constexpr auto siblings_unnoticed = sampling_unnoticed<kBug, 6, 9>;

const std::map<std::string, bool (*)()> kPlants = {
    {"summary_reads_past_the_row", greedy_unnoticed<VerifyBug::kSummaryReadsPastTheRow>},
    {"summary_takes_the_last_of_equal_logits",
     greedy_unnoticed<VerifyBug::kSummaryTakesTheLastOfEqualLogits>},
    {"summary_forgets_the_temperature",
     sampling_unnoticed<VerifyBug::kSummaryForgetsTheTemperature, 6, 6>},
    {"summary_ignores_node_stride", greedy_unnoticed<VerifyBug::kSummaryIgnoresNodeStride>},
    {"summary_stops_after_one_unit", greedy_unnoticed<VerifyBug::kSummaryStopsAfterOneUnit>},
    {"reads_the_largest_too_early", greedy_unnoticed<VerifyBug::kReadsTheLargestTooEarly>},
    {"keeps_the_old_histogram", filtered_unnoticed<VerifyBug::kKeepsTheOldHistogram>},
    {"top_k_loses_ties", filtered_unnoticed<VerifyBug::kTopKLosesTies>},
    {"top_p_keeps_all_ties", filtered_unnoticed<VerifyBug::kTopPKeepsAllTies>},
    {"top_p_ignores_top_k", filtered_unnoticed<VerifyBug::kTopPIgnoresTopK>},
    {"reads_the_histogram_too_early", filtered_unnoticed<VerifyBug::kReadsTheHistogramTooEarly>},
    {"takes_the_last_equal_child", greedy_unnoticed<VerifyBug::kTakesTheLastEqualChild>},
    {"takes_another_nodes_child", greedy_unnoticed<VerifyBug::kTakesAnotherNodesChild>},
    {"leaves_the_end_of_the_path", greedy_unnoticed<VerifyBug::kLeavesTheEndOfThePath>},
    {"stops_after_one_sequence", greedy_unnoticed<VerifyBug::kStopsAfterOneSequence>},
    {"reads_past_the_tree", greedy_unnoticed<VerifyBug::kReadsPastTheTree>},
    {"takes_the_last_equal_chunk", greedy_unnoticed<VerifyBug::kTakesTheLastEqualChunk>},
    {"ignores_the_last_chunk", greedy_unnoticed<VerifyBug::kIgnoresTheLastChunk>},
    {"forgets_to_rescale_chunks", plain_unnoticed<VerifyBug::kForgetsToRescaleChunks>},
    {"draws_from_the_first_chunk", plain_unnoticed<VerifyBug::kDrawsFromTheFirstChunk>},
    {"forgets_the_threads_before", plain_unnoticed<VerifyBug::kForgetsTheThreadsBefore>},
    {"draws_past_the_row", plain_unnoticed<VerifyBug::kDrawsPastTheRow>},
    {"reads_masses_too_early", plain_unnoticed<VerifyBug::kReadsMassesTooEarly>},
    {"accepts_with_the_unscaled_ratio",
     siblings_unnoticed<VerifyBug::kAcceptsWithTheUnscaledRatio>},
    {"forgets_the_rejection", siblings_unnoticed<VerifyBug::kForgetsTheRejection>},
    {"keeps_q_of_the_seen", siblings_unnoticed<VerifyBug::kKeepsQOfTheSeen>},
    {"tests_with_the_roots_number", siblings_unnoticed<VerifyBug::kTestsWithTheRootsNumber>},
    {"keeps_the_residual_of_the_parent",
     siblings_unnoticed<VerifyBug::kKeepsTheResidualOfTheParent>},
    {"residual_of_another_node", siblings_unnoticed<VerifyBug::kResidualOfAnotherNode>},
    {"residual_forgets_q", siblings_unnoticed<VerifyBug::kResidualForgetsQ>},
    {"residual_reads_past_the_row", siblings_unnoticed<VerifyBug::kResidualReadsPastTheRow>},
    {"residual_of_the_first_chunk", siblings_unnoticed<VerifyBug::kResidualOfTheFirstChunk>},
    {"residual_skips_sequences", siblings_unnoticed<VerifyBug::kResidualSkipsSequences>},
};

}  // namespace

int main(int argc, char** argv) {
  return speculators::testing::run_all_tests_or_plant(argc, argv, kPlants);
}
