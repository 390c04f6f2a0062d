// The Python module of an operator library: importable and empty.
//
// Importing it loads the shared object, whose static initialisers (STABLE_TORCH_LIBRARY) register
// the operators with torch; Python reaches them as torch.ops.speculators. SPECULATORS_MODULE is the
// module's name, given by the build. The limited API makes one file serve every Python from 3.11.
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>

#define SPECULATORS_JOIN_(a, b) a##b
#define SPECULATORS_JOIN(a, b) SPECULATORS_JOIN_(a, b)
#define SPECULATORS_TEXT_(a) #a
#define SPECULATORS_TEXT(a) SPECULATORS_TEXT_(a)

PyMODINIT_FUNC SPECULATORS_JOIN(PyInit_, SPECULATORS_MODULE)(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   SPECULATORS_TEXT(SPECULATORS_MODULE),
                                   "Operators of speculators, registered with torch on import.",
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  return PyModule_Create(&definition);
}
