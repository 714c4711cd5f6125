/* metrics: HTTP counters of the daemon, and the Prometheus text of everything.
 * SPDX-License-Identifier: Apache-2.0 */
#include "server/metrics.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core/base/hist.h"
#include "core/base/log.h"
#include "core/base/mem.h"
#include "core/base/version.h"
#include "core/sched/adapters.h"
#include "server/http.h"
#include "server/jobs/jobs.h"
#include "server/registry.h"
#include "server/route.h"
#include "server/server.h"


static const char *const methods[] = {"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "other"};
enum { N_METHODS = PL_COUNT_OF(methods), STATUS_FROM = 200, STATUS_TO = 600 };

static const double seconds_bounds[] = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300};

struct series { /* one path pattern; the last one is for paths that no route has */
    const char *pattern;
    uint64_t requests[N_METHODS][STATUS_TO - STATUS_FROM];
    struct pl_hist duration;
};

struct pl_metrics {
    pthread_mutex_t lock;
    double start_time;
    size_t n_series;
    struct series *series;
};

struct pl_metrics *pl_metrics_new(void)
{
    struct pl_metrics *m = pl_xcalloc(1, sizeof *m);
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    m->start_time = (double)now.tv_sec + (double)now.tv_nsec / 1e9;
    pthread_mutex_init(&m->lock, NULL);
    m->n_series = pl_route_patterns() + 1;
    m->series = pl_xcalloc(m->n_series, sizeof *m->series);
    for (size_t i = 0; i < m->n_series; i++) {
        m->series[i].pattern = i + 1 < m->n_series ? pl_route_pattern(i) : "other";
        m->series[i].duration.bounds = seconds_bounds;
        m->series[i].duration.n_bounds = PL_COUNT_OF(seconds_bounds);
    }
    return m;
}

void pl_metrics_free(struct pl_metrics *m)
{
    if (m == NULL)
        return;
    pthread_mutex_destroy(&m->lock);
    free(m->series);
    free(m);
}

static size_t method_index(const char *method)
{
    size_t i = 0;
    while (i + 1 < N_METHODS && (method == NULL || strcmp(methods[i], method) != 0))
        i++;
    return i;
}

const char *pl_metrics_method(const char *method)
{
    return methods[method_index(method)];
}

void pl_metrics_request(struct pl_metrics *m, const char *pattern, const char *method, int status, double seconds)
{
    size_t i = 0;
    while (i + 1 < m->n_series && (pattern == NULL || strcmp(m->series[i].pattern, pattern) != 0))
        i++;
    if (status < STATUS_FROM || status >= STATUS_TO)
        status = 500;
    pthread_mutex_lock(&m->lock);
    m->series[i].requests[method_index(method)][status - STATUS_FROM]++;
    pl_hist_add(&m->series[i].duration, seconds);
    pthread_mutex_unlock(&m->lock);
}

/* rendering */

static void head(struct pl_buf *b, const char *name, const char *type, const char *help)
{
    pl_buf_addf(b, "# HELP parley_%s %s\n# TYPE parley_%s %s\n", name, help, name, type);
}

/* A label's value: backslash, quote and line feed are escaped. */
static void label(struct pl_buf *b, const char *name, const char *value)
{
    pl_buf_addf(b, "%s=\"", name);
    for (; *value != '\0'; value++) {
        if (*value == '\\' || *value == '"')
            pl_buf_addc(b, '\\');
        if (*value == '\n')
            pl_buf_adds(b, "\\n");
        else
            pl_buf_addc(b, *value);
    }
    pl_buf_addc(b, '"');
}

/* name_label and value name the one label of the series. */
static void hist(struct pl_buf *b, const struct pl_hist *h, const char *name, const char *name_label, const char *value)
{
    uint64_t n = 0;
    for (size_t i = 0; i <= h->n_bounds; i++) {
        n += h->counts[i];
        pl_buf_addf(b, "parley_%s_bucket{", name);
        label(b, name_label, value);
        if (i < h->n_bounds)
            pl_buf_addf(b, ",le=\"%g\"} %llu\n", h->bounds[i], (unsigned long long)n);
        else
            pl_buf_addf(b, ",le=\"+Inf\"} %llu\n", (unsigned long long)n);
    }
    pl_buf_addf(b, "parley_%s_sum{", name);
    label(b, name_label, value);
    pl_buf_addf(b, "} %.17g\nparley_%s_count{", h->sum, name);
    label(b, name_label, value);
    pl_buf_addf(b, "} %llu\n", (unsigned long long)n);
}

/* What each model has counted: a whole one, then its adapters. */
struct models {
    struct model {
        char *name;
        bool adapter;
        uint32_t refs;
        struct pl_model_stats stats;
    } *v; /* [n] */
    size_t n;
    struct whole { /* what an engine counts of all its models */
        char *name;
        struct pl_engine_stats stats;
        uint64_t n_loads;
        uint32_t n_adapters;
    } *wholes; /* [n_wholes] */
    size_t n_wholes;
};

static void take_model(struct models *m, const char *name, bool adapter, uint32_t refs, const struct pl_model_stats *stats)
{
    m->v = pl_xrealloc(m->v, (m->n + 1) * sizeof *m->v);
    m->v[m->n++] = (struct model){pl_xstrdup(name), adapter, refs, *stats};
}

static void take_adapter(void *arg, struct pl_served *a)
{
    struct models *m = arg;
    pthread_mutex_lock(&a->lock);
    take_model(m, a->name, true, a->refs, &a->stats);
    pthread_mutex_unlock(&a->lock);
    m->wholes[m->n_wholes - 1].n_adapters++;
}

static void take_whole(void *arg, const char *name, struct pl_instance *i, uint64_t n_loads)
{
    struct models *m = arg;
    m->wholes = pl_xrealloc(m->wholes, (m->n_wholes + 1) * sizeof *m->wholes);
    struct whole *w = &m->wholes[m->n_wholes++];
    *w = (struct whole){.name = pl_xstrdup(name), .n_loads = n_loads};
    pl_engine_stats(i->engine, &w->stats);
    take_model(m, name, false, 0, &w->stats.base);
    pl_adapters_each(i->adapters, false, take_adapter, m);
}

static void free_models(struct models *m)
{
    for (size_t i = 0; i < m->n; i++)
        free(m->v[i].name);
    for (size_t i = 0; i < m->n_wholes; i++)
        free(m->wholes[i].name);
    free(m->v);
    free(m->wholes);
}

static void model_value(struct pl_buf *b, const char *name, const char *model, const char *more, uint64_t v)
{
    pl_buf_addf(b, "parley_%s{", name);
    label(b, "model_name", model);
    pl_buf_addf(b, "%s} %llu\n", more, (unsigned long long)v);
}

/* Counters and histograms of each model: the name, what it is and its field. */
#define PL_MODEL_COUNTERS(X)                                                                                           \
    X(prefix_queries, "prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.")                    \
    X(prefix_hits, "prefix_cache_hits_total", "Prompt tokens found in the prefix cache.")                              \
    X(prompt_tokens, "prompt_tokens_total", "Prompt tokens of admitted requests.")                                     \
    X(cached_tokens, "prompt_tokens_cached_total", "Prompt tokens that came from the prefix cache.")                   \
    X(generated_tokens, "generation_tokens_total", "Tokens generated.")                                                \
    X(n_failed, "requests_failed_total", "Choices that ended in an error.")
#define PL_MODEL_HISTS(X)                                                                                              \
    X(ttft, "time_to_first_token_seconds", "From submission to the first token.")                                      \
    X(itl, "inter_token_latency_seconds", "Between tokens of one choice.")                                             \
    X(e2e, "e2e_request_latency_seconds", "From submission to the end.")                                               \
    X(queue_time, "request_queue_time_seconds", "In the queue before the first iteration.")                            \
    X(prefill_time, "request_prefill_time_seconds", "From the first iteration to the first token.")                    \
    X(decode_time, "request_decode_time_seconds", "From the first token to the last.")                                 \
    X(prompt_len, "request_prompt_tokens", "Prompt tokens of a request.")                                              \
    X(output_len, "request_generation_tokens", "Tokens generated for a choice.")

static void render_models(struct pl_buf *b, const struct models *m)
{
#define X(field, metric, help)                                                                                           \
    head(b, metric, "counter", help);                                                                                  \
    for (size_t i = 0; i < m->n; i++)                                                                                  \
        model_value(b, metric, m->v[i].name, "", m->v[i].stats.field);
    PL_MODEL_COUNTERS(X)
#undef X
    head(b, "request_success_total", "counter", "Choices finished, by reason.");
    for (size_t i = 0; i < m->n; i++) {
        const struct pl_model_stats *st = &m->v[i].stats;
        model_value(b, "request_success_total", m->v[i].name, ",finished_reason=\"stop\"", st->n_finished_stop);
        model_value(b, "request_success_total", m->v[i].name, ",finished_reason=\"length\"", st->n_finished_length);
        model_value(b, "request_success_total", m->v[i].name, ",finished_reason=\"abort\"", st->n_cancelled);
    }
#define X(field, metric, help)                                                                                           \
    head(b, metric, "histogram", help);                                                                                \
    for (size_t i = 0; i < m->n; i++)                                                                                  \
        hist(b, &m->v[i].stats.field, metric, "model_name", m->v[i].name);
    PL_MODEL_HISTS(X)
#undef X
    head(b, "adapter_requests", "gauge", "Requests that use the adapter, waiting ones included.");
    for (size_t i = 0; i < m->n; i++)
        if (m->v[i].adapter)
            model_value(b, "adapter_requests", m->v[i].name, "", m->v[i].refs);
}

/* Of each engine: the name, type, help and value of w, st being its counters. */
#define PL_ENGINE_METRICS(X)                                                                                                               \
    X("num_requests_running", "gauge", "Choices being computed, of the model and its adapters.", st->running)                              \
    X("num_requests_waiting", "gauge", "Requests in the queue, of the model and its adapters.", st->waiting)                               \
    X("kv_cache_usage_perc", "gauge", "Share of the cache pages held by running requests, 0 to 1.",                                        \
      st->pages_total > 0 ? (double)st->pages_held / st->pages_total : 0)                                                                  \
    X("kv_cache_pages", "gauge", "Pages of the cache.", st->pages_total)                                                                   \
    X("kv_cache_pages_held", "gauge", "Pages held by running requests.", st->pages_held)                                                   \
    X("kv_cache_pages_cached", "gauge", "Pages kept for reuse by later requests with the same beginning.", st->pages_cached)               \
    X("adapters_loaded", "gauge", "Adapters of the model that are in memory.", w->n_adapters)                                              \
    X("model_loads_total", "counter", "Times the model was read into memory.", w->n_loads)                                                 \
    X("num_preemptions_total", "counter", "Choices put back into the queue: no pages left, or their client does not read.", st->n_preempted) \
    X("spec_decode_num_draft_tokens_total", "counter", "Tokens guessed from the sequences' own text.", st->draft_tokens)                   \
    X("spec_decode_num_accepted_tokens_total", "counter", "Guessed tokens that turned out right.", st->draft_accepted)                     \
    X("requests_submitted_total", "counter", "Choices accepted by the engine.", st->n_submitted)                                           \
    X("requests_refused_total", "counter", "Choices refused because the queue was full.", st->n_refused)                                   \
    X("engine_steps_total", "counter", "Iterations of the engine.", st->n_steps)

static void render_engines(struct pl_buf *b, const struct pl_server *s)
{
    struct models m = {0};
    pl_registry_each_loaded(s->models, take_whole, &m);
#define X(metric, type, help, value)                                                                                                       \
    head(b, metric, type, help);                                                                                                           \
    for (size_t i = 0; i < m.n_wholes; i++) {                                                                                              \
        const struct whole *w = &m.wholes[i];                                                                                              \
        const struct pl_engine_stats *st = &w->stats;                                                                                      \
        (void)st;                                                                                                                          \
        pl_buf_adds(b, "parley_" metric "{");                                                                                              \
        label(b, "model_name", w->name);                                                                                                   \
        pl_buf_addf(b, "} %.17g\n", (double)(value));                                                                                      \
    }
    PL_ENGINE_METRICS(X)
#undef X
    head(b, "iteration_tokens_total", "histogram", "Tokens computed in an iteration.");
    for (size_t i = 0; i < m.n_wholes; i++)
        hist(b, &m.wholes[i].stats.step_tokens, "iteration_tokens_total", "model_name", m.wholes[i].name);
    render_models(b, &m);
    free_models(&m);
}

static void render_http(struct pl_buf *b, struct pl_metrics *m)
{
    struct series *copy = pl_xmalloc(m->n_series * sizeof *copy);
    pthread_mutex_lock(&m->lock);
    memcpy(copy, m->series, m->n_series * sizeof *copy);
    pthread_mutex_unlock(&m->lock);
    head(b, "http_requests_total", "counter", "Finished HTTP requests; status 499 = the client left before an answer.");
    for (size_t i = 0; i < m->n_series; i++)
        for (size_t k = 0; k < N_METHODS; k++)
            for (size_t c = 0; c < STATUS_TO - STATUS_FROM; c++)
                if (copy[i].requests[k][c] > 0)
                    pl_buf_addf(b, "parley_http_requests_total{method=\"%s\",path=\"%s\",status=\"%zu\"} %llu\n", methods[k],
                                copy[i].pattern, c + STATUS_FROM,
                                (unsigned long long)copy[i].requests[k][c]);
    head(b, "http_request_duration_seconds", "histogram", "From the request's head to the end of the answer.");
    for (size_t i = 0; i < m->n_series; i++)
        hist(b, &copy[i].duration, "http_request_duration_seconds", "path", copy[i].pattern);
    free(copy);
}

static void render_process(struct pl_buf *b, const struct pl_metrics *m)
{
    unsigned long long pages = 0;
    FILE *f = fopen("/proc/self/statm", "re");
    if (f != NULL) {
        if (fscanf(f, "%*u %llu", &pages) != 1)
            pages = 0;
        fclose(f);
    }
    pl_buf_addf(b,
                "# HELP process_start_time_seconds Start time of the process since the Unix epoch.\n"
                "# TYPE process_start_time_seconds gauge\nprocess_start_time_seconds %.3f\n"
                "# HELP process_resident_memory_bytes Resident memory, the mapped model included.\n"
                "# TYPE process_resident_memory_bytes gauge\nprocess_resident_memory_bytes %llu\n",
                m->start_time, pages * (unsigned long long)sysconf(_SC_PAGESIZE));
}

void pl_metrics_render(struct pl_metrics *m, const struct pl_server *s, struct pl_buf *out)
{
    const bool ready = atomic_load_explicit(&s->ready, memory_order_acquire);
    head(out, "build_info", "gauge", "Version of the running daemon.");
    pl_buf_addf(out, "parley_build_info{version=\"%s\"} 1\n", PL_VERSION);
    head(out, "ready", "gauge", "1 when the first model is in memory and requests are taken.");
    pl_buf_addf(out, "parley_ready %d\n", ready && !atomic_load(&s->draining));
    if (ready)
        render_engines(out, s);
    render_http(out, m);
    head(out, "http_connections", "gauge", "Open client connections.");
    pl_buf_addf(out, "parley_http_connections %u\n", pl_http_connections(s->http));
    head(out, "http_requests_active", "gauge", "HTTP requests being answered.");
    pl_buf_addf(out, "parley_http_requests_active %u\n", pl_http_active(s->http));
    if (s->jobs != NULL)
        pl_jobs_render_metrics(s->jobs, out);
    head(out, "log_lines_dropped_total", "counter", "Log lines that could not be written at once.");
    pl_buf_addf(out, "parley_log_lines_dropped_total %llu\n", (unsigned long long)pl_log_dropped());
    render_process(out, m);
}
