/* What the two halves of the HCCL part share: communicators, registrations, peers. */
#ifndef HCCL_H
#define HCCL_H

#include "sim.h"

#include <sys/types.h>

enum { COMM_MAGIC = 0x0C0113C7, MAX_SLOTS = 4096, MAX_BATCH = 256 };

typedef struct { int32_t type; void *address; uint64_t size; } CommMem;
typedef struct { uint32_t local_rank, remote_rank; char desc[504]; } MemDesc;
typedef struct { MemDesc *array; uint32_t length; } MemDescs;
typedef struct { void *local, *remote; uint64_t count; int32_t data_type; } OpDesc;
typedef struct { int32_t topology; uint64_t reserved0, reserved1, reserved2; } PrepareConfig;
typedef struct {
    size_t size;
    uint32_t magic, version;
    uint64_t reserved;
    uint32_t buffer_size, deterministic;
    char name[128], udi[128];
    uint32_t expansion_mode, traffic_class, service_level;
} CommConfig;

typedef struct Registration {
    struct Registration *next;
    int type, device, bound;
    char *address;
    size_t size;
    uint32_t id;
    int slot;
} Registration;

/* A range of a peer. `alive` is a word that the owner clears when it deregisters the range. */
typedef struct Region {
    struct Region *next;
    char *address;
    size_t size;
    char *mapped; /* NULL: memory of the process that is not mapped here */
    char *map;
    size_t map_size;
    uint32_t id;
    int slot;
} Region;

struct Peer {
    int rank, sock;
    pid_t pid;
    bool rdma;
    Region *regions;
    _Atomic uint32_t *slots; /* the peer's page of live registrations */
    _Atomic uint32_t *state; /* 1 while the peer's communicator lives, 2 after its destruction */
};

typedef struct Bound { struct Bound *next; Registration *registration; bool exported; } Bound;

typedef struct Comm {
    uint32_t magic;
    struct Comm *next;
    char name[128];
    int device, rank;
    uint64_t digest;
    Table table;
    Bound *bound;
    bool prepared, preparing;
    atomic_int pending;
    int state_fd;
    _Atomic uint32_t *state;
    Peer *peers[MAX_RANKS];
} Comm;

Comm *check_comm(void *pointer); /* ends the process for a stale one */
int slots_fd(void);
int32_t meet(Comm *comm, double seconds);
void forget_peer(Comm *comm, int rank);
bool hung_up(int sock);
int read_all(int sock, void *data, size_t size, double deadline);
int write_all(int sock, const void *data, size_t size, double deadline);

#endif
