/* Streams: one thread each, which runs queued copies in order. Nothing moves before it runs, and it
 * takes its time unless somebody waits: who forgets to synchronise sees old data. */
#define _GNU_SOURCE
#include "sim.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { STREAM_MAGIC = 0x57EA57EA, CHUNK = 256 << 10, IDLE_MS = 20 };

struct Stream {
    uint32_t magic;
    Context *context;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    Task *first, **last, *current;
    struct Stream *next; /* of all that ever were */
    bool running, started, stop, awaited, aborted;
    atomic_bool abort;
    int32_t failed;
    pthread_t thread;
};

static _Atomic(Stream *) streams;

static struct timespec after_ms(long ms) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_sec += ms / 1000;
    t.tv_nsec += ms % 1000 * 1000000;
    if (t.tv_nsec >= 1000000000) t.tv_sec++, t.tv_nsec -= 1000000000;
    return t;
}

static int32_t run(Stream *stream, const Task *task) {
    int32_t code;
    for (int ms = sim_task_delay_ms; (ms > 0 || sim_stuck) && !stream->abort; ms--) {
        sim_sleep(0.001);
        if (sim_peer_code && (code = peer_state(task->peer, task->region))) return code;
    }
    for (size_t done = 0; done < task->size && !stream->abort; done += CHUNK) {
        size_t n = task->size - done < CHUNK ? task->size - done : CHUNK;
        if ((code = engine_move(task, done, n))) return code;
    }
    atomic_thread_fence(memory_order_seq_cst);
    return 0;
}

static void *work(void *pointer) {
    Stream *stream = pointer;
    pthread_mutex_lock(&stream->lock);
    while (true) {
        while (!stream->first && !stream->stop) pthread_cond_wait(&stream->changed, &stream->lock);
        if (!stream->first) break;
        struct timespec limit = after_ms(IDLE_MS);
        while (!stream->awaited && stream->first)
            if (pthread_cond_timedwait(&stream->changed, &stream->lock, &limit) == ETIMEDOUT) break;
        Task *task = stream->first;
        if (!task) continue;
        if (!(stream->first = task->next)) stream->last = &stream->first;
        stream->running = true;
        stream->current = task;
        pthread_mutex_unlock(&stream->lock);
        int32_t code = run(stream, task);
        (*task->pending)--;
        pthread_mutex_lock(&stream->lock);
        stream->running = false;
        stream->current = NULL;
        free(task);
        if (code && !stream->failed) stream->failed = code;
        pthread_cond_broadcast(&stream->changed);
    }
    pthread_mutex_unlock(&stream->lock);
    return NULL;
}

static bool touches(const Task *task, const char *alias, size_t size) {
    return (task->dst < alias + size && alias < task->dst + task->size)
        || (task->src < alias + size && alias < task->src + task->size);
}

bool range_is_queued(const char *alias, size_t size) {
    bool found = false;
    for (Stream *s = streams; s; s = s->next) {
        pthread_mutex_lock(&s->lock);
        found |= s->current && touches(s->current, alias, size);
        for (const Task *task = s->first; task; task = task->next) found |= touches(task, alias, size);
        pthread_mutex_unlock(&s->lock);
    }
    return found;
}

int32_t check_stream(void *pointer, Stream **found) {
    Stream *stream = *found = pointer;
    if (!stream || stream->magic != STREAM_MAGIC) sim_crash("a stream that does not exist is used");
    Context *context = current_context();
    if (!context) return sim_error(107002, "no context on this thread");
    if (stream->context != context) return sim_error(107003, "the stream of another context");
    return 0;
}

void enqueue(Stream *stream, const Task *task) {
    pthread_mutex_lock(&stream->lock);
    if (!stream->aborted && !stream->abort) {
        Task *copy = malloc(sizeof *copy);
        *copy = *task;
        copy->next = NULL;
        (*task->pending)++;
        *stream->last = copy;
        stream->last = &copy->next;
        if (!stream->started) {
            pthread_attr_t attributes;
            pthread_attr_init(&attributes);
            pthread_attr_setstacksize(&attributes, 64 << 10);
            stream->started = !pthread_create(&stream->thread, &attributes, work, stream);
            pthread_attr_destroy(&attributes);
        }
        pthread_cond_broadcast(&stream->changed);
    }
    pthread_mutex_unlock(&stream->lock);
}

EXPORT int32_t aclrtCreateStreamWithConfig(void **pointer, uint32_t priority, uint32_t flags) {
    ENTER();
    Context *context = current_context();
    if (!context) LEAVE(sim_error(107002, "no context on this thread"));
    if (priority || flags > 15) LEAVE(sim_error(107000, "priority %u, flags %u", priority, flags));
    Stream *stream = calloc(1, sizeof *stream); /* never freed, so that stale ones are noticed */
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&stream->changed, &attributes);
    pthread_mutex_init(&stream->lock, NULL);
    stream->magic = STREAM_MAGIC;
    stream->context = context;
    stream->last = &stream->first;
    stream->next = streams;
    while (!atomic_compare_exchange_weak(&streams, &stream->next, stream)) {}
    context->streams++;
    sim_live_count[LIVE_STREAMS]++;
    *pointer = stream;
    LEAVE(0);
}

EXPORT int32_t aclrtDestroyStream(void *pointer) {
    ENTER();
    Stream *stream;
    int32_t code = check_stream(pointer, &stream);
    if (code) LEAVE(code);
    pthread_mutex_lock(&stream->lock);
    stream->stop = stream->awaited = true; /* queued work runs first: a stuck task hangs this call */
    pthread_cond_broadcast(&stream->changed);
    bool started = stream->started;
    pthread_mutex_unlock(&stream->lock);
    if (started) pthread_join(stream->thread, NULL);
    stream->magic = 0;
    stream->context->streams--;
    sim_live_count[LIVE_STREAMS]--;
    LEAVE(0);
}

EXPORT int32_t aclrtStreamAbort(void *pointer) {
    ENTER();
    Stream *stream;
    int32_t code = check_stream(pointer, &stream);
    if (code) LEAVE(code);
    pthread_mutex_lock(&stream->lock);
    stream->abort = true;
    while (stream->first) {
        Task *task = stream->first;
        stream->first = task->next;
        (*task->pending)--;
        free(task);
    }
    stream->last = &stream->first;
    while (stream->running) pthread_cond_wait(&stream->changed, &stream->lock);
    stream->aborted = true;
    stream->abort = false;
    pthread_cond_broadcast(&stream->changed);
    pthread_mutex_unlock(&stream->lock);
    LEAVE(0);
}

EXPORT int32_t aclrtSynchronizeStreamWithTimeout(void *pointer, int32_t timeout) {
    ENTER();
    Stream *stream;
    int32_t code = check_stream(pointer, &stream);
    if (code) LEAVE(code);
    if (timeout == 0 || timeout < -1) LEAVE(sim_error(107000, "timeout %d", timeout));
    struct timespec limit = after_ms(timeout);
    pthread_mutex_lock(&stream->lock);
    stream->awaited = true;
    pthread_cond_broadcast(&stream->changed);
    while ((stream->first || stream->running) && !stream->aborted && !code) {
        if (timeout < 0) pthread_cond_wait(&stream->changed, &stream->lock);
        else if (pthread_cond_timedwait(&stream->changed, &stream->lock, &limit) == ETIMEDOUT)
            code = 507046;
    }
    if (!stream->first && !stream->running) code = 0;
    if (stream->aborted) code = 107023;
    else if (!code) code = stream->failed, stream->failed = 0;
    if (code != 507046) stream->awaited = false;
    pthread_mutex_unlock(&stream->lock);
    LEAVE(code ? sim_error(code, "stream synchronize: %d", code) : 0);
}

EXPORT int32_t aclrtStreamQuery(void *pointer, int32_t *status) {
    ENTER();
    Stream *stream;
    int32_t code = check_stream(pointer, &stream);
    if (code) LEAVE(code);
    if (!status) LEAVE(sim_error(107000, "no place for the status"));
    pthread_mutex_lock(&stream->lock);
    *status = stream->first || stream->running;
    if (stream->aborted) code = 107023;
    pthread_mutex_unlock(&stream->lock);
    LEAVE(code ? sim_error(code, "stream query: %d", code) : 0);
}
