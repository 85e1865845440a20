"""Certificates for tests of TLS, made with openssl."""

import subprocess
from pathlib import Path

from regd.bridge.etcd.model import Tls
from tests.support.etcd import need

_COMMAND_S = 30.0


class Authority:
    """A certificate authority, with its files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self.cert = folder / "ca.crt"
        self._key = folder / "ca.key"
        self._openssl("req", "-x509", "-subj", "/CN=authority", "-out", self.cert, "-keyout", self._key)

    def _openssl(self, command: str, *arguments: str | Path) -> None:
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
        done = subprocess.run(
            [need("openssl"), command, *key, *arguments],
            capture_output=True,
            text=True,
            timeout=_COMMAND_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def issue(self, name: str, address: str = "IP:127.0.0.1") -> Tls:
        """Issue a certificate for a server at an address, or for a client."""
        cert, key = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        self._openssl(
            "req", "-x509", "-CA", self.cert, "-CAkey", self._key, "-subj", f"/CN={name}",
            "-addext", f"subjectAltName={address}", "-out", cert, "-keyout", key,
        )  # fmt: skip
        return Tls(self.cert, cert, key)
