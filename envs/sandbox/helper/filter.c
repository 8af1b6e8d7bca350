/* The system call filter of everything in a sandbox, the broker included: a deny list. */
#include "helper.h"
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>

#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
#else
#error "codeworld's sandbox knows x86_64 and aarch64"
#endif

static const int denied[] = {
    SYS_mount, SYS_umount2, SYS_pivot_root, SYS_chroot, SYS_setns, SYS_ptrace, SYS_process_vm_readv,
    SYS_process_vm_writev, SYS_kcmp, SYS_bpf, SYS_perf_event_open, SYS_userfaultfd, SYS_kexec_load, SYS_kexec_file_load,
    SYS_init_module, SYS_finit_module, SYS_delete_module, SYS_add_key, SYS_request_key, SYS_keyctl,
    SYS_open_by_handle_at, SYS_name_to_handle_at, SYS_quotactl, SYS_acct, SYS_swapon, SYS_swapoff, SYS_reboot,
    SYS_settimeofday, SYS_clock_settime, SYS_clock_adjtime, SYS_adjtimex, SYS_syslog, SYS_vhangup, SYS_fanotify_init,
    SYS_sethostname, SYS_setdomainname,
    /* by number, which every architecture shares since 424: io_uring, open_tree to fspick, pidfd_getfd, mount_setattr,
     * quotactl_fd, memfd_secret, open_tree_attr */
    425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442, 443, 447, 467,
#ifdef SYS_lookup_dcookie
    SYS_lookup_dcookie,
#endif
#ifdef __x86_64__
    SYS_iopl, SYS_ioperm, SYS_modify_ldt,
#endif
};

static struct sock_filter code[256];
static unsigned ncode;

static void bpf(uint16_t op, uint8_t yes, uint8_t no, uint32_t k) {
    if (ncode == sizeof code / sizeof *code) errno = ENOMEM, die("seccomp", "");
    code[ncode++] = (struct sock_filter){op, yes, no, k};
}

static void answer(uint32_t what) { bpf(BPF_RET | BPF_K, 0, 0, what); }

static void deny(int nr, int error) {
    bpf(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, (uint32_t)nr);
    answer(SECCOMP_RET_ERRNO | (uint32_t)error);
}

/* no_rlimit_escape: also refuse memory that neither RLIMIT_AS nor the tmpfs cap counts (there is no cgroup). */
void filter(int no_rlimit_escape) {
    const uint32_t spaces = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWUSER |
                            CLONE_NEWCGROUP | 0x80 /* time */;
    const uint32_t arg0 = offsetof(struct seccomp_data, args[0]);
    bpf(BPF_LD | BPF_W | BPF_ABS, 0, 0, offsetof(struct seccomp_data, arch));
    bpf(BPF_JMP | BPF_JEQ | BPF_K, 1, 0, ARCH);
    answer(SECCOMP_RET_ERRNO | ENOSYS);
    bpf(BPF_LD | BPF_W | BPF_ABS, 0, 0, offsetof(struct seccomp_data, nr));
    bpf(BPF_JMP | BPF_JGE | BPF_K, 0, 1, 0x40000000u); /* x32 */
    answer(SECCOMP_RET_ERRNO | ENOSYS);
    for (unsigned i = 0; i < sizeof denied / sizeof *denied; i++) deny(denied[i], EPERM);
    deny(435 /* clone3: its flags are behind a pointer; libc falls back to clone */, ENOSYS);
    if (no_rlimit_escape) deny(SYS_memfd_create, ENOSYS), deny(SYS_shmget, ENOSYS), deny(SYS_mq_open, ENOSYS);
    for (int i = 0; i < 2; i++) {
        bpf(BPF_JMP | BPF_JEQ | BPF_K, 0, 4, i ? SYS_unshare : SYS_clone);
        bpf(BPF_LD | BPF_W | BPF_ABS, 0, 0, arg0);
        bpf(BPF_JMP | BPF_JSET | BPF_K, 0, 1, spaces);
        answer(SECCOMP_RET_ERRNO | EPERM);
        answer(SECCOMP_RET_ALLOW);
    }
    bpf(BPF_JMP | BPF_JEQ | BPF_K, 0, 6, SYS_socket); /* vsock and others are not in the network namespace */
    bpf(BPF_LD | BPF_W | BPF_ABS, 0, 0, arg0);
    bpf(BPF_JMP | BPF_JEQ | BPF_K, 4, 0, AF_UNIX);
    bpf(BPF_JMP | BPF_JEQ | BPF_K, 3, 0, AF_INET);
    bpf(BPF_JMP | BPF_JEQ | BPF_K, 2, 0, AF_INET6);
    bpf(BPF_JMP | BPF_JEQ | BPF_K, 1, 0, AF_NETLINK);
    answer(SECCOMP_RET_ERRNO | EAFNOSUPPORT);
    answer(SECCOMP_RET_ALLOW);
    struct sock_fprog prog = {(unsigned short)ncode, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) die("no_new_privs", "");
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog)) die("seccomp", "");
}
