/* Few blocks over a route that core has looked up. */
#ifndef DATADIST_MODULE_KNOWN_WAY_H
#define DATADIST_MODULE_KNOWN_WAY_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern const char known_way_doc[];

PyObject *py_known_way(PyObject *self, PyObject *const *args, Py_ssize_t nargs);

#endif
