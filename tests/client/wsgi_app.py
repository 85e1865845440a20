"""A Flask application as users write it; gunicorn's hook, in gunicorn_conf.py, has its one line of registry."""

import os

from flask import Flask

app = Flask(__name__)


@app.get("/")
def answer() -> str:
    return str(os.getpid())
