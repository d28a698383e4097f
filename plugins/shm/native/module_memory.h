/* Mappings, and the pages of memory. */
#ifndef DATADIST_MODULE_MEMORY_H
#define DATADIST_MODULE_MEMORY_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyMethodDef memory_methods[];

#endif
