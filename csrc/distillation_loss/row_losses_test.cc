// The CPU kernel against the definition in float64, and its exp and log against the C library's.
#include "csrc/distillation_loss/row_losses.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "csrc/common/testing.h"
#include "csrc/distillation_loss/row_losses_testing.h"
#include "csrc/distillation_loss/vector_math.h"

namespace {

using speculators::GradientPlace;
using speculators::index_out_of_range;
using speculators::kEveryLoss;
using speculators::LossFactors;
using speculators::row_losses_cpu;
using speculators::RowLossCall;
using speculators::RowLossCase;

// The distance from the correctly rounded value, in units of its last place.
double units_off(float found, double exact) {
  const auto rounded = static_cast<float>(exact);
  const double unit = std::nextafter(std::abs(rounded), INFINITY) - double{std::abs(rounded)};
  return std::abs(found - exact) / unit;
}

TEST(exponential_is_right_to_two_units) {
  double worst = 0;
  for (float x = -87.3f; x < 88.0f; x += 0.000731f) {
    worst = std::max(worst, units_off(speculators::exponential(x), std::exp(double{x})));
  }
  EXPECT_NEAR(worst, 0.0, 2.0);
  EXPECT_EQ(speculators::exponential(0.0f), 1.0f);
  EXPECT_EQ(speculators::exponential(-88.0f), 0.0f);
  EXPECT_EQ(speculators::exponential(-1e30f), 0.0f);
  EXPECT_EQ(speculators::exponential(-INFINITY), 0.0f);
  EXPECT_TRUE(std::isnan(speculators::exponential(NAN)));
}

TEST(logarithm_is_right_to_two_units) {
  double worst = 0;
  for (uint32_t bits = 0x00800000u; bits < 0x7F000000u; bits += 9973) {
    const auto x = std::bit_cast<float>(bits);
    worst = std::max(worst, units_off(speculators::logarithm(x), std::log(double{x})));
  }
  EXPECT_NEAR(worst, 0.0, 2.0);
  EXPECT_EQ(speculators::logarithm(1.0f), 0.0f);
  EXPECT_TRUE(std::isfinite(speculators::logarithm(0.0f)));
}

// Runs in two ranges, as two threads would do it; the second first.
void run(const RowLossCall& call) {
  row_losses_cpu(call, call.num_rows / 2, call.num_rows);
  row_losses_cpu(call, 0, call.num_rows / 2);
}

TEST(every_width) {
  for (const int64_t width : {1, 2, 5, 15, 16, 17, 64, 100, 511, 512, 513}) {
    for (const bool half : {false, true}) {
      RowLossCase c({6, width, 5, half, GradientPlace::kItsOwn, kEveryLoss}, 1);
      run(c.call);
      EXPECT_TRUE(c.is_right());
    }
  }
}

TEST(each_loss_by_itself) {
  for (int number = 0; number < speculators::kNumLosses; ++number) {
    LossFactors factors = {};
    reinterpret_cast<float*>(&factors)[number] = 1;
    RowLossCase c({8, 40, 6, false, GradientPlace::kOverTheLogits, factors}, number);
    run(c.call);
    EXPECT_TRUE(c.is_right());
  }
}

TEST(gradients_in_each_place_and_rows_that_lie_apart) {
  for (const bool half : {false, true}) {
    for (const auto place :
         {GradientPlace::kNone, GradientPlace::kItsOwn, GradientPlace::kOverTheLogits}) {
      for (const bool masked : {false, true}) {
        RowLossCase c({9, 33, 6, half, place, kEveryLoss, 5}, 2);
        c.call.only_in_vocabulary = masked;
        run(c.call);
        EXPECT_TRUE(c.is_right());
      }
    }
  }
}

TEST(hardly_any_overlap) {
  LossFactors nla = {};
  nla.nla = 1;
  RowLossCase c({4, 20, 1, false, GradientPlace::kItsOwn, nla}, 3);
  for (int64_t row = 0; row < 4; ++row) c.set_logit(row, 3, 90.0f + 40 * row);  // p is 0 there
  run(c.call);
  EXPECT_TRUE(c.is_right());
  EXPECT_TRUE(c.loss[3] > 150);
}

TEST(a_row_does_not_depend_on_the_others) {
  RowLossCase together({7, 600, 3, false, GradientPlace::kItsOwn, kEveryLoss}, 4);
  RowLossCase apart({7, 600, 3, false, GradientPlace::kItsOwn, kEveryLoss}, 4);
  row_losses_cpu(together.call, 0, 7);
  for (int64_t row = 6; row >= 0; --row) row_losses_cpu(apart.call, row, row + 1);
  EXPECT_EQ(together.loss, apart.loss);
  EXPECT_EQ(together.alpha, apart.alpha);
  bool same = true;
  for (int64_t i = 0; i < 7 * 600; ++i) {
    same = same && together.gradient(i / 600, i % 600) == apart.gradient(i / 600, i % 600);
  }
  EXPECT_TRUE(same);
}

TEST(a_logit_that_is_not_a_number_shows) {
  RowLossCase c({3, 40, 1, false, GradientPlace::kItsOwn, kEveryLoss}, 5);
  c.set_logit(1, 17, NAN);
  run(c.call);
  EXPECT_TRUE(std::isfinite(c.loss[0]) && std::isfinite(c.loss[2]));
  EXPECT_TRUE(std::isnan(c.loss[1]));
  EXPECT_TRUE(std::isnan(c.gradient(1, 0)));
}

TEST(what_is_no_number_is_no_acceptance) {
  EXPECT_TRUE(speculators::what_is_no_number_shows(
      [](const RowLossCall& call) { row_losses_cpu(call, 0, call.num_rows); }));
}

std::string named(void (*spoil)(RowLossCase&)) {
  RowLossCase c({3, 5, 2, false, GradientPlace::kNone, kEveryLoss}, 6);
  spoil(c);
  const char* name = index_out_of_range(c.call);
  return name == nullptr ? "" : name;
}

TEST(indices_out_of_range_are_named) {
  EXPECT_EQ(named([](RowLossCase&) {}), "");
  EXPECT_EQ(named([](RowLossCase& c) { c.positions[2] = 2; }), "positions");
  EXPECT_EQ(named([](RowLossCase& c) { c.positions[0] = -1; }), "positions");
  EXPECT_EQ(named([](RowLossCase& c) { c.best[1] = 5; }), "best");
  EXPECT_EQ(named([](RowLossCase& c) { c.likeliest[1] = -1; }), "likeliest");
  EXPECT_EQ(named([](RowLossCase& c) { c.top[5] = 5; }), "top");
  EXPECT_EQ(named([](RowLossCase& c) { c.data_tokens[0] = -2; }), "data_tokens");
}

}  // namespace

int main(int argc, char** argv) { return speculators::testing::run_all_tests(argc, argv); }
