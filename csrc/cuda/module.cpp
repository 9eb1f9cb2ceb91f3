// The extension module sdan_fast._C_cuda: importing it registers the ".cuda" overload of every op
// that has a CUDA kernel.
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030a0000
#endif
#include <Python.h>

#include "launches.h"

namespace {

// compiled_archs() -> list of int: the GPU architectures that this build has code for, 750 for
// sm_75 and so on.
PyObject* compiled_archs(PyObject*, PyObject*) {
  const std::vector<int> archs = sdan_fast::cuda::compiled_archs();
  PyObject* list = PyList_New(static_cast<Py_ssize_t>(archs.size()));
  if (!list) return nullptr;
  for (size_t i = 0; i < archs.size(); ++i) {
    PyObject* n = PyLong_FromLong(archs[i]);
    if (!n || PyList_SetItem(list, static_cast<Py_ssize_t>(i), n)) {
      Py_DECREF(list);
      return nullptr;
    }
  }
  return list;
}

PyMethodDef methods[] = {{"compiled_archs", compiled_archs, METH_NOARGS,
                          "GPU architectures that this build has code for, as 750 for sm_75."},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_C_cuda",
                          "CUDA C++ kernels of sdan_fast.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() {
  return PyModule_Create(&definition);
}
