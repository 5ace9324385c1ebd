"""Saved labs: a machine booted once, then copied on write by every call.

A saved lab is two files: `ram`, the guest's memory, and `state`, the rest.
They are made without names and get them only when they are whole, so a killed
save leaves nothing. A call opens them before it uses them, so one that is
dropped meanwhile stays whole for it.
"""

import fcntl
import hashlib
import os
import shutil
import sys
import time

from machine import LabError, Machine

BOOT_SILENCE_S = 60
KEPT = 4


def folder_for(build, cpus, memory_mib):
    """Where the saved lab lies. The time of the build is in it: a rebuilt lab is another."""
    made = os.stat(f"{build}/root.ext4").st_mtime_ns
    key = hashlib.sha256(f"{os.path.realpath(build)} {made}".encode()).hexdigest()[:12]
    return f"{store(build, memory_mib)}/vmctl-lab-{key}-c{cpus}-m{memory_mib}"


def store(build, memory_mib):
    """Memory where there is enough (a container's /dev/shm may hold 64 MiB), else the disk."""
    try:
        room = os.statvfs("/dev/shm")
        if room.f_blocks * room.f_frsize >= memory_mib << 20:
            return "/dev/shm"
    except OSError:
        pass
    return os.path.dirname(os.path.dirname(build))


def open_saved(build, cpus, memory_mib):
    """(ram_fd, state_fd) of a lab ready to restore; boots and saves one if there is none."""
    folder = folder_for(build, cpus, memory_mib)
    if not (fds := try_open(folder)):
        with open(f"{build}/save.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (fds := try_open(folder)):
                make(build, cpus, memory_mib, folder)
                fds = try_open(folder)
    if not fds:
        raise LabError(f"the saved lab in {folder} has vanished")
    os.utime(folder)
    return fds


def try_open(folder):
    try:
        state = os.open(f"{folder}/state", os.O_RDONLY | os.O_CLOEXEC)
        # QEMU opens the memory for writing even for a private view of it.
        return os.open(f"{folder}/ram", os.O_RDWR | os.O_CLOEXEC), state
    except FileNotFoundError:
        return None


def drop(folder):
    """Removes a saved lab: there is none any more, so the next call makes it anew."""
    shutil.rmtree(folder, ignore_errors=True)


def make(build, cpus, memory_mib, folder):
    start = time.monotonic()
    parent = os.path.dirname(folder)
    drop_old(parent)
    shutil.rmtree(folder, ignore_errors=True)
    ram = os.open(parent, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.ftruncate(ram, memory_mib << 20)
    state = os.open(parent, os.O_TMPFILE | os.O_RDWR, 0o600)
    machine = Machine(build, cpus, memory_mib, ram, *empty_disks(build), saving=True)
    try:
        for kind, _ in machine.frames(BOOT_SILENCE_S):
            if kind == b"R":
                break
        time.sleep(0.3)  # let it go idle, so that every copy starts idle
        machine.save(state)
    finally:
        machine.kill()
    os.mkdir(folder, 0o700)
    with open(f"{folder}/build", "w") as file:
        file.write(build)
    folder_fd = os.open(folder, os.O_DIRECTORY)
    for fd, name in ((state, "state"), (ram, "ram")):
        # Only with a dir_fd does Python follow the link to a nameless file.
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder_fd, follow_symlinks=True)
        os.close(fd)
    os.close(folder_fd)
    print(f"lab: booted and saved ({cpus} CPUs, {memory_mib} MiB) in {time.monotonic() - start:.1f} s", file=sys.stderr)


def drop_old(parent):
    """Memory is dear: only the few saved labs last used stay, and none of a build that is gone."""
    folders = [f"{parent}/{name}" for name in os.listdir(parent) if name.startswith("vmctl-lab-")]
    folders.sort(key=os.path.getmtime, reverse=True)
    for age, folder in enumerate(folders):
        try:
            with open(f"{folder}/build") as file:
                gone = not os.path.exists(file.read())
        except FileNotFoundError:
            gone = True
        if gone or age >= KEPT - 1:
            drop(folder)


def empty_disks(build):
    from machine import PAYLOAD_BYTES

    payload = os.memfd_create("payload")
    os.ftruncate(payload, PAYLOAD_BYTES)
    return payload, scratch_disk(build)


def scratch_disk(build):
    from machine import SCRATCH_BYTES

    fd = os.open(build, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.ftruncate(fd, SCRATCH_BYTES)
    return fd
