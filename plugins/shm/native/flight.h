/* Transfers by a thread of their own, which their caller need not wait for to the end. */
#ifndef DATADIST_FLIGHT_H
#define DATADIST_FLIGHT_H

#include "transfer.h"

typedef struct Flight Flight;

/* Move every segment of a checked job in another thread. Returns a result, by the deadline or soon after an
 * abort or the end of the peer, with *left NULL; or *left is a transfer that goes on, since a page that
 * it needs does not come: what the job points to, and the memory that it reads and writes, must stay
 * until it has settled. */
int fly(Job *job, Flight **left);

/* Whether it has ended: then it was freed, and nothing of it touches memory any more. */
int settle(Flight *flight);

#endif
