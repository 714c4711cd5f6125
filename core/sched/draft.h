/* draft: guesses a sequence's next tokens from its own text, and decides how many guesses are worth computing. What ended
 * with the same three (else two) tokens before is expected to go on in the same way. The engine computes the guesses in the
 * same pass as the sequence's next token and samples one position after the other as ever; a guess only decides whether the
 * row after it can be used. So guesses change when tokens come, never which.
 *
 * The decision weighs expected tokens against time: how often guesses of this sequence hold (a running average), and how
 * much longer a pass takes for each more token (measured while it runs).
 * Thread: engine only.  Owns: nothing.
 * Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; Saxena 2023, "Prompt Lookup
 * Decoding".
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_SCHED_DRAFT_H
#define PL_SCHED_DRAFT_H

#include <stdint.h>

enum {
    PL_DRAFT_MAX = 8,       /* guesses of one sequence in a step, at most */
    PL_DRAFT_SEQS = 16,     /* sequences that decode beside each other while anything is guessed, at most */
    PL_DRAFT_WINDOW = 4096, /* tokens that are looked through, from the end */
    PL_DRAFT_RETRY = 32,    /* chances let pass before a hopeless sequence is tried again; doubles up to PL_DRAFT_REST */
    PL_DRAFT_REST = 256,
};

/* Per sequence. */
struct pl_draft {
    int32_t ids[PL_DRAFT_MAX];
    uint32_t n;     /* guesses in the step that is being built */
    uint32_t gram;  /* how many tokens agreed: 2 or 3 */
    float rate[2];  /* how often a guess holds, after 2 and after 3 tokens that agree */
    uint32_t passed, rest; /* chances let pass since the last try, and how many it takes */
};

/* Per engine: how long passes take that only decode, by how many sequences take part. */
struct pl_draft_cost {
    float base_ns[PL_DRAFT_SEQS + 1]; /* without guesses; 0 = not yet known */
    float slope[PL_DRAFT_SEQS + 1];   /* what one guess adds, as a share of that */
};

void pl_draft_init(struct pl_draft *d);
void pl_draft_cost_init(struct pl_draft_cost *c);

/* Finds at most max guesses for what follows tokens[0..n): the newest place where the last three tokens stood before, else
 * the last two. Returns how many; sets ids and gram, not n. */
uint32_t pl_draft_find(struct pl_draft *d, const int32_t *tokens, uint32_t n, uint32_t max);
/* Of n guesses that were found, how many are worth computing in a step in which n_seqs sequences decode. Counts as a chance
 * let pass when none is. */
uint32_t pl_draft_worth(struct pl_draft *d, const struct pl_draft_cost *c, uint32_t n, uint32_t n_seqs);
/* n guesses were computed, the first n_held of them held. */
void pl_draft_learn(struct pl_draft *d, uint32_t n, uint32_t n_held);
/* A pass of n_seqs decoding sequences with n_guesses beside took this long. */
void pl_draft_cost_learn(struct pl_draft_cost *c, uint32_t n_seqs, uint32_t n_guesses, uint64_t ns);

#endif
