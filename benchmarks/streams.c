/* The client of many streams at once: counts their chunks and how long each was on its way.
 *
 *     streams PORT PATH STREAMS WARM_S SECONDS < BODY
 *
 * Each of STREAMS connections posts BODY, reads the answer to its end and posts again, for WARM_S and then SECONDS
 * seconds. Streams begin evenly over the first half of WARM_S. Prints "begin" and "end" around the SECONDS that count,
 * then one line of JSON: chunks and requests in that time, their delays in microseconds (of a chunk, from when it was
 * sent by upstream.c; of a request, from when it was sent until its first chunk), errors, and streams open at the end.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { READ = 65536, EVENTS = 512, DIGITS = 19, TAIL = 7, BUCKETS = 500000 }; /* 10 us each: up to 5 s */

struct stream {
    int fd;
    int64_t asked, begin;
    int digits;        /* of a chunk's time, those read so far; -1: not in one */
    int64_t sent;      /* that time */
    int waiting;       /* for the first chunk */
    char tail[TAIL];   /* the last that was read */
    int status;        /* characters of the status line read, up to 12 */
    char line[12];
};

static int epoll_fd, counting;
static struct sockaddr_in where;
static char *request;
static size_t request_size;
static long chunks, requests, errors, open_now;
static uint32_t *chunk_delay, *request_delay;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void note(uint32_t *delays, int64_t ns) {
    int64_t bucket = ns < 0 ? 0 : ns / 10000;
    delays[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
}

static double percentile(const uint32_t *delays, double share) {
    uint64_t all = 0, seen = 0;
    for (int i = 0; i < BUCKETS; i++) all += delays[i];
    for (int i = 0; i < BUCKETS; i++)
        if ((seen += delays[i]) && seen >= share * all) return 10.0 * i + 5.0;
    return 0.0;
}

static void hang_up(struct stream *s) {
    if (s->fd < 0) return;
    close(s->fd);
    s->fd = -1;
    open_now--;
}

static void ask(struct stream *s) {
    s->digits = -1;
    s->waiting = 1;
    memset(s->tail, 0, TAIL);
    s->status = 0;
    s->asked = now_ns();
    /* A request fits into an empty socket buffer. */
    if (send(s->fd, request, request_size, MSG_NOSIGNAL) != (ssize_t)request_size) {
        errors++;
        hang_up(s);
    }
}

static void begin(struct stream *s) {
    int one = 1;
    s->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (s->fd < 0 || connect(s->fd, (struct sockaddr *)&where, sizeof where)) {
        errors++;
        if (s->fd >= 0) close(s->fd);
        s->fd = -1;
        s->begin = now_ns() + 100000000;
        return;
    }
    open_now++;
    setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct epoll_event e = {EPOLLIN, {.ptr = s}};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, s->fd, &e);
    ask(s);
}

static void took_chunk(struct stream *s, int64_t now) {
    if (s->waiting && counting) {
        requests++;
        note(request_delay, now - s->asked);
    }
    s->waiting = 0;
    if (!counting) return;
    chunks++;
    note(chunk_delay, now - s->sent);
}

/* Read on in one answer; 1 when it has come to its end. */
static int take(struct stream *s, const char *data, size_t size, int64_t now) {
    for (size_t i = 0; s->status < 12 && i < size; i++) {
        s->line[s->status++] = data[i];
        if (s->status == 12 && memcmp(s->line + 8, " 200", 4)) {
            errors++;
            hang_up(s);
            return 0;
        }
    }
    for (size_t at = 0; at < size;) {
        if (s->digits < 0) {
            const char *found = memchr(data + at, '@', size - at);
            if (!found) break;
            at = found - data + 1;
            s->digits = 0;
            s->sent = 0;
        }
        while (at < size && s->digits < DIGITS) {
            s->sent = 10 * s->sent + (data[at++] - '0');
            s->digits++;
        }
        if (s->digits == DIGITS) {
            s->digits = -1;
            took_chunk(s, now);
        }
    }
    /* The end of a chunked body is the end of what was read. */
    size_t keep = size < TAIL ? TAIL - size : 0;
    memmove(s->tail, s->tail + TAIL - keep, keep);
    memcpy(s->tail + keep, data + size - (TAIL - keep), TAIL - keep);
    return !memcmp(s->tail, "\r\n0\r\n\r\n", TAIL);
}

static void heard(struct stream *s) {
    static char data[READ];
    ssize_t n = recv(s->fd, data, READ, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        errors++;
        hang_up(s);
        s->begin = now_ns() + 100000000;
        return;
    }
    if (take(s, data, n, now_ns())) ask(s);
    if (s->fd < 0) s->begin = now_ns() + 100000000;
}

static void until(int64_t end, struct stream *all, int count, int64_t *looked) {
    struct epoll_event events[EVENTS];
    for (int64_t now = now_ns(); now < end; now = now_ns()) {
        if (now - *looked >= 1000000) {
            *looked = now;
            for (int i = 0; i < count; i++)
                if (all[i].fd < 0 && all[i].begin <= now) begin(&all[i]);
        }
        int found = epoll_wait(epoll_fd, events, EVENTS, 1);
        for (int i = 0; i < found; i++)
            if (((struct stream *)events[i].data.ptr)->fd >= 0) heard(events[i].data.ptr);
    }
}

int main(int argc, char **argv) {
    if (argc != 6) {
        fprintf(stderr, "usage: streams PORT PATH STREAMS WARM_S SECONDS < BODY\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    static char body[READ];
    size_t size = fread(body, 1, sizeof body, stdin);
    request = malloc(size + 1024);
    request_size = sprintf(request,
        "POST %s HTTP/1.1\r\nhost: 127.0.0.1:%s\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n",
        argv[2], argv[1], size);
    memcpy(request + request_size, body, size);
    request_size += size;
    where = (struct sockaddr_in){
        .sin_family = AF_INET, .sin_port = htons(atoi(argv[1])), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    chunk_delay = calloc(BUCKETS, sizeof *chunk_delay);
    request_delay = calloc(BUCKETS, sizeof *request_delay);
    epoll_fd = epoll_create1(0);
    int count = atoi(argv[3]);
    int64_t start = now_ns(), looked = 0, warm = atof(argv[4]) * 1e9, length = atof(argv[5]) * 1e9;
    struct stream *all = calloc(count, sizeof *all);
    for (int i = 0; i < count; i++) {
        all[i].fd = -1;
        all[i].begin = start + warm / 2 * i / count;
    }
    until(start + warm, all, count, &looked);
    counting = 1;
    errors = 0;
    puts("begin");
    fflush(stdout);
    int64_t began = now_ns();
    until(began + length, all, count, &looked);
    int64_t ended = now_ns();
    puts("end");
    fflush(stdout);
    printf("{\"seconds\":%.6f,\"chunks\":%ld,\"requests\":%ld,\"errors\":%ld,\"open\":%ld,"
           "\"chunk_p50_us\":%.0f,\"chunk_p99_us\":%.0f,\"request_p50_us\":%.0f,\"request_p99_us\":%.0f}\n",
           (ended - began) / 1e9, chunks, requests, errors, open_now, percentile(chunk_delay, 0.5),
           percentile(chunk_delay, 0.99), percentile(request_delay, 0.5), percentile(request_delay, 0.99));
    return 0;
}
