// The CUDA kernel's source on the host: right under every schedule, and wrong with each planted
// bug.
//
// `--plant=NAME` runs the kernel with one bug; the program then fails, by a wrong result, an
// exception or a sanitizer's report. tests/csrc asserts that, build by build.
#include "csrc/common/cuda_emulator.h"
// The emulator comes first: it stands in for <cuda_runtime.h>.
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "csrc/common/testing.h"
#include "csrc/tree_verification/build_tree.cuh"
#include "csrc/tree_verification/tree_verification_testing.h"

namespace {

using speculators::build_tree_kernel;
using speculators::BuildBug;
using speculators::BuildCase;

constexpr unsigned kThreads = 64;  // several warps, and few enough to be quick

template <BuildBug kBug = BuildBug::kNone>
void run(const BuildCase& c, unsigned blocks, unsigned seed, unsigned threads = kThreads) {
  // What a rank is taken for too early must not end the program before ThreadSanitizer speaks.
  const int garbage = kBug == BuildBug::kCountsRanksTooEarly ? 0 : 0x7EFEFEFE;
  std::vector<int> memory(speculators::bytes_of(c.call) / sizeof(int), garbage);
  const auto work = speculators::workspace_in(memory.data(), c.call);
  speculators::emulator::launch(
      dim3(blocks), dim3(threads), 0, [&] { build_tree_kernel<kBug>(c.call, work); }, seed);
}

struct Size {
  int64_t batch, candidates, nodes;
};

const std::vector<Size> kSizes = {
    {3, 90, 70},   // two rounds of the block, two words of a mask
    {2, 40, 130},  // more nodes than candidates, three words
    {2, 7, 5},     // most threads have nothing
    {2, 0, 3},     // no candidate
    {2, 9, 1},     // the root alone
};

TEST(every_size_under_every_schedule) {
  for (const Size& size : kSizes) {
    for (unsigned seed = 0; seed < 10; ++seed) {
      BuildCase c(size.batch, size.candidates, size.nodes, seed);
      run(c, 2, seed);
      EXPECT_TRUE(c.is_right());
    }
  }
}

TEST(the_largest_block) {
  BuildCase c(1, 300, 100, 0);
  run(c, 1, 0, speculators::kMaxBuildThreads);
  EXPECT_TRUE(c.is_right());
}

void run_with_parent(int64_t place, int64_t parent) {
  BuildCase c(1, 5, 4, 0);
  c.parents[place] = parent;
  run(c, 1, 0);
}

TEST(a_parent_out_of_range_stops_the_kernel) {
  EXPECT_THROWS(run_with_parent(0, 0), "build_tree: a parent is out of range");
  EXPECT_THROWS(run_with_parent(3, 3), "build_tree: a parent is out of range");
  EXPECT_THROWS(run_with_parent(4, -2), "build_tree: a parent is out of range");
}

// Runs the first sizes with a bug; returns whether nobody noticed.
template <BuildBug kBug>
bool goes_unnoticed() {
  bool right = true;
  for (size_t number = 0; number < 3; ++number) {
    for (unsigned seed = 0; seed < 5; ++seed) {
      BuildCase c(kSizes[number].batch, kSizes[number].candidates, kSizes[number].nodes, seed);
      run<kBug>(c, 1, seed);
      right = c.is_right() && right;
    }
  }
  return right;
}

const std::map<std::string, bool (*)()> kPlants = {
    {"takes_the_later_of_equal_scores", goes_unnoticed<BuildBug::kTakesTheLaterOfEqualScores>},
    {"ignores_the_parents_score", goes_unnoticed<BuildBug::kIgnoresTheParentsScore>},
    {"keeps_what_is_no_candidate", goes_unnoticed<BuildBug::kKeepsWhatIsNoCandidate>},
    {"sorts_by_score_alone", goes_unnoticed<BuildBug::kSortsByScoreAlone>},
    {"forgets_the_node_itself", goes_unnoticed<BuildBug::kForgetsTheNodeItself>},
    {"sees_one_word_only", goes_unnoticed<BuildBug::kSeesOneWordOnly>},
    {"links_nodes_of_other_parents", goes_unnoticed<BuildBug::kLinksNodesOfOtherParents>},
    {"counts_ranks_too_early", goes_unnoticed<BuildBug::kCountsRanksTooEarly>},
    {"writes_masks_past_the_tree", goes_unnoticed<BuildBug::kWritesMasksPastTheTree>},
    {"stops_after_one_sequence", goes_unnoticed<BuildBug::kStopsAfterOneSequence>},
};

}  // namespace

int main(int argc, char** argv) {
  return speculators::testing::run_all_tests_or_plant(argc, argv, kPlants);
}
