/* kv: hands out fixed-size cache pages to sequences, and finds pages that already hold a prompt's beginning. Host
 * bookkeeping only, identical on every device.
 *
 * A full page whose tokens are known is named by a 128-bit hash chain over (salt, family, all tokens before it, its own tokens); token ids are compared on a
 * hit as well. Pages with a name are shared. A page of which only the beginning is wanted, or is there yet, is found by what is before it, and
 * copied. Freed pages whose tokens are known stay in the cache, least recently used first out, until their page is needed.
 *
 *   tokens   [0 .. P)[P .. 2P)[2P .. n)       P = page size
 *   pages     p7       p2       p9            table of the sequence; p7 and p2 may be shared (refcount > 1),
 *             named    named    private       the last, partial one never is: others copy its tokens
 *
 * Thread: engine only.  Owns: page arrays and its copies of page tokens.  Borrows: token arrays, during the call.
 * Fails: PL_ENOPAGE when it does not fit, PL_ENOMEM when there is no memory for the table; it is then unchanged.
 * Invariant: free + cached + held == total after each public call (pl_kv_check proves it).
 * Source: Kwon et al. 2023, "Efficient Memory Management for LLM Serving with PagedAttention".
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_KV_KV_H
#define PL_KV_KV_H

#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"

#define PL_KV_PAGE 32u /* tokens per page */

struct pl_kv;

/* The block table of one sequence. Zero-initialised = empty. */
struct pl_kv_table {
    uint32_t *pages; /* owned by the kv module until pl_kv_release */
    uint32_t n_pages, cap;
    uint32_t n_named; /* pages at the front that are full, hashed and known to the cache */
    uint64_t chain[2]; /* hash of the named front */
};

pl_status pl_kv_new(struct pl_kv **out, uint32_t n_pages, uint64_t salt, struct pl_err *err) PL_MUST_CHECK;
void pl_kv_free(struct pl_kv *kv);

/* What the device has to copy so that a table holds what pl_kv_match says: page `to` is the table's last one. */
struct pl_kv_copy {
    uint32_t from, to;
    uint32_t n; /* tokens, the first ones of the page; 0 = nothing to copy */
};

/* Begins an empty table. family: what beside the tokens decides the values in the pages (the adapter, 0 = none); pages are
 * shared within a family only. Fills the table with the longest cached beginning of tokens[0..n), n 0 = with nothing; never
 * all of it (at least one token is left to compute). copy: to be done before anything is written or another call is made here;
 * NULL = whole pages only. Returns how many tokens are covered, those of the copy with them. */
uint32_t pl_kv_match(struct pl_kv *kv, struct pl_kv_table *t, uint64_t family, const int32_t *tokens, uint32_t n, struct pl_kv_copy *copy);
/* Grows the table until it can hold n_tokens. */
pl_status pl_kv_reserve(struct pl_kv *kv, struct pl_kv_table *t, uint32_t n_tokens) PL_MUST_CHECK;
/* tokens[0..n_done) have been computed, n_done never less than before: others can reuse them. */
void pl_kv_commit(struct pl_kv *kv, struct pl_kv_table *t, const int32_t *tokens, uint32_t n_done);
/* Gives all pages back (those with known tokens stay in the cache) and empties the table. */
void pl_kv_release(struct pl_kv *kv, struct pl_kv_table *t);

uint32_t pl_kv_total(const struct pl_kv *kv);
uint32_t pl_kv_held(const struct pl_kv *kv);      /* in a table */
uint32_t pl_kv_cached(const struct pl_kv *kv);    /* in no table, but with known tokens */
uint32_t pl_kv_available(const struct pl_kv *kv); /* free + cached */
/* Proves the invariants by walking everything; PL_ASSERTs. For tests and debug builds. */
void pl_kv_check(const struct pl_kv *kv);

#endif
