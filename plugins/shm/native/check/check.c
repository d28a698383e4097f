/* What the native code does, without Python: for machines that only an emulator stands in for.
 *
 * Every failure ends the program with its line. Run by plugins/shm/cross. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../copy.h"
#include "../memory.h"
#include "../parallel.h"
#include "../sightings.h"
#include "../transfer.h"
#include "../tuning.h"

#define CHECK(what)                                                                                \
    do {                                                                                           \
        if (!(what)) {                                                                             \
            fprintf(stderr, "%s:%d: not so: %s (errno %d)\n", __FILE__, __LINE__, #what, errno);   \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

enum { MIB = 1 << 20, SIZE = 24 * MIB, MOST = 70000, ROOM = MOST + 256 };

static char *memory(void)
{
    void *address;
    int fd = memfd_create("check", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, SIZE) == 0);
    CHECK(map_shared(fd, SIZE, 1, 0, &address) == 0);
    close(fd);
    return address;
}

static void fill(char *at, size_t bytes, unsigned seed)
{
    for (size_t i = 0; i < bytes; i++)
        at[i] = (char)((seed = seed * 1664525 + 1013904223) >> 24);
}

static char from[ROOM], to[ROOM], expected[ROOM];

/* A copy at two ends' alignments changes what it should, and nothing beside it. */
static void check_copy(Copy copy, int a, int b, size_t length)
{
    size_t around = length + 128;
    memset(to, 0x5a, around);
    memset(expected, 0x5a, around);
    memcpy(expected + a, from + b, length);
    copy(to + a, from + b, length);
    copy_fence();
    CHECK(memcmp(to, expected, around) == 0);
}

/* Every kernel, at every alignment of both sides, with lengths about the ends of its steps. */
static void check_kernels(void)
{
    static const size_t lengths[] = {0, 1, 15, 63, 64, 65, 1023, 1024, 1025, 1088, 1151, 1152, 4096,
                                     8191, 8192, 8255, 8256, 16384, 16448, 24576, 24640, 32768, 32832, 61440, MOST};
    fill(from, ROOM, 1);
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        Copy copy = copy_kernel(kernel);
        if (copy == NULL)
            continue;
        printf("kernel %s\n", find_kernel(kernel)->name);
        for (size_t l = 0; l < sizeof(lengths) / sizeof(*lengths); l++)
            for (int a = 0; a < 64; a += 7)
                for (int b = 0; b < 64; b += 9)
                    check_copy(copy, a, b, lengths[l]);
        for (int length = 0; length <= 1024; length++)
            check_copy(copy, length % 61, length % 53, length);
    }
}

/* What is measured, with as many threads as are wanted. */
static void check_tuning(void)
{
    Tuning found;
    CHECK(tune(4, &found) == 0);
    CHECK(find_kernel(found.chosen_kernel) != NULL && found.chosen_threads >= 1);
    CHECK(copy_kernel(KERNEL_AUTO) == copy_kernel(found.chosen_kernel));
    for (int kernel = 0; kernel < KERNELS; kernel++)
        CHECK((found.kernels[kernel] > 0) == (find_kernel(kernel) != NULL));
}

/* A job of one window, the peer's memory "theirs", which the owner knows by another address. */
enum { OWNER = 1 << 30 };

static const _Atomic int64_t no_abort;
static Window window;

static Job job_of(int64_t *local, int64_t *remote, int64_t *length, ssize_t n, char *theirs, int kernel)
{
    window = (Window){.base = OWNER, .size = SIZE, .mapped = (int64_t)(intptr_t)theirs};
    return (Job){
        .windows = &window, .n_windows = 1, .pidfd = -1, .control = -1, .local = local,
        .remote = remote, .length = length, .n = n, .abort_flag = &no_abort,
        .deadline_ns = deadline_after(300), .threads = 4, .kernel = kernel,
    };
}

static int run(Job *job)
{
    int result = check(job);
    return result == DONE ? transfer(job) : result;
}

/* Reads and writes of many segments, in several threads. */
static void check_transfers(char *mine, char *theirs)
{
    enum { N = 300, STEP = 77777, BYTES = 65543 };
    static int64_t local[N], remote[N], length[N];
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        if (copy_kernel(kernel) == NULL)
            continue;
        for (int write = 0; write < 2; write++) {
            fill(mine, SIZE, 3 + kernel);
            fill(theirs, SIZE, 5 + kernel);
            for (int i = 0; i < N; i++) {
                local[i] = (int64_t)(intptr_t)mine + (int64_t)i * STEP;
                remote[i] = OWNER + (int64_t)(N - 1 - i) * STEP;
                length[i] = BYTES - i;
            }
            Fence fence = {0};
            Job job = job_of(local, remote, length, N, theirs, kernel);
            job.write = write;
            job.fence = write ? &fence : NULL;
            CHECK(run(&job) == DONE);
            CHECK(fence.active == 0);
            for (int i = 0; i < N; i++)
                CHECK(memcmp(mine + (size_t)i * STEP, theirs + (size_t)(N - 1 - i) * STEP, BYTES - i) == 0);
        }
    }
}

/* Nothing moves where something is out of bounds, late, aborted or revoked. */
static void check_refusals(char *mine, char *theirs)
{
    static const _Atomic int64_t aborted = 1;
    int64_t local[2] = {(intptr_t)mine, (intptr_t)mine + 100}, remote[2] = {OWNER, OWNER + SIZE - 50};
    int64_t length[2] = {50, 51};
    memset(mine, 1, 200);
    memset(theirs, 2, 200);
    Job job = job_of(local, remote, length, 2, theirs, KERNEL_MEMCPY);
    CHECK(run(&job) == BAD_ADDRESS && job.index == 1);
    length[1] = 50;
    job = job_of(local, remote, length, 2, theirs, KERNEL_MEMCPY);
    job.deadline_ns = deadline_after(0);
    CHECK(run(&job) == TIMED_OUT);
    job = job_of(local, remote, length, 2, theirs, KERNEL_MEMCPY);
    job.abort_flag = &aborted;
    CHECK(run(&job) == ABORTED);
    Fence fence = {.revoked = 1};
    job = job_of(local, remote, length, 2, theirs, KERNEL_MEMCPY);
    job.write = 1;
    job.fence = &fence;
    CHECK(run(&job) == REVOKED && fence.active == 0);
    for (int i = 0; i < 200; i++)
        CHECK(mine[i] == 1 && theirs[i] == 2);
    job = job_of(local, remote, length, 2, theirs, KERNEL_MEMCPY);
    CHECK(run(&job) == DONE && mine[49] == 2 && mine[50] == 1);
}

/* Memory that is reached through its process: our own stands in for the peer's. */
static void check_process(char *mine, char *theirs)
{
    enum { N = 400, STEP = 50000 };
    static int64_t local[N], remote[N], length[N];
    fill(theirs, SIZE, 9);
    memset(mine, 0, SIZE);
    for (int i = 0; i < N; i++) {
        local[i] = (int64_t)(intptr_t)mine + (int64_t)i * STEP;
        remote[i] = (int64_t)(intptr_t)theirs + (int64_t)i * STEP;
        length[i] = STEP - 1;
    }
    Job job = job_of(local, remote, length, N, theirs, KERNEL_MEMCPY);
    window = (Window){.base = (int64_t)(intptr_t)theirs, .size = SIZE, .mapped = 0};
    job.pid = getpid();
    int result = run(&job);
    if (result == FAILED && job.error == ENOSYS) {
        printf("process_vm_readv: not emulated, not checked\n");
        return;
    }
    CHECK(result == DONE);
    for (int i = 0; i < N; i++)
        CHECK(memcmp(mine + (size_t)i * STEP, theirs + (size_t)i * STEP, STEP - 1) == 0 &&
              mine[(size_t)(i + 1) * STEP - 1] == 0);
}

static void check_local_copies(char *memory)
{
    int64_t dst[2] = {(intptr_t)memory + 10, (intptr_t)memory + 5 * MIB};
    int64_t src[2] = {(intptr_t)memory, (intptr_t)memory + 6 * MIB}, length[2] = {100, 1000};
    for (int i = 0; i < 100; i++)
        memory[i] = (char)i;
    copy_local(dst, src, length, 2, 4, KERNEL_MEMCPY); /* these overlap */
    for (int i = 0; i < 100; i++)
        CHECK(memory[10 + i] == (char)i);
}

static void check_sightings(void)
{
    enum { MOMENT = 1 << 24 };
    const int64_t now = 5 * (int64_t)MOMENT;
    CHECK(sightings_get(1, 7, now) == 0);
    sightings_put(1, 7, now, 6);
    CHECK(sightings_get(1, 7, now + MOMENT - 1) == 6);
    CHECK(sightings_get(1, 7, now + MOMENT) == 0);
    CHECK(sightings_get(2, 7, now) == 0 && sightings_get(1, 8, now) == 0);
    CHECK(sightings_get(1, 7 + 2048, now) == 0);
    sightings_put(1, 7 + 2048, now, 1);
    CHECK(sightings_get(1, 7, now) == 0);
}

int main(void)
{
    char *mine = memory(), *theirs = memory();
    always_help = 1;
    CHECK(populate(mine, SIZE, 4, -1, 0, NULL) == 0);
    CHECK(populate(theirs, SIZE, 4, -1, 0, NULL) == 0);
    check_kernels();
    check_tuning();
    check_sightings();
    check_transfers(mine, theirs);
    check_refusals(mine, theirs);
    check_process(mine, theirs);
    check_local_copies(mine);
    CHECK(munmap(mine, SIZE) == 0 && munmap(theirs, SIZE) == 0);
    printf("all checks passed\n");
    return 0;
}
