"""A server that answers as the Hugging Face hub does, and a process that asks."""

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHA = 'a' * 40


class Handler(http.server.BaseHTTPRequestHandler):
  """The part that every repo shares; subclasses say what there is."""

  def response(self):
    """(status, headers, body) of a GET of `self.path`."""
    raise NotImplementedError

  def answer(self):
    status, headers, body = self.response()
    self.send_response(status)
    for name, value in {**headers, 'X-Repo-Commit': SHA}.items():
      self.send_header(name, value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body)

  do_GET = do_HEAD = answer

  def log_message(self, *args):
    pass


@contextlib.contextmanager
def serving(handler):
  """The address of a server that is there for the block alone."""
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  try:
    yield f'http://127.0.0.1:{server.server_port}'
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


def ask(code, endpoint, home, *argv, **environment):
  """The JSON that `code` prints in a process apart.

  huggingface_hub reads the environment once, when it is imported.
  """
  done = subprocess.run(
    [sys.executable, '-c', code, *argv],
    env=os.environ
    | {'HF_ENDPOINT': endpoint, 'HF_HOME': str(home), 'PYTHONPATH': str(ROOT)}
    | {'HF_HUB_OFFLINE': '0'}
    | environment,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)
