/* reply_int: the engine's side of a reply. See reply.h.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SCHED_REPLY_INT_H
#define PL_SCHED_REPLY_INT_H

#include "core/sched/reply.h"

/* on_room(engine) is called, under the reply's lock, when a ring that was found too full is read, and on cancel. NULL ends
 * it. */
void pl_reply_attach(struct pl_reply *r, void (*on_room)(void *engine), void *engine);
/* Room for n more events. If not, the next read calls on_room. */
bool pl_reply_has_room(struct pl_reply *r, size_t n);
/* Events that it has room for now. */
size_t pl_reply_room(struct pl_reply *r);
size_t pl_reply_capacity(const struct pl_reply *r);
/* There is room. False when memory for the text is out (nothing was pushed). */
bool pl_reply_push(struct pl_reply *r, const struct pl_event *ev, const char *text, size_t n_text);
/* The reply frees prompt in the end. False when memory is out. */
bool pl_reply_keep(struct pl_reply *r, struct pl_choice *prompt);

#endif
