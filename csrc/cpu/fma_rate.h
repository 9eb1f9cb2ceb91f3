// The arithmetic yardstick for Python: _C_cpu.fma_loop(rounds) -> floating-point operations done.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace sdan_fast {

// Releases the GIL while it runs, so that Python threads measure all cores at once.
PyObject* fma_loop(PyObject* self, PyObject* rounds);

}  // namespace sdan_fast
