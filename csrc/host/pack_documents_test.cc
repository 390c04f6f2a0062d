// Packing on cases worked out by hand; speculators.ops.host's tests compare it with its Python
// twin.
#include "csrc/host/pack_documents.h"

#include <cstdint>
#include <vector>

#include "csrc/common/testing.h"

namespace {

using speculators::pack_documents;
using Rows = std::vector<std::vector<int64_t>>;

TEST(the_longest_goes_first_and_the_tightest_row_wins) {
  // 7 and 5 open rows with 3 and 5 left; 3 goes to the tighter first row, 4 to the second.
  EXPECT_EQ(pack_documents({3, 5, 7, 4}, 10), (Rows{{2, 0}, {1, 3}}));
}

TEST(ties_go_to_the_lower_document_and_the_lower_row) {
  EXPECT_EQ(pack_documents({6, 6, 4, 4}, 10), (Rows{{0, 2}, {1, 3}}));
}

TEST(full_rows_take_nothing_more) {
  EXPECT_EQ(pack_documents({4, 4, 4}, 4), (Rows{{0}, {1}, {2}}));
}

TEST(no_documents_need_no_rows) { EXPECT_EQ(pack_documents({}, 4), Rows{}); }

TEST(what_does_not_fit_is_named) {
  EXPECT_THROWS(pack_documents({1, 9}, 8), "document 1 has 9 tokens");
  EXPECT_THROWS(pack_documents({1, 0}, 8), "document 1 has 0 tokens");
  EXPECT_THROWS(pack_documents({}, 0), "budget is 0 tokens");
}

}  // namespace

int main(int argc, char** argv) { return speculators::testing::run_all_tests(argc, argv); }
