/* config: the daemon's settings, from flags over environment over file over defaults.
 * Thread: main at start; read-only afterwards.  Owns: its strings, until pl_config_fini.
 * Fails: PL_EINVAL with every mistake in *text, one line each: where, key, what is wrong, what to do.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef PL_CONFIG_CONFIG_H
#define PL_CONFIG_CONFIG_H

#include <stdbool.h>
#include <stddef.h>

#include "core/base/status.h"

struct pl_config_list {
    const char **values; /* [n] */
    size_t n;
};

struct pl_config {
#define SECTION(title)
#define STR(field, name, def, help) const char *field;
#define PATH(field, name, what, help) const char *field;
#define SECRET(field, name, help) const char *field;
#define CHOICE(field, name, def, words, help) const char *field;
#define LIST(field, name, form, help) struct pl_config_list field;
#define INT(field, name, def, min, max, help) int field;
#include "config/keys.def"
#undef SECTION
#undef STR
#undef PATH
#undef SECRET
#undef CHOICE
#undef LIST
#undef INT
};

/* *text (free()): on PL_OK what to print instead of running (--help, --version, --dump-config, --check-config), else
 * NULL; on failure the mistakes. argv[0] is skipped. */
pl_status pl_config_load(struct pl_config *c, int argc, char **argv, char **text, struct pl_err *err) PL_MUST_CHECK;
void pl_config_fini(struct pl_config *c);
/* data-dir, or where it is when nothing is said; free(). NULL = there is no place for it. */
char *pl_config_data_dir(const struct pl_config *c);
/* Whether this process is one of several that mpirun or srun has started to be ranks. */
bool pl_config_launched(const struct pl_config *c);
/* One log line per setting that is not the default. */
void pl_config_log(const struct pl_config *c);

#endif
