/* What the parts of the helper share. The helper is one static binary with these uses:
 *
 * helper zygote FD       Reads requests on the seqpacket socket FD (launch.c), the control stream of the new sandbox
 *                        attached. Clones the sandbox, reaps it and cleans up after it; the control stream reaches end
 *                        of file on the owner's side only after that. Ends, and every sandbox with it, when FD closes
 *                        or the process that started it dies.
 * helper calls FD        Carries out one list of system calls, read from the stream FD, and answers there.
 * helper broker SOCK DIR PID 1 of a container: connects to the unix socket SOCK and serves the same control stream.
 */
#pragma once
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define FRAME_MAX (8u << 20)

extern int ctl;   /* the control stream of this sandbox */
extern int sigfd; /* SIGCHLD of this process */
enum { FIRST_SEEN = 5 }; /* the first of the descriptors that the owner gets of this sandbox (take_places) */

/* wire.c */
void *must(void *p);                              /* ends the process when an allocation failed */
void read_all(int fd, void *data, size_t n);      /* ends the process when the owner is gone, as does frame */
void frame(int fd, char kind, const struct iovec *body, size_t parts); /* five parts at most */
void fail(int fd, const char *what);
__attribute__((noreturn)) void die(const char *what);
void ready(int last);                             /* says that it is; sends and closes FIRST_SEEN to last */
void watch_children(void);                        /* opens sigfd */
int put(const char *path, const char *text);      /* replaces the text of an existing file; -1 with errno */

/* launch.c */
int zygote(int from, char *line, size_t room);    /* its command line, so that it can be changed */
int carry_out(int stream);
void take_places(int stream, int space);

/* broker.c */
__attribute__((noreturn)) void broker(const char *view);
