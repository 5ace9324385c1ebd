"""The machines that the benches in the lab compare: ours, in both kinds, and QEMU's, with the same kernel,
initial ram disk and arguments. A machine is a command; its console is its standard output and input."""

import os
import select
import signal
import statistics
import subprocess
import sys
import time

ARGUMENTS = "console=ttyS0 quiet panic=-1 reboot=k mitigations=off tsc=reliable"
KERNEL, INITRD = "/guest/vmlinux", "/guest/initrd"
MAC = "52:54:00:00:00:01"
MACHINES = ("vmctl", "vmctl micro", "qemu microvm", "qemu q35")


def command(machine, disks=(), taps=(), vcpus=1, memory_mib=256, arguments="", vhost=False, until=None):
    """The command that starts it. `disks` are raw files, `taps` names of existing ones."""
    cmdline = f"{ARGUMENTS} {arguments}".strip()
    if machine.startswith("vmctl"):
        words = ["boot", "--program", "/usr/local/bin/vmctl-vmm", "--kernel", KERNEL, "--initrd", INITRD, "--vcpus",
                 str(vcpus), "--memory", str(memory_mib), "--cmdline", cmdline, "--timeout", "600"]
        words += ["--micro"] if machine.endswith("micro") else []
        words += ["--until", until] if until else ["--interactive"]
        for number, disk in enumerate(disks):
            words += ["--disk", f"disk{number}={disk}"]
        for number, tap in enumerate(taps):
            words += ["--tap", f"nic{number}={tap}={MAC[:-2]}{number + 1:02x}{',vhost' if vhost else ''}"]
        return words
    # With rtc=on, for the kernel waits seconds for a clock that ACPI promises and the machine lacks.
    kind, bus = ("microvm,rtc=on", "device") if machine == "qemu microvm" else ("q35", "pci")
    words = ["qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-M", kind, "-m", str(memory_mib), "-smp",
             str(vcpus), "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
             "-kernel", KERNEL, "-initrd", INITRD, "-append", cmdline]
    for number, disk in enumerate(disks):
        words += ["-drive", f"if=none,id=disk{number},format=raw,file={disk}",
                  "-device", f"virtio-blk-{bus},drive=disk{number}"]
    for number, tap in enumerate(taps):
        words += ["-netdev", f"tap,id=nic{number},ifname={tap},script=no,downscript=no"
                  + (",vhost=on" if vhost else ""),
                  "-device", f"virtio-net-{bus},netdev=nic{number},mac={MAC[:-2]}{number + 1:02x}"]
    return words


class Guest:
    """A running machine and its console."""

    def __init__(self, words):
        self.words, self.seen, self.begin = words, b"", time.monotonic()
        self.child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT, start_new_session=True)

    def expect(self, marker, timeout=120):
        """Reads until the marker; forgets all up to it. Gives the seconds since the start."""
        marker = marker.encode()
        while marker not in self.seen:
            if not select.select([self.child.stdout], [], [], timeout)[0]:
                sys.exit(f"{self.words[0]}: no {marker} in {timeout} s\n{self.seen.decode(errors='replace')}")
            part = os.read(self.child.stdout.fileno(), 65536)
            if not part:
                sys.exit(f"{self.words[0]}: ended early\n{self.seen.decode(errors='replace')}")
            self.seen += part
        self.seen = self.seen.split(marker, 1)[1]
        return time.monotonic() - self.begin

    def run(self, line, timeout=300):
        """Runs a line in the guest's shell; gives the seconds it took."""
        # The quotes keep the echo of what is typed from being taken for the answer.
        self.child.stdin.write(f"echo beg''in; {line}; echo do''ne\n".encode())
        self.child.stdin.flush()
        self.expect("begin", timeout)
        start = time.monotonic()
        self.expect("done", timeout)
        return time.monotonic() - start

    def pid(self):
        """Of the process that runs the guest."""
        if self.words[0] != "boot":
            return self.child.pid
        found = subprocess.run(["pgrep", "-nx", "vmctl-vmm"], capture_output=True, text=True, check=True)
        return int(found.stdout)

    def kill(self):
        os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        if self.words[0] == "boot":
            subprocess.run(["pkill", "-9", "-x", "vmctl-vmm"], check=False)
        time.sleep(0.3)


def line(name, values, unit):
    return (f"{name:14} min {min(values):8.1f}  median {statistics.median(values):8.1f}  "
            f"max {max(values):8.1f} {unit}")
