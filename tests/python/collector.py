"""A collector of OTLP over HTTP for the tests: decodes requests with opentelemetry-proto and writes a line of JSON for each span.

    collector.py PORT FILE [CERTIFICATE KEY]

`PUT /behaviour` with {"status", "retry_after", "delay", "rejected", "page"} changes the answers to further requests.
"""

import json
import ssl
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


def value_of(value):
    return getattr(value, value.WhichOneof("value"))


def attributes_of(attributes):
    return {pair.key: value_of(pair.value) for pair in attributes}


def spans_of(body):
    request = ExportTraceServiceRequest.FromString(body)
    for resource_spans in request.resource_spans:
        resource = attributes_of(resource_spans.resource.attributes)
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                yield {
                    "name": span.name,
                    "kind": span.kind,
                    "trace": span.trace_id.hex(),
                    "span": span.span_id.hex(),
                    "parent": span.parent_span_id.hex(),
                    "state": span.trace_state,
                    "start": span.start_time_unix_nano,
                    "end": span.end_time_unix_nano,
                    "attributes": attributes_of(span.attributes),
                    "failed": span.status.code == 2,
                    "flags": span.flags,
                    "resource": resource,
                    "scope": scope_spans.scope.name,
                }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_PUT(self):
        self.server.behaviour = json.loads(self.body())
        self.answer(200, b"")

    def do_GET(self):
        self.answer(200, str(self.server.requests).encode())

    def do_POST(self):
        body, behaviour = self.body(), self.server.behaviour
        self.server.requests += 1
        time.sleep(behaviour.get("delay", 0))
        status = behaviour.get("status", 200)
        if status >= 300:
            return self.answer(status, b"", {"Retry-After": behaviour["retry_after"]} if "retry_after" in behaviour else {})
        if behaviour.get("page"):
            return self.answer(200, b"<!doctype html><title>Sign in</title>", {"Content-Type": "text/html; charset=utf-8"})
        assert self.headers["Content-Type"] == "application/x-protobuf", self.headers["Content-Type"]
        with open(self.server.file, "a") as file:
            for span in spans_of(body):
                file.write(json.dumps(span | {"path": self.path, "headers": dict(self.headers)}) + "\n")
        answer = ExportTraceServiceResponse()
        if behaviour.get("rejected"):
            answer.partial_success.rejected_spans = behaviour["rejected"]
            answer.partial_success.error_message = "too old"
        self.answer(200, answer.SerializeToString())

    def body(self):
        return self.rfile.read(int(self.headers["Content-Length"]))

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    server.behaviour, server.requests, server.file = {}, 0, sys.argv[2]
    if len(sys.argv) > 3:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*sys.argv[3:])
        # A client that refuses the certificate ends its own connection, in its own thread.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.serve_forever()
