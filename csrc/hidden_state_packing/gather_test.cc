// The CPU kernel against the definition, byte by byte.
#include "csrc/hidden_state_packing/gather.h"

#include <cstdint>
#include <random>
#include <vector>

#include "csrc/common/testing.h"

namespace {

using speculators::first_index_out_of_range;
using speculators::gather_rows_cpu;
using speculators::GatherSource;

TEST(first_index_out_of_range_names_the_position) {
  const std::vector<int64_t> index = {0, 4, 2, 5, -1};
  EXPECT_EQ(first_index_out_of_range(index.data(), 5, 6), 4);
  EXPECT_EQ(first_index_out_of_range(index.data(), 5, 5), 3);
  EXPECT_EQ(first_index_out_of_range(index.data(), 4, 6), -1);
  EXPECT_EQ(first_index_out_of_range(index.data(), 0, 0), -1);
}

TEST(every_byte_is_the_one_that_the_definition_names) {
  std::mt19937 random(1);
  for (const int64_t row_bytes : {0, 1, 2, 6, 64, 130}) {
    for (const int64_t num_layers : {1, 2, 5}) {
      const int64_t num_tokens = 7;
      const int64_t num_rows = 11;
      const int64_t stride = row_bytes + 3;  // rows lie apart
      std::vector<std::vector<uint8_t>> data(num_layers);
      std::vector<GatherSource> sources;
      for (auto& layer : data) {
        layer.resize(num_tokens * stride);
        for (auto& byte : layer) byte = static_cast<uint8_t>(random());
        sources.push_back({layer.data(), stride});
      }
      std::vector<int64_t> index(num_rows);
      for (auto& token : index) token = random() % num_tokens;

      std::vector<uint8_t> out(num_rows * num_layers * row_bytes, 0xEE);
      // Two ranges, as two threads would do it; the second first.
      gather_rows_cpu(sources.data(), num_layers, row_bytes, index.data(), 4, num_rows, out.data());
      gather_rows_cpu(sources.data(), num_layers, row_bytes, index.data(), 0, 4, out.data());

      std::vector<uint8_t> expected;
      for (int64_t row = 0; row < num_rows; ++row) {
        for (const auto& layer : data) {
          const auto first = layer.begin() + index[row] * stride;
          expected.insert(expected.end(), first, first + row_bytes);
        }
      }
      EXPECT_EQ(out, expected);
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return speculators::testing::run_all_tests(argc, argv); }
