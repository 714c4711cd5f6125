/* log: one line per event, as text (logfmt) or JSON, on standard error. Never prompt text at info or above.
 * Thread: any, one line after the other.  Fails: a line that cannot be written at once is dropped and counted, and the next one that can says how
 * many were; logging never blocks a token.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_BASE_LOG_H
#define PL_BASE_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum { PL_LOG_ERROR, PL_LOG_WARN, PL_LOG_INFO, PL_LOG_DEBUG } pl_log_level;

/* Before any thread starts. fd: where lines go (2 by default). */
void pl_log_setup(pl_log_level level, bool json, int fd);
bool pl_log_enabled(pl_log_level level);
uint64_t pl_log_dropped(void);

/* Each file that logs defines PL_LOG_MODULE ("kv", "http", …) after its includes. */
#define pl_log_error(...) pl_log_line(PL_LOG_ERROR, PL_LOG_MODULE, __VA_ARGS__)
#define pl_log_warn(...) pl_log_line(PL_LOG_WARN, PL_LOG_MODULE, __VA_ARGS__)
#define pl_log_info(...) pl_log_line(PL_LOG_INFO, PL_LOG_MODULE, __VA_ARGS__)
#define pl_log_debug(...) pl_log_line(PL_LOG_DEBUG, PL_LOG_MODULE, __VA_ARGS__)
void pl_log_line(pl_log_level level, const char *module, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* An event with named values: "msg k=v k=v" as text, an object with the same keys as JSON. */
struct pl_log_field {
    const char *key;
    enum { PL_LOG_STR, PL_LOG_INT, PL_LOG_REAL } kind;
    const char *s; /* borrowed */
    int64_t i;
    double r; /* printed with one decimal */
};
void pl_log_event(pl_log_level level, const char *module, const char *msg, const struct pl_log_field *fields, size_t n);

#endif
