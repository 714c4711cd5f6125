/* status: result codes and error messages. Every fallible function returns 0 or a negative pl_status; the code is
 * the contract, the message is for people and is set once, where the cause is known.
 * Thread: any.  Owns: nothing; struct pl_err lives on the caller's stack and may be NULL.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_BASE_STATUS_H
#define PL_BASE_STATUS_H

#define PL_STATUS_LIST(X)                                                                                              \
    X(ENOMEM, "out of memory")                                                                                         \
    X(EINVAL, "invalid argument")                                                                                      \
    X(ENOTSUP, "not supported")                                                                                        \
    X(ENOENT, "not found")                                                                                             \
    X(EIO, "input/output error")                                                                                       \
    X(ENOSPC, "no space left")                                                                                         \
    X(EFORMAT, "malformed data")                                                                                       \
    X(ERANGE, "out of range")                                                                                          \
    X(ENOPAGE, "no cache page left")                                                                                   \
    X(EFULL, "queue is full")                                                                                          \
    X(ETOOLONG, "does not fit into the context")                                                                       \
    X(ESTOPPED, "shutting down")                                                                                       \
    X(EDEVICE, "device failure")                                                                                       \
    X(EBUSY, "taken by others for now")                                                                                \
    X(ERANK, "a rank was lost")

enum pl_status_index {
    PL_STATUS_OK_INDEX = 0,
#define X(name, text) PL_STATUS_##name,
    PL_STATUS_LIST(X)
#undef X
    PL_STATUS_COUNT
};

typedef enum {
    PL_OK = 0,
#define X(name, text) PL_##name = -PL_STATUS_##name,
    PL_STATUS_LIST(X)
#undef X
} pl_status_code;

/* A status is an int so that a pl_status_code can be returned as is; the attribute sits on the functions. */
typedef int pl_status;
#define PL_MUST_CHECK __attribute__((warn_unused_result))

struct pl_err {
    pl_status code;
    char param[64]; /* the request field or configuration key at fault, "" where there is none */
    char msg[512];
};

/* "out of memory" and so on; "ok" for 0, "unknown status" for anything else. */
const char *pl_status_text(pl_status code);

/* Of a failed system call: PL_ENOSPC when the disk, a quota or a limit on the size of files is full, PL_ENOMEM, else PL_EIO. */
pl_status pl_status_of_errno(int why);

/* Fills *e (if not NULL) and yields code, so that `return pl_fail(e, PL_EINVAL, …)` reads as one step and the compiler
 * sees which status comes back. pl_fail_param also names the parameter at fault. */
#define pl_fail(e, code, ...) (pl_err_set((e), (code), "", __VA_ARGS__), (code))
#define pl_fail_param(e, code, param, ...) (pl_err_set((e), (code), (param), __VA_ARGS__), (code))
void pl_err_set(struct pl_err *e, pl_status code, const char *param, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

/* For broken programs only, never for bad input. Stays on in release builds. */
#define PL_ASSERT(cond) ((cond) ? (void)0 : pl_assert_failed(#cond, __FILE__, __LINE__))
_Noreturn void pl_assert_failed(const char *cond, const char *file, int line);

#endif
