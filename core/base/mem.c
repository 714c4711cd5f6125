/* mem: allocation that cannot fail quietly, and arenas that free a request's memory in one go.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/base/mem.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/status.h"

void *pl_xmalloc(size_t n)
{
    void *p = malloc(n ? n : 1);
    PL_ASSERT(p != NULL);
    return p;
}

void *pl_xcalloc(size_t count, size_t size)
{
    void *p = calloc(count ? count : 1, size ? size : 1);
    PL_ASSERT(p != NULL);
    return p;
}

void *pl_xrealloc(void *p, size_t n)
{
    void *q = realloc(p, n ? n : 1);
    PL_ASSERT(q != NULL);
    return q;
}

char *pl_xstrdup(const char *s)
{
    size_t n = strlen(s) + 1;
    return memcpy(pl_xmalloc(n), s, n);
}

bool pl_reserve_words(uint32_t **words, size_t *cap, size_t n)
{
    if (n <= *cap)
        return true;
    uint32_t *more = realloc(*words, 2 * n * sizeof *more);
    if (more == NULL)
        return false;
    *words = more;
    *cap = 2 * n;
    return true;
}

enum { ARENA_ALIGN = 16, ARENA_CHUNK = 4096 };

struct arena_chunk {
    struct arena_chunk *next;
    size_t used, size;
    _Alignas(16) unsigned char bytes[];
};

struct pl_arena {
    struct arena_chunk *head;
    size_t used, limit;
    bool full;
};

struct pl_arena *pl_arena_new(size_t limit)
{
    struct pl_arena *a = calloc(1, sizeof *a);
    if (a != NULL)
        a->limit = limit ? limit : SIZE_MAX;
    return a;
}

void pl_arena_free(struct pl_arena *a)
{
    if (a == NULL)
        return;
    for (struct arena_chunk *c = a->head, *next; c != NULL; c = next) {
        next = c->next;
        free(c);
    }
    free(a);
}

void *pl_arena_alloc(struct pl_arena *a, size_t n)
{
    const size_t rounded = (n + ARENA_ALIGN - 1) & ~(size_t)(ARENA_ALIGN - 1);
    if (rounded < n || rounded > a->limit - a->used) {
        a->full = true;
        return NULL;
    }
    n = rounded;
    struct arena_chunk *c = a->head;
    if (c == NULL || c->size - c->used < n) {
        size_t size = n > ARENA_CHUNK ? n : ARENA_CHUNK;
        c = malloc(sizeof *c + size);
        if (c == NULL)
            return NULL;
        *c = (struct arena_chunk){.next = a->head, .size = size};
        a->head = c;
    }
    void *p = c->bytes + c->used;
    c->used += n;
    a->used += n;
    return p;
}

void *pl_arena_zalloc(struct pl_arena *a, size_t n)
{
    void *p = pl_arena_alloc(a, n);
    return p != NULL ? memset(p, 0, n) : NULL;
}

char *pl_arena_strndup(struct pl_arena *a, const char *s, size_t n)
{
    char *p = n < SIZE_MAX ? pl_arena_alloc(a, n + 1) : NULL;
    if (p != NULL) {
        memcpy(p, s, n);
        p[n] = '\0';
    }
    return p;
}

size_t pl_arena_used(const struct pl_arena *a)
{
    return a->used;
}

bool pl_arena_full(const struct pl_arena *a)
{
    return a->full;
}
