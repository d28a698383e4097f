#include "sightings.h"

#include <pthread.h>

enum {
    SLOTS = 2048,      /* 128 MiB of pages of 4 KiB */
    MOMENT_SHIFT = 24, /* 17 ms */
};

typedef struct {
    int64_t group;
    int64_t moment;
    pid_t pid;
    uint32_t pages;
} Sighting;

static Sighting all[SLOTS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static Sighting *slot(pid_t pid, int64_t group)
{
    return &all[((uint64_t)group + (uint64_t)pid * 397) % SLOTS];
}

uint32_t sightings_get(pid_t pid, int64_t group, int64_t now_ns)
{
    Sighting *at = slot(pid, group);
    pthread_mutex_lock(&lock);
    int same = at->group == group && at->pid == pid && at->moment == now_ns >> MOMENT_SHIFT;
    uint32_t pages = same ? at->pages : 0;
    pthread_mutex_unlock(&lock);
    return pages;
}

void sightings_put(pid_t pid, int64_t group, int64_t now_ns, uint32_t pages)
{
    Sighting *at = slot(pid, group);
    pthread_mutex_lock(&lock);
    *at = (Sighting){.group = group, .moment = now_ns >> MOMENT_SHIFT, .pid = pid, .pages = pages};
    pthread_mutex_unlock(&lock);
}
