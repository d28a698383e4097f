/* The way to a peer as Python describes it. */
#ifndef DATADIST_MODULE_PATH_H
#define DATADIST_MODULE_PATH_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "transfer.h"

/* Whether so many threads can be asked for; negative: as tuned, at most so many. */
int is_number_of_threads(int64_t number);

/* The fixed part of a job from its path (see the doc of transfer); 0 with an exception where it is not
 * valid. */
int read_path(Job *job, const Py_buffer *path);

#endif
