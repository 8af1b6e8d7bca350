/* Messages to the owner and small file writes. */
#include "helper.h"

int ctl = -1, sigfd = -1;

void *must(void *p) { if (!p) _exit(70); return p; }

void read_all(int fd, void *data, size_t n) {
    for (char *p = data; n;) {
        ssize_t k = read(fd, p, n);
        if (k < 0 && errno == EINTR) continue;
        if (k <= 0) _exit(0);
        p += k, n -= (size_t)k;
    }
}

/* Sends one message whole, in one call where it fits: a second one would wake the owner twice. */
void frame(int fd, char kind, const void *a, size_t na, const void *b, size_t nb) {
    char head[5];
    uint32_t n = (uint32_t)(1 + na + nb);
    memcpy(head, &n, 4), head[4] = kind;
    struct iovec parts[3] = {{head, 5}, {(void *)a, na}, {(void *)b, nb}}, *part = parts;
    while (part < parts + 3) {
        struct msghdr msg = {.msg_iov = part, .msg_iovlen = (size_t)(parts + 3 - part)};
        ssize_t k = sendmsg(fd, &msg, MSG_NOSIGNAL);
        if (k < 0 && errno == EINTR) continue;
        if (k < 0) _exit(0); /* the owner is gone */
        for (; part < parts + 3 && (size_t)k >= part->iov_len; part++) k -= (ssize_t)part->iov_len;
        if (part < parts + 3) part->iov_base = (char *)part->iov_base + k, part->iov_len -= (size_t)k;
    }
}

/* Says why the sandbox could not be made. The owner may be gone: the zygote, which also calls this, lives on. */
void fail(int fd, const char *what) {
    char text[512];
    int n = snprintf(text + 5, sizeof text - 5, "%d %s: %s", errno, what, strerror(errno));
    uint32_t size = 1 + (uint32_t)((size_t)n < sizeof text - 5 ? (size_t)n : sizeof text - 6);
    memcpy(text, &size, 4), text[4] = 'E';
    if (send(fd, text, 4 + size, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0) shutdown(fd, SHUT_WR);
}

void die(const char *what) {
    fail(ctl, what);
    _exit(1);
}

int seen(void) { /* the lowest that is free comes next */
    int next = dup(ctl);
    close(next);
    return next - FIRST_SEEN;
}

void ready(int n) {
    int fds[8];
    char word[5] = {1, 0, 0, 0, 'K'}, space[CMSG_SPACE(sizeof fds)] = {0};
    for (int i = 0; i < n; i++) fds[i] = FIRST_SEEN + i;
    size_t size = (size_t)n * sizeof *fds;
    struct iovec iov = {word, sizeof word};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = space, .msg_controllen = CMSG_SPACE(size)};
    struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
    c->cmsg_level = SOL_SOCKET, c->cmsg_type = SCM_RIGHTS, c->cmsg_len = CMSG_LEN(size);
    memcpy(CMSG_DATA(c), fds, size);
    if (sendmsg(ctl, &msg, MSG_NOSIGNAL) != sizeof word) _exit(0);
    while (n) close(fds[--n]);
}

int put(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_TRUNC | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) return -1;
    ssize_t n = (ssize_t)strlen(text), k = write(fd, text, (size_t)n);
    int saved = errno;
    close(fd), errno = saved;
    return k == n ? 0 : -1;
}
