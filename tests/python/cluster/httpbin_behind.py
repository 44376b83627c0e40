"""httpbin on a free port, as an application behind a path prefix: it heeds X-Forwarded-Prefix. Prints its URL."""

import threading

from httpbin import app
from pytest_httpbin.serve import Server
from werkzeug.middleware.proxy_fix import ProxyFix

server = Server(application=ProxyFix(app, x_for=0, x_proto=1, x_host=1, x_prefix=1))
server.start()
print(server.url, flush=True)
threading.Event().wait()
