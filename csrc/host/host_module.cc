// The pybind11 module speculators.ops._host: work on the host that needs no torch.
//
// pybind11 cannot use Python's limited API, so this is one file per Python version;
// speculators/ops/host.py has a Python twin of everything for the versions that have none.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "csrc/host/pack_documents.h"
#include "csrc/host/suffix_index.h"

namespace py = pybind11;

namespace speculators {
namespace {

using TokenArray = py::array_t<int64_t, py::array::c_style>;

std::span<const int64_t> tokens_of(const TokenArray& tokens) {
  if (tokens.ndim() != 1) {
    throw std::invalid_argument("got tokens of " + std::to_string(tokens.ndim()) +
                                " dimensions, expected 1");
  }
  return {tokens.data(), static_cast<size_t>(tokens.size())};
}

template <typename T>
py::array_t<T> array_of(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// Other Python threads run while one works here, so that it takes a lock to keep them apart. The
// lock comes after the release: a thread that waits for it must not hold up the one that has it.
class SharedSuffixIndex {
 public:
  SharedSuffixIndex(int64_t capacity, int64_t max_match) : index_(capacity, max_match) {}

  void extend(const TokenArray& tokens) {
    const auto span = tokens_of(tokens);
    alone([&] { index_.extend(span); });
  }

  void end_sequence() {
    alone([&] { index_.end_sequence(); });
  }

  std::pair<int32_t, int64_t> longest_match(const TokenArray& context) {
    const auto span = tokens_of(context);
    return alone([&] { return index_.longest_match(span); });
  }

  py::tuple propose(const SuffixDraftLimits& limits) {
    return arrays(alone([&] { return index_.propose(limits); }));
  }

  py::tuple propose_after(const TokenArray& context, const SuffixDraftLimits& limits) {
    const auto span = tokens_of(context);
    return arrays(alone([&] { return index_.propose(span, limits); }));
  }

  int64_t size() {
    return alone([&] { return index_.size(); });
  }
  int64_t bytes() {
    return alone([&] { return index_.bytes(); });
  }
  int64_t max_bytes() const { return index_.max_bytes(); }

 private:
  template <typename Action>
  std::invoke_result_t<const Action&> alone(const Action& action) {
    const py::gil_scoped_release release;
    const std::lock_guard lock(mutex_);
    return action();
  }

  static py::tuple arrays(const SuffixDraft& draft) {
    return py::make_tuple(array_of(draft.tokens), array_of(draft.parents),
                          array_of(draft.probabilities), draft.score, draft.match_length);
  }

  SuffixIndex index_;
  std::mutex mutex_;
};

SuffixDraftLimits make_limits(int32_t max_tokens, double factor, int32_t min_match,
                              double min_probability, double doubt, int64_t max_occurrences,
                              bool tree) {
  return {max_tokens, factor, min_match, min_probability, doubt, max_occurrences, tree};
}

}  // namespace
}  // namespace speculators

PYBIND11_MODULE(_host, module) {
  using speculators::SharedSuffixIndex;
  using speculators::SuffixDraftLimits;
  module.doc() = "Host-side work of speculators that needs no torch.";
  module.def("pack_documents", &speculators::pack_documents, py::arg("lengths"), py::arg("budget"),
             py::call_guard<py::gil_scoped_release>());
  py::class_<SuffixDraftLimits>(module, "SuffixDraftLimits")
      .def(py::init(&speculators::make_limits), py::kw_only(), py::arg("max_tokens"),
           py::arg("factor"), py::arg("min_match"), py::arg("min_probability"), py::arg("doubt"),
           py::arg("max_occurrences"), py::arg("tree"));
  py::class_<SharedSuffixIndex>(module, "SuffixIndex")
      .def(py::init<int64_t, int64_t>(), py::arg("capacity"), py::arg("max_match"))
      .def("extend", &SharedSuffixIndex::extend, py::arg("tokens").noconvert())
      .def("end_sequence", &SharedSuffixIndex::end_sequence)
      .def("longest_match", &SharedSuffixIndex::longest_match, py::arg("context").noconvert())
      .def("propose", &SharedSuffixIndex::propose, py::arg("limits"))
      .def("propose_after", &SharedSuffixIndex::propose_after, py::arg("context").noconvert(),
           py::arg("limits"))
      .def("__len__", &SharedSuffixIndex::size)
      .def_property_readonly("bytes", &SharedSuffixIndex::bytes)
      .def_property_readonly("max_bytes", &SharedSuffixIndex::max_bytes);
}
