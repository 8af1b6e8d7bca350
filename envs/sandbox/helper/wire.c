/* Messages to the owner and small file writes. */
#include "helper.h"

int ctl = -1, sigfd = -1;

void *must(void *p) { if (!p) _exit(70); return p; }

void read_all(int fd, void *data, size_t n) {
    for (ssize_t k; n; data = (char *)data + k, n -= (size_t)k)
        if ((k = recv(fd, data, n, MSG_WAITALL)) <= 0) _exit(0); /* less, when it was frozen meanwhile */
}

/* Sends one message whole, in one call where it fits: a second one would wake the owner twice. */
void frame(int fd, char kind, const struct iovec *body, size_t parts) {
    char head[5];
    struct iovec all[6] = {{head, sizeof head}}, *part = all, *end = all + 1 + parts;
    uint32_t n = 1;
    for (size_t i = 0; i < parts; i++) all[i + 1] = body[i], n += (uint32_t)body[i].iov_len;
    memcpy(head, &n, 4), head[4] = kind;
    while (part < end) {
        struct msghdr msg = {.msg_iov = part, .msg_iovlen = (size_t)(end - part)};
        ssize_t k = sendmsg(fd, &msg, MSG_NOSIGNAL);
        if (k < 0) _exit(0); /* the owner is gone */
        for (; part < end && (size_t)k >= part->iov_len; part++) k -= (ssize_t)part->iov_len;
        if (part < end) part->iov_base = (char *)part->iov_base + k, part->iov_len -= (size_t)k;
    }
}

/* Says why the sandbox could not be made. The owner may be gone: the zygote, which also calls this, lives on. */
void fail(int fd, const char *what) {
    char text[512];
    snprintf(text + 5, sizeof text - 5, "%d %s: %s", errno, what, strerror(errno));
    uint32_t size = 1 + (uint32_t)strlen(text + 5);
    memcpy(text, &size, 4), text[4] = 'E';
    if (send(fd, text, 4 + size, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0) shutdown(fd, SHUT_WR);
}

void die(const char *what) {
    fail(ctl, what);
    _exit(1);
}

void ready(int last) {
    int fds[8], n = last - FIRST_SEEN + 1;
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

void watch_children(void) {
    sigset_t chld;
    sigemptyset(&chld), sigaddset(&chld, SIGCHLD);
    signal(SIGPIPE, SIG_IGN);
    sigfd = sigprocmask(SIG_SETMASK, &chld, NULL) ? -1 : signalfd(-1, &chld, SFD_CLOEXEC | SFD_NONBLOCK);
    if (sigfd < 0) die("signalfd");
}

int put(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_TRUNC | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) return -1;
    ssize_t n = (ssize_t)strlen(text), k = write(fd, text, (size_t)n);
    int saved = errno;
    close(fd), errno = saved;
    return k == n ? 0 : -1;
}
