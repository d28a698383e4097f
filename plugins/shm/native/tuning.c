#define _GNU_SOURCE
#include "tuning.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include "flush.h"
#include "transfer.h"

enum {
    PART = 512 << 10, /* what a thread copies at a time */
    ROUNDS = 5,     /* the best one counts: others may have been disturbed */
    MOST = 16,      /* threads that are tried */
    BACKGROUND_NICE = 10,
};
static const double BETTER = 1.03; /* less is chance */
static const double ENOUGH = 0.95; /* of the best speed: more threads would be a waste */

static _Atomic int begun, kernel_in_force = KERNEL_AUTO, threads_in_force = DEFAULT_THREADS;

int chosen_kernel(void)
{
    int kernel = atomic_load_explicit(&kernel_in_force, memory_order_relaxed);
    return kernel == KERNEL_AUTO ? default_kernel() : kernel;
}

int chosen_threads(int threads)
{
    int chosen = atomic_load_explicit(&threads_in_force, memory_order_relaxed);
    if (threads > 0)
        return threads;
    return chosen < -threads ? chosen : -threads;
}

/* -- measuring -------------------------------------------------------------------------------- */

/* Threads that copy at the same time, each its own part of the memory into another one. */
typedef struct {
    int threads;
    const int *kernels; /* in turns */
    int n;
    char *memory;
    pthread_mutex_t gate; /* held until the barrier is there */
    pthread_barrier_t barrier;
    _Atomic int joined;
    int64_t begun[MOST], ended[MOST];
    double seconds[KERNELS]; /* the best of each kernel, by its place in kernels */
} Trial;

static void note(Trial *trial, int place)
{
    int64_t begun = trial->begun[0], ended = trial->ended[0];
    for (int i = 1; i < trial->threads; i++) {
        begun = trial->begun[i] < begun ? trial->begun[i] : begun;
        ended = trial->ended[i] > ended ? trial->ended[i] : ended;
    }
    double seconds = (double)(ended - begun) / 1e9;
    if (trial->seconds[place] == 0 || seconds < trial->seconds[place])
        trial->seconds[place] = seconds;
}

static void *take_part(void *argument)
{
    Trial *trial = argument;
    int me = atomic_fetch_add(&trial->joined, 1);
    char *to = trial->memory + (size_t)me * 2 * PART, *from = to + PART;
    pthread_mutex_lock(&trial->gate);
    pthread_mutex_unlock(&trial->gate);
    for (int turn = 0; turn < ROUNDS * trial->n; turn++) {
        Copy copy = copy_kernel(trial->kernels[turn % trial->n]);
        flush(to, 2 * PART);
        pthread_barrier_wait(&trial->barrier);
        trial->begun[me] = now_ns();
        copy(to, from, PART);
        copy_fence();
        trial->ended[me] = now_ns();
        pthread_barrier_wait(&trial->barrier);
        if (me == 0)
            note(trial, turn % trial->n);
        pthread_barrier_wait(&trial->barrier);
    }
    return NULL;
}

/* Fill trial->seconds with at most trial->threads, and say in it how many there were. */
static void run(Trial *trial)
{
    pthread_t helpers[MOST];
    int wanted = trial->threads;
    memset(trial->seconds, 0, sizeof(trial->seconds));
    trial->joined = 0;
    pthread_mutex_init(&trial->gate, NULL);
    pthread_mutex_lock(&trial->gate);
    for (trial->threads = 1; trial->threads < wanted; trial->threads++)
        if (start_thread(&helpers[trial->threads], take_part, trial) != 0)
            break;
    pthread_barrier_init(&trial->barrier, NULL, (unsigned)trial->threads);
    pthread_mutex_unlock(&trial->gate);
    take_part(trial);
    for (int i = 1; i < trial->threads; i++)
        pthread_join(helpers[i], NULL);
    pthread_barrier_destroy(&trial->barrier);
    pthread_mutex_destroy(&trial->gate);
}

static double speed(const Trial *trial, int place)
{
    return (double)PART * trial->threads / trial->seconds[place];
}

/* The kernel that is fastest with the usual number of threads; the default where none is better by far. */
static void choose_kernel(Trial *trial, Tuning *found)
{
    int tried[KERNELS];
    trial->kernels = tried;
    trial->n = 0;
    for (int kernel = 0; kernel < KERNELS; kernel++)
        if (find_kernel(kernel) != NULL)
            tried[trial->n++] = kernel;
    run(trial);
    found->kernel_threads = trial->threads;
    for (int place = 0; place < trial->n; place++)
        found->kernels[tried[place]] = speed(trial, place);
    int best = default_kernel();
    double least = found->kernels[best] * BETTER;
    for (int kernel = 0; kernel < KERNELS; kernel++)
        if (found->kernels[kernel] > least)
            least = found->kernels[best = kernel];
    found->chosen_kernel = best;
}

/* The fewest threads that are about as fast as any number of them; not below what is usual, since a
 * machine that does something else meanwhile shows too little. */
static void choose_threads(Trial *trial, int most, Tuning *found)
{
    double best = 0;
    trial->kernels = &found->chosen_kernel;
    trial->n = 1;
    for (int threads = 1; threads <= most && found->steps < MAX_STEPS; threads *= 2) {
        trial->threads = threads;
        run(trial);
        found->threads[found->steps] = trial->threads;
        found->scaling[found->steps++] = speed(trial, 0);
        best = speed(trial, 0) > best ? speed(trial, 0) : best;
    }
    int step = 0;
    while (found->scaling[step] < best * ENOUGH)
        step++;
    found->chosen_threads =
        found->threads[step] > DEFAULT_THREADS ? found->threads[step] : DEFAULT_THREADS;
}

int tune(int most, Tuning *found)
{
    *found = (Tuning){.steps = 0};
    int idle = idle_processors() + 1; /* this thread runs too */
    most = most < MOST ? most : MOST;
    most = most < idle ? most : idle;
    most = most > 1 ? most : 1;
    size_t bytes = (size_t)most * 2 * PART;
    char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return errno;
    (void)madvise(memory, bytes, MADV_DONTFORK);
    memset(memory, 1, bytes);
    Trial trial = {.threads = most < DEFAULT_THREADS ? most : DEFAULT_THREADS, .memory = memory};
    choose_kernel(&trial, found);
    choose_threads(&trial, most, found);
    munmap(memory, bytes);
    atomic_store(&kernel_in_force, found->chosen_kernel);
    atomic_store(&threads_in_force, found->chosen_threads);
    return 0;
}

/* -- in the background ------------------------------------------------------------------------ */

static void *tune_now(void *argument)
{
    Tuning found;
    (void)setpriority(PRIO_PROCESS, 0, BACKGROUND_NICE); /* of this thread and those that it starts */
    (void)tune((int)(intptr_t)argument, &found);
    return NULL;
}

void tune_soon(int most)
{
    if (atomic_exchange(&begun, 1) == 0)
        (void)start_detached(tune_now, (void *)(intptr_t)most);
}
