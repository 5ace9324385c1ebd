"""Saved labs: a machine booted once, then copied on write by every call.

A saved lab is two files: `ram`, the guest's memory, and `state`, the rest.
They are made without names and get them only when they are whole, so a killed
save leaves nothing. A call holds them open before it uses them, so one that is
dropped meanwhile stays whole for it.
"""

import fcntl
import hashlib
import os
import shutil
import sys
import time

from machine import EXTRA_BYTES, PAYLOAD_BYTES, SCRATCH_BYTES, LabError, Machine

BOOT_SILENCE_S = 60
KEPT = 4
# What a fresh lab has touched of its memory, with room to spare.
SAVED_BYTES = 600 << 20
IN_MEMORY = "/dev/shm"


def open_saved(build, cpus, memory_mib):
    """(ram_fd, state_fd) of a lab ready to restore; boots and saves one if there is none."""
    with open(f"{build}/save.lock", "w") as lock:
        for _ in range(2):
            for folder in folders(build, cpus, memory_mib):
                if fds := open_files(folder):
                    return fds
            # One call makes it, the others wait for it here.
            fcntl.flock(lock, fcntl.LOCK_EX)
        return make(build, cpus, memory_mib)


def folders(build, cpus, memory_mib):
    """Where it may lie: in memory, or on disk where that is short (as in containers)."""
    # The time of the build is in the name: a lab built again is another.
    made = os.stat(f"{build}/root.ext4").st_mtime_ns
    # And so is what the machine is made of.
    with open(Machine.__init__.__code__.co_filename, "rb") as source:
        machine = hashlib.sha256(source.read()).hexdigest()
    key = hashlib.sha256(f"{build} {made} {machine}".encode()).hexdigest()[:12]
    return [f"{parent}/vmctl-lab-{key}-c{cpus}-m{memory_mib}" for parent in (IN_MEMORY, build)]


def open_files(folder):
    try:
        # Last made, first opened. QEMU opens it for writing even for a private view.
        ram = os.open(f"{folder}/ram", os.O_RDWR | os.O_CLOEXEC)
        state = os.open(f"{folder}/state", os.O_RDONLY | os.O_CLOEXEC)
        os.utime(folder)
        return ram, state
    except FileNotFoundError:
        return None


def drop(build, cpus, memory_mib):
    """Forgets a saved lab that does not restore; the next call makes it anew."""
    for folder in folders(build, cpus, memory_mib):
        shutil.rmtree(folder, ignore_errors=True)


def make(build, cpus, memory_mib):
    start = time.monotonic()
    drop_old()
    in_memory, on_disk = folders(build, cpus, memory_mib)
    folder = in_memory if room_in_memory() >= SAVED_BYTES else on_disk
    ram = unnamed_file(os.path.dirname(folder), memory_mib << 20)
    state = unnamed_file(os.path.dirname(folder), 0)
    payload, scratch, extra = (unnamed_file(build, size) for size in (PAYLOAD_BYTES, SCRATCH_BYTES, EXTRA_BYTES))
    machine = Machine(build, cpus, memory_mib, ram, payload, scratch, extra, saving=True)
    try:
        for kind, _ in machine.frames(BOOT_SILENCE_S):
            if kind == b"R":
                break
        time.sleep(0.3)  # every copy starts as idle as this one is now
        machine.save(state)
    finally:
        machine.kill()
    publish(folder, build, state=state, ram=ram)
    for fd in (payload, scratch, extra):
        os.close(fd)
    print(f"lab: booted and saved ({cpus} CPUs, {memory_mib} MiB) in {time.monotonic() - start:.1f} s", file=sys.stderr)
    os.lseek(state, 0, os.SEEK_SET)
    return ram, state


def publish(folder, build, **files):
    shutil.rmtree(folder, ignore_errors=True)
    os.mkdir(folder, 0o700)
    with open(f"{folder}/build", "w") as file:
        file.write(build)
    folder_fd = os.open(folder, os.O_DIRECTORY)
    for name, fd in files.items():
        # Only with a dir_fd does Python follow the link to a file without a name.
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder_fd, follow_symlinks=True)
    os.close(folder_fd)


def drop_old():
    """Memory is dear: the few saved labs last used stay, and none of a build that is gone."""
    if not os.path.isdir(IN_MEMORY):
        return
    found = [f"{IN_MEMORY}/{name}" for name in os.listdir(IN_MEMORY) if name.startswith("vmctl-lab-")]
    found.sort(key=os.path.getmtime, reverse=True)
    for age, folder in enumerate(found):
        try:
            with open(f"{folder}/build") as file:
                build_is_gone = not os.path.exists(file.read())
        except FileNotFoundError:  # a save that was killed as it got its name
            build_is_gone = True
        if build_is_gone or age >= KEPT - 1:
            shutil.rmtree(folder, ignore_errors=True)


def room_in_memory():
    try:
        room = os.statvfs(IN_MEMORY)
    except OSError:
        return 0
    return room.f_bavail * room.f_frsize


def unnamed_file(folder, size):
    """A sparse file that nothing but our processes holds: it goes with them."""
    fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    os.ftruncate(fd, size)
    return fd
