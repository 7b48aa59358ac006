// A thread that passes the chunks of streams from engines to clients. See native.py, which owns it.
//
// Theory of operation
// ===================
//
// Python lends a stream that stands between two chunks: the engine's socket, which it does not read meanwhile, and
// the client's, which it does not write to. The thread has duplicates of both, so no number can come to mean
// another file under it. It receives, looks whether what came is whole chunks as nearly all are, and sends them.
//
// It knows no more of HTTP than that, and takes no decision. At whatever is not usual (the last chunk, an extension,
// a part of a chunk, the end of the connection, an error, a client that does not take all) it hands the stream back,
// with what it has received and not passed on (`unread`), and what it has accepted and the client's socket
// has not taken (`unsent`). Python goes on from there, as if it had received these bytes itself. Only the beginning
// of a chunk's size line is kept until the rest is there: it is of no use to the client, and some engines send it by
// itself.
//
//     FREE --lend--> LENT --hand_back--> BACK --next--> FREE
//                     |                    `---take---> STALE --next--> FREE
//                     `---take---> FREE
//
// One mutex guards it all, and is held for no system call of the thread's: on one core Python would often find it
// taken by a thread that it has just displaced. A stream whose sockets the thread is using is `busy`, and is the
// thread's alone; `relay_take` waits for the end of that, which is a matter of microseconds, since no call waits. So
// when it returns, the thread will not touch these sockets any more, and all that it has done is in the report. A key
// names a slot and the stream in it: what epoll reported of an earlier one is skipped. Memory is bounded: slots are set
// aside at the start, each with room for one block (touched only when it is needed); the last blocks of each stream,
// in which engines report their usage, are kept as Python keeps them.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BLOCKS = 4, BLOCK = 16384, READY = 256, DIGITS = 4, LINE = DIGITS + 2 };
static const uint64_t STOP = UINT64_MAX;

const int relay_version = 1;  // of what is declared here, for native.py

struct report {
    uint64_t key;
    uint64_t bytes, events;  // passed on since the last report
    double last;             // when, on the monotonic clock; 0: nothing
    const char *left;        // the bytes that are handed back
    uint64_t unsent, unread; // how many of them, in this order
    uint64_t blocks;         // that were passed on since the stream was lent
    const char *tail[BLOCKS];
    uint64_t sizes[BLOCKS];
};

struct block {
    char *bytes;
    size_t size, room;
};

enum state { FREE, LENT, BACK, STALE };

struct stream {
    enum state state;
    int busy;
    uint64_t key;
    int from, to;
    struct stream *next;  // that is free, or handed back
    uint64_t bytes, events;
    double last;
    size_t blocks;  // so far; the last of them are in the tail
    struct block tail[BLOCKS];
    char line[LINE];  // the beginning of a size line
    size_t held;      // bytes of it
    size_t unsent, unread;
};

struct relay {
    pthread_mutex_t lock;
    pthread_cond_t rested;  // a stream that `relay_take` waits for is not busy any more
    int waiting;
    pthread_t thread;
    int poller, wake, stop;  // wake: readable while anything is handed back
    int most_fd;
    size_t slots;
    struct stream *streams, *free, *first, *last;  // handed back: first to last
    char *room;                                    // BLOCK for each slot
    char bytes[BLOCK];
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static struct stream *find(struct relay *r, uint64_t key) {
    size_t slot = (key & UINT32_MAX) - 1;  // so that no key is 0, even after 2^32 streams
    return slot < r->slots && r->streams[slot].key == key ? &r->streams[slot] : NULL;
}

static char *room_of(struct relay *r, struct stream *s) { return r->room + (size_t)(s - r->streams) * BLOCK; }

static int digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

// Return how many bytes are whole chunks. What follows is the beginning of a size line; -1: it is anything else.
static ssize_t whole_chunks(const char *data, size_t length) {
    size_t at = 0;
    while (at < length) {
        size_t i = at, size = 0;
        for (; i < length && i - at < DIGITS && digit(data[i]) >= 0; i++) size = size * 16 + (size_t)digit(data[i]);
        if (i > at ? data[at] == '0' : i < length) return -1;  // the last chunk, or not usual; no digit
        if (i == length) break;
        if (data[i] != '\r') return -1;
        if (i + 1 == length) break;
        if (data[i + 1] != '\n') return -1;
        i += 2;
        if (i == length) break;
        if (length - i < size + 2 || data[i + size] != '\r' || data[i + size + 1] != '\n') return -1;
        at = i + size + 2;
    }
    return (ssize_t)at;
}

static void keep(struct stream *s, const char *data, size_t length) {
    struct block *block = &s->tail[s->blocks++ % BLOCKS];
    block->size = 0;
    if (block->room < length) {
        char *more = realloc(block->bytes, length + 64);
        if (!more) return;
        block->bytes = more;
        block->room = length + 64;
    }
    memcpy(block->bytes, data, length);
    block->size = length;
}

static void account(struct stream *s, const char *data, size_t length, double when) {
    const char *end = data + length, *at = data;
    while ((at = memmem(at, (size_t)(end - at), "data:", 5))) {
        s->events++;
        at += 5;
    }
    s->bytes += length;
    s->last = when;
    keep(s, data, length);
}

// Let go of the sockets: they are Python's again.
static void let_go(struct relay *r, struct stream *s) {
    epoll_ctl(r->poller, EPOLL_CTL_DEL, s->from, NULL);
    close(s->from);
    close(s->to);
}

static void hand_back(struct relay *r, struct stream *s, const char *left, size_t unsent, size_t unread) {
    memcpy(room_of(r, s), left, unsent + unread);
    s->unsent = unsent;
    s->unread = unread;
    s->state = BACK;
    s->next = NULL;
    if (r->first) r->last->next = s;
    else r->first = s;
    r->last = s;
}

static void signal_to(int fd) {
    uint64_t one = 1;
    while (write(fd, &one, sizeof one) < 0 && errno == EINTR) {}
}

// Pass on what has come for a busy stream. Returns whether it was handed back.
static int pass(struct relay *r, struct stream *s, double when) {
    char *data = r->bytes;
    memcpy(data, s->line, s->held);
    ssize_t n = recv(s->from, data + s->held, BLOCK - s->held, MSG_DONTWAIT);
    int nothing = n < 0 && (errno == EAGAIN || errno == EINTR);
    size_t total = s->held + (n > 0 ? (size_t)n : 0);
    ssize_t whole = n > 0 ? whole_chunks(data, total) : -1, sent = 0;
    if (whole > 0) {
        sent = send(s->to, data, (size_t)whole, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) whole = -1;
        if (sent < 0) sent = 0;
    }
    int back = !nothing && sent != whole;
    if (back) let_go(r, s);
    pthread_mutex_lock(&r->lock);
    s->busy = 0;
    if (r->waiting) pthread_cond_signal(&r->rested);
    if (whole > 0) account(s, data, (size_t)whole, when);
    if (back && whole < 0) hand_back(r, s, data, 0, total);
    else if (back) hand_back(r, s, data + sent, (size_t)(whole - sent), total - (size_t)whole);
    else if (!nothing) {
        s->held = total - (size_t)whole;
        memcpy(s->line, data + whole, s->held);
    }
    pthread_mutex_unlock(&r->lock);
    return back;
}

static void *run(void *argument) {
    struct relay *r = argument;
    struct epoll_event ready[READY];
    for (;;) {
        int n = epoll_wait(r->poller, ready, READY, -1), back = 0;
        double when = now();
        for (int i = 0; i < n; i++) {
            if (ready[i].data.u64 == STOP) return NULL;
            pthread_mutex_lock(&r->lock);
            struct stream *s = find(r, ready[i].data.u64);
            int lent = s && s->state == LENT;
            if (lent) s->busy = 1;
            pthread_mutex_unlock(&r->lock);
            if (lent) back |= pass(r, s, when);
        }
        if (back) signal_to(r->wake);
    }
}

static void report(struct relay *r, struct stream *s, struct report *to) {
    *to = (struct report){s->key, s->bytes, s->events, s->last, room_of(r, s), s->unsent, s->unread, s->blocks,
                          {0}, {0}};
    size_t kept = s->blocks < BLOCKS ? s->blocks : BLOCKS;
    for (size_t i = 0; i < kept; i++) {
        struct block *block = &s->tail[(s->blocks - kept + i) % BLOCKS];
        to->tail[i] = block->bytes;
        to->sizes[i] = block->size;
    }
    s->bytes = s->events = 0;
    s->last = 0;
}

static void set_free(struct relay *r, struct stream *s) {
    s->state = FREE;
    s->key += (uint64_t)1 << 32;
    s->next = r->free;
    r->free = s;
}

// ---- for Python

void relay_close(struct relay *r) {
    if (r->stop >= 0 && r->thread) {
        signal_to(r->stop);
        pthread_join(r->thread, NULL);
    }
    for (size_t i = 0; r->streams && i < r->slots; i++) {
        if (r->streams[i].state == LENT) let_go(r, &r->streams[i]);
        for (int b = 0; b < BLOCKS; b++) free(r->streams[i].tail[b].bytes);
    }
    if (r->poller >= 0) close(r->poller);
    if (r->wake >= 0) close(r->wake);
    if (r->stop >= 0) close(r->stop);
    if (r->room != MAP_FAILED) munmap(r->room, r->slots * BLOCK);
    pthread_cond_destroy(&r->rested);
    pthread_mutex_destroy(&r->lock);
    free(r->streams);
    free(r);
}

// Start a thread for so many streams at most, which keeps to descriptors below `most_fd`. NULL: it cannot be done.
struct relay *relay_open(size_t slots, int most_fd) {
    struct relay *r = calloc(1, sizeof *r);
    if (!r) return NULL;
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->rested, NULL);
    r->slots = slots;
    r->most_fd = most_fd;
    r->poller = epoll_create1(EPOLL_CLOEXEC);
    r->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    r->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    r->streams = calloc(slots, sizeof *r->streams);
    r->room = mmap(NULL, slots * BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = STOP};
    sigset_t all, before;  // signals are the main thread's
    sigfillset(&all);
    int fit = r->poller >= 0 && r->wake >= 0 && r->stop >= 0 && r->streams && r->room != MAP_FAILED &&
              !epoll_ctl(r->poller, EPOLL_CTL_ADD, r->stop, &event) && !pthread_sigmask(SIG_SETMASK, &all, &before);
    if (fit) {
        for (size_t i = slots; i-- > 0;) {
            r->streams[i].key = i + 1;
            set_free(r, &r->streams[i]);
        }
        fit = !pthread_create(&r->thread, NULL, run, r);
        if (fit) pthread_setname_np(r->thread, "llmux relay");
        else r->thread = 0;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    if (fit) return r;
    relay_close(r);
    return NULL;
}

int relay_wake(const struct relay *r) { return r->wake; }

// Send what ends between two chunks, or nothing, and go on with the stream. Returns its key; 0: it was not lent, and nothing was sent.
uint64_t relay_lend(struct relay *r, int from, int to, const char *data, size_t length) {
    int own_from = fcntl(from, F_DUPFD_CLOEXEC, 0), own_to = fcntl(to, F_DUPFD_CLOEXEC, 0);
    ssize_t sent = -1;
    if (length <= BLOCK && own_from >= 0 && own_to >= 0 && own_from < r->most_fd && own_to < r->most_fd && r->free)
        sent = length ? send(own_to, data, length, MSG_DONTWAIT | MSG_NOSIGNAL) : 0;
    if (sent < 0) {
        if (own_from >= 0) close(own_from);
        if (own_to >= 0) close(own_to);
        return 0;
    }
    pthread_mutex_lock(&r->lock);
    struct stream *s = r->free;
    uint64_t key = s->key;
    r->free = s->next;
    s->state = LENT;
    s->from = own_from;
    s->to = own_to;
    s->blocks = s->held = s->unsent = s->unread = 0;
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = key};
    if ((size_t)sent < length || epoll_ctl(r->poller, EPOLL_CTL_ADD, own_from, &event)) {
        let_go(r, s);
        hand_back(r, s, data + sent, length - (size_t)sent, 0);
        signal_to(r->wake);
    }
    pthread_mutex_unlock(&r->lock);
    return key;
}

// Report what was passed on lately. What there is of `left` and of the tail is not for this call.
int relay_look(struct relay *r, uint64_t key, struct report *to) {
    pthread_mutex_lock(&r->lock);
    struct stream *s = find(r, key);
    if (s) report(r, s, to);
    pthread_mutex_unlock(&r->lock);
    return s != NULL;
}

// Take a stream back at once. The report's pointers hold until the next call of `relay_lend`.
int relay_take(struct relay *r, uint64_t key, struct report *to) {
    pthread_mutex_lock(&r->lock);
    struct stream *s = find(r, key);
    while (s && s->busy) {
        r->waiting = 1;
        pthread_cond_wait(&r->rested, &r->lock);
        r->waiting = 0;
    }
    int there = s && (s->state == LENT || s->state == BACK);
    if (there && s->state == LENT) {
        let_go(r, s);
        memcpy(room_of(r, s), s->line, s->held);
        s->unread = s->held;
        report(r, s, to);
        set_free(r, s);
    } else if (there) {
        report(r, s, to);
        s->state = STALE;
    }
    pthread_mutex_unlock(&r->lock);
    return there;
}

// Report the next stream that is handed back. 0: there is none, and `relay_wake` is readable when there is one again.
int relay_next(struct relay *r, struct report *to) {
    uint64_t count;
    int found = 0;
    pthread_mutex_lock(&r->lock);
    while (r->first && !found) {
        struct stream *s = r->first;
        r->first = s->next;
        found = s->state == BACK;
        if (found) report(r, s, to);
        set_free(r, s);
    }
    if (!found && read(r->wake, &count, sizeof count) < 0) {}
    pthread_mutex_unlock(&r->lock);
    return found;
}
