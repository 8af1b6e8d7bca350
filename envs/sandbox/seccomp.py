"""The system call filter of everything in a sandbox, the broker included: a deny list, as a BPF program that the broker
puts on before it serves (Linux: `Documentation/userspace-api/seccomp_filter.rst`)."""

from __future__ import annotations

import errno
import functools
import socket
import struct

from envs.sandbox.syscalls import known, machine, number

_DENIED = """
    mount umount2 pivot_root chroot setns open_tree move_mount fsopen fsconfig fsmount fspick mount_setattr open_tree_attr
    ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd userfaultfd memfd_secret io_uring_setup io_uring_enter
    io_uring_register bpf perf_event_open kexec_load kexec_file_load init_module finit_module delete_module add_key
    request_key keyctl open_by_handle_at name_to_handle_at lookup_dcookie quotactl quotactl_fd acct swapon swapoff reboot
    settimeofday clock_settime clock_adjtime adjtimex syslog vhangup fanotify_init sethostname setdomainname iopl ioperm
    modify_ldt
"""
_UNCOUNTED_MEMORY = ("memfd_create", "shmget", "mq_open")
"""Ways to memory that neither `RLIMIT_AS` nor the tmpfs cap counts."""
_CLONE_SPACES = 0x7E02_0080
"""Flags of new namespaces: mount, cgroup, uts, ipc, user, pid, net, time."""
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
"""Others, vsock for one, are not in the network namespace."""

_X32 = 0x4000_0000
_ARCH = (0xC000_003E, 0xC000_00B7)
"""Of each of `syscalls.MACHINES`."""
_NR_AT, _ARCH_AT, _ARG0_AT = 0, 4, 16
"""Offsets in `struct seccomp_data`."""
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _ANSWER = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE = 0x7FFF_0000, 0x0005_0000


@functools.cache
def seccomp_filter(*, strict: bool) -> bytes:
    """The program, an array of `struct sock_filter`. strict: also refuse memory that no limit counts (there is no cgroup)."""
    code = [
        _op(_LOAD, _ARCH_AT),
        _op(_EQUAL, _ARCH[machine()], yes=1),
        _refuse(errno.ENOSYS),
        _op(_LOAD, _NR_AT),
        _op(_AT_LEAST, _X32, no=1),
        _refuse(errno.ENOSYS),
    ]
    for name in _DENIED.split():
        code += _deny(name, errno.EPERM)
    code += _deny("clone3", errno.ENOSYS)  # its flags are behind a pointer; libc falls back to clone
    for name in _UNCOUNTED_MEMORY if strict else ():
        code += _deny(name, errno.ENOSYS)
    for name in ("clone", "unshare"):
        has_spaces = [
            _op(_LOAD, _ARG0_AT),
            _op(_ANY_BIT, _CLONE_SPACES, no=1),
            _refuse(errno.EPERM),
            _op(_ANSWER, _ALLOW),
        ]
        code += [_op(_EQUAL, known(name), no=len(has_spaces)), *has_spaces]
    accept = [_op(_EQUAL, family, yes=len(_FAMILIES) - at) for at, family in enumerate(_FAMILIES)]
    other_family = [_op(_LOAD, _ARG0_AT), *accept, _refuse(errno.EAFNOSUPPORT)]
    code += [_op(_EQUAL, known("socket"), no=len(other_family)), *other_family, _op(_ANSWER, _ALLOW)]
    return b"".join(code)


def _op(code: int, value: int, *, yes: int = 0, no: int = 0) -> bytes:
    """One instruction; yes, no: how many to leave out then."""
    return struct.pack("=HBBI", code, yes, no, value)


def _refuse(error: int) -> bytes:
    return _op(_ANSWER, _REFUSE | error)


def _deny(name: str, error: int) -> list[bytes]:
    if number(name) is None:
        return []
    return [_op(_EQUAL, known(name), no=1), _refuse(error)]
