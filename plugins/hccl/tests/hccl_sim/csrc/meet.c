/* Prepare: every rank meets every other one over Unix sockets and they map each other's memory. */
#define _GNU_SOURCE
#include "hccl.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { HELLO = 0x4E110 };

typedef struct { uint32_t magic; int32_t rank; uint64_t digest; pid_t pid; } Hello;
typedef struct {
    char *address;
    size_t size, file_offset, map_size;
    uint32_t id;
    int32_t slot, foreign;
} Entry;

/* -- sockets ------------------------------------------------------------------------------------------- */

static int wait_for(int sock, short events, double deadline) {
    double left = deadline - sim_now();
    struct pollfd poller = {sock, events, 0};
    int ready = poll(&poller, 1, left <= 0 ? 0 : left > 1e6 ? 1000000 : (int)(left * 1000) + 1);
    return ready > 0 ? 0 : TIMEOUT;
}

int read_all(int sock, void *data, size_t size, double deadline) {
    for (size_t done = 0; done < size;) {
        if (wait_for(sock, POLLIN, deadline)) return TIMEOUT;
        ssize_t n = recv(sock, (char *)data + done, size - done, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN)) return TCP_CONNECT;
        if (n > 0) done += (size_t)n;
    }
    return 0;
}

int write_all(int sock, const void *data, size_t size, double deadline) {
    for (size_t done = 0; done < size;) {
        if (wait_for(sock, POLLOUT, deadline)) return TIMEOUT;
        ssize_t n = send(sock, (const char *)data + done, size - done, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN) return TCP_CONNECT;
        if (n > 0) done += (size_t)n;
    }
    return 0;
}

static int send_with_fd(int sock, const Entry *entry, int fd, double deadline) {
    char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec data = {(void *)entry, sizeof *entry};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};
    if (fd >= 0) {
        message.msg_control = control, message.msg_controllen = sizeof control;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET, header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &fd, sizeof fd);
    }
    while (true) {
        if (wait_for(sock, POLLOUT, deadline)) return TIMEOUT;
        if (sendmsg(sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL) > 0) return 0;
        if (errno != EAGAIN) return TCP_CONNECT;
    }
}

static int receive_with_fd(int sock, Entry *entry, int *fd, double deadline) {
    char control[CMSG_SPACE(sizeof(int))];
    struct iovec data = {entry, sizeof *entry};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    *fd = -1;
    if (wait_for(sock, POLLIN, deadline)) return TIMEOUT;
    if (recvmsg(sock, &message, MSG_CMSG_CLOEXEC | MSG_WAITALL) != (ssize_t)sizeof *entry)
        return TCP_CONNECT;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (header) memcpy(fd, CMSG_DATA(header), sizeof *fd);
    return 0;
}

/* -- phase 1: connect ---------------------------------------------------------------------------------- */

static void name_of(const Comm *comm, int rank, struct sockaddr_un *name) {
    name->sun_family = AF_UNIX;
    snprintf(name->sun_path, sizeof name->sun_path, "%s/%016lx.%d",
             sim_setting("ASCEND_SIM_DIR", "/nonexistent"), (unsigned long)comm->digest, rank);
}

static int listen_here(const Comm *comm) {
    struct sockaddr_un name;
    int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    name_of(comm, comm->rank, &name);
    unlink(name.sun_path);
    if (bind(sock, (struct sockaddr *)&name, sizeof name) || listen(sock, MAX_RANKS)) {
        close(sock);
        return -1;
    }
    return sock;
}

static void add_peer(Comm *comm, int sock, double deadline) {
    Hello mine = {HELLO, comm->rank, comm->digest, getpid()}, theirs;
    if (write_all(sock, &mine, sizeof mine, deadline) || read_all(sock, &theirs, sizeof theirs, deadline)
        || theirs.magic != HELLO || theirs.digest != comm->digest || theirs.rank < 0
        || theirs.rank >= comm->table.size || comm->peers[theirs.rank]) {
        close(sock);
        return;
    }
    Peer *peer = comm->peers[theirs.rank] = calloc(1, sizeof *peer);
    peer->rank = theirs.rank, peer->sock = sock, peer->pid = theirs.pid;
    peer->rdma = sim_uses_rdma(&comm->table, comm->rank, theirs.rank);
}

static void dial(Comm *comm, int rank, double deadline) {
    struct sockaddr_un name;
    int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    name_of(comm, rank, &name);
    if (connect(sock, (struct sockaddr *)&name, sizeof name)) {
        close(sock);
        return;
    }
    add_peer(comm, sock, deadline);
}

static int32_t connect_all(Comm *comm, int listener, double deadline) {
    while (true) {
        int missing = comm->table.size - 1;
        for (int rank = 0; rank < comm->table.size; rank++) {
            if (comm->peers[rank] && hung_up(comm->peers[rank]->sock)) forget_peer(comm, rank);
            if (!comm->peers[rank] && rank < comm->rank) dial(comm, rank, deadline);
            missing -= comm->peers[rank] != NULL;
        }
        if (!missing) return OK;
        if (sim_now() > deadline) return sim_error(TIMEOUT, "%d ranks did not come", missing);
        if (wait_for(listener, POLLIN, sim_now() + 0.005)) continue;
        int sock = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (sock >= 0) add_peer(comm, sock, deadline);
    }
}

/* -- phase 2: what of our memory can be reached -------------------------------------------------------- */

static int32_t check_bound(const Comm *comm, const Registration *r, bool hccs, bool rdma) {
    const Allocation *a = find_allocation(r->address, r->size);
    if (r->type == DEVICE) {
        if (!a || a->kind != DEVICE || a->device != comm->device)
            return sim_error(INTERNAL, "%p is no device memory of this device", (void *)r->address);
        if (hccs && (!a->huge || (size_t)r->address % (2 << 20)))
            return sim_error(INTERNAL, "HCCS needs huge pages and 2 MiB: %p", (void *)r->address);
        return OK;
    }
    if (r->type != HOST) return sim_error(PARA, "memory type %d", r->type);
    if (rdma && (!a || a->kind != HOST) && !sim_number("ASCEND_SIM_FOREIGN", 0))
        return sim_error(INTERNAL, "host memory %p is not pinned", (void *)r->address);
    return OK;
}

static int32_t check_all_bound(const Comm *comm) {
    bool hccs = false, rdma = false;
    for (int rank = 0; rank < comm->table.size; rank++) {
        if (rank == comm->rank) continue;
        bool uses = sim_uses_rdma(&comm->table, comm->rank, rank);
        hccs |= !uses, rdma |= uses;
    }
    for (const Bound *b = comm->bound; b; b = b->next) {
        int32_t code = check_bound(comm, b->registration, hccs, rdma);
        if (code) return code;
    }
    return OK;
}

/* -- phase 3: exchange ------------------------------------------------------------------------------------ */

static bool exports(const Bound *b, const Peer *peer) {
    return b->exported && (peer->rdma || b->registration->type == DEVICE);
}

static int send_regions(const Comm *comm, const Peer *peer, double deadline) {
    uint32_t count = 0;
    int failed;
    Entry page = {.map_size = MAX_SLOTS * 4};
    for (const Bound *b = comm->bound; b; b = b->next) count += exports(b, peer);
    if ((failed = write_all(peer->sock, &count, sizeof count, deadline))) return failed;
    if ((failed = send_with_fd(peer->sock, &page, comm->state_fd, deadline))) return failed;
    if (count && (failed = send_with_fd(peer->sock, &page, slots_fd(), deadline))) return failed;
    for (const Bound *b = comm->bound; b && !failed; b = b->next) {
        if (!exports(b, peer)) continue;
        const Registration *r = b->registration;
        const Allocation *a = find_allocation(r->address, r->size);
        Entry entry = {.address = r->address, .size = r->size, .id = r->id, .slot = r->slot};
        entry.foreign = a == NULL;
        if (a) {
            entry.file_offset = a->file_offset + (size_t)(r->address - a->user);
            entry.map_size = a->map_size;
        }
        failed = send_with_fd(peer->sock, &entry, a ? a->fd : -1, deadline);
    }
    return failed;
}

static int receive_page(const Peer *peer, size_t size, _Atomic uint32_t **page, double deadline) {
    Entry entry;
    int fd, failed = receive_with_fd(peer->sock, &entry, &fd, deadline);
    if (failed) return failed;
    *page = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    return 0;
}

static int receive_regions(Peer *peer, double deadline) {
    uint32_t count;
    int failed = read_all(peer->sock, &count, sizeof count, deadline);
    if (!failed) failed = receive_page(peer, 4096, &peer->state, deadline);
    if (!failed && count) failed = receive_page(peer, MAX_SLOTS * 4, &peer->slots, deadline);
    for (uint32_t i = 0; i < count && !failed; i++) {
        Entry entry;
        int fd;
        if ((failed = receive_with_fd(peer->sock, &entry, &fd, deadline))) break;
        Region *region = calloc(1, sizeof *region);
        region->address = entry.address, region->size = entry.size;
        region->id = entry.id, region->slot = entry.slot;
        if (!entry.foreign) {
            region->map_size = entry.map_size;
            region->map = mmap(NULL, entry.map_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
            region->mapped = region->map + entry.file_offset;
            close(fd);
        }
        region->next = peer->regions;
        peer->regions = region;
    }
    return failed;
}

static int32_t exchange_all(const Comm *comm, double deadline) {
    for (int rank = 0; rank < comm->table.size; rank++) {
        Peer *peer = comm->peers[rank];
        if (!peer) continue;
        int failed = 0;
        for (int step = 0; step < 2 && !failed; step++)
            failed = (comm->rank < rank) == (step == 0) ? send_regions(comm, peer, deadline)
                                                        : receive_regions(peer, deadline);
        if (failed)
            return sim_error(failed == TIMEOUT ? TIMEOUT : INTERNAL, "exchange with rank %d", rank);
    }
    return OK;
}

/* -- phase 4: enable ------------------------------------------------------------------------------------ */

static int32_t enable_all(const Comm *comm, double deadline) {
    char token = 1;
    for (int rank = 0; rank < comm->table.size; rank++)
        if (comm->peers[rank] && write_all(comm->peers[rank]->sock, &token, 1, deadline))
            return sim_error(INTERNAL, "rank %d left while enabling", rank);
    for (int rank = 0; rank < comm->table.size; rank++) {
        int failed = comm->peers[rank] ? read_all(comm->peers[rank]->sock, &token, 1, deadline) : 0;
        if (failed)
            return sim_error(failed == TIMEOUT ? TIMEOUT : INTERNAL, "rank %d while enabling", rank);
    }
    return OK;
}

void forget_peer(Comm *comm, int rank) {
    Peer *peer = comm->peers[rank];
    if (!peer) return;
    while (peer->regions) {
        Region *region = peer->regions;
        peer->regions = region->next;
        if (region->map) munmap(region->map, region->map_size);
        free(region);
    }
    if (peer->state) munmap((void *)peer->state, 4096);
    if (peer->slots) munmap((void *)peer->slots, MAX_SLOTS * 4);
    close(peer->sock);
    free(peer);
    comm->peers[rank] = NULL;
}

int32_t meet(Comm *comm, double seconds) {
    struct sockaddr_un name;
    int listener = listen_here(comm);
    if (listener < 0) return sim_error(INTERNAL, "ASCEND_SIM_DIR cannot be used");
    int32_t code = connect_all(comm, listener, sim_now() + seconds);
    if (!code) code = check_all_bound(comm);
    if (!code) code = exchange_all(comm, sim_now() + seconds);
    if (!code) code = enable_all(comm, sim_now() + seconds);
    close(listener);
    name_of(comm, comm->rank, &name);
    unlink(name.sun_path);
    if (code)
        for (int rank = 0; rank < comm->table.size; rank++) forget_peer(comm, rank);
    return code;
}
