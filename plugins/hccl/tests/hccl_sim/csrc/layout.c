/* Structs as the compiler sees them, for comparison with the bindings: the size and the alignment of
 * each, the offset and the size of every field. */
#include "hccl.h"

#define STRUCT(type) {#type, sizeof(type), _Alignof(type)}
#define FIELD(type, field) {#type "." #field, offsetof(type, field), sizeof(((type *)0)->field)}

EXPORT const struct { const char *name; size_t first, second; } sim_layout[] = {
    STRUCT(MemDesc), FIELD(MemDesc, local_rank), FIELD(MemDesc, remote_rank), FIELD(MemDesc, desc),
    STRUCT(MemDescs), FIELD(MemDescs, array), FIELD(MemDescs, length),
    STRUCT(OpDesc), FIELD(OpDesc, local), FIELD(OpDesc, remote), FIELD(OpDesc, count),
    FIELD(OpDesc, data_type),
    STRUCT(CommMem), FIELD(CommMem, type), FIELD(CommMem, address), FIELD(CommMem, size),
    STRUCT(PrepareConfig), FIELD(PrepareConfig, topology), FIELD(PrepareConfig, reserved0),
    FIELD(PrepareConfig, reserved1), FIELD(PrepareConfig, reserved2),
    STRUCT(CommConfig), FIELD(CommConfig, size), FIELD(CommConfig, magic),
    FIELD(CommConfig, version), FIELD(CommConfig, reserved), FIELD(CommConfig, buffer_size),
    FIELD(CommConfig, deterministic), FIELD(CommConfig, name), FIELD(CommConfig, udi),
    FIELD(CommConfig, expansion_mode), FIELD(CommConfig, traffic_class),
    FIELD(CommConfig, service_level),
    {0},
};
