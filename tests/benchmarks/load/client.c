// A load client: one thread, epoll. It prints one line of JSON.
//
//     client full   PORT PATH MODEL CONNECTIONS SECONDS [BYTES] requests one after the other on each connection
//     client paced  PORT PATH MODEL CONNECTIONS SECONDS RATE    RATE requests a second in all
//     client stream PORT PATH MODEL CONNECTIONS SECONDS RAMP    event streams, begun over RAMP seconds and again
//     client once   PORT PATH MODEL CONNECTIONS SECONDS         one request each, all at once; ends with the last
//
// Requests have 1 KB of JSON, or BYTES of a conversation as coding agents send: with a quote, a line's end or a bracket
// in every ten characters or so. `latency` is from a request to the end of its answer, `first` to its first byte
// after the head (streams), `delay` from the moment an event was made, which it carries as @nanoseconds@, to its
// arrival. `stream` measures from half a second after the ramp on. All in ms; `from` and `to` are the times of the
// first and last first byte on CLOCK_MONOTONIC, `received` that at which the engine had the first request, `begun`
// that of the first request, `last` that at which the last event to come was made.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BUFFER = 70000, EVENTS = 512, BODY = 1024, NUMBER = 8, MAX_SAMPLES = 4000000 };

typedef struct connection {
    int fd, busy, answered, chunked;    // answered: the head has been seen
    long left;                          // of a body of known length
    size_t length;
    double since, due;                  // when the request was sent, and when the next one is to be
    char bytes[BUFFER];
} connection;

typedef struct samples {
    const char *name;
    double *values;
    long count;
} samples;

static int poller, port, streaming, measuring, done;
static size_t request_length;
static char *request, *number;  // of the request, in its text: no two are the same
static samples latency = {.name = "latency"}, first = {.name = "first"}, delay = {.name = "delay"};
static long complete, errors, chunks, measured_chunks;
static double begun_at, from, to, received, last_event;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static void sample(samples *s, double value) {
    if (measuring && s->count < MAX_SAMPLES) s->values[s->count++] = value;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void print(samples *s) {
    if (!s->count) return;
    qsort(s->values, (size_t)s->count, sizeof *s->values, ascending);
    printf(", \"%s\": {\"count\": %ld", s->name, s->count);
    static const double parts[] = {0.5, 0.9, 0.95, 0.99, 0.999};
    static const char *names[] = {"p50", "p90", "p95", "p99", "p999"};
    for (int i = 0; i < 5; i++) printf(", \"%s\": %.4f", names[i], s->values[(long)((double)s->count * parts[i])]);
    printf(", \"max\": %.4f}", s->values[s->count - 1]);
}

static void give_up(const char *what) {
    perror(what);
    exit(1);
}

static void open_connection(connection *c) {
    if (c->fd >= 0) close(c->fd);
    int one = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&address, sizeof address)) give_up("client: connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event);
}

static void ask(connection *c) {
    c->length = 0;
    c->answered = c->chunked = 0;
    c->busy = 1;
    c->since = now();
    static long asked;
    long rest = asked++;
    for (int i = NUMBER; i--; rest /= 10) number[i] = (char)('0' + rest % 10);
    for (size_t at = 0; at < request_length;) {
        ssize_t sent = send(c->fd, request + at, request_length - at, MSG_NOSIGNAL);
        struct pollfd writable = {.fd = c->fd, .events = POLLOUT};
        if (sent >= 0) at += (size_t)sent;
        else if (errno == EAGAIN) poll(&writable, 1, -1);
        else {
            errors++;
            return;
        }
    }
}

// Writes a request with so many bytes of JSON.
static void write_request(const char *path, const char *model, size_t bytes) {
    static const char turn[] = "\"}, {\"role\": \"user\", \"content\": \"",
                      line[] = "    if (values[\\\"key\\\"] > limit) {  // so that it ends, and no other is begun\\n";
    char *body = malloc(bytes + 1024);
    int plain = bytes <= BODY;
    size_t n = (size_t)sprintf(body, "{\"model\": \"%.200s\", \"stream\": %s, \"messages\": [{\"role\": \"user\", \"content\": \"",
                               model, streaming ? "true" : "false");
    size_t numbered = n;
    n += (size_t)sprintf(body + n, "%0*d ", NUMBER, 0);
    for (int lines = 1; !plain && n + sizeof line + sizeof turn < bytes - 4; lines++) {
        n += (size_t)sprintf(body + n, "%s", line);
        if (lines % 20 == 0) n += (size_t)sprintf(body + n, "%s", turn);
    }
    while (n < bytes - 4) body[n++] = 'y';
    n += (size_t)sprintf(body + n, "\"}]}");
    request = malloc(n + 2048);
    request_length = (size_t)sprintf(request,
                                     "POST %.500s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
                                     "Authorization: Bearer sk-1234\r\nUser-Agent: bench/1\r\nAccept: */*\r\n"
                                     "Content-Length: %zu\r\n\r\n%s", path, port, n, body);
    number = request + request_length - n + numbered;
    free(body);
}

// The stamp @nanoseconds@ at or after `text`, in ms. Returns what follows it; NULL when there is no whole one.
static char *stamp(char *text, char *limit, double *ms) {
    char *start = memchr(text, '@', (size_t)(limit - text));
    char *stop = start ? memchr(start + 1, '@', (size_t)(limit - start - 1)) : NULL;
    if (stop) *ms = (double)strtoull(start + 1, NULL, 10) / 1e6;
    return stop ? stop + 1 : NULL;
}

// Returns whether there is a body to look at.
static int take_head(connection *c, double t) {
    c->bytes[c->length] = 0;
    char *blank = strstr(c->bytes, "\r\n\r\n");
    if (!blank || (streaming && c->bytes + c->length == blank + 4)) return 0;
    *blank = 0;
    if (strncmp(c->bytes + 9, "200", 3) && errors++ < 3) fprintf(stderr, "%.400s\n", c->bytes);
    c->chunked = strcasestr(c->bytes, "\r\ntransfer-encoding: chunked") != NULL;
    char *length = strcasestr(c->bytes, "\r\ncontent-length:");
    c->left = length ? atol(length + 17) : -1;
    c->answered = 1;
    sample(&first, t - c->since);
    if (!from) from = t;
    to = t;
    c->length -= (size_t)(blank + 4 - c->bytes);
    memmove(c->bytes, blank + 4, c->length);
    return 1;
}

// Looks at what has come of an event stream, and forgets it. Returns whether it is complete.
static int take_events(connection *c, double t) {
    char *text = c->bytes, *limit = c->bytes + c->length, *next;
    for (double made; (next = stamp(text, limit, &made)); text = next, chunks++) {
        if (measuring) measured_chunks++;
        sample(&delay, t - made);
        last_event = made;
    }
    if (c->length >= 7 && !memcmp(limit - 7, "\r\n0\r\n\r\n", 7)) return 1;
    char *open = memchr(text, '@', (size_t)(limit - text)), *keep = limit - text > 7 ? limit - 7 : text;
    if (open && open < keep) keep = open;
    c->length = (size_t)(limit - keep);
    memmove(c->bytes, keep, c->length);
    return 0;
}

static void take(connection *c, int again) {
    ssize_t n = recv(c->fd, c->bytes + c->length, BUFFER - c->length - 1, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {  // closed: between two requests that is the server's right
        if (c->busy) errors++;
        if (c->busy && !again) done++, c->busy = 0;
        open_connection(c);
        if (c->busy) ask(c);
        return;
    }
    double t = now(), made;
    c->length += (size_t)n;
    if (!c->answered && !take_head(c, t)) return;
    int whole;
    if (streaming) {
        whole = take_events(c, t);
    } else {
        if (c->length > BUFFER / 2 && (long)c->length < c->left) {  // a large answer is not kept
            c->left -= (long)c->length;
            c->length = 0;
        }
        whole = c->left >= 0 ? (long)c->length >= c->left
                             : c->length >= 5 && !memcmp(c->bytes + c->length - 5, "0\r\n\r\n", 5);
        if (whole) sample(&latency, t - c->since);
        if (whole && stamp(c->bytes, c->bytes + c->length, &made) && (!received || made < received)) received = made;
    }
    if (!whole) return;
    complete++;
    c->busy = 0;
    if (again) ask(c);
    else done++;
}

int main(int count, char **arguments) {
    const char *mode = count > 6 ? arguments[1] : "";
    int paced = !strcmp(mode, "paced"), once = !strcmp(mode, "once"), full = !strcmp(mode, "full");
    streaming = !strcmp(mode, "stream");
    if (!(paced || once || full || streaming) || count < 7 + (paced || streaming)) {
        fprintf(stderr, "usage: client full|paced|stream|once PORT PATH MODEL CONNECTIONS SECONDS [RATE|RAMP|BYTES]\n");
        return 2;
    }
    port = atoi(arguments[2]);
    int connections = atoi(arguments[5]);
    double seconds = atof(arguments[6]), last = count > 7 ? atof(arguments[7]) : 0;
    if (once) streaming = strstr(arguments[3], "n=") != NULL;

    write_request(arguments[3], arguments[4], full && last > 0 ? (size_t)last : BODY);
    latency.values = malloc(MAX_SAMPLES * sizeof(double));
    first.values = malloc(MAX_SAMPLES * sizeof(double));
    delay.values = malloc(MAX_SAMPLES * sizeof(double));
    poller = epoll_create1(0);
    connection *all = calloc((size_t)connections, sizeof *all);
    for (int i = 0; i < connections; i++) {
        all[i].fd = -1;
        if (mode[0] != 's') open_connection(&all[i]);
    }
    double start = begun_at = now(), ramp = mode[0] == 's' ? last * 1e3 : 0, stop = start + seconds * 1e3, measured_from = 0;
    double measure_at = mode[0] == 's' ? start + ramp + 500 : once ? start : start + 200;
    for (int i = 0; i < connections; i++) {
        if (full || once) ask(&all[i]);
        all[i].due = paced ? start + i * 1e3 / last : start + ramp * i / connections;
    }
    int begun = mode[0] == 's' ? 0 : connections;
    long complete_before = 0;
    struct epoll_event events[EVENTS];
    for (double t = start; t < stop && !(once && done == connections); t = now()) {
        if (!measuring && t >= measure_at) measuring = 1, measured_from = t, complete_before = complete;
        for (; begun < connections && all[begun].due <= t; begun++) open_connection(&all[begun]), ask(&all[begun]);
        for (int i = 0; paced && i < connections; i++) {
            if (all[i].busy || all[i].due > t) continue;
            ask(&all[i]);
            all[i].due += connections * 1e3 / last;
            if (all[i].due < t) all[i].due = t;
        }
        int ready = epoll_wait(poller, events, EVENTS, 1);
        for (int i = 0; i < ready; i++) take(events[i].data.ptr, full || mode[0] == 's');
    }
    double t = now();
    printf("{\"complete\": %ld, \"measured\": %ld, \"errors\": %ld, \"unanswered\": %d, \"seconds\": %.4f, "
           "\"chunks\": %ld, \"measured_chunks\": %ld, \"from\": %.4f, \"to\": %.4f, \"received\": %.4f, "
           "\"begun\": %.4f, \"last\": %.4f",
           complete, complete - complete_before, errors, once ? connections - done : 0, (t - measured_from) / 1e3,
           chunks, measured_chunks, from, to, received, begun_at,
           last_event);
    print(&latency);
    print(&first);
    print(&delay);
    puts("}");
    return 0;
}
