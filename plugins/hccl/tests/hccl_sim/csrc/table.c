/* Rank tables: a strict JSON reader, and the checks and codes of HCCL's. */
#define _GNU_SOURCE
#include "sim.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* -- JSON ---------------------------------------------------------------------------------------- */

typedef struct Node {
    char kind; /* { [ " n(umber) l(iteral) */
    char *name;
    char *text;
    struct Node *child, *next;
} Node;

typedef struct { const char *at; bool bad; int depth; } Reader;

static Node *read_value(Reader *r);

static void blanks(Reader *r) { while (*r->at && strchr(" \t\r\n", *r->at)) r->at++; }

static void free_node(Node *node) {
    while (node) {
        Node *next = node->next;
        free_node(node->child);
        free(node->name);
        free(node->text);
        free(node);
        node = next;
    }
}

static char *read_string(Reader *r) {
    if (*r->at != '"') { r->bad = true; return NULL; }
    const char *start = ++r->at;
    char *text = calloc(1, strlen(start) + 1), *out = text;
    while (*r->at && *r->at != '"') {
        if ((unsigned char)*r->at < 0x20) r->bad = true;
        if (*r->at == '\\') {
            r->at++;
            if (!*r->at || !strchr("\"\\/bfnrtu", *r->at)) { r->bad = true; break; }
        }
        *out++ = *r->at++;
    }
    if (*r->at != '"') r->bad = true;
    else r->at++;
    return text;
}

static Node *read_members(Reader *r, Node *node, char end) {
    Node **tail = &node->child;
    r->at++;
    blanks(r);
    if (*r->at == end) { r->at++; return node; }
    while (!r->bad) {
        char *name = NULL;
        blanks(r);
        if (end == '}') {
            name = read_string(r);
            blanks(r);
            if (*r->at++ != ':') r->bad = true;
        }
        if (r->bad) { free(name); break; }
        Node *child = read_value(r);
        if (child) { child->name = name; *tail = child; tail = &child->next; }
        else free(name);
        blanks(r);
        if (*r->at == end) { r->at++; return node; }
        if (*r->at != ',') r->bad = true;
        else r->at++;
    }
    return node;
}

static Node *read_value(Reader *r) {
    blanks(r);
    Node *node = calloc(1, sizeof *node);
    node->kind = *r->at;
    if (++r->depth > 64) r->bad = true;
    if (r->bad) { free(node); return NULL; }
    if (*r->at == '{') read_members(r, node, '}');
    else if (*r->at == '[') read_members(r, node, ']');
    else if (*r->at == '"') node->text = read_string(r);
    else {
        size_t n = strcspn(r->at, " \t\r\n,]}");
        node->kind = isdigit((unsigned char)*r->at) || *r->at == '-' ? 'n' : 'l';
        if (n == 0) r->bad = true;
        r->at += n;
    }
    r->depth--;
    return node;
}

static const Node *member(const Node *node, const char *name) {
    for (const Node *c = node ? node->child : NULL; c; c = c->next)
        if (c->name && strcmp(c->name, name) == 0) return c;
    return NULL;
}

static int length(const Node *node) {
    int n = 0;
    for (const Node *c = node->child; c; c = c->next) n++;
    return n;
}

/* -- fields -------------------------------------------------------------------------------------- */

#define REQUIRE(condition, code, ...)                                                              \
    do {                                                                                           \
        if (!(condition)) return sim_error((code), "rank table: " __VA_ARGS__);                    \
    } while (0)

static int32_t text_of(const Node *node, const char *name, bool required, const char **text) {
    const Node *field = member(node, name);
    *text = NULL;
    if (!field) {
        REQUIRE(!required, NOT_FOUND, "%s is missing", name);
        return OK;
    }
    REQUIRE(field->kind == '"', PARA, "%s is not text", name);
    *text = field->text;
    return OK;
}

static int32_t number_of(const Node *node, const char *name, bool required, long low, long high,
                         long *number) {
    const char *text;
    int32_t code = text_of(node, name, required, &text);
    if (code || !text) return code;
    REQUIRE(*text && strspn(text, "0123456789") == strlen(text) && strlen(text) <= 10, PARA,
            "%s is no decimal number: %s", name, text);
    *number = atol(text);
    REQUIRE(*number >= low && *number <= high, PARA, "%s is out of range: %s", name, text);
    return OK;
}

static int family_of(const char *text) {
    char one[64], buffer[16];
    size_t n = strcspn(text, ",");
    if (n == 0 || n >= sizeof one) return 0;
    memcpy(one, text, n);
    one[n] = 0;
    if (inet_pton(AF_INET, one, buffer) == 1) return AF_INET;
    return inet_pton(AF_INET6, one, buffer) == 1 ? AF_INET6 : 0;
}

static int32_t array_of(const Node *node, const char *name, const Node **list) {
    *list = member(node, name);
    REQUIRE(*list, NOT_FOUND, "%s is missing", name);
    REQUIRE((*list)->kind == '[' && length(*list) > 0, PARA, "%s is no list or empty", name);
    return OK;
}

#define TRY(call)                                                                                  \
    do {                                                                                           \
        int32_t code_ = (call);                                                                    \
        if (code_) return code_;                                                                   \
    } while (0)

/* -- the table ----------------------------------------------------------------------------------- */

typedef struct {
    Table *table;
    const char *ips[MAX_RANKS];
    int families[MAX_RANKS];
    const char *server_ids[MAX_RANKS];
    int servers;
} Reading;

static int32_t read_device(Reading *reading, const Node *device, bool pods) {
    Table *table = reading->table;
    long device_id = 0, rank = 0, port = 0;
    const char *ip, *super;
    REQUIRE(table->size < MAX_RANKS, PARA, "too many ranks");
    TRY(number_of(device, "device_id", true, 0, 15, &device_id));
    TRY(number_of(device, "rank_id", true, 0, 1 << 20, &rank));
    TRY(number_of(device, "device_port", false, 1, 65535, &port));
    TRY(number_of(device, "host_port", false, 1, 65535, &port));
    TRY(text_of(device, "device_ip", false, &ip));
    TRY(text_of(device, "super_device_id", pods, &super));
    REQUIRE(!pods || *super, PARA, "super_device_id is empty");
    int index = table->size++, family = ip ? family_of(ip) : 0;
    REQUIRE(!ip || family, PARA, "device_ip %s is no address", ip);
    for (int i = 0; i < index; i++)
        REQUIRE(!ip || !reading->ips[i] || strcmp(ip, reading->ips[i]) != 0, PARA,
                "device_ip %s twice", ip);
    reading->ips[index] = ip;
    reading->families[index] = family;
    Place *place = &table->places[index];
    place->rank = (int)rank, place->device_id = (int)device_id, place->server = reading->servers;
    return OK;
}

static int32_t read_server(Reading *reading, const Node *server, bool pods) {
    const char *id, *host;
    const Node *devices;
    TRY(text_of(server, "server_id", true, &id));
    REQUIRE(*id && strlen(id) <= 64, PARA, "server_id is empty or too long");
    for (int i = 0; i < reading->servers; i++)
        REQUIRE(strcmp(id, reading->server_ids[i]) != 0, PARA, "server_id %s twice", id);
    TRY(text_of(server, "host_ip", false, &host));
    REQUIRE(!host || family_of(host), PARA, "host_ip %s is no address", host);
    TRY(array_of(server, "device", &devices));
    for (const Node *d = devices->child; d; d = d->next) TRY(read_device(reading, d, pods));
    REQUIRE(reading->servers < MAX_RANKS, PARA, "too many servers");
    reading->server_ids[reading->servers++] = id;
    return OK;
}

static int32_t read_pods(Reading *reading, const Node *root) {
    const Node *pods = member(root, "super_pod_list");
    int covered = 0;
    if (!pods) return OK;
    REQUIRE(pods->kind == '[' && length(pods) > 0, PARA, "super_pod_list is no list or empty");
    for (const Node *pod = pods->child; pod; pod = pod->next) {
        const char *pod_id, *id;
        const Node *servers;
        TRY(text_of(pod, "super_pod_id", true, &pod_id));
        REQUIRE(*pod_id, PARA, "super_pod_id is empty");
        TRY(array_of(pod, "server_list", &servers));
        for (const Node *s = servers->child; s; s = s->next, covered++) {
            int number = 0;
            TRY(text_of(s, "server_id", true, &id));
            while (number < reading->servers && strcmp(reading->server_ids[number], id)) number++;
            REQUIRE(number < reading->servers, NOT_FOUND, "no server %s", id);
            for (int i = 0; i < reading->table->size; i++)
                if (reading->table->places[i].server == number)
                    snprintf(reading->table->places[i].pod, 64, "%s", pod_id);
        }
    }
    REQUIRE(covered == reading->servers, PARA, "super_pod_list does not cover every server");
    return OK;
}

static int one_pod(const Table *table) {
    for (int i = 1; i < table->size; i++)
        if (strcmp(table->places[i].pod, table->places[0].pod)) return 0;
    return 1;
}

static int32_t check_addresses(const Reading *reading) {
    const Table *table = reading->table;
    bool needed = reading->servers > 1 || sim_intra_roce();
    if (sim_a3() && one_pod(table) && !sim_intra_roce()) needed = false;
    for (int i = 0; i < table->size; i++) {
        REQUIRE(!needed || reading->ips[i], PARA, "device_ip of rank %d is missing",
                table->places[i].rank);
        REQUIRE(!needed || reading->families[i] == reading->families[0], PARA,
                "device_ip of two families");
    }
    return OK;
}

static int32_t read_root(const Node *root, Table *table) {
    Reading reading = {.table = table};
    const char *version, *status;
    const Node *servers;
    long count = 0;
    REQUIRE(root->kind == '{', PARA, "no object");
    TRY(text_of(root, "version", true, &version));
    REQUIRE(!strcmp(version, "1.0") || !strcmp(version, "1.2"), NOT_SUPPORT, "version %s", version);
    TRY(text_of(root, "status", true, &status));
    TRY(array_of(root, "server_list", &servers));
    bool pods = !strcmp(version, "1.2") && member(root, "super_pod_list");
    for (const Node *s = servers->child; s; s = s->next) TRY(read_server(&reading, s, pods));
    TRY(number_of(root, "server_count", false, 1, MAX_RANKS, &count));
    REQUIRE(!member(root, "server_count") || count == reading.servers, PARA, "server_count is wrong");
    if (pods) TRY(read_pods(&reading, root));
    bool seen[MAX_RANKS] = {false};
    for (int i = 0; i < table->size; i++) {
        int rank = table->places[i].rank;
        REQUIRE(rank < table->size && !seen[rank], PARA, "rank ids have gaps or repeat");
        seen[rank] = true;
    }
    return check_addresses(&reading);
}

static int by_rank(const void *a, const void *b) {
    return ((const Place *)a)->rank - ((const Place *)b)->rank;
}

int32_t parse_table(const char *text, Table *table) {
    Reader reader = {.at = text};
    memset(table, 0, sizeof *table);
    REQUIRE(strlen(text) >= 1 && strlen(text) <= 40u << 20, PARA, "the text is empty or too long");
    Node *root = read_value(&reader);
    blanks(&reader);
    int32_t code = PARA;
    if (!root || reader.bad || *reader.at)
        sim_error(PARA, "rank table: no JSON near: %.20s", reader.at);
    else
        code = read_root(root, table);
    free_node(root);
    qsort(table->places, (size_t)table->size, sizeof(Place), by_rank);
    return code;
}

/* -- which link a pair uses ------------------------------------------------------------------------ */

bool sim_a3(void) {
    return strncmp(sim_setting("ASCEND_SIM_SOC", "Ascend910B3"), "Ascend910_93", 12) == 0;
}

bool sim_uses_rdma(const Table *table, int a, int b) {
    if (sim_intra_roce()) return true;
    const Place *x = &table->places[a], *y = &table->places[b];
    return sim_a3() ? strcmp(x->pod, y->pod) != 0 : x->server != y->server;
}
