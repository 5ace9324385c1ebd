"""listener.py INTERFACE SECONDS: says which frames of sender.py came by."""
import re, socket, sys, time
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
wire.bind((sys.argv[1], 3))
wire.settimeout(0.1)
print("ready", flush=True)
seen, end = set(), time.time() + float(sys.argv[2])
while time.time() < end:
    try: frame = wire.recv(4096)
    except socket.timeout: continue
    seen.update(re.findall(rb"<([a-z0-9-]+)>", frame))
print(" ".join(sorted(name.decode() for name in seen)))
