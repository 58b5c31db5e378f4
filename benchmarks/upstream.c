/* An engine that costs nothing: streams of server-sent events at a pace, on many ports, from one thread.
 *
 *     upstream PORT COUNT        listens on COUNT consecutive ports of 127.0.0.1, until SIGTERM or its parent's end
 *
 * A POST says in its body how many chunks it wants (`max_tokens`) and how many microseconds lie between two (`seed`,
 * since every proxy passes that on). The first chunk comes at once. Each carries the time at which it was sent, as
 * "@" and nanoseconds of CLOCK_MONOTONIC, so that a client on the same machine knows how long it was on its way.
 * A stream that nobody reads makes no new chunks until what was sent has gone. `GET /end` brings all streams to their
 * end at once, also those whose relay has not noticed that its client left; `GET /stats` counts.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { REQUEST = 65536, REPLY = 2048, EVENTS = 512 };

struct conn {
    int fd, listens;
    char *in; /* the request as far as it has come */
    size_t got, room;
    char out[REPLY]; /* of the answer, what the socket did not take */
    size_t from, until;
    long left;       /* chunks still to send; 0: no stream */
    int64_t every, due;
    int usage;
    long at; /* place in the heap of due streams, -1: none */
};

static int epoll_fd, timer_fd;
static struct conn **heap;
static long heaped, heap_room;
static unsigned long long chunks_sent, streams_begun, held_up;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- streams by when their next chunk is due */

static void put(long i, struct conn *c) {
    heap[i] = c;
    c->at = i;
}

static void settle(long i, struct conn *c) {
    while (i > 0 && heap[(i - 1) / 2]->due > c->due) {
        put(i, heap[(i - 1) / 2]);
        i = (i - 1) / 2;
    }
    for (;;) {
        long child = 2 * i + 1;
        if (child >= heaped) break;
        if (child + 1 < heaped && heap[child + 1]->due < heap[child]->due) child++;
        if (heap[child]->due >= c->due) break;
        put(i, heap[child]);
        i = child;
    }
    put(i, c);
}

static void schedule(struct conn *c, int64_t due) {
    c->due = due;
    if (c->at >= 0) {
        settle(c->at, c);
        return;
    }
    if (heaped == heap_room) {
        heap_room = heap_room ? 2 * heap_room : 1024;
        heap = realloc(heap, heap_room * sizeof *heap);
    }
    settle(heaped++, c);
}

static void unschedule(struct conn *c) {
    long i = c->at;
    if (i < 0) return;
    c->at = -1;
    struct conn *last = heap[--heaped];
    if (last != c) settle(i, last);
}

static void arm(void) {
    static int64_t armed = -1;
    int64_t due = heaped ? heap[0]->due : 0;
    if (due == armed) return;
    armed = due;
    struct itimerspec when = {{0, 0}, {due / 1000000000, due % 1000000000}};
    timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
}

/* ---- one connection */

static void drop(struct conn *c) {
    unschedule(c);
    close(c->fd);
    free(c->in);
    free(c);
}

static void watch(struct conn *c, int op, uint32_t events) {
    struct epoll_event e = {events, {.ptr = c}};
    epoll_ctl(epoll_fd, op, c->fd, &e);
}

/* Send what there is; 0 when the connection has gone. What does not fit now is kept. */
static int push(struct conn *c) {
    while (c->from < c->until) {
        ssize_t n = send(c->fd, c->out + c->from, c->until - c->from, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) {
            watch(c, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
            return 1;
        }
        if (n <= 0) return 0;
        c->from += n;
    }
    c->from = c->until = 0;
    return 1;
}

static void say(struct conn *c, const char *text, size_t size) {
    memcpy(c->out + c->until, text, size);
    c->until += size;
}

static void say_event(struct conn *c, const char *text, size_t size) {
    char length[16];
    say(c, length, sprintf(length, "%zx\r\n", size));
    say(c, text, size);
    say(c, "\r\n", 2);
}

#define ID "{\"id\":\"chatcmpl-0123456789abcdef0123456789abcdef\",\"object\":\"chat.completion.chunk\"," \
           "\"created\":1795344878,\"model\":\"m\",\"choices\":["

static int chunk(struct conn *c) {
    char event[512];
    c->left--;
    say_event(c, event, sprintf(event,
        "data: " ID "{\"index\":0,\"delta\":{\"content\":\"@%019lld\"},\"logprobs\":null,\"finish_reason\":%s}]}\n\n",
        (long long)now_ns(), c->left ? "null" : "\"stop\""));
    chunks_sent++;
    if (!c->left) {
        if (c->usage)
            say_event(c, event, sprintf(event, "data: " ID
                "],\"usage\":{\"prompt_tokens\":250,\"completion_tokens\":1,\"total_tokens\":251}}\n\n"));
        say_event(c, "data: [DONE]\n\n", 14);
        say(c, "0\r\n\r\n", 5);
    }
    return push(c);
}

static void whole(struct conn *c, int status, const char *body) {
    char head[512];
    say(c, head, snprintf(head, sizeof head,
        "HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n%s", status, strlen(body), body));
}

/* Let every stream send its last chunk now; one that is held up is cut off. */
static void end_all(void) {
    for (long i = heaped - 1; i >= 0; i--) {
        struct conn *c = heap[i];
        if (c->from < c->until) shutdown(c->fd, SHUT_RDWR);
        c->left = 1;
        c->due = 1; /* all alike: still a heap */
    }
}

static int get(struct conn *c) {
    char body[256];
    if (!strncmp(c->in, "GET /stats", 10)) {
        snprintf(body, sizeof body, "{\"chunks\":%llu,\"streams\":%llu,\"held_up\":%llu,\"open\":%ld}", chunks_sent,
                 streams_begun, held_up, heaped);
        whole(c, 200, body);
    } else if (!strncmp(c->in, "GET /end", 8)) {
        end_all();
        whole(c, 200, "{}");
    } else if (!strncmp(c->in, "GET /v1/models", 14)) {
        whole(c, 200, "{\"object\":\"list\",\"data\":[{\"id\":\"m\",\"object\":\"model\",\"created\":1,"
                      "\"owned_by\":\"x\",\"max_model_len\":131072}]}");
    } else {
        whole(c, strncmp(c->in, "GET /health", 11) ? 404 : 200, "{}");
    }
    return push(c);
}

static long number_after(const char *body, size_t size, const char *key, long otherwise) {
    const char *found = memmem(body, size, key, strlen(key));
    if (!found) return otherwise;
    found += strlen(key);
    while (*found == ' ' || *found == ':') found++;
    return atol(found);
}

static int post(struct conn *c, const char *body, size_t size) {
    static const char head[] =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
    const char *usage = memmem(body, size, "\"include_usage\"", 15);
    c->usage = usage && memmem(usage, body + size - usage < 24 ? body + size - usage : 24, "true", 4);
    c->left = number_after(body, size, "\"max_tokens\"", 1);
    c->every = number_after(body, size, "\"seed\"", 1) * 1000;
    if (c->left < 1) c->left = 1;
    if (c->every < 1000) c->every = 1000;
    streams_begun++;
    say(c, head, sizeof head - 1);
    if (!chunk(c)) return 0;
    if (c->left) schedule(c, now_ns() + c->every);
    return 1;
}

/* Answer each whole request that has come; 0 when the connection is to be dropped. */
static int answer(struct conn *c) {
    while (c->got && !c->left && c->from == c->until) {
        c->in[c->got] = 0;
        char *end = memmem(c->in, c->got, "\r\n\r\n", 4);
        if (!end) return 1;
        size_t head = end + 4 - c->in, length = 0;
        *end = 0;
        char *field = strcasestr(c->in, "\r\ncontent-length:");
        if (field) length = strtoul(field + 17, NULL, 10);
        *end = '\r';
        if (c->got < head + length) return 1;
        if (!(c->in[0] == 'G' ? get(c) : post(c, c->in + head, length))) return 0;
        c->got -= head + length;
        memmove(c->in, c->in + head + length, c->got);
    }
    return 1;
}

static int heard(struct conn *c) {
    for (;;) {
        if (c->room - c->got < REQUEST / 2) c->in = realloc(c->in, (c->room += REQUEST) + 1);
        ssize_t n = recv(c->fd, c->in + c->got, c->room - c->got, 0);
        if (n < 0 && errno == EAGAIN) return 1;
        if (n <= 0) return 0;
        c->got += n;
        if (!answer(c)) return 0;
    }
}

static void welcome(struct conn *listener) {
    int fd, one = 1;
    while ((fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        struct conn *c = calloc(1, sizeof *c);
        c->fd = fd;
        c->at = -1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        watch(c, EPOLL_CTL_ADD, EPOLLIN);
    }
}

/* The chunks that are due. A stream whose last chunk still waits to be read skips its turn. */
static void stream(void) {
    int64_t now = now_ns();
    while (heaped && heap[0]->due <= now) {
        struct conn *c = heap[0];
        if (c->from < c->until) {
            held_up++;
            schedule(c, now + c->every);
            continue;
        }
        if (!chunk(c)) {
            drop(c);
            continue;
        }
        if (c->left) {
            schedule(c, c->due + c->every > now ? c->due + c->every : now + c->every);
        } else {
            unschedule(c);
            if (!answer(c)) drop(c);
        }
    }
}

static void serve(struct conn *c, uint32_t events) {
    if (c->listens) {
        welcome(c);
        return;
    }
    if (events & EPOLLOUT) {
        if (!push(c)) {
            drop(c);
            return;
        }
        if (c->from == c->until) {
            watch(c, EPOLL_CTL_MOD, EPOLLIN);
            if (!answer(c)) {
                drop(c);
                return;
            }
        }
    }
    if (events & ~EPOLLOUT && !heard(c)) drop(c);
}

static void listen_on(int port) {
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    struct conn *c = calloc(1, sizeof *c);
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    c->listens = 1;
    setsockopt(c->fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(c->fd, (struct sockaddr *)&where, sizeof where) || listen(c->fd, 4096)) {
        fprintf(stderr, "upstream: cannot listen on port %d: %s\n", port, strerror(errno));
        exit(1);
    }
    watch(c, EPOLL_CTL_ADD, EPOLLIN);
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: upstream PORT COUNT\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    epoll_fd = epoll_create1(0);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event due = {EPOLLIN, {.ptr = NULL}}, events[EVENTS];
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &due);
    for (int n = 0; n < atoi(argv[2]); n++) listen_on(atoi(argv[1]) + n);
    puts("listening");
    fflush(stdout);
    for (;;) {
        arm();
        int found = epoll_wait(epoll_fd, events, EVENTS, -1), timed = 0;
        for (int i = 0; i < found; i++) {
            if (events[i].data.ptr) {
                serve(events[i].data.ptr, events[i].events);
            } else {
                uint64_t rings;
                timed = read(timer_fd, &rings, sizeof rings) > 0;
            }
        }
        if (timed) stream(); /* last, since it may drop connections that have events of their own */
    }
}
