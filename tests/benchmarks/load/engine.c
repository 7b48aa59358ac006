// A fake engine that is never the bottleneck: one thread, epoll, a timer wheel of one millisecond.
//
//     engine PORT
//
// A request whose body has "stream": true is answered with n server-sent events of s bytes, r a second;
// any other with b bytes of JSON, 1000 at least. The query sets the numbers: ?n=100&r=10&s=200, ?b=1000000.
// Every event carries the CLOCK_MONOTONIC time at which it was made as @nanoseconds@, every JSON answer the time
// at which its request was complete. The last event, [DONE] and the end of the body are written at once.
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { WHEEL = 16384, EVENTS = 512, CHUNK = 8192, READ = 65536, JSON_BYTES = 1000 };

typedef struct connection {
    int fd, dead, watching_write, size;
    char *in, *out;
    size_t in_length, in_size, needed;  // needed: bytes of the request under way, once its head has been seen
    size_t out_start, out_length, out_size;
    long count, sent;                   // events to send (0: no stream) and those that were
    double rate, due;                   // events a second; when the next one is due, in ms
    struct connection *next;            // in its slot of the wheel
} connection;

static int poller;
static connection *wheel[WHEEL];
static long paced, current_ms;          // streams in the wheel

static uint64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void watch(connection *c, int write) {
    if (c->watching_write == write) return;
    c->watching_write = write;
    struct epoll_event event = {.events = EPOLLIN | (write ? (uint32_t)EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event);
}

static void release(connection *c) {
    free(c->in), free(c->out), free(c);
}

static void end(connection *c) {
    if (c->dead) return;
    c->dead = 1;
    close(c->fd);
    if (!c->count) release(c);  // else the wheel lets go of it
}

static void put(connection *c, const char *bytes, size_t length) {
    if (c->out_length + length > c->out_size) {
        c->out_size = (c->out_length + length) * 2;
        c->out = realloc(c->out, c->out_size);
    }
    memcpy(c->out + c->out_length, bytes, length);
    c->out_length += length;
}

// 1: all is written, 0: the rest will be, -1: the connection is gone
static int flush(connection *c) {
    while (c->out_start < c->out_length) {
        ssize_t n = send(c->fd, c->out + c->out_start, c->out_length - c->out_start, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN) return -1;
        if (n < 0) {
            watch(c, 1);
            return 0;
        }
        c->out_start += (size_t)n;
    }
    c->out_start = c->out_length = 0;
    watch(c, 0);
    return 1;
}

static void put_event(connection *c) {
    static const char end_of_event[] = "\"},\"finish_reason\":null}]}\n\n";
    char data[CHUNK], head[32];
    int n = sprintf(data,
                    "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,"
                    "\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"@%llu@",
                    (unsigned long long)nanoseconds());
    while (n + (int)sizeof end_of_event - 1 < c->size) data[n++] = 'x';
    n += sprintf(data + n, "%s", end_of_event);
    put(c, head, (size_t)sprintf(head, "%x\r\n", n));
    put(c, data, (size_t)n);
    put(c, "\r\n", 2);
    if (++c->sent == c->count) put(c, "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n", 24);
}

static void serve(connection *c);

static void into_wheel(connection *c) {
    long ms = (long)c->due;
    if (ms <= current_ms) ms = current_ms + 1;
    if (ms > current_ms + WHEEL - 1) ms = current_ms + WHEEL - 1;
    c->next = wheel[ms % WHEEL];
    wheel[ms % WHEEL] = c;
}

static void tick(connection *c) {
    if (c->dead) {
        paced--;
        release(c);
        return;
    }
    put_event(c);
    if (!c->watching_write) flush(c);  // a lost connection is noticed when it is read
    if (c->sent < c->count) {
        c->due += 1000.0 / c->rate;
        into_wheel(c);
    } else {
        paced--;
        c->count = 0;
        serve(c);
    }
}

static double number(const char *query, const char *name, double otherwise) {
    const char *found = query ? strstr(query, name) : NULL;
    return found ? atof(found + strlen(name)) : otherwise;
}

static void answer(connection *c, const char *query, int stream) {
    if (!stream) {
        int size = (int)number(query, "b=", JSON_BYTES);
        if (size < JSON_BYTES) size = JSON_BYTES;
        char head[160], *body = malloc((size_t)size + 256);
        int n = sprintf(body,
                        "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1700000000,"
                        "\"received\":\"@%llu@\",\"model\":\"m\",\"choices\":[{\"index\":0,\"message\":"
                        "{\"role\":\"assistant\",\"content\":\"",
                        (unsigned long long)nanoseconds());
        memset(body + n, 'x', (size_t)(size - 104 - n));
        n = size - 104;
        n += sprintf(body + n, "\"},\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":9,"
                               "\"completion_tokens\":12,\"total_tokens\":21}}");
        put(c, head, (size_t)sprintf(head, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nServer: fake\r\n"
                                           "Content-Length: %d\r\n\r\n", n));
        put(c, body, (size_t)n);
        free(body);
        flush(c);
        return;
    }
    static const char head[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
                               "Transfer-Encoding: chunked\r\n\r\n";
    put(c, head, sizeof head - 1);
    c->count = (long)number(query, "n=", 100);
    c->rate = number(query, "r=", 10);
    c->size = (int)number(query, "s=", 200);
    c->sent = 0;
    paced++;
    c->due = (double)nanoseconds() / 1e6;
    tick(c);
}

// Answer the requests that have arrived whole, one after the other.
static void serve(connection *c) {
    while (!c->count && !c->dead) {
        if (!c->needed) {
            char *blank = memmem(c->in, c->in_length, "\r\n\r\n", 4);
            if (!blank) return;
            blank[2] = 0;
            char *length = strcasestr(c->in, "\r\ncontent-length:");
            size_t head = (size_t)(blank - c->in) + 4;
            blank[2] = '\r';
            c->needed = head + (length ? strtoul(length + 17, NULL, 10) : 0);
        }
        if (c->in_length < c->needed) return;
        char *line = strndup(c->in, (size_t)((char *)memchr(c->in, '\n', c->needed) - c->in));
        int stream = memmem(c->in, c->needed, "\"stream\": true", 14) || memmem(c->in, c->needed, "\"stream\":true", 13);
        c->in_length -= c->needed;
        memmove(c->in, c->in + c->needed, c->in_length);
        c->needed = 0;
        answer(c, strchr(line, '?'), stream);
        free(line);
    }
}

static void accept_all(int listener) {
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        connection *c = calloc(1, sizeof *c);
        c->fd = fd;
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
    }
}

static void ready(connection *c, uint32_t events) {
    if (events & EPOLLOUT && flush(c) < 0) {
        end(c);
        return;
    }
    if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR))) return;
    size_t wanted = c->needed > c->in_length + 4096 ? READ : 4096;
    if (c->in_size - c->in_length < wanted) {
        c->in_size = c->in_length + wanted > c->in_size * 2 ? c->in_length + wanted : c->in_size * 2;
        c->in = realloc(c->in, c->in_size);
    }
    ssize_t n = recv(c->fd, c->in + c->in_length, c->in_size - c->in_length, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        end(c);
        return;
    }
    c->in_length += (size_t)n;
    serve(c);
}

int main(int count, char **arguments) {
    if (count != 2) return fprintf(stderr, "usage: engine PORT\n"), 2;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(arguments[1])),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096))
        return perror("engine"), 1;
    poller = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL}, events[EVENTS];
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
    for (current_ms = (long)(nanoseconds() / 1000000);;) {
        int n = epoll_wait(poller, events, EVENTS, paced ? 1 : 1000);
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr) ready(events[i].data.ptr, events[i].events);
            else accept_all(listener);
        }
        for (long now = (long)(nanoseconds() / 1000000); paced && current_ms < now;) {
            connection *c = wheel[++current_ms % WHEEL];
            wheel[current_ms % WHEEL] = NULL;
            while (c) {
                connection *next = c->next;
                tick(c);
                c = next;
            }
        }
        if (!paced) current_ms = (long)(nanoseconds() / 1000000);
    }
}
