/* config: the daemon's settings, from flags over environment over file over defaults.
 * SPDX-License-Identifier: Apache-2.0 */
#include "config/config.h"

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/buf.h"
#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/base/version.h"

#define PL_LOG_MODULE "config"

#define BLANKS " \t\r\n"

enum kind { STR_KEY, PATH_KEY, SECRET_KEY, CHOICE_KEY, LIST_KEY, INT_KEY };

struct key {
    enum kind kind;
    const char *section; /* printed before the key; NULL = the same as before */
    const char *name;
    size_t offset;
    const char *def, *words, *help; /* words: of a choice; FILE or FOLDER; the form of a list's value */
    int def_int, min, max;
};

static const struct key keys[] = {
#define AT(field) offsetof(struct pl_config, field)
#define SECTION(title) {.section = title},
#define STR(f, n, d, h) {.kind = STR_KEY, .name = n, .offset = AT(f), .def = d, .help = h},
#define PATH(f, n, w, h) {.kind = PATH_KEY, .name = n, .offset = AT(f), .def = "", .words = w, .help = h},
#define SECRET(f, n, h) {.kind = SECRET_KEY, .name = n, .offset = AT(f), .def = "", .help = h},
#define CHOICE(f, n, d, w, h) {.kind = CHOICE_KEY, .name = n, .offset = AT(f), .def = d, .words = w, .help = h},
#define LIST(f, n, form, h) {.kind = LIST_KEY, .name = n, .offset = AT(f), .words = form, .help = h},
#define INT(f, n, d, lo, hi, h) {.kind = INT_KEY, .name = n, .offset = AT(f), .def_int = d, .min = lo, .max = hi, .help = h},
#include "config/keys.def"
};
#define N_KEYS PL_COUNT_OF(keys)

static const char **text_of(struct pl_config *c, const struct key *k)
{
    return (const char **)((char *)c + k->offset);
}

static int *int_of(struct pl_config *c, const struct key *k)
{
    return (int *)((char *)c + k->offset);
}

static struct pl_config_list *list_of(struct pl_config *c, const struct key *k)
{
    return (struct pl_config_list *)((char *)c + k->offset);
}

static bool is_text(const struct key *k)
{
    return k->name != NULL && k->kind != INT_KEY && k->kind != LIST_KEY;
}

/* ---- setting one value --------------------------------------------------------------------------------------------- */

struct loader {
    struct pl_config *c;
    struct pl_buf mistakes;
    enum source { FROM_FILE, FROM_ENVIRONMENT, FROM_FLAGS } source; /* of what is being set */
    bool started[PL_COUNT_OF(keys)];                                /* lists that this source has begun */
};

/* where: "--port", "PARLEY_PORT" or "parley.conf:7" */
static void mistake(struct loader *l, const char *where, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

static void mistake(struct loader *l, const char *where, const char *fmt, ...)
{
    char msg[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof msg, fmt, ap);
    va_end(ap);
    pl_buf_addf(&l->mistakes, "%s%s: %s", l->mistakes.len > 0 ? "\n" : "", where, msg);
}

/* A word that ends with ":N" stands for all numbers of three digits at most. */
static bool is_word(const char *words, const char *value)
{
    size_t n = strlen(value), digits = 0;
    while (digits < n && value[n - 1 - digits] >= '0' && value[n - 1 - digits] <= '9')
        digits++;
    const size_t stem = n - digits; /* with the colon */
    if (strchr(value, '|') != NULL)
        return false; /* several words */
    for (const char *w = words; w != NULL; w = strchr(w, '|') != NULL ? strchr(w, '|') + 1 : NULL) {
        if (n > 0 && strncmp(w, value, n) == 0 && (w[n] == '|' || w[n] == '\0') && value[n - 1] != 'N')
            return true;
        if (digits > 0 && digits <= 3 && stem > 0 && value[stem - 1] == ':' && strncmp(w, value, stem) == 0 && w[stem] == 'N' &&
            (w[stem + 1] == '|' || w[stem + 1] == '\0'))
            return true;
    }
    return false;
}

static void set_text(struct pl_config *c, const struct key *k, const char *value)
{
    free((void *)(uintptr_t)*text_of(c, k));
    *text_of(c, k) = pl_xstrdup(value);
}

static void clear_list(struct pl_config_list *list)
{
    for (size_t i = 0; i < list->n; i++)
        free((void *)(uintptr_t)list->values[i]);
    free(list->values);
    *list = (struct pl_config_list){0};
}

/* Without the blanks around it. */
static void trim_span(const char **s, size_t *n)
{
    for (; *n > 0 && strchr(BLANKS, **s) != NULL; (*s)++)
        --*n;
    while (*n > 0 && strchr(BLANKS, (*s)[*n - 1]) != NULL)
        --*n;
}

/* One more value, NAME=PATH where that is the form (blanks around either are none of it), else with n_name 0. The first one of
 * a source takes the place of what weaker sources said. */
static void add_value(struct loader *l, const struct key *k, const char *name, size_t n_name, const char *value, size_t n)
{
    struct pl_config_list *list = list_of(l->c, k);
    if (!l->started[k - keys])
        clear_list(list);
    l->started[k - keys] = true;
    list->values = pl_xrealloc(list->values, (list->n + 1) * sizeof *list->values);
    struct pl_buf b;
    pl_buf_init(&b, 0);
    pl_buf_add(&b, name, n_name);
    pl_buf_adds(&b, n_name > 0 ? "=" : "");
    pl_buf_add(&b, value, n);
    list->values[list->n++] = pl_buf_take(&b);
}

static void take_item(struct loader *l, const struct key *k, const char *item, size_t n, const char *where)
{
    const char *name = item, *value = item, *sign = memchr(item, '=', n);
    size_t n_name = 0, n_value = n;
    const bool pair = strchr(k->words, '=') != NULL;
    if (pair && sign != NULL) {
        n_name = (size_t)(sign - item);
        value = sign + 1;
        n_value = n - n_name - 1;
        trim_span(&name, &n_name);
    }
    trim_span(&value, &n_value);
    if (pair && (n_name == 0 || n_value == 0))
        mistake(l, where, "%s must look like %s, not \"%.*s\"", k->name, k->words, n < 60 ? (int)n : 60, item);
    else
        add_value(l, k, name, n_name, value, n_value);
}

/* The environment has one variable for all values, with semicolons between them. */
static void set_list(struct loader *l, const struct key *k, const char *value, const char *where)
{
    for (size_t n; *value != '\0'; value += n + (value[n] == ';')) {
        n = l->source == FROM_ENVIRONMENT ? strcspn(value, ";") : strlen(value);
        take_item(l, k, value, n, where);
    }
}

static void set(struct loader *l, const struct key *k, const char *value, const char *where)
{
    if (k->kind == LIST_KEY) {
        set_list(l, k, value, where);
        return;
    }
    if (k->kind == INT_KEY) {
        char *end;
        errno = 0;
        long v = strtol(value, &end, 10);
        if (end == value || *end != '\0' || errno != 0 || v < k->min || v > k->max)
            mistake(l, where, "%s must be a whole number from %d to %d, not \"%.60s\"", k->name, k->min, k->max, value);
        else
            *int_of(l->c, k) = (int)v;
        return;
    }
    if (k->kind == CHOICE_KEY && !is_word(k->words, value))
        mistake(l, where, "%s must be one of %s, not \"%.60s\"", k->name, k->words, value);
    else if (k->kind == SECRET_KEY && value[0] != '\0' && strlen(value) < 8)
        mistake(l, where, "%s is too short to be safe: use at least 8 characters", k->name);
    else
        set_text(l->c, k, value);
}

/* Edit distance, for "did you mean". */
static size_t distance(const char *a, const char *b)
{
    size_t row[64], n = strlen(b);
    if (n >= PL_COUNT_OF(row))
        return SIZE_MAX;
    for (size_t j = 0; j <= n; j++)
        row[j] = j;
    for (size_t i = 1; *a != '\0'; a++, i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= n; j++) {
            size_t best = diagonal + (*a != b[j - 1]);
            diagonal = row[j];
            best = best < row[j] + 1 ? best : row[j] + 1;
            row[j] = best < row[j - 1] + 1 ? best : row[j - 1] + 1;
        }
    }
    return row[n];
}

static const struct key *find(const char *name)
{
    for (size_t i = 0; i < N_KEYS; i++)
        if (keys[i].name != NULL && strcmp(keys[i].name, name) == 0)
            return &keys[i];
    return NULL;
}

static void variable_name(const char *key, char *out, size_t n)
{
    snprintf(out, n, "PARLEY_%s", key);
    for (char *p = out; *p != '\0'; p++)
        *p = *p == '-' ? '_' : *p >= 'a' && *p <= 'z' ? (char)(*p - 32) : *p;
}

/* The setting whose name, or whose variable's, is that one or near to it; NULL = none is. */
static const struct key *nearest(const char *name, bool variable)
{
    const struct key *near = NULL;
    for (size_t i = 0, least = 4; i < N_KEYS; i++) {
        char spelled[80];
        if (keys[i].name == NULL)
            continue;
        if (variable)
            variable_name(keys[i].name, spelled, sizeof spelled);
        const size_t d = distance(name, variable ? spelled : keys[i].name);
        if (d < least) {
            least = d;
            near = &keys[i];
        }
    }
    return near;
}

static const struct key *find_or_complain(struct loader *l, const char *name, const char *where)
{
    const struct key *k = find(name), *near = k == NULL ? nearest(name, false) : NULL;
    if (k == NULL && near != NULL)
        mistake(l, where, "there is no setting \"%.60s\"; did you mean \"%s\"?", name, near->name);
    else if (k == NULL)
        mistake(l, where, "there is no setting \"%.60s\"; --help lists them all", name);
    return k;
}

/* ---- sources ------------------------------------------------------------------------------------------------------- */

static void begin_source(struct loader *l, enum source source)
{
    l->source = source;
    memset(l->started, 0, sizeof l->started);
}

static char *trim(char *s)
{
    s += strspn(s, BLANKS);
    size_t n = strlen(s);
    while (n > 0 && strchr(BLANKS, s[n - 1]) != NULL)
        s[--n] = '\0';
    return s;
}

static void read_line(struct loader *l, char *line, const char *where, bool *seen)
{
    char *text = trim(line);
    if (text[0] == '#' || text[0] == '\0')
        return;
    char *equals = strchr(text, '=');
    if (equals == NULL) {
        mistake(l, where, "expected \"key = value\"");
        return;
    }
    *equals = '\0';
    const struct key *k = find_or_complain(l, trim(text), where);
    if (k == NULL)
        return;
    if (seen[k - keys] && k->kind != LIST_KEY)
        mistake(l, where, "%s is set a second time; remove one of the lines", k->name);
    else
        set(l, k, trim(equals + 1), where);
    seen[k - keys] = true;
}

static void read_file(struct loader *l, const char *path)
{
    FILE *f = fopen(path, "re");
    char *line = NULL, where[320];
    size_t cap = 0;
    bool seen[N_KEYS] = {false};
    if (f == NULL) {
        mistake(l, "--config", "cannot read %s: %s", path, strerror(errno));
        return;
    }
    ssize_t n;
    for (unsigned number = 1; (n = getline(&line, &cap, f)) >= 0; number++) {
        snprintf(where, sizeof where, "%.280s:%u", path, number);
        if (strlen(line) != (size_t)n || n > 65536)
            mistake(l, where, "the line has a NUL byte or is too long");
        else
            read_line(l, line, where, seen);
    }
    if (ferror(f))
        mistake(l, "--config", "cannot read %s: %s", path, strerror(errno));
    free(line);
    fclose(f);
}

static void read_environment(struct loader *l)
{
    for (size_t i = 0; i < N_KEYS; i++) {
        char variable[80];
        if (keys[i].name == NULL)
            continue;
        variable_name(keys[i].name, variable, sizeof variable);
        const char *value = getenv(variable);
        if (value != NULL)
            set(l, &keys[i], value, variable);
    }
}

struct verbs {
    const char *config;
    bool help, version, dump, check;
};

/* Takes argv[*i] (and its value). verbs != NULL: only notes the verbs and the file; else only sets keys. */
static void read_flag(struct loader *l, int argc, char **argv, int *i, struct verbs *v)
{
    const char *arg = argv[*i];
    if (strcmp(arg, "-h") == 0)
        arg = "--help";
    if (strncmp(arg, "--", 2) != 0) {
        if (v != NULL)
            mistake(l, arg, "arguments start with \"--\"; a model is named with --model FILE");
        return;
    }
    char name[64];
    const char *equals = strchr(arg, '=');
    snprintf(name, sizeof name, "%.*s", equals != NULL ? (int)(equals - arg - 2) : (int)strlen(arg + 2), arg + 2);
    struct verbs ignored, *w = v != NULL ? v : &ignored;
    bool *verb = strcmp(name, "help") == 0           ? &w->help
                 : strcmp(name, "version") == 0      ? &w->version
                 : strcmp(name, "dump-config") == 0  ? &w->dump
                 : strcmp(name, "check-config") == 0 ? &w->check
                                                     : NULL;
    if (verb != NULL) {
        *verb = true;
        return;
    }
    char where[72];
    snprintf(where, sizeof where, "--%s", name);
    bool is_config = strcmp(name, "config") == 0;
    const struct key *k = is_config ? NULL : v != NULL ? find_or_complain(l, name, where) : find(name);
    if (k == NULL && !is_config)
        return;
    const char *value = equals != NULL ? equals + 1 : *i + 1 < argc ? argv[++*i] : NULL;
    if (value == NULL) {
        if (v != NULL)
            mistake(l, where, "needs a value");
    } else if (is_config) {
        w->config = value;
    } else if (v == NULL) {
        set(l, k, value, where);
    }
}

/* ---- texts --------------------------------------------------------------------------------------------------------- */

/* Words of text, wrapped at 80 columns, each line behind prefix. */
static void add_wrapped(struct pl_buf *b, const char *prefix, const char *text)
{
    size_t column = 80;
    while (*text != '\0') {
        size_t n = strcspn(text, " ");
        if (column + n + 1 > 79) {
            pl_buf_addf(b, "%s%s", b->len > 0 && b->data[b->len - 1] != '\n' ? "\n" : "", prefix);
            column = strlen(prefix);
        } else {
            pl_buf_addc(b, ' ');
            column++;
        }
        pl_buf_add(b, text, n);
        column += n;
        text += n + strspn(text + n, " ");
    }
    pl_buf_addc(b, '\n');
}

static void add_range(struct pl_buf *b, const struct key *k)
{
    if (k->kind == INT_KEY)
        pl_buf_addf(b, "%d to %d, default %d", k->min, k->max, k->def_int);
    else if (k->kind == CHOICE_KEY)
        pl_buf_addf(b, "%s, default %s", k->words, k->def);
    else if (k->kind == LIST_KEY)
        pl_buf_adds(b, "none by default");
    else
        pl_buf_addf(b, "%s", k->def[0] != '\0' ? "default " : "not set by default");
    if (k->kind == STR_KEY)
        pl_buf_adds(b, k->def);
}

static char *help_text(void)
{
    struct pl_buf b;
    pl_buf_init(&b, 0);
    pl_buf_adds(&b, "NAME\n    parleyd - serves a language model over OpenAI's HTTP API\n\n"
                    "SYNOPSIS\n    parleyd --model FILE [--KEY VALUE | --KEY=VALUE]...\n    parleyd --config FILE\n\n"
                    "DESCRIPTION\n");
    add_wrapped(&b, "    ",
                "parleyd loads one GGUF model and answers chat completions, completions and tokenizer requests until it "
                "gets SIGTERM or SIGINT; running requests are finished then. Each setting below is a flag (--port 8001), "
                "a line of the configuration file (port = 8001) and an environment variable (PARLEY_PORT=8001); a flag "
                "beats the environment, that beats the file, and that the default.");
    pl_buf_adds(&b, "\nVERBS\n    --config FILE    read settings from FILE; or PARLEY_CONFIG=FILE\n"
                    "    --check-config   say whether the settings are valid and the files they name\n"
                    "                     are there, and exit\n"
                    "    --dump-config    print them as a configuration file, and exit\n    --version, --help\n");
    for (size_t i = 0; i < N_KEYS; i++) {
        if (keys[i].section != NULL) {
            pl_buf_addf(&b, "\n%s\n", keys[i].section);
            continue;
        }
        static const char *const values[] = {[STR_KEY] = "TEXT", [SECRET_KEY] = "KEY", [CHOICE_KEY] = "WORD", [INT_KEY] = "N"};
        pl_buf_addf(&b, "    --%s %s   (", keys[i].name, values[keys[i].kind] != NULL ? values[keys[i].kind] : keys[i].words);
        add_range(&b, &keys[i]);
        pl_buf_adds(&b, ")\n");
        add_wrapped(&b, "        ", keys[i].help);
    }
    pl_buf_adds(&b, "\nSIGNALS\n    SIGTERM, SIGINT, SIGHUP   finish running requests within drain-timeout,\n"
                    "                              then exit 0; a second one ends them at once\n\n"
                    "EXIT STATUS\n    0  stopped by a signal     1  failed at run time     2  wrong settings\n"
                    "    3  what computes was lost (a rank, a GPU, a model's file): to be started again\n\n"
                    "EXAMPLES\n    parleyd --model SmolLM2-135M-Instruct.Q4_1.gguf --port 8000\n"
                    "    PARLEY_API_KEY=... parleyd --config /etc/parley/parley.conf\n");
    return pl_buf_take(&b);
}

static void dump_list(struct pl_buf *b, const struct key *k, const struct pl_config_list *list)
{
    if (list->n == 0)
        pl_buf_addf(b, "#%s = %s\n", k->name, k->words);
    for (size_t i = 0; i < list->n; i++)
        pl_buf_addf(b, "%s = %s\n", k->name, list->values[i]);
}

static char *dump_text(struct pl_config *c)
{
    struct pl_buf b;
    pl_buf_init(&b, 0);
    pl_buf_adds(&b, "# Settings of parleyd. A line that is commented out shows the default.\n");
    for (size_t i = 0; i < N_KEYS; i++) {
        const struct key *k = &keys[i];
        if (k->section != NULL) {
            pl_buf_addf(&b, "\n# ---- %s ----\n", k->section);
            continue;
        }
        pl_buf_addc(&b, '\n');
        add_wrapped(&b, "# ", k->help);
        pl_buf_adds(&b, "# (");
        add_range(&b, k);
        pl_buf_adds(&b, ")\n");
        if (k->kind == INT_KEY)
            pl_buf_addf(&b, "%s%s = %d\n", *int_of(c, k) == k->def_int ? "#" : "", k->name, *int_of(c, k));
        else if (k->kind == LIST_KEY)
            dump_list(&b, k, list_of(c, k));
        else if (k->kind == SECRET_KEY)
            pl_buf_addf(&b, "#%s =%s\n", k->name, (*text_of(c, k))[0] != '\0' ? " (set, not shown)" : "");
        else
            pl_buf_addf(&b, "%s%s = %s\n", strcmp(*text_of(c, k), k->def) == 0 ? "#" : "", k->name, *text_of(c, k));
    }
    return pl_buf_take(&b);
}

/* ---- all of it ----------------------------------------------------------------------------------------------------- */

static void check_together(struct loader *l)
{
    const struct pl_config *c = l->c;
    if ((c->tls_cert[0] == '\0') != (c->tls_key[0] == '\0'))
        mistake(l, "tls-cert", "tls-cert and tls-key are set together or not at all");
    if (c->batch_tokens < c->max_sequences)
        mistake(l, "batch-tokens", "batch-tokens (%d) must be at least max-sequences (%d): every running sequence takes a token of each iteration",
                c->batch_tokens, c->max_sequences);
    if (c->api_key[0] != '\0' && strcmp(c->api_key, c->admin_key) == 0)
        mistake(l, "admin-key", "admin-key must differ from api-key");
}

/* what: FILE, FOLDER, or a list's form, where either will do. */
static void check_path(struct loader *l, const char *name, const char *path, const char *what)
{
    const bool file = strcmp(what, "FILE") == 0, folder = strcmp(what, "FOLDER") == 0;
    struct stat st;
    if (path[0] == '\0')
        return;
    if (stat(path, &st) != 0 || access(path, R_OK) != 0)
        mistake(l, name, "cannot read %.280s: %s", path, strerror(errno));
    else if ((file && !S_ISREG(st.st_mode)) || (folder && !S_ISDIR(st.st_mode)))
        mistake(l, name, "%.280s is not a %s", path, file ? "regular file" : "folder");
}

/* What --check-config sees beyond the settings themselves: the daemon would tell one after the other, some only when they are needed. */
static void check_files(struct loader *l)
{
    if (l->c->model[0] == '\0' && l->c->model_dir[0] == '\0')
        mistake(l, "model", "is not set: name a GGUF file");
    for (size_t i = 0; i < N_KEYS; i++) {
        const struct key *k = &keys[i];
        if (k->name != NULL && k->kind == PATH_KEY)
            check_path(l, k->name, *text_of(l->c, k), k->words);
        for (size_t n = 0; k->name != NULL && k->kind == LIST_KEY && n < list_of(l->c, k)->n; n++)
            check_path(l, k->name, strchr(list_of(l->c, k)->values[n], '=') + 1, k->words);
    }
}

pl_status pl_config_load(struct pl_config *c, int argc, char **argv, char **text, struct pl_err *err)
{
    struct loader l = {.c = c};
    struct verbs v = {.config = getenv("PARLEY_CONFIG")};
    *text = NULL;
    pl_buf_init(&l.mistakes, 0);
    for (size_t i = 0; i < N_KEYS; i++) {
        if (is_text(&keys[i]))
            *text_of(c, &keys[i]) = pl_xstrdup(keys[i].def);
        else if (keys[i].name != NULL && keys[i].kind == LIST_KEY)
            *list_of(c, &keys[i]) = (struct pl_config_list){0};
        else if (keys[i].name != NULL)
            *int_of(c, &keys[i]) = keys[i].def_int;
    }
    for (int i = 1; i < argc; i++)
        read_flag(&l, argc, argv, &i, &v);
    if (v.help || v.version) {
        pl_buf_fini(&l.mistakes);
        *text = v.help ? help_text() : pl_xstrdup("parleyd " PL_VERSION "\n");
        return PL_OK;
    }
    if (v.config != NULL)
        read_file(&l, v.config);
    begin_source(&l, FROM_ENVIRONMENT);
    read_environment(&l);
    begin_source(&l, FROM_FLAGS);
    for (int i = 1; i < argc; i++)
        read_flag(&l, argc, argv, &i, NULL);
    if (l.mistakes.len == 0)
        check_together(&l);
    if (l.mistakes.len == 0 && v.check)
        check_files(&l);
    if (l.mistakes.len > 0) {
        *text = pl_buf_take(&l.mistakes);
        return pl_fail_param(err, PL_EINVAL, "config", "%s", *text);
    }
    if (v.dump || v.check)
        *text = v.dump ? dump_text(c) : pl_xstrdup("the configuration is valid\n");
    return PL_OK;
}

void pl_config_fini(struct pl_config *c)
{
    for (size_t i = 0; i < N_KEYS; i++)
        if (keys[i].name != NULL && keys[i].kind == LIST_KEY)
            clear_list(list_of(c, &keys[i]));
        else if (is_text(&keys[i])) {
            if (*text_of(c, &keys[i]) != NULL && keys[i].kind == SECRET_KEY)
                explicit_bzero((void *)(uintptr_t)*text_of(c, &keys[i]), strlen(*text_of(c, &keys[i])));
            free((void *)(uintptr_t)*text_of(c, &keys[i]));
            *text_of(c, &keys[i]) = NULL;
        }
}

/* A variable that is none of ours is most likely a slip of the pen: of an api-key's name, say. Others may use the prefix (Kubernetes), so it is no
 * mistake. */
static void warn_of_variables(void)
{
    for (char **e = environ; *e != NULL; e++) {
        const size_t n = strcspn(*e, "=");
        char name[80], variable[80] = "";
        if (strncmp(*e, "PARLEY_", 7) != 0 || (n == 13 && strncmp(*e, "PARLEY_CONFIG", 13) == 0))
            continue;
        snprintf(name, sizeof name, "%.*s", (int)n, *e);
        const struct key *near = nearest(name, true);
        if (near != NULL)
            variable_name(near->name, variable, sizeof variable);
        if (near == NULL)
            pl_log_warn("the environment's %s is no setting", name);
        else if (strcmp(name, variable) != 0)
            pl_log_warn("the environment's %s is no setting; did you mean %s?", name, variable);
    }
}

void pl_config_log(const struct pl_config *config)
{
    struct pl_config *c = (struct pl_config *)(uintptr_t)config; /* only read */
    warn_of_variables();
    for (size_t i = 0; i < N_KEYS; i++) {
        const struct key *k = &keys[i];
        if (k->name == NULL)
            continue;
        if (k->kind == INT_KEY && *int_of(c, k) != k->def_int)
            pl_log_info("%s = %d", k->name, *int_of(c, k));
        else if (k->kind == LIST_KEY)
            for (size_t n = 0; n < list_of(c, k)->n; n++)
                pl_log_info("%s = %s", k->name, list_of(c, k)->values[n]);
        else if (k->kind == SECRET_KEY && (*text_of(c, k))[0] != '\0')
            pl_log_info("%s = (set)", k->name);
        else if (is_text(k) && k->kind != SECRET_KEY && strcmp(*text_of(c, k), k->def) != 0)
            pl_log_info("%s = %s", k->name, *text_of(c, k));
    }
}

bool pl_config_launched(const struct pl_config *c)
{
    static const char *const sizes[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"};
    bool several = false;
    for (size_t i = 0; i < PL_COUNT_OF(sizes); i++) {
        const char *size = getenv(sizes[i]);
        several |= size != NULL && atoi(size) > 1;
    }
    return strcmp(c->ranks, "mpi") == 0 || (strcmp(c->ranks, "auto") == 0 && several);
}

char *pl_config_data_dir(const struct pl_config *c)
{
    static const char system_wide[] = "/var/lib/parley";
    const char *state = getenv("STATE_DIRECTORY"), *xdg = getenv("XDG_DATA_HOME"), *home = getenv("HOME");
    char *path = NULL;
    int rc = 0;
    if (c->data_dir[0] != '\0')
        return pl_xstrdup(c->data_dir);
    if (state != NULL && state[0] == '/')
        rc = asprintf(&path, "%.*s", (int)strcspn(state, ":"), state);
    else if (access(system_wide, W_OK | X_OK) == 0)
        return pl_xstrdup(system_wide);
    else if (xdg != NULL && xdg[0] == '/')
        rc = asprintf(&path, "%s/parley", xdg);
    else if (home != NULL && home[0] == '/')
        rc = asprintf(&path, "%s/.local/share/parley", home);
    return rc < 0 ? NULL : path;
}
