"""Stands for `python`, `diffusers-dod`, `accelerate` and `torchrun`: has `server.py` run the command, and ends with its status."""

import json
import os
import socket
import sys


folder = os.path.dirname(os.path.dirname(os.path.realpath(sys.argv[0])))
arguments = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect(os.path.join(folder, "socket"))
    socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
    sys.exit(int(server.recv(16) or 1))
