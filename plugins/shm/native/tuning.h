/* Which kernel copies large transfers, and with how many threads: what is fastest on this machine.
 *
 * That is measured once per process, in the background, after the first large transfer that leaves the
 * choice to us. Until then, and where it cannot be measured, defaults serve. */
#ifndef DATADIST_TUNING_H
#define DATADIST_TUNING_H

#include "copy.h"
#include "parallel.h"

enum { DEFAULT_THREADS = 4, MAX_STEPS = 8 };

/* What was measured. Speeds are bytes per second, from memory to memory. */
typedef struct {
    double kernels[KERNELS]; /* 0: not on this machine */
    int kernel_threads;      /* with so many threads */
    int steps;               /* of the chosen kernel by more and more threads: */
    int threads[MAX_STEPS];
    double scaling[MAX_STEPS];
    int chosen_kernel, chosen_threads;
} Tuning;

/* The choice at this moment. */
int chosen_kernel(void);

/* Threads for a transfer: a positive number is as the user wants it, a negative one asks for the choice
 * at this moment, at most so many. */
int chosen_threads(int threads);

/* Measure in the background with at most so many threads, once per process. */
void tune_soon(int most);

/* Measure now, in the calling thread and helpers, and have it in force. 0, or an errno. */
int tune(int most, Tuning *result);

#endif
