/* What the parts of the helper share. The helper is one static binary with these uses:
 *
 * helper zygote FD DIR W  Reads requests on the seqpacket socket FD. A request is a list of operations (launch.c), the
 *                         control stream of the new sandbox attached. Clones the sandbox, reaps it and removes its
 *                         cgroups; the control stream reaches end of file on the owner's side only after that. Ends,
 *                         and every sandbox with it, when FD closes or the process that started it dies. What sandboxes
 *                         write is mounted over DIR, in a mount namespace of the zygote's own. W: "root", or
 *                         "user" for one who can be nobody else and needs a user namespace for everything.
 * helper broker SOCK DIR  PID 1 of a container: connects to the unix socket SOCK and serves the same control stream.
 * helper store FD NAME ID OPTIONS BASE ORIGIN LAYERS...
 *                         What a container stands on, in the mount namespace of the engine: a tmpfs at NAME with these
 *                         options, overlays in it for the user ID (launch.c). Answers on the stream FD as a broker does.
 * helper free PATH...     Unmounts each, with all that is mounted below it, and removes its directory.
 */
#ifndef HELPER_H
#define HELPER_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
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
extern int seen_fds[3], nseen; /* what the owner gets to see of this sandbox: origin, upper, root (launch.c) */

/* wire.c */
void *must(void *p);                              /* ends the process when an allocation failed */
void read_all(int fd, void *data, size_t n);      /* ends the process when the owner is gone, as does frame */
void frame(int fd, char kind, const void *a, size_t na, const void *b, size_t nb);
void fail(int fd, const char *what, const char *arg);
void ready(void);
__attribute__((noreturn)) void die(const char *what, const char *arg);
int put(const char *path, const char *text);      /* writes a short text to an existing file; -1 with errno */

/* launch.c */
int zygote(int from, const char *dir, const char *user);
int host_store(char *name, uid_t owner, const char *options, const char *base, const char *origin, char **lists);
void free_store(const char *name);

/* main.c */
extern char *title;     /* what its command line is read from, so that it can be changed */
extern size_t title_room;

/* broker.c */
void prepare_broker(const char *dir, const char *view);
void filter(void);
__attribute__((noreturn)) void broker(void);

#endif
