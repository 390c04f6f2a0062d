// The CUDA kernel's source on the host: right under every schedule, and wrong with each planted
// bug.
//
// `--plant=NAME` runs the kernel with one bug; the program then fails, by a wrong result, an
// exception or a sanitizer's report. tests/csrc asserts that, build by build.
#include "csrc/common/cuda_emulator.h"
// The emulator comes first: it stands in for <cuda_runtime.h>.
#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "csrc/common/testing.h"
#include "csrc/hidden_state_packing/gather.cuh"

namespace {

using speculators::gather_rows_kernel;
using speculators::GatherBug;
using speculators::GatherLayers;
using speculators::emulator::launch;

struct Case {
  int64_t num_layers, num_tokens, words_per_row, row_stride_words, num_rows;
  unsigned blocks, threads;
};

const std::vector<Case> kCases = {
    {3, 9, 70, 70, 13, 2, 64},   // a row is more than two rounds of a warp
    {2, 5, 32, 40, 40, 1, 128},  // rows lie apart; each warp takes several rows
    {1, 1, 1, 1, 1, 1, 32},      // the least there is
    {5, 4, 3, 3, 6, 7, 256},     // more warps than rows
};

// Whether the kernel leaves exactly the defined words, and nothing behind them.
template <typename Word, GatherBug kBug>
bool is_right(const Case& c, unsigned seed) {
  std::mt19937 random(seed * 31 + 7);
  std::vector<std::vector<Word>> data(c.num_layers);
  GatherLayers layers{};
  for (int64_t layer = 0; layer < c.num_layers; ++layer) {
    data[layer].resize((c.num_tokens - 1) * c.row_stride_words + c.words_per_row);
    for (auto& word : data[layer]) {
      uint8_t bytes[sizeof(Word)];
      for (auto& byte : bytes) byte = static_cast<uint8_t>(random());
      std::memcpy(&word, bytes, sizeof(Word));
    }
    layers.data[layer] = data[layer].data();
    layers.row_stride_words[layer] = c.row_stride_words;
  }
  std::vector<int64_t> index(c.num_rows);
  for (auto& token : index) token = random() % c.num_tokens;
  const int64_t out_row_words = c.num_layers * c.words_per_row;
  std::vector<Word> out(c.num_rows * out_row_words);

  launch(
      dim3(c.blocks, c.num_layers), dim3(c.threads), 0,
      [&] {
        gather_rows_kernel<Word, kBug>(layers, c.num_tokens, c.words_per_row, index.data(),
                                       c.num_rows, out_row_words, out.data());
      },
      seed);

  bool right = true;
  for (int64_t row = 0; row < c.num_rows; ++row) {
    for (int64_t layer = 0; layer < c.num_layers; ++layer) {
      const Word* expected = data[layer].data() + index[row] * c.row_stride_words;
      const Word* found = out.data() + row * out_row_words + layer * c.words_per_row;
      right = right && std::memcmp(found, expected, c.words_per_row * sizeof(Word)) == 0;
    }
  }
  return right;
}

template <typename Word>
void expect_right() {
  for (const Case& c : kCases) {
    for (unsigned seed = 0; seed < 6; ++seed)
      EXPECT_TRUE((is_right<Word, GatherBug::kNone>(c, seed)));
  }
}

TEST(words_of_two_bytes) { expect_right<uint16_t>(); }
TEST(words_of_four_bytes) { expect_right<uint32_t>(); }
TEST(words_of_sixteen_bytes) { expect_right<uint4>(); }

template <GatherBug kBug>
void gather_one_row(int64_t token) {
  const std::vector<uint32_t> layer = {1, 2};
  std::vector<uint32_t> out(1);
  GatherLayers layers{};
  layers.data[0] = layer.data();
  layers.row_stride_words[0] = 1;
  launch(dim3(1), dim3(32), 0,
         [&] { gather_rows_kernel<uint32_t, kBug>(layers, 2, 1, &token, 1, 1, out.data()); });
}

TEST(an_index_out_of_range_stops_the_kernel) {
  EXPECT_THROWS(gather_one_row<GatherBug::kNone>(2), "gather: index out of range");
  EXPECT_THROWS(gather_one_row<GatherBug::kNone>(-1), "gather: index out of range");
}

// Runs every case with a bug; returns whether nobody noticed.
template <GatherBug kBug>
bool goes_unnoticed() {
  bool right = true;
  for (const Case& c : kCases) right = is_right<uint32_t, kBug>(c, 0) && right;
  return right;
}

bool skipped_check_goes_unnoticed() {
  gather_one_row<GatherBug::kSkipsTheIndexCheck>(1 << 30);  // a sanitizer's business
  return true;
}

const std::map<std::string, bool (*)()> kPlants = {
    {"copies_past_the_row", goes_unnoticed<GatherBug::kCopiesPastTheRow>},
    {"ignores_row_stride", goes_unnoticed<GatherBug::kIgnoresRowStride>},
    {"wrong_layer_offset", goes_unnoticed<GatherBug::kWrongLayerOffset>},
    {"skips_the_index_check", skipped_check_goes_unnoticed},
    {"stops_after_one_row", goes_unnoticed<GatherBug::kStopsAfterOneRow>},
    {"all_warps_take_the_same_row", goes_unnoticed<GatherBug::kAllWarpsTakeTheSameRow>},
};

}  // namespace

int main(int argc, char** argv) {
  return speculators::testing::run_all_tests_or_plant(argc, argv, kPlants);
}
