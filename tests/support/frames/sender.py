"""sender.py MAC INTERFACE NEIGHBOUR: sends frames, good ones and forged ones, a few times; each bears its name. NEIGHBOUR is
another guest's link-local address."""
import socket, struct, sys, time
mac = bytes.fromhex(sys.argv[1].replace(":", ""))
other, all = bytes.fromhex("525400aaaaaa"), b"\xff" * 6
v4, v6 = socket.inet_aton, lambda text: socket.inet_pton(socket.AF_INET6, text)
def ether(kind, body, source=mac, to=all): return to + source + struct.pack("!H", kind) + body
def name(text): return b"<" + text.encode() + b">"
def arp(text, address, hardware=mac):
    body = struct.pack("!HHBBH", 1, 0x800, 6, 4, 2) + hardware + v4(address) + all + v4("192.168.100.99")
    return ether(0x806, body + name(text))
def sum16(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16: total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff
def udp(text, address, sport, dport, **more):
    data = struct.pack("!HHHH", sport, dport, 8 + len(name(text)), 0) + name(text)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(data), 0, 0, 64, 17, 0) + v4(address) + v4("255.255.255.255")
    return ether(0x800, head[:10] + struct.pack("!H", sum16(head)) + head[12:] + data, **more)
def icmp6(text, source, kind, body):
    data = struct.pack("!BBH", kind, 0, 0) + body + name(text)
    to = v6("ff02::1")
    pseudo = v6(source) + to + struct.pack("!II", len(data), 58)
    data = data[:2] + struct.pack("!H", sum16(pseudo + data)) + data[4:]
    head = struct.pack("!IHBB", 0x60000000, len(data), 58, 255) + v6(source) + to
    return ether(0x86dd, head + data, to=bytes.fromhex("333300000001"))
def neighbour(text, source, target): return icmp6(text, source, 136, b"\x20\0\0\0" + v6(target))
frames = [
    arp("good-arp", "192.168.100.10"), arp("good-probe", "0.0.0.0"),
    udp("good-ipv4", "192.168.100.10", 1000, 1000), udp("good-dhcp", "0.0.0.0", 68, 67),
    neighbour("good-nd", "fd00:100::10", "fd00:100::10"), neighbour("good-ll", "fe80::10", "fe80::10"),
    udp("bad-mac", "192.168.100.10", 1000, 1000, source=other),
    arp("bad-arp-neighbour", "192.168.100.11"), arp("bad-arp-gateway", "192.168.100.1"),
    arp("bad-arp-mac", "192.168.100.10", hardware=other),
    udp("bad-ipv4", "192.168.100.11", 1000, 1000), udp("bad-dhcp", "192.168.100.10", 67, 68),
    icmp6("bad-ra", "fe80::10", 134, b"\x40\0\x07\x08" + b"\0" * 8),
    icmp6("bad-redirect", "fe80::10", 137, b"\0" * 36),
    neighbour("bad-nd-neighbour", "fe80::10", "fd00:100::11"), neighbour("bad-nd-gateway", "fe80::10", "fd00:100::1"),
    icmp6("bad-ll-neighbour", sys.argv[3], 128, b"\0\1\0\1"), neighbour("bad-nd-ll-neighbour", "fe80::10", sys.argv[3]),
    icmp6("bad-ipv6", "fd00:100::11", 128, b"\0\1\0\1"),
    ether(0x8100, struct.pack("!HH", 10, 0x800) + udp("bad-tag", "192.168.100.10", 1, 1)[14:]),
]
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
wire.bind((sys.argv[2], 0))
for _ in range(3):
    for frame in frames: wire.send(frame + b"\0" * (60 - len(frame)))
    time.sleep(0.05)
