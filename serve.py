"""Serve a trained model: OpenAI's API over HTTP, and a page to try it. The body is serving/server.py's.

python serve.py RUN [--host 127.0.0.1] [--port 8000] [--device D]
"""

from config import exit_cleanly
from serving.server import main

if __name__ == "__main__":
    exit_cleanly(main)
