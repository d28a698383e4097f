/* The way to a peer as Python describes it: an int64 buffer. */
#include "module_path.h"

#include <stdint.h>

#include "copy.h"
#include "parallel.h"

int is_number_of_threads(int64_t number)
{
    return number != 0 && number >= -MAX_THREADS && number <= MAX_THREADS;
}

enum { PATH_HEAD = 9, POOL_WORDS = 2, WINDOW_WORDS = 4 };

/* The fixed part of a job from its path; 0 with an exception where it is not valid. */
int read_path(Job *job, const Py_buffer *path)
{
    const int64_t *words = path->buf;
    Py_ssize_t left = path->len / 8 - PATH_HEAD;
    if (path->len % 8 || left < 0 || words[8] < 0 || words[8] > left / POOL_WORDS ||
        (left - words[8] * POOL_WORDS) % WINDOW_WORDS || !is_number_of_threads(words[4]) ||
        copy_kernel((int)words[5]) == NULL) {
        PyErr_SetString(PyExc_ValueError, "path is not valid");
        return 0;
    }
    job->abort_flag = path->buf;
    job->pid = (pid_t)words[1];
    job->pidfd = (int)words[2];
    job->control = (int)words[3];
    job->threads = (int)words[4];
    job->kernel = (int)words[5];
    job->own_pagemap = (int)words[6];
    job->peer_pagemap = (int)words[7];
    job->n_pools = words[8];
    job->pools = (const Pool *)(words + PATH_HEAD);
    job->windows = (const Window *)(job->pools + job->n_pools);
    job->n_windows = (left - job->n_pools * POOL_WORDS) / WINDOW_WORDS;
    return 1;
}
