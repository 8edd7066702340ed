"""grpc.health.v1.Health/Check without a library: HTTP/2 in as few frames as it takes. What kubelet's grpc probes do."""
import socket
import struct
import time

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY = 0, 1, 3, 4, 6, 7
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1


def _frame(kind, flags, stream, payload=b""):
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def _header(name, value):
    """HPACK: literal, not indexed, not compressed."""
    return b"".join([b"\0", bytes([len(name)]), name.encode(), bytes([len(value)]), value.encode()])


def _request(service):
    headers = b"".join(_header(name, value) for name, value in [
        (":method", "POST"), (":scheme", "http"), (":path", "/grpc.health.v1.Health/Check"), (":authority", "probe"),
        ("content-type", "application/grpc"), ("te", "trailers"), ("user-agent", "kube-probe")])
    name = service.encode()
    message = b"\x0a" + bytes([len(name)]) + name if name else b""
    return (_PREFACE + _frame(_SETTINGS, 0, 0) + _frame(_HEADERS, _END_HEADERS, 1, headers) +
            _frame(_DATA, _END_STREAM, 1, b"\0" + struct.pack("!I", len(message)) + message))


class _Connection:
    def __init__(self, address, end):
        self._end = end
        self._socket = socket.create_connection(address, timeout=self._left())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.close()

    def _left(self):
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer in time")
        return left

    def send(self, data):
        self._socket.settimeout(self._left())
        self._socket.sendall(data)

    def read(self, count):
        data = b""
        while len(data) < count:
            self._socket.settimeout(self._left())
            more = self._socket.recv(count - len(data))
            if not more:
                raise ConnectionError("the connection was closed")
            data += more
        return data

    def read_frame(self):
        head = self.read(9)
        return head[3], head[4], self.read(int.from_bytes(head[:3], "big"))


def is_serving(address, service="", timeout=1):
    """True: SERVING. False: it says otherwise, or nothing in time, or nobody is there."""
    try:
        with _Connection(address, time.monotonic() + timeout) as connection:
            connection.send(_request(service))
            body = b""
            while True:
                kind, flags, payload = connection.read_frame()
                if kind in (_GOAWAY, _RST_STREAM):
                    return False
                if kind in (_SETTINGS, _PING) and not flags & _ACK:
                    connection.send(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
                if kind == _DATA:
                    body += payload
                if kind in (_DATA, _HEADERS) and flags & _END_STREAM:
                    # A message of which field 1, the status, is 1: SERVING. Errors have no message.
                    return body[5:] == b"\x08\x01"
    except OSError:
        return False
