/* The environment of HCCL: read once per process; later changes have no effect. */
#define _GNU_SOURCE
#include "sim.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct { const char *name; long low, high, step; } numbers[] = {
    {"HCCL_INTRA_ROCE_ENABLE", 0, 1, 1},
    {"HCCL_INTRA_PCIE_ENABLE", 0, 1, 1},
    {"HCCL_CONNECT_TIMEOUT", 120, 7200, 1},
    {"HCCL_EXEC_TIMEOUT", 0, 2147483647, 1},
    {"HCCL_RDMA_TC", 0, 255, 4},
    {"HCCL_RDMA_SL", 0, 7, 1},
    {"HCCL_RDMA_TIMEOUT", 5, 20, 1},
    {"HCCL_RDMA_RETRY_CNT", 1, 7, 1},
    {"HCCL_RDMA_QPS_PER_CONNECTION", 1, 32, 1},
    {"HCCL_WHITELIST_DISABLE", 0, 1, 1},
    {"HCCL_BUFFSIZE", 1, 2147483647, 1},
    {"HCCL_ENTRY_LOG_ENABLE", 0, 1, 1},
};
enum { COUNT = sizeof numbers / sizeof *numbers };

static bool known;
static char values[COUNT][16];

static int32_t check_number(int index) {
    const char *text = sim_setting(numbers[index].name, NULL);
    if (!text) return OK;
    long value = atol(text);
    if (strspn(text, "0123456789") == strlen(text) && strlen(text) <= 10
        && value >= numbers[index].low && value <= numbers[index].high
        && value % numbers[index].step == 0)
        return OK;
    return sim_error(PARA, "EI0001 the environment variable %s is %s", numbers[index].name, text);
}

static int32_t check_pair(void) {
    const char *roce = sim_setting("HCCL_INTRA_ROCE_ENABLE", NULL);
    const char *pcie = sim_setting("HCCL_INTRA_PCIE_ENABLE", NULL);
    if (roce && pcie && *roce == '1' && *pcie == '1')
        return sim_error(PARA, "EI0001 HCCL_INTRA_ROCE_ENABLE and HCCL_INTRA_PCIE_ENABLE are 1");
    if ((roce && *roce == '0' && !pcie) || (pcie && *pcie == '0' && !roce))
        return sim_error(PARA, "EI0001 HCCL_INTRA_ROCE_ENABLE and HCCL_INTRA_PCIE_ENABLE are a pair");
    return OK;
}

int32_t read_environment(void) {
    int32_t code = OK;
    if (known) return OK;
    for (int i = 0; i < COUNT && !code; i++) code = check_number(i);
    if (!code) code = check_pair();
    if (code) return code;
    for (int i = 0; i < COUNT; i++)
        snprintf(values[i], sizeof values[i], "%s", sim_setting(numbers[i].name, ""));
    known = true;
    return OK;
}

const char *hccl_setting(const char *name, const char *fallback) {
    if (!known) return sim_setting(name, fallback);
    for (int i = 0; i < COUNT; i++)
        if (strcmp(numbers[i].name, name) == 0) return *values[i] ? values[i] : fallback;
    return fallback;
}

bool sim_intra_roce(void) { return strcmp(hccl_setting("HCCL_INTRA_ROCE_ENABLE", "0"), "1") == 0; }
