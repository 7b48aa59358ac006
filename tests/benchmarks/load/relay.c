// What any proxy has to do, and nothing else: bytes from one socket to the other, epoll, one thread.
//
//     relay PORT ENGINE
//
// For each connection to PORT one is opened to ENGINE on this machine. Nothing is parsed, counted or chosen: no
// proxy on sockets and epoll costs less, so what it costs is the floor of what is measured here. It waits for a side
// that does not read.
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { EVENTS = 512, READ = 65536 };

typedef struct side {
    int fd;
    struct side *other;  // NULL: the listener
} side;

static int poller;

static side *add(int fd, side *other) {
    int one = 1;
    side *made = malloc(sizeof *made);
    *made = (side){fd, other};
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = made};
    epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
    return made;
}

static struct sockaddr_in loopback(const char *port) {
    return (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port)),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

static void accept_all(int listener, const struct sockaddr_in *engine) {
    for (int fd; (fd = accept(listener, NULL, NULL)) >= 0;) {
        int there = socket(AF_INET, SOCK_STREAM, 0);
        if (there < 0 || connect(there, (const struct sockaddr *)engine, sizeof *engine)) {
            close(fd), close(there);
            continue;
        }
        side *client = add(fd, NULL);
        client->other = add(there, client);
    }
}

// A pair that has ended stays in memory: events of this turn may name it. Its sockets are gone, and so few come.
static void pass(side *from) {
    static char bytes[READ];
    if (from->fd < 0) return;
    ssize_t n = recv(from->fd, bytes, sizeof bytes, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN) return;
    for (ssize_t at = 0; at < n;) {
        ssize_t sent = send(from->other->fd, bytes + at, (size_t)(n - at), MSG_NOSIGNAL);
        if (sent < 0) n = 0;
        else at += sent;
    }
    if (n <= 0) {
        close(from->fd), close(from->other->fd);
        from->fd = from->other->fd = -1;
    }
}

int main(int count, char **arguments) {
    if (count != 3) return fprintf(stderr, "usage: relay PORT ENGINE\n"), 2;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in address = loopback(arguments[1]), engine = loopback(arguments[2]);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096))
        return perror("relay"), 1;
    poller = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL}, events[EVENTS];
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int n = epoll_wait(poller, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr) pass(events[i].data.ptr);
            else accept_all(listener, &engine);
        }
    }
}
