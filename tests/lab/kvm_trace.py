"""What the VM processes of this machine do, and what KVM sees of their guests."""

import glob
import os
import subprocess
import time

TRACING = "/sys/kernel/tracing"


def mount():
    for kind, folder in (("debugfs", "/sys/kernel/debug"), ("tracefs", TRACING)):
        subprocess.run(["mount", "-t", kind, kind, folder], check=False, capture_output=True)


def set_tracing(name, value):
    with open(f"{TRACING}/{name}", "w") as file:
        file.write(value)


def read(path):
    try:
        with open(path, errors="replace") as file:
            return file.read().strip()
    except OSError as error:
        return f"({error.strerror})"


def show_process(pid):
    for task in sorted(glob.glob(f"/proc/{pid}/task/*"), key=lambda path: int(path.rsplit("/")[-1])):
        stat = read(f"{task}/stat").rsplit(")", 1)[-1].split()
        ticks = "/".join(stat[11:13]) if len(stat) > 12 else "?"
        print(f"  {read(f'{task}/comm'):12} {stat[0] if stat else '?'} ticks {ticks} "
              f"wchan {read(f'{task}/wchan')} syscall {read(f'{task}/syscall')}")
        print("    " + read(f"{task}/stack").replace("\n", "\n    "))
    counts = {path.rsplit("/")[-1]: read(path).split("eventfd-count:")[-1].split()[0]
              for path in glob.glob(f"/proc/{pid}/fdinfo/*") if "eventfd-count:" in read(path)}
    print("  events not taken, by descriptor: "
          + (", ".join(f"{fd}={count}" for fd, count in counts.items() if count != "0") or "none"))
    for directory in glob.glob(f"/sys/kernel/debug/kvm/{pid}-*"):
        counts = {name: read(f"{directory}/{name}") for name in os.listdir(directory)
                  if os.path.isfile(f"{directory}/{name}")}
        print("  kvm: " + ", ".join(f"{name}={count}" for name, count in sorted(counts.items())
                                    if count not in ("0", "")))


def show_trace(seconds):
    """Where the guests are: each entry and exit of KVM with the instruction's address."""
    try:
        set_tracing("events/kvm/enable", "1")
        set_tracing("tracing_on", "1")
        time.sleep(seconds)
        set_tracing("tracing_on", "0")
        lines = [line for line in read(f"{TRACING}/trace").split("\n") if not line.startswith("#")]
        print(f"  trace of {seconds} s: {len(lines)} lines, the last:")
        print("    " + "\n    ".join(lines[-40:]))
    except OSError as error:
        print(f"  no trace: {error}")


def vm_processes():
    found = subprocess.run(["pgrep", "-x", "vmctl-vmm"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]
