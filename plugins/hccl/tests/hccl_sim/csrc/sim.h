/* A simulator of the parts of ACL and HCCL that one-sided transfers need: the same symbols, the same
 * layouts, and strict wherever the real libraries are strict or do not forgive.
 *
 * "Devices" are memory of the host that the program can not touch: device pointers are mapped without
 * any access, and the simulator works on a second mapping. Streams are threads; ranks are processes
 * that meet over Unix sockets in the directory ASCEND_SIM_DIR and map each other's memory. */
#ifndef SIM_H
#define SIM_H

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdbool.h>

#define EXPORT __attribute__((visibility("default")))

/* -- faults.c: what tests inject and ask ------------------------------------------------------- */

/* Every exported function begins with ENTER and ends with LEAVE: counted, delayed, made to fail. */
#define ENTER()                                                                                    \
    do {                                                                                           \
        int32_t injected_ = sim_enter(__func__);                                                   \
        if (injected_) return injected_;                                                           \
    } while (0)
#define LEAVE(value) return sim_leave(__func__, (value))

int32_t sim_enter(const char *symbol);
int32_t sim_leave(const char *symbol, int32_t result);
/* Something that hardware would not notice but that is wrong: tests assert that there was none. */
void sim_violation(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Ends the process: what crashes on hardware. */
_Noreturn void sim_crash(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Text for aclGetRecentErrMsg of this thread; returns `code`. */
int32_t sim_error(int32_t code, const char *format, ...) __attribute__((format(printf, 2, 3)));
const char *sim_setting(const char *name, const char *fallback);
int sim_number(const char *name, int fallback);
double sim_now(void);
void sim_sleep(double seconds);
extern _Atomic int sim_task_delay_ms, sim_stuck, sim_peer_code;
enum { LIVE_CONTEXTS, LIVE_STREAMS, LIVE_COMMS, LIVE_REGISTRATIONS, LIVE_ALLOCATIONS, LIVE_DEVICES,
       LIVE_KINDS };
extern _Atomic long sim_live_count[LIVE_KINDS];

/* -- acl.c: devices, contexts, memory, streams ------------------------------------------------- */

typedef struct Context {
    uint32_t magic;
    int device;
    bool is_default;
    _Atomic int streams;
} Context;

Context *current_context(void); /* NULL where the thread has none */
int physical_device(int device);

enum { DEVICE = 0, HOST = 1 };

typedef struct Allocation {
    char *user;   /* what the program got */
    char *alias;  /* the same memory, for the simulator */
    size_t size;
    int kind, device, fd;
    size_t file_offset; /* of `user` in the file */
    bool huge;
    char *map;
    size_t map_size;
    struct Allocation *next;
} Allocation;

/* The allocation that holds the whole range, or NULL. Callers may keep it while it is registered. */
Allocation *find_allocation(const void *address, size_t size);
/* Called with a range about to be freed; true where HCCL still knows it (hccl.c). */
bool range_is_registered(const char *address, size_t size);
/* The same for copies that streams have not ended; in the simulator's own mapping (stream.c). */
bool range_is_queued(const char *alias, size_t size);

typedef struct Peer Peer;
typedef struct Stream Stream;
typedef struct Task {
    char *dst, *src;
    size_t size;
    int foreign_pid; /* not 0: one end is memory of that process, not mapped here */
    bool foreign_is_dst;
    Peer *peer;
    void *region;
    atomic_int *pending; /* of the communicator */
    struct Task *next;
} Task;

/* Moves a part of a task, unless the peer cannot be reached: 0 or a code (engine.c). */
int32_t engine_move(const Task *task, size_t offset, size_t size);
int32_t check_stream(void *stream, Stream **found);
void enqueue(Stream *stream, const Task *task);
/* 0, or the code with which a task that touches the peer fails (hccl.c). */
int32_t peer_state(Peer *peer, void *region);

/* -- environment.c ----------------------------------------------------------------------------- */

/* HCCL reads its variables once, for the first communicator: 0, or PARA for what it refuses. */
int32_t read_environment(void);
/* A variable as HCCL knows it. */
const char *hccl_setting(const char *name, const char *fallback);
bool sim_intra_roce(void);

/* -- table.c ----------------------------------------------------------------------------------- */

enum { MAX_RANKS = 64 };
typedef struct {
    int rank, device_id, server;
    char pod[64];
} Place;
typedef struct {
    int size;
    bool any_device_ip_missing;
    Place places[MAX_RANKS];
} Table;

enum { OK = 0, PARA = 1, PTR = 2, MEMORY = 3, INTERNAL = 4, NOT_SUPPORT = 5, NOT_FOUND = 6,
       UNAVAIL = 7, TIMEOUT = 9, TCP_CONNECT = 11, RUNTIME = 15, AGAIN = 20 };

bool sim_a3(void);
bool sim_uses_rdma(const Table *table, int a, int b);
int32_t parse_table(const char *text, Table *table);

#endif
