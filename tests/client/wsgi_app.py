"""An example Flask application, which gunicorn registers by a hook in gunicorn_conf.py."""

import os

from flask import Flask

app = Flask(__name__)


@app.get("/")
def answer() -> str:
    return str(os.getpid())
