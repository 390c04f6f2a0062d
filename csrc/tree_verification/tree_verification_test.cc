// The CPU kernels against the definition in float64.
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "csrc/common/testing.h"
#include "csrc/tree_verification/build_tree.h"
#include "csrc/tree_verification/logit_rows.h"
#include "csrc/tree_verification/tree_verification_testing.h"
#include "csrc/tree_verification/verification.h"

namespace {

using speculators::BuildCase;
using speculators::LogitRow;
using speculators::SamplingMode;
using speculators::VerifyCase;
using speculators::VerifyShape;

TEST(trees_of_every_size) {
  for (const int64_t candidates : {0, 1, 5, 80, 300}) {
    for (const int64_t nodes : {1, 2, 10, 64, 65, 200}) {
      BuildCase c(3, candidates, nodes, static_cast<unsigned>(candidates + nodes));
      build_tree_cpu(c.call, 1, 3);  // two ranges, as two threads would do it; the second first
      build_tree_cpu(c.call, 0, 1);
      EXPECT_TRUE(c.is_right());
    }
  }
}

TEST(parents_out_of_range_are_found) {
  BuildCase c(2, 5, 3, 0);
  EXPECT_EQ(first_parent_out_of_range(c.call), -1);
  c.parents[7] = 2;
  EXPECT_EQ(first_parent_out_of_range(c.call), 7);
  c.parents[3] = -2;
  EXPECT_EQ(first_parent_out_of_range(c.call), 3);
}

constexpr SamplingMode kModes[] = {SamplingMode::kPointMass, SamplingMode::kWithReplacement,
                                   SamplingMode::kWithoutReplacement};

bool runs_right(const VerifyShape& shape, unsigned seed) {
  VerifyCase c(shape, seed);
  if (speculators::first_out_of_range(c.call).what != nullptr) return false;
  verify_greedy_cpu(c.call, 0, shape.batch);
  bool right = c.greedy_is_right();
  for (int64_t b = shape.batch - 1; b >= 0; --b) {
    right = verify_sampling_cpu(c.call, b, b + 1) < 0 && right;
  }
  return c.sampling_is_right() && right;
}

TEST(every_mode_and_setting) {
  for (const SamplingMode mode : kModes) {
    for (const bool half : {false, true}) {
      for (const int64_t width : {70, 5000}) {
        for (const auto& [temperature, top_k, top_p] :
             {std::tuple(1.0f, 0, 1.0), std::tuple(0.7f, 20, 1.0), std::tuple(1.0f, 0, 0.9),
              std::tuple(1.9f, 30, 0.8), std::tuple(8.0f, 0, 0.97)}) {
          for (unsigned seed = 0; seed < 4; ++seed) {
            const VerifyShape shape = {3, 8, width, half, mode, temperature, top_k, top_p, 3, half};
            EXPECT_TRUE(runs_right(shape, seed));
          }
        }
      }
    }
  }
}

TEST(the_least_there_is_and_more_nodes_than_a_word) {
  for (const SamplingMode mode : kModes) {
    EXPECT_TRUE(runs_right({2, 1, 1, false, mode}, 0));
    EXPECT_TRUE(runs_right({2, 100, 130, false, mode}, 1));
  }
}

TEST(paths_are_long_enough_to_test_something) {
  int64_t total = 0;
  for (unsigned seed = 0; seed < 10; ++seed) {
    VerifyCase c({4, 8, 70, false, SamplingMode::kWithReplacement}, seed);
    verify_sampling_cpu(c.call, 0, 4);
    total += c.total_accepted();
  }
  EXPECT_TRUE(total > 40);
}

std::string named(void (*spoil)(VerifyCase&)) {
  VerifyCase c({2, 4, 9, false, SamplingMode::kWithReplacement}, 5);
  spoil(c);
  const speculators::OutOfRange found = speculators::first_out_of_range(c.call);
  return found.what == nullptr ? "" : found.what + std::string(" ") + std::to_string(found.place);
}

TEST(what_is_out_of_range_is_named) {
  EXPECT_EQ(named([](VerifyCase&) {}), "");
  EXPECT_EQ(named([](VerifyCase& c) { c.parents[4] = 0; }), "parents 4");
  EXPECT_EQ(named([](VerifyCase& c) { c.parents[3] = 3; }), "parents 3");
  EXPECT_EQ(named([](VerifyCase& c) { c.parents[3] = -2; }), "parents 3");
  EXPECT_EQ(named([](VerifyCase& c) { c.parents[5] = 0, c.tokens[5] = 9; }), "tokens 5");
  EXPECT_EQ(named([](VerifyCase& c) { c.parents[5] = 0, c.tokens[5] = -1; }), "tokens 5");
  EXPECT_EQ(named([](VerifyCase& c) { c.parents[2] = 1, c.call.q_nodes = 1; }),
            "draft_probabilities 2");
  EXPECT_EQ(named([](VerifyCase& c) { c.uniforms[7] = 1; }), "uniforms 7");
  EXPECT_EQ(named([](VerifyCase& c) { c.uniforms[7] = NAN; }), "uniforms 7");
}

TEST(a_token_that_q_cannot_have_drawn_is_found) {
  VerifyCase c({1, 2, 9, false, SamplingMode::kWithReplacement}, 5);
  c.parents[1] = 0;
  c.q[c.tokens[1]] = 0;
  EXPECT_EQ(verify_sampling_cpu(c.call, 0, 1), 1);
}

TEST(weights_of_what_is_no_number) {
  const std::vector<float> z = {NAN, 1, -INFINITY, 3};
  const LogitRow row = {z.data(), false, 4};
  float max = 0, sum = 0, weights[4];
  speculators::summarise_row(row, 1, &max, &sum);
  EXPECT_EQ(max, 3.0f);
  EXPECT_NEAR(sum, 1 + std::exp(-2.0), 1e-6);
  speculators::weigh(row, 0, 4, max, 1, weights);
  EXPECT_EQ(weights[0], 0.0f);
  EXPECT_EQ(weights[2], 0.0f);
  EXPECT_EQ(weights[3], 1.0f);
  EXPECT_EQ(speculators::index_of_largest(row), 3);
}

}  // namespace

int main(int argc, char** argv) { return speculators::testing::run_all_tests(argc, argv); }
