/* The ACL runtime: devices, contexts, memory and copies. */
#define _GNU_SOURCE
#include "sim.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { CONTEXT_MAGIC = 0xC0DEC0DE, MAX_DEVICES = 16, HUGE = 2 << 20, PAGE = 4096, SMALL = 1 << 20 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Allocation *allocations;
static size_t used[MAX_DEVICES];
static int set_counts[MAX_DEVICES];
static _Atomic int own_contexts[MAX_DEVICES];
static Context *defaults[MAX_DEVICES];
static bool initialised, finalised;
static __thread Context *current;

/* -- process and devices --------------------------------------------------------------------------- */

EXPORT int32_t aclInit(const char *config) {
    ENTER();
    (void)config;
    pthread_mutex_lock(&lock);
    bool again = initialised;
    initialised = true;
    pthread_mutex_unlock(&lock);
    LEAVE(again ? sim_error(100002, "initialised twice") : 0);
}

EXPORT int32_t aclFinalize(void) {
    ENTER();
    pthread_mutex_lock(&lock);
    bool again = finalised;
    finalised = true;
    pthread_mutex_unlock(&lock);
    if (!again) sim_violation("aclFinalize: nothing works after it");
    LEAVE(again ? sim_error(100037, "finalised twice") : 0);
}

static int device_count(void) { return sim_number("ASCEND_SIM_DEVICES", 8); }

static int32_t check_device(int32_t device) {
    if (!initialised || finalised) return sim_error(100001, "not initialised");
    if (device < 0 || device >= device_count() || device >= (int32_t)MAX_DEVICES)
        return sim_error(107001, "there is no device %d", device);
    return 0;
}

EXPORT int32_t aclrtGetDeviceCount(uint32_t *count) {
    ENTER();
    if (!initialised) LEAVE(sim_error(100001, "not initialised"));
    *count = (uint32_t)device_count();
    LEAVE(0);
}

EXPORT const char *aclrtGetSocName(void) { return sim_setting("ASCEND_SIM_SOC", "Ascend910B3"); }

/* Physical numbers: ASCEND_SIM_PHYSICAL lists them, else they are the logical ones. */
int physical_device(int device) {
    const char *list = sim_setting("ASCEND_SIM_PHYSICAL", "");
    for (int i = 0; *list; i++) {
        if (i == device) return atoi(list);
        list += strcspn(list, ",");
        if (*list) list++;
    }
    return device;
}

EXPORT int32_t aclrtGetPhyDevIdByLogicDevId(int32_t device, int32_t *physical) {
    ENTER();
    int32_t code = check_device(device);
    if (!code) *physical = physical_device(device);
    LEAVE(code);
}

EXPORT int32_t aclrtGetDeviceInfo(uint32_t device, int32_t attribute, int64_t *value) {
    ENTER();
    int32_t code = check_device((int32_t)device);
    if (code) LEAVE(code);
    if (!sim_a3() || (attribute != 403 && attribute != 405))
        LEAVE(sim_error(107000, "attribute %d", attribute));
    *value = attribute == 403 ? 100 + physical_device((int)device) : sim_number("ASCEND_SIM_POD", 7);
    LEAVE(0);
}

static Context *new_context(int device, bool is_default) {
    Context *context = calloc(1, sizeof *context); /* never freed, so that stale ones are noticed */
    context->magic = CONTEXT_MAGIC;
    context->device = device;
    context->is_default = is_default;
    if (!is_default) {
        sim_live_count[LIVE_CONTEXTS]++;
        own_contexts[device]++;
    }
    return context;
}

EXPORT int32_t aclrtSetDevice(int32_t device) {
    ENTER();
    int32_t code = check_device(device);
    if (code) LEAVE(code);
    pthread_mutex_lock(&lock);
    if (set_counts[device]++ == 0) {
        defaults[device] = new_context(device, true);
        sim_live_count[LIVE_DEVICES]++;
    }
    current = defaults[device];
    pthread_mutex_unlock(&lock);
    LEAVE(0);
}

EXPORT int32_t aclrtResetDevice(int32_t device) {
    ENTER();
    int32_t code = check_device(device);
    if (code) LEAVE(code);
    pthread_mutex_lock(&lock);
    if (set_counts[device] == 0) {
        code = sim_error(107000, "device %d is not set", device);
    } else if (--set_counts[device] == 0) {
        for (Allocation *a = allocations; a; a = a->next)
            if (a->device == device) sim_violation("device reset with memory at %p", (void *)a->user);
        if (own_contexts[device]) sim_violation("device reset with contexts of one's own");
        defaults[device]->magic = 0;
        sim_live_count[LIVE_DEVICES]--;
    }
    pthread_mutex_unlock(&lock);
    LEAVE(code);
}

/* -- contexts, which belong to threads ------------------------------------------------------------- */

Context *current_context(void) {
    if (current && current->magic != CONTEXT_MAGIC) current = NULL;
    return current;
}

#define NEED_CONTEXT()                                                                             \
    do {                                                                                           \
        if (!current_context()) return sim_error(107002, "%s: no context on this thread", __func__); \
    } while (0)

EXPORT int32_t aclrtCreateContext(void **context, int32_t device) {
    ENTER();
    int32_t code = check_device(device);
    if (code) LEAVE(code);
    current = new_context(device, false);
    *context = current;
    LEAVE(0);
}

EXPORT int32_t aclrtDestroyContext(void *pointer) {
    ENTER();
    Context *context = pointer;
    if (!context || context->magic != CONTEXT_MAGIC || context->is_default)
        LEAVE(sim_error(107000, "no context that was created"));
    if (context->streams) sim_violation("context destroyed before its streams");
    context->magic = 0;
    own_contexts[context->device]--;
    sim_live_count[LIVE_CONTEXTS]--;
    LEAVE(0);
}

EXPORT int32_t aclrtSetCurrentContext(void *pointer) {
    ENTER();
    Context *context = pointer;
    if (!context || context->magic != CONTEXT_MAGIC) LEAVE(sim_error(107000, "no context"));
    current = context;
    LEAVE(0);
}

EXPORT int32_t aclrtGetCurrentContext(void **context) {
    ENTER();
    NEED_CONTEXT();
    *context = current;
    LEAVE(0);
}

EXPORT int32_t aclrtGetDevice(int32_t *device) {
    ENTER();
    NEED_CONTEXT();
    *device = current->device;
    LEAVE(0);
}

/* -- memory ------------------------------------------------------------------------------------------ */

static size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

static size_t capacity(void) {
    return strtoull(sim_setting("ASCEND_SIM_CAPACITY", "68719476736"), NULL, 10);
}

/* The program's mapping: of device memory without any access. What is aligned to 64 bytes only begins
 * inside a page. */
static int map_user(Allocation *a, size_t bytes, size_t align) {
    size_t lead = align == 64 ? 64 : 0;
    size_t map_size = round_up(bytes + lead, PAGE), reserve = map_size + HUGE;
    char *base = mmap(NULL, reserve, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED || ftruncate(a->fd, (off_t)map_size)) return -1;
    char *start = (char *)round_up((size_t)base, align > PAGE ? align : PAGE);
    int access = a->kind == DEVICE ? PROT_NONE : PROT_READ | PROT_WRITE;
    char *user = mmap(start, map_size, access, MAP_SHARED | MAP_FIXED, a->fd, 0);
    a->alias = mmap(NULL, map_size, PROT_READ | PROT_WRITE, MAP_SHARED, a->fd, 0);
    if (user == MAP_FAILED || a->alias == MAP_FAILED) return -1;
    if (start > base) munmap(base, (size_t)(start - base));
    if (base + reserve > start + map_size)
        munmap(start + map_size, (size_t)(base + reserve - start - map_size));
    a->map = start, a->map_size = map_size, a->file_offset = lead;
    a->user = start + lead, a->alias += lead;
    return 0;
}

static int32_t allocate(void **pointer, size_t size, int kind, size_t align, bool huge) {
    NEED_CONTEXT();
    if (!size || !pointer) return sim_error(107000, "0 bytes or no pointer");
    size_t bytes = round_up(size, 32) + 32;
    int device = current->device;
    pthread_mutex_lock(&lock);
    bool fits = kind == HOST || used[device] + bytes <= capacity();
    if (fits && kind == DEVICE) used[device] += bytes;
    pthread_mutex_unlock(&lock);
    if (!fits) return sim_error(207001, "%zu bytes are more than device %d has left", size, device);
    Allocation *a = calloc(1, sizeof *a);
    a->kind = kind, a->device = device, a->huge = huge, a->size = bytes;
    a->fd = memfd_create("ascend-sim", MFD_CLOEXEC);
    if (a->fd < 0 || map_user(a, bytes, align)) return sim_error(207001, "no memory of the host");
    memset(a->alias, 0xA5, size);
    pthread_mutex_lock(&lock);
    a->next = allocations;
    allocations = a;
    pthread_mutex_unlock(&lock);
    sim_live_count[LIVE_ALLOCATIONS]++;
    *pointer = a->user;
    return 0;
}

EXPORT int32_t aclrtMalloc(void **pointer, size_t size, int32_t policy) {
    ENTER();
    if (policy < 0 || policy > 2) LEAVE(sim_error(107018, "policy %d is not simulated", policy));
    bool huge = policy == 1 || (policy == 0 && size > SMALL);
    LEAVE(allocate(pointer, size, DEVICE, huge ? HUGE : 64, huge));
}

EXPORT int32_t aclrtMallocHost(void **pointer, size_t size) {
    ENTER();
    LEAVE(allocate(pointer, size, HOST, 64, false));
}

static int32_t release(void *pointer, int kind) {
    NEED_CONTEXT();
    pthread_mutex_lock(&lock);
    Allocation **at = &allocations, *a;
    while ((a = *at) && a->user != pointer) at = &a->next;
    if (a && a->kind == kind) *at = a->next;
    pthread_mutex_unlock(&lock);
    if (!pointer || !a || a->kind != kind)
        return sim_error(107000, "%p was not allocated so", pointer);
    if (range_is_registered(a->user, a->size)) sim_violation("memory freed while it is registered");
    if (range_is_queued(a->alias, a->size)) sim_violation("memory freed while a copy of it is queued");
    if (kind == DEVICE) used[a->device] -= a->size;
    munmap(a->map, a->map_size);
    munmap(a->alias - a->file_offset, a->map_size);
    close(a->fd);
    free(a);
    sim_live_count[LIVE_ALLOCATIONS]--;
    return 0;
}

EXPORT int32_t aclrtFree(void *pointer) {
    ENTER();
    LEAVE(release(pointer, DEVICE));
}

EXPORT int32_t aclrtFreeHost(void *pointer) {
    ENTER();
    LEAVE(release(pointer, HOST));
}

Allocation *find_allocation(const void *address, size_t size) {
    const char *first = address;
    pthread_mutex_lock(&lock);
    Allocation *a = allocations;
    while (a && !(a->user <= first && first + size <= a->user + a->size)) a = a->next;
    pthread_mutex_unlock(&lock);
    return a;
}

/* Where the simulator reaches `size` bytes of the stated kind, or NULL. */
static char *reach(const void *address, size_t size, bool device) {
    Allocation *a = find_allocation(address, size);
    if (!a) return device || find_allocation(address, 1) ? NULL : (char *)address;
    if (device != (a->kind == DEVICE)) return NULL;
    return a->alias + ((const char *)address - a->user);
}

EXPORT int32_t aclrtMemset(void *dst, size_t room, int32_t value, size_t size) {
    ENTER();
    NEED_CONTEXT();
    char *to = reach(dst, size, true);
    if (!to) to = reach(dst, size, false);
    if (!to || size > room) LEAVE(sim_error(107000, "memset of %p", dst));
    memset(to, value, size);
    LEAVE(0);
}

EXPORT int32_t aclrtMemcpy(void *dst, size_t room, const void *src, size_t size, int32_t kind) {
    ENTER();
    NEED_CONTEXT();
    if (kind < 0 || kind > 3) LEAVE(sim_error(107000, "kind %d", kind));
    char *to = reach(dst, size, kind == 1 || kind == 3);
    char *from = reach(src, size, kind == 2 || kind == 3);
    if (!to || !from || size > room || !size)
        LEAVE(sim_error(107000, "copy of %zu bytes from %p to %p of kind %d", size, src, dst, kind));
    memmove(to, from, size);
    LEAVE(0);
}
