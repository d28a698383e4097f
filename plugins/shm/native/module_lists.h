/* Lists of int as vectors. */
#ifndef DATADIST_MODULE_LISTS_H
#define DATADIST_MODULE_LISTS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern const char convert_list_doc[];

PyObject *py_convert_list(PyObject *self, PyObject *const *args, Py_ssize_t nargs);

#endif
