// The CPU kernels against the definition in float64.
#include "csrc/draft_attention/merge.h"

#include <cmath>
#include <cstdint>
#include <vector>

#include "csrc/common/testing.h"
#include "csrc/draft_attention/merge_testing.h"

namespace {

using speculators::draft_merge_backward_cpu;
using speculators::draft_merge_cpu;
using speculators::DraftMergeCall;
using speculators::kMaxDiagonals;
using speculators::MergeCase;
using speculators::MergeShape;
using speculators::num_units;

// Runs in two ranges, as two threads would do it; the second first.
void run(void (*kernel)(const DraftMergeCall&, int64_t, int64_t), const DraftMergeCall& call) {
  const int64_t middle = num_units(call) / 3;
  kernel(call, middle, num_units(call));
  kernel(call, 0, middle);
}

void expect_right(const MergeShape& shape, unsigned seed) {
  MergeCase c(shape, seed);
  run(draft_merge_cpu, c.call);
  EXPECT_TRUE(c.forward_is_right());
  c.finish_forward();
  run(draft_merge_backward_cpu, c.call);
  EXPECT_TRUE(c.backward_is_right());
}

TEST(every_head_size) {
  for (const int64_t size : {1, 2, 7, 16, 17, 64, 80, 128, 300}) {
    for (const bool half : {false, true}) expect_right({2, 3, 4, 2, size, 3, half}, 1);
  }
}

TEST(every_grouping_of_heads) {
  for (const int64_t key_heads : {1, 2, 3, 6}) {
    for (const bool half : {false, true}) expect_right({2, 3, 6, key_heads, 20, 2, half}, 2);
  }
}

TEST(every_number_of_diagonals) {
  for (int64_t count = 1; count <= kMaxDiagonals; count += 5) {
    expect_right({1, 2, 4, 2, 9, count, false}, 3);
  }
  expect_right({1, 1, 2, 1, 9, kMaxDiagonals, true}, 3);
}

TEST(memory_in_either_order_and_vectors_that_lie_apart) {
  for (const bool half : {false, true}) {
    for (const bool rows_first : {false, true}) {
      for (const int64_t padding : {0, 5}) {
        expect_right({2, 4, 4, 2, 33, 2, half, rows_first, padding}, 4);
      }
    }
  }
}

TEST(a_row_that_sees_nothing_of_step_zero) {
  for (const bool half : {false, true}) {
    MergeCase c({2, 2, 2, 1, 8, 2, half}, 5);
    c.hide_step_zero(1, 0);
    run(draft_merge_cpu, c.call);
    EXPECT_TRUE(std::isfinite(c.logsumexp(1, 1, 0)));
    EXPECT_TRUE(c.forward_is_right());
    c.finish_forward();
    run(draft_merge_backward_cpu, c.call);
    EXPECT_TRUE(c.backward_is_right());
  }
}

TEST(large_scores_do_not_overflow) {
  MergeCase c({1, 2, 2, 2, 8, 3, false}, 6);
  c.call.scale = 100;
  run(draft_merge_cpu, c.call);
  EXPECT_TRUE(std::isfinite(c.logsumexp(0, 0, 0)));
  EXPECT_TRUE(c.forward_is_right());
}

TEST(a_unit_does_not_depend_on_the_others) {
  const MergeShape shape{2, 5, 4, 2, 40, 3, true, true, 3};
  MergeCase together(shape, 7);
  MergeCase apart(shape, 7);
  for (const auto kernel : {draft_merge_cpu, draft_merge_backward_cpu}) {
    kernel(together.call, 0, num_units(together.call));
    for (int64_t unit = num_units(apart.call); unit-- > 0;) kernel(apart.call, unit, unit + 1);
    EXPECT_TRUE(together.bytes() == apart.bytes());
  }
}

}  // namespace

int main(int argc, char** argv) { return speculators::testing::run_all_tests(argc, argv); }
