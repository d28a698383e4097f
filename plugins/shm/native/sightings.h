/* Pages of this process and of peers that have just been seen in their page tables.
 *
 * A look into the page tables costs more than the copy of a small block. What was seen counts until the
 * moment ends, a span of 17 ms; SECURITY.md says what a page that goes meanwhile does. Any thread may
 * call. */
#ifndef DATADIST_SIGHTINGS_H
#define DATADIST_SIGHTINGS_H

#include <stdint.h>
#include <sys/types.h>

enum { SIGHTING_PAGES = 16 }; /* looked at together: hardly dearer than one */

/* The pages of a group (page number / SIGHTING_PAGES) of a process that were seen in this moment, as bits. */
uint32_t sightings_get(pid_t pid, int64_t group, int64_t now_ns);

/* Note which were seen just now. */
void sightings_put(pid_t pid, int64_t group, int64_t now_ns, uint32_t pages);

#endif
