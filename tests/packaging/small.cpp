// An extension module that tests build in a second: value() is that of value.h.
#include <Python.h>

#include "value.h"

namespace {

PyObject* value(PyObject*, PyObject*) { return PyLong_FromLong(kValue); }

PyMethodDef functions[] = {{"value", value, METH_NOARGS, nullptr}, {}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "small", nullptr, -1, functions};

}  // namespace

#define OE_EXT_JOIN(a, b) a##b
#define OE_EXT_INIT(name) OE_EXT_JOIN(PyInit_, name)

PyMODINIT_FUNC OE_EXT_INIT(TORCH_EXTENSION_NAME)() { return PyModule_Create(&module); }
