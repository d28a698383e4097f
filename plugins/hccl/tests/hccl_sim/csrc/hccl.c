/* HCCL: registrations, communicators, batches. */
#define _GNU_SOURCE
#include "hccl.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Registration *registrations;
static Comm *comms;
static uint32_t next_id;
static _Atomic uint32_t *slots;
static int slots_file = -1;

#define NEED_DEVICE()                                                                              \
    do {                                                                                           \
        if (!current_context()) return sim_error(RUNTIME, "%s: no device on this thread", __func__); \
    } while (0)

Comm *check_comm(void *pointer) {
    Comm *comm = pointer;
    if (comm && comm->magic != COMM_MAGIC) sim_crash("a communicator is used after its destruction");
    return comm;
}

/* -- registrations ------------------------------------------------------------------------------------ */

static void make_slots(void) {
    if (slots) return;
    slots_file = memfd_create("ascend-sim-slots", MFD_CLOEXEC);
    if (ftruncate(slots_file, MAX_SLOTS * 4)) sim_crash("no memory");
    slots = mmap(NULL, MAX_SLOTS * 4, PROT_READ | PROT_WRITE, MAP_SHARED, slots_file, 0);
}

int slots_fd(void) { return slots_file; }

static int free_slot(void) {
    for (int i = 0; i < MAX_SLOTS; i++)
        if (!slots[i]) return i;
    return -1;
}

static int32_t do_register(const CommMem *memory, void **handle, int device) {
    char *address = memory->address;
    make_slots();
    for (Registration *r = registrations; r; r = r->next) {
        if (r->device != device || r->type != memory->type) continue;
        if (r->address == address && r->size == memory->size) {
            *handle = r;
            return OK;
        }
        if (r->address < address + memory->size && address < r->address + r->size)
            return sim_error(PARA, "overlaps a registered range");
    }
    int slot = free_slot();
    if (slot < 0) return sim_error(MEMORY, "more than %d registrations", MAX_SLOTS);
    Registration *r = calloc(1, sizeof *r);
    r->type = memory->type, r->device = device, r->address = address, r->size = memory->size;
    r->id = ++next_id, r->slot = slot, r->next = registrations;
    slots[slot] = r->id;
    registrations = r;
    sim_live_count[LIVE_REGISTRATIONS]++;
    *handle = r;
    return OK;
}

EXPORT int32_t HcclRegisterGlobalMem(const CommMem *memory, void **handle) {
    ENTER();
    if (!memory || !handle) LEAVE(PTR);
    if (!memory->address || !memory->size) LEAVE(sim_error(PARA, "no range"));
    Context *context = current_context();
    pthread_mutex_lock(&lock);
    int32_t code = do_register(memory, handle, context ? context->device : -1);
    pthread_mutex_unlock(&lock);
    LEAVE(code);
}

/* The registration of a handle, which may be anything; with the link that points to it. */
static Registration *find_registration(const void *handle, Registration ***at) {
    Context *context = current_context();
    for (Registration **r = &registrations; *r; r = &(*r)->next)
        if (*r == handle && (*r)->device == (context ? context->device : -1)) {
            if (at) *at = r;
            return *r;
        }
    return NULL;
}

EXPORT int32_t HcclDeregisterGlobalMem(void *handle) {
    ENTER();
    Registration **at;
    int32_t code = OK;
    pthread_mutex_lock(&lock);
    Registration *r = find_registration(handle, &at);
    if (!r) code = sim_error(PARA, "unknown memory handle");
    else if (r->bound) code = sim_error(PARA, "the memory is still bound");
    else {
        *at = r->next;
        slots[r->slot] = 0;
        free(r);
        sim_live_count[LIVE_REGISTRATIONS]--;
    }
    pthread_mutex_unlock(&lock);
    LEAVE(code);
}

bool range_is_registered(const char *address, size_t size) {
    bool found = false;
    pthread_mutex_lock(&lock);
    for (Registration *r = registrations; r; r = r->next)
        found |= r->address < address + size && address < r->address + r->size;
    pthread_mutex_unlock(&lock);
    return found;
}

/* -- communicators ------------------------------------------------------------------------------------- */

static int32_t check_config(const CommConfig *given, CommConfig *config) {
    memset(config, 0, sizeof *config);
    memcpy(config, given, given->size < 300 ? given->size : 300);
    if (config->magic != 0xF0F0F0F0) return sim_error(PARA, "the configuration has no magic");
    if (config->buffer_size == 0) return sim_error(PARA, "buffer size 0");
    if (config->deterministic != UINT32_MAX && config->deterministic > (sim_a3() ? 1 : 2))
        return sim_error(PARA, "deterministic %u", config->deterministic);
    if (config->version < 2 || !config->name[0]) return sim_error(PARA, "no communicator name");
    if (!memchr(config->name, 0, sizeof config->name)) return sim_error(PARA, "the name has no end");
    if (config->version < 5) return OK;
    uint32_t tc = config->traffic_class, sl = config->service_level;
    if (tc != UINT32_MAX && (tc > 255 || tc % 4)) return sim_error(PARA, "traffic class %u", tc);
    if (sl != UINT32_MAX && sl > 7) return sim_error(PARA, "service level %u", sl);
    return OK;
}

static uint64_t digest_of(const char *name, const char *table) {
    uint64_t digest = 1469598103934665603u;
    for (int part = 0; part < 2; part++)
        for (const char *c = part ? table : name; *c; c++)
            digest = (digest ^ (unsigned char)*c) * 1099511628211u;
    return digest;
}

static int32_t do_init(const char *text, uint32_t rank, const CommConfig *given, void **out) {
    NEED_DEVICE();
    if (!text || !given || !out) return PTR;
    CommConfig config;
    static Table table;
    int32_t code = read_environment();
    if (!code) code = check_config(given, &config);
    if (code) return code;
    int device = current_context()->device;
    for (Comm *c = comms; c; c = c->next)
        if (c->magic == COMM_MAGIC && c->device == device && !strcmp(c->name, config.name))
            return sim_error(PARA, "the name %s is in use", config.name);
    if ((code = parse_table(text, &table))) return code;
    if (rank >= (uint32_t)table.size) return sim_error(PARA, "rank %u is not in the table", rank);
    if (table.places[rank].device_id != physical_device(device))
        return sim_error(UNAVAIL, "rank %u has device_id %d, this is physical device %d", rank,
                         table.places[rank].device_id, physical_device(device));
    Comm *comm = calloc(1, sizeof *comm); /* never freed, so that stale ones are noticed */
    comm->magic = COMM_MAGIC, comm->device = device, comm->rank = (int)rank, comm->table = table;
    strcpy(comm->name, config.name);
    comm->digest = digest_of(config.name, text);
    comm->state_fd = memfd_create("ascend-sim-comm", MFD_CLOEXEC);
    if (ftruncate(comm->state_fd, 4096)) return sim_error(MEMORY, "no memory");
    comm->state = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, comm->state_fd, 0);
    *comm->state = 1;
    comm->next = comms;
    comms = comm;
    sim_live_count[LIVE_COMMS]++;
    *out = comm;
    return OK;
}

EXPORT int32_t HcclCommInitClusterInfoMemConfig(const char *table, uint32_t rank,
                                                const CommConfig *config, void **comm) {
    static atomic_int inside;
    ENTER();
    if (inside++) sim_crash("two communicators are made at the same time");
    sim_sleep(0.001);
    int32_t code = do_init(table, rank, config, comm);
    inside--;
    LEAVE(code);
}

static int32_t change_bound(Comm *comm, void *handle, bool bind) {
    Registration *r = find_registration(handle, NULL);
    if (!r) return sim_error(PARA, "unknown memory handle");
    Bound **at = &comm->bound;
    while (*at && (*at)->registration != r) at = &(*at)->next;
    if (bind == (*at != NULL)) return sim_error(PARA, bind ? "bound already" : "not bound");
    if (bind) {
        *at = calloc(1, sizeof **at);
        (*at)->registration = r;
        (*at)->exported = !comm->prepared;
        r->bound++;
    } else {
        Bound *gone = *at;
        *at = gone->next;
        free(gone);
        r->bound--;
    }
    return OK;
}

EXPORT int32_t HcclCommBindMem(void *pointer, void *handle) {
    ENTER();
    Comm *comm = check_comm(pointer);
    if (!comm) LEAVE(PTR);
    pthread_mutex_lock(&lock);
    int32_t code = change_bound(comm, handle, true);
    pthread_mutex_unlock(&lock);
    LEAVE(code);
}

EXPORT int32_t HcclCommUnbindMem(void *pointer, void *handle) {
    ENTER();
    Comm *comm = check_comm(pointer);
    if (!comm) LEAVE(PTR);
    pthread_mutex_lock(&lock);
    int32_t code = change_bound(comm, handle, false);
    pthread_mutex_unlock(&lock);
    LEAVE(code);
}

static int connect_timeout(void) { return atoi(hccl_setting("HCCL_CONNECT_TIMEOUT", "120")); }

EXPORT int32_t HcclCommPrepare(void *pointer, const PrepareConfig *config, int32_t timeout) {
    ENTER();
    Comm *comm = check_comm(pointer);
    if (!comm || !config) LEAVE(PTR);
    if (timeout <= -2) LEAVE(sim_error(PARA, "timeout %d", timeout));
    if (!current_context()) LEAVE(sim_error(RUNTIME, "no device on this thread"));
    if (comm->preparing) sim_crash("HcclCommPrepare runs twice for one communicator");
    int seconds = timeout == 0 ? connect_timeout() : timeout;
    int32_t code = OK;
    comm->preparing = true;
    if (!comm->prepared && config->topology == 0) code = meet(comm, seconds < 0 ? 1e9 : seconds);
    comm->preparing = false;
    comm->prepared = code == OK;
    LEAVE(code);
}

EXPORT int32_t HcclCommDestroy(void *pointer) {
    ENTER();
    NEED_DEVICE();
    Comm *comm = check_comm(pointer);
    if (!comm) LEAVE(OK);
    if (comm->bound) LEAVE(sim_error(PARA, "memory is still bound"));
    if (comm->pending || comm->preparing) LEAVE(sim_error(AGAIN, "busy"));
    *comm->state = 2;
    for (int rank = 0; rank < comm->table.size; rank++) forget_peer(comm, rank);
    munmap((void *)comm->state, 4096);
    close(comm->state_fd);
    comm->magic = 0;
    sim_live_count[LIVE_COMMS]--;
    LEAVE(OK);
}

/* -- batches --------------------------------------------------------------------------------------------- */

bool hung_up(int sock) {
    struct pollfd poller = {sock, POLLRDHUP, 0};
    return poll(&poller, 1, 0) > 0 && poller.revents & (POLLRDHUP | POLLHUP | POLLERR);
}

int32_t peer_state(Peer *peer, void *pointer) {
    Region *region = pointer;
    int code = sim_peer_code ? sim_peer_code : 507057;
    if (peer->slots[region->slot] != region->id) return sim_error(code, "the range is deregistered");
    if (*peer->state == 2) return peer->rdma ? sim_error(code, "the peer's queue pair is gone") : 0;
    return hung_up(peer->sock) ? sim_error(code, "the peer is gone") : 0;
}

static Region *region_of(const Peer *peer, const char *address, size_t size) {
    for (Region *r = peer->regions; r; r = r->next)
        if (r->address <= address && address + size <= r->address + r->size) return r;
    return NULL;
}

static char *local_of(const Comm *comm, char *address, size_t size) {
    for (Bound *b = comm->bound; b; b = b->next) {
        Registration *r = b->registration;
        if (!(b->exported && r->address <= address && address + size <= r->address + r->size))
            continue;
        Allocation *a = find_allocation(address, size);
        return a ? a->alias + (address - a->user) : address;
    }
    return NULL;
}

static int32_t queue_item(Comm *comm, Peer *peer, const OpDesc *op, Stream *stream, bool put) {
    size_t size = op->count;
    if (op->data_type != 0 && op->data_type != 7) return sim_error(PARA, "only bytes are simulated");
    if (!size) return sim_error(PARA, "an item of length 0");
    pthread_mutex_lock(&lock);
    char *local = local_of(comm, op->local, size);
    pthread_mutex_unlock(&lock);
    Region *region = region_of(peer, op->remote, size);
    if (!local) return sim_error(INTERNAL, "%p is in no bound range of this rank", op->local);
    if (!region)
        return sim_error(sim_a3() ? PARA : INTERNAL, "%p is in no range of the peer", op->remote);
    char *remote = region->mapped ? region->mapped + ((char *)op->remote - region->address)
                                  : (char *)op->remote;
    Task task = {.dst = put ? remote : local, .src = put ? local : remote, .size = size};
    task.peer = peer, task.region = region, task.pending = &comm->pending;
    if (!region->mapped) task.foreign_pid = peer->pid, task.foreign_is_dst = put;
    enqueue(stream, &task);
    return OK;
}

static int32_t batch(void *pointer, uint32_t rank, OpDesc *ops, uint32_t count, void *stream,
                     bool put) {
    Comm *comm = check_comm(pointer);
    Stream *found;
    if (!comm || !ops || !stream) return PTR;
    if (count > MAX_BATCH) return sim_error(PARA, "%u items, at most %d", count, MAX_BATCH);
    if (rank >= (uint32_t)comm->table.size || (int)rank == comm->rank)
        return sim_error(PARA, "rank %u is no peer", rank);
    if (!comm->prepared) return sim_error(NOT_FOUND, "not prepared");
    int32_t code = check_stream(stream, &found);
    if (code) return RUNTIME;
    for (uint32_t i = 0; i < count && !code; i++)
        code = queue_item(comm, comm->peers[rank], &ops[i], found, put);
    memset(ops, 0xEE, count * sizeof *ops); /* nobody may depend on the array from here on */
    return code;
}

EXPORT int32_t HcclBatchPut(void *comm, uint32_t rank, OpDesc *ops, uint32_t n, void *stream) {
    ENTER();
    LEAVE(batch(comm, rank, ops, n, stream, true));
}

EXPORT int32_t HcclBatchGet(void *comm, uint32_t rank, OpDesc *ops, uint32_t n, void *stream) {
    ENTER();
    LEAVE(batch(comm, rank, ops, n, stream, false));
}

/* -- the rest ---------------------------------------------------------------------------------------------- */

static int32_t swap(Comm *comm, Peer *peer, const MemDescs *mine, MemDescs *theirs, uint32_t *count) {
    double deadline = sim_now() + connect_timeout();
    bool first = comm->rank < peer->rank; /* who dialled receives first */
    int failed = 0;
    for (int step = 0; step < 2 && !failed; step++) {
        if (first == (step == 0)) {
            uint32_t n = mine->length;
            failed = write_all(peer->sock, &n, 4, deadline);
            if (!failed) failed = write_all(peer->sock, mine->array, n * sizeof(MemDesc), deadline);
        } else {
            failed = read_all(peer->sock, count, 4, deadline);
            if (!failed && *count > theirs->length)
                sim_violation("%u descriptors came, there was room for %u", *count, theirs->length);
            if (!failed) /* as many as the peer sends, whatever room there is */
                failed = read_all(peer->sock, theirs->array, *count * sizeof(MemDesc), deadline);
        }
    }
    if (failed) return sim_error(failed == TIMEOUT ? TIMEOUT : INTERNAL, "exchange failed");
    for (uint32_t i = 0; i < *count; i++) {
        uint32_t rank = theirs->array[i].remote_rank;
        if (rank != (uint32_t)comm->rank && rank != UINT32_MAX)
            return sim_error(INTERNAL, "a descriptor for rank %u", rank);
    }
    return OK;
}

EXPORT int32_t HcclExchangeMemDesc(void *pointer, uint32_t rank, const MemDescs *mine,
                                   int32_t timeout, MemDescs *theirs, uint32_t *count) {
    ENTER();
    Comm *comm = check_comm(pointer);
    if (!comm || !mine || !theirs || !count || !mine->array || !theirs->array) LEAVE(PTR);
    if (timeout <= -2) LEAVE(sim_error(PARA, "timeout %d", timeout));
    if (rank == (uint32_t)comm->rank) LEAVE(OK);
    if (rank >= (uint32_t)comm->table.size) LEAVE(sim_error(NOT_FOUND, "no rank %u", rank));
    if (!comm->prepared) LEAVE(sim_error(NOT_SUPPORT, "exchange before prepare is not simulated"));
    LEAVE(swap(comm, comm->peers[rank], mine, theirs, count));
}

EXPORT int32_t HcclRemapRegistedMemory(void **handles, const CommMem *memories, uint64_t comm_count,
                                       uint64_t count) {
    ENTER();
    if (!handles || !memories) LEAVE(PTR);
    if (!comm_count || !count) LEAVE(sim_error(PARA, "nothing to remap"));
    for (uint64_t i = 0; i < comm_count; i++) check_comm(handles[i]);
    for (uint64_t i = 0; i < count; i++) {
        if (!memories[i].address || !memories[i].size || memories[i].type != DEVICE) continue;
        pthread_mutex_lock(&lock);
        Registration *r = registrations;
        while (r && (r->address != memories[i].address || r->size != memories[i].size)) r = r->next;
        pthread_mutex_unlock(&lock);
        if (!r) LEAVE(sim_error(PARA, "%p is not registered", memories[i].address));
    }
    LEAVE(OK);
}

EXPORT int32_t HcclGetRankSize(void *pointer, uint32_t *size) {
    ENTER();
    Comm *comm = check_comm(pointer);
    if (!comm || !size) LEAVE(PTR);
    *size = (uint32_t)comm->table.size;
    LEAVE(OK);
}

EXPORT int32_t HcclGetRankId(void *pointer, uint32_t *rank) {
    ENTER();
    Comm *comm = check_comm(pointer);
    if (!comm || !rank) LEAVE(PTR);
    *rank = (uint32_t)comm->rank;
    LEAVE(OK);
}

EXPORT uint32_t HcclGetCommConfigCapability(void) { return 12; }

EXPORT const char *HcclGetErrorString(int32_t code) {
    static const char *const names[] = {"success", "parameter error", "empty pointer", "memory error",
        "internal error", "not supported", "not found", "not available", "system call error",
        "timeout", "open file failure", "tcp connect error"};
    return code >= 0 && code < 12 ? names[code] : "other error";
}
