/* mem: allocation that cannot fail quietly, and arenas that free a request's memory in one go.
 * Thread: any; one arena belongs to one thread at a time.  Owns: an arena owns every block taken from it.
 * Fails: pl_xmalloc and friends end the process (small bookkeeping only; memory whose size a client chooses goes
 * through malloc and PL_ENOMEM). pl_arena_* return NULL when memory is out or the arena's limit is reached.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_BASE_MEM_H
#define PL_BASE_MEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PL_COUNT_OF(a) (sizeof(a) / sizeof((a)[0]))

void *pl_xmalloc(size_t n) __attribute__((malloc, returns_nonnull));
void *pl_xcalloc(size_t count, size_t size) __attribute__((malloc, returns_nonnull));
void *pl_xrealloc(void *p, size_t n) __attribute__((returns_nonnull));
char *pl_xstrdup(const char *s) __attribute__((malloc, returns_nonnull));
/* Room for n words at least, twice as many when there was not; what was in them stays. False when memory is out: nothing has changed. */
bool pl_reserve_words(uint32_t **words, size_t *cap, size_t n);

struct pl_arena;
/* limit: bytes that may be taken in all, 0 = unlimited. NULL when memory is out. */
struct pl_arena *pl_arena_new(size_t limit);
void pl_arena_free(struct pl_arena *a);
/* 16-byte aligned, uninitialised. */
void *pl_arena_alloc(struct pl_arena *a, size_t n);
void *pl_arena_zalloc(struct pl_arena *a, size_t n);
/* A NUL-terminated copy of n bytes. */
char *pl_arena_strndup(struct pl_arena *a, const char *s, size_t n);
size_t pl_arena_used(const struct pl_arena *a);
/* Whether something was refused for its limit: the request's fault, not the machine's. */
bool pl_arena_full(const struct pl_arena *a);

#endif
