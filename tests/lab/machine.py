"""One lab machine: the QEMU process and the three channels to it.

Every channel and every file of a call's own (payload, scratch disk) is an
inherited file descriptor of something without a name, so that there is nothing
in the file system to clean up, whatever kills us: the kernel drops it all with
the last process that holds it.

Frames with the agent (`image/agent`): a type byte, a little-endian u32 length,
the payload.
  to the lab:    c  "SECONDS SEED": set the clock and the random seed
                 a  one argument of the command    e  NAME=VALUE
                 w  terminal size: two u16, rows and columns
                 r  run it    i  bytes typed at its terminal
  from the lab:  R  ready    B  heartbeat    O, E  output, errors
                 T  a piece of the tar file of /out    X  exit status, in text
                 F  the lab failed, in words
"""

import json
import os
import select
import socket
import struct
import subprocess
import time

KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable"
# Fixed, for a restored lab must find the disks that it was saved with. Sparse:
# only what is written takes room.
PAYLOAD_BYTES = 4 << 30
SCRATCH_BYTES = 16 << 30
# A disk that is empty unless a call asks for something on it: so one saved lab serves all calls.
EXTRA_BYTES = 4 << 30
# The number by which QEMU knows the file of a saved lab's state.
STATE = 1
CONSOLE_KEPT_BYTES = 64 * 1024
# A panic with its back-trace; fewer lines would leave out the panic itself.
CONSOLE_SHOWN_LINES = 100


class LabError(Exception):
    """The lab itself failed, not the command in it."""


class NotRestored(LabError):
    """The saved lab is of no use."""


class Hung(LabError):
    """No sign of life from the lab; `dump` says what the machine was doing."""

    def __init__(self, text, dump):
        super().__init__(text)
        self.dump = dump


class Machine:
    def __init__(self, build, cpus, memory_mib, ram_fd, payload_fd, scratch_fd, extra_fd, thread="multi", saving=False):
        """Starts QEMU: booting, to be saved, or waiting for `restore`."""
        control, control_theirs = socket.socketpair()
        console, console_theirs = socket.socketpair()
        qmp, qmp_theirs = socket.socketpair()
        self.control, self.console, self.qmp = control, console, Qmp(qmp)
        self.complaints = open(os.memfd_create("stderr"), "w+b")
        self.console_log = b""
        self.pending = b""
        fds = [control_theirs.fileno(), console_theirs.fileno(), qmp_theirs.fileno()]
        # share=on writes the guest's memory to the file, for the save; off
        # gives a private copy-on-write view of it.
        share = "on" if saving else "off"
        # setpriv: if we are killed, QEMU goes with us.
        command = ["setpriv", "--pdeathsig", "KILL", f"{build}/qemu/run"]
        command += ["-accel", f"tcg,thread={thread}", "-M", "q35,memory-backend=ram", "-cpu", "EPYC"]
        command += ["-smp", str(cpus), "-m", f"{memory_mib}M"]
        command += ["-object", f"memory-backend-file,id=ram,size={memory_mib}M,mem-path=/proc/self/fd/{ram_fd},share={share}"]
        command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-bios", "qboot.rom"]
        command += ["-kernel", f"{build}/vmlinux", "-initrd", f"{build}/initrd", "-append", KERNEL_ARGUMENTS]
        command += ["-chardev", f"socket,id=console,fd={fds[1]}", "-serial", "chardev:console"]
        command += ["-chardev", f"socket,id=qmp,fd={fds[2]}", "-mon", "chardev=qmp,mode=control"]
        command += ["-device", "virtio-serial-pci", "-chardev", f"socket,id=control,fd={fds[0]}"]
        command += ["-device", "virtserialport,chardev=control,name=lab", "-device", "virtio-rng-pci"]
        command += disk("root", f"{build}/root.ext4", "readonly=on")
        command += disk("payload", f"/proc/self/fd/{payload_fd}", "readonly=on")
        command += disk("scratch", f"/proc/self/fd/{scratch_fd}", "discard=unmap")
        command += disk("extra", f"/proc/self/fd/{extra_fd}", "readonly=on")
        if not saving:
            command += ["-incoming", "defer"]
        self.process = subprocess.Popen(
            command,
            pass_fds=[*fds, ram_fd, payload_fd, scratch_fd, extra_fd],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.complaints,
            start_new_session=True,  # Ctrl-C is for us: we end it in order
        )
        for theirs in (control_theirs, console_theirs, qmp_theirs):
            theirs.close()

    # ---- its life ---------------------------------------------------------------

    def restore(self, state_fd):
        try:
            self.qmp.open()
            self.qmp("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
            self.qmp.give(STATE, state_fd, os.O_RDONLY)
            self.qmp("migrate-incoming", uri=f"file:/dev/fdset/{STATE}")
            while self.qmp("query-status")["status"] == "inmigrate":
                time.sleep(0.005)
            self.qmp("cont")
        except LabError as error:
            raise NotRestored(f"{error}: {self.last_words()}") from None

    def save(self, state_fd):
        """Stops it and writes all but its memory, which is in the file already."""
        self.qmp.open()
        self.qmp("stop")
        self.qmp("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
        self.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        self.qmp.give(STATE, state_fd, os.O_WRONLY)
        self.qmp("migrate", uri=f"file:/dev/fdset/{STATE}")
        while (answer := self.qmp("query-migrate")).get("status") not in ("completed", "failed"):
            time.sleep(0.01)
        if answer["status"] == "failed":
            raise LabError(f"the lab cannot be saved: {answer.get('error-desc')}")

    def kill(self):
        """Ends it at once; harmless when it has ended."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for channel in (self.control, self.console, self.qmp.socket, self.complaints):
            channel.close()

    # ---- frames -----------------------------------------------------------------

    def send(self, kind, payload=b""):
        try:
            self.control.sendall(kind + struct.pack("<I", len(payload)) + payload)
        except OSError:
            raise LabError(f"the lab went down: {self.last_words()}") from None

    def refresh(self):
        self.send(b"c", f"{time.time():.6f} ".encode() + os.urandom(256))

    def frames(self, silence_s, also=[]):
        """Yields frames as they come, and (None, fd) for readable fds of the list `also`.

        Raises Hung after `silence_s` without a frame. The caller's own time
        does not count: a slow reader of the output is no hung lab.
        """
        while True:
            deadline = time.monotonic() + silence_s
            while not self._whole_frame():
                left = deadline - time.monotonic()
                if left <= 0:
                    raise Hung(f"no sign of life for {silence_s:.0f} s", self.registers())
                ready = select.select([self.control, self.console, *also], [], [], left)[0]
                if self.console in ready:
                    self._read_console()
                for fd in ready:
                    if fd in also:
                        yield None, fd
                if self.control in ready:
                    chunk = self.control.recv(1 << 18)
                    if not chunk:
                        raise LabError(f"the lab went down: {self.last_words()}")
                    self.pending += chunk
            end = 5 + struct.unpack_from("<I", self.pending, 1)[0]
            kind, payload = self.pending[:1], self.pending[5:end]
            self.pending = self.pending[end:]
            yield kind, payload

    def _whole_frame(self):
        have = len(self.pending)
        return have >= 5 and have >= 5 + struct.unpack_from("<I", self.pending, 1)[0]

    # ---- what it says when something is wrong -----------------------------------

    def _read_console(self):
        try:
            chunk = self.console.recv(65536, socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionResetError):
            chunk = b""
        self.console_log = (self.console_log + chunk)[-CONSOLE_KEPT_BYTES:]
        return chunk

    def last_words(self):
        """QEMU's own complaint, or the end of the lab's console."""
        try:
            status = self.process.wait(15)  # to give back its memory takes a busy host seconds
        except subprocess.TimeoutExpired:
            status = None
        while self._read_console():
            pass
        if status:
            self.complaints.seek(0)
            lines = [line for line in self.complaints.read().decode(errors="replace").splitlines() if "warning:" not in line]
            return f"QEMU ended with status {status}\n" + "\n".join(lines)
        cause = "QEMU does not answer" if status is None else "it shut down or crashed"
        lines = self.console_log.decode(errors="replace").splitlines()[-CONSOLE_SHOWN_LINES:]
        return "\n".join([f"{cause}; the end of its console:", *lines])

    def registers(self):
        """What a hung machine was doing, as far as QEMU itself still answers."""
        try:
            self.qmp.open()
            dump = [self.qmp("human-monitor-command", **{"command-line": line}) for line in ("info status", "info registers -a")]
        except LabError as error:
            dump = [str(error)]
        while self._read_console():
            pass
        return "\n".join([*dump, "console:", self.console_log.decode(errors="replace")])


def disk(name, path, options):
    # cache=unsafe: nothing here outlives the call. Locks would keep two labs
    # from sharing the root disk, which both only read.
    return [
        "-drive", f"file={path},format=raw,if=none,id={name},cache=unsafe,file.locking=off,{options}",
        "-device", f"virtio-blk-pci,drive={name}",
    ]  # fmt: skip


class Qmp:
    """QEMU's control protocol, one command at a time."""

    def __init__(self, connection):
        self.socket = connection
        self.file = None

    def open(self):
        if self.file is None:
            self.socket.settimeout(30)
            self.file = self.socket.makefile("r")
            self("qmp_capabilities")

    def give(self, number, fd, mode):
        """Hands QEMU a file without a name, to be opened in this mode as /dev/fdset/NUMBER by a later command."""
        again = os.open(f"/proc/self/fd/{fd}", mode)
        try:
            self._ask("add-fd", {"fdset-id": number}, [again])
        finally:
            os.close(again)

    def __call__(self, command, **arguments):
        return self._ask(command, arguments)

    def _ask(self, command, arguments, fds=()):
        line = json.dumps({"execute": command, "arguments": arguments}) + "\n"
        try:
            socket.send_fds(self.socket, [line.encode()], fds)
            while line := self.file.readline():
                answer = json.loads(line)
                if "error" in answer:
                    raise LabError(f"QEMU refuses {command}: {answer['error']['desc']}")
                if "return" in answer:
                    return answer["return"]
        except OSError as error:
            raise LabError(f"QEMU does not answer {command}: {error}") from None
        raise LabError(f"QEMU ended at {command}")
