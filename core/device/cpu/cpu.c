/* cpu: opens the CPU device, its memory, and the operations that work row by row.
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/device/cpu/cpu.h"
#include "core/device/cpu/train.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* ---- memory -------------------------------------------------------------------------------------------------------- */

static size_t rounded(size_t n)
{
    size_t unit = n >= PL_CPU_HUGE_PAGE ? PL_CPU_HUGE_PAGE : 64;
    return (n + unit - 1) / unit * unit;
}

void *pl_cpu_alloc(size_t n)
{
    if (n == 0 || n > SIZE_MAX / 4)
        return NULL;
    size_t size = rounded(n);
    if (size < PL_CPU_HUGE_PAGE) {
        void *p = aligned_alloc(64, size);
        return p != NULL ? memset(p, 0, size) : NULL;
    }
    /* a larger mapping whose ends are cut off, so that the rest is aligned */
    uint8_t *p = mmap(NULL, size + PL_CPU_HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        return NULL;
    size_t head = (PL_CPU_HUGE_PAGE - (uintptr_t)p % PL_CPU_HUGE_PAGE) % PL_CPU_HUGE_PAGE;
    if (head > 0)
        munmap(p, head);
    if (head < PL_CPU_HUGE_PAGE)
        munmap(p + head + size, PL_CPU_HUGE_PAGE - head);
    madvise(p + head, size, MADV_HUGEPAGE);
    return p + head;
}

void pl_cpu_release(void *p, size_t n)
{
    if (p == NULL)
        return;
    if (rounded(n) < PL_CPU_HUGE_PAGE)
        free(p);
    else
        munmap(p, rounded(n));
}

pl_status pl_cpu_grow(float **p, size_t *cap, size_t n)
{
    if (n <= *cap)
        return PL_OK;
    float *q = pl_cpu_alloc(n * sizeof *q);
    if (q == NULL)
        return PL_ENOMEM;
    pl_cpu_release(*p, *cap * sizeof *q);
    *p = q;
    *cap = n;
    return PL_OK;
}

static pl_status buf_new(struct pl_device *dev, size_t n_floats, struct pl_dbuf **out)
{
    (void)dev;
    struct pl_dbuf *b = calloc(1, sizeof *b);
    if (b == NULL)
        return PL_ENOMEM;
    b->n = n_floats ? n_floats : 1;
    b->data = b->n <= SIZE_MAX / 8 ? pl_cpu_alloc(b->n * sizeof(float)) : NULL;
    if (b->data == NULL) {
        free(b);
        return PL_ENOMEM;
    }
    *out = b;
    return PL_OK;
}

static void buf_free(struct pl_device *dev, struct pl_dbuf *buf)
{
    (void)dev;
    if (buf == NULL)
        return;
    pl_cpu_act_free(&buf->act);
    pl_cpu_release(buf->data, buf->n * sizeof(float));
    free(buf);
}

static pl_status put(struct pl_device *dev, struct pl_dbuf *buf, size_t offset, const float *src, size_t n)
{
    (void)dev;
    if (offset > buf->n || n > buf->n - offset)
        return PL_EINVAL;
    memcpy(buf->data + offset, src, n * sizeof *src);
    buf->n_quantized = 0;
    return PL_OK;
}

static pl_status get(struct pl_device *dev, const struct pl_dbuf *buf, size_t offset, float *dst, size_t n)
{
    (void)dev;
    if (offset > buf->n || n > buf->n - offset)
        return PL_EINVAL;
    memcpy(dst, buf->data + offset, n * sizeof *dst);
    return PL_OK;
}

static pl_status put_rows(struct pl_device *dev, pl_view to, const float *src)
{
    pl_status rc = PL_OK;
    for (uint32_t r = 0; r < to.rows && rc == PL_OK; r++)
        rc = put(dev, to.buf, to.offset + (size_t)r * to.stride, src + (size_t)r * to.cols, to.cols);
    return rc;
}

static pl_status get_rows(struct pl_device *dev, pl_view from, float *dst)
{
    pl_status rc = PL_OK;
    for (uint32_t r = 0; r < from.rows && rc == PL_OK; r++)
        rc = get(dev, from.buf, from.offset + (size_t)r * from.stride, dst + (size_t)r * from.cols, from.cols);
    return rc;
}

static const float *host(struct pl_device *dev, const struct pl_dbuf *buf)
{
    (void)dev;
    return buf->data;
}

/* ---- operations row by row ----------------------------------------------------------------------------------------- */

struct row_job {
    struct pl_cpu *cpu;
    pl_view out, x, gain, bias;
    pl_norm_kind norm;
    pl_act_kind act;
    float eps;
    uint32_t n_dims, rows_per_item;
    const uint32_t *idx;
    bool quant; /* rows of out too */
    bool only;  /* nobody reads out itself */
    void (*row)(const struct row_job *j, uint32_t row);
};

/* Where nobody reads them, an item's rows take turns at the first one's place, which stays in the cache. */
static float *out_row(const struct row_job *j, uint32_t r)
{
    return pl_cpu_row(j->out, j->only ? r - r % j->rows_per_item : r);
}

static void run_item(void *arg, size_t item, unsigned worker)
{
    (void)worker;
    const struct row_job *j = arg;
    uint32_t from = (uint32_t)item * j->rows_per_item, to = from + j->rows_per_item;
    for (uint32_t r = from; r < to && r < j->x.rows; r++) {
        j->row(j, r);
        if (j->quant)
            pl_cpu_quant(j->cpu, j->out, r, 0, j->out.cols, out_row(j, r));
    }
}

/* Few rows are done by the caller: waking the team costs more. */
static pl_status run_rows(struct row_job *j)
{
    j->rows_per_item = j->x.rows < 16 ? j->x.rows : 8;
    if (j->x.rows > 0)
        pl_pool_run(j->cpu->pool, run_item, j, (j->x.rows + j->rows_per_item - 1) / j->rows_per_item);
    return PL_OK;
}

static void norm_row(const struct row_job *j, uint32_t r)
{
    j->cpu->k->norm(j->norm, out_row(j, r), pl_cpu_row(j->x, r), pl_cpu_row(j->gain, 0),
                    j->bias.buf != NULL ? pl_cpu_row(j->bias, 0) : NULL, j->x.cols, j->eps);
}

static pl_status norm(struct pl_device *dev, pl_norm_kind kind, pl_view out, pl_view x, pl_view gain, pl_view bias, float eps)
{
    struct row_job j = {pl_cpu_of(dev), out, x, gain, bias, .norm = kind, .eps = eps, .row = norm_row};
    const bool only = pl_cpu_take_only(j.cpu);
    j.quant = pl_cpu_writes(out);
    j.only = only && j.quant && out.buf != x.buf;
    return run_rows(&j);
}

static void angle_row(const struct row_job *j, uint32_t r)
{
    uint32_t n = j->n_dims / 2;
    const float *freq = pl_cpu_row(j->gain, 0);
    for (uint32_t i = 0; i < n; i++) {
        float angle = (float)j->idx[r] * freq[i];
        sincosf(angle, &j->cpu->rope_sin[(size_t)r * n + i], &j->cpu->rope_cos[(size_t)r * n + i]);
    }
}

pl_status pl_cpu_angles(struct pl_cpu *cpu, const struct pl_rotation *r, const uint32_t *pos, uint32_t n_rows)
{
    struct row_job j = {.cpu = cpu, .x = {.rows = n_rows}, .gain = r->freq, .n_dims = r->n_dims, .idx = pos, .row = angle_row};
    const size_t n = (size_t)n_rows * (r->n_dims / 2);
    if (pl_cpu_grow(&cpu->rope_cos, &cpu->rope_cap, 2 * n) != PL_OK)
        return PL_ENOMEM;
    cpu->rope_sin = cpu->rope_cos + n;
    if (cpu->rope_freq == pl_cpu_row(r->freq, 0) && cpu->rope_pos == pos)
        return PL_OK;
    cpu->rope_freq = pl_cpu_row(r->freq, 0);
    cpu->rope_pos = pos;
    return run_rows(&j);
}

static void act_row(const struct row_job *j, uint32_t r)
{
    j->cpu->k->act(j->act, pl_cpu_row(j->x, r), j->x.cols);
}

static pl_status act(struct pl_device *dev, pl_act_kind kind, pl_view x)
{
    struct row_job j = {.cpu = pl_cpu_of(dev), .out = x, .x = x, .act = kind, .row = act_row};
    j.quant = pl_cpu_writes(x);
    return run_rows(&j);
}

static void only_for(struct pl_device *dev, const struct pl_weight *w)
{
    bool all = true;
    for (uint32_t i = 0; i < w->n_parts; i++)
        all &= w->parts[i].bits != 0;
    pl_cpu_of(dev)->only = all;
}

static pl_status gather(struct pl_device *dev, pl_view out, pl_view x, const uint32_t *rows)
{
    (void)dev;
    out.buf->n_quantized = 0;
    for (uint32_t r = 0; r < out.rows; r++)
        memcpy(pl_cpu_row(out, r), pl_cpu_row(x, rows[r]), out.cols * sizeof(float));
    return PL_OK;
}

static pl_status step_begin(struct pl_device *dev, const struct pl_batch *b)
{
    struct pl_cpu *cpu = pl_cpu_of(dev);
    cpu->batch = b;
    cpu->rope_freq = NULL;
    return PL_OK;
}

static pl_status step_end(struct pl_device *dev)
{
    pl_cpu_of(dev)->batch = NULL;
    return PL_OK;
}

/* ---- open ---------------------------------------------------------------------------------------------------------- */

static void close_device(struct pl_device *dev)
{
    struct pl_cpu *cpu = pl_cpu_of(dev);
    if (cpu == NULL)
        return;
    pl_cpu_act_free(&cpu->act);
    pl_cpu_release(cpu->rope_cos, cpu->rope_cap * sizeof(float));
    pl_cpu_release(cpu->attn_work, cpu->attn_cap * sizeof(float));
    pl_cpu_train_free(cpu->train);
    pl_cpu_release(cpu->lora_work, cpu->lora_cap * sizeof(float));
    pl_cpu_attn_free(cpu);
    free(cpu->soon);
    free(cpu);
}

static void attach(struct pl_device *dev)
{
    pl_pool_pin(pl_cpu_of(dev)->pool);
}

#define CPU_OPS(isa)                                                                                                  \
    {                                                                                                                 \
        .name = "cpu-" isa, .rounds_inputs = true, .close = close_device, .attach = attach,                           \
        .buf_new = buf_new, .buf_free = buf_free, .put = put, .get = get, .put_rows = put_rows,                       \
        .get_rows = get_rows, .host = host, .weight_new = pl_cpu_weight_new, .weight_free = pl_cpu_weight_free,       \
        .kv_bytes = pl_cpu_kv_bytes, .kv_new = pl_cpu_kv_new, .kv_free = pl_cpu_kv_free, .kv_copy = pl_cpu_kv_copy,   \
        .kv_prepare = pl_cpu_kv_prepare,                                                                              \
        .step_begin = step_begin, .step_end = step_end, .only_for = only_for, .embed = pl_cpu_embed, .norm = norm, .matmul = pl_cpu_matmul, \
        .matmul_glu = pl_cpu_matmul_glu,                                                                              \
        .kv_write = pl_cpu_kv_write, .attn = pl_cpu_attn_op, .act = act, .gather = gather,                            \
        .lora_new = pl_cpu_lora_new, .lora_free = pl_cpu_lora_free, .lora = pl_cpu_lora,                              \
        .train = &pl_cpu_train_ops                                                                                    \
    }

static bool has_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

static bool has_avxvnni(void)
{
    return has_avx2() && __builtin_cpu_supports("avxvnni");
}

static bool has_ref(void)
{
    return true;
}

/* Best first. */
static const struct {
    const char *name;
    bool (*supported)(void);
    const struct pl_cpu_kernels *kernels;
    struct pl_device_ops ops;
} isas[] = {
    {"avx512", has_avx512, &pl_cpu_kernels_avx512, CPU_OPS("avx512")},
    {"avxvnni", has_avxvnni, &pl_cpu_kernels_avxvnni, CPU_OPS("avxvnni")},
    {"avx2", has_avx2, &pl_cpu_kernels_avx2, CPU_OPS("avx2")},
    {"ref", has_ref, &pl_cpu_kernels_ref, CPU_OPS("ref")},
};

pl_status pl_cpu_open(struct pl_device **out, struct pl_pool *pool, const char *isa, struct pl_err *err)
{
    for (size_t i = 0; i < sizeof isas / sizeof isas[0]; i++) {
        if (isa != NULL && strcmp(isa, isas[i].name) != 0)
            continue;
        if (!isas[i].supported()) {
            if (isa != NULL)
                return pl_fail(err, PL_ENOTSUP, "this processor lacks what the %s kernels need", isa);
            continue;
        }
        struct pl_cpu *cpu = calloc(1, sizeof *cpu);
        const size_t soon = pl_pool_size(pool) * sizeof *cpu->soon;
        if (cpu == NULL || (cpu->soon = aligned_alloc(64, soon)) == NULL) {
            free(cpu);
            return pl_fail(err, PL_ENOMEM, "no memory for the CPU device");
        }
        memset(cpu->soon, 0, soon);
        cpu->base.ops = &isas[i].ops;
        cpu->pool = pool;
        cpu->k = isas[i].kernels;
        *out = &cpu->base;
        return PL_OK;
    }
    return pl_fail(err, PL_EINVAL, "no instruction set named \"%s\" (avx512, avxvnni, avx2 and ref are)", isa);
}
