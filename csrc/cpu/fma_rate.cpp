// Runs the picked instruction set's loop of multiply-adds without the GIL.
#include "fma_rate.h"

#include "isa/fma_rate.h"

namespace sdan_fast {

PyObject* fma_loop(PyObject*, PyObject* rounds) {
  const long long count = PyLong_AsLongLong(rounds);
  if (PyErr_Occurred() != nullptr) return nullptr;
  if (count < 0) {
    PyErr_SetString(PyExc_ValueError, "rounds must not be negative");
    return nullptr;
  }
  static const auto kernel = SDAN_PICK_KERNEL(fma_loop);
  float sink = 0.0f;
  PyThreadState* state = PyEval_SaveThread();
  kernel(count, &sink);
  PyEval_RestoreThread(state);
  // The sink decides nothing; it is looked at so that no compiler drops the loop.
  const double operations = static_cast<double>(count) * kFmaRoundFlops;
  return PyFloat_FromDouble(sink < 0.0f ? 0.0 : operations);
}

}  // namespace sdan_fast
