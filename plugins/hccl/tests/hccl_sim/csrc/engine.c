/* The part of the device that moves bytes. It does not stop when the program is stopped, as little as
 * the hardware does: it is a process of its own that shares this one's memory, and ends with it. */
#define _GNU_SOURCE
#include "sim.h"

#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { IDLE, ASKED, DONE, STACK = 64 << 10 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static atomic_int state;
static const Task *task;
static size_t offset, length;
static int32_t result;

static void wait_while(int value) {
    syscall(SYS_futex, &state, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void change(int value) {
    state = value;
    syscall(SYS_futex, &state, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static bool copy(void) {
    char *dst = task->dst + offset, *src = task->src + offset;
    if (!task->foreign_pid) {
        memcpy(dst, src, length);
        return true;
    }
    struct iovec to = {dst, length}, from = {src, length};
    ssize_t moved = task->foreign_is_dst
                        ? process_vm_writev(task->foreign_pid, &from, 1, &to, 1, 0)
                        : process_vm_readv(task->foreign_pid, &to, 1, &from, 1, 0);
    return moved == (ssize_t)length;
}

static _Noreturn int serve(void *unused) {
    (void)unused;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    while (true) {
        int now = state;
        if (now != ASKED) {
            wait_while(now);
            continue;
        }
        result = peer_state(task->peer, task->region);
        if (!result && !copy()) result = 507057;
        change(DONE);
    }
}

/* The engine uses the thread-local storage of the thread that made it, which therefore sleeps. */
static void *keep(void *unused) {
    char *stack = malloc(STACK);
    if (clone(serve, stack + STACK, CLONE_VM | CLONE_FILES | CLONE_FS, unused) < 0)
        sim_crash("no engine");
    while (true) pause();
}

static void start(void) {
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_create(&thread, NULL, keep, NULL)) sim_crash("no engine");
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

int32_t engine_move(const Task *asked, size_t from, size_t size) {
    pthread_once(&once, start);
    pthread_mutex_lock(&lock);
    task = asked, offset = from, length = size;
    change(ASKED);
    while (state != DONE) wait_while(ASKED);
    int32_t code = result;
    state = IDLE;
    pthread_mutex_unlock(&lock);
    return code;
}
