// The pybind11 module speculators.ops._host: work on the host that needs no torch.
//
// pybind11 cannot use Python's limited API, so this is one file per Python version;
// speculators/ops/host.py has a Python twin of every function for the versions that have none.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "csrc/host/pack_documents.h"

PYBIND11_MODULE(_host, module) {
  module.doc() = "Host-side work of speculators that needs no torch.";
  module.def("pack_documents", &speculators::pack_documents, pybind11::arg("lengths"),
             pybind11::arg("budget"), pybind11::call_guard<pybind11::gil_scoped_release>());
}
