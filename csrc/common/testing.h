// A test runner in one header, for tests that are plain programs.
//
//   TEST(adds_numbers) {
//     EXPECT_EQ(1 + 1, 2);                      // found, then expected
//     EXPECT_NEAR(0.1 + 0.2, 0.3, 1e-12);
//     EXPECT_THROWS(parse("?"), "line 1");      // a std::exception whose message contains the text
//   }
//   int main(int argc, char** argv) { return speculators::testing::run_all_tests(argc, argv); }
//
// A failed expectation prints its place and both values; the test goes on. The program exits with 0
// only if there was at least one test and every one passed. `--filter=TEXT` runs the tests whose
// name contains the text; `--list` prints the names.
#pragma once

#include <chrono>
#include <cmath>
#include <concepts>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <map>
#include <ranges>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace speculators::testing {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& all_tests() {
  static std::vector<Test> tests;
  return tests;
}

inline bool add_test(const char* name, void (*run)()) {
  all_tests().push_back({name, run});
  return true;
}

inline int& failures_of_current_test() {
  static int failures = 0;
  return failures;
}

inline void report_failure(const char* file, int line, const std::string& message) {
  constexpr int kMostPrinted = 20;  // of one test: a wrong tensor would fill the screen
  const int count = ++failures_of_current_test();
  if (count <= kMostPrinted) std::fprintf(stderr, "%s:%d: %s\n", file, line, message.c_str());
  if (count == kMostPrinted) std::fprintf(stderr, "  (more failures of this test are not shown)\n");
}

// Text of a value for a message: numbers with all their digits, ranges element by element.
template <typename T>
std::string describe(const T& value) {
  std::ostringstream out;
  if constexpr (std::is_same_v<T, bool>) {
    out << (value ? "true" : "false");
  } else if constexpr (std::is_floating_point_v<T>) {
    out.precision(std::numeric_limits<T>::max_digits10);
    out << value;
  } else if constexpr (std::is_integral_v<T>) {
    out << +value;  // + prints a character type as a number
  } else if constexpr (std::is_convertible_v<T, std::string_view>) {
    out << '"' << std::string_view(value) << '"';
  } else if constexpr (std::ranges::range<const T>) {
    constexpr int kMostElements = 32;
    int count = 0;
    out << '{';
    for (const auto& element : value) {
      if (count != 0) out << ", ";
      if (count++ == kMostElements) {
        out << "...";
        break;
      }
      out << describe(element);
    }
    out << '}';
  } else if constexpr (std::is_enum_v<T>) {
    out << describe(static_cast<std::underlying_type_t<T>>(value));
  } else if constexpr (requires { out << value; }) {
    out << value;
  } else {
    out << "(a value of " << sizeof(T) << " bytes)";
  }
  return out.str();
}

template <typename T>
concept PlainInteger = std::integral<T> && !std::same_as<T, bool> && !std::same_as<T, char> &&
                       !std::same_as<T, wchar_t> && !std::same_as<T, char8_t> &&
                       !std::same_as<T, char16_t> && !std::same_as<T, char32_t>;

// == that compares an int with a std::size_t by value.
template <typename A, typename B>
bool equal(const A& a, const B& b) {
  if constexpr (PlainInteger<A> && PlainInteger<B>) {
    return std::cmp_equal(a, b);
  } else {
    return a == b;
  }
}

template <typename A, typename B>
void expect_equal(const A& found, const B& expected, const char* expression, const char* file,
                  int line) {
  if (equal(found, expected)) return;
  report_failure(file, line,
                 std::string(expression) + "\n  found    " + describe(found) + "\n  expected " +
                     describe(expected));
}

inline void expect_near(double found, double expected, double tolerance, const char* expression,
                        const char* file, int line) {
  if (std::abs(found - expected) <= tolerance) return;  // false for NaN
  report_failure(file, line,
                 std::string(expression) + "\n  found    " + describe(found) + "\n  expected " +
                     describe(expected) + " +- " + describe(tolerance));
}

inline void expect_throws(const std::function<void()>& action, const std::string& part,
                          const char* expression, const char* file, int line) {
  std::string found = "no exception";
  try {
    action();
  } catch (const std::exception& exception) {
    found = exception.what();
    if (found.find(part) != std::string::npos) return;
  } catch (...) {
    found = "an exception that is not a std::exception";
  }
  report_failure(file, line,
                 std::string(expression) + "\n  found    " + found +
                     "\n  expected an exception that says \"" + part + "\"");
}

inline bool run_test(const Test& test) {
  failures_of_current_test() = 0;
  const auto start = std::chrono::steady_clock::now();
  try {
    test.run();
  } catch (const std::exception& exception) {
    report_failure(test.name, 0, std::string("the test threw: ") + exception.what());
  } catch (...) {
    report_failure(test.name, 0, "the test threw something that is not a std::exception");
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  const bool passed = failures_of_current_test() == 0;
  std::printf("%s %s (%.2f s)\n", passed ? "ok    " : "FAILED", test.name, seconds.count());
  std::fflush(stdout);
  return passed;
}

inline int run_all_tests(int argc, char** argv) {
  std::string filter;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--list") {
      for (const Test& test : all_tests()) std::printf("%s\n", test.name);
      return 0;
    }
    if (argument.rfind("--filter=", 0) != 0) {
      std::fprintf(stderr, "unknown argument \"%s\"; there are --filter=TEXT and --list\n",
                   argv[i]);
      return 2;
    }
    filter = argument.substr(std::strlen("--filter="));
  }
  int passed = 0;
  int failed = 0;
  for (const Test& test : all_tests()) {
    if (std::string(test.name).find(filter) == std::string::npos) continue;
    run_test(test) ? ++passed : ++failed;
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  if (passed + failed == 0)
    std::fprintf(stderr, "no test has \"%s\" in its name\n", filter.c_str());
  return failed == 0 && passed > 0 ? 0 : 1;
}

// For programs that can also run with a deliberate mistake: `--plant=NAME` calls mistakes.at(NAME),
// which returns whether nobody noticed. The exit status is 0 only if nobody did, or if there is no
// such mistake: a test that demands a failure must not be content with a misspelt name.
inline int run_all_tests_or_plant(int argc, char** argv,
                                  const std::map<std::string, bool (*)()>& mistakes) {
  const std::string prefix = "--plant=";
  const std::string argument = argc > 1 ? argv[1] : "";
  if (argument.rfind(prefix, 0) != 0) return run_all_tests(argc, argv);
  const auto mistake = mistakes.find(argument.substr(prefix.size()));
  if (mistake == mistakes.end()) {
    std::printf("%s: there is no such mistake\n", argument.c_str());
    return 0;
  }
  try {
    const bool unnoticed = mistake->second();
    std::printf("%s %s\n", argument.c_str(), unnoticed ? "went unnoticed" : "gave a wrong result");
    return unnoticed ? 0 : 1;
  } catch (const std::exception& exception) {
    std::printf("%s was noticed: %s\n", argument.c_str(), exception.what());
    return 1;
  }
}

}  // namespace speculators::testing

#define TEST(name)                                                                                 \
  static void name();                                                                              \
  [[maybe_unused]] static const bool name##_added = ::speculators::testing::add_test(#name, name); \
  static void name()

#define EXPECT_EQ(found, expected)                                                             \
  ::speculators::testing::expect_equal((found), (expected), #found " == " #expected, __FILE__, \
                                       __LINE__)
#define EXPECT_TRUE(condition) \
  ::speculators::testing::expect_equal(bool(condition), true, #condition, __FILE__, __LINE__)
#define EXPECT_FALSE(condition) \
  ::speculators::testing::expect_equal(bool(condition), false, #condition, __FILE__, __LINE__)
#define EXPECT_NEAR(found, expected, tolerance)                         \
  ::speculators::testing::expect_near((found), (expected), (tolerance), \
                                      #found " is near " #expected, __FILE__, __LINE__)
#define EXPECT_THROWS(expression, part)                                                 \
  ::speculators::testing::expect_throws([&] { static_cast<void>(expression); }, (part), \
                                        #expression, __FILE__, __LINE__)
