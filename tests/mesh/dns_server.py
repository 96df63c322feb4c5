"""A server of names, with answers that say which server it is: python -m tests.mesh.dns_server NUMBER.

A of any name is 192.0.2.NUMBER, AAAA 2001:db8::NUMBER, TXT `server NUMBER`; of big.test. TXT is far more
than fits a datagram, refused.test. is REFUSED, silent.test. has no answer. A zone's transfer is two messages,
after which the connection stays. UDP and TCP, of both families.
"""

from __future__ import annotations

import selectors
import socket
import sys

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

BIG = [f"part {number} " + "x" * 200 for number in range(40)]


def reply(data: bytes, number: str, room: int) -> bytes | None:
    query = dns.message.from_wire(data)
    found = dns.message.make_response(query)
    asked = query.question[0]
    name, kind = asked.name.to_text().lower(), asked.rdtype.name
    texts = {"A": [f"192.0.2.{number}"], "AAAA": [f"2001:db8::{number}"], "TXT": [f'"server {number}"']}
    texts["AXFR"] = ["ns. root. 7 3 3 3 3"]
    if name == "silent.test.":
        return None
    if name == "refused.test.":
        found.set_rcode(dns.rcode.REFUSED)
    elif name == "big.test." and kind == "TXT":
        found.answer.append(dns.rrset.from_text(asked.name, 5, "IN", "TXT", *(f'"{text}"' for text in BIG)))
    elif kind in texts:
        found.answer.append(
            dns.rrset.from_text(asked.name, 5, "IN", kind.replace("AXFR", "SOA"), *texts[kind])
        )
    return found.to_wire(max_size=room, prefer_truncation=True)


def datagram(server: socket.socket, number: str) -> None:
    data, sender = server.recvfrom(65535)
    if (answer := reply(data, number, 512)) is not None:
        server.sendto(answer, sender)


def connection(server: socket.socket, number: str) -> None:
    client, _ = server.accept()
    with client, client.makefile("rwb") as stream:
        while length := stream.read(2):
            data = stream.read(int.from_bytes(length, "big"))
            answer = reply(data, number, 65535)
            if answer is None:
                return
            is_transfer = dns.message.from_wire(data).question[0].rdtype == dns.rdatatype.AXFR
            for _ in range(1 + is_transfer):
                stream.write(len(answer).to_bytes(2, "big") + answer)
            stream.flush()


def main(number: str) -> None:
    waiting = selectors.DefaultSelector()
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        for kind, act in ((socket.SOCK_DGRAM, datagram), (socket.SOCK_STREAM, connection)):
            server = socket.socket(family, kind)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            server.bind((address, 53))
            if kind == socket.SOCK_STREAM:
                server.listen()
            waiting.register(server, selectors.EVENT_READ, act)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        for key, _ in waiting.select():
            key.data(key.fileobj, number)


if __name__ == "__main__":
    main(sys.argv[1])
