"""An S3 server for tests: what a record store needs of it, over a folder. It checks signatures (AWS SigV4).

    s3_server.py FOLDER PORT ACCESS_KEY SECRET_KEY

Objects are files of FOLDER/BUCKET, durable before they are acknowledged. Buckets are made by PUT. Not for production.
"""
import hashlib
import hmac
import os
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, quote, unquote
from xml.sax.saxutils import escape

folder, port, access_key, secret_key = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]


def digest(key, text):
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *unused):
        pass

    def answer(self, code, body=b"", kind="application/xml"):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", kind)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code, name, message):
        self.close_connection = True  # A body that nobody has read is in the way of the next request.
        text = "<Error><Code>%s</Code><Message>%s</Message></Error>" % (name, escape(message))
        self.answer(code, text.encode())

    def signed(self):
        """Whether the Authorization header is what this request and our secret give."""
        scheme, _, rest = self.headers.get("Authorization", "").partition(" ")
        if scheme != "AWS4-HMAC-SHA256":
            return False
        fields = dict(part.strip().split("=", 1) for part in rest.split(","))
        user, day, region, service, _ = fields["Credential"].split("/")
        path, _, query = self.path.partition("?")
        names = fields["SignedHeaders"].split(";")
        if "host" not in names or "x-amz-content-sha256" not in names or user != access_key:
            return False
        canonical = "\n".join([
            self.command, path, "&".join(sorted(query.split("&"))),
            "".join("%s:%s\n" % (name, self.headers.get(name, "").strip()) for name in names),
            ";".join(names), self.headers["x-amz-content-sha256"]])
        scope = "/".join([day, region, service, "aws4_request"])
        text = "\n".join(["AWS4-HMAC-SHA256", self.headers["x-amz-date"], scope,
                          hashlib.sha256(canonical.encode()).hexdigest()])
        key = ("AWS4" + secret_key).encode()
        for part in (day, region, service, "aws4_request"):
            key = digest(key, part)
        return hmac.compare_digest(digest(key, text).hex(), fields["Signature"])

    def target(self):
        bucket, _, key = unquote(self.path.partition("?")[0])[1:].partition("/")
        return os.path.join(folder, quote(bucket, "")), key

    def handle_request(self):
        if not self.signed():
            return self.refuse(403, "SignatureDoesNotMatch", "the signature is wrong")
        bucket, key = self.target()
        if self.command == "PUT" and not key:
            os.makedirs(bucket, exist_ok=True)
            return self.answer(200)
        if not os.path.isdir(bucket):
            return self.refuse(404, "NoSuchBucket", "there is no such bucket")
        if self.command == "GET" and not key:
            return self.list(bucket)
        path = os.path.join(bucket, quote(key, ""))
        if self.command == "PUT":
            return self.put(bucket, path)
        if self.command == "DELETE":
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
            return self.answer(204)
        try:
            with open(path, "rb") as file:
                return self.answer(200, file.read(), "application/octet-stream")
        except FileNotFoundError:
            return self.refuse(404, "NoSuchKey", "there is no such object")

    do_GET = do_PUT = do_DELETE = do_HEAD = handle_request

    def put(self, bucket, path):
        left = int(self.headers["Content-Length"])
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            while left:
                piece = self.rfile.read(min(left, 1 << 20))
                if not piece:
                    os.unlink(file.name)
                    self.close_connection = True
                    return None
                file.write(piece)
                left -= len(piece)
            file.flush()
            os.fsync(file.fileno())
        os.rename(file.name, path)
        return self.answer(200)

    def list(self, bucket):
        query = dict(parse_qsl(self.path.partition("?")[2], keep_blank_values=True))
        most, prefix, after = int(query.get("max-keys", 1000)), query.get("prefix", ""), query.get("start-after", "")
        keys = sorted(unquote(name) for name in os.listdir(bucket))
        keys = [key for key in keys if key.startswith(prefix) and key > after]
        text = ["<ListBucketResult><IsTruncated>%s</IsTruncated>" % ("true" if len(keys) > most else "false")]
        for key in keys[:most]:
            try:
                status = os.stat(os.path.join(bucket, quote(key, "")))
            except FileNotFoundError:
                continue
            when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(status.st_mtime))
            text.append("<Contents><Key>%s</Key><LastModified>%s</LastModified><Size>%d</Size></Contents>" %
                        (escape(key), when, status.st_size))
        text.append("</ListBucketResult>")
        return self.answer(200, "".join(text).encode())


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


threading.stack_size(256 << 10)
Server(("127.0.0.1", port), Handler).serve_forever()
