/* Everything that the native code does, without Python: for sanitizers that an interpreter is in the
 * way of (memory, leaks), and for those that see more without one. Ends with 0, or says what is wrong. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "copy.h"
#include "flight.h"
#include "memory.h"
#include "pages.h"
#include "parallel.h"
#include "transfer.h"
#include "tuning.h"

enum { SIZE = 14 << 20, PIECES = 300, ROOM = 4096, PATTERN = 251, THREADS = 4, SEGMENTS = 64 };
/* Segments of this size, with gaps: at every kind of end, and more than one chunk in all. */
enum { STRIDE = SIZE / SEGMENTS, LENGTH = STRIDE - 77 };

static void expect(int holds, const char *format, ...)
{
    if (holds)
        return;
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

static void fill(unsigned char *memory, size_t size, unsigned seed)
{
    for (size_t at = 0; at < size && at < PATTERN; at++)
        memory[at] = (at + seed) % PATTERN;
    for (size_t done = PATTERN; done < size; done *= 2)
        memcpy(memory + done, memory, done < size - done ? done : size - done);
}

static int is_filled(const unsigned char *memory, size_t size, unsigned seed)
{
    for (size_t at = 0; at < PATTERN; at++)
        if (memory[at] != (at + seed) % PATTERN)
            return 0;
    return memcmp(memory, memory + PATTERN, size - PATTERN) == 0;
}

static unsigned char *filled(size_t size, unsigned seed)
{
    unsigned char *memory = malloc(size);
    expect(memory != NULL, "out of memory");
    fill(memory, size, seed);
    return memory;
}

static int64_t number(const void *address)
{
    return (int64_t)(intptr_t)address;
}

/* -- local copies ---------------------------------------------------------------------------- */

static void copy_pieces(int kernel, int threads)
{
    unsigned char *from = filled(PIECES * ROOM, 1), *to = filled(PIECES * ROOM, 9);
    int64_t dst[PIECES], src[PIECES], length[PIECES];
    for (int i = 0; i < PIECES; i++) {
        dst[i] = number(to + i * ROOM + i % 67);
        src[i] = number(from + i * ROOM + i % 61);
        length[i] = 1 + (i * 37) % (ROOM - 70);
    }
    copy_local(dst, src, length, PIECES, threads, kernel);
    for (int i = 0; i < PIECES; i++) {
        int end = i % 67 + length[i];
        for (int at = 0; at < ROOM; at++) {
            int copied = at >= i % 67 && at < end;
            int source = i * ROOM + at - i % 67 + i % 61;
            unsigned char wanted = copied ? (source + 1) % PATTERN : (i * ROOM + at + 9) % PATTERN;
            expect(to[i * ROOM + at] == wanted, "kernel %d: piece %d is wrong at %d", kernel, i, at);
        }
    }
    free(from);
    free(to);
}

static void copy_large(int kernel, int threads)
{
    unsigned char *from = filled(SIZE, 3), *to = filled(SIZE, 0);
    int64_t dst[2] = {number(to + 5), number(to + SIZE / 2 + 5)};
    int64_t src[2] = {number(from + 1), number(from + SIZE / 2 + 1)};
    int64_t length[2] = {SIZE / 2 - 9, SIZE / 2 - 9};
    copy_local(dst, src, length, 2, threads, kernel);
    expect(memcmp(to + 5, from + 1, SIZE / 2 - 9) == 0, "kernel %d: the first half is wrong", kernel);
    expect(memcmp(to + SIZE / 2 + 5, from + SIZE / 2 + 1, SIZE / 2 - 9) == 0,
           "kernel %d: the second half is wrong", kernel);
    free(from);
    free(to);
}

/* All sizes that end in the first lines, with what lies beside them. */
static void copy_small(int kernel)
{
    unsigned char *from = filled(ROOM, 4), *to = filled(ROOM, 0);
    for (int size = 1; size <= 1024; size++) {
        fill(to, ROOM, 0);
        copy_kernel(kernel)((char *)to + size % 67, (const char *)from + size % 61, size);
        copy_fence();
        for (int at = 0; at < 1200; at++) {
            int inside = at >= size % 67 && at < size % 67 + size;
            int wanted = inside ? at - size % 67 + size % 61 + 4 : at;
            expect(to[at] == wanted % PATTERN, "kernel %d: %d bytes are wrong at %d", kernel, size, at);
        }
    }
    free(from);
    free(to);
}

static void measure(void)
{
    Tuning found;
    expect(tune(THREADS, &found) == 0, "nothing was measured");
    for (int kernel = 0; kernel < KERNELS; kernel++)
        expect((found.kernels[kernel] > 0) == (find_kernel(kernel) != NULL), "kernel %d", kernel);
    expect(copy_kernel(KERNEL_AUTO) == copy_kernel(found.chosen_kernel), "the choice is not in force");
}

static void copy_overlapping(void)
{
    unsigned char *memory = filled(ROOM, 0);
    int64_t dst[1] = {number(memory + 100)}, src[1] = {number(memory)}, length[1] = {1000};
    copy_local(dst, src, length, 1, THREADS, KERNEL_MEMCPY);
    expect(is_filled(memory + 100, 1000, 0), "an overlapping copy is wrong");
    free(memory);
}

static int run(Job *job)
{
    int result = check(job);
    return result == DONE ? transfer(job) : result;
}

/* The same by a thread of its own, which ends. */
static int run_apart(Job *job)
{
    Flight *left = NULL;
    int result = check(job);
    if (result == DONE)
        result = fly(job, &left);
    expect(left == NULL, "a transfer does not end");
    return result;
}

/* -- through a mapping ------------------------------------------------------------------------ */

/* Two mappings of one memory, as of an owner and of its peer, and what a peer knows of it. */
typedef struct {
    unsigned char *owners, *mine;
    Pages *pages;
    Window window;
    Fence fence;
    _Atomic int64_t abort_flag;
    int64_t local[SEGMENTS], remote[SEGMENTS], length[SEGMENTS];
} Pair;

static void make_pair(Pair *pair, int stays)
{
    void *owners;
    int fd = (int)syscall(SYS_memfd_create, "exercise", MFD_CLOEXEC);
    expect(fd >= 0 && ftruncate(fd, SIZE) == 0, "no shared memory");
    expect(map_shared(fd, SIZE, 1, 1, &owners) == 0, "the owner cannot map");
    expect(populate(owners, SIZE / 2, THREADS, -1, 0, NULL) == 0, "the owner cannot populate");
    Pages *pages = pages_map(fd, SIZE, 1, 0, stays, 1);
    expect(pages != NULL, "the peer cannot map");
    close(fd);
    *pair = (Pair){.owners = owners, .pages = pages, .mine = filled(SIZE, 0)};
    fill(pair->owners, SIZE, 5);
    pair->window = (Window){.base = 1 << 20, .size = SIZE, .mapped = number(pages_address(pages)),
                            .pages = pages};
    for (int i = 0; i < SEGMENTS; i++) {
        pair->local[i] = number(pair->mine + i * STRIDE + 3);
        pair->remote[i] = pair->window.base + (SEGMENTS - 1 - i) * STRIDE + 1;
        pair->length[i] = LENGTH;
    }
}

static void drop_pair(Pair *pair)
{
    munmap(pair->owners, SIZE);
    pages_unmap(pair->pages);
    free(pair->mine);
}

static Job job_of(Pair *pair, int write, int kernel)
{
    return (Job){
        .write = write, .windows = &pair->window, .n_windows = 1, .pid = getpid(), .pidfd = -1,
        .control = -1, .local = pair->local, .remote = pair->remote, .length = pair->length,
        .n = SEGMENTS, .abort_flag = &pair->abort_flag, .fence = write ? &pair->fence : NULL,
        .deadline_ns = INT64_MAX, .threads = THREADS, .kernel = kernel,
    };
}

static int moved(const Pair *pair, int write)
{
    for (int i = 0; i < SEGMENTS; i++) {
        const unsigned char *mine = pair->mine + i * STRIDE + 3;
        const unsigned char *theirs = pair->owners + pair->remote[i] - pair->window.base;
        if (memcmp(write ? theirs : mine, write ? mine : theirs, LENGTH) != 0)
            return 0;
    }
    return 1;
}

static void move_mapped(int kernel, int stays, int (*moves)(Job *))
{
    Pair pair;
    make_pair(&pair, stays);
    for (int write = 0; write < 2; write++) {
        Job job = job_of(&pair, write, kernel);
        fill(pair.mine, SIZE, 17);
        expect(moves(&job) == DONE, "kernel %d: a transfer failed", kernel);
        expect(moved(&pair, write), "kernel %d: wrong bytes, write is %d", kernel, write);
        expect(atomic_load(&pair.fence.active) == 0, "a writer stays announced");
    }
    drop_pair(&pair);
}

static void refuse_mapped(void)
{
    Pair pair;
    make_pair(&pair, 1);
    const int64_t beyond[] = {0, -1, 1, pair.window.base - 1, pair.window.base + SIZE - LENGTH + 1,
                              INT64_MAX};
    for (size_t i = 0; i < sizeof(beyond) / sizeof(*beyond); i++) {
        Job job = job_of(&pair, 1, KERNEL_MEMCPY);
        int64_t before = pair.remote[SEGMENTS - 1];
        pair.remote[SEGMENTS - 1] = beyond[i];
        expect(run(&job) == BAD_ADDRESS, "address %lld is accepted", (long long)beyond[i]);
        expect(job.index == SEGMENTS - 1, "the wrong segment is named");
        pair.remote[SEGMENTS - 1] = before;
    }
    Job late = job_of(&pair, 1, KERNEL_MEMCPY), aborted = late, revoked = late;
    late.deadline_ns = 1;
    expect(run(&late) == TIMED_OUT, "a deadline is overlooked");
    atomic_store(&pair.abort_flag, 1);
    expect(run(&aborted) == ABORTED, "an abort is overlooked");
    atomic_store(&pair.abort_flag, 0);
    atomic_store(&pair.fence.revoked, 1);
    expect(run(&revoked) == REVOKED, "a revocation is overlooked");
    expect(is_filled(pair.owners, SIZE, 5), "a byte has moved");
    drop_pair(&pair);
}

static void *write_until_refused(void *argument)
{
    Pair *pair = argument;
    for (;;) {
        Job job = job_of(pair, 1, KERNEL_MEMCPY);
        int result = run(&job);
        if (result != DONE)
            return (void *)(intptr_t)result;
    }
}

static void make_writing_pair(Pair *pair, pthread_t *writer)
{
    make_pair(pair, 1);
    expect(pthread_create(writer, NULL, write_until_refused, pair) == 0, "no thread");
    usleep(20000);
}

/* What close does to a writer: after "revoked" and "no writer inside" the memory is the owner's. */
static void revoke_a_writer(void)
{
    Pair pair;
    void *result;
    pthread_t writer;
    make_writing_pair(&pair, &writer);
    atomic_store(&pair.fence.revoked, 1);
    while (atomic_load(&pair.fence.active) != 0)
        usleep(1000);
    fill(pair.owners, SIZE, 77);
    expect(is_filled(pair.owners, SIZE, 77), "written late");
    expect(pthread_join(writer, &result) == 0 && (intptr_t)result == REVOKED, "not revoked");
    drop_pair(&pair);
}

static void abort_a_writer(void)
{
    Pair pair;
    void *result;
    pthread_t writer;
    make_writing_pair(&pair, &writer);
    atomic_store(&pair.abort_flag, 1);
    expect(pthread_join(writer, &result) == 0 && (intptr_t)result == ABORTED, "not aborted");
    drop_pair(&pair);
}

/* -- through a process ------------------------------------------------------------------------ */

/* The child's part: its memory is ours as of the fork. It checks what it is written and ends. */
static void be_the_owner(unsigned char *memory, int ready, int wait)
{
    char byte = 0;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);
    fill(memory, SIZE, 40);
    if (write(ready, &byte, 1) != 1 || read(wait, &byte, 1) != 1)
        _exit(2);
    _exit(is_filled(memory, SIZE, 41) ? 0 : 3);
}

static void move_foreign(void)
{
    static _Atomic int64_t never;
    int ready[2], go[2], status = 0;
    char byte = 0;
    unsigned char *theirs = filled(SIZE, 0), *mine = filled(SIZE, 0);
    expect(pipe(ready) == 0 && pipe(go) == 0, "no pipe");
    pid_t pid = fork();
    if (pid == 0)
        be_the_owner(theirs, ready[1], go[0]);
    expect(pid > 0 && read(ready[0], &byte, 1) == 1, "no child");
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    /* The second window ends where nothing is mapped: a lie, which the kernel finds out. */
    Window windows[2] = {{.base = number(theirs), .size = SIZE}, {.base = INT64_MAX / 2, .size = ROOM}};
    int64_t local[2] = {number(mine), number(mine)}, length[2] = {SIZE, ROOM};
    int64_t remote[2] = {windows[0].base, windows[1].base};
    Job job = {
        .windows = windows, .n_windows = 2, .pid = pid, .pidfd = pidfd, .control = -1,
        .local = local, .remote = remote, .length = length, .n = 1, .abort_flag = &never,
        .deadline_ns = INT64_MAX, .threads = THREADS, .kernel = KERNEL_MEMCPY,
    };
    Job again = job, bad = job, gone = job;
    expect(run(&job) == DONE, "cannot read a process's memory: %s", strerror(job.error));
    expect(is_filled(mine, SIZE, 40), "read wrongly");
    fill(mine, SIZE, 41);
    again.write = 1;
    expect(run(&again) == DONE, "cannot write a process's memory: %s", strerror(again.error));
    bad.n = 2;
    expect(run(&bad) == BAD_ADDRESS, "memory that is not there is accepted");
    expect(write(go[1], &byte, 1) == 1 && waitpid(pid, &status, 0) == pid, "the child is lost");
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child found %#x", status);
    expect(run(&gone) == PEER_GONE, "a process that has ended is not noticed");
    for (int i = 0; i < 2; i++) {
        close(ready[i]);
        close(go[i]);
    }
    close(pidfd);
    free(theirs);
    free(mine);
}

/* Holes are read as zeros, and stay holes; what the owner makes meanwhile is written. */
static void *make_later(void *argument)
{
    Pair *pair = argument;
    usleep(20000);
    expect(populate((char *)pair->owners, SIZE, 1, -1, 0, NULL) == 0, "the owner cannot populate");
    return NULL;
}

/* A file without pages, mapped by its owner and by the peer, whose search goes on meanwhile. */
static int map_holes(Pair *pair, int stays)
{
    void *owners;
    int fd = (int)syscall(SYS_memfd_create, "holes", MFD_CLOEXEC);
    expect(fd >= 0 && ftruncate(fd, SIZE) == 0, "no shared memory");
    expect(map_shared(fd, SIZE, 1, 0, &owners) == 0, "the owner cannot map");
    pair->owners = owners;
    pair->pages = pair->window.pages = pages_map(fd, SIZE, 1, 0, stays, 1);
    expect(pair->pages != NULL, "the peer cannot map");
    pair->window.mapped = number(pages_address(pair->pages));
    return fd;
}

static void unmap_holes(Pair *pair)
{
    munmap(pair->owners, SIZE);
    pages_unmap(pair->pages);
}

static void move_holes(int stays)
{
    Pair pair;
    pthread_t owner;
    make_pair(&pair, stays);
    unmap_holes(&pair);
    int fd = map_holes(&pair, stays);
    Job read = job_of(&pair, 0, KERNEL_MEMCPY), late = job_of(&pair, 1, KERNEL_MEMCPY);
    expect(run(&read) == DONE, "holes cannot be read");
    late.deadline_ns = now_ns() + 10000000;
    expect(run(&late) == TIMED_OUT, "a page of the owner's is made");
    struct stat now;
    expect(fstat(fd, &now) == 0, "no file");
    expect(now.st_blocks == 0, "%lld blocks were made", (long long)now.st_blocks);
    expect(moved(&pair, 0), "holes are not zeros");
    unmap_holes(&pair);
    close(fd);
    fd = map_holes(&pair, stays);
    fill(pair.mine, SIZE, 21);
    Job write = job_of(&pair, 1, KERNEL_MEMCPY);
    expect(pthread_create(&owner, NULL, make_later, &pair) == 0, "no thread");
    expect(run(&write) == DONE, "what the owner has made is not written");
    pthread_join(owner, NULL);
    expect(moved(&pair, 1), "written wrongly");
    close(fd);
    drop_pair(&pair);
}

int main(void)
{
    always_help = 1;
    move_foreign(); /* forks: before there are threads */
    for (int kernel = 0; kernel < KERNELS; kernel++) {
        if (copy_kernel(kernel) == NULL)
            continue;
        for (int threads = 1; threads <= THREADS; threads += THREADS - 1) {
            copy_pieces(kernel, threads);
            copy_large(kernel, threads);
        }
        copy_small(kernel);
        move_mapped(kernel, kernel % 2, kernel % 2 ? run : run_apart);
        printf("kernel %d\n", kernel);
    }
    move_holes(0);
    move_holes(1);
    copy_overlapping();
    measure();
    copy_large(KERNEL_AUTO, -THREADS); /* which has it measured in the background too */
    refuse_mapped();
    revoke_a_writer();
    abort_a_writer();
    return 0;
}
