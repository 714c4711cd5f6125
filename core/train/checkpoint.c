/* checkpoint: a job's state on disk.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/train/checkpoint.h"

#include <dirent.h>
#include <errno.h>
#include <jansson.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/mem.h"
#include "core/base/newfile.h"
#include "core/train/save.h"

static const char magic[8] = "PLTRAIN1";

enum { AT_ONCE = 1 << 18 /* values that go between the device and the file */ };

/* state.bin: this, then values, first and second moments, then the references. */
struct header {
    char magic[8];
    uint32_t step, best_step, n_bad, stopped;
    double best_loss;
    uint64_t trained_tokens, n_trained, n_reference;
    char fingerprint[72];
};

struct path {
    char s[PATH_MAX];
};

__attribute__((format(printf, 1, 2))) static struct path path_of(const char *fmt, ...)
{
    struct path p;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(p.s, sizeof p.s, fmt, ap);
    va_end(ap);
    return p;
}

static struct path step_path(const char *folder, uint32_t step)
{
    return path_of("%s/checkpoints/step-%u", folder, step);
}

/* The names in a folder, in order. */
static char **names_in(const char *path, size_t *n)
{
    struct dirent **list;
    const int found = scandir(path, &list, NULL, alphasort);
    char **names = pl_xcalloc((size_t)(found > 0 ? found : 0) + 1, sizeof *names);
    *n = 0;
    for (int i = 0; i < found; i++) {
        if (strcmp(list[i]->d_name, ".") != 0 && strcmp(list[i]->d_name, "..") != 0)
            names[(*n)++] = pl_xstrdup(list[i]->d_name);
        free(list[i]);
    }
    if (found >= 0)
        free(list);
    return names;
}

static void free_names(char **names, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(names[i]);
    free(names);
}

void pl_ckpt_remove(const char *path)
{
    size_t n;
    char **names = names_in(path, &n);
    for (size_t i = 0; i < n; i++)
        unlink(path_of("%s/%s", path, names[i]).s);
    free_names(names, n);
    rmdir(path);
}

pl_status pl_ckpt_publish(const char *from, const char *to, const char *parent, struct pl_err *err)
{
    const pl_status rc = pl_sync_folder(from, err);
    if (rc != PL_OK)
        return rc;
    if (rename(from, to) != 0)
        return pl_fail(err, pl_status_of_errno(errno), "cannot rename %s to %s: %s", from, to, strerror(errno));
    return pl_sync_folder(parent, err);
}

static pl_status hash_file(const char *path, char hex[PL_SHA256_HEX], struct pl_err *err)
{
    struct pl_sha256 h;
    static _Thread_local char block[1 << 16];
    FILE *f = fopen(path, "re");
    if (f == NULL)
        return pl_fail(err, PL_EIO, "cannot read %s: %s", path, strerror(errno));
    pl_sha256_init(&h);
    for (size_t n; (n = fread(block, 1, sizeof block, f)) > 0;)
        pl_sha256_add(&h, block, n);
    const bool bad = ferror(f) != 0;
    fclose(f);
    pl_sha256_hex(&h, hex);
    return bad ? pl_fail(err, PL_EIO, "cannot read %s", path) : PL_OK;
}

static pl_status write_manifest(const char *dir, uint32_t step, struct pl_err *err)
{
    size_t n;
    char **names = names_in(dir, &n), hex[PL_SHA256_HEX];
    json_t *root = json_object(), *files = json_object();
    pl_status rc = PL_OK;
    for (size_t i = 0; i < n && rc == PL_OK; i++) {
        rc = hash_file(path_of("%s/%s", dir, names[i]).s, hex, err);
        json_object_set_new(files, names[i], json_string(hex));
    }
    free_names(names, n);
    json_object_set_new(root, "step", json_integer(step));
    json_object_set_new(root, "files", files);
    char *text = json_dumps(root, JSON_INDENT(1));
    json_decref(root);
    if (rc == PL_OK)
        rc = text == NULL ? pl_fail(err, PL_ENOMEM, "out of memory") : pl_newfile_write(path_of("%s/manifest.json", dir).s, text, strlen(text), err);
    free(text);
    return rc;
}

static pl_status write_values(struct pl_newfile *f, uint64_t at, const struct pl_net *n, const struct pl_dbuf *buf, struct pl_err *err)
{
    float *block = malloc(AT_ONCE * sizeof *block);
    pl_status rc = block != NULL ? PL_OK : pl_fail(err, PL_ENOMEM, "no memory to write a checkpoint");
    for (size_t i = 0; rc == PL_OK && i < n->n_trained; i += AT_ONCE) {
        const size_t k = n->n_trained - i < AT_ONCE ? n->n_trained - i : AT_ONCE;
        if ((rc = n->dev->ops->get(n->dev, buf, i, block, k)) != PL_OK)
            rc = pl_fail(err, rc, "reading what was trained: %s", pl_status_text(rc));
        else
            rc = pl_newfile_put(f, at + i * sizeof *block, block, k * sizeof *block, err);
    }
    free(block);
    return rc;
}

static pl_status write_state(const char *path, const struct pl_net *n, const struct pl_ckpt_state *s, struct pl_err *err)
{
    struct header h = {.step = s->step, .best_step = s->best_step, .n_bad = s->n_bad, .stopped = s->stopped, .best_loss = s->best_loss,
                       .trained_tokens = s->trained_tokens, .n_trained = n->n_trained, .n_reference = s->n_reference};
    memcpy(h.magic, magic, sizeof magic);
    memcpy(h.fingerprint, s->fingerprint, sizeof s->fingerprint);
    struct pl_newfile f;
    pl_status rc = pl_newfile_open(&f, path, err);
    if (rc != PL_OK)
        return rc;
    struct pl_dbuf *const bufs[] = {n->w, n->m, n->v};
    uint64_t at = sizeof h;
    rc = pl_newfile_put(&f, 0, &h, sizeof h, err);
    for (size_t i = 0; rc == PL_OK && i < PL_COUNT_OF(bufs); i++, at += n->n_trained * sizeof(float))
        rc = write_values(&f, at, n, bufs[i], err);
    if (rc == PL_OK && s->n_reference > 0)
        rc = pl_newfile_put(&f, at, s->reference, s->n_reference * sizeof *s->reference, err);
    if (rc == PL_OK)
        return pl_newfile_commit(&f, err);
    pl_newfile_abandon(&f);
    return rc;
}

pl_status pl_ckpt_write(const char *folder, const struct pl_net *n, const struct pl_gguf *g, const char *base, const struct pl_ckpt_state *s,
                        struct pl_err *err)
{
    const struct path parent = path_of("%s/checkpoints", folder), to = step_path(folder, s->step), from = path_of("%s/.writing", parent.s);
    if (mkdir(parent.s, 0750) != 0 && errno != EEXIST)
        return pl_fail(err, pl_status_of_errno(errno), "cannot make %s: %s", parent.s, strerror(errno));
    pl_ckpt_remove(from.s);
    if (mkdir(from.s, 0750) != 0)
        return pl_fail(err, pl_status_of_errno(errno), "cannot make %s: %s", from.s, strerror(errno));
    pl_status rc = pl_save_model(from.s, n, g, base, err);
    if (rc == PL_OK)
        rc = write_state(path_of("%s/state.bin", from.s).s, n, s, err);
    if (rc == PL_OK)
        rc = write_manifest(from.s, s->step, err);
    if (rc == PL_OK)
        rc = pl_ckpt_publish(from.s, to.s, parent.s, err);
    if (rc != PL_OK)
        pl_ckpt_remove(from.s);
    return rc;
}

/* Every file of the manifest is there with its hash, state.bin among them. */
static bool is_whole(const char *dir)
{
    json_t *root = json_load_file(path_of("%s/manifest.json", dir).s, JSON_REJECT_DUPLICATES, NULL), *files = json_object_get(root, "files"), *value;
    bool ok = json_is_string(json_object_get(files, "state.bin"));
    const char *name;
    char hex[PL_SHA256_HEX];
    json_object_foreach(files, name, value)
        ok = ok && strchr(name, '/') == NULL && json_is_string(value) && hash_file(path_of("%s/%s", dir, name).s, hex, NULL) == PL_OK &&
             strcmp(hex, json_string_value(value)) == 0;
    json_decref(root);
    return ok;
}

static pl_status read_into(FILE *f, struct pl_net *n, struct pl_dbuf *buf)
{
    float *block = malloc(AT_ONCE * sizeof *block);
    pl_status rc = block != NULL ? PL_OK : PL_ENOMEM;
    for (size_t at = 0; rc == PL_OK && at < n->n_trained; at += AT_ONCE) {
        const size_t k = n->n_trained - at < AT_ONCE ? n->n_trained - at : AT_ONCE;
        rc = fread(block, sizeof *block, k, f) == k ? n->dev->ops->put(n->dev, buf, at, block, k) : PL_EFORMAT;
    }
    free(block);
    return rc;
}

/* s NULL: the values alone. */
static pl_status read_state(const char *dir, struct pl_net *n, struct pl_ckpt_state *s, struct pl_err *err)
{
    struct header h;
    FILE *f = fopen(path_of("%s/state.bin", dir).s, "re");
    if (f == NULL)
        return pl_fail(err, PL_EIO, "cannot read %s/state.bin: %s", dir, strerror(errno));
    pl_status rc = fread(&h, sizeof h, 1, f) == 1 && memcmp(h.magic, magic, sizeof magic) == 0 && h.n_trained == n->n_trained ? PL_OK : PL_EFORMAT;
    if (rc == PL_OK && s != NULL && (strncmp(h.fingerprint, s->fingerprint, sizeof s->fingerprint) != 0 || h.n_reference != s->n_reference))
        rc = PL_EFORMAT;
    if (rc == PL_OK)
        rc = read_into(f, n, n->w);
    if (rc == PL_OK && s != NULL && (rc = read_into(f, n, n->m)) == PL_OK && (rc = read_into(f, n, n->v)) == PL_OK) {
        if (fread(s->reference, sizeof *s->reference, h.n_reference, f) != h.n_reference)
            rc = PL_EFORMAT;
        s->step = h.step;
        s->best_step = h.best_step;
        s->best_loss = h.best_loss;
        s->n_bad = h.n_bad;
        s->stopped = h.stopped;
        s->trained_tokens = h.trained_tokens;
    }
    fclose(f);
    if (rc != PL_OK && rc != PL_EFORMAT) /* the device's, or memory: the checkpoint is as it was */
        return pl_fail(err, rc, "loading %s: %s", dir, pl_status_text(rc));
    return rc == PL_OK ? rc : pl_fail(err, rc, "%s is not a checkpoint of this job (were its settings, data or base changed?); remove it to start anew", dir);
}

/* Steps that have a checkpoint, newest first. */
static uint32_t *steps_in(const char *folder, size_t *n)
{
    size_t n_names;
    char **names = names_in(path_of("%s/checkpoints", folder).s, &n_names), *end;
    uint32_t *steps = pl_xcalloc(n_names + 1, sizeof *steps);
    *n = 0;
    for (size_t i = 0; i < n_names; i++) {
        const unsigned long step = strncmp(names[i], "step-", 5) == 0 ? strtoul(names[i] + 5, &end, 10) : 0;
        if (step == 0 || *end != '\0')
            continue;
        size_t at = (*n)++;
        for (; at > 0 && steps[at - 1] < step; at--)
            steps[at] = steps[at - 1];
        steps[at] = (uint32_t)step;
    }
    free_names(names, n_names);
    return steps;
}

pl_status pl_ckpt_resume(const char *folder, struct pl_net *n, struct pl_ckpt_state *s, uint32_t *n_bad, struct pl_err *err)
{
    size_t n_steps;
    uint32_t *steps = steps_in(folder, &n_steps);
    pl_status rc = PL_OK;
    *n_bad = 0;
    s->step = 0;
    pl_ckpt_remove(path_of("%s/checkpoints/.writing", folder).s);
    for (size_t i = 0; i < n_steps; i++) {
        const struct path dir = step_path(folder, steps[i]);
        if (is_whole(dir.s)) {
            rc = read_state(dir.s, n, s, err);
            break;
        }
        ++*n_bad;
        pl_ckpt_remove(dir.s);
    }
    free(steps);
    return rc;
}

pl_status pl_ckpt_values(const char *folder, uint32_t step, struct pl_net *n, struct pl_err *err)
{
    const struct path dir = step_path(folder, step);
    return is_whole(dir.s) ? read_state(dir.s, n, NULL, err) : pl_fail(err, PL_EFORMAT, "the best checkpoint, %s, is damaged", dir.s);
}

void pl_ckpt_prune(const char *folder, uint32_t keep, uint32_t best_step)
{
    size_t n;
    uint32_t *steps = steps_in(folder, &n);
    for (size_t i = keep; i < n; i++)
        if (steps[i] != best_step)
            pl_ckpt_remove(step_path(folder, steps[i]).s);
    free(steps);
}

void pl_ckpt_state_fini(struct pl_ckpt_state *s)
{
    free(s->reference);
    s->reference = NULL;
}
