/* load: many clients of a server that speaks HTTP/1.1, in one thread that takes little of the processor from it. Each
 * client keeps one connection and sends one request after the other.
 *   load --port N --path /v1/chat/completions --bodies FILE --clients C --requests R [--seconds S]
 *       posts the lines of FILE in turn, R in all; reads streamed answers (server-sent events); stops after S seconds
 *   load --port N --get /health --clients C --seconds S
 *       asks for S seconds
 * Prints one JSON object. Times are milliseconds: to the first text of an answer, between one arrival of text and the next,
 * to the end. Tokens are counted by the server's usage object; of an answer that was cut off, the pieces that came.
 * SPDX-License-Identifier: Apache-2.0 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/base/buf.h"
#include "core/base/clock.h"
#include "core/base/mem.h"
#include "core/base/order.h"

enum { READ_BYTES = 1 << 16 };

enum state { IDLE, SENDING, HEAD, BODY, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER };

struct client {
    int fd; /* -1 = not connected */
    enum state state;
    const char *out; /* the request; borrowed */
    size_t n_out, sent;
    struct pl_buf frame, line; /* an unfinished line of HTTP itself, and of the body */
    uint64_t left;             /* bytes of the chunk or body */
    bool sized, chunked, keep_alive;
    bool fresh; /* no answer came on this connection yet */
    int status;
    uint64_t start, last; /* ns; last: newest text, 0 = none yet */
    bool failed, done;    /* the stream said so */
    long pieces, completion_tokens, prompt_tokens;
};

struct samples {
    double *v;
    size_t n, cap;
};

struct range {
    long min, max;
};

static struct {
    struct sockaddr_in to;
    int poll;
    bool get;
    char **requests; /* whole, head and body */
    size_t n_requests;
    long wanted, begun, finished, failed, open, peak_open; /* open: sent, and not wholly answered */
    long tokens;
    uint64_t start, last_text, deadline; /* ns; deadline 0 = none */
    struct samples first, gap, total;
    struct range completion, prompt;
    long statuses[600];
    char why[200]; /* of the first failure */
} load;

static void add_sample(struct samples *s, uint64_t ns)
{
    if (s->n == s->cap) {
        s->cap = s->cap == 0 ? 4096 : 2 * s->cap;
        s->v = pl_xrealloc(s->v, s->cap * sizeof *s->v);
    }
    s->v[s->n++] = (double)ns * 1e-6;
}

static void widen(struct range *r, long v)
{
    r->min = r->max == 0 || v < r->min ? v : r->min;
    r->max = v > r->max ? v : r->max;
}

/* ---- one client's requests ------------------------------------------------------------------------------------------- */

static void hang_up(struct client *c)
{
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
    c->state = IDLE;
}

static void note_failure(const struct client *c, const char *why)
{
    load.failed++;
    if (load.why[0] == '\0')
        snprintf(load.why, sizeof load.why, "status %d: %s", c->status, why);
}

static bool connect_client(struct client *c)
{
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0)
        return false;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct epoll_event ev = {.events = EPOLLIN | EPOLLOUT, .data.ptr = c};
    c->fresh = true;
    return (connect(c->fd, (const struct sockaddr *)&load.to, sizeof load.to) == 0 || errno == EINPROGRESS) &&
           epoll_ctl(load.poll, EPOLL_CTL_ADD, c->fd, &ev) == 0;
}

static void listen_for(struct client *c, uint32_t events)
{
    struct epoll_event ev = {.events = events, .data.ptr = c};
    epoll_ctl(load.poll, EPOLL_CTL_MOD, c->fd, &ev);
}

static void send_more(struct client *c)
{
    while (c->sent < c->n_out) {
        ssize_t n = send(c->fd, c->out + c->sent, c->n_out - c->sent, MSG_NOSIGNAL);
        if (n < 0)
            return; /* epoll tells when there is room, or what broke */
        c->sent += (size_t)n;
    }
    c->state = HEAD;
    load.peak_open = ++load.open > load.peak_open ? load.open : load.peak_open;
    listen_for(c, EPOLLIN);
}

/* Sends the next request, if one is left. A client that cannot connect leaves the rest to the others. */
static void begin(struct client *c)
{
    if (load.begun == load.wanted)
        return;
    c->out = load.requests[load.begun++ % (long)load.n_requests];
    c->n_out = strlen(c->out);
    c->sent = 0;
    pl_buf_clear(&c->line);
    pl_buf_clear(&c->frame);
    c->status = 0;
    c->failed = c->done = c->chunked = c->sized = false;
    c->keep_alive = true;
    c->last = c->left = 0;
    c->pieces = c->completion_tokens = c->prompt_tokens = 0;
    c->start = pl_now_ns();
    if (c->fd < 0 && !connect_client(c)) {
        note_failure(c, strerror(errno));
        hang_up(c);
        return;
    }
    c->state = SENDING;
    if (c->fresh)
        return; /* it is told when the connection stands */
    send_more(c);
    if (c->state == SENDING)
        listen_for(c, EPOLLIN | EPOLLOUT);
}

static void end_answer(struct client *c)
{
    load.open--;
    load.statuses[c->status]++;
    if (c->status != 200 || c->failed || (!load.get && !c->done)) {
        note_failure(c, c->status == 200 ? "the stream ended early or with an error" : "refused");
    } else {
        load.finished++;
        load.tokens += c->completion_tokens;
        widen(&load.completion, c->completion_tokens);
        widen(&load.prompt, c->prompt_tokens);
        add_sample(&load.total, pl_now_ns() - c->start);
    }
    c->state = IDLE;
    c->fresh = false;
    if (!c->keep_alive)
        hang_up(c);
    begin(c);
}

/* ---- reading answers ------------------------------------------------------------------------------------------------- */

/* What follows "name": in the event, NULL when the name is not there. */
static const char *value_of(const char *event, const char *name)
{
    const char *at = strstr(event, name);
    if (at == NULL)
        return NULL;
    at += strlen(name);
    return at + strspn(at, " ");
}

static bool has_text(const char *event)
{
    const char *content = value_of(event, "\"content\":"), *text = value_of(event, "\"text\":");
    return (content != NULL && content[0] == '"' && content[1] != '"') || (text != NULL && text[0] == '"' && text[1] != '"');
}

static void take_event(struct client *c, const char *event, uint64_t now)
{
    if (strcmp(event, "[DONE]") == 0) {
        c->done = true;
        return;
    }
    if (has_text(event)) {
        add_sample(c->last == 0 ? &load.first : &load.gap, now - (c->last == 0 ? c->start : c->last));
        c->last = load.last_text = now;
        c->pieces++;
    }
    const char *completion = value_of(event, "\"completion_tokens\":"), *prompt = value_of(event, "\"prompt_tokens\":");
    if (completion != NULL)
        c->completion_tokens = strtol(completion, NULL, 10);
    if (prompt != NULL)
        c->prompt_tokens = strtol(prompt, NULL, 10);
    const char *error = value_of(event, "\"error\":");
    c->failed |= error != NULL && error[0] == '{';
}

/* Collects a line; true when it is complete, without its end. Then it stays until the buffer is emptied. */
static bool take_line(struct pl_buf *line, const char **p, const char *end)
{
    const char *nl = memchr(*p, '\n', (size_t)(end - *p));
    pl_buf_add(line, *p, (size_t)((nl != NULL ? nl : end) - *p));
    *p = nl != NULL ? nl + 1 : end;
    if (nl == NULL)
        return false;
    if (line->len > 0 && line->data[line->len - 1] == '\r')
        line->data[--line->len] = '\0';
    return true;
}

static void take_body(struct client *c, const char *p, size_t n, uint64_t now)
{
    for (const char *end = p + n; !load.get && p < end;)
        if (take_line(&c->line, &p, end)) {
            const char *line = pl_buf_str(&c->line);
            if (strncmp(line, "data: ", 6) == 0)
                take_event(c, line + 6, now);
            pl_buf_clear(&c->line);
        }
}

static void take_head_line(struct client *c, const char *line)
{
    if (c->status == 0) {
        const char *space = strchr(line, ' ');
        const int status = space != NULL ? atoi(space) : 0;
        c->status = status > 0 && status < (int)PL_COUNT_OF(load.statuses) ? status : 599;
    } else if (strncasecmp(line, "content-length:", 15) == 0) {
        c->left = strtoull(line + 15, NULL, 10);
        c->sized = true;
    } else if (strncasecmp(line, "transfer-encoding:", 18) == 0) {
        c->chunked = true;
    } else if (strncasecmp(line, "connection:", 11) == 0) {
        c->keep_alive = strcasestr(line + 11, "close") == NULL;
    }
}

static void end_head(struct client *c)
{
    c->keep_alive &= c->chunked || c->sized;
    c->state = c->chunked ? CHUNK_SIZE : BODY;
}

/* A line of HTTP itself. Returns true when the answer is complete. */
static bool take_frame_line(struct client *c, const char *line)
{
    switch (c->state) {
    case HEAD:
        if (line[0] != '\0') {
            take_head_line(c, line);
            return false;
        }
        end_head(c);
        return c->state == BODY && c->sized && c->left == 0;
    case CHUNK_SIZE:
        c->left = strtoull(line, NULL, 16);
        c->state = c->left > 0 ? CHUNK_DATA : TRAILER;
        return false;
    case CHUNK_END: c->state = CHUNK_SIZE; return false;
    default: return line[0] == '\0'; /* TRAILER */
    }
}

/* Consumes bytes of an answer; true when it is complete. */
static bool take_bytes(struct client *c, const char **p, const char *end, uint64_t now)
{
    while (*p < end) {
        if (c->state == BODY || c->state == CHUNK_DATA) {
            size_t n = (size_t)(end - *p);
            bool counted = c->chunked || c->sized;
            n = counted && c->left < n ? (size_t)c->left : n;
            take_body(c, *p, n, now);
            *p += n;
            if (!counted || (c->left -= n) > 0)
                continue;
            if (c->state == BODY)
                return true;
            c->state = CHUNK_END;
        } else if (take_line(&c->frame, p, end)) {
            bool complete = take_frame_line(c, pl_buf_str(&c->frame));
            pl_buf_clear(&c->frame);
            if (complete)
                return true;
        }
    }
    return false;
}

/* The server closed the connection. Where nothing else tells the end of a body, that is it. */
static void take_close(struct client *c)
{
    bool asked_again = !c->fresh && c->status == 0; /* it closed an idle connection while the request was on its way */
    bool is_end = c->state == BODY && !c->sized, sent = c->state != SENDING;
    hang_up(c);
    if (asked_again) {
        load.open -= sent;
        load.begun--;
        begin(c);
    } else if (is_end) {
        end_answer(c);
    } else {
        load.open -= sent;
        note_failure(c, "the server closed the connection");
        begin(c);
    }
}

static void receive(struct client *c)
{
    static char bytes[READ_BYTES];
    for (;;) {
        ssize_t n = recv(c->fd, bytes, sizeof bytes, 0);
        uint64_t now = pl_now_ns();
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (n <= 0) {
            if (c->state != IDLE)
                take_close(c);
            else
                hang_up(c);
            return;
        }
        const char *p = bytes;
        if (c->state == SENDING) { /* refused before it had all */
            c->state = HEAD;
            c->keep_alive = false;
            load.open++;
        }
        if (c->state != IDLE && take_bytes(c, &p, bytes + n, now)) {
            end_answer(c);
            return;
        }
        if ((size_t)n < sizeof bytes)
            return;
    }
}

/* ---- the whole ------------------------------------------------------------------------------------------------------- */

static void run(struct client *clients, long n)
{
    struct epoll_event events[256];
    load.start = pl_now_ns();
    for (long i = 0; i < n; i++)
        begin(&clients[i]);
    while (load.finished + load.failed < load.begun) { /* else all are done, or no client is left */
        uint64_t now = pl_now_ns();
        if (load.deadline != 0 && now - load.start >= load.deadline)
            return;
        int wait_ms = load.deadline == 0 ? -1 : (int)((load.deadline - (now - load.start)) / 1000000 + 1);
        int got = epoll_wait(load.poll, events, PL_COUNT_OF(events), wait_ms);
        for (int i = 0; i < got; i++) {
            struct client *c = events[i].data.ptr;
            if (c->fd >= 0 && c->state == SENDING && (events[i].events & EPOLLOUT))
                send_more(c);
            if (c->fd >= 0 && (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
                receive(c);
        }
    }
}

/* The least value that so many of a hundred do not exceed. */
static double percentile(const struct samples *s, size_t p)
{
    return s->n > 0 ? s->v[(s->n * p + 99) / 100 - 1] : 0;
}

static void print_samples(const char *name, struct samples *s)
{
    if (s->n > 0)
        qsort(s->v, s->n, sizeof s->v[0], pl_by_value);
    printf(", \"%s\": {\"n\": %zu, \"p50\": %.3f, \"p95\": %.3f, \"p99\": %.3f, \"max\": %.3f}", name, s->n, percentile(s, 50), percentile(s, 95),
           percentile(s, 99), percentile(s, 100));
}

static void print_result(const struct client *clients, long n)
{
    uint64_t now = pl_now_ns(), end = load.finished + load.failed < load.wanted || load.last_text == 0 ? now : load.last_text;
    long unfinished = 0;
    for (long i = 0; i < n; i++)
        if (clients[i].state != IDLE) {
            unfinished++;
            load.tokens += clients[i].pieces;
            if (clients[i].last == 0 && !load.get)
                add_sample(&load.first, now - clients[i].start); /* at least as long */
        }
    double seconds = (double)(end - load.start) * 1e-9;
    printf("{\"clients\": %ld, \"finished\": %ld, \"failed\": %ld, \"unfinished\": %ld, \"seconds\": %.6f, \"requests_s\": %.1f, \"tokens\": %ld, "
           "\"tok_s\": %.2f, \"completion_tokens\": [%ld, %ld], \"prompt_tokens\": [%ld, %ld], \"peak_open\": %ld",
           n, load.finished, load.failed, unfinished, seconds, (double)load.finished / seconds, load.tokens, (double)load.tokens / seconds,
           load.completion.min, load.completion.max, load.prompt.min, load.prompt.max, load.peak_open);
    print_samples("first_ms", &load.first);
    print_samples("gap_ms", &load.gap);
    print_samples("total_ms", &load.total);
    printf(", \"statuses\": {");
    const char *comma = "";
    for (size_t i = 0; i < PL_COUNT_OF(load.statuses); i++)
        if (load.statuses[i] > 0)
            printf("%s\"%zu\": %ld", comma, i, load.statuses[i]), comma = ", ";
    printf("}, \"why\": \"%s\"}\n", load.why);
}

static bool read_bodies(const char *file, const char *path)
{
    FILE *f = fopen(file, "re");
    char *line = NULL;
    size_t cap = 0;
    ssize_t n;
    while (f != NULL && (n = getline(&line, &cap, f)) > 0) {
        n -= line[n - 1] == '\n';
        load.requests = pl_xrealloc(load.requests, (load.n_requests + 1) * sizeof(char *));
        if (asprintf(&load.requests[load.n_requests++],
                     "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %zd\r\n\r\n%.*s", path, n, (int)n,
                     line) < 0)
            break;
    }
    free(line);
    if (f != NULL)
        fclose(f);
    return load.n_requests > 0;
}

static void allow_files(void)
{
    struct rlimit most;
    if (getrlimit(RLIMIT_NOFILE, &most) == 0) {
        most.rlim_cur = most.rlim_max;
        setrlimit(RLIMIT_NOFILE, &most);
    }
}

int main(int argc, char **argv)
{
    const char *path = "/v1/chat/completions", *bodies = NULL, *get = NULL;
    long n_clients = 1, port = 0;
    double seconds = 0;
    static const struct option options[] = {{"port", 1, NULL, 'p'},   {"path", 1, NULL, 'a'},     {"bodies", 1, NULL, 'b'}, {"get", 1, NULL, 'g'},
                                            {"clients", 1, NULL, 'c'}, {"requests", 1, NULL, 'r'}, {"seconds", 1, NULL, 's'}, {NULL, 0, NULL, 0}};
    load.wanted = 1;
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (c) {
        case 'p': port = atol(optarg); break;
        case 'a': path = optarg; break;
        case 'b': bodies = optarg; break;
        case 'g': get = optarg; break;
        case 'c': n_clients = atol(optarg); break;
        case 'r': load.wanted = atol(optarg); break;
        case 's': seconds = atof(optarg); break;
        default: return 2;
        }
    }
    load.get = get != NULL;
    if (optind != argc || port < 1 || port > 65535 || n_clients < 1 || load.wanted < 1 || (get != NULL ? seconds <= 0 || bodies != NULL : bodies == NULL)) {
        fputs("usage: load --port N --path PATH --bodies FILE --clients C --requests R [--seconds S]\n"
              "       load --port N --get PATH --clients C --seconds S\n", stderr);
        return 2;
    }
    if (get != NULL) {
        load.wanted = INT32_MAX;
        load.requests = pl_xcalloc(load.n_requests = 1, sizeof(char *));
        if (asprintf(load.requests, "GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n", get) < 0)
            return 1;
    } else if (!read_bodies(bodies, path)) {
        fprintf(stderr, "load: %s has no lines, or cannot be read\n", bodies);
        return 1;
    }
    allow_files();
    load.to = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    load.deadline = (uint64_t)(seconds * 1e9);
    load.poll = epoll_create1(EPOLL_CLOEXEC);
    struct client *clients = pl_xcalloc((size_t)n_clients, sizeof *clients);
    for (long i = 0; i < n_clients; i++)
        clients[i].fd = -1;
    run(clients, n_clients);
    print_result(clients, n_clients);
    return 0;
}
